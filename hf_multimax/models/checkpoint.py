"""A MultiMax checkpoint: how its config.json differs from a native one, and whether what was loaded fits it."""

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
    find_adapter_config_file,
    has_file,
    is_peft_available,
)

from hf_multimax.attention.interface import IMPLEMENTATION
from hf_multimax.config import shown
from hf_multimax.models.loader_file import AUTO_MAP
from hf_multimax.normalizers.base import OUTPUT, Normalizer, whole

__all__ = [
    "MODEL_TYPE",
    "PREFIX",
    "check_finite",
    "check_implementation",
    "check_loaded",
    "check_safetensors",
    "check_values",
    "disk_form",
    "implementation_refused",
    "is_multimax_key",
    "loading_info",
    "naming_damaged_weights",
    "native_form",
    "stored_config",
    "tell_loading_info",
    "weights_path",
]

logger = logging.getLogger(__name__)

#: ``model_type`` of a checkpoint on disk.
MODEL_TYPE = "multimax"
#: In front of an architecture's name on disk: what goes by that name alone must not take it for a stock checkpoint.
PREFIX = "MultiMax"
_HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")
#: Names of config fields that count or measure something, e.g. n_embd, hidden_size, num_attention_heads, d_ff.
_SIZE = re.compile(
    r"(num|n|d)_.*|.*_(sizes?|dims?|layers|heads?|channels|groups|experts|length|positions|embeddings)|depths?|size"
)
#: What is built one by one, and the most of it and of anything that no model exceeds: a file must not make us count on.
_BUILT = re.compile(r".*(layers?|blocks?|experts|depths?|stages|heads?|codebooks|quantizers|labels|classes)")
_MOST_BUILT, _LARGEST = 1_000_000, 2**31 - 1
_CANNOT_BE_ZERO = ("vocab_size", "hidden_size", "d_model", "n_embd", "num_attention_heads", "num_heads", "n_head")


def disk_form(config: PreTrainedConfig, values: dict[str, Any]) -> dict[str, Any]:
    """The values of ``config`` as config.json has them: Transformers without the plugin refuses them, or any part."""
    values = dict(values, base_model_type=config.model_type, model_type=MODEL_TYPE, auto_map=AUTO_MAP)
    values["attn_implementation"] = IMPLEMENTATION
    if values.get("architectures"):
        values["architectures"] = [PREFIX + name.removeprefix(PREFIX) for name in values["architectures"]]
    _mark_parts(config, values)
    return values


def _mark_parts(config: PreTrainedConfig, values: dict[str, Any]) -> None:
    """Write the attention implementation of the sub-configs, too."""
    for name in config.sub_configs:
        part, part_values = getattr(config, name, None), values.get(name)
        if isinstance(part, PreTrainedConfig) and isinstance(part_values, dict):
            part_values["attn_implementation"] = IMPLEMENTATION
            _mark_parts(part, part_values)


def native_form(values: dict[str, Any]) -> dict[str, Any]:
    """What config.json said before it was written as a MultiMax config."""
    values = {key: value for key, value in _unmarked(values).items() if key != "auto_map"}
    values["model_type"] = values.pop("base_model_type", MODEL_TYPE)
    if isinstance(values.get("architectures"), list):
        values["architectures"] = [str(name).removeprefix(PREFIX) for name in values["architectures"]]
    return values


def _unmarked(values: dict[str, Any]) -> dict[str, Any]:
    """The values without the attention implementation of any part."""
    kept = {key: value for key, value in values.items() if (key, value) != ("attn_implementation", IMPLEMENTATION)}
    return {key: _unmarked(value) if isinstance(value, dict) else value for key, value in kept.items()}


def implementation_refused(name: Any) -> str:
    return (
        f"attn_implementation={name!r} would drop MultiMax from this model: "
        "call hf_multimax.unpatch_model(model) first if that is what you want"
    )


def check_implementation(requested: Any) -> None:
    values = requested.values() if isinstance(requested, dict) else [requested]
    for value in values:
        if isinstance(value, dict):
            check_implementation(value)
        elif value not in (None, IMPLEMENTATION):
            raise ValueError(implementation_refused(value))


