"""What a patch changes, all of it or none, and the way back.

Of the model: its class; each attention layer's ``multimax`` (a normalizer, or None for a layer left at SoftMax),
``_multimax_always_masked`` and ``_multimax_eager``, whether the stock model's attention was the eager one; the class of
a layer outside Transformers' AttentionInterface, and of a module that replaces such a layer while it runs;
``multimax_output``; ``_no_split_modules``, ``_keep_in_fp32_modules_strict`` and ``_keys_to_ignore_on_save``; and
``_multimax_stock``, what the last three and the attention implementations were.
Of its configs, which are first copied, as other models may hold them: their classes, the attention implementation, the
``multimax`` entry and ``_multimax_masks``.
"""

import contextlib
import copy
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_multimax.attention.interface import IMPLEMENTATION
from hf_multimax.config import MultiMaxConfig
from hf_multimax.models.changes import Changes
from hf_multimax.models.configs import MultiMaxConfigMixin, config_class
from hf_multimax.models.discovery import Layers, attention_layers, head_count, query_width, select_layers
from hf_multimax.models.generated import stock_of
from hf_multimax.models.masks import ADDITIVE, mask_kinds, owner_of
from hf_multimax.models.output import check_output_supported
from hf_multimax.models.outside import OutsideMixin, outside_class
from hf_multimax.models.switching import SwitchingMixin, switching_class, switching_modules
from hf_multimax.normalizers import build_normalizer, get_normalizer
from hf_multimax.normalizers.base import LAYER, OUTPUT, Normalizer

__all__ = ["attach", "build_normalizers", "detach", "output_modulator"]

logger = logging.getLogger(__name__)

_FLOAT32 = {LAYER, OUTPUT}
#: Set while an output-modulated model runs.
_OUTPUT_STATE = ("fused_output_loss", "_output_loss_checked", "_output_is_fusible")


def attach(
    model: PreTrainedModel,
    config: MultiMaxConfig,
    generated: type[PreTrainedModel],
    changes: Changes,
    strict: bool = True,
) -> None:
    """Put normalizers into ``model`` and switch its class and configs; whatever can raise comes before any change.

    Args:
        generated: the class that ``model`` becomes an instance of.
        changes: an open block of changes, that of whoever does more in one step.
        strict: False when ``config`` was made for another head class of the same architecture: patterns may then match
            nothing, and an output modulator that the class cannot have is dropped, with a line in the log.
    """
    config = _without_impossible_output(model, config, strict)
    selected = select_layers(model, config, strict) if config.attention else Layers()
    normalizers = build_normalizers(config, {**selected.interface, **selected.outside})
    output = output_modulator(model, config) if config.output else None
    layers = attention_layers(model) if config.attention else {}
    answering = {name: outside_class(stock_of(type(layer))) for name, layer in selected.outside.items()}
    switching = {
        module: switching_class(stock_of(type(module)))
        for module in switching_modules(model, selected.outside.values())
    }
    kinds = mask_kinds(model, layers, selected.outside)
    masked = {name: kinds.get(id(owner_of(model, name).config)) == ADDITIVE for name in layers}
    eager = {name: owner_of(model, name).config._attn_implementation == "eager" for name in layers}
    copies, implementations = _adapted_configs(model, config, kinds, [*layers.items(), *selected.outside.items()])
    # What accelerate wraps for FSDP2: a modulator is a unit of its own, for its type is not the block's.
    built = [*normalizers.values(), *([output] if output is not None else [])]
    units = {type(normalizer).__name__ for normalizer in built if list(normalizer.parameters())}
    stock = {
        "_no_split_modules": model._no_split_modules,
        "_keep_in_fp32_modules_strict": model._keep_in_fp32_modules_strict,
        "_keys_to_ignore_on_save": model._keys_to_ignore_on_save,
    }

    for module in list(model.modules()):
        for name, value in list(vars(module).items()):
            if isinstance(value, PreTrainedConfig):
                changes.set(module, name, copies[id(value)])
    for name, layer in layers.items():
        changes.set(layer, "multimax", normalizers.get(name))
        changes.set(layer, "_multimax_always_masked", masked[name])
        changes.set(layer, "_multimax_eager", eager[name])
    for name, layer in selected.outside.items():
        changes.set(layer, "multimax", normalizers[name])
        changes.set(layer, "__class__", answering[name])
    for module, cls in switching.items():
        changes.set(module, "__class__", cls)
    if output is not None:
        changes.set(model, OUTPUT, output)
    changes.set(model, "_multimax_stock", {"implementations": implementations, "attributes": stock})
    changes.set(model, "_no_split_modules", {*(model._no_split_modules or ()), *units})
    changes.set(model, "_keep_in_fp32_modules_strict", {*(model._keep_in_fp32_modules_strict or ()), *_FLOAT32})
    # Marian leaves out its positions, since it can compute them: those of a converted model are others.
    changes.set(model, "_keys_to_ignore_on_save", set())
    changes.set(model, "__class__", generated)


