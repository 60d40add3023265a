"""Measures of what attention does: sparsity and multi-modality (paper, Definitions 3.2 and 3.3), entropy, top-k mass.

All are means over rows, computed in float64. Masked entries are removed first: a row with a mask measures as the
truncated row does. Report them together: either of sparsity and multi-modality alone can be moved by a temperature.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_multimax.attention.choose import backend
from hf_multimax.models.patching import patch_model, unpatch_model
from hf_multimax.normalizers.base import Normalizer, named_normalizers

__all__ = ["Measure", "attention_statistics", "entropy", "modulator_curve", "multi_modality", "sparsity", "topk_mass"]


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
    options = _Options(eps, prob_eps)
    return _mean(_multi_modality_rows(_Rows.of(x, p, mask, dim), options))


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
    options = _Options(eps, prob_eps, s)
    return _mean(_sparsity_rows(_Rows.of(x, p, mask, dim), options))


def entropy(p: Tensor, *, dim: int = -1, mask: Tensor | None = None) -> Measure:
    """Shannon entropy of ``p`` along ``dim``, in nats. Rows without any probability (fully masked) are undefined."""
    return _mean(_entropy_rows(_Rows.of(p, p, mask, dim)))


def topk_mass(p: Tensor, k: int, *, dim: int = -1, mask: Tensor | None = None) -> Measure:
    """The probability, in [0, 1], of the k most probable entries along ``dim``; rows without any are undefined.

    Raises:
        ValueError: if k < 1.
    """
    return _mean(_topk_rows(_Rows.of(p, p, mask, dim), _Options(k=k)))


def attention_statistics(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any] | Tensor],
    *,
    eps: float | None = None,
    prob_eps: float | None = None,
    s: float | None = None,
    k: int = 8,
) -> dict[str, dict[str, Measure]]:
    """The measures of every attention layer of a model, over all heads and query rows of all batches.

    The model runs in evaluation mode, without gradients, on the eager backend, and is afterwards as it was, also after
    an error. A stock model is measured with SoftMax. Memory holds the scores of one layer and batch at a time. A query
    that is padding is a row as any other: give batches without padding.

    Args:
        model: a patched model, of which the layers that hold a normalizer are measured, or a stock Transformers model.
        batches: mappings of keyword arguments for ``model``, or tensors, its only argument.
        eps, prob_eps, s: as for :func:`sparsity`.
        k: of :func:`topk_mass`.

    Returns:
        ``{layer: {"sparsity": ..., "multi_modality": ..., "entropy": ..., "topk_mass": ...}}``, layers by module name
        (``transformer.h.0.attn``), each value a :class:`Measure`.

    Raises:
        ValueError: if there is no batch, or for an option as in :func:`sparsity`; as ``patch_model`` for a stock model
            whose attention cannot be reached.
    """
    options = _Options(eps, prob_eps, s, k)
    recorders = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(_patched(model))
        stack.enter_context(_evaluating(model))
        stack.enter_context(backend("eager"))
        for name, normalizer in named_normalizers(model):
            recorder = recorders[name] = _Recorder(options)
            stack.enter_context(recorder.listening_to(normalizer))
        device = next((parameter.device for parameter in model.parameters()), None)
        for batch in batches:
            _call(model, batch, device)
    # The modulator of the output logits normalises nothing.
    statistics = {name: recorder.result() for name, recorder in recorders.items() if recorder.used}
    if not statistics:
        raise ValueError("nothing was measured: batches is empty, or no attention layer of the model was run")
    return statistics


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


# -- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Options:
    eps: float | None = None
    prob_eps: float | None = None
    s: float | None = None
    k: int = 1

    def __post_init__(self) -> None:
        if self.eps is not None and self.prob_eps is not None:
            raise ValueError("eps and prob_eps are two forms of one threshold: give one of them")
        for name in ("prob_eps", "s"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value <= 1.0:
                raise ValueError(f"{name} must be a probability in (0, 1], got {value}")
        if self.k < 1:
            raise ValueError(f"k must be >= 1, got {self.k}")


@dataclass(frozen=True)
class _Rows:
    """Scores, probabilities and what is kept, the measured dimension last; removed entries are -inf and 0."""

    x: Tensor
    p: Tensor
    keep: Tensor

    @classmethod
    def of(cls, x: Tensor, p: Tensor, mask: Tensor | None, dim: int) -> "_Rows":
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

    def threshold(self, options: _Options) -> Tensor | float:
        """The relevance threshold on the scores, ``[..., 1]``."""
        if options.eps is not None:
            return options.eps
        prob_eps = self.uniform() if options.prob_eps is None else torch.tensor(options.prob_eps, dtype=torch.float64)
        return prob_eps.log().to(self.x.device) + self.x.logsumexp(-1, keepdim=True)


class _PerRow(NamedTuple):
    """A measure of each row, where it is defined, and its reference probability if it has one; all ``[...]``."""

    value: Tensor
    defined: Tensor
    s: Tensor | None = None


def _multi_modality_rows(rows: _Rows, options: _Options) -> _PerRow:
    top = rows.x.amax(-1, keepdim=True)
    relevant = rows.keep & (rows.x > rows.threshold(options)) & (rows.x < top)
    distance = rows.p.amax(-1, keepdim=True) - rows.p
    return _PerRow(1.0 - _mean_of(distance, relevant), relevant.any(-1))


def _sparsity_rows(rows: _Rows, options: _Options) -> _PerRow:
    s = rows.uniform() if options.s is None else torch.full_like(rows.x[..., :1], options.s)
    irrelevant = rows.keep & (rows.x < rows.threshold(options))
    return _PerRow(_mean_of(torch.exp(-rows.p / s), irrelevant), irrelevant.any(-1), s.squeeze(-1))


def _entropy_rows(rows: _Rows) -> _PerRow:
    return _PerRow(torch.special.entr(rows.p).sum(-1), rows.p.sum(-1) > 0)


def _topk_rows(rows: _Rows, options: _Options) -> _PerRow:
    return _PerRow(rows.p.topk(min(options.k, rows.p.shape[-1])).values.sum(-1), rows.p.sum(-1) > 0)


def _mean_of(values: Tensor, chosen: Tensor) -> Tensor:
    return values.masked_fill(~chosen, 0.0).sum(-1) / chosen.sum(-1).clamp_min(1)


def _mean(rows: _PerRow) -> Measure:
    running = _RunningMean()
    running.add(rows)
    return running.result()


class _RunningMean:
    """The mean of a measure over rows that arrive in pieces."""

    def __init__(self) -> None:
        self.total, self.s_total, self.defined, self.undefined = 0.0, 0.0, 0, 0
        self.has_s = False

    def add(self, rows: _PerRow) -> None:
        defined = int(rows.defined.sum())
        self.total += float(rows.value[rows.defined].sum())
        self.defined += defined
        self.undefined += rows.defined.numel() - defined
        if rows.s is not None:
            self.has_s = True
            self.s_total += float(rows.s[rows.defined].sum())

    def result(self) -> Measure:
        if not self.defined:
            return Measure(float("nan"), self.undefined)
        return Measure(self.total / self.defined, self.undefined, self.s_total / self.defined if self.has_s else None)


# -- models ----------------------------------------------------------------------------------------------------------

_MEASURES: dict[str, Callable[[_Rows, _Options], _PerRow]] = {
    "sparsity": _sparsity_rows,
    "multi_modality": _multi_modality_rows,
    "entropy": lambda rows, options: _entropy_rows(rows),
    "topk_mass": _topk_rows,
}


class _Recorder:
    """Listens to one normalizer: its scores are what ``modulate`` gets, its probabilities what ``normalize`` gives."""

    def __init__(self, options: _Options) -> None:
        self._options = options
        self._means = {name: _RunningMean() for name in _MEASURES}
        self._scores: Tensor | None = None
        self.used = False

    @contextlib.contextmanager
    def listening_to(self, normalizer: Normalizer) -> Iterator[None]:
        modulate, normalize = normalizer.modulate, normalizer.normalize

        def recording_modulate(x: Tensor) -> Tensor:
            self._scores = x
            return modulate(x)

        def recording_normalize(x: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
            p = normalize(x, dim, mask)
            self._record(p, dim, mask)
            return p

        # Attributes of the object hide the methods of its class until they are deleted.
        normalizer.modulate, normalizer.normalize = recording_modulate, recording_normalize
        try:
            yield
        finally:
            del normalizer.modulate, normalizer.normalize
            self._scores = None

    def result(self) -> dict[str, Measure]:
        return {name: mean.result() for name, mean in self._means.items()}

    def _record(self, p: Tensor, dim: int, mask: Tensor | None) -> None:
        x, self._scores, self.used = self._scores, None, True
        # An attention sink is one more entry behind the keys, without a score of its own.
        mask = None if mask is None else mask.expand_as(p).narrow(dim, 0, x.shape[dim])
        rows = _Rows.of(x, p.narrow(dim, 0, x.shape[dim]), mask, dim)
        for name, measure in _MEASURES.items():
            self._means[name].add(measure(rows, self._options))


@contextlib.contextmanager
def _patched(model: nn.Module) -> Iterator[None]:
    """Gives a stock model SoftMax normalizers for a while."""
    if any(isinstance(module, Normalizer) for module in model.modules()):
        yield
        return
    inside = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)  # of a wrapper
    patch_model(inside, normalizer="softmax")
    try:
        yield
    finally:
        unpatch_model(inside)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _call(model: nn.Module, batch: Mapping[str, Any] | Tensor, device: torch.device | None) -> None:
    if isinstance(batch, Tensor):
        model(batch.to(device))
    else:
        model(**{key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()})