def check_values(values: dict[str, Any], within: str = "") -> None:
    """Refuse what a config.json, or a part of it called ``within``, must not ask for, before anything is built.

    Raises:
        ValueError: for a size that is negative or beyond any model's, an attention implementation, which may name code
            to fetch, or weights that are no safetensors; the text names the field.
    """
    for key, value in values.items():
        key = str(key)  # those of id2label are integers in memory
        name = f"{within}{key}"
        if "attn_implementation" in key:
            if any(leaf not in (None, IMPLEMENTATION) for leaf in _leaves(value)):
                raise ValueError(f"config.json: {name} must be {IMPLEMENTATION!r} or left out, got {value!r}")
        elif isinstance(value, dict):
            if key != "multimax":
                check_values(value, f"{name}.")
        elif key == "transformers_weights" and not str(value).endswith((".safetensors", ".safetensors.index.json")):
            raise ValueError(f"config.json: {name} must name safetensors, got {value!r}")
        elif _SIZE.fullmatch(key):
            # lists of layers may count from the last one
            sizes = [value] if not isinstance(value, list) else [] if key.endswith("layers") else value
            # some limits and chunks are -1 in Transformers' own defaults, for none
            none_is_allowed = key.startswith("max_") or key in ("chunk_size", "num_images")
            at_least = 1 if key in _CANNOT_BE_ZERO else -1 if none_is_allowed else 0
            at_most = _MOST_BUILT if _BUILT.fullmatch(key) else _LARGEST
            for size in sizes:
                if isinstance(size, int | float) and not at_least <= size <= at_most:
                    bound = f"at least {at_least}" if size < at_least else f"at most {at_most:,}"
                    raise ValueError(f"config.json: {name} must be {bound}, got {shown(value)}")


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for part in value.values():
            yield from _leaves(part)
    else:
        yield value


def check_safetensors(path: Any, stored: dict[str, Any], kwargs: dict[str, Any]) -> None:
    """Raise OSError if a folder or repository, whose config.json is ``stored``, has no safetensors.

    Left to itself, Transformers asks an online service to convert pickled weights, and gives it the user's token.
    """
    if path is None or os.path.isfile(path) or kwargs.get("gguf_file") or stored.get("transformers_weights"):
        return
    subfolder, variant = kwargs.get("subfolder") or "", f".{kwargs['variant']}." if kwargs.get("variant") else "."
    hub = {key: kwargs[key] for key in ("revision", "token", "local_files_only", "cache_dir") if key in kwargs}
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
        name = variant.join(name.rsplit(".", 1))
        if has_file(path, os.path.join(subfolder, name), **hub):
            if name.endswith(".json"):
                _check_index(path, name, kwargs)
            return
    raise OSError(
        f"no {SAFE_WEIGHTS_NAME} was found in {str(path)!r} (nor in the cache): MultiMax checkpoints are read from "
        "safetensors only, since pickled weights can run code. Save the model again with save_pretrained."
    )


def _check_index(path: Any, name: str, kwargs: dict[str, Any]) -> None:
    """Raise OSError for an index that leads out of its folder, or to what is no safetensors."""
    index = cached_file(path, name, **{key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs})
    try:
        shards = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OSError(f"{name} of {str(path)!r} is no index of safetensors ({error!r})") from error
    for shard in shards:
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", shard):
            raise OSError(f"{name} of {str(path)!r} must name safetensors beside it, got {shard!r}")


@contextlib.contextmanager
def naming_damaged_weights(path: Any, kwargs: dict[str, Any]) -> Iterator[None]:
    """Turn the error of a damaged safetensors file into an OSError that names the file."""
    try:
        yield
    except SafetensorError as error:
        names = ", ".join(file.name for file in _weights(path, kwargs) if _damaged(file)) or "a file of the weights"
        raise OSError(
            f"{names} of {str(path)!r} is damaged or cut off ({error}). Load it again with force_download=True; "
            "if that does not help, it was saved or uploaded incompletely."
        ) from error


def _weights(path: Any, kwargs: dict[str, Any]) -> list[Path]:
    """The safetensors of a folder, or of a repository's snapshot in the cache."""
    hub = {key: kwargs[key] for key in ("revision", "cache_dir", "subfolder") if key in kwargs}
    config = cached_file(path, "config.json", local_files_only=True, **hub)
    folder = Path(path) if config is None else Path(config).parent
    return sorted(folder.glob("*.safetensors"))


def _damaged(file: Path) -> bool:
    try:
        with safe_open(file, framework="pt"):
            return False
    except SafetensorError:
        return True


def weights_path(path: Any, kwargs: dict[str, Any]) -> Any:
    """Where the weights lie that ``from_pretrained`` reads: of the folder of an adapter alone, its base model's."""
    known = (kwargs.get("adapter_kwargs") or {}).get("_adapter_model_path")
    if path is None or known or not is_peft_available() or os.path.exists(os.path.join(path, "config.json")):
        return path
    file = find_adapter_config_file(path, **{key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs})
    return path if file is None else json.loads(Path(file).read_text(encoding="utf-8"))["base_model_name_or_path"]


