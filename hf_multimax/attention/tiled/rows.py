"""The row functions that run through tiles: MultiMax with its own derivative, and any other by autograd."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_multimax.attention.call import Call
from hf_multimax.attention.tiled.modulation import finite_up_to, largest_base
from hf_multimax.attention.tiled.tiles import MINUS_INFINITY, Problem, Scores, Tile, computed_in

__all__ = ["AutogradRows", "MultiMaxRows"]


class MultiMaxRows:
    """``softmax(sigma(scores))`` in place, with gradients for the scalars summed in float64."""

    def __init__(self, call: Call, scalars: bool = False) -> None:
        ranges, ts, heads, dtype = call.ranges, call.ts, call.q.shape[1], computed_in(call.q.dtype)
        self._terms = _terms(ranges.to(dtype), ts.to(dtype))
        self.regular = finite_up_to(ranges.to(dtype), ts.to(dtype), call.affine_scale, call.affine_shift)
        self.scale, self.shift, self.sinks = (
            None if x is None else x.to(dtype).reshape(-1, 1, 1)
            for x in (call.affine_scale, call.affine_shift, call.sinks)
        )
        # per head, the sums of g f(u) over the terms that :meth:`_through_sigma` lists, for ranges and for ts
        self._sums = torch.zeros(2, ranges.shape[-1], heads, dtype=torch.float64, device=ranges.device)
        self._ts = ts.detach().double()
        self.grad_scale, self.grad_shift, self.grad_sinks = (
            torch.zeros(heads, dtype=torch.float64, device=ranges.device) for _ in range(3)
        )
        self.want_scalars = scalars
        self._sink_share: Tensor | None = None

    @property
    def grad_ranges(self) -> Tensor:
        """``[heads, 2N]``"""
        order = torch.arange(1, self._ts.shape[-1] // 2 + 1, device=self._ts.device)
        signed = torch.stack((order, -order), -1).flatten()  # b_n - x grows with b_n, x - d_n falls with d_n
        return self._sums[0].T * (signed * self._ts)

    @property
    def grad_ts(self) -> Tensor:
        """``[heads, 2N]``"""
        return self._sums[1].T

    def forward(self, problem: Problem, tile: Tile, scores: Scores, differentiate: bool) -> Tensor:
        """See :class:`hf_multimax.attention.tiled.passes.Rows`. The scores are left as sigma saw them."""
        x, out = scores.values, problem.buffer("probabilities", tile)
        self._dead = self._plain = None
        if scores.irregular:
            self._dead = x <= torch.finfo(x.dtype).min / 2
            x.masked_fill_(self._dead, 0.0)
        if self.scale is not None and self.shift is not None:
            self._plain = x.clone() if differentiate else None
            x.mul_(_of(self.scale, tile)).add_(_of(self.shift, tile))
        self._modulate(x, out, problem.buffer("scratch", tile), tile)
        if scores.added is not None:
            out.add_(scores.added)
        may_be_empty = scores.hide(out)
        if self._dead is not None:
            out.masked_fill_(self._dead, MINUS_INFINITY)
        return self._softmax(out, tile, may_be_empty or self._dead is not None)

    def _modulate(self, x: Tensor, out: Tensor, u: Tensor, tile: Tile) -> None:
        """``out = sigma(x)``; ``u`` is scratch."""
        source = x
        for term in self._terms:
            if term.vanishes:
                continue
            if term.clamps and self.sinks is None:  # softmax does not see the constant that this leaves out
                torch.add(source, term.clamped(x, u), alpha=-term.t if term.below else term.t, out=out)
            else:
                term.excess(x, u, tile).relu_()
                if self._dead is not None:
                    u.clamp_(max=torch.finfo(u.dtype).max)  # finite, so that t = 0 leaves 0
                _add_power(source, u, _of(term.t, tile), term.n, out)
            source = out
        if source is x:
            out.copy_(x)

    def _softmax(self, x: Tensor, tile: Tile, may_be_empty: bool) -> Tensor:
        empty = x.amax(-1, keepdim=True) == MINUS_INFINITY if may_be_empty else None
        kept = None
        if self.sinks is not None:
            logit = _of(self.sinks, tile) - x.logsumexp(-1, keepdim=True)
            if empty is not None:  # nothing is shared in an empty row, of which also a sink of -inf would make NaN
                logit.masked_fill_(empty, MINUS_INFINITY)
            # the rest apart, as 1 - share has no digits where the sink takes nearly everything
            self._sink_share, kept = torch.sigmoid(logit), torch.sigmoid(-logit)
        torch.softmax(x, -1, out=x)
        if empty is not None and empty.any():
            x.masked_fill_(empty, 0.0)
        return x if kept is None else x.mul_(kept)

    def backward(
        self, problem: Problem, tile: Tile, scores: Scores, probabilities: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See :class:`hf_multimax.attention.tiled.passes.Rows`."""
        g, p = problem.buffer("scratch", tile), probabilities
        if self._sink_share is not None:
            delta = torch.mul(p, grad, out=g).sum(-1, keepdim=True)
            self._add(self.grad_sinks, tile, -(self._sink_share * delta))
        torch.ops.aten._softmax_backward_data.out(grad, p, -1, p.dtype, grad_input=g)
        if self._dead is not None:  # 0 times infinity is NaN
            nothing = p == 0.0
            g.masked_fill_(nothing, 0.0)
            scores.values.masked_fill_(nothing, 0.0)
        grad_x = self._through_sigma(scores.values, g, problem.buffer("grad_x", tile), grad, p, tile)
        if self.scale is not None:
            if self._plain is not None:
                self._add(self.grad_scale, tile, grad_x * self._plain)
            self._add(self.grad_shift, tile, grad_x)
            grad_x = grad_x.mul_(_of(self.scale, tile))
        return grad_x, g

    def _through_sigma(self, x: Tensor, g: Tensor, out: Tensor, u: Tensor, w: Tensor, tile: Tile) -> Tensor:
        """``out = g dsigma/dx``; adds g's share to the gradients of ranges and ts. ``u`` and ``w`` are scratch."""
        source = g
        sums = torch.zeros(2, len(self._terms), *x.shape[:3], dtype=x.dtype, device=x.device)
        of_ranges, of_ts = (part.unbind() for part in sums)
        for column, term in enumerate(self._terms):
            if term.vanishes and not self.want_scalars:
                continue
            term.excess(x, u, tile)
            # w = g times the derivative of relu(u)^n, without its factor n
            if term.n == 1:
                torch.ops.aten.threshold_backward.grad_input(g, u, 0.0, grad_input=w)
            else:
                u.relu_()
                if self._dead is not None:
                    u.masked_fill_(u >= largest_base(term.n, u.dtype), 0.0)  # powers that overflow are left out
                torch.mul(g, u, out=w)
                for _ in range(term.n - 2):
                    w.mul_(u)
            if not term.vanishes:
                _add_power(source, w, _of(term.slope, tile), 1, out)
                source = out
            if self.want_scalars:
                torch.sum(w, -1, out=of_ranges[column])
                torch.sum(torch.mul(w, u, out=u), -1, out=of_ts[column])
        if self.want_scalars:
            self._sums[:, :, tile.heads] += sums.sum((2, 4), dtype=torch.float64)
        return out.copy_(g) if source is g else out

    @staticmethod
    def _add(into: Tensor, tile: Tile, x: Tensor) -> None:
        """``into[heads] += sum(x)`` over all but the heads."""
        into[tile.heads] += x.sum(-1, keepdim=True).sum((0, 2, 3), dtype=torch.float64)


