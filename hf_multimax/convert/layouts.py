"""What the layouts share: which name is which, and a patched model with exactly a checkpoint's weights."""

import argparse
import pickle
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from hf_multimax.models.discovery import attention_layers
from hf_multimax.models.patching import patch_model
from hf_multimax.normalizers.base import OUTPUT
from hf_multimax.numbers import is_integer

Weights = dict[str, Tensor]


@dataclass
class Names:
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
        return {join(a, part): f"{b}.{part}" for a, b in items for part in ("ranges", "ts")}


def join(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


def read_file(path: str | Path) -> dict[str, Any]:
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
    except (RuntimeError, EOFError, struct.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except pickle.UnpicklingError as error:
        if "Unsupported global" not in str(error):
            raise ValueError(f"{path} cannot be read: it is no checkpoint of torch.save, or is damaged") from error
        raise ValueError(
            f"{path} cannot be read without running code in it ({str(error).splitlines()[0]}). If you trust its "
            'source, save the weights alone: torch.save(torch.load(path, weights_only=False)["model"], other_path)'
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no state dict but {type(content).__name__}")
    return dict(content["model"]) if isinstance(content.get("model"), dict) else content


def check_counts(**values: int) -> None:
    for name, value in values.items():
        if not is_integer(value, 1):
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}")


def check_activation(name: str) -> None:
    if name not in ACT2FN:
        raise ValueError(f"activation={name!r} is none of Transformers' activations: {', '.join(ACT2FN)}")


def take(weights: Weights, key: str) -> Tensor:
    if key not in weights:
        raise ValueError(f"the checkpoint has no {key!r}, which this layout needs")
    return weights.pop(key)


def shape_of(weights: Weights, key: str, dimensions: int) -> torch.Size:
    """The shape of an entry, which stays."""
    if key not in weights:
        raise ValueError(f"the checkpoint has no {key!r}, which this layout needs")
    shape = weights[key].shape
    if len(shape) != dimensions:
        raise ValueError(f"{key!r} must have {dimensions} dimensions, got shape {list(shape)}")
    return shape


def depth_of(weights: Weights, prefix: str) -> int:
    """The number of layers whose keys begin with ``prefix`` and a number."""
    found = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", key) for key in weights)
    depth = 1 + max((int(match[1]) for match in found if match), default=-1)
    if not depth:
        raise ValueError(f"the checkpoint has no layer: no key begins with '{prefix}.0.'")
    return depth


def refuse(weights: Iterable[str], reasons: dict[str, str]) -> None:
    """Raise ValueError for the first key that matches a regular expression of ``reasons``."""
    for key in weights:
        for pattern, reason in reasons.items():
            if re.search(pattern, key):
                raise ValueError(f"{key!r}: {reason}")


def nothing_left(weights: Iterable[str], what: str) -> None:
    left = sorted(weights)
    if left:
        more = f" and {len(left) - 6} more" if len(left) > 6 else ""
        raise ValueError(f"{what}: {', '.join(map(repr, left[:6]))}{more}")


def take_modulators(weights: Weights, keys: dict[str, tuple[str, str]]) -> dict[str, tuple[Tensor, Tensor]]:
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
        taken[ours] = tuple(take(weights, key) for key in pair)
        shapes |= {key: list(tensor.shape) for key, tensor in zip(pair, taken[ours], strict=True)}
    first = next(iter(shapes.values()))
    for key, shape in shapes.items():
        if len(shape) != 1 or not shape[0] or shape[0] % 2 or shape != first:
            raise ValueError(f"{key!r} must have the shape [2 * order], the same for all modulators, got {shape}")
    return taken


def build(
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
    nothing_left((named(key, key) for key in info["missing_keys"]), "the checkpoint lacks keys")
    for key, found, expected in info["mismatched_keys"]:
        raise ValueError(f"{named(key, key)!r} has the shape {list(found)} instead of {list(expected)}")
    nothing_left(info["unexpected_keys"], "the checkpoint has keys that this layout has no place for")
    return model


def patch(model: PreTrainedModel, modulators: dict[str, tuple[Tensor, Tensor]]) -> PreTrainedModel:
    """Patch where the checkpoint has modulators, and give the model their values."""
    layers = {f"{name}.multimax": name for name in attention_layers(model)}
    chosen = [layers[ours] for ours in modulators if ours != OUTPUT]
    prefix = f"{model.base_model_prefix}."
    include = None if len(chosen) in (0, len(layers)) else [f"^{re.escape(n.removeprefix(prefix))}$" for n in chosen]
    order = next(iter(modulators.values()))[0].numel() // 2
    patch_model(model, attention=bool(chosen), output=OUTPUT in modulators, order=order, include=include)
    with torch.no_grad():
        for ours, (ranges, ts) in modulators.items():
            normalizer = model.get_submodule(ours)
            normalizer.ranges.copy_(ranges)
            normalizer.ts.copy_(ts)
    return model


def convert(
    weights: Weights, cls: type[PreTrainedModel], config: PreTrainedConfig, names: Names, made: Weights
) -> PreTrainedModel:
    """The patched model of a checkpoint.

    Args:
        weights: what is left of the checkpoint.
        made: our tensors that are no copies of an entry.
    """
    pairs = {ours: (join(theirs, "ranges"), join(theirs, "ts")) for theirs, ours in names.modulators.items()}
    modulators = take_modulators(weights, pairs)
    renamed = {ours: take(weights, theirs) for theirs, ours in names.weights().items()}
    nothing_left(weights, "the checkpoint has keys that this layout has no place for")
    model = build(cls, config, {**made, **renamed}, {ours: theirs for theirs, ours in names.weights().items()})
    return patch(model, modulators)


def restore(ours: Weights, names: Names, made: Weights) -> Weights:
    """The inverse of ``convert``; ``ours`` without the tensors that ``made`` was made of."""
    renamed = {theirs: ours.pop(key) for theirs, key in names.weights().items()}
    scalars = {theirs: ours.pop(key) for theirs, key in names.scalars().items() if key in ours}
    nothing_left(ours, "the model has parameters that this layout has no place for")
    return {**made, **renamed, **scalars}
