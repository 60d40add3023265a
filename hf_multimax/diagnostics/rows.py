"""Measures of rows of scores and probabilities: sparsity and multi-modality (paper, Definitions 3.2 and 3.3), others.

All are means over rows, computed in float64. Masked entries are removed first: a row with a mask measures as the
truncated row does. Report them together: either of sparsity and multi-modality alone can be moved by a temperature.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "MEASURES",
    "Measure",
    "Options",
    "PerRow",
    "Rows",
    "entries_above",
    "entropy",
    "exact_zeros",
    "multi_modality",
    "sparsity",
    "topk_mass",
]


class Measure(NamedTuple):
    """The mean of a measure over rows.

    Attributes:
        value: the mean over the rows where the measure is defined; NaN if there is none.
        undefined: number of rows that were skipped because the measure is not defined there.
        s: of :func:`sparsity` only, the reference probability, where it differs from row to row the mean.
    """

    value: float
    undefined: int
    s: float | None = None


def multi_modality(
    x: Tensor,
    p: Tensor,
    *,
    eps: float | None = None,
    prob_eps: float | None = None,
    dim: int = -1,
    mask: Tensor | None = None,
) -> Measure:
    """Multi-modality (paper, Definition 3.2), a number in [0, 1]: 1 if all relevant entries are as probable as the top.

    Of the N entries of a row with ``eps < x_n < x_max``: ``M = 1 - (1/N) sum (p_max - p_n)``, undefined where N = 0.

    Args:
        x: scores before the modulator, of any shape and floating type. Minus infinity is a masked entry.
        p: the probabilities made of them along ``dim``, shaped like ``x``.
        eps: the relevance threshold on the scores.
        prob_eps: the threshold in probability space instead, ``eps = log(prob_eps) + logsumexp(x)`` for each row: the
            entries to which SoftMax gives more than ``prob_eps``. Default 1/n with n the row's number of kept entries.
        mask: boolean, broadcastable to ``x``, True = keep.

    Raises:
        ValueError: for different shapes, both thresholds, or ``prob_eps`` outside (0, 1].
        TypeError: for a mask that is not boolean.
    """
    options = Options(eps, prob_eps)
    return _mean(_multi_modality_rows(Rows.of(x, p, mask, dim), options))


def sparsity(
    x: Tensor,
    p: Tensor,
    *,
    eps: float | None = None,
    prob_eps: float | None = None,
    s: float | None = None,
    dim: int = -1,
    mask: Tensor | None = None,
) -> Measure:
    """Sparsity (paper, Definition 3.3), a number in [0, 1]: 1 if no irrelevant entry has any probability.

    Of the L entries of a row with ``x_l < eps``: ``S = (1/L) sum exp((s - p_l)/s - 1) = (1/L) sum exp(-p_l / s)``,
    undefined where L = 0.

    Args:
        x, p, eps, prob_eps, dim, mask: as for :func:`multi_modality`.
        s: reference probability in (0, 1]: an entry that has it counts exp(-1). It does not depend on ``p``; default
            1/n with n the row's number of kept entries.

    Raises:
        ValueError, TypeError: as :func:`multi_modality`; ValueError for ``s`` outside (0, 1].
    """
    options = Options(eps, prob_eps, s)
    return _mean(_sparsity_rows(Rows.of(x, p, mask, dim), options))


def entropy(p: Tensor, *, dim: int = -1, mask: Tensor | None = None) -> Measure:
    """Shannon entropy of ``p`` along ``dim``, in nats. Rows without any probability (fully masked) are undefined."""
    return _mean(_entropy_rows(Rows.of(p, p, mask, dim)))


def topk_mass(p: Tensor, k: int, *, dim: int = -1, mask: Tensor | None = None) -> Measure:
    """The probability, in [0, 1], of the k most probable entries along ``dim``; rows without any are undefined.

    Raises:
        ValueError: if k < 1.
    """
    return _mean(_topk_rows(Rows.of(p, p, mask, dim), Options(k=k)))


def exact_zeros(p: Tensor, *, dim: int = -1, mask: Tensor | None = None) -> Measure:
    """The share, in [0, 1], of a row's kept entries whose probability is exactly 0; rows that keep none are undefined.

    Without a mask every entry is kept, also one whose score was minus infinity: give the mask.
    """
    return _mean(_zero_rows(Rows.of(p, p, mask, dim)))


def entries_above(p: Tensor, above: float = 0.01, *, dim: int = -1, mask: Tensor | None = None) -> Measure:
    """How many entries of a row have more than the probability ``above``; rows without any probability are undefined.

    Raises:
        ValueError: if ``above`` is outside [0, 1).
    """
    return _mean(_above_rows(Rows.of(p, p, mask, dim), Options(above=above)))


@dataclass(frozen=True)
class Options:
    """What the measures are told: thresholds on scores or probabilities, the reference probability, counts."""

    eps: float | None = None
    prob_eps: float | None = None
    s: float | None = None
    k: int = 1
    above: float = 0.01

    def __post_init__(self) -> None:
        if self.eps is not None and self.prob_eps is not None:
            raise ValueError("eps and prob_eps are two forms of one threshold: give one of them")
        for name in ("prob_eps", "s"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value <= 1.0:
                raise ValueError(f"{name} must be a probability in (0, 1], got {value}")
        if self.k < 1:
            raise ValueError(f"k must be >= 1, got {self.k}")
        if not 0.0 <= self.above < 1.0:
            raise ValueError(f"above must be in [0, 1), got {self.above}")


@dataclass(frozen=True)
class Rows:
    """Scores, probabilities and what is kept, the measured dimension last; removed entries are -inf and 0."""

    x: Tensor
    p: Tensor
    keep: Tensor

    @classmethod
    def of(cls, x: Tensor, p: Tensor, mask: Tensor | None, dim: int) -> "Rows":
        if x.shape != p.shape:
            raise ValueError(f"scores and probabilities must have one shape, got {list(x.shape)} and {list(p.shape)}")
        if mask is not None and mask.dtype != torch.bool:
            raise TypeError(f"mask must be boolean (True = keep), got {mask.dtype}")
        x, p = x.detach().double(), p.detach().double()
        keep = x != float("-inf")
        if mask is not None:
            keep = keep & mask
        x, p = x.masked_fill(~keep, float("-inf")), p.masked_fill(~keep, 0.0)
        return cls(x.movedim(dim, -1), p.movedim(dim, -1), keep.movedim(dim, -1))

    def uniform(self) -> Tensor:
        """1/n of every row, ``[..., 1]``; 1 where nothing is kept."""
        return 1.0 / self.keep.sum(-1, keepdim=True).clamp_min(1).double()

    def threshold(self, options: Options) -> Tensor | float:
        """The relevance threshold on the scores, ``[..., 1]``."""
        if options.eps is not None:
            return options.eps
        prob_eps = self.uniform() if options.prob_eps is None else torch.tensor(options.prob_eps, dtype=torch.float64)
        return prob_eps.log().to(self.x.device) + self.x.logsumexp(-1, keepdim=True)


class PerRow(NamedTuple):
    """A measure of each row, where it is defined, and its reference probability if it has one; all ``[...]``."""

    value: Tensor
    defined: Tensor
    s: Tensor | None = None


def _multi_modality_rows(rows: Rows, options: Options) -> PerRow:
    top = rows.x.amax(-1, keepdim=True)
    relevant = rows.keep & (rows.x > rows.threshold(options)) & (rows.x < top)
    distance = rows.p.amax(-1, keepdim=True) - rows.p
    return PerRow(1.0 - _mean_of(distance, relevant), relevant.any(-1))


def _sparsity_rows(rows: Rows, options: Options) -> PerRow:
    s = rows.uniform() if options.s is None else torch.full_like(rows.x[..., :1], options.s)
    irrelevant = rows.keep & (rows.x < rows.threshold(options))
    return PerRow(_mean_of(torch.exp(-rows.p / s), irrelevant), irrelevant.any(-1), s.squeeze(-1))


def _entropy_rows(rows: Rows) -> PerRow:
    return PerRow(torch.special.entr(rows.p).sum(-1), rows.p.sum(-1) > 0)


def _topk_rows(rows: Rows, options: Options) -> PerRow:
    return PerRow(rows.p.topk(min(options.k, rows.p.shape[-1])).values.sum(-1), rows.p.sum(-1) > 0)


def _mean_of(values: Tensor, chosen: Tensor) -> Tensor:
    return values.masked_fill(~chosen, 0.0).sum(-1) / chosen.sum(-1).clamp_min(1)


def _zero_rows(rows: Rows) -> PerRow:
    return PerRow(_mean_of((rows.p == 0).double(), rows.keep), rows.keep.any(-1))


def _above_rows(rows: Rows, options: Options) -> PerRow:
    return PerRow((rows.p > options.above).sum(-1).double(), rows.p.sum(-1) > 0)


def _mean(rows: PerRow) -> Measure:
    defined = int(rows.defined.sum())
    undefined = rows.defined.numel() - defined
    if not defined:
        return Measure(float("nan"), undefined)
    s = None if rows.s is None else float(rows.s[rows.defined].mean())
    return Measure(float(rows.value[rows.defined].mean()), undefined, s)


#: Every measure that is taken of a model, by name.
MEASURES: dict[str, Callable[[Rows, Options], PerRow]] = {
    "sparsity": _sparsity_rows,
    "multi_modality": _multi_modality_rows,
    "entropy": lambda rows, options: _entropy_rows(rows),
    "topk_mass": _topk_rows,
    "exact_zeros": lambda rows, options: _zero_rows(rows),
    "entries_above": _above_rows,
}
