"""``patch_model`` and ``unpatch_model``: one call that gives any checkpoint a learnable SoftMax, and the way back."""

import logging
import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_multimax.config import MultiMaxConfig
from hf_multimax.models.attachment import attach, detach
from hf_multimax.models.changes import Changes
from hf_multimax.models.checkpointing import keep_gradients
from hf_multimax.models.classes import registered_model_class
from hf_multimax.models.discovery import find_layers
from hf_multimax.models.divergence import watch
from hf_multimax.models.doors import patched_parts
from hf_multimax.normalizers.base import (
    OUTPUT,
    Normalizer,
    NormalizerSwitch,
    is_patched,
    multimax_parameters,
    named_normalizers,
)

__all__ = [
    "freeze_base",
    "patch_model",
    "print_trainable_parameters",
    "unpatch_model",
]

logger = logging.getLogger(__name__)


def patch_model(model: PreTrainedModel, config: MultiMaxConfig | None = None, **overrides: Any) -> PreTrainedModel:
    """Replace the SoftMax of a Transformers model by MultiMax, or another normalizer, in place.

    With the default ``init="identity"`` the outputs stay what they were. Only this object changes: other models of the
    process, of the same class or sharing its config, stay as they are.

    Args:
        model: any model whose attention goes through Transformers' AttentionInterface. Give the outermost model: one
            that is patched inside another saves no config that says so.
        config: see :class:`MultiMaxConfig`; None for the defaults.
        overrides: fields of the config to change.

    Returns:
        The same object, now an instance of ``MultiMax<Arch>``. It saves and loads as every model does.

    Raises:
        TypeError: if ``model`` is no PreTrainedModel, or an override no field of the config.
        ValueError: if the model is patched already, has nothing that the config asks to replace, or does something
            that MultiMax does not support. The model is then as it was.

    Examples:
        >>> import torch
        >>> from transformers import AutoModelForCausalLM
        >>> from hf_multimax import patch_model
        >>> model = AutoModelForCausalLM.from_pretrained("gpt2")
        >>> before = model(torch.tensor([[1, 2, 3]])).logits
        >>> model = patch_model(model, per_head=True)
        >>> torch.allclose(model(torch.tensor([[1, 2, 3]])).logits, before, atol=1e-5)
        True
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"patch_model needs a Transformers model, got {type(model).__name__}: patch before wrapping it "
            "(PEFT, DDP, FSDP, torch.compile)"
        )
    if config is not None and not isinstance(config, MultiMaxConfig):
        raise TypeError(f"config must be a MultiMaxConfig, got {type(config).__name__}")
    parts = {} if is_patched(model) else patched_parts(model)
    if not parts and (is_patched(model) or any(isinstance(module, Normalizer) for module in model.modules())):
        raise ValueError("the model is patched already: call hf_multimax.unpatch_model(model) first")
    if "multimax" in vars(model.config):
        raise ValueError(
            "the model's config is that of a MultiMax checkpoint, whose scalars this stock class did not load: "
            "load the checkpoint with from_pretrained, after `import hf_multimax`"
        )
    if any(parameter.is_meta for parameter in model.parameters()) and hasattr(model, "hf_device_map"):
        raise ValueError("the model is offloaded: patch it before offloading, or save it patched and load that")
    if parts:
        return _patch_whole(model, parts, config, overrides)
    options, generated = (config or MultiMaxConfig()).replace(**overrides), registered_model_class(type(model))
    with Changes() as changes:
        attach(model, options, generated, changes)
    watch(model)
    keep_gradients(model)
    return model


def _patch_whole(
    model: PreTrainedModel,
    parts: dict[str, PreTrainedModel],
    config: MultiMaxConfig | None,
    overrides: dict[str, Any],
) -> PreTrainedModel:
    """Patch a stock model with MultiMax models inside: they become its parts, and it takes over their scalars."""
    found = {f"{place}.{layer}": module for place, part in parts.items() for layer, module in named_normalizers(part)}
    outputs = [name for name in found if name.endswith(f".{OUTPUT}")]
    layers = {name: module for name, module in found.items() if name not in outputs}
    values = {name: {k: p.detach().clone() for k, p in module.named_parameters()} for name, module in found.items()}
    options = _common_config(model, parts, list(layers), bool(outputs)) if config is None else config
    options, generated = options.replace(**overrides), registered_model_class(type(model))
    with Changes() as changes:
        for part in parts.values():
            detach(part, changes)
        attach(model, options, generated, changes)
        taken = dict(named_normalizers(model))
        for name, entries in values.items():
            own = taken.get(OUTPUT if name in outputs and len(outputs) == 1 else name)
            fits = own is not None and {k: p.shape for k, p in own.named_parameters()} == {
                k: value.shape for k, value in entries.items()
            }
            if not fits:
                raise ValueError(
                    f"the scalars of {name} have no place in the patched {type(model).__name__}: patch it with the "
                    "config of its parts, or call hf_multimax.unpatch_model on them, which drops their scalars"
                )
            with torch.no_grad():
                for key, parameter in own.named_parameters():
                    parameter.copy_(entries[key])
    watch(model)
    keep_gradients(model)
    return model


def _common_config(
    model: PreTrainedModel, parts: dict[str, PreTrainedModel], layers: list[str], output: bool
) -> MultiMaxConfig:
    """The one config of the patched models inside ``model``, for the layers that they patched.

    Raises:
        ValueError: if their configs differ in more than the layers.
    """
    varying = {"include": None, "exclude": None, "output": output, "attention": bool(layers)}
    found = {place: {**part.config.multimax, **varying} for place, part in parts.items()}
    first = next(iter(found.values()))
    if any(values != first for values in found.values()):
        raise ValueError(
            f"the MultiMax parts of the model ({', '.join(found)}) were patched with different configs, and a model "
            "has one: patch them alike, or call hf_multimax.unpatch_model on them, which drops their scalars"
        )
    include = None
    found = find_layers(model)
    if layers and set(layers) != {*found.interface, *found.outside}:
        short = (re.escape(name.removeprefix(f"{model.base_model_prefix}.")) for name in layers)
        include = [f"^{name}$" for name in short]
    return MultiMaxConfig.from_dict({**first, "include": include})


def unpatch_model(model: PreTrainedModel) -> PreTrainedModel:
    """Give back the stock model: its class, config, SoftMax and attention implementation. The scalars are dropped.

    Raises:
        ValueError: if ``model`` is not patched.

    Examples:
        >>> from transformers import AutoModelForCausalLM
        >>> from hf_multimax import is_patched, patch_model, unpatch_model
        >>> model = patch_model(AutoModelForCausalLM.from_pretrained("gpt2"))
        >>> is_patched(unpatch_model(model))
        False
    """
    if not is_patched(model):
        raise ValueError(f"this {type(model).__name__} is not a MultiMax model: there is nothing to unpatch")
    if any(isinstance(module, NormalizerSwitch) and module.holds_others() for module in model.modules()):
        raise ValueError("this model holds MultiMax adapters: call unload() on the PeftModel around it")
    with Changes() as changes:
        detach(model, changes)
    return model


def freeze_base(model: nn.Module) -> nn.Module:
    """Leave only the normalizers' parameters trainable.

    Raises:
        ValueError: if ``model`` has none.

    Examples:
        >>> from transformers import AutoModelForCausalLM
        >>> from hf_multimax import freeze_base, patch_model
        >>> model = patch_model(AutoModelForCausalLM.from_pretrained("gpt2"))
        >>> sum(p.numel() for p in freeze_base(model).parameters() if p.requires_grad)  # eight scalars in six layers
        48
    """
    ours = multimax_parameters(model)
    if not ours:
        raise ValueError(f"this {type(model).__name__} has no MultiMax parameters: call patch_model first")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in ours)
    return model


def print_trainable_parameters(model: nn.Module) -> None:
    """Print how many parameters are trained, how many there are, and how many are MultiMax's own.

    Examples:
        >>> from transformers import AutoModelForCausalLM
        >>> from hf_multimax import freeze_base, patch_model, print_trainable_parameters
        >>> model = patch_model(AutoModelForCausalLM.from_pretrained("gpt2"))
        >>> print_trainable_parameters(freeze_base(model))  # doctest: +ELLIPSIS
        trainable params: 48 || all params: ...
    """
    parameters = list(model.parameters())
    everything = sum(p.numel() for p in parameters)
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    ours = sum(p.numel() for p in multimax_parameters(model).values())
    share = 100 * trainable / max(everything, 1)
    line = f"trainable params: {trainable:,d} || all params: {everything:,d} || trainable%: {share:.4f}"
    print(f"{line} || multimax params: {ours:,d}")
