"""fusedmax and oscarmax (Niculae & Blondel 2017, arXiv:1705.07704): sparse attention that favours groups of entries.

Both are a proximal operator followed by sparsemax. The operators and their Jacobians are exact and work on all rows at
once: no loop over rows or positions, only over the rounds below, each of which costs a fixed number of passes over the
scores. Values are computed in float64 whatever the type of the scores.

- ``prox_tv``: every round splits all blocks of equal values by one two-label problem per block, solved by a parallel
  scan of O(log n) passes. Values split as in quicksort, so that about 2 log2(blocks) rounds suffice for scores without
  special order: O(n log^2 n) per row; at most one round per block.
- ``prox_oscar``: a sort, then rounds that pool all adjacent violators at once, a few for usual scores:
  O(n log n) per row; at most n rounds.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

__all__ = ["prox_oscar", "prox_tv"]

#: Entries that a scan takes one after the other before it goes on in parallel.
_CHUNK = 16


def prox_tv(x: Tensor, lam: float, lengths: Tensor | None = None) -> Tensor:
    """``argmin_z 1/2 ||z - x||^2 + lam * sum_i |z_{i+1} - z_i|`` along the last dimension.

    Args:
        x: finite scores ``[..., n]``, float32 or float64.
        lam: >= 0.
        lengths: integers ``[..., 1]``: only the first so many entries of a row are there, the others are ignored and
            come out meaningless; None for all.

    Returns:
        z, shaped and typed like ``x``. Its gradient is the mean over each run of entries that the operator fused.
    """
    return x if lam == 0 else _ProxTV.apply(x, float(lam), lengths)


def prox_oscar(x: Tensor, keep: Tensor, alpha: float, beta: float | None) -> Tensor:
    """``argmin_z 1/2 ||z - x||^2 + alpha ||z||_1 + beta * sum_{i<j} max(|z_i|, |z_j|)`` along the last dimension.

    Args:
        x: finite scores ``[..., n]``, float32 or float64.
        keep: boolean, shaped like ``x``: the other entries are ignored and come out as 0.
        alpha, beta: >= 0; beta None is 1 / (kept entries of the row - 1).

    Returns:
        z, shaped and typed like ``x``. Its gradient is the sign-aware mean over each group of equal ``|z| > 0``.
    """
    return _ProxOscar.apply(x, keep, float(alpha), beta)


class _ProxTV(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lam: float, lengths: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        values, first = _fuse(rows.double(), lam, None if lengths is None else lengths.reshape(-1, 1))
        ctx.save_for_backward(first.view(x.shape))
        return values.view(x.shape).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (first,) = ctx.saved_tensors
        return _block_mean(grad, first), None, None


class _ProxOscar(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor, alpha: float, beta: float | None) -> Tensor:
        count = keep.sum(-1, keepdim=True)
        magnitude, order = x.abs().double().masked_fill(~keep, -1.0).sort(dim=-1, descending=True, stable=True)
        rank = torch.arange(x.shape[-1], device=x.device)
        smaller = (count - 1 - rank).double()
        slope = 1.0 / (count - 1).clamp(min=1).double() if beta is None else beta
        pooled, first = _pool(magnitude - alpha - slope * smaller, count)
        signs = x.sign().gather(-1, order) * (pooled > 0) * (rank < count)
        ctx.save_for_backward(signs, order, first)
        return torch.zeros_like(x).scatter(-1, order, (pooled * signs).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        signs, order, first = ctx.saved_tensors
        mean = _block_mean(grad.gather(-1, order) * signs, first) * signs
        return torch.zeros_like(grad).scatter(-1, order, mean), None, None, None


def _fuse(y: Tensor, lam: float, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """The total-variation operator on rows ``[R, n]``: values, and for each entry the first entry of its block.

    Optimality: ``u_i = u_{i-1} + z_i - y_i`` stays within [-lam, lam], is 0 before the first and after the last entry,
    and equals lam (-lam) where z steps up (down) after i. A block between two known steps is constant, or it splits
    into the entries above and below the value ``mu`` that a constant would have.
    """
    rows, n = y.shape
    values, first = torch.empty_like(y), torch.empty(y.shape, dtype=torch.long, device=y.device)
    cut = torch.zeros(rows, n + 1, dtype=torch.bool, device=y.device)  # whether a block starts at i
    dual = torch.zeros(rows, n + 1, dtype=y.dtype, device=y.device)  # u before entry i, known where a block starts
    cut[:, 0] = cut[:, n] = True
    if lengths is not None:
        y = y.masked_fill(torch.arange(n, device=y.device) >= lengths, 0.0)
        cut.scatter_(1, lengths, True)
    sums = torch.nn.functional.pad(y.cumsum(-1), (1, 0))
    left = torch.arange(rows, device=y.device)  # rows that still split
    while left.numel():
        start, end = _bounds(cut)
        before, after = dual.gather(1, start), dual.gather(1, end + 1)
        mu = (sums.gather(1, end + 1) - sums.gather(1, start) + after - before) / (end + 1 - start)
        above = _above(mu - y, cut, before, after, lam)
        step = above[:, 1:].to(y.dtype) - above[:, :-1].to(y.dtype)
        new = (step != 0) & ~cut[:, 1:-1]
        dual[:, 1:-1] = torch.where(new, lam * step, dual[:, 1:-1])
        cut[:, 1:-1] |= new
        more = new.any(-1)
        if 2 * int(more.sum()) < len(left):  # rows that are done are carried along until it pays to leave them out
            values[left], first[left] = mu, start
            left, y, cut, dual, sums = left[more], y[more], cut[more], dual[more], sums[more]
    return values, first


def _above(slope: Tensor, cut: Tensor, before: Tensor, after: Tensor, lam: float) -> Tensor:
    """Which entries of every block lie above its ``mu``: the cheapest labels of a chain whose label changes cost lam.

    Args:
        slope: ``mu - y``, the cost of the label "above" for each entry.
        cut: where blocks start, ``[R, n + 1]``.
        before, after: u at both ends of each entry's block.
    """
    starts, ends = cut[:, :-1], cut[:, 1:]
    begun = (before + slope).clamp(-lam, lam)
    low = torch.where(starts, begun, -lam)
    high = torch.where(starts, begun, lam)
    cost = _scan_clamps(slope, low, high)  # of "above" against "below" up to each entry, as the next entry sees it
    cost = torch.where(starts, before, torch.nn.functional.pad(cost[:, :-1], (1, 0))) + slope
    # An entry decides for itself where the cost exceeds that of a change, at the latest at the end of its block;
    # others follow the next entry that decides.
    decides = ends | (cost < -lam) | (cost >= lam)
    n = slope.shape[-1]
    index = torch.where(decides, torch.arange(n, device=slope.device), n - 1).flip(-1).cummin(-1).values.flip(-1)
    return (cost < torch.where(ends, after, 0.0)).gather(1, index)


def _scan_clamps(shift: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """``c_i = clamp(c_{i-1} + shift_i, low_i, high_i)`` along the rows, where ``low_0 = high_0``.

    Such clamps are closed under composition: each chunk is composed to one clamp, those are scanned by doubling, and
    then every chunk runs with what enters it.
    """
    rows, n = shift.shape
    chunks = -(-n // _CHUNK)

    def by_chunk(x: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(x, (0, chunks * _CHUNK - n))
        return padded.view(rows, chunks, _CHUNK).permute(2, 0, 1).contiguous()

    steps = list(zip(by_chunk(shift), by_chunk(low), by_chunk(high)))
    whole = steps[0]
    for step in steps[1:]:
        whole = _compose(whole, step)
    distance = 1
    while distance < chunks:
        earlier, later = [x[:, :-distance] for x in whole], [x[:, distance:] for x in whole]
        whole = [torch.cat([x[:, :distance], y], dim=-1) for x, y in zip(whole, _compose(earlier, later))]
        distance *= 2
    value = torch.nn.functional.pad(whole[1][:, :-1], (1, 0))  # what enters a chunk; nothing enters the first
    out = torch.empty(_CHUNK, rows, chunks, dtype=shift.dtype, device=shift.device)
    for (move, least, most), place in zip(steps, out):
        value = torch.clamp(value + move, least, most, out=place)
    return out.permute(1, 2, 0).reshape(rows, -1)[:, :n]


def _compose(first: Sequence[Tensor], then: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The clamp ``(shift, low, high)`` that applies ``first`` and ``then``."""
    shift, low, high = then
    return first[0] + shift, (first[1] + shift).clamp(low, high), (first[2] + shift).clamp(low, high)


