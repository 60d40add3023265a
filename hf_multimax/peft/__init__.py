"""MultiMax and PEFT: scalars as an adapter of their own, and no adapter that loads without its scalars.

PEFT is imported by those who use it only.
"""

from typing import Any

from hf_multimax.peft.importing import when_imported

__all__ = ["MultiMaxAdapterConfig", "register"]


def register() -> None:
    """Wrap the methods by which adapters are saved and loaded, and register ours, as soon as PEFT is imported."""
    from hf_multimax.peft import doors  # of this package only; it imports peft nowhere

    doors.wrap_transformers()
    when_imported("peft", _on_import)


def _on_import(peft: Any) -> None:
    from hf_multimax.peft import bridge, doors

    doors.wrap_peft(peft)
    bridge.try_to_register()


def __getattr__(name: str) -> Any:
    if name != "MultiMaxAdapterConfig":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ImportError("MultiMaxAdapterConfig needs PEFT: pip install 'peft>=0.20'") from error
    from hf_multimax.peft import bridge

    bridge.register()
    from hf_multimax.peft.config import MultiMaxAdapterConfig

    return MultiMaxAdapterConfig
