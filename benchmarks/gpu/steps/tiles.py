"""Other tiles for the kernels of causal bfloat16 calls: the whole pass is timed with one kernel's tile replaced.

The candidates are those with few instructions per score that spill no registers, compiled for sm_90 with Triton 3.6.
"""

from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from benchmarks.attention import Shape, scalars
from benchmarks.common import paired_timing
from benchmarks.gpu.cases import Case, Settings, described
from benchmarks.instructions import recorded_launches
from hf_multimax.attention.call import make_call
from hf_multimax.attention.triton import launch as triton_launch
from hf_multimax.attention.triton.backend import attention
from hf_multimax.attention.triton.launch import Tile
from tests.tolerances import RELATIVE, assert_close

__all__ = ["cases"]

_BUDGET = 0.35
#: kernel -> head dimension -> queries, keys, warps and stages; the last four of dkdv at 128 spill a little
CANDIDATES: dict[str, dict[int, tuple[tuple[int, int, int, int], ...]]] = {
    "forward": {
        64: (
            (128, 128, 8, 1), (128, 128, 8, 3), (64, 128, 4, 2), (64, 128, 4, 3), (128, 64, 4, 2), (128, 64, 4, 3),
            (128, 64, 8, 2), (64, 64, 4, 3),
        ),
        128: (
            (128, 128, 8, 3), (128, 64, 8, 1), (128, 64, 8, 2), (128, 64, 8, 3), (64, 128, 4, 2), (64, 64, 4, 2),
            (64, 64, 4, 3),
        ),
    },
    "dkdv": {
        64: (
            (32, 128, 8, 1), (32, 128, 8, 2), (16, 128, 8, 1), (16, 128, 8, 2), (16, 64, 4, 1), (32, 64, 4, 1),
            (32, 64, 4, 2),
        ),
        128: ((16, 128, 8, 1), (16, 128, 8, 3), (16, 64, 4, 1), (16, 64, 4, 2), (32, 64, 4, 2), (32, 128, 8, 3)),
    },
    "dq": {
        64: (
            (128, 64, 8, 1), (128, 64, 8, 3), (64, 64, 4, 1), (64, 64, 4, 2), (64, 64, 4, 3), (128, 32, 8, 2),
            (128, 32, 4, 2),
        ),
        128: (
            (128, 64, 8, 1), (128, 64, 8, 3), (128, 32, 8, 2), (128, 32, 8, 3), (64, 64, 4, 2), (64, 32, 4, 1),
            (64, 32, 4, 2),
        ),
    },
    "decode": {
        64: ((16, 128, 4, 3), (16, 128, 4, 4), (16, 64, 4, 3), (16, 64, 4, 4), (16, 256, 4, 2), (16, 128, 8, 3)),
        128: ((16, 64, 4, 3), (16, 64, 4, 4), (16, 128, 4, 2), (16, 128, 4, 3), (16, 128, 8, 3), (16, 32, 4, 4)),
    },
}  # fmt: skip
_TINY = {kernel: {16: ((16, 32 if kernel == "decode" else 16, 1, 1),)} for kernel in CANDIDATES}


def cases(settings: Settings) -> list[Case]:
    """One case for each kernel, head dimension and candidate other than the present tile."""
    tried = _TINY if settings.tiny else CANDIDATES
    return [
        Case(
            f"{kernel} {width}: {' x '.join(map(str, t))}",
            lambda k=kernel, w=width, t=t: _try(k, w, Tile(*t), settings),
        )
        for kernel, widths in tried.items()
        for width, tiles in widths.items()
        for t in tiles
    ]


def _try(kernel: str, width: int, candidate: Tile, settings: Settings) -> dict[str, object]:
    """The time with the candidate relative to that with the present tile, or why it does not run."""
    dtype = "bfloat16" if settings.device == "cuda" else "float32"
    present = triton_launch.tile(kernel, width, getattr(torch, dtype), lean=True)
    found = {"kernel": kernel, "width": width, "present": list(present), "tile": list(candidate)}
    if candidate == present:
        return {**found, "ratio": 1.0}
    call = _decoding(width, dtype, settings) if kernel == "decode" else _training(kernel, width, dtype, settings)

    chosen = triton_launch.tile

    def tile(name: str, *arguments: object, **options: object) -> Tile:
        return candidate if name == kernel else chosen(name, *arguments, **options)

    def replaced() -> list[Tensor]:
        with mock.patch.object(triton_launch, "tile", tile):
            return call()

    expected = call()
    try:
        with recorded_launches() as launches:
            actual = replaced()
    except Exception as error:  # noqa: BLE001 - too much shared memory, or whatever else the compiler finds
        return {**found, "unfit": described(error, 100)}
    for launch in launches:
        if launch.kernel == f"{kernel}_kernel":
            found |= {"registers": launch.compiled.n_regs, "spills": launch.compiled.n_spills}
    for i, (a, b) in enumerate(zip(actual, expected)):
        assert_close(a, b, 4 * RELATIVE[getattr(torch, dtype)], f"result {i}")
    if settings.preparing:
        return {}
    times = paired_timing(
        {"present": call, "candidate": replaced},
        device=settings.device,
        budget_s=settings.seconds(_BUDGET),
        head_start=True,
    )
    ratio = times["candidate"].ratio(times["present"])
    return {**found, "ratio": ratio, "present ms": times["present"].median * 1e3}


def _training(kernel: str, width: int, dtype: str, settings: Settings) -> Callable[[], list[Tensor]]:
    """The forward pass, or the backward pass of one that was done with the present tiles."""
    batch, heads, length = (1, 1, 20) if settings.tiny else (4, 16, 4096)
    shape = Shape(batch, heads, length, length, width, True, dtype)
    leaves = (*shape.tensors(settings.device), *scalars(settings.device))

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [attention(make_call(*leaves, causal=True))]

    if kernel == "forward":
        return forward
    out = attention(make_call(*leaves, causal=True))
    grad = torch.randn_like(out)
    return lambda: list(torch.autograd.grad(out, leaves, grad, retain_graph=True))


def _decoding(width: int, dtype: str, settings: Settings) -> Callable[[], list[Tensor]]:
    """One query of each sequence, a cache of 8,192 keys."""
    batch, heads, keys = (1, 1, 40) if settings.tiny else (16, 16, 8192)
    shape = Shape(batch, heads, 1, keys, width, False, dtype)
    tensors = (*shape.tensors(settings.device), *scalars(settings.device))

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [attention(make_call(*tensors))]

    return forward
