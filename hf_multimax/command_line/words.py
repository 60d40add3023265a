"""What is typed as text, read, and what an exception says, in one line."""

import json
from collections.abc import Iterable
from typing import Any

__all__ = ["one_line", "read_options"]


def read_options(given: Iterable[str] | None, name: str = "option") -> dict[str, Any]:
    """NAME=VALUE pairs, the value as JSON where it is any. Raises ValueError, naming ``name``, for other text."""
    found = {}
    for entry in given or ():
        key, separator, value = entry.partition("=")
        if not separator or not key:
            raise ValueError(f"{name} {entry!r} is not of the form NAME=VALUE")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def one_line(error: BaseException) -> str:
    """What an exception says, in its first paragraph."""
    text = str(error).strip() or type(error).__name__
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    return " ".join(text.split("\n\n")[0].split())