@dataclass(frozen=True)
class Term:
    """``t * max(b - x, 0)**n`` or ``t * max(x - d, 0)**n``.

    A parameter is a number where that is known without waiting for a device, else broadcastable to a tile.
    """

    bound: Tensor
    t: Tensor | float
    n: int
    below: bool
    limit: float | None  # the bound as a number, where it is known

    def excess(self, x: Tensor, out: Tensor, tile: Tile) -> Tensor:
        """``b - x`` or ``x - d``."""
        bound = _of(self.bound, tile)
        return torch.sub(bound, x, out=out) if self.below else torch.sub(x, bound, out=out)

    @property
    def clamps(self) -> bool:
        """Whether ``-t * min(x, b)`` or ``t * max(x, d)``, one pass less, has the digits of the term but a constant."""
        return self.n == 1 and self.limit is not None and abs(self.limit * self.t) <= 1

    def clamped(self, x: Tensor, out: Tensor) -> Tensor:
        """``min(x, b)`` or ``max(x, d)``."""
        return torch.clamp(x, max=self.limit, out=out) if self.below else torch.clamp(x, min=self.limit, out=out)

    @property
    def vanishes(self) -> bool:
        """Whether the term is known to be zero everywhere."""
        return isinstance(self.t, float) and self.t == 0.0

    @property
    def slope(self) -> Tensor | float:
        """The derivative's factor in front of ``max(.., 0)**(n - 1)``."""
        return self.t * (-self.n if self.below else self.n)


