"""Measures of whole models: every attention layer and the output, head by head, over as many batches as one likes."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_multimax.attention.choose import backend
from hf_multimax.attention.watched import Watch, watch
from hf_multimax.diagnostics.modulators import Fall, falls
from hf_multimax.diagnostics.rows import MEASURES, Measure, Options, Rows
from hf_multimax.diagnostics.streams import RunningMeans, ScoreHistogram
from hf_multimax.functional import masked_softmax
from hf_multimax.models.patching import OUTPUT, patch_model, unpatch_model
from hf_multimax.normalizers.base import MultiMax, Normalizer, named_normalizers, on_its_device, whole
from hf_multimax.normalizers.registry import FunctionNormalizer

__all__ = [
    "LayerMeasures",
    "attention_statistics",
    "call",
    "evaluating",
    "measure_model",
    "measure_models",
    "normalizer_name",
    "patched_for_a_while",
    "replaced",
]

#: The name of the output distribution among the layers.
OUTPUT_LAYER = "output"
#: Entries of a piece whose float64 copies are made at a time.
PIECE = 1 << 19


@dataclass
class LayerMeasures:
    """What was measured of a layer, or of the output distribution.

    Attributes:
        normalizer: the name of what normalises its scores.
        measures: over the rows of all heads, by name: those of :data:`hf_multimax.diagnostics.MEASURES`.
        heads: the same for each head; one where the scores do not tell heads apart, as those of the output.
        softmax: the measures that SoftMax of the same scores has; empty where SoftMax is what runs.
        scores: how many scores lie where.
        falls: where sigma is not monotone, each with the share of the scores (of its head) that lie there.
        modulator: ``ranges``, ``ts`` and perhaps ``scale`` and ``shift`` as nested lists; empty without one.
    """

    normalizer: str
    measures: dict[str, Measure]
    heads: list[dict[str, Measure]]
    softmax: dict[str, Measure]
    scores: ScoreHistogram
    falls: list[tuple[Fall, float]]
    modulator: dict[str, Any] = field(default_factory=dict)

    def to_dict(self, bins: int = 128) -> dict[str, Any]:
        """Plain values, as JSON has them; the histogram is of all heads, in at most ``bins`` bins."""
        edges, counts = self.scores.coarse(bins)
        return {
            "normalizer": self.normalizer,
            **self.modulator,
            "measures": {name: measure._asdict() for name, measure in self.measures.items()},
            "heads": [{name: measure.value for name, measure in head.items()} for head in self.heads],
            "softmax": {name: measure.value for name, measure in self.softmax.items()},
            "scores": {
                "edges": edges,
                "counts": counts,
                "quantiles": dict(zip(("0.05", "0.5", "0.95"), self.scores.quantiles((0.05, 0.5, 0.95)))),
            },
            "falls": [
                {"low": fall.low, "high": fall.high, "head": fall.head, "share": share} for fall, share in self.falls
            ],
        }


def measure_model(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any] | Tensor],
    *,
    eps: float | None = None,
    prob_eps: float | None = None,
    s: float | None = None,
    k: int = 8,
    above: float = 0.01,
) -> dict[str, LayerMeasures]:
    """Measure every attention layer of a model and its output distribution, over all query rows of all batches.

    The model runs in evaluation mode, without gradients, in eager attention tile by tile, and is afterwards as it was,
    also after an error. A stock model is measured with SoftMax. Memory grows neither with the number of batches nor
    with a score matrix: beyond what the model itself holds there is one tile of rows. Layers outside Transformers'
    AttentionInterface make score matrices of their own, of one layer and batch at a time.

    Masked entries are left out, and so are query rows of padding, which ``attention_mask`` tells (in the decoder of an
    encoder-decoder ``decoder_attention_mask``, else labels of -100).

    Args:
        model: a patched model, of which the layers that hold a normalizer are measured, or a stock Transformers model.
        batches: mappings of keyword arguments for ``model``, or tensors, its only argument. It is iterated once.
        eps, prob_eps, s: as for :func:`sparsity`.
        k: of :func:`topk_mass`.
        above: of :func:`entries_above`.

    Returns:
        Layers by module name (``transformer.h.0.attn``), and ``"output"``, the distribution over classes or the
        vocabulary, of models that return logits.

    Raises:
        ValueError: if there is no batch, for scores that are NaN or infinite, or for an option as in :func:`sparsity`;
            as ``patch_model`` for a stock model whose attention cannot be reached.
    """
    options = Options(eps, prob_eps, s, k, above)
    return _measure({"": model}, batches, options, whole_measures=True)[""]


def measure_models(
    models: Mapping[str, nn.Module], batches: Iterable[Mapping[str, Any] | Tensor], **options: Any
) -> dict[str, dict[str, LayerMeasures]]:
    """Measure several models on the same batches, with the same thresholds and the same reference probability.

    Args:
        models: by a name of your choice.
        batches, options: as for :func:`measure_model`; each batch goes through all models before the next is asked for.

    Returns:
        What :func:`measure_model` returns, by the names of the models.

    Raises:
        TypeError, ValueError: as :func:`measure_model`; ValueError if one model is given twice.
    """
    if len({id(model) for model in models.values()}) < len(models):
        raise ValueError("one model is given twice: its measures would be those of both")
    unknown = sorted(set(options) - {"eps", "prob_eps", "s", "k", "above"})
    if unknown:
        raise TypeError(f"measure_models has no option {unknown[0]!r}")
    return _measure(models, batches, Options(**{"k": 8, **options}), whole_measures=True)


def attention_statistics(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any] | Tensor],
    *,
    eps: float | None = None,
    prob_eps: float | None = None,
    s: float | None = None,
    k: int = 8,
) -> dict[str, dict[str, Measure]]:
    """Four measures of every attention layer, over all heads: the short form of :func:`measure_model`.

    Args:
        model, batches, eps, prob_eps, s, k: as for :func:`measure_model`.

    Returns:
        ``{layer: {"sparsity": ..., "multi_modality": ..., "entropy": ..., "topk_mass": ...}}``, layers by module name
        (``transformer.h.0.attn``), each value a :class:`Measure`.

    Raises:
        ValueError: as :func:`measure_model`.
    """
    layers = _measure({"": model}, batches, Options(eps, prob_eps, s, k), whole_measures=False)[""]
    return {name: layer.measures for name, layer in layers.items()}


#: What :func:`attention_statistics` measures.
_FEW = ("sparsity", "multi_modality", "entropy", "topk_mass")


@torch.no_grad()
def _measure(
    models: Mapping[str, nn.Module],
    batches: Iterable[Mapping[str, Any] | Tensor],
    options: Options,
    whole_measures: bool,
) -> dict[str, dict[str, LayerMeasures]]:
    ears: dict[str, _Ears] = {}
    with contextlib.ExitStack() as stack:
        for model in models.values():
            stack.enter_context(patched_for_a_while(model))
            stack.enter_context(evaluating(model))
        stack.enter_context(backend("eager"))
        watching = stack.enter_context(watch())
        for name, model in models.items():
            ears[name] = stack.enter_context(_Ears(model, options, watching, whole_measures).listening())
        for batch in batches:
            for ear in ears.values():
                ear.hear(batch)
        # while they are patched: what normalises is known now
        found = {name: ear.result() for name, ear in ears.items()}
    if not all(found.values()):
        raise ValueError("nothing was measured: batches is empty, or no attention layer of the model was run")
    return found


class _Recorder:
    """What is kept of one layer's scores and probabilities.

    Args:
        name: the layer's, for error messages.
        whole_measures: whether to keep all measures, the scores' histogram and what SoftMax would do.
    """

    def __init__(self, name: str, normalizer: Normalizer | None, options: Options, whole_measures: bool) -> None:
        self.name, self.normalizer = name, normalizer
        self._options, self._whole = options, whole_measures
        self._measured = MEASURES if whole_measures else {key: MEASURES[key] for key in _FEW}
        self._twin = whole_measures and normalizer is not None and normalizer_name(normalizer) != "softmax"
        self._falls = falls(normalizer) if whole_measures and normalizer is not None else []
        self._heads = 0

    @property
    def used(self) -> bool:
        return self._heads > 0

    def record(self, x: Tensor, p: Tensor, keep: Tensor | None, counted: Tensor | None) -> None:
        """Take note of scores ``x`` and probabilities ``p``, ``[batch, heads, rows, keys]``.

        Fewer dimensions are rows of one head.

        Args:
            keep: boolean, broadcastable to ``x``; None for all entries.
            counted: ``[batch, rows]``, the rows that are no padding; None for all.
        """
        keep = None if keep is None else keep.expand(x.shape)
        if x.ndim != 4:
            shape = (-1, x.shape[-3] if x.ndim > 4 else 1, *x.shape[-2:])
            x, p, keep = (None if t is None else t.reshape(shape) for t in (x, p, keep))
        self._prepare(x.shape[1])
        if counted is None or counted.shape != (x.shape[0], x.shape[2]):
            counted = x.new_ones(1, 1, dtype=torch.bool)
        counted = counted[:, None, :].expand(x.shape[0], 1, x.shape[2])
        rows = max(1, PIECE // max(1, x[:1, :, :1].numel()))
        for element in range(len(x)):
            for first in range(0, x.shape[2], rows):
                part = (slice(element, element + 1), slice(None), slice(first, first + rows))
                self._record(x[part], p[part], None if keep is None else keep[part], counted[part])

    def _record(self, x: Tensor, p: Tensor, keep: Tensor | None, counted: Tensor) -> None:
        rows = Rows.of(x, p, keep, -1)
        self._add(self._means, rows, counted)
        if not self._whole:
            return
        keep = rows.keep & counted[..., None]
        if not bool((rows.x.isfinite() | ~keep).all()):
            raise ValueError(f"{self.name} has scores that are NaN or infinite: the model or a batch of it is broken")
        self.scores.add(rows.x, keep)
        for index, fall in enumerate(self._falls):
            heads = slice(None) if fall.head is None else slice(fall.head, fall.head + 1)
            inside = (rows.x[:, heads] > fall.low) & (rows.x[:, heads] < fall.high) & keep[:, heads]
            self._inside[index] += int(inside.sum())
        if self._twin:
            self._add(self._twin_means, Rows(rows.x, masked_softmax(rows.x), rows.keep), counted)

    def _prepare(self, heads: int) -> None:
        """Make room at the first call, which tells the number of heads."""
        if not self._heads:
            self._heads = heads
            self._means, self._twin_means = ({name: RunningMeans(heads) for name in self._measured} for _ in range(2))
            self.scores = ScoreHistogram(heads)
            self._inside = [0] * len(self._falls)
        if self._heads != heads:
            raise ValueError(f"{self.name} had {self._heads} heads and now has {heads}: measure such batches apart")

    def _add(self, means: dict[str, RunningMeans], rows: Rows, counted: Tensor) -> None:
        for name, measure in self._measured.items():
            means[name].add(measure(rows, self._options), counted)

    def result(self) -> LayerMeasures:
        per_head = {name: mean.heads() for name, mean in self._means.items()}
        shares = []
        for fall, inside in zip(self._falls, self._inside):
            counts = self.scores.counts if fall.head is None else self.scores.counts[fall.head]
            shares.append((fall, inside / max(1, int(counts.sum()))))
        modulator = {}
        if isinstance(self.normalizer, MultiMax):
            names = ("ranges", "ts", "scale", "shift")
            values = {name: getattr(self.normalizer, name) for name in names}
            with on_its_device(self.normalizer):
                modulator = {
                    name: whole(value.detach()).tolist() for name, value in values.items() if value is not None
                }
        return LayerMeasures(
            normalizer="softmax" if self.normalizer is None else normalizer_name(self.normalizer),
            measures={name: mean.total() for name, mean in self._means.items()},
            heads=[{name: means[head] for name, means in per_head.items()} for head in range(self._heads)],
            softmax={name: mean.total() for name, mean in self._twin_means.items()} if self._twin else {},
            scores=self.scores,
            falls=shares,
            modulator=modulator,
        )


def normalizer_name(normalizer: Normalizer) -> str:
    """The registered name of what a module computes."""
    if isinstance(normalizer, FunctionNormalizer):
        return normalizer.name
    return "multimax" if isinstance(normalizer, MultiMax) else "softmax"


class _Ears:
    """Listens to the normalizers of one model and, if all is measured, to its logits."""

    def __init__(self, model: nn.Module, options: Options, watching: Watch, whole_measures: bool) -> None:
        self.model, self._watching = model, watching
        self._device = next((parameter.device for parameter in model.parameters()), None)
        self._normalizers = dict(named_normalizers(model))
        self._recorders = {
            name: _Recorder(name, normalizer, options, whole_measures)
            for name, normalizer in self._normalizers.items()
            if not name.endswith(OUTPUT)
        }
        self._output = None
        if whole_measures:
            modulator = next((n for name, n in self._normalizers.items() if name.endswith(OUTPUT)), None)
            self._output = _Recorder(OUTPUT_LAYER, modulator, options, True)
        self._masks: dict[str, Tensor | None] = {}

    @contextlib.contextmanager
    def listening(self) -> Iterator["_Ears"]:
        with contextlib.ExitStack() as stack:
            for name, recorder in self._recorders.items():
                stack.enter_context(self._listening_to(self._normalizers[name], recorder, name))
            if self._output is not None and self._output.normalizer is not None:
                stack.enter_context(self._listening_to_logits(self._output))
            yield self

    def hear(self, batch: Mapping[str, Any] | Tensor) -> None:
        """Run the model on a batch."""
        inputs = {} if isinstance(batch, Tensor) else dict(batch)
        self._masks = _row_masks(inputs)
        outputs = call(self.model, batch, self._device)
        logits = getattr(outputs, "logits", None)
        unheard = self._output is not None and self._output.normalizer is None
        if unheard and isinstance(logits, Tensor) and logits.is_floating_point() and logits.shape[-1] > 1:
            self._record_logits(self._output, logits, lambda x: masked_softmax(x.double()))

    def result(self) -> dict[str, LayerMeasures]:
        # The modulator of the output logits normalises nothing, and a layer may never have run.
        found = {name: recorder.result() for name, recorder in self._recorders.items() if recorder.used}
        if self._output is not None and self._output.used:
            found[OUTPUT_LAYER] = self._output.result()
        return found

    @contextlib.contextmanager
    def _listening_to(self, normalizer: Normalizer, recorder: _Recorder, name: str) -> Iterator[None]:
        """A layer's scores are what ``modulate`` gets, its probabilities what ``normalize`` gives."""
        modulate, normalize, seen = normalizer.modulate, normalizer.normalize, []

        def hearing_modulate(x: Tensor) -> Tensor:
            seen[:] = [x]
            return modulate(x)

        def hearing_normalize(x: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
            p = normalize(x, dim, mask)
            scores = seen.pop()
            # An attention sink is one more entry behind the keys, without a score of its own.
            keep = None if mask is None else mask.expand(p.shape)[..., : scores.shape[-1]]
            counted = self._counted(name, scores)
            recorder.record(scores, p[..., : scores.shape[-1]], keep, counted)
            return p

        with replaced(normalizer, modulate=hearing_modulate, normalize=hearing_normalize):
            yield

    @contextlib.contextmanager
    def _listening_to_logits(self, recorder: _Recorder) -> Iterator[None]:
        """The output's scores are what ``modulate`` gets; it normalises nothing."""
        normalizer = recorder.normalizer
        modulate = normalizer.modulate

        def hearing_modulate(x: Tensor) -> Tensor:
            self._record_logits(recorder, x, lambda part: normalizer.normalize(modulate(part)))
            return modulate(x)

        with replaced(normalizer, modulate=hearing_modulate):
            yield

    def _record_logits(self, recorder: _Recorder, logits: Tensor, probabilities: Callable[[Tensor], Tensor]) -> None:
        logits = logits.reshape(len(logits), -1, logits.shape[-1])
        mask = self._masks["decoder" if self._is_encoder_decoder else "input"]
        counted = None if mask is None or mask.shape != logits.shape[:2] else mask.to(logits.device)
        step = max(1, PIECE // logits.shape[-1])
        for element in range(len(logits)):
            for first in range(0, logits.shape[1], step):
                x = logits[element : element + 1, None, first : first + step]
                part = None if counted is None else counted[element : element + 1, first : first + step]
                recorder.record(x, probabilities(x), None, part)

    @functools.cached_property
    def _is_encoder_decoder(self) -> bool:
        return bool(getattr(getattr(self.model, "config", None), "is_encoder_decoder", False))

    @functools.cached_property
    def _encoder(self) -> set[int]:
        """The normalizers whose rows are the encoder's input."""
        inside = next((module for module in self.model.modules() if isinstance(module, PreTrainedModel)), None)
        encoder = inside.get_encoder() if self._is_encoder_decoder and inside is not None else self.model
        return {id(module) for module in encoder.modules()}

    def _counted(self, name: str, scores: Tensor) -> Tensor | None:
        """Which rows of a layer's scores are no padding."""
        in_encoder = id(self._normalizers[name]) in self._encoder
        mask, tile, shape = self._masks["input" if in_encoder else "decoder"], self._watching.tile, scores.shape
        if tile is not None:
            shape = self._watching.shape
        if mask is None or len(shape) != 4 or mask.shape != (shape[0], shape[2]):
            return None
        return (mask if tile is None else mask[tile.batch, tile.rows]).to(scores.device)


@contextlib.contextmanager
def replaced(normalizer: Normalizer, **methods: Callable[..., Tensor]) -> Iterator[None]:
    """Attributes of the object hide the methods of its class until they are deleted."""
    for name, method in methods.items():
        setattr(normalizer, name, method)
    try:
        yield
    finally:
        for name in methods:
            delattr(normalizer, name)


def _row_masks(inputs: Mapping[str, Any]) -> dict[str, Tensor | None]:
    """Which positions of the input, and of the decoder's, are no padding: ``[batch, length]`` each, None for all."""
    decoder = inputs.get("decoder_attention_mask")
    labels = inputs.get("labels")
    if decoder is None and isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point():
        decoder = labels != -100
    masks = {"input": inputs.get("attention_mask"), "decoder": decoder}
    return {name: mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None for name, mask in masks.items()}


@contextlib.contextmanager
def patched_for_a_while(model: nn.Module) -> Iterator[None]:
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
def evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def call(model: nn.Module, batch: Mapping[str, Any] | Tensor, device: torch.device | None) -> Any:
    if isinstance(batch, Tensor):
        return model(batch.to(device))
    return model(**{key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()})
