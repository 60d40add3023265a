"""The functions of the literature that take SoftMax's place, each registered under its name.

All act along one dimension and return probabilities, those of ``unnormalized.py`` weights that need not sum to one:
masked entries are removed before anything is computed and get exactly 0, a row that keeps nothing is all 0, float64
stays float64 and other types are computed in float32. Gradients are exact. ``normalize(name, x, ...)`` calls them;
``patch_model(model, normalizer=name)`` puts them into a model. On CPUs most run in C++; what stands here defines them.
"""

from hf_multimax.normalizers import entmax, structured, unnormalized  # noqa: F401 - importing registers
from hf_multimax.normalizers.base import MultiMax, Normalizer, is_patched, multimax_parameters
from hf_multimax.normalizers.registry import (
    FunctionNormalizer,
    Learned,
    NormalizerSpec,
    Option,
    build_normalizer,
    get_normalizer,
    normalize,
    register_normalizer,
    registered_normalizers,
    rowwise,
)
from hf_multimax.normalizers.softmaxes import SoftMax

__all__ = [
    "FunctionNormalizer",
    "Learned",
    "MultiMax",
    "Normalizer",
    "NormalizerSpec",
    "Option",
    "SoftMax",
    "build_normalizer",
    "get_normalizer",
    "is_patched",
    "multimax_parameters",
    "normalize",
    "register_normalizer",
    "registered_normalizers",
    "rowwise",
]
