"""Checkpoints of the authors' layouts as patched Transformers models, and back.

Every layout keeps the scalars as ``ranges`` and ``ts`` in the order that :class:`hf_multimax.MultiMax` has, and applies
sigma to scaled scores before any mask: the tensors are copied as they are. Outputs are equal up to rounding, and a
checkpoint that comes back has the bits it left with. What a Transformers model cannot compute exactly is refused.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from hf_multimax.config import MultiMaxConfig
from hf_multimax.convert.fairseq import read_lm, read_translation, write_lm, write_translation
from hf_multimax.convert.layouts import Weights, read_file
from hf_multimax.convert.lm_head import read_lm_head, write_lm_head
from hf_multimax.convert.vit import read_vit, write_vit
from hf_multimax.normalizers.base import is_patched

__all__ = ["from_authors", "to_authors"]


def from_authors(checkpoint: Mapping[str, Tensor] | str | Path, layout: str, **hyperparameters: Any) -> PreTrainedModel:
    """A patched Transformers model that computes what a checkpoint of the authors' layout does.

    Layouts and what a state dict does not tell about them, to be given by keyword:

    - ``"timm-vit"``: the authors' ``vision_transformer.py`` (no class token; a norm, then the mean over the patches)
      as ``SiglipForImageClassification``. ``num_heads``; ``layer_norm_eps`` (1e-6, as DeiT trains; PyTorch's default is
      1e-5); ``activation`` ("gelu", the exact one). Projections without a bias get one of zeros.
    - ``"fairseq-lm"``: fairseq's ``transformer_lm`` (pre-norm) as ``BioGptForCausalLM``. ``num_heads``; ``activation``
      ("relu"); ``scale_embedding`` (True); ``dropout`` (0.0); ``max_positions``, the number of sinusoidal positions to
      write out, always and only for a model without learned ones. They are frozen, until the model is saved and loaded.
    - ``"fairseq-translation"``: fairseq's ``transformer``, pre-norm with one embedding shared by encoder, decoder and
      output as ``M2M100ForConditionalGeneration``, post-norm (``transformer_iwslt_de_en``) as ``MarianMTModel``, whose
      frozen table of positions then holds fairseq's, and is saved.
      ``num_heads`` or ``(encoder, decoder)``; ``activation``, ``scale_embedding`` and ``dropout`` as above;
      ``max_positions`` (1024).
    - ``"lm-head"``: the state dict of any causal language model of Transformers, with ``multimax_ranges`` and
      ``multimax_ts`` beside the output layer's weight (``lm_head.multimax_ranges``, or without a prefix), or in
      attention layers (``model.layers.0.self_attn.multimax_ranges``). ``config``, the stock model's config.

    fairseq's dictionaries have ``<pad>`` at 1 and ``</s>`` at 2; give padding on the right, with an attention mask.
    Scores are scaled by ``head_dim ** -0.5``. In the authors' fork of fairseq, decoding step by step leaves sigma out
    of the attention, and so does not compute what was trained; here it does.

    Args:
        checkpoint: a state dict, or a file of one: ``.safetensors``, or anything that ``torch.load`` reads without
            running code, with the weights at the top or under ``"model"``. Its tensors are copied.
        layout: see above.

    Returns:
        The model, on the CPU, in evaluation mode and in the weights' type; the scalars are float32.

    Raises:
        ValueError: for a key that is missing, left over or of another shape, for a part that the Transformers model
            does not have, naming it, for an impossible hyperparameter, an unknown layout or an unreadable file.
        TypeError: for a missing or unknown hyperparameter, or a value of the checkpoint that is no tensor.

    Examples:
        >>> from transformers import AutoConfig, AutoModelForCausalLM
        >>> from hf_multimax import is_patched, patch_model
        >>> from hf_multimax.convert import from_authors, to_authors
        >>> weights = to_authors(patch_model(AutoModelForCausalLM.from_pretrained("gpt2"), output=True), "lm-head")
        >>> is_patched(from_authors(weights, "lm-head", config=AutoConfig.from_pretrained("gpt2")))
        True
    """
    read = _layout(layout).read
    weights = read_file(checkpoint) if isinstance(checkpoint, str | Path) else dict(checkpoint)
    for key, value in weights.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{key!r} of the checkpoint is no tensor but {type(value).__name__}: give a state dict")
    return read(weights, **hyperparameters)


def to_authors(model: PreTrainedModel, layout: str) -> Weights:
    """The state dict of the authors' layout that :func:`from_authors` would make ``model`` of.

    The tensors are copies on the CPU, the scalars float32. It has the keys of the original, except that fairseq's
    constants (``version``, ``_float_tensor``) and its ``output_projection`` are always written, a ``qkv.bias`` of zeros
    never, and ``"lm-head"`` has the names of ``model.state_dict()``, with ``<output layer>.multimax_ranges``.

    Raises:
        ValueError: if ``model`` is no MultiMax model of the class that the layout belongs to, or has a parameter that
            the layout has no place for, naming it.

    Examples:
        >>> from transformers import AutoModelForCausalLM
        >>> from hf_multimax import patch_model
        >>> from hf_multimax.convert import from_authors, to_authors
        >>> model = patch_model(AutoModelForCausalLM.from_pretrained("gpt2"), output=True)
        >>> weights = to_authors(model, "lm-head")
        >>> weights["lm_head.multimax_ts"].tolist()
        [0.0, 0.0, 0.0, 0.0]
    """
    entry = _layout(layout)
    if not is_patched(model):
        raise ValueError(f"this {type(model).__name__} is not a MultiMax model: call hf_multimax.patch_model first")
    name = type(model).stock_class.__name__
    if entry.classes and name not in entry.classes:
        raise ValueError(f"the layout {layout!r} is that of {' or '.join(entry.classes)}, not of {name}")
    config = MultiMaxConfig.from_dict(model.config.multimax)
    for option, wanted in (("normalizer", "multimax"), ("affine", False), ("per_head", False)):
        if getattr(config, option) != wanted:
            raise ValueError(f"the authors' layouts have no place for {option}={getattr(config, option)!r}")
    return entry.write(model, {key: value.detach().to("cpu", copy=True) for key, value in model.state_dict().items()})


@dataclass(frozen=True)
class _Layout:
    read: Callable[..., PreTrainedModel]
    write: Callable[[PreTrainedModel, Weights], Weights]
    #: The stock classes that it is the layout of; empty for any.
    classes: tuple[str, ...] = ()


_LAYOUTS = {
    "timm-vit": _Layout(read_vit, write_vit, ("SiglipForImageClassification",)),
    "fairseq-lm": _Layout(read_lm, write_lm, ("BioGptForCausalLM",)),
    "fairseq-translation": _Layout(
        read_translation, write_translation, ("M2M100ForConditionalGeneration", "MarianMTModel")
    ),
    "lm-head": _Layout(read_lm_head, write_lm_head),
}


def _layout(name: str) -> _Layout:
    if name not in _LAYOUTS:
        raise ValueError(f"unknown layout {name!r}: it is one of {', '.join(_LAYOUTS)}")
    return _LAYOUTS[name]
