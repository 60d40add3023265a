"""Saving and loading adapters of MultiMax models: on a stock base, too, one comes with the scalars it was trained with.

PEFT ignores entries of ``modules_to_save`` that a base does not have. So saving an adapter of a patched model also
writes ``multimax_config.json`` beside it, and loading one first looks at what it carries: a stock base is patched as
the adapter's was, and what cannot be right is refused.
"""

import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from hf_multimax.config import MultiMaxConfig
from hf_multimax.models.checkpoint import is_multimax_key
from hf_multimax.models.patching import patch_model
from hf_multimax.modulator import MultiMax, Normalizer, named_normalizers

__all__ = ["RECORD", "prepare_base", "wrap_peft", "wrap_transformers", "write_record"]

#: The file beside an adapter that says what its base was.
RECORD = "multimax_config.json"
_PREFIX = "base_model.model."
_WEIGHTS = "adapter_model.safetensors"
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
#: What must be the same in two MultiMax models for one to take the other's scalars.
_FIELDS = ("normalizer", "normalizer_kwargs", "order", "affine", "per_head")


def wrap_transformers() -> None:
    """Wrap ``load_adapter`` of Transformers' own PEFT integration."""
    stock = PreTrainedModel.load_adapter
    if hasattr(stock, "_multimax_door"):
        return

    @functools.wraps(stock)
    def load_adapter(self: PreTrainedModel, peft_model_id: Any = None, *args: Any, **kwargs: Any) -> Any:
        hub = {**(kwargs.get("adapter_kwargs") or {}), **{k: kwargs[k] for k in _HUB_ARGUMENTS if kwargs.get(k)}}
        scalars = prepare_base(self, peft_model_id, hub, kwargs.get("adapter_state_dict"))
        result = stock(self, peft_model_id, *args, **kwargs)
        _put(self, scalars, (args[0] if args else kwargs.get("adapter_name")) or "default")
        return result

    load_adapter._multimax_door = True
    PreTrainedModel.load_adapter = load_adapter


