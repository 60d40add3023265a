"""Attribute changes that all happen or none."""

from types import TracebackType
from typing import Any

__all__ = ["Changes"]

_ABSENT = object()


class Changes:
    """A ``with`` block whose changes are undone, the last one first, if anything stops it: an error, an interrupt.

    What a change was is written down before it is made, so that there is no moment at which it could not be undone.

    Examples:
        >>> from types import SimpleNamespace
        >>> holder = SimpleNamespace(a=1)
        >>> try:
        ...     with Changes() as changes:
        ...         changes.set(holder, "a", 2)
        ...         raise KeyboardInterrupt
        ... except KeyboardInterrupt:
        ...     print(holder.a)
        1
    """

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []

    def set(self, holder: Any, name: str, value: Any) -> None:
        """``setattr``; the name may be ``__class__``."""
        self._before.append((holder, name, _own(holder, name)))
        setattr(holder, name, value)

    def delete(self, holder: Any, name: str) -> None:
        """``delattr`` of an attribute that may be absent."""
        before = _own(holder, name)
        if before is not _ABSENT:
            self._before.append((holder, name, before))
            delattr(holder, name)

    def __enter__(self) -> "Changes":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            return
        while self._before:
            holder, name, before = self._before[-1]
            if before is not _ABSENT:
                setattr(holder, name, before)
            elif _own(holder, name) is not _ABSENT:
                delattr(holder, name)
            self._before.pop()


def _own(holder: Any, name: str) -> Any:
    """What the object itself holds under that name: its class's attributes come back when its own are deleted."""
    if name == "__class__":
        return holder.__class__
    for kind in ("__dict__", "_modules", "_parameters", "_buffers"):
        values = holder.__dict__ if kind == "__dict__" else holder.__dict__.get(kind, {})
        if name in values:
            return values[name]
    return _ABSENT
