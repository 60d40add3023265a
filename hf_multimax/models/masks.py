"""Which masks a patched model's layers get, by what its code was written for."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import eager_mask, sdpa_mask

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
    return sdpa_mask(*args, **kwargs)


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
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and _reads_additive_masks(type(part)):
            kinds[id(part.config)] = ADDITIVE
    for name in outside:
        kinds[id(owner_of(model, name).config)] = ADDITIVE
    return kinds


def owner_of(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """The innermost model that the module of that name is in: the one whose code makes its masks."""
    while name:
        name = name.rpartition(".")[0]
        part = model.get_submodule(name)
        if isinstance(part, PreTrainedModel):
            return part
    return model


def _reads_additive_masks(cls: type[PreTrainedModel]) -> bool:
    """Whether a class was written for eager attention's masks alone.

    Some that do not take SDPA (it has no soft-capping, no sinks) do take masks of any kind, and say so.
    """
    return not (cls._supports_sdpa or (cls._supports_attention_backend and cls._supports_flex_attn))