def stored_config(cls: type[PreTrainedModel], path: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The config.json beside the weights, in its native form; empty if there is none."""
    if path is None:
        return {}
    try:
        return cls.config_class.get_config_dict(path, **{k: kwargs[k] for k in _HUB_ARGUMENTS if k in kwargs})[0]
    except OSError:
        return {}  # weights without a config: the caller gave one


#: What the loading of a class of ours, whose own code may look at its result, is to be told about.
_LOADING: ContextVar[tuple[type, dict[str, Any]] | None] = ContextVar("_LOADING", default=None)


@contextlib.contextmanager
def loading_info(cls: type[PreTrainedModel]) -> Iterator[dict[str, Any]]:
    """A dictionary that is filled with the loading info of the model of ``cls`` that is loaded inside.

    The class's own ``from_pretrained`` may work on the model, so that it cannot be asked for a pair.
    """
    info: dict[str, Any] = {}
    token = _LOADING.set((cls, info))
    try:
        yield info
    finally:
        _LOADING.reset(token)


def tell_loading_info(cls: type[PreTrainedModel], info: dict[str, Any]) -> None:
    """Hand what Transformers says about a loaded model to whoever waits for it."""
    waiting = _LOADING.get()
    if waiting is not None and waiting[0] is cls:
        waiting[1].update(info)


def check_loaded(
    model: PreTrainedModel, info: dict[str, Any], stored: dict[str, Any], ignore_mismatched_sizes: bool
) -> None:
    """Raise ValueError for MultiMax parameters that did not load, and take care of another head's output modulator."""
    mismatched = {item[0]: f"{list(item[1])} instead of {list(item[2])}" for item in info["mismatched_keys"]}
    modulated = "multimax" in stored and bool(stored["multimax"].get("output"))
    other_head = modulated and not (hasattr(model, OUTPUT) and _has_that_head(model, info, stored))
    problems = _misfits(info, mismatched, other_head)
    if "multimax" not in stored:
        problems["missing"] = set()  # a base checkpoint: they were initialised
    if any(problems.values()):
        found = "; ".join(f"{what}: {', '.join(sorted(keys))}" for what, keys in problems.items() if keys)
        raise ValueError(f"the MultiMax parameters of {model.name_or_path!r} do not fit its config. {found}")
    check_finite(model, f"cannot be loaded from {model.name_or_path!r}")
    if mismatched and not ignore_mismatched_sizes:
        raise RuntimeError(
            f"{model.name_or_path!r} has weights of another shape: "
            f"{'; '.join(f'{key}: {shapes}' for key, shapes in sorted(mismatched.items()))}. "
            "Pass ignore_mismatched_sizes=True to initialise them anew."
        )
    if other_head and hasattr(model, OUTPUT):
        model.multimax_output.reset_parameters()
        logger.warning(
            f"The checkpoint's output modulator belongs to {stored['architectures'][0]}: that of "
            f"{type(model).__name__} is newly initialised."
        )


def _misfits(info: dict[str, Any], mismatched: dict[str, str], other_head: bool) -> dict[str, set[str]]:
    """The names of MultiMax parameters that did not load, by what is wrong; another head's output aside."""

    def ours(keys: Iterable[str]) -> set[str]:
        return {key for key in keys if is_multimax_key(key) and not (other_head and _is_output(key))}

    return {
        "missing": ours(info["missing_keys"]),
        "unexpected": {key for key in ours(info["unexpected_keys"]) if not _foreign(key, info)},
        "of another shape": {f"{key}: {shapes}" for key, shapes in mismatched.items() if is_multimax_key(key)},
    }


def _has_that_head(model: PreTrainedModel, info: dict[str, Any], stored: dict[str, Any]) -> bool:
    """Whether the output modulator of a file belongs to the head of the model's class.

    By the class's name or, where that is another, by the weights: a file with all of this class's and no others is one
    of this class, whatever an editor or a tool has called it.

    Raises:
        ValueError: if neither tells.
    """
    names = stored.get("architectures") or []
    if not names or type(model).__name__ in names:
        return True
    if not any(not is_multimax_key(key) for key in (*info["missing_keys"], *info["unexpected_keys"])):
        return True
    if any(hasattr(transformers, str(name)) for name in names):
        return False
    raise ValueError(
        f"{model.name_or_path!r} has an output modulator, and its config.json says that it belongs to "
        f"{', '.join(map(str, names))}, which Transformers does not know: write the class whose head it was trained "
        'with into "architectures"'
    )


def check_finite(model: nn.Module, what: str) -> None:
    """Raise ValueError, naming them, if parameters of normalizers are NaN or infinite; ``what`` they then cannot be."""
    broken = [
        f"{place}.{name}".lstrip(".")
        for place, module in model.named_modules()
        if isinstance(module, Normalizer)
        for name, parameter in module.named_parameters()
        if not parameter.is_meta and not whole(parameter.detach()).isfinite().all()
    ]
    if broken:
        raise ValueError(
            f"MultiMax parameters that are NaN or infinite {what}: {', '.join(broken[:8])}"
            f"{f' and {len(broken) - 8} more' if len(broken) > 8 else ''}. Go back to a checkpoint of before, and "
            "train with a lower learning rate for them"
        )


def is_multimax_key(key: str) -> bool:
    """Whether a parameter's name is that of a normalizer's."""
    return _is_output(key) or ".multimax." in f".{key}"


def _is_output(key: str) -> bool:
    return f".{OUTPUT}." in f".{key}"


def _foreign(key: str, info: dict[str, Any]) -> bool:
    """Whether the attention layer that an unexpected key belongs to is, as a whole, not a part of the loaded class."""
    layer = key.rpartition("multimax")[0]
    return not _is_output(key) and any(k.startswith(layer) and not is_multimax_key(k) for k in info["unexpected_keys"])
