"""Checkpoints of the authors' layouts as patched Transformers models, and back.

Every layout keeps the scalars as ``ranges`` and ``ts`` in the order that :class:`hf_multimax.MultiMax` has, and applies
sigma to scaled scores before any mask: the tensors are copied as they are. Outputs are equal up to rounding, and a
checkpoint that comes back has the bits it left with. What a Transformers model cannot compute exactly is refused.
"""

import argparse
import math
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from hf_multimax.config import MultiMaxConfig
from hf_multimax.discovery import attention_layers
from hf_multimax.patching import is_patched, patch_model

__all__ = ["from_authors", "to_authors"]

Weights = dict[str, Tensor]

_OUTPUT = "multimax_output"


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
    """
    convert = _layout(layout).read
    weights = _read(checkpoint) if isinstance(checkpoint, str | Path) else dict(checkpoint)
    for key, value in weights.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{key!r} of the checkpoint is no tensor but {type(value).__name__}: give a state dict")
    return convert(weights, **hyperparameters)


def to_authors(model: PreTrainedModel, layout: str) -> Weights:
    """The state dict of the authors' layout that :func:`from_authors` would make ``model`` of.

    The tensors are copies on the CPU, the scalars float32. It has the keys of the original, except that fairseq's
    constants (``version``, ``_float_tensor``) and its ``output_projection`` are always written, a ``qkv.bias`` of zeros
    never, and ``"lm-head"`` has the names of ``model.state_dict()``, with ``<output layer>.multimax_ranges``.

    Raises:
        ValueError: if ``model`` is no MultiMax model of the class that the layout belongs to, or has a parameter that
            the layout has no place for, naming it.
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


# -- what the layouts share --------------------------------------------------------------------------------------------


@dataclass
class _Names:
    """Which name of ours stands for which of the authors'."""

    #: modules that have a weight and a bias
    modules: dict[str, str] = field(default_factory=dict)
    #: single tensors
    tensors: dict[str, str] = field(default_factory=dict)
    #: what the authors' ``ranges`` and ``ts`` are attributes of ("" for the model), and our normalizer
    modulators: dict[str, str] = field(default_factory=dict)

    def weights(self) -> dict[str, str]:
        """Every key of the authors', without the modulators, and ours."""
        parts = ((f"{a}.{part}", f"{b}.{part}") for a, b in self.modules.items() for part in ("weight", "bias"))
        return {**dict(parts), **self.tensors}

    def scalars(self) -> dict[str, str]:
        """Every key that a modulator may have, and ours."""
        items = self.modulators.items()
        return {_join(a, part): f"{b}.{part}" for a, b in items for part in ("ranges", "ts")}


