"""The backend that the innermost ``backend(...)`` block chose, per thread and task.

``name`` is an attribute of this module that is computed at every access. ``torch.compile`` cannot read a context
variable, but it reads attributes of modules and guards their values, so that another choice compiles anew.
"""

import ctypes
import sys
import threading
from contextvars import ContextVar
from dataclasses import dataclass

import torch

__all__ = ["Choice", "enter", "leave"]

#: What is chosen where no block is open.
DEFAULT = "auto"
#: Under this key PyTorch hands the choice of the thread that calls backward to the threads that autograd computes in.
_AUTOGRAD_KEY = "hf_multimax.backend"


@dataclass(frozen=True, eq=False)
class Choice:
    """One open block. Two of the same name are different."""

    name: str


_open: ContextVar[tuple[Choice, ...]] = ContextVar("hf_multimax.backend", default=())
#: Names of the blocks inside of code that Dynamo traces, which writes no context variable; empty whenever code runs.
traced: tuple[str, ...] = ()


def enter(name: str) -> Choice | None:
    """Open a block; what :func:`leave` closes it by."""
    global traced
    if torch.compiler.is_dynamo_compiling():
        traced = (*traced, name)
        return None
    choice = Choice(name)
    _set((*_open.get(), choice))
    return choice


def leave(choice: Choice | None) -> None:
    """Close a block, whether or not it is the innermost; nothing where this thread or task has not opened it."""
    global traced
    if choice is None:
        traced = traced[:-1]
    else:
        _set(tuple(other for other in _open.get() if other is not choice))


def _set(choices: tuple[Choice, ...]) -> None:
    _open.set(choices)
    theirs = threading.get_ident(), choices
    references = sys.getrefcount(theirs)
    torch._C._stash_obj_in_tls(_AUTOGRAD_KEY, theirs)
    if sys.getrefcount(theirs) == references:  # PyTorch 2.11 gives up a reference later that it has not taken
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(theirs))


def __getattr__(attribute: str) -> str:
    if attribute != "name":
        raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")
    choices = _open.get()
    if not choices and torch._C._is_key_in_tls(_AUTOGRAD_KEY):
        thread, theirs = torch._C._get_obj_in_tls(_AUTOGRAD_KEY)
        # what this thread itself wrote may be another task's
        choices = theirs if thread != threading.get_ident() else ()
    return choices[-1].name if choices else DEFAULT
