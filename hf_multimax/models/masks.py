"""Which masks a patched model's layers get, by what its code was written for."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import eager_mask, sdpa_mask

from hf_multimax.models.discovery import methods
from hf_multimax.models.generated import stock_of

__all__ = ["ADDITIVE", "FULL", "attention_mask", "mask_kinds", "owner_of"]

#: Always there, floating point, 0 or finfo.min: what eager attention gets. Without one, nothing is masked.
ADDITIVE = "additive"
#: SDPA's boolean masks, never left out for a causal layer.
FULL = "full"


def attention_mask(*args: Any, **kwargs: Any) -> Any:
    """The mask function of MultiMax attention: SDPA's masks, None where the layer knows that it is causal.

    A config with ``_multimax_masks`` asks for others: ``ADDITIVE`` or ``FULL``.
    """
    kind = getattr(kwargs.get("config"), "_multimax_masks", None)
    if kind == ADDITIVE:
        return eager_mask(*args, **kwargs)
    if kind == FULL:
        kwargs["allow_is_causal_skip"] = False
    mask = sdpa_mask(*args, **kwargs)
    window = kwargs.get("local_size")
    # allowed to be skipped: nothing was added to the causal window that would reach beyond it
    if mask is not None and window is not None and kwargs.get("allow_is_causal_skip") and _is_square(**kwargs):
        mask._multimax_window = window
    return mask


def _is_square(
    q_length: Any = None, kv_length: Any = None, q_offset: Any = 0, kv_offset: Any = 0, **kwargs: Any
) -> bool:
    """Whether a mask is of a whole sequence, without a cache, outside of compiled code, which notes nothing."""
    numbers = (q_length, kv_length, q_offset, kv_offset)
    return not torch.compiler.is_compiling() and numbers == (q_length, q_length, 0, 0) and isinstance(q_length, int)


def mask_kinds(
    model: PreTrainedModel, layers: Mapping[str, nn.Module], outside: Mapping[str, nn.Module]
) -> dict[int, str]:
    """The kind of masks of every config that needs another than SDPA's, by the config's ``id``.

    Args:
        layers: the attention layers of ``model`` by name.
        outside: those outside the AttentionInterface that are answered: they add their masks themselves.
    """
    kinds: dict[int, str] = {}
    for name, layer in layers.items():
        if not hasattr(layer, "is_causal"):  # only the mask can then say that it is
            kinds[id(owner_of(model, name).config)] = FULL
    for name, layer in layers.items():
        if _asks_for_sdpa(stock_of(type(layer))):
            kinds[id(owner_of(model, name).config)] = ADDITIVE
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and _reads_additive_masks(stock_of(type(part))):
            kinds[id(part.config)] = ADDITIVE
    for name in outside:
        kinds[id(owner_of(model, name).config)] = ADDITIVE
    return kinds


@functools.cache
def _asks_for_sdpa(cls: type[nn.Module]) -> bool:
    """Whether code of a class does something else under SDPA, by its name: it reads masks, or knows where one may be
    missing, and takes any other name for eager attention."""
    return any(
        "_attn_implementation" in code.co_names and "sdpa" in str(code.co_consts)
        for function in methods(cls)
        for code in [function.__code__]
    )


def owner_of(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """The innermost model that the module of that name is in: the one whose code makes its masks."""
    while name:
        name = name.rpartition(".")[0]
        part = model.get_submodule(name)
        if isinstance(part, PreTrainedModel):
            return part
    return model


def _reads_additive_masks(cls: type[PreTrainedModel]) -> bool:
    """Whether a class was written for eager attention's masks, alone or where it does not know better.

    Some that do not take SDPA (it has no soft-capping, no sinks) do take masks of any kind, and say so.
    """
    takes_any = cls._supports_sdpa or (cls._supports_attention_backend and cls._supports_flex_attn)
    return not takes_any or _asks_for_sdpa(cls)