def _adapted_configs(
    model: PreTrainedModel, config: MultiMaxConfig, kinds: dict[int, str], layers: list[tuple[str, nn.Module]]
) -> tuple[dict[int, PreTrainedConfig], list[tuple[PreTrainedConfig, str]]]:
    """Copies of all configs in ``model``, by the original's ``id``, those of the layers' owners with our attention.

    Returns:
        The copies, and those that were adapted with the attention implementation that they had.
    """
    copies = _copies_of_configs(model)
    held = [layer.config for _, layer in layers if hasattr(layer, "config")]
    parts = [model.config, *held, *(owner_of(model, name).config for name, _ in layers)]
    adapted = [part for part in {id(part): part for part in parts}.values() if id(part) in copies]
    for part in adapted:
        _adapt(copies[id(part)], config, kinds.get(id(part)))
    copies[id(model.config)].multimax = config.to_dict()
    return copies, [(copies[id(part)], part._attn_implementation) for part in adapted]


def detach(model: PreTrainedModel, changes: Changes) -> None:
    """The inverse of :func:`attach`."""
    stock = model._multimax_stock
    changes.set(model, "__class__", stock_of(type(model)))
    for name in (*_OUTPUT_STATE, OUTPUT, "_multimax_stock"):
        changes.delete(model, name)
    for name, value in stock["attributes"].items():
        changes.set(model, name, value)
    for layer in attention_layers(model).values():
        for name in ("multimax", "_multimax_always_masked", "_multimax_eager"):
            changes.delete(layer, name)
    for layer in [module for module in model.modules() if isinstance(module, OutsideMixin)]:
        changes.set(layer, "__class__", stock_of(type(layer)))
        changes.delete(layer, "multimax")
    for module in [module for module in model.modules() if isinstance(module, SwitchingMixin)]:
        changes.set(module, "__class__", stock_of(type(module)))
    configs = [value for module in model.modules() for value in vars(module).values()]
    for config in {id(value): value for value in configs if isinstance(value, MultiMaxConfigMixin)}.values():
        changes.set(config, "__class__", stock_of(type(config)))
        changes.delete(config, "multimax")
        changes.delete(config, "_multimax_masks")
    for config, implementation in stock["implementations"]:
        changes.set(config, "_attn_implementation_internal", implementation)


def _without_impossible_output(model: PreTrainedModel, config: MultiMaxConfig, strict: bool) -> MultiMaxConfig:
    """``config``, without the output modulator where the class of ``model`` cannot have it and that may be."""
    if not config.output:
        return config
    try:
        check_output_supported(model, stock_of(type(model)))
    except ValueError as error:
        if strict:
            raise
        if not config.attention:
            raise ValueError(f"{error}. The checkpoint modulates the output only: load it by its own class") from error
        logger.warning(f"The checkpoint's output modulator is dropped: {error}")
        return config.replace(output=False)
    return config


def build_normalizers(config: MultiMaxConfig, selected: dict[str, nn.Module]) -> dict[str, Normalizer]:
    """The normalizer of every selected layer."""
    per_head = config.per_head or get_normalizer(config.normalizer).per_head
    built = {
        name: _build(config, layer, head_count(name, layer) if per_head else None, partial(query_width, name, layer))
        for name, layer in selected.items()
    }
    if config.per_head and not any(list(normalizer.parameters()) for normalizer in built.values()):
        raise ValueError(f"per_head=True means nothing to normalizer={config.normalizer!r}, which learns nothing here")
    return built


def output_modulator(model: PreTrainedModel, config: MultiMaxConfig) -> Normalizer:
    """The normalizer of the output logits; ValueError if that of ``config`` has no output loss."""
    if not get_normalizer(config.normalizer).modulates_output:
        raise ValueError(
            f"output=True is not possible with the normalizer {config.normalizer!r}: it has no output loss"
        )
    return _build(config, model.get_output_embeddings() or model, None)


def _build(
    config: MultiMaxConfig, beside: nn.Module, num_heads: int | None, head_dim: Callable[[], int] | None = None
) -> Normalizer:
    """The normalizer of ``config``, on the device and in the mode of the module that it is to stand in."""
    parameter = next(beside.parameters(), None)
    with contextlib.nullcontext() if parameter is None else parameter.device:
        return build_normalizer(config, num_heads, head_dim).train(beside.training)


def _copies_of_configs(model: PreTrainedModel) -> dict[int, Any]:
    """A copy of every config that a module of ``model`` holds, by the ``id`` of the original."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, PreTrainedConfig):
                copy.deepcopy(value, memo)
    return memo


def _adapt(config: PreTrainedConfig, options: MultiMaxConfig, masks: str | None) -> None:
    """Make a stock config, which nothing holds yet, that of a patched model."""
    config.__dict__.pop("multimax", None)
    config.__class__ = config_class(stock_of(type(config)))
    if masks is not None:
        config._multimax_masks = masks
    if options.attention:
        config._attn_implementation_internal = IMPLEMENTATION