def _terms(ranges: Tensor, ts: Tensor) -> list[Term]:
    """The 2N terms of a modulator ``[2N]`` or ``[heads, 2N]``."""
    shared = ts.ndim == 1
    bounds, slopes = ([x if shared else x[:, None, None] for x in parameter.unbind(-1)] for parameter in (ranges, ts))
    limits: list[float | None] = [None] * ts.shape[-1]
    if shared and ts.device.type == "cpu":
        slopes, limits = ts.tolist(), ranges.tolist()
    return [Term(b, t, i // 2 + 1, i % 2 == 0, limit) for i, (b, t, limit) in enumerate(zip(bounds, slopes, limits))]


def _of(x: Tensor | float, tile: Tile) -> Tensor | float:
    """The tile's heads of a ``[heads, 1, 1]`` parameter; one that all heads share passes through."""
    return x if isinstance(x, float) or x.ndim == 0 or x.shape[0] == 1 else x[tile.heads]


def _add_power(x: Tensor, u: Tensor, t: Tensor | float, n: int, out: Tensor) -> None:
    """``out = x + t * u**n``."""
    if isinstance(t, float) and n == 1:
        torch.add(x, u, alpha=t, out=out)
    elif isinstance(t, float) and n == 2:
        torch.addcmul(x, u, u, value=t, out=out)
    elif n == 1:
        torch.addcmul(x, u, t, out=out)
    else:  # multiplied from t on: where t is 0 it stays 0, however large the power
        factor = u * t
        for _ in range(n - 2):
            factor.mul_(u)
        torch.addcmul(x, factor, u, out=out)


class AutogradRows:
    """A row function without a derivative of its own: autograd differentiates it tile by tile."""

    def __init__(
        self, function: Callable[..., Tensor], parameters: Sequence[Tensor], needed: Sequence[bool] = ()
    ) -> None:
        self.function = function
        self.parameters = [x.detach().requires_grad_(wanted) for x, wanted in zip(parameters, needed)] or parameters
        self.grads = [torch.zeros_like(x) if x.requires_grad else None for x in self.parameters]
        self._graph: tuple[Tensor, Tensor] | None = None

    def forward(self, problem: Problem, tile: Tile, scores: Scores, differentiate: bool) -> Tensor:
        """See :class:`hf_multimax.attention.tiled.passes.Rows`."""
        x = scores.values if scores.added is None else scores.values + scores.added
        if not differentiate:
            return self.function(x, scores.all_kept, *self.parameters)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            self._graph = x, self.function(x, scores.all_kept, *self.parameters)
        return self._graph[1].detach()

    def backward(
        self, problem: Problem, tile: Tile, scores: Scores, probabilities: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See :class:`hf_multimax.attention.tiled.passes.Rows`."""
        x, p = self._graph
        wanted = [x, *(parameter for parameter in self.parameters if parameter.requires_grad)]
        grad_x, *rest = torch.autograd.grad(p, wanted, grad, allow_unused=True, materialize_grads=True)
        for total, part in zip((total for total in self.grads if total is not None), rest):
            total += part
        self._graph = None
        return grad_x, grad_x
