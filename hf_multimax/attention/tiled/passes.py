"""The forward and the backward pass over the tiles of an attention call, through any row function."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hf_multimax.attention.context import without_autocast
from hf_multimax.attention.tiled.tiles import Problem, Scores, Tile, length

__all__ = ["Gradients", "Rows", "run_backward", "run_forward"]


class Rows(Protocol):
    """A row function with its derivative, in the form the tile loops call it."""

    def forward(self, problem: Problem, tile: Tile, scores: Scores, differentiate: bool) -> Tensor:
        """Probabilities of the scores; the scores stay as :meth:`backward` wants them if ``differentiate``."""

    def backward(
        self, problem: Problem, tile: Tile, scores: Scores, probabilities: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients for (the scores, the added values); the last two arguments may be overwritten."""


def run_forward(problem: Problem, rows: Rows, out: Tensor) -> Tensor:
    """Attention through ``rows`` into ``out`` ``[B, H, Nq, Dv]``."""
    for tile in problem.tiles:
        p = rows.forward(problem, tile, problem.scores(tile, keep_capped=False), differentiate=False)
        drop = problem.dropout(tile)
        if drop is not None:
            p = p.mul_(drop)
        where = out[tile.batch, tile.heads, tile.rows]
        product = torch.bmm(_per_kv_head(p, tile), problem.keys(problem.v, tile))
        where.copy_(product.view(where.shape))
    return out


def _per_kv_head(x: Tensor, tile: Tile) -> Tensor:
    """``[batch, heads, rows, keys]`` as ``[batch * kv_heads, group * rows, keys]``."""
    return x.reshape(x.shape[0] * length(tile.kv_heads), -1, x.shape[3])


@dataclass
class Gradients:
    """Accumulators in the type of the computation; None where no gradient is wanted."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    mask: Tensor | None


def run_backward(problem: Problem, rows: Rows, grad_out: Tensor, bias: bool, mask: bool) -> Gradients:
    """Recompute every tile and push ``grad_out`` through it; gradients of ``bias`` and ``mask`` where wanted."""
    call = problem.call

    def zeros(x: Tensor, wanted: bool) -> Tensor | None:
        return torch.zeros(x.shape, dtype=problem.dtype, device=x.device) if wanted else None

    grads = Gradients(
        q=torch.empty(problem.q.shape, dtype=problem.q.dtype, device=problem.q.device),
        k=torch.zeros_like(problem.k),
        v=torch.zeros_like(problem.v),
        bias=zeros(call.bias, bias),
        mask=zeros(call.mask, mask),
    )
    with without_autocast(problem.q.device):
        for tile in problem.tiles:
            _backward_tile(problem, rows, tile, grad_out, grads)
    return grads


def _backward_tile(problem: Problem, rows: Rows, tile: Tile, grad_out: Tensor, grads: Gradients) -> None:
    scores, call = problem.scores(tile, keep_capped=True), problem.call
    p = rows.forward(problem, tile, scores, differentiate=True)
    q, do = problem.queries(problem.q, tile), problem.queries(grad_out, tile)
    grad = problem.product(do, problem.keys(problem.v, tile), "gradient", tile)
    drop, dropped = problem.dropout(tile), p
    if drop is not None:
        dropped = torch.mul(p, drop, out=problem.buffer("scratch", tile))
        grad.mul_(drop)
    _add_product(grads.v, tile, _per_kv_head(dropped, tile).mT, do, 1.0)
    grad, grad_added = rows.backward(problem, tile, scores, p, grad)
    _add_reduced(grads.mask, grad_added, tile)
    _add_reduced(grads.bias, grad, tile)
    if scores.capped is not None:
        grad = grad.mul(1.0 - (scores.capped / call.softcap).square_())
    grad = _per_kv_head(grad, tile)
    where = grads.q[tile.batch, tile.heads, tile.rows]
    where.copy_(torch.bmm(grad, problem.keys(problem.k, tile)).mul_(call.scale).view(where.shape))
    _add_product(grads.k, tile, grad.mT, q, call.scale)


def _add_product(into: Tensor, tile: Tile, x: Tensor, y: Tensor, alpha: float) -> None:
    """Add ``alpha x y`` to the tile's keys of a contiguous ``[B, Hkv, Nk, *]`` accumulator."""
    where = into[tile.batch, tile.kv_heads, tile.keys]
    where.flatten(0, 1).baddbmm_(x, y, alpha=alpha) if _flattens(where) else where.add_(
        torch.bmm(x, y).view(where.shape), alpha=alpha
    )


def _flattens(x: Tensor) -> bool:
    """Whether the first two dimensions of ``x`` can be joined without a copy."""
    return x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)


def _add_reduced(into: Tensor | None, grad: Tensor, tile: Tile) -> None:
    """Add a tile's gradient to an accumulator that broadcasts against ``[B, H, Nq, Nk]``."""
    if into is None:
        return
    into = into.view((1,) * (4 - into.ndim) + into.shape)
    summed = [axis for axis, size in enumerate(into.shape) if size == 1]
    where = tuple(slice(None) if size == 1 else part for size, part in zip(into.shape, tile.scores))
    into[where].add_(grad.sum(summed, keepdim=True) if summed else grad)