def _join(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


def _read(path: str | Path) -> dict[str, Any]:
    """The state dict of a file."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is no file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the options of the training script; data only
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} cannot be read without running code in it ({str(error).splitlines()[0]}). If you trust its "
            'source, save the weights alone: torch.save(torch.load(path, weights_only=False)["model"], other_path)'
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no state dict but {type(content).__name__}")
    return dict(content["model"]) if isinstance(content.get("model"), dict) else content


def _check_counts(**values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}")


def _check_activation(name: str) -> None:
    if name not in ACT2FN:
        raise ValueError(f"activation={name!r} is none of Transformers' activations: {', '.join(ACT2FN)}")


def _take(weights: Weights, key: str) -> Tensor:
    if key not in weights:
        raise ValueError(f"the checkpoint has no {key!r}, which this layout needs")
    return weights.pop(key)


def _shape(weights: Weights, key: str, dimensions: int) -> torch.Size:
    """The shape of an entry, which stays."""
    if key not in weights:
        raise ValueError(f"the checkpoint has no {key!r}, which this layout needs")
    shape = weights[key].shape
    if len(shape) != dimensions:
        raise ValueError(f"{key!r} must have {dimensions} dimensions, got shape {list(shape)}")
    return shape


def _depth(weights: Weights, prefix: str) -> int:
    """The number of layers whose keys begin with ``prefix`` and a number."""
    found = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", key) for key in weights)
    depth = 1 + max((int(match[1]) for match in found if match), default=-1)
    if not depth:
        raise ValueError(f"the checkpoint has no layer: no key begins with '{prefix}.0.'")
    return depth


def _refuse(weights: Iterable[str], reasons: dict[str, str]) -> None:
    """Raise ValueError for the first key that matches a regular expression of ``reasons``."""
    for key in weights:
        for pattern, reason in reasons.items():
            if re.search(pattern, key):
                raise ValueError(f"{key!r}: {reason}")


def _nothing_left(weights: Iterable[str], what: str) -> None:
    left = sorted(weights)
    if left:
        more = f" and {len(left) - 6} more" if len(left) > 6 else ""
        raise ValueError(f"{what}: {', '.join(map(repr, left[:6]))}{more}")


def _take_modulators(weights: Weights, keys: dict[str, tuple[str, str]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Remove ``ranges`` and ``ts`` from ``weights``.

    Args:
        keys: our normalizer's name, and the two keys that it may have.

    Raises:
        ValueError: if there are none, one has no partner, or their shapes are not ``[2N]`` with one N for all.
    """
    modulators = {ours: pair for ours, pair in keys.items() if pair[0] in weights or pair[1] in weights}
    if not modulators:
        raise ValueError(
            f"the checkpoint has no modulator, such as {next(iter(keys.values()))[0]!r}: it is a SoftMax model"
        )
    shapes: dict[str, list[int]] = {}
    taken = {}
    for ours, pair in modulators.items():
        taken[ours] = tuple(_take(weights, key) for key in pair)
        shapes |= {key: list(tensor.shape) for key, tensor in zip(pair, taken[ours], strict=True)}
    first = next(iter(shapes.values()))
    for key, shape in shapes.items():
        if len(shape) != 1 or not shape[0] or shape[0] % 2 or shape != first:
            raise ValueError(f"{key!r} must have the shape [2 * order], the same for all modulators, got {shape}")
    return taken


def _build(
    cls: type[PreTrainedModel], config: PreTrainedConfig, weights: Weights, names: Mapping[str, str] | None = None
) -> PreTrainedModel:
    """The stock model of ``config`` with exactly these weights.

    Args:
        names: what the checkpoint calls our keys, for errors.
    """
    named = (names or {}).get
    types = {value.dtype: named(key, key) for key, value in weights.items() if value.is_floating_point()}
    if len(types) > 1:
        found = ", ".join(f"{key!r} is {dtype}" for dtype, key in types.items())
        raise ValueError(f"the weights are of several types: {found}; convert them to one first")
    weights = {key: value.detach().to("cpu", copy=True) for key, value in weights.items()}
    model, info = cls.from_pretrained(
        None,
        config=config,
        state_dict=weights,
        dtype=next(iter(types), torch.float32),
        ignore_mismatched_sizes=True,  # reported here, with the checkpoint's names
        output_loading_info=True,
    )
    model.name_or_path = model.config.name_or_path = ""
    _nothing_left((named(key, key) for key in info["missing_keys"]), "the checkpoint lacks keys")
    for key, found, expected in info["mismatched_keys"]:
        raise ValueError(f"{named(key, key)!r} has the shape {list(found)} instead of {list(expected)}")
    _nothing_left(info["unexpected_keys"], "the checkpoint has keys that this layout has no place for")
    return model


def _patch(model: PreTrainedModel, modulators: dict[str, tuple[Tensor, Tensor]]) -> PreTrainedModel:
    """Patch where the checkpoint has modulators, and give the model their values."""
    layers = {f"{name}.multimax": name for name in attention_layers(model)}
    chosen = [layers[ours] for ours in modulators if ours != _OUTPUT]
    prefix = f"{model.base_model_prefix}."
    include = None if len(chosen) in (0, len(layers)) else [f"^{re.escape(n.removeprefix(prefix))}$" for n in chosen]
    order = next(iter(modulators.values()))[0].numel() // 2
    patch_model(model, attention=bool(chosen), output=_OUTPUT in modulators, order=order, include=include)
    with torch.no_grad():
        for ours, (ranges, ts) in modulators.items():
            normalizer = model.get_submodule(ours)
            normalizer.ranges.copy_(ranges)
            normalizer.ts.copy_(ts)
    return model


def _convert(
    weights: Weights, cls: type[PreTrainedModel], config: PreTrainedConfig, names: _Names, made: Weights
) -> PreTrainedModel:
    """The patched model of a checkpoint.

    Args:
        weights: what is left of the checkpoint.
        made: our tensors that are no copies of an entry.
    """
    pairs = {ours: (_join(theirs, "ranges"), _join(theirs, "ts")) for theirs, ours in names.modulators.items()}
    modulators = _take_modulators(weights, pairs)
    renamed = {ours: _take(weights, theirs) for theirs, ours in names.weights().items()}
    _nothing_left(weights, "the checkpoint has keys that this layout has no place for")
    model = _build(cls, config, {**made, **renamed}, {ours: theirs for theirs, ours in names.weights().items()})
    return _patch(model, modulators)


def _restore(ours: Weights, names: _Names, made: Weights) -> Weights:
    """The inverse of ``_convert``; ``ours`` without the tensors that ``made`` was made of."""
    renamed = {theirs: ours.pop(key) for theirs, key in names.weights().items()}
    scalars = {theirs: ours.pop(key) for theirs, key in names.scalars().items() if key in ours}
    _nothing_left(ours, "the model has parameters that this layout has no place for")
    return {**made, **renamed, **scalars}


# -- timm's vision transformer -----------------------------------------------------------------------------------------

_VIT_REFUSED = {
    r"^fc_norm\.": "the norm comes after the pooling there; SigLIP's classifier pools what is normalised already",
    r"^(cls_token|dist_token|reg_token)$": "SigLIP's classifier has patch tokens only",
    r"^attn_pool\.": "attention pooling is no mean over the patches",
    r"^norm_pre\.": "SigLIP has no norm before its layers",
    r"^blocks\.\d+\.(ls1|ls2)\.": "SigLIP has no layer scale",
    r"^blocks\.\d+\.attn\.(q_norm|k_norm)\.": "SigLIP does not normalise queries and keys",
    r"^patch_embed\.backbone\.": "SigLIP has no convolutional network before its patches",
}


def _vit_names(depth: int) -> _Names:
    names = _Names(
        {
            "patch_embed.proj": "vision_model.embeddings.patch_embedding",
            "norm": "vision_model.post_layernorm",
            "head": "classifier",
        },
        modulators={"": _OUTPUT},
    )
    parts = {"norm1": "layer_norm1", "attn.proj": "self_attn.out_proj", "norm2": "layer_norm2"}
    parts |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    for i in range(depth):
        layer = f"vision_model.encoder.layers.{i}"
        names.modules |= {f"blocks.{i}.{theirs}": f"{layer}.{ours}" for theirs, ours in parts.items()}
        names.modulators[f"blocks.{i}.attn"] = f"{layer}.self_attn.multimax"
    return names


def _projections(layer: int, part: str) -> list[str]:
    return [f"vision_model.encoder.layers.{layer}.self_attn.{name}_proj.{part}" for name in "qkv"]


_VIT_POSITIONS = "vision_model.embeddings.position_embedding.weight"


def _read_vit(
    weights: Weights, *, num_heads: int, layer_norm_eps: float = 1e-6, activation: str = "gelu"
) -> PreTrainedModel:
    _check_counts(num_heads=num_heads)
    _check_activation(activation)
    _refuse(weights, _VIT_REFUSED)
    depth = _depth(weights, "blocks")
    width, channels, patch, patch_width = _shape(weights, "patch_embed.proj.weight", 4)
    _, patches, _ = _shape(weights, "pos_embed", 3)
    side = math.isqrt(patches)
    if patch != patch_width or side * side != patches:
        raise ValueError(
            f"SigLIP needs square images and patches: 'patch_embed.proj.weight' has patches of {patch} x {patch_width}"
            f", 'pos_embed' {patches} of them"
        )
    config = transformers.SiglipConfig(
        vision_config={
            "hidden_size": width,
            "intermediate_size": _shape(weights, "blocks.0.mlp.fc1.weight", 2)[0],
            "num_hidden_layers": depth,
            "num_attention_heads": num_heads,
            "num_channels": channels,
            "image_size": side * patch,
            "patch_size": patch,
            "hidden_act": activation,
            "layer_norm_eps": layer_norm_eps,
            "vision_use_head": False,
        },
        num_labels=_shape(weights, "head.weight", 2)[0],
    )
    made = {_VIT_POSITIONS: _take(weights, "pos_embed")[0]}
    for i in range(depth):
        weight = _take(weights, f"blocks.{i}.attn.qkv.weight")
        bias = weights.pop(f"blocks.{i}.attn.qkv.bias", weight.new_zeros(3 * width))
        for part, tensor, shape in (("weight", weight, [3 * width, width]), ("bias", bias, [3 * width])):
            if list(tensor.shape) != shape:
                raise ValueError(f"'blocks.{i}.attn.qkv.{part}' has the shape {list(tensor.shape)} instead of {shape}")
        made |= zip(_projections(i, "weight"), weight.chunk(3), strict=True)
        made |= zip(_projections(i, "bias"), bias.chunk(3), strict=True)
    return _convert(weights, transformers.SiglipForImageClassification, config, _vit_names(depth), made)


def _write_vit(model: PreTrainedModel, ours: Weights) -> Weights:
    depth = model.config.vision_config.num_hidden_layers
    made = {"pos_embed": ours.pop(_VIT_POSITIONS)[None]}
    biases = {}
    for i in range(depth):
        made[f"blocks.{i}.attn.qkv.weight"] = torch.cat([ours.pop(key) for key in _projections(i, "weight")])
        biases[f"blocks.{i}.attn.qkv.bias"] = torch.cat([ours.pop(key) for key in _projections(i, "bias")])
    if any(bias.any() for bias in biases.values()):
        made |= biases
    return _restore(ours, _vit_names(depth), made)


# -- fairseq -----------------------------------------------------------------------------------------------------------

#: fairseq's dictionaries begin with these; positions are counted from the one after ``<pad>``.
_BOS, _PAD, _EOS = 0, 1, 2
_TOKENS = {"bos_token_id": _BOS, "pad_token_id": _PAD, "eos_token_id": _EOS}

_FAIRSEQ_REFUSED = {
    r"adaptive_softmax\.": "an adaptive softmax is no single output layer; train with a plain one",
    r"\.embed_tokens\.embeddings\.": "adaptive inputs are no single embedding; train with a plain one",
    r"\.embed_out$": "an old name of output_projection.weight: load and save the checkpoint with a newer fairseq",
    r"\.layernorm_embedding\.": "the Transformers model has no norm after its embedding",
    r"\.project_(in|out)_dim\.": "the Transformers model has embeddings of the layers' width",
    r"\.bias_[kv]$": "the Transformers model has no extra key and value (add_bias_kv)",
    r"\.in_proj_(weight|bias)$": "an old name of the projections: load and save the checkpoint with a newer fairseq",
    r"\.(attn_ln|ffn_layernorm)\.|\.(c_attn|w_resid)$": "the Transformers model has no such scaling (NormFormer)",
}

_LAYER = ("self_attn_layer_norm", "fc1", "fc2", "final_layer_norm")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


def _layer_names(names: _Names, theirs: str, ours: str, depth: int, cross: bool = False) -> None:
    """Add a stack of fairseq's layers, whose parts Transformers calls the same."""
    attention = ("self_attn", "encoder_attn") if cross else ("self_attn",)
    parts = [*_LAYER, *(f"{module}.{part}" for module in attention for part in _ATTENTION)]
    parts += ["encoder_attn_layer_norm"] if cross else []
    for i in range(depth):
        names.modules |= {f"{theirs}.layers.{i}.{part}": f"{ours}.layers.{i}.{part}" for part in parts}
        for module in attention:
            names.modulators[f"{theirs}.layers.{i}.{module}"] = f"{ours}.layers.{i}.{module}.multimax"


def _sinusoid(positions: int, width: int, dtype: torch.dtype) -> Tensor:
    """fairseq's table of positions, ``[positions + 2, width]``: the first is in row 2, that of padding is zero."""
    frequencies = torch.exp(torch.arange(width // 2, dtype=torch.float32) * (-math.log(10000) / (width // 2 - 1)))
    angles = torch.arange(positions + _PAD + 1, dtype=torch.float32)[:, None] * frequencies
    table = torch.cat([angles.sin(), angles.cos()], dim=1)
    table[_PAD] = 0
    return table.to(dtype)


def _is_sinusoid(table: Tensor) -> bool:
    expected = _sinusoid(table.shape[0] - _PAD - 1, table.shape[1], table.dtype).to(table.device)
    last_bit = torch.finfo(torch.float32).eps * len(table)  # another machine's exp may differ in it, times the position
    return torch.allclose(table, expected, rtol=0, atol=last_bit + torch.finfo(table.dtype).eps)


def _take_constants(weights: Weights, stack: str) -> None:
    """Remove what is the same in every checkpoint."""
    version = weights.pop(f"{stack}.version", None)
    if f"{stack}.layer_norm.weight" in weights and (version is None or version.flatten()[0] <= 2):
        raise ValueError(
            f"'{stack}.version' is missing or below 3: fairseq ignores '{stack}.layer_norm' of so old a checkpoint; "
            "load and save it with a newer fairseq"
        )
    weights.pop(f"{stack}.embed_positions._float_tensor", None)


def _constants(stack: str, like: Tensor) -> Weights:
    return {f"{stack}.version": like.new_full((1,), 3), f"{stack}.embed_positions._float_tensor": like.new_zeros(1)}


def _take_output(weights: Weights) -> Tensor:
    """The output layer's weight, which a file may leave out where it is the embedding's."""
    return weights.pop("decoder.output_projection.weight", weights["decoder.embed_tokens.weight"])


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _lm_names(depth: int) -> _Names:
    names = _Names(
        {"decoder.layer_norm": "biogpt.layer_norm"},
        {"decoder.embed_tokens.weight": "biogpt.embed_tokens.weight"},
        {"decoder": _OUTPUT},
    )
    _layer_names(names, "decoder", "biogpt", depth)
    return names


_LM_POSITIONS = "biogpt.embed_positions.weight"


def _read_lm(
    weights: Weights,
    *,
    num_heads: int,
    max_positions: int | None = None,
    activation: str = "relu",
    scale_embedding: bool = True,
    dropout: float = 0.0,
) -> PreTrainedModel:
    _check_counts(num_heads=num_heads, **({} if max_positions is None else {"max_positions": max_positions}))
    _check_activation(activation)
    _refuse(weights, _FAIRSEQ_REFUSED)
    if "decoder.layer_norm.weight" not in weights:
        raise ValueError(
            "the checkpoint has no 'decoder.layer_norm.weight': Transformers has no decoder with fairseq's embedding "
            "and norms after the layers, or without a final one"
        )
    vocabulary, width = _shape(weights, "decoder.embed_tokens.weight", 2)
    depth = _depth(weights, "decoder.layers")
    _take_constants(weights, "decoder")
    positions = weights.pop("decoder.embed_positions.weight", None)
    learned = positions is not None
    if learned and max_positions is not None:
        raise ValueError("'decoder.embed_positions.weight' holds learned positions: leave max_positions out")
    if not learned and max_positions is None:
        raise ValueError(
            "the checkpoint has no 'decoder.embed_positions.weight', so its positions are sinusoidal: give their "
            "number as max_positions"
        )
    if not learned:
        positions = _sinusoid(max_positions, width, weights["decoder.embed_tokens.weight"].dtype)
    output = _take_output(weights)
    config = transformers.BioGptConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=num_heads,
        intermediate_size=_shape(weights, "decoder.layers.0.fc1.weight", 2)[0],
        hidden_act=activation,
        max_position_embeddings=positions.shape[0] - _PAD - 1,
        scale_embedding=scale_embedding,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=0.0,
        tie_word_embeddings=_same(output, weights["decoder.embed_tokens.weight"]),
        **_TOKENS,
    )
    made = {_LM_POSITIONS: positions, "output_projection.weight": output}
    model = _convert(weights, transformers.BioGptForCausalLM, config, _lm_names(depth), made)
    model.biogpt.embed_positions.requires_grad_(learned)
    return model


def _write_lm(model: PreTrainedModel, ours: Weights) -> Weights:
    positions = ours.pop(_LM_POSITIONS)
    made = {"decoder.output_projection.weight": ours.pop("output_projection.weight")}
    made |= _constants("decoder", positions)
    if not _is_sinusoid(positions):
        del made["decoder.embed_positions._float_tensor"]
        made["decoder.embed_positions.weight"] = positions
    return _restore(ours, _lm_names(model.config.num_hidden_layers), made)


_STACKS = ("encoder", "decoder")


def _translation_names(depths: tuple[int, int], final_norm: bool) -> _Names:
    names = _Names(modulators={"decoder": _OUTPUT})
    for stack, depth in zip(_STACKS, depths, strict=True):
        if final_norm:
            names.modules[f"{stack}.layer_norm"] = f"model.{stack}.layer_norm"
        names.tensors[f"{stack}.embed_tokens.weight"] = f"model.{stack}.embed_tokens.weight"
        _layer_names(names, stack, f"model.{stack}", depth, cross=stack == "decoder")
    names.tensors["decoder.output_projection.weight"] = "lm_head.weight"
    return names


def _read_translation(
    weights: Weights,
    *,
    num_heads: int | tuple[int, int],
    max_positions: int = 1024,
    activation: str = "relu",
    scale_embedding: bool = True,
    dropout: float = 0.0,
) -> PreTrainedModel:
    encoder_heads, decoder_heads = (num_heads, num_heads) if isinstance(num_heads, int) else num_heads
    _check_counts(encoder_heads=encoder_heads, decoder_heads=decoder_heads, max_positions=max_positions)
    _check_activation(activation)
    _refuse(weights, _FAIRSEQ_REFUSED)
    _refuse(weights, {r"\.embed_positions\.weight$": "the Transformers models have sinusoidal positions"})
    final_norms = [f"{stack}.layer_norm.weight" in weights for stack in _STACKS]
    if len(set(final_norms)) > 1:
        raise ValueError(
            "only one of 'encoder.layer_norm.weight' and 'decoder.layer_norm.weight' is there: Transformers has no "
            "model whose encoder and decoder have their norms in different places"
        )
    pre_norm = final_norms[0]
    source, width = _shape(weights, "encoder.embed_tokens.weight", 2)
    target, _ = _shape(weights, "decoder.embed_tokens.weight", 2)
    for stack in _STACKS:
        _take_constants(weights, stack)
    output = weights["decoder.output_projection.weight"] = _take_output(weights)
    tied = _same(output, weights["decoder.embed_tokens.weight"])
    shared = tied and _same(output, weights["encoder.embed_tokens.weight"])
    if pre_norm and not shared:
        raise ValueError(
            "'encoder.embed_tokens.weight', 'decoder.embed_tokens.weight' and 'decoder.output_projection.weight' "
            "differ: M2M100, the pre-norm model, has one embedding for all (--share-all-embeddings)"
        )
    depths = tuple(_depth(weights, f"{stack}.layers") for stack in _STACKS)
    settings: dict[str, Any] = {
        "d_model": width,
        "max_position_embeddings": max_positions,
        "activation_function": activation,
        "scale_embedding": scale_embedding,
        "dropout": dropout,
        "attention_dropout": 0.0,
        "decoder_start_token_id": _EOS,
        "tie_word_embeddings": tied,
        **_TOKENS,
    }
    for stack, depth, count in zip(_STACKS, depths, (encoder_heads, decoder_heads), strict=True):
        settings |= {f"{stack}_layers": depth, f"{stack}_attention_heads": count, f"{stack}_layerdrop": 0.0}
        settings[f"{stack}_ffn_dim"] = _shape(weights, f"{stack}.layers.0.fc1.weight", 2)[0]
    names = _translation_names(depths, pre_norm)
    shared_weight = {"model.shared.weight": weights["encoder.embed_tokens.weight"]} if shared else {}
    if pre_norm:
        config = transformers.M2M100Config(vocab_size=source, **settings)
        return _convert(weights, transformers.M2M100ForConditionalGeneration, config, names, shared_weight)
    config = transformers.MarianConfig(
        vocab_size=source,
        decoder_vocab_size=target,
        share_encoder_decoder_embeddings=shared,
        forced_eos_token_id=None,
        **settings,
    )
    table = _sinusoid(max_positions, width, output.dtype)[_PAD + 1 :]
    made = {f"model.{stack}.embed_positions.weight": table for stack in _STACKS} | shared_weight
    made["final_logits_bias"] = output.new_zeros(1, target)
    model = _convert(weights, transformers.MarianMTModel, config, names, made)
    model._keys_to_ignore_on_save = set()  # Marian would compute its own positions on loading
    for stack in (model.model.encoder, model.model.decoder):
        stack.embed_positions.requires_grad_(False)
    return model


def _write_translation(model: PreTrainedModel, ours: Weights) -> Weights:
    made: Weights = {}
    for stack in _STACKS:
        made |= _constants(stack, ours["lm_head.weight"])
        table = ours.pop(f"model.{stack}.embed_positions.weight", None)  # M2M100 has fairseq's own, and keeps no tensor
        if table is not None and not _is_sinusoid(torch.cat([_sinusoid(0, table.shape[1], table.dtype), table])):
            raise ValueError(f"'model.{stack}.embed_positions.weight' does not hold fairseq's sinusoidal positions")
    if ours.pop("final_logits_bias", torch.zeros(1)).any():
        raise ValueError("'final_logits_bias' is not zero: fairseq's output layer has no bias")
    ours.pop("model.shared.weight", None)  # the embeddings are copies of it
    config = model.config
    names = _translation_names((config.encoder_layers, config.decoder_layers), config.model_type == "m2m_100")
    return _restore(ours, names, made)


# -- any causal language model -----------------------------------------------------------------------------------------

_SCALARS = ("multimax_ranges", "multimax_ts")


def _causal_class(config_class: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    classes = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if config_class not in classes:
        raise ValueError(f"Transformers has no causal language model for a {config_class.__name__}")
    return classes[config_class]


def _head_name(model: PreTrainedModel) -> str:
    return next(name for name, module in model.named_modules() if module is model.get_output_embeddings())


def _read_lm_head(weights: Weights, *, config: PreTrainedConfig) -> PreTrainedModel:
    scalars = {key: value for key, value in weights.items() if key.rpartition(".")[2] in _SCALARS}
    model = _build(_causal_class(type(config)), config, {key: weights[key] for key in weights.keys() - scalars.keys()})
    layers, head = attention_layers(model), _head_name(model)
    pairs: dict[str, tuple[str, str]] = {}
    for key in scalars:
        owner = key.rpartition(".")[0]
        ours = f"{owner}.multimax" if owner in layers else _OUTPUT
        if ours == _OUTPUT and owner.removeprefix("model.") not in ("", head):
            raise ValueError(
                f"{key!r}: {owner!r} is neither the output layer of {type(model).__name__}, {head!r}, nor one of its "
                f"attention layers, such as {next(iter(layers), None)!r}"
            )
        pair = (_join(owner, _SCALARS[0]), _join(owner, _SCALARS[1]))
        if pairs.setdefault(ours, pair) != pair:
            raise ValueError(f"both {pairs[ours][0]!r} and {pair[0]!r} are modulators of the output")
    return _patch(model, _take_modulators(scalars, pairs or {_OUTPUT: (f"{head}.{_SCALARS[0]}", "")}))


def _write_lm_head(model: PreTrainedModel, ours: Weights) -> Weights:
    if type(model).stock_class is not _causal_class(type(model.config).stock_class):
        raise ValueError(
            f"the layout 'lm-head' is that of causal language models, not of {type(model).stock_class.__name__}"
        )
    head = _head_name(model)

    def name(key: str) -> str:
        owner, _, scalar = key.rpartition(".")
        if owner == _OUTPUT:
            return f"{head}.multimax_{scalar}"
        return f"{owner.removesuffix('.multimax')}.multimax_{scalar}" if owner.endswith(".multimax") else key

    return {name(key): value for key, value in ours.items()}


# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    read: Callable[..., PreTrainedModel]
    write: Callable[[PreTrainedModel, Weights], Weights]
    #: The stock classes that it is the layout of; empty for any.
    classes: tuple[str, ...] = ()


_LAYOUTS = {
    "timm-vit": _Layout(_read_vit, _write_vit, ("SiglipForImageClassification",)),
    "fairseq-lm": _Layout(_read_lm, _write_lm, ("BioGptForCausalLM",)),
    "fairseq-translation": _Layout(
        _read_translation, _write_translation, ("M2M100ForConditionalGeneration", "MarianMTModel")
    ),
    "lm-head": _Layout(_read_lm_head, _write_lm_head),
}


def _layout(name: str) -> _Layout:
    if name not in _LAYOUTS:
        raise ValueError(f"unknown layout {name!r}: it is one of {', '.join(_LAYOUTS)}")
    return _LAYOUTS[name]
