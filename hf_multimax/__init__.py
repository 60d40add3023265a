"""MultiMax for Hugging Face Transformers: a learnable, sparse and multi-modal SoftMax in any model."""

import importlib
from typing import Any

from hf_multimax import peft
from hf_multimax.attention.choose import backend, current_backend
from hf_multimax.attention.interface import multimax_attention
from hf_multimax.config import MultiMaxConfig
from hf_multimax.functional import modulate, multimax
from hf_multimax.loss.cross_entropy import multimax_linear_cross_entropy
from hf_multimax.models.classes import register_extension_points
from hf_multimax.models.doors import open_doors
from hf_multimax.models.patching import freeze_base, patch_model, print_trainable_parameters, unpatch_model
from hf_multimax.normalizers import (
    Learned,
    Option,
    build_normalizer,
    normalize,
    register_normalizer,
    registered_normalizers,
    rowwise,
)
from hf_multimax.normalizers.base import MultiMax, Normalizer, is_patched, multimax_parameters
from hf_multimax.version import __version__

__all__ = [
    "Learned",
    "Option",
    "NormalizerAnnealing",
    "SparsityAnnealing",
    "build_normalizer",
    "registered_normalizers",
    "rowwise",
    "MultiMax",
    "MultiMaxCallback",
    "MultiMaxConfig",
    "MultiMaxSeq2SeqTrainer",
    "MultiMaxSeq2SeqTrainingArguments",
    "MultiMaxTrainer",
    "MultiMaxTrainingArguments",
    "Normalizer",
    "__version__",
    "backend",
    "current_backend",
    "freeze_base",
    "is_patched",
    "modulate",
    "multimax",
    "multimax_attention",
    "multimax_linear_cross_entropy",
    "multimax_parameters",
    "normalize",
    "parameter_groups",
    "patch_model",
    "print_trainable_parameters",
    "push",
    "register_normalizer",
    "unpatch_model",
]

register_extension_points()
open_doors()
peft.register()


#: What needs the Trainer, which is slow to import, or the Hub is imported when it is asked for.
_LAZY = {
    "MultiMaxCallback": "training",
    "MultiMaxSeq2SeqTrainer": "training",
    "MultiMaxSeq2SeqTrainingArguments": "training",
    "MultiMaxTrainer": "training",
    "MultiMaxTrainingArguments": "training",
    "NormalizerAnnealing": "normalizers.annealing",
    "SparsityAnnealing": "normalizers.annealing",
    "parameter_groups": "training",
    "push": "publishing.hub",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"hf_multimax.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
