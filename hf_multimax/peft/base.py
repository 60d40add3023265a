"""What the base of an adapter must be, and has been: a stock base gets what it needs, and what cannot be is refused."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from hf_multimax.config import MultiMaxConfig
from hf_multimax.models.checkpoint import is_multimax_key
from hf_multimax.models.patching import patch_model
from hf_multimax.normalizers.base import MultiMax, Normalizer, NormalizerSwitch, is_patched, named_places
from hf_multimax.peft.files import HUB_ARGUMENTS, RECORD, read_config, read_record, read_scalars, scalars_among
from hf_multimax.peft.fit import KEY_PREFIX, SHARED_FIELDS, check_finite_scalars, check_same, check_scalars, place_of
from hf_multimax.peft.names import CONTAINER, is_ours

__all__ = ["check_modules_to_save", "prepare_base", "put_scalars", "write_record"]


def write_record(base: nn.Module, folder: Path, adapter: str, state_dict: dict[str, Any] | None = None) -> None:
    """Write beside an adapter what its base was, if that was a MultiMax model.

    Args:
        state_dict: of the PeftModel, where its parameters are spread over processes.
    """
    entry = getattr(getattr(base, "config", None), "multimax", None)
    if entry is None or not folder.is_dir():
        return
    places = [module for _, module in named_places(base)]
    if any(isinstance(module, NormalizerSwitch) and module.underneath() is None for module in places):
        return  # it was stock
    values = dict(base.named_parameters()) if state_dict is None else state_dict
    values = {name.removeprefix(KEY_PREFIX): value for name, value in values.items()}
    softmax = all(_is_softmax(rest, name, values) for name, rest in _not_carried(base, adapter))
    record = {"multimax": entry, "base_is_softmax": softmax}
    (folder / RECORD).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def prepare_base(
    base: nn.Module,
    adapter: Any,
    hub: dict[str, Any],
    state_dict: dict[str, Any] | None = None,
    config: Any = None,
) -> dict[str, Tensor]:
    """Make ``base`` what an adapter needs, before anything is put into it.

    Args:
        adapter: its folder or repository; None if ``state_dict`` and ``config`` are given.
        config: of the adapter; None for what is in its folder.

    Returns:
        The adapter's scalars, by the names of its file.

    Raises:
        ValueError: if the adapter carries scalars that the base cannot take, or was trained on a MultiMax model whose
            scalars it does not carry and the base does not have.
    """
    if adapter is None and state_dict is None:
        return {}
    hub = {key: hub[key] for key in HUB_ARGUMENTS if hub.get(key)}
    record = None if adapter is None else read_record(adapter, hub)
    scalars = read_scalars(adapter, hub) if state_dict is None else scalars_among(state_dict)
    config = read_config(adapter, hub) if config is None else config
    ours = is_ours(config)
    if not scalars and record is None and not ours:
        return {}
    if not is_patched(base) and "multimax" in vars(getattr(base, "config", None) or base):
        return {}  # a stock class on the way to find out that its checkpoint is a MultiMax one
    check_finite_scalars(scalars, adapter)
    _check_base(base, adapter, record, bool(scalars) and not ours)
    if ours:
        _check_ours(base, config, scalars, adapter, hub)
        return scalars
    if not is_patched(base) and scalars:
        patch_model(base, MultiMaxConfig.from_dict(record["multimax"]))
    homeless = sorted({_layer(key) for key in scalars} - {name for name, _ in named_places(base)})
    if homeless:
        raise ValueError(
            f"the adapter {str(adapter)!r} carries MultiMax scalars for layers that the base has none in: "
            f"{', '.join(homeless[:6])}. Patch it as the adapter's base was"
        )
    return scalars


def put_scalars(base: nn.Module, scalars: dict[str, Tensor], adapter: str) -> None:
    """See to it that an adapter that was loaded has its scalars, which not every version of Transformers puts in."""
    for key, value in scalars.items():
        place, _, entry = key.removeprefix(KEY_PREFIX).rpartition(".")
        place = place.removesuffix(f".{CONTAINER}")
        module = base.get_submodule(place)
        copies = getattr(module, CONTAINER, getattr(module, "modules_to_save", {}))
        if adapter not in copies:
            raise ValueError(
                f"the adapter {adapter!r} carries {key}, but its adapter_config.json does not list that module under "
                "modules_to_save, so that it is not in use: add 'multimax' there"
            )
        parameter = copies[adapter].get_parameter(entry)
        if not isinstance(parameter, DTensor):  # sharded: whoever shards puts values in by parts
            with torch.no_grad():
                parameter.copy_(value)


def _check_base(base: nn.Module, adapter: Any, record: dict[str, Any] | None, carries: bool) -> None:
    """Raise ValueError if the base is not, and cannot be made, what the record of an adapter says that its base was."""
    if not is_patched(base):
        if record is None and carries:
            raise ValueError(
                f"the adapter {str(adapter)!r} carries MultiMax scalars, and the base is a stock "
                f"{type(base).__name__}, on which they would be ignored: call hf_multimax.patch_model on it first, as "
                "the adapter's base was patched"
            )
        if record is not None and not record["base_is_softmax"]:
            raise ValueError(
                f"the adapter {str(adapter)!r} was trained on a MultiMax model, whose trained scalars it does not "
                f"carry, and the base is a stock {type(base).__name__}: load the MultiMax checkpoint that it was "
                "trained on"
            )
    elif record is not None and carries and "multimax" in vars(base.config):
        mine, theirs = base.config.multimax, record["multimax"]
        unlike = [f"{x} ({theirs.get(x)!r}, not {mine[x]!r})" for x in SHARED_FIELDS if mine.get(x) != theirs.get(x)]
        if unlike:
            raise ValueError(
                f"the adapter {str(adapter)!r} was trained on a MultiMax model with another {', '.join(unlike)}"
            )


def _check_ours(base: nn.Module, config: Any, scalars: dict[str, Tensor], adapter: Any, hub: dict[str, Any]) -> None:
    """Raise ValueError if a MultiMax adapter is not whole, or not for this base."""
    if not isinstance(base, PreTrainedModel):
        patch_model(base)  # raises
    if isinstance(config, dict):
        from peft import PeftConfig

        config = (
            PeftConfig.from_pretrained(adapter, **hub) if adapter is not None else PeftConfig.from_peft_type(**config)
        )
    if is_patched(base):
        check_same(config, base)
    check_scalars(base, config, config.layers(base), CONTAINER, scalars, adapter)


def check_modules_to_save(model: nn.Module, config: Any) -> None:
    """Raise ValueError for an adapter of another kind that is to train scalars which the model does not have.

    PEFT would pass over names that it does not find.
    """
    names = [name for name in getattr(config, "modules_to_save", None) or () if is_multimax_key(f"{name}.x")]
    if not names:
        return
    places = [module for _, module in named_places(model)]
    if not places:
        raise ValueError(
            f"modules_to_save names {', '.join(names)}, and this {type(model).__name__} is a stock model without: call "
            "hf_multimax.patch_model on it first"
        )
    if any(isinstance(module, NormalizerSwitch) for module in places):
        raise ValueError(
            f"modules_to_save names {', '.join(names)}, and the scalars of this {type(model).__name__} are those of "
            "MultiMax adapters: leave it out, or unload them first"
        )


def _layer(key: str) -> str:
    """The layer of a scalar of an adapter's file, as ``named_normalizers`` calls it."""
    layer = key.removeprefix(KEY_PREFIX).rpartition(".")[0]
    return layer.removesuffix(".multimax")


def _not_carried(base: nn.Module, adapter: str) -> Iterator[tuple[str, Normalizer]]:
    """The base's own normalizers in whose place the adapter has none, by name."""
    for name, module in named_places(base):
        if adapter not in getattr(module, CONTAINER, getattr(module, "modules_to_save", {})):
            part = next((part for part in ("base_layer", "original_module") if hasattr(module, part)), None)
            place = place_of(name)
            yield (place, module) if part is None else (f"{place}.{part}", getattr(module, part))


def _is_softmax(normalizer: Normalizer, name: str, values: dict[str, Any]) -> bool:
    """Whether a normalizer is SoftMax by the present values of its parameters."""
    if not isinstance(normalizer, MultiMax):
        return False
    neutral = {"ts": 0, "scale": 1, "shift": 0}
    own = {entry: p for entry, p in normalizer.named_parameters() if entry in neutral}
    return all(bool((values.get(f"{name}.{entry}", p) == neutral[entry]).all()) for entry, p in own.items())