def wrap_peft(peft: ModuleType) -> None:
    """Wrap the methods of PeftModel that save and load adapters."""
    model_class = peft.PeftModel
    load, from_pretrained, save = model_class.load_adapter, model_class.from_pretrained, model_class.save_pretrained

    @functools.wraps(load)
    def load_adapter(self: Any, model_id: Any, *args: Any, **kwargs: Any) -> Any:
        scalars = prepare_base(self.get_base_model(), model_id, kwargs)
        result = load(self, model_id, *args, **kwargs)
        _put(self.get_base_model(), scalars, args[0] if args else kwargs["adapter_name"])
        return result

    @functools.wraps(from_pretrained.__func__)
    def wrapped_from_pretrained(cls: type, model: nn.Module, model_id: Any, *args: Any, **kwargs: Any) -> Any:
        prepare_base(model, model_id, kwargs)
        return from_pretrained.__func__(cls, model, model_id, *args, **kwargs)

    @functools.wraps(save)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        save(self, save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            for name in kwargs.get("selected_adapters") or self.peft_config:
                write_record(self.get_base_model(), Path(save_directory, *([name] if name != "default" else [])))

    model_class.load_adapter = load_adapter
    model_class.from_pretrained = classmethod(wrapped_from_pretrained)
    model_class.save_pretrained = save_pretrained


def write_record(base: nn.Module, folder: Path) -> None:
    """Write beside an adapter what its base was, if that was a MultiMax model."""
    entry = getattr(getattr(base, "config", None), "multimax", None)
    if entry is not None and folder.is_dir():
        record = {"multimax": entry, "base_is_softmax": all(map(_is_softmax, _base_normalizers(base)))}
        (folder / RECORD).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def prepare_base(
    base: nn.Module, adapter: Any, hub: dict[str, Any], state_dict: dict[str, Any] | None = None
) -> dict[str, Tensor]:
    """Make ``base`` what an adapter needs, before anything is put into it.

    Returns:
        The adapter's scalars, by the names of its file.

    Raises:
        ValueError: if the adapter carries scalars that the base cannot take, or was trained on a MultiMax model whose
            scalars it does not carry and the base does not have.
    """
    if adapter is None and state_dict is None:
        return {}
    hub = {key: hub[key] for key in _HUB_ARGUMENTS if hub.get(key)}
    record = None if adapter is None else _record(adapter, hub)
    scalars = _scalars(adapter, hub) if state_dict is None else _only_scalars(state_dict)
    carried = {_layer(key) for key in scalars}
    if not carried and record is None:
        return {}
    own = {layer for layer, _ in named_normalizers(base)}
    if not own and "multimax" in vars(getattr(base, "config", None) or base):
        return {}  # a stock class on the way to find out that its checkpoint is a MultiMax one
    if not own:
        _patch(base, adapter, record, carried)
        own = {layer for layer, _ in named_normalizers(base)}
    elif record is not None:
        mine = base.config.multimax if "multimax" in vars(base.config) else {}
        theirs = record["multimax"]
        unlike = [f"{x} ({theirs.get(x)!r}, not {mine[x]!r})" for x in _FIELDS if mine and mine.get(x) != theirs.get(x)]
        if unlike and carried:
            raise ValueError(
                f"the adapter {str(adapter)!r} was trained on a MultiMax model with another {', '.join(unlike)}"
            )
    homeless = sorted(carried - own)
    if homeless:
        raise ValueError(
            f"the adapter {str(adapter)!r} carries MultiMax scalars for layers that the base has none in: "
            f"{', '.join(homeless[:6])}. Patch it as the adapter's base was"
        )
    return scalars


def _put(base: nn.Module, scalars: dict[str, Tensor], adapter: str) -> None:
    """See to it that an adapter that was loaded has its scalars, which not every version of Transformers puts in."""
    for key, value in scalars.items():
        place, _, entry = key.removeprefix(_PREFIX).rpartition(".")
        copies = getattr(base.get_submodule(place), "modules_to_save", {})
        if adapter not in copies:
            raise ValueError(
                f"the adapter {adapter!r} carries {key}, but its adapter_config.json does not list that module under "
                "modules_to_save, so that it is not in use: add 'multimax' there"
            )
        parameter = copies[adapter].get_parameter(entry)
        with torch.no_grad():
            parameter.copy_(value)


def _patch(base: nn.Module, adapter: Any, record: dict[str, Any] | None, carried: set[str]) -> None:
    """Patch a stock base for an adapter of a MultiMax model, unless that was SoftMax all along."""
    if record is None:
        raise ValueError(
            f"the adapter {str(adapter)!r} carries MultiMax scalars, and the base is a stock {type(base).__name__}, on "
            "which they would be ignored: call hf_multimax.patch_model on it first, as the adapter's base was patched"
        )
    if carried:
        patch_model(base, MultiMaxConfig.from_dict(record["multimax"]))
    elif not record["base_is_softmax"]:
        raise ValueError(
            f"the adapter {str(adapter)!r} was trained on a MultiMax model, whose trained scalars it does not carry, "
            f"and the base is a stock {type(base).__name__}: load the MultiMax checkpoint that it was trained on"
        )


def _record(adapter: Any, hub: dict[str, Any]) -> dict[str, Any] | None:
    file = _file(adapter, RECORD, hub)
    if file is None:
        return None
    try:
        record = json.loads(Path(file).read_text(encoding="utf-8"))
        MultiMaxConfig.from_dict(record["multimax"])
        return {"multimax": record["multimax"], "base_is_softmax": bool(record["base_is_softmax"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{RECORD} of the adapter {str(adapter)!r} is damaged: {error!r}") from error


def _scalars(adapter: Any, hub: dict[str, Any]) -> dict[str, Tensor]:
    file = _file(adapter, _WEIGHTS, hub)
    if file is None:
        return {}
    with safe_open(file, framework="pt") as weights:
        return {key: weights.get_tensor(key) for key in weights.keys() if is_multimax_key(key)}  # noqa: SIM118


def _only_scalars(state_dict: dict[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in state_dict.items() if is_multimax_key(key)}


def _file(adapter: Any, name: str, hub: dict[str, Any]) -> str | None:
    """A file of an adapter's folder or repository, None if it has none."""
    if os.path.isdir(adapter):
        path = os.path.join(adapter, hub.get("subfolder") or "", name)
        return path if os.path.isfile(path) else None
    try:
        return cached_file(str(adapter), name, _raise_exceptions_for_missing_entries=False, **hub)
    except OSError:
        return None  # PEFT says what is wrong with the repository


def _layer(key: str) -> str:
    """The layer of a scalar of an adapter's file, as ``named_normalizers`` calls it."""
    layer = key.removeprefix(_PREFIX).rpartition(".")[0]
    return layer.removesuffix(".multimax")


def _base_normalizers(base: nn.Module) -> Iterator[Normalizer]:
    """The base's own normalizers, whatever adapters have put over them."""
    for name, module in base.named_modules():
        if isinstance(module, Normalizer) and ".modules_to_save." not in f".{name}.":
            yield module


def _is_softmax(normalizer: Normalizer) -> bool:
    """Whether a normalizer is SoftMax by its present parameters."""
    if not isinstance(normalizer, MultiMax):
        return False
    plain = normalizer.scale is None or bool((normalizer.scale == 1).all() and (normalizer.shift == 0).all())
    return plain and not normalizer.ts.any()
