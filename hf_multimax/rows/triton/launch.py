"""Host side of the Triton kernels of functions of rows: tile sizes, buffers and launches. Importing it needs Triton."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_multimax.rows.call import KINDS, RowCall
from hf_multimax.rows.triton.arguments import Rows, count_sums, exponent_of
from hf_multimax.rows.triton.kernels import Backward, rows_backward_kernel, rows_forward_kernel

__all__ = ["Tile", "backward", "forward", "tile"]

_INTERPRETED = bool(triton.knobs.runtime.interpret)
_LN2 = math.log(2)


class Tile(NamedTuple):
    """Rows and columns per chunk, warps per program, and whether one chunk holds a row."""

    m: int
    n: int
    warps: int
    held: bool


#: the longest row that a program holds in registers, and how many scores a thread then has about, by kernel
_HELD = {"forward": 8192, "backward": 2048}
_PER_THREAD = {"forward": 16, "backward": 8}
#: chunks of longer rows, and how many scores a program of short rows has
_CHUNK = {"forward": 2048, "backward": 1024}
_SHORT = 1024


def tile(kernel: str, n: int) -> Tile:
    """Tile of a kernel ("forward", "backward") for rows of n scores."""
    width = triton.next_power_of_2(n)
    if _INTERPRETED:  # tile by tile in NumPy: small ones let small tests cross their borders
        return Tile(4, max(8, min(width, 32)), 1, n <= 32)
    if width > _HELD[kernel]:
        return Tile(1, _CHUNK[kernel], 8, False)
    width = max(width, 16)
    rows = max(1, _SHORT // width)
    return Tile(rows, width, max(4, min(16, rows * width // (32 * _PER_THREAD[kernel]))), True)


def forward(call: RowCall, out: Tensor, p: Tensor | None, stats: Tensor | None) -> None:
    """Fill the result, and where they are wanted its float32 copy and the rows' stats ``[..., STATS]``."""
    t = tile("forward", call.x.shape[-1])
    rows = _rows(call, t, options=False)
    with torch.cuda.device_of(call.x):
        rows_forward_kernel[(triton.cdiv(rows.n_rows, t.m),)](rows, out, p, stats, **_options(t))


def backward(
    grad: Tensor, p: Tensor, stats: Tensor | None, call: RowCall, needed: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of a call's first seven tensors, None where ``needed`` is False.

    Args:
        grad: of the result, contiguous.
        p, stats: of the forward pass; stats may be empty where they are not needed.
        call: with None for ``x`` where the function's backward pass needs no scores, and without its mask.
    """
    t = tile("backward", grad.shape[-1])
    options = [
        option.new_empty(option.shape) if option is not None and wanted else None
        for option, wanted in zip((call.value, call.beta, call.gamma), needed[1:])
    ]
    rows = _rows(call, t, options=any(option is not None for option in options), like=grad)
    scalars = call.ranges is not None and any(needed[4:])
    affine = call.affine is not None
    order = 0 if call.ranges is None else call.ranges.shape[-1] // 2
    moments = grad.new_empty(rows.n_rows, 4 * order + 2 * affine, dtype=torch.float32) if scalars else None
    grad_x = torch.empty_like(grad)
    left = stats if stats is not None and stats.numel() else None
    back = Backward(p, grad, grad_x, left, *options, moments, tl.constexpr(affine), tl.constexpr(scalars))
    with torch.cuda.device_of(grad):
        rows_backward_kernel[(triton.cdiv(rows.n_rows, t.m),)](rows, back, **_options(t))
    found = [None, None, None] if moments is None else _scalars(call, moments, rows.head_rows)
    return [grad_x if needed[0] else None, *options, *(x if want else None for x, want in zip(found, needed[4:]))]


def _scalars(call: RowCall, moments: Tensor, head_rows: int) -> list[Tensor | None]:
    """The gradients of ranges, ts and affine from the rows' moments."""
    assert call.ranges is not None and call.ts is not None
    order = call.ranges.shape[-1] // 2
    heads = call.ranges.shape[0] if call.ranges.ndim == 2 else 1
    sums = moments.double().view(-1, heads, head_rows, moments.shape[-1]).sum((0, 2))
    terms = sums[:, : 4 * order].view(heads, order, 4)
    power = torch.arange(order, device=moments.device, dtype=torch.float64)[:, None]
    fold = _LN2**power
    sign = torch.tensor([1.0, -1.0], device=moments.device, dtype=torch.float64)
    ts = call.ts.double().view(heads, order, 2)
    by_ranges = (power + 1) * sign * fold * ts * terms[..., 2:]
    by_ts = fold * _LN2 * terms[..., :2]
    found = [by_ranges.reshape(call.ranges.shape).float(), by_ts.reshape(call.ts.shape).float(), None]
    if call.affine is not None:
        found[2] = sums[:, 4 * order :].reshape(call.affine.shape).float()
    return found


def _rows(call: RowCall, t: Tile, options: bool, like: Tensor | None = None) -> Rows:
    """The call as the kernels take it; ``like``: shaped as the scores, where these are absent."""
    like = call.x if like is None else like
    n = like.shape[-1]
    n_rows = like.numel() // n
    kind = KINDS[call.kind]
    heads = call.ranges.shape[0] if call.ranges is not None and call.ranges.ndim == 2 else 0
    mask, s_mask, sizes = _mask(call.mask)
    ranges, ts, affine = call.ranges, call.ts, call.affine
    return Rows(
        x=call.x,
        mask=mask,
        value=call.value,
        beta=call.beta,
        gamma=call.gamma,
        ranges=ranges,
        ts=ts,
        affine_scale=affine,
        affine_shift=None if affine is None else affine[..., 1:],
        s_row=n,
        s_mask=s_mask,
        mask_sizes=sizes,
        s_head=(0, 0, 0) if not heads else (ranges.stride(0), *(2 * (0 if affine is None else affine.stride(0),))),
        heads=max(1, heads),
        head_rows=like.shape[-2] if heads else n_rows,
        n_rows=n_rows,
        n=n,
        a=call.a,
        b=call.b,
        KIND=tl.constexpr(kind),
        SUMS=tl.constexpr(count_sums(kind, options)),
        OPTIONS=tl.constexpr(options),
        EXPONENT=tl.constexpr(exponent_of(kind, call.a if call.value is None else None)),
        ORDER=tl.constexpr(0 if ranges is None else ranges.shape[-1] // 2),
        NEAR=tl.constexpr(False),
        HELD=tl.constexpr(t.held),
    )


def _mask(mask: Tensor | None) -> tuple[Tensor | None, tuple[int, ...], tuple[int, int]]:
    """A mask as bytes, its four strides, and the sizes of the last two dimensions of rows."""
    if mask is None:
        return None, (0, 0, 0, 0), (1, 1)
    if mask.ndim > 4:
        mask = mask.reshape(-1, mask.shape[-1])
    stride, size = (0, 0, 0, *mask.stride())[-4:], (1, 1, 1, *mask.shape)[-4:]
    return mask.view(torch.uint8), stride, size[1:3]


def _options(t: Tile) -> dict[str, Any]:
    # newer Triton versions fuse multiplications and additions only on demand
    return {"BLOCK_M": t.m, "BLOCK_N": t.n, "num_warps": t.warps, "enable_fp_fusion": True}
