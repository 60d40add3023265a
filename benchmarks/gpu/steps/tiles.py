"""Other tiles for the kernels of causal bfloat16 calls: the whole pass is timed with one kernel's tile replaced.

The candidates are those with few instructions per score that spill no registers, compiled for sm_90 with Triton 3.6.
"""

from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from benchmarks.attention import Shape, scalars
from benchmarks.common import paired_timing
from benchmarks.gpu.cases import Case, Settings
from hf_multimax.kernels import triton_launch
from hf_multimax.kernels.triton_attention import attention
from hf_multimax.kernels.triton_launch import Tile
from tests.tolerances import RELATIVE, assert_close

__all__ = ["cases"]

_BUDGET = 0.35
#: kernel -> head dimension -> (queries, keys, warps, stages)
CANDIDATES: dict[str, dict[int, tuple[tuple[int, int, int, int], ...]]] = {}


def cases(settings: Settings) -> list[Case]:
    """One case for each kernel, head dimension and candidate other than the present tile."""
    if settings.tiny:
        tried = {kernel: {16: ((16, 16, 1, 1),)} for kernel in ("forward", "dq", "dkdv")} | {
            "decode": {16: ((16, 32, 1, 1),)}
        }
    else:
        tried = CANDIDATES
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
    dtype = torch.float32 if settings.device == "cpu" else torch.bfloat16
    present = triton_launch.tile(kernel, width, dtype, lean=True)
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
        actual = replaced()
    except Exception as error:  # noqa: BLE001 - too much shared memory, or whatever else the compiler finds
        return {**found, "unfit": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:100]}"}
    for i, (a, b) in enumerate(zip(actual, expected)):
        assert_close(a, b, 4 * RELATIVE[dtype], f"result {i}")
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


def _training(kernel: str, width: int, dtype: torch.dtype, settings: Settings) -> Callable[[], list[Tensor]]:
    """The forward pass, or the backward pass of one that was done with the present tiles."""
    batch, heads, length = (1, 1, 20) if settings.tiny else (4, 16, 4096)
    shape = Shape(batch, heads, length, length, width, True)
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in shape.tensors(settings.device))
    leaves = (q, k, v, *scalars(settings.device))

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [attention(*leaves, causal=True)]

    if kernel == "forward":
        return forward
    out = attention(*leaves, causal=True)
    grad = torch.randn_like(out)
    return lambda: list(torch.autograd.grad(out, leaves, grad, retain_graph=True))


def _decoding(width: int, dtype: torch.dtype, settings: Settings) -> Callable[[], list[Tensor]]:
    """One query of each sequence, a cache of 8,192 keys."""
    batch, heads, keys = (1, 1, 40) if settings.tiny else (16, 16, 8192)
    shape = Shape(batch, heads, 1, keys, width, training=False)
    tensors = [x.detach().to(dtype) for x in shape.tensors(settings.device)]
    parameters = [x.detach() for x in scalars(settings.device)]
    return lambda: [attention(*tensors, *parameters)]
