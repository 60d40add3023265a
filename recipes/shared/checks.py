"""What is wrong with the input: the exception of the recipes, what becomes one, and the check of numbers."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class DataError(ValueError):
    """Data or an option that cannot be had or used; the message is one sentence for the user."""


@contextmanager
def explained(problem: str, *kinds: type[Exception], by_cause: bool = False) -> Iterator[None]:
    """Makes exceptions of these kinds a DataError of one line: ``problem``, then what they, or their causes, say."""
    try:
        yield
    except DataError:
        raise
    except kinds as error:
        raise DataError(f"{problem}: {first_line(by_cause and error.__cause__ or error)}") from error


def first_line(error: BaseException) -> str:
    """What an exception says, or its kind."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def check_numbers(options: Any, interval: str, *names: str) -> None:
    """Raise DataError, naming the option, unless each is None or in the interval, which is written as ``[0, 1)``."""
    low, high = map(float, interval[1:-1].split(","))
    for name in names:
        value = getattr(options, name)
        if value is None:
            continue
        above = value >= low if interval[0] == "[" else value > low
        below = value <= high if interval[-1] == "]" else value < high
        if not (above and below):
            unbounded = "positive" if interval[0] == "(" and low == 0 else f"at least {low:g}"
            raise DataError(f"--{name} must be {f'in {interval}' if high < math.inf else unbounded}, got {value}")
