"""What a learned modulator does to scores: its curve, and where it is not monotone.

A reader of "sigma pushes small scores down" does not expect it, but a learned sigma can rise again for small scores
(a negative ``t_b`` of the second order): then a very small score weighs as much as a moderate one.
"""

import math
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from hf_multimax.functional import modulate
from hf_multimax.normalizers.base import MultiMax, Normalizer, on_its_device, whole

__all__ = ["Fall", "falls", "modulator_curve", "same_weight"]


@torch.no_grad()
def modulator_curve(normalizer: Normalizer, x: Tensor) -> Tensor:
    """What ``normalizer`` makes of each score before it normalises: sigma(x), for figures.

    Args:
        x: ``[points]``, scores.

    Returns:
        ``[points]``, or ``[heads, points]`` for a normalizer with parameters per head.
    """
    heads = getattr(normalizer, "num_heads", None)
    if heads is None:
        return normalizer.modulate(x)
    return normalizer.modulate(x.expand(heads, 1, -1)).squeeze(1)


@dataclass(frozen=True)
class Fall:
    """Scores over which sigma falls, so that the larger of two scores there weighs less.

    Attributes:
        low, high: the scores between which it falls; infinite where it has no end.
        head: whose modulator it is; None for the layer's.
    """

    low: float
    high: float
    head: int | None = None


@torch.no_grad()
def falls(normalizer: Normalizer) -> list[Fall]:
    """Where sigma is not monotone: every interval on which it falls, found from the roots of its derivative.

    Returns:
        The intervals, by head and from low to high; none for a normalizer that has no MultiMax modulator.
    """
    if not isinstance(normalizer, MultiMax):
        return []
    found = []
    for head in range(normalizer.num_heads or 1):
        ranges, ts, scale, shift = _of_head(normalizer, head)
        pieces = _falling(ranges, ts)
        if scale < 0:  # then a larger score is a smaller one for sigma
            edges = [-math.inf, *(edge for piece in pieces for edge in piece), math.inf]
            pieces = [(a, b) for a, b in zip(edges[::2], edges[1::2]) if a < b]
        for piece in pieces if scale else ():
            low, high = sorted((edge - shift) / scale for edge in piece)
            found.append(Fall(low, high, None if normalizer.num_heads is None else head))
    return sorted(found, key=lambda fall: (fall.head or 0, fall.low))


@torch.no_grad()
def same_weight(normalizer: MultiMax, score: float, head: int | None = None) -> float | None:
    """The larger score that sigma makes the same of, where sigma has risen again below: None if there is none.

    Of several, the smallest; to 1e-6.
    """
    mine = [fall for fall in falls(normalizer) if fall.head == head and fall.low < score < fall.high]
    if not mine or not math.isfinite(mine[0].high):
        return None

    def sigma(x: float) -> float:
        ranges, ts, scale, shift = (torch.tensor(part, dtype=torch.float64) for part in _of_head(normalizer, head or 0))
        return float(modulate(torch.tensor([x], dtype=torch.float64), ranges, ts, (scale, shift)))

    later = [fall.low for fall in falls(normalizer) if fall.head == head and fall.low >= mine[0].high]
    low, wanted = mine[0].high, sigma(score)
    high = later[0] if later else low + 1.0
    while not later and sigma(high) < wanted and high < 1e6:
        high = low + 2 * (high - low)
    if sigma(high) < wanted:
        return None
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if sigma(middle) < wanted else (low, middle)
    return high


def _of_head(normalizer: MultiMax, head: int) -> tuple[list[float], list[float], float, float]:
    """ranges, ts, scale and shift of one head."""
    with on_its_device(normalizer):
        ranges, ts = (whole(x).double() for x in (normalizer.ranges, normalizer.ts))
        affine = [whole(x).double().reshape(-1)[head].item() for x in normalizer.affine or ()]
    ranges, ts = (x.reshape(-1, x.shape[-1])[head].tolist() for x in (ranges, ts))
    return ranges, ts, *(affine or (1.0, 0.0))


def _falling(ranges: list[float], ts: list[float]) -> list[tuple[float, float]]:
    """The intervals on which sigma, without an affine part, falls; those that touch are one."""
    edges = [-math.inf, *sorted(set(ranges)), math.inf]
    found: list[tuple[float, float]] = []
    for left, right in zip(edges, edges[1:]):
        derivative = _derivative(ranges, ts, _inside(left, right))
        roots = [float(root.real) for root in derivative.roots() if abs(root.imag) < 1e-12]
        cuts = [left, *sorted(root for root in roots if left < root < right), right]
        for a, b in zip(cuts, cuts[1:]):
            if derivative(_inside(a, b)) < 0:
                if found and found[-1][1] == a:
                    found[-1] = (found[-1][0], b)
                else:
                    found.append((a, b))
    return found


def _derivative(ranges: list[float], ts: list[float], x: float) -> numpy.polynomial.Polynomial:
    """sigma' as the polynomial that it is around ``x``."""
    total = numpy.polynomial.Polynomial([1.0])
    for n, (b, d, t_b, t_d) in enumerate(zip(ranges[0::2], ranges[1::2], ts[0::2], ts[1::2]), start=1):
        if x < b:
            total = total - n * t_b * numpy.polynomial.Polynomial([b, -1.0]) ** (n - 1)
        if x > d:
            total = total + n * t_d * numpy.polynomial.Polynomial([-d, 1.0]) ** (n - 1)
    return total.trim(1e-300)


def _inside(a: float, b: float) -> float:
    """A point of an interval."""
    if math.isinf(a) and math.isinf(b):
        return 0.0
    if math.isinf(a):
        return b - 1.0
    return a + 1.0 if math.isinf(b) else (a + b) / 2
