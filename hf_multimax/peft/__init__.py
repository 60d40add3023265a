"""MultiMax and PEFT: adapters that carry scalars never load without them. PEFT is imported by those who use it only."""

from hf_multimax.peft.importing import when_imported

__all__ = ["register"]


def register() -> None:
    """Wrap the methods by which adapters are saved and loaded, PEFT's as soon as it is imported."""
    from hf_multimax.peft import doors  # of this package only; it imports peft nowhere

    doors.wrap_transformers()
    when_imported("peft", doors.wrap_peft)
