"""What is kept of rows that arrive in pieces: means per head, and a histogram whose size does not grow."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_multimax.diagnostics.rows import Measure, PerRow

__all__ = ["RunningMeans", "ScoreHistogram"]


class RunningMeans:
    """The mean of a measure over rows that arrive in pieces, for each head."""

    def __init__(self, heads: int) -> None:
        # rows of: sum of values, sum of reference probabilities, rows where it is defined, rows where it is not
        self._sums = torch.zeros(4, heads, dtype=torch.float64)
        self._has_s = False

    def add(self, rows: PerRow, counted: Tensor) -> None:
        """Add rows.

        Args:
            rows: fields ``[..., heads, rows]``.
            counted: boolean, broadcastable to them: the rows that are no padding.
        """
        defined = rows.defined & counted
        missing = ~rows.defined & counted
        s = torch.zeros_like(rows.value) if rows.s is None else rows.s
        parts = [rows.value.masked_fill(~defined, 0.0), s.masked_fill(~defined, 0.0), defined, missing]
        sums = [part.double().movedim(-2, 0).flatten(1).sum(1) for part in parts]
        self._sums += torch.stack(sums).cpu()
        self._has_s |= rows.s is not None

    def heads(self) -> list[Measure]:
        """One mean for each head."""
        return [self._measure(sums) for sums in self._sums.unbind(1)]

    def total(self) -> Measure:
        """The mean over the rows of all heads."""
        return self._measure(self._sums.sum(1))

    def _measure(self, sums: Tensor) -> Measure:
        value, s, defined, undefined = sums.tolist()
        if not defined:
            return Measure(math.nan, int(undefined))
        return Measure(value / defined, int(undefined), s / defined if self._has_s else None)


class ScoreHistogram:
    """How many scores lie where, for each head, in a fixed number of bins whatever arrives.

    The bins share ``[-reach, reach]`` evenly. ``reach`` is a power of two that doubles, two bins becoming one, when a
    score does not fit: the counts do not depend on the order or the size of the pieces.

    Attributes:
        counts: ``[heads, bins]``, int64.
        reach: see above.
    """

    BINS = 4096

    def __init__(self, heads: int) -> None:
        self.counts = torch.zeros(heads, self.BINS, dtype=torch.int64)
        self.reach = 1.0

    @property
    def width(self) -> float:
        """Of a bin."""
        return 2 * self.reach / self.BINS

    def add(self, scores: Tensor, keep: Tensor) -> None:
        """Count scores.

        Args:
            scores: ``[..., heads, rows, keys]``, finite where they are kept.
            keep: boolean, broadcastable to them.
        """
        keep = keep.expand(scores.shape)
        values = scores.double().masked_fill(~keep, 0.0)
        if not values.numel():
            return
        self._make_room(float(values.abs().max()))
        bins = ((values + self.reach) / self.width).floor_().long().clamp_(0, self.BINS - 1)
        bins += self.BINS * torch.arange(scores.shape[-3], device=scores.device).view(-1, 1, 1)
        nowhere = self.counts.numel()  # a bin for what is not kept: to pick entries takes longer than all the rest
        counts = torch.bincount(bins.masked_fill_(~keep, nowhere).flatten(), minlength=nowhere + 1)[:-1]
        self.counts += counts.view(self.counts.shape).cpu()

    def quantiles(self, at: Sequence[float], head: int | None = None) -> list[float]:
        """The scores below which these shares of all scores lie, as exact as a bin is wide; NaN without any score."""
        counts = (self.counts.sum(0) if head is None else self.counts[head]).double()
        total = float(counts.sum())
        if not total:
            return [math.nan] * len(at)
        below = counts.cumsum(0)
        found = []
        for share in at:
            index = min(int(torch.searchsorted(below, share * total)), self.BINS - 1)
            inside = (share * total - float(below[index] - counts[index])) / max(float(counts[index]), 1.0)
            found.append(-self.reach + self.width * (index + inside))
        return found

    def coarse(self, bins: int = 128) -> tuple[list[float], list[int]]:
        """Edges and counts, over all heads, of at most ``bins`` bins between the lowest and the highest score."""
        counts = self.counts.sum(0)
        filled = counts.nonzero().flatten()
        if not len(filled):
            return [], []
        first, last = int(filled[0]), int(filled[-1]) + 1
        step = math.ceil((last - first) / bins)
        pieces = [int(piece.sum()) for piece in counts[first:last].split(step)]
        edges = [-self.reach + self.width * (first + step * i) for i in range(len(pieces) + 1)]
        return edges, pieces

    def _make_room(self, largest: float) -> None:
        while largest >= self.reach:
            quarter = self.BINS // 4
            merged = self.counts.view(len(self.counts), -1, 2).sum(-1)
            self.counts = torch.zeros_like(self.counts)
            self.counts[:, quarter : 3 * quarter] = merged
            self.reach *= 2