def _pool(v: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Non-increasing non-negative isotonic regression of the first ``count`` entries: values, first entry of blocks."""
    shape, n = v.shape, v.shape[-1]
    v, count = v.reshape(-1, n), count.reshape(-1, 1)
    cut = torch.ones(len(v), n + 1, dtype=torch.bool, device=v.device)
    real = torch.arange(1, n, device=v.device) < count  # edges between two entries that are there
    sums = torch.nn.functional.pad(v.cumsum(-1), (1, 0))
    while True:
        start, end = _bounds(cut)
        mean = (sums.gather(1, end + 1) - sums.gather(1, start)) / (end + 1 - start)
        violated = cut[:, 1:-1] & real & (mean[:, :-1] < mean[:, 1:])
        if not violated.any():
            return mean.clamp(min=0).view(shape), start.view(shape)
        cut[:, 1:-1] &= ~violated


def _bounds(cut: Tensor) -> tuple[Tensor, Tensor]:
    """First and last entry of each entry's block."""
    n = cut.shape[-1] - 1
    position = torch.arange(n, device=cut.device)
    start = torch.where(cut[:, :-1], position, 0).cummax(-1).values
    end = torch.where(cut[:, 1:], position, n - 1).flip(-1).cummin(-1).values.flip(-1)
    return start, end


def _block_mean(x: Tensor, first: Tensor) -> Tensor:
    """The mean of ``x`` over each block, at each of its entries."""
    total = torch.zeros_like(x).scatter_add(-1, first, x)
    size = torch.zeros_like(x).scatter_add(-1, first, torch.ones_like(x))
    return (total / size.clamp(min=1)).gather(-1, first)
