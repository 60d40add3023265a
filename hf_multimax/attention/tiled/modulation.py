"""The modulator sigma and its derivatives over tiles of scores that stay in the cache, in plain PyTorch.

With ``f_k(x) = max(b - x, 0)**n`` or ``max(x - d, 0)**n``, the terms of sigma without their slopes, and ``e_k`` their
derivatives without sign and factor ``n``, everything is a product with a small matrix of one row per term::

    sigma(x) = x + ts @ f(x)        sigma'(x) - 1 = slopes @ e(x)
    d/dts = f(x) @ g                d/dranges = -slopes * (e(x) @ g)

so that one pass over the tile builds ``f`` and ``e`` and the rest is BLAS.
"""

import torch
from torch import Tensor

__all__ = ["TileModulation", "finite_up_to", "largest_base", "sigma_slopes"]


def sigma_slopes(ts: Tensor) -> Tensor:
    """The factors of e(x) in sigma'(x), ``[-t_b1, t_d1, -2 t_b2, 2 t_d2, ...]``, for ``ts`` ``[2N]``."""
    terms = torch.arange(ts.numel(), device=ts.device)
    return ts * ((terms // 2 + 1) * (2 * (terms % 2) - 1))


def largest_base(n: int, dtype: torch.dtype) -> float:
    """The largest number whose n-th power stays well within ``dtype``."""
    return (torch.finfo(dtype).max / 256) ** (1 / n)


def finite_up_to(ranges: Tensor, ts: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> float:
    """A magnitude of scores up to which sigma (of ``scale * x + shift``) and its derivatives stay finite; may be NaN.

    Infinity where reading parameters back would wait for a device.
    """
    if ts.device.type != "cpu":
        return float("inf")
    order = ts.shape[-1] // 2
    steepest, farthest = max(1.0, _largest(ts)), _largest(ranges)
    limit = min(largest_base(n, ts.dtype) / (2 * order * steepest) ** (1 / n) for n in range(1, order + 1)) - farthest
    return limit if scale is None or shift is None else (limit - _largest(shift)) / max(_largest(scale), 1e-30)


def _largest(x: Tensor) -> float:
    return x.detach().abs().max().item()


class TileModulation:
    """sigma over tiles of at most ``capacity`` elements, with one set of buffers for all of them.

    Call :meth:`forward` on a tile, then (with ``derivatives``) :meth:`backward` on the gradient of the same tile.

    Args:
        ranges, ts: ``[2N]`` each, in the type that the tiles have.
        capacity: the largest tile, in elements.
        derivatives: whether :meth:`backward` will be called.
    """

    def __init__(self, ranges: Tensor, ts: Tensor, *, capacity: int, derivatives: bool) -> None:
        terms = ranges.numel()
        self.ranges, self.ts = ranges, ts
        self.slopes = sigma_slopes(ts)
        self._values = ts.new_empty(terms, capacity)
        self._derivatives = ts.new_empty(terms, capacity) if derivatives else None
        self._slope = ts.new_empty(capacity) if derivatives else None
        self._finite_up_to = finite_up_to(ranges, ts)
        self._value_sums = ts.new_zeros(terms, dtype=torch.float64)
        self._derivative_sums = ts.new_zeros(terms, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        """Replace the contiguous tile ``x`` by sigma(x), in place."""
        flat = x.view(-1)
        values = self._values[:, : flat.numel()]
        derivatives = None if self._derivatives is None else self._derivatives[:, : flat.numel()]
        infinite = self._overflow(flat)
        for n in range(1, len(self.ts) // 2 + 1):
            pair = slice(2 * n - 2, 2 * n)
            self._term(flat, n, values[pair], None if derivatives is None else derivatives[pair], infinite is not None)
        flat.addmv_(values.t(), self.ts)
        if infinite is not None:
            flat.add_(infinite)
        return x

    def _overflow(self, x: Tensor) -> Tensor | None:
        """The sum of the terms whose powers overflow, infinite each; None where no score is as large as that."""
        if x.device.type == "cpu":
            low, high = torch.aminmax(x)
            if max(-low.item(), high.item()) <= self._finite_up_to:
                return None
        total, largest = torch.zeros_like(x), torch.finfo(x.dtype).max
        for k, (bound, t) in enumerate(zip(self.ranges, self.ts)):
            n = k // 2 + 1
            if n > 1:
                excess = x - bound if k % 2 else bound - x
                total += torch.where(excess >= largest_base(n, x.dtype), t * largest * largest, 0.0)
        return total

    def backward(self, grad: Tensor, parameters: bool = True) -> Tensor:
        """Replace ``grad``, the gradient of the last tile's sigma(x), by that of x, in place.

        With ``parameters``, add the tile's share to what :meth:`parameter_gradients` returns.
        """
        flat = grad.view(-1)
        values, derivatives = self._values[:, : flat.numel()], self._derivatives[:, : flat.numel()]
        if parameters:
            self._value_sums += torch.mv(values, flat)
            self._derivative_sums += torch.mv(derivatives, flat)
        slope = torch.mv(derivatives.t(), self.slopes, out=self._slope[: flat.numel()])
        flat.addcmul_(flat, slope)
        return grad

    def parameter_gradients(self) -> tuple[Tensor, Tensor]:
        """The gradients of ``ranges`` and ``ts`` over every tile so far, float64."""
        return -self.slopes * self._derivative_sums, self._value_sums

    def _term(self, x: Tensor, n: int, values: Tensor, derivatives: Tensor | None, far: bool) -> None:
        """Fill the two rows of order ``n``: relu**n into ``values``, relu**(n-1) into ``derivatives``.

        With ``far`` powers that overflow are left out.
        """
        # order 2 needs the relu itself as derivative: compute it there and save a copy
        relu = derivatives if n == 2 and derivatives is not None else values
        torch.sub(self.ranges[2 * n - 2], x, out=relu[0])
        torch.sub(x, self.ranges[2 * n - 1], out=relu[1])
        relu.relu_()
        if far and n == 1:
            relu.clamp_(max=torch.finfo(x.dtype).max)
        elif far:
            relu.masked_fill_(relu >= largest_base(n, x.dtype), 0.0)
        if derivatives is None:
            values.pow_(n)
        elif n == 1:
            torch.sign(values, out=derivatives)
        elif n == 2:
            torch.mul(relu, relu, out=values)
        else:
            torch.pow(values, n - 1, out=derivatives)
            values.mul_(derivatives)
