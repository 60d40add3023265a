"""Where published checkpoints and pickles look for generated classes; they are made in :mod:`hf_multimax.models`."""

from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from hf_multimax.models.checkpoint import PREFIX
from hf_multimax.models.classes import (
    MultiMaxAutoConfig,
    MultiMaxMixin,
    registered_config_class,
    registered_model_class,
)
from hf_multimax.models.configs import MultiMaxConfigMixin
from hf_multimax.normalizers.base import is_patched

__all__ = ["MultiMaxAutoConfig", "MultiMaxConfigMixin", "MultiMaxMixin", "is_patched"]


def __getattr__(name: str) -> Any:
    """``MultiMax<Arch>`` for any class of Transformers: the generated class."""
    stock = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if isinstance(stock, type) and issubclass(stock, PreTrainedConfig):
        return registered_config_class(stock)
    if isinstance(stock, type) and issubclass(stock, PreTrainedModel):
        return registered_model_class(stock)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
