"""What the adapter is called, in PEFT's tables, in files and among a model's modules."""

from typing import Any

__all__ = ["CONTAINER", "PREFIX", "TYPE", "is_ours"]

#: ``peft_type`` in adapter_config.json. No module of a model has it in its name: PEFT relies on that.
TYPE = "MULTIMAX_ADAPTER"
#: What the names of an adapter's parameters begin with, in the layer that they are in.
PREFIX = "multimax_adapter_"
#: What holds the normalizers of adapters, in the place of the layer's.
CONTAINER = f"{PREFIX}layers"


def is_ours(config: Any) -> bool:
    """Whether a PEFT config, or the values of one, is of a MultiMax adapter."""
    kind = config.get("peft_type") if isinstance(config, dict) else getattr(config, "peft_type", None)
    return getattr(kind, "value", kind) == TYPE
