"""Which implementation of attention runs: the choice of the user, or the fastest that supports the call."""

import contextlib
from collections.abc import Iterator
from types import ModuleType

import torch

from hf_multimax.attention import choice
from hf_multimax.attention.call import Call
from hf_multimax.attention.context import differentiated_by_functions
from hf_multimax.attention.native import backend as native
from hf_multimax.attention.tiled import backend as tiled
from hf_multimax.attention.triton import backend as triton_attention
from hf_multimax.rows.function import Rowwise

__all__ = ["NAMES", "backend", "choose_kernel", "current_backend"]

NAMES = ("auto", "eager", "tiled", "native", "triton")
_KERNELS = {"tiled": tiled, "native": native, "triton": triton_attention}
#: What "auto" tries first on each type of device; "tiled" runs anywhere.
_PREFERRED = {"cpu": native, "cuda": triton_attention}
#: Score matrices up to this many elements cost less whole than in tiles.
SMALL = 1 << 18


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the implementation of attention inside a ``with`` block, for the thread and the task that enter it.

    ``"auto"`` (the default) is the fastest that supports each call: ``"triton"`` on CUDA, ``"native"`` (C++, compiled
    at first use) on a CPU, ``"tiled"`` (PyTorch, memory linear in the length) elsewhere, and ``"eager"`` (the whole
    score matrix) for small calls, where attention weights are returned, where ``torch.func`` differentiates and in what
    is exported (torch.export, ONNX, torch.jit), which then runs without this package. Any other choice is used as it
    is, and raises ValueError for a call that it does not support.

    The innermost block that is still open decides, in whatever order blocks are left. As with any context variable, an
    asyncio task goes on with the choice under which it was created, a block in a suspended generator holds for its
    caller, a forked process begins with the choice of the thread that forked it, and a new thread with ``"auto"``
    (``contextvars.copy_context().run`` hands the choice on). Compiled code follows the choice at each call.

    With gradient checkpointing keep the block around the backward pass too, which recomputes attention by the choice of
    the thread that calls it. Otherwise ``use_reentrant=False`` mostly raises CheckpointError, and
    ``use_reentrant=True`` takes another backend, which drops other weights where there is dropout.

    Raises:
        ValueError: for an unknown name.

    Examples:
        >>> from hf_multimax import backend, current_backend
        >>> with backend("eager"):
        ...     current_backend()
        'eager'
    """
    if name not in NAMES:
        raise ValueError(f"unknown backend {name!r}; there are {', '.join(NAMES)}")
    block = choice.enter(name)
    try:
        yield
    finally:
        choice.leave(block)


def current_backend() -> str:
    """The name that the innermost :func:`backend` block of this thread or task chose, ``"auto"`` outside of any.

    Examples:
        >>> from hf_multimax import current_backend
        >>> current_backend()
        'auto'
    """
    if torch.compiler.is_dynamo_compiling() and choice.traced:
        return choice.traced[-1]
    return choice.name


def choose_kernel(call: Call, *, weights: bool = False, other: Rowwise | None = None) -> ModuleType | None:
    """The backend that computes a call; None for eager.

    Args:
        weights: whether the attention weights are to be returned, which no kernel ever has.
        other: a normalizer other than MultiMax, which only ``rowwise_attention`` computes.

    Raises:
        ValueError: if the user chose a backend that does not support the call; the text names the feature.
    """
    chosen = current_backend()
    if chosen == "eager":
        return None
    unusual = _beyond_kernels(call, weights)
    if chosen != "auto":
        missing = unusual or _missing(_KERNELS[chosen], call, other)
        if missing:
            raise ValueError(f"backend({chosen!r}) does not support {missing}: use backend('auto') or backend('eager')")
        return _KERNELS[chosen]
    if unusual or exporting():
        return None
    kernel = _PREFERRED.get(call.q.device.type)
    runs_here = kernel is not None and (kernel is not native or _native_is_available())
    if runs_here and _missing(kernel, call, other) is None:
        return kernel
    return None if _tiles_are_slower(call) or _missing(tiled, call, other) else tiled


def _missing(kernel: ModuleType, call: Call, other: Rowwise | None) -> str | None:
    """What of a call a backend lacks."""
    if other is None:
        return kernel.unsupported(call)
    return kernel.rowwise_unsupported(other, call) if hasattr(kernel, "rowwise_unsupported") else other.name


def _beyond_kernels(call: Call, weights: bool) -> str | None:
    """What a call asks for that only eager attention has."""
    if weights:
        return "returning attention weights"
    if call.sinks is not None and call.sinks.ndim > 1:
        return "attention sinks that differ from query to query"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward derivatives"
    return "the derivatives of torch.func" if differentiated_by_functions() else None


def exporting() -> bool:
    """Whether the call is being written down, by torch.export, for ONNX or by torch.jit, to run where we are not."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def _tiles_are_slower(call: Call) -> bool:
    """Whether the score matrix of a call is so small that it costs less whole than in tiles."""
    return call.q.shape[0] * call.q.shape[1] * call.q.shape[2] * call.k.shape[2] <= SMALL


@torch.compiler.assume_constant_result
def _native_is_available() -> bool:
    """Whether the C++ backend runs here; the first question compiles it."""
    return native.available()
