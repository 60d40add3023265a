"""What counts as a number where a user or a file gives one: true and false do not."""

import sys
from typing import Any

__all__ = ["is_finite", "is_integer", "is_number"]


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Whether it is a number that float64 holds; integers of JSON have no bound."""
    return is_number(value) and abs(value) <= sys.float_info.max


def is_integer(value: Any, at_least: int | None = None) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and (at_least is None or value >= at_least)
