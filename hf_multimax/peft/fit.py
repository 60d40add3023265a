"""Whether the scalars of an adapter's file are those that a model needs, all of them, and numbers."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_multimax.config import MultiMaxConfig
from hf_multimax.models.attachment import build_normalizers, output_modulator
from hf_multimax.normalizers.base import OUTPUT

__all__ = ["KEY_PREFIX", "SHARED_FIELDS", "check_finite_scalars", "check_same", "check_scalars", "place_of"]

#: What must be the same in two MultiMax models for one to take the other's scalars.
SHARED_FIELDS = ("normalizer", "normalizer_kwargs", "order", "affine", "per_head")
#: What PEFT puts in front of the names in an adapter's file.
KEY_PREFIX = "base_model.model."


def place_of(name: str) -> str:
    """The name of the module that stands in the place of a layer's normalizer."""
    return name if name == OUTPUT else f"{name}.multimax"


def check_finite_scalars(scalars: Mapping[str, Tensor], adapter: Any) -> None:
    """Raise ValueError if a scalar of an adapter's file is NaN or infinite, naming it."""
    broken = [key.removeprefix(KEY_PREFIX) for key, value in scalars.items() if not value.isfinite().all()]
    if broken:
        raise ValueError(f"the adapter {str(adapter)!r} has scalars that are NaN or infinite: {_listed(broken)}")


def check_scalars(
    model: PreTrainedModel,
    config: MultiMaxConfig,
    layers: Iterable[str],
    container: str,
    scalars: Mapping[str, Tensor],
    adapter: Any,
) -> None:
    """Raise ValueError if an adapter's file does not have just the scalars that ``config`` asks for in ``layers``.

    Args:
        container: the name, inside the normalizer's place, of what holds the scalars of adapters.
    """
    with torch.random.fork_rng(devices=[]):  # only the shapes are wanted
        built = build_normalizers(config, {name: model.get_submodule(name) for name in layers})
        if config.output:
            built[OUTPUT] = output_modulator(model, config)
    expected = {
        f"{place_of(name)}.{container}.{entry}": list(parameter.shape)
        for name, normalizer in built.items()
        for entry, parameter in normalizer.named_parameters()
    }
    found = {key.removeprefix(KEY_PREFIX): list(value.shape) for key, value in scalars.items()}
    both = [key for key in expected if key in found]
    shapes = [f"{key} is {found[key]}, not {expected[key]}" for key in both if found[key] != expected[key]]
    problems = {
        "the model needs and the adapter lacks": [key for key in expected if key not in found],
        "the adapter has and the model has no place for": [key for key in found if key not in expected],
        "are of another shape:": shapes,
    }
    for problem, keys in problems.items():
        if keys:
            raise ValueError(
                f"the adapter {str(adapter)!r} does not fit this {type(model).__name__}, with scalars that {problem} "
                f"{_listed(keys)}: load it on the base it was trained on"
            )


def check_same(config: MultiMaxConfig, model: PreTrainedModel) -> None:
    """Raise ValueError, with what to write instead, for an adapter whose scalars are not those of the model."""
    theirs = model.config.multimax
    other = {name: theirs[name] for name in SHARED_FIELDS if theirs[name] != getattr(config, name)}
    if other:
        mine = ", ".join(f"{name}={getattr(config, name)!r}" for name in other)
        its = ", ".join(f"{name}={value!r}" for name, value in other.items())
        raise ValueError(
            f"this {type(model).__name__} is patched with {its} already, and the adapter says {mine}: give it the "
            f"model's, MultiMaxAdapterConfig({its}), or load it on another copy of the base"
        )


def _listed(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
