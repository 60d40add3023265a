"""What is in an adapter's folder or repository: its config, its scalars, and the record of what its base was."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import cached_file

from hf_multimax.config import MultiMaxConfig
from hf_multimax.models.checkpoint import is_multimax_key

__all__ = ["HUB_ARGUMENTS", "RECORD", "read_config", "read_record", "read_scalars", "scalars_among"]

#: The file beside an adapter that says what its base was.
RECORD = "multimax_config.json"
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
_WEIGHTS, _PICKLED, _CONFIG = "adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"


def read_record(adapter: Any, hub: dict[str, Any]) -> dict[str, Any] | None:
    """The record beside an adapter, None if there is none; ValueError if it is damaged."""
    file = _file(adapter, RECORD, hub)
    if file is None:
        return None
    try:
        record = json.loads(Path(file).read_text(encoding="utf-8"))
        MultiMaxConfig.from_dict(record["multimax"])
        return {"multimax": record["multimax"], "base_is_softmax": bool(record["base_is_softmax"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{RECORD} of the adapter {str(adapter)!r} is damaged: {error!r}") from error


def read_config(adapter: Any, hub: dict[str, Any]) -> dict[str, Any]:
    """What is in an adapter's adapter_config.json; PEFT says what is wrong with one that cannot be read."""
    file = None if adapter is None else _file(adapter, _CONFIG, hub)
    try:
        values = {} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def read_scalars(adapter: Any, hub: dict[str, Any]) -> dict[str, Tensor]:
    """The scalars in an adapter's file, by their names there."""
    file = _file(adapter, _WEIGHTS, hub)
    if file is not None:
        with safe_open(file, framework="pt") as weights:
            return {key: weights.get_tensor(key) for key in weights.keys() if is_multimax_key(key)}  # noqa: SIM118
    file = _file(adapter, _PICKLED, hub)
    return {} if file is None else scalars_among(torch.load(file, map_location="cpu", weights_only=True))


def scalars_among(state_dict: dict[str, Any]) -> dict[str, Tensor]:
    """The scalars of a state dict."""
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
