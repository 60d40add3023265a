"""A MultiMax checkpoint: how its config.json differs from a native one, and whether what was loaded fits it."""

import logging
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from hf_multimax.attention import IMPLEMENTATION
from hf_multimax.remote import AUTO_MAP

__all__ = [
    "MODEL_TYPE",
    "check_implementation",
    "check_loaded",
    "disk_form",
    "implementation_refused",
    "native_form",
    "stored_config",
]

logger = logging.getLogger(__name__)

#: ``model_type`` of a checkpoint on disk.
MODEL_TYPE = "multimax"
_HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")


def disk_form(config: PreTrainedConfig, values: dict[str, Any]) -> dict[str, Any]:
    """The values of ``config`` as config.json has them: Transformers without the plugin refuses them, or any part."""
    values = dict(values, base_model_type=config.model_type, model_type=MODEL_TYPE, auto_map=AUTO_MAP)
    values["attn_implementation"] = IMPLEMENTATION
    _mark_parts(config, values)
    return values


def _mark_parts(config: PreTrainedConfig, values: dict[str, Any]) -> None:
    """Write the attention implementation of the sub-configs, too."""
    for name in config.sub_configs:
        part, part_values = getattr(config, name, None), values.get(name)
        if isinstance(part, PreTrainedConfig) and isinstance(part_values, dict):
            if part._attn_implementation == IMPLEMENTATION:
                part_values["attn_implementation"] = IMPLEMENTATION
            _mark_parts(part, part_values)


def native_form(values: dict[str, Any]) -> dict[str, Any]:
    """What config.json said before it was written as a MultiMax config."""
    values = {key: value for key, value in _unmarked(values).items() if key != "auto_map"}
    values["model_type"] = values.pop("base_model_type", MODEL_TYPE)
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


def stored_config(cls: type[PreTrainedModel], path: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The config.json beside the weights, in its native form; empty if there is none."""
    if path is None:
        return {}
    try:
        return cls.config_class.get_config_dict(path, **{k: kwargs[k] for k in _HUB_ARGUMENTS if k in kwargs})[0]
    except OSError:
        return {}  # weights without a config: the caller gave one


def check_loaded(
    model: PreTrainedModel, info: dict[str, Any], stored: dict[str, Any], ignore_mismatched_sizes: bool
) -> None:
    """Raise ValueError for MultiMax parameters that did not load, and take care of another head's output modulator."""
    same_class = type(model).__name__ in (stored.get("architectures") or [type(model).__name__])
    mismatched = {item[0]: f"{list(item[1])} instead of {list(item[2])}" for item in info["mismatched_keys"]}
    missing = {key for key in info["missing_keys"] if _is_multimax(key)}
    unexpected = {key for key in info["unexpected_keys"] if _is_multimax(key) and not _foreign(key, info)}
    if not same_class:
        missing = {key for key in missing if not _is_output(key)}
        unexpected = {key for key in unexpected if not _is_output(key)}
    if "multimax" not in stored:
        missing = set()  # a base checkpoint: they were initialised
    problems = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape": {f"{key}: {mismatched[key]}" for key in mismatched if _is_multimax(key)},
    }
    if any(problems.values()):
        found = "; ".join(f"{what}: {', '.join(sorted(keys))}" for what, keys in problems.items() if keys)
        raise ValueError(f"the MultiMax parameters of {model.name_or_path!r} do not fit its config. {found}")
    if mismatched and not ignore_mismatched_sizes:
        raise RuntimeError(
            f"{model.name_or_path!r} has weights of another shape: "
            f"{'; '.join(f'{key}: {shapes}' for key, shapes in sorted(mismatched.items()))}. "
            "Pass ignore_mismatched_sizes=True to initialise them anew."
        )
    if not same_class and "multimax" in stored and hasattr(model, "multimax_output"):
        model.multimax_output.reset_parameters()
        logger.warning(
            f"The checkpoint's output modulator belongs to {stored['architectures'][0]}: that of "
            f"{type(model).__name__} is newly initialised."
        )


def _is_multimax(key: str) -> bool:
    return _is_output(key) or ".multimax." in f".{key}"


def _is_output(key: str) -> bool:
    return ".multimax_output." in f".{key}"


def _foreign(key: str, info: dict[str, Any]) -> bool:
    """Whether the attention layer that an unexpected key belongs to is, as a whole, not a part of the loaded class."""
    layer = key.rpartition("multimax")[0]
    return not _is_output(key) and any(k.startswith(layer) and not _is_multimax(k) for k in info["unexpected_keys"])
