"""Which implementation of attention runs: the choice of the user, or the fastest that supports the call."""

import contextlib
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from hf_multimax.attention import choice
from hf_multimax.attention.context import differentiated_by_functions
from hf_multimax.attention.native import backend as native
from hf_multimax.attention.tiled import backend as tiled
from hf_multimax.attention.triton import backend as triton_attention

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
    """
    if name not in NAMES:
        raise ValueError(f"unknown backend {name!r}; there are {', '.join(NAMES)}")
    block = choice.enter(name)
    try:
        yield
    finally:
        choice.leave(block)


def current_backend() -> str:
    """The name that the innermost :func:`backend` block of this thread or task chose, ``"auto"`` outside of any."""
    if torch.compiler.is_dynamo_compiling() and choice.traced:
        return choice.traced[-1]
    return choice.name


def choose_kernel(
    q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, ts: Tensor, *, weights: bool = False, **features: object
) -> ModuleType | None:
    """The kernel module for a call of MultiMax attention; None for eager.

    Args:
        weights: whether the attention weights are to be returned, which no kernel ever has.
        features: the keywords of the kernels' ``attention``.

    Raises:
        ValueError: if the user chose a backend that does not support the call; the text names the feature.
    """
    if ranges.device != q.device:
        raise ValueError(f"q is on {q.device}, but ranges and ts are on {ranges.device}: move them there")
    chosen = current_backend()
    if chosen == "eager":
        return None
    unusual = _beyond_kernels(weights)
    if chosen != "auto":
        kernel = _KERNELS[chosen]
        missing = unusual or kernel.unsupported(q, k, v, ranges, ts, **features)
        if missing:
            raise ValueError(f"backend({chosen!r}) does not support {missing}: use backend('auto') or backend('eager')")
        return kernel
    if unusual or exporting():
        return None
    kernel = _PREFERRED.get(q.device.type)
    runs_here = kernel is not None and (kernel is not native or _native_is_available())
    if runs_here and kernel.unsupported(q, k, v, ranges, ts, **features) is None:
        return kernel
    return None if tiles_are_slower(q, k) else tiled


def require_eager(feature: str) -> None:
    """Raise ValueError if the user chose a backend other than eager, which alone has that feature."""
    if current_backend() not in ("auto", "eager"):
        raise ValueError(
            f"backend({current_backend()!r}) does not support {feature}: use backend('auto') or backend('eager')"
        )


def _beyond_kernels(weights: bool) -> str | None:
    """What a call asks for that only eager attention has."""
    if weights:
        return "returning attention weights"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward derivatives"
    return "the derivatives of torch.func" if differentiated_by_functions() else None


def exporting() -> bool:
    """Whether the call is being written down, by torch.export, for ONNX or by torch.jit, to run where we are not."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def tiles_are_slower(q: Tensor, k: Tensor) -> bool:
    """Whether the score matrix of a call is so small that it costs less whole than in tiles."""
    return q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] <= SMALL


@torch.compiler.assume_constant_result
def _native_is_available() -> bool:
    """Whether the C++ backend runs here; the first question compiles it."""
    return native.available()
