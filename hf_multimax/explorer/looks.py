"""What the explorer shows, as numbers: one attention layer of a model on one input, with a normalizer in its place."""

import copy
import inspect
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_multimax.attention.choose import backend
from hf_multimax.command_line.data import image_batch, text_batch
from hf_multimax.command_line.loading import Loaded
from hf_multimax.config import MultiMaxConfig
from hf_multimax.diagnostics import Fall, ScoreHistogram, entropy, exact_zeros, falls, multi_modality, sparsity
from hf_multimax.diagnostics.models import call, replaced
from hf_multimax.models.patching import OUTPUT, patch_model
from hf_multimax.normalizers.base import MultiMax, Normalizer, named_normalizers
from hf_multimax.normalizers.registry import REQUIRED, build_normalizer, get_normalizer, registered_normalizers

__all__ = ["ARMS", "AS_TRAINED", "Choice", "Explorer", "Inputs", "Look", "Scalar"]

#: What is compared: the normalizer that was chosen, the layer's own, and SoftMax.
ARMS = ("now", "trained", "SoftMax")
#: The choice of the layer's own normalizer, where that is not MultiMax.
AS_TRAINED = "as trained"
#: The digits in which the scalars are shown; one that was not moved has all digits of the trained one.
DIGITS = 2
#: Passes through the model that are kept.
_KEPT = 8
#: Entries of the output distribution that are shown.
_BEST = 8
#: Values of options that have no default.
_EXAMPLES = {"k": 8, "t": 1.0}


@dataclass(frozen=True)
class Inputs:
    """What the model looks at.

    Attributes:
        text: for a model of text.
        target: of an encoder-decoder what the decoder is given; empty for the text itself.
        image: for a model of images, a file.
    """

    text: str = ""
    target: str = ""
    image: str | None = None


@dataclass(frozen=True)
class Choice:
    """What normalises the scores of the layer.

    Attributes:
        normalizer: a registered name, or :data:`AS_TRAINED`.
        scalars: of ``multimax``, by name, as :meth:`Explorer.scalars` lists them; others stay as they were trained.
        options: of any other, by name.
    """

    normalizer: str = "multimax"
    scalars: tuple[tuple[str, float], ...] = ()
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Scalar:
    """A scalar of a modulator: its name, its value, and that it can be moved between minus and plus ``bound``."""

    name: str
    value: float
    bound: float


@dataclass(frozen=True)
class Look:
    """What one head of a layer does, by arm (:data:`ARMS`) where that matters.

    Attributes:
        heads: how many there are.
        row: the query that is looked at.
        queries, keys: what the positions are called.
        weights: the head's attention, ``[queries, keys]``.
        scores: before any modulator, ``[queries, keys]``, the same for all arms; -inf where masked.
        keep: which entries are not masked, ``[queries, keys]``.
        points, sigma: sigma at some scores, ``[points]``; empty for normalizers without one.
        edges, counts: the histogram of the head's scores.
        falls: where sigma is not monotone now.
        thresholds: b and d of every order now.
        measures: sparsity, multi-modality, entropy and the share of exact zeros, means over the rows of the head.
        output: the most probable classes or tokens at the query's position, with their probabilities; empty for a
            model without logits.
        pixels: of an image ``[channels, height, width]``, else None.
    """

    layer: str
    head: int
    heads: int
    row: int
    queries: list[str]
    keys: list[str]
    weights: dict[str, Tensor]
    scores: Tensor
    keep: Tensor
    points: Tensor
    sigma: dict[str, Tensor]
    edges: list[float]
    counts: list[float]
    falls: list[Fall]
    thresholds: list[float]
    measures: dict[str, dict[str, float]]
    output: list[tuple[str, dict[str, float]]]
    pixels: Tensor | None


@dataclass(frozen=True)
class _Pass:
    """What one pass showed of a layer, ``[heads, queries, keys]`` each, and of the output, ``[positions, classes]``."""

    scores: Tensor
    weights: Tensor
    keep: Tensor
    logits: Tensor | None


class Explorer:
    """Looks at the attention layers of one model. A stock model is patched, so that it begins as SoftMax.

    Args:
        loaded: the model and what prepares its inputs.
        length: how many tokens a text may have.

    Raises:
        ValueError: as ``patch_model`` for a model without attention that can be reached, and for one that has neither
            a tokenizer nor an image processor.
    """

    def __init__(self, loaded: Loaded, length: int = 256) -> None:
        if (loaded.image_processor if loaded.takes_images else loaded.tokenizer) is None:
            missing = "image processor" if loaded.takes_images else "tokenizer"
            raise ValueError(f"{loaded.path} has no {missing}: save one with it, so that inputs can be made")
        if not any(isinstance(module, Normalizer) for module in loaded.model.modules()):
            patch_model(loaded.inside)
        self.loaded = loaded
        self._normalizers = {
            name: normalizer for name, normalizer in named_normalizers(loaded.model) if not name.endswith(OUTPUT)
        }
        if not self._normalizers:
            raise ValueError(f"{loaded.path} has no attention layer with a normalizer: only its output is modulated")
        self._device = next(loaded.model.parameters()).device
        positions = getattr(loaded.inside.config, "max_position_embeddings", None)
        self._length = min(length, positions) if isinstance(positions, int) and positions > 2 else length
        stock = getattr(type(loaded.inside), "stock_class", type(loaded.inside))
        self._takes = inspect.signature(stock.forward).parameters
        self._passes: OrderedDict[tuple[Any, ...], _Pass] = OrderedDict()
        self._lock = threading.Lock()  # a pass changes the model for a while
        #: By name how far from 0 a scalar can be moved: beyond what any layer has learned.
        self.bounds = self._find_bounds()

    @property
    def layers(self) -> list[str]:
        """The layers that can be looked at."""
        return list(self._normalizers)

    @property
    def is_encoder_decoder(self) -> bool:
        return bool(self.loaded.inside.config.is_encoder_decoder)

    def choices(self, layer: str) -> list[str]:
        """What may stand in a layer's place, its own normalizer first."""
        own = [] if isinstance(self._normalizers[layer], MultiMax) else [AS_TRAINED]
        return [*own, "multimax", *(name for name in registered_normalizers() if name != "multimax")]

    def options(self, normalizer: str) -> dict[str, Any]:
        """The options of a normalizer that are numbers, with their defaults."""
        if normalizer in (AS_TRAINED, "multimax"):
            return {}
        values = {
            name: _EXAMPLES.get(name) if option.default is REQUIRED else option.default
            for name, option in get_normalizer(normalizer).options.items()
        }
        return {name: value for name, value in values.items() if type(value) in (int, float)}

    def scalars(self, layer: str, head: int = 0) -> list[Scalar]:
        """The scalars of a layer's modulator, those of one head where it has one each: ``b_1, d_1, t_b1, t_d1, ...``.

        In a layer without a modulator they are those of order 2 with which MultiMax is SoftMax.
        """
        values = _scalars_of(self._modulator(layer), head)
        return [Scalar(name, value, self.bounds[name]) for name, value in values.items()]

    def differs_by_head(self, layer: str) -> bool:
        """Whether every head has scalars of its own."""
        return self._modulator(layer).num_heads is not None

    def look(self, inputs: Inputs, layer: str, head: int = 0, row: int = -1, choice: Choice | None = None) -> Look:
        """Compute what one head does with an input.

        Args:
            row: the query; one that does not exist is the last.
            choice: what normalises; None for the layer's own normalizer.

        Raises:
            ValueError: for a layer or head that does not exist, no or too long an input, scalars that are not finite,
                impossible options.
        """
        if layer not in self._normalizers:
            raise ValueError(f"{self.loaded.path} has no layer {layer!r}: there are {', '.join(self.layers)}")
        batch, choice = self._batch(inputs), choice or Choice(AS_TRAINED)
        own = self._normalizers[layer]
        with self._lock:
            trained = self._kept_pass((inputs, layer, AS_TRAINED), batch, layer, own)
            soft = self._kept_pass((inputs, layer, "SoftMax"), batch, layer, Normalizer())
            heads, queries, keys = trained.weights.shape
            if not 0 <= head < heads:
                raise ValueError(f"{layer} has the heads 0 to {heads - 1}, got {head}")
            row = row if 0 <= row < queries else queries - 1
            position = row if trained.logits is None or len(trained.logits) == queries else -1
            chosen, now = self._chosen(layer, head, heads, choice), trained
            if chosen is not None:
                now = self._kept_pass((inputs, layer, head, choice, position), batch, layer, chosen, position)
        if not bool(now.weights.isfinite().all()):
            raise ValueError(f"with these scalars the weights of {layer} are not finite: take smaller slopes")
        passes = dict(zip(ARMS, (now, trained, soft)))
        acting = own if chosen is None else chosen
        scores, keep = trained.scores[head], trained.keep[head]
        names = self._names(batch, layer, queries, keys)
        edges, counts, points = _histogram(scores, keep)
        ranges = _scalars_of(acting, head) if isinstance(acting, MultiMax) else {}
        return Look(
            layer,
            head,
            heads,
            row,
            *names,
            weights={arm: part.weights[head] for arm, part in passes.items()},
            scores=scores.masked_fill(~keep, -math.inf),
            keep=keep,
            points=points,
            sigma={arm: _curve(of, points, head) for arm, of in zip(ARMS, (acting, own)) if isinstance(of, MultiMax)},
            edges=edges,
            counts=counts,
            falls=[fall for fall in falls(acting) if fall.head in (None, head)],
            thresholds=[value for name, value in ranges.items() if name[0] in "bd"],
            measures={arm: _measures(scores, part.weights[head], keep) for arm, part in passes.items()},
            output=self._output(passes, position),
            pixels=batch["pixel_values"][0] if self.loaded.takes_images else None,
        )

    # -- inputs ----------------------------------------------------------------------------------------------------

    def _batch(self, inputs: Inputs) -> dict[str, Tensor]:
        if self.loaded.takes_images:
            if inputs.image is None:
                raise ValueError("give an image")
            return image_batch(self.loaded, Path(inputs.image))
        if not inputs.text.strip():
            raise ValueError("give a text")
        text = " ".join(inputs.text.split("\t"))
        batch = text_batch(self.loaded, f"{text}\t{inputs.target}" if self.is_encoder_decoder else text)
        for ids in (batch["input_ids"], batch.get("labels")):
            if ids is not None and ids.shape[-1] > self._length:
                raise ValueError(f"the text has {ids.shape[-1]} tokens, and at most {self._length} are taken")
        if batch["input_ids"].shape[-1] == 0:
            raise ValueError(f"the tokenizer of {self.loaded.path} knows nothing of this text: save one with the model")
        return batch

    def _names(self, batch: Mapping[str, Tensor], layer: str, queries: int, keys: int) -> tuple[list[str], list[str]]:
        """What the queries and the keys of a layer are called."""
        if self.loaded.takes_images:
            return _patches(queries), _patches(keys)
        source = self._tokens(batch["input_ids"][0])
        target = self._tokens(batch["labels"][0]) if "labels" in batch else source
        encoder = not self.is_encoder_decoder or any(
            module is self._normalizers[layer] for module in self.loaded.inside.get_encoder().modules()
        )
        crosses = not encoder and re.search(r"cross|encoder_attn|EncDec", layer) is not None
        # the decoder reads what comes before each label
        at_queries = source if encoder else ["(start)", *target[:-1]]
        at_keys = source if crosses else at_queries
        return _fitting(at_queries, queries), _fitting(at_keys, keys)

    def _tokens(self, ids: Tensor) -> list[str]:
        return [self.loaded.tokenizer.decode([token]) for token in ids.tolist()]

    # -- normalizers -----------------------------------------------------------------------------------------------

    def _modulator(self, layer: str) -> MultiMax:
        own = self._normalizers[layer]
        return own if isinstance(own, MultiMax) else MultiMax(order=2)

    def _chosen(self, layer: str, head: int, heads: int, choice: Choice) -> Normalizer | None:
        """The module that is asked for; None for the layer's own."""
        if choice.normalizer == AS_TRAINED:
            return None
        if choice.normalizer != "multimax":
            config = MultiMaxConfig(normalizer=choice.normalizer, normalizer_kwargs=dict(choice.options))
            per_head = heads if get_normalizer(choice.normalizer).per_head else None
            with torch.random.fork_rng(devices=[]):  # what begins at random is the same at every move
                torch.manual_seed(0)
                return build_normalizer(config, per_head).to(self._device).eval()
        trained = {scalar.name: scalar.value for scalar in self.scalars(layer, head)}
        moved = {}
        for name, value in choice.scalars:
            if name not in trained:
                raise ValueError(f"the modulator of {layer} has no scalar {name!r}: there are {', '.join(trained)}")
            if value is None or not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value}")
            if value != round(trained[name], DIGITS):  # else it is the trained one, as it was shown
                moved[name] = value
        if not moved and isinstance(self._normalizers[layer], MultiMax):
            return None
        return _with_scalars(self._modulator(layer), head, moved)

    def _find_bounds(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for modulator in map(self._modulator, self.layers):
            for head in range(modulator.num_heads or 1):
                for name, value in _scalars_of(modulator, head).items():
                    least = 2.0 / _index(name)[1] if name.startswith("t_") else 8.0
                    found[name] = max(found.get(name, least), math.ceil(12.5 * abs(value)) / 10)
        return found

    # -- passes ----------------------------------------------------------------------------------------------------

    def _kept_pass(
        self,
        key: tuple[Any, ...],
        batch: Mapping[str, Tensor],
        layer: str,
        normalizer: Normalizer,
        at: int | None = None,
    ) -> _Pass:
        if key not in self._passes:
            self._passes[key] = self._run(batch, layer, normalizer, at)
            if len(self._passes) > _KEPT:
                self._passes.popitem(last=False)
        self._passes.move_to_end(key)
        return self._passes[key]

    @torch.no_grad()
    def _run(self, batch: Mapping[str, Tensor], layer: str, normalizer: Normalizer, at: int | None) -> _Pass:
        """One pass, with ``normalizer`` in the layer's place; with ``at`` the logits of that position alone."""
        heard: dict[str, Any] = {}
        modulate, normalize = normalizer.modulate, normalizer.normalize

        def hearing_modulate(x: Tensor) -> Tensor:
            heard["scores"] = x
            return modulate(x)

        def hearing_normalize(x: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
            p = normalize(x, dim, mask)
            heard.update(weights=p, keep=mask)
            return p

        options: dict[str, Any] = {"use_cache": False} if "use_cache" in self._takes else {}
        if at is not None and "logits_to_keep" in self._takes:
            options["logits_to_keep"] = torch.tensor([at], device=self._device) if at >= 0 else 1
        own = self._normalizers[layer]
        hearing = {"row_factor": normalizer.row_factor, "modulate": hearing_modulate, "normalize": hearing_normalize}
        with backend("eager"), replaced(own, **hearing):
            outputs = call(self.loaded.model, {**batch, **options}, self._device)
        if "weights" not in heard:
            raise ValueError(f"{layer} was not run with this input")
        scores, weights, keep = _in_heads(heard["scores"], heard["weights"], heard["keep"])
        logits = getattr(outputs, "logits", None)
        if isinstance(logits, Tensor) and logits.shape[-1] > 1:
            logits = logits[0].reshape(-1, logits.shape[-1]).float().cpu()
            if at is not None and len(logits) > 1:
                logits = logits[at, None]
        else:
            logits = None
        return _Pass(scores.float().cpu(), weights.float().cpu(), keep.cpu(), logits)

    def _output(self, passes: Mapping[str, _Pass], position: int) -> list[tuple[str, dict[str, float]]]:
        if passes["trained"].logits is None:
            return []
        found = {}
        for arm, part in passes.items():
            logits = part.logits[0] if len(part.logits) == 1 else part.logits[position]
            found[arm] = logits.double().softmax(-1)
        best = found["now"].topk(min(_BEST, len(found["now"]))).indices.tolist()
        return [
            (self._class_name(index, len(found["now"])), {arm: p[index].item() for arm, p in found.items()})
            for index in best
        ]

    def _class_name(self, index: int, classes: int) -> str:
        config, tokenizer = self.loaded.inside.config, self.loaded.tokenizer
        if tokenizer is not None and classes == getattr(config.get_text_config(), "vocab_size", None):
            return tokenizer.decode([index])
        return str((config.id2label or {}).get(index, index))


def _scalars_of(modulator: MultiMax, head: int) -> dict[str, float]:
    """By name; of a modulator per head those of ``head``."""
    ranges, ts = (_row(p, head, 1).tolist() for p in (modulator.ranges, modulator.ts))
    found = {}
    for n in range(modulator.order):
        found |= {f"b_{n + 1}": ranges[2 * n], f"d_{n + 1}": ranges[2 * n + 1]}
        found |= {f"t_b{n + 1}": ts[2 * n], f"t_d{n + 1}": ts[2 * n + 1]}
    if modulator.affine is not None:
        found |= {name: _row(getattr(modulator, name), head, 0).item() for name in ("scale", "shift")}
    return found


def _index(name: str) -> tuple[str, int]:
    """``t_b2`` is the ``t_b`` of order 2."""
    kind, n = re.fullmatch(r"(b|d|t_b|t_d)_?(\d+)", name).groups()
    return kind, int(n)


def _row(parameter: Tensor, head: int, own_dims: int) -> Tensor:
    parameter = parameter.detach()
    return parameter if parameter.ndim == own_dims else parameter[head % len(parameter)]


@torch.no_grad()
def _with_scalars(modulator: MultiMax, head: int, moved: Mapping[str, float]) -> MultiMax:
    """A copy in which some scalars, of one head where it has one each, have other values."""
    made = copy.deepcopy(modulator)
    for name, value in moved.items():
        if name in ("scale", "shift"):
            _row(getattr(made, name), head, 0).fill_(value)
        else:
            kind, n = _index(name)
            own = _row(made.ts if kind.startswith("t") else made.ranges, head, 1)
            own[2 * (n - 1) + kind.endswith("d")] = value
    return made


@torch.no_grad()
def _curve(modulator: MultiMax, points: Tensor, head: int) -> Tensor:
    """sigma of one head, ``[points]``."""
    x = points.to(modulator.ranges.device)
    if modulator.num_heads is None:
        return modulator.modulate(x).cpu()
    return modulator.modulate(x.expand(modulator.num_heads, 1, -1))[head % modulator.num_heads, 0].cpu()


def _in_heads(scores: Tensor, weights: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """``[heads, queries, keys]`` each; windows of an image count as heads. A sink, one more entry, is left out."""
    weights = weights[..., : scores.shape[-1]]
    keep = torch.ones_like(scores, dtype=torch.bool) if keep is None else keep[..., : scores.shape[-1]]
    keep = keep.expand(scores.shape) & (scores > -math.inf)
    return tuple(part.reshape(-1, *part.shape[-2:]) for part in (scores, weights, keep))


def _histogram(scores: Tensor, keep: Tensor) -> tuple[list[float], list[float], Tensor]:
    """Edges and counts of the kept scores, and the points at which sigma is drawn: where all but a few scores lie."""
    histogram = ScoreHistogram(1)
    histogram.add(scores[None, None], keep[None, None])
    edges, counts = histogram.coarse(64)
    if not edges:
        return [], [], torch.linspace(-5.0, 5.0, 121)
    low, high = histogram.quantiles((0.002, 0.998))
    middle, half = (low + high) / 2, max(1.0, 0.55 * (high - low))
    return edges, counts, torch.linspace(middle - half, middle + half, 121)


def _measures(x: Tensor, p: Tensor, keep: Tensor) -> dict[str, float]:
    """Means over the rows of one head, ``[queries, keys]`` each."""
    return {
        "sparsity": sparsity(x, p, mask=keep).value,
        "multi-modality": multi_modality(x, p, mask=keep).value,
        "entropy [nats]": entropy(p, mask=keep).value,
        "exact zeros": exact_zeros(p, mask=keep).value,
    }


def _patches(count: int) -> list[str]:
    """Names of patches, a square of them behind some other tokens."""
    side = math.isqrt(count)
    extra = count - side * side
    if extra > 4:
        return [str(index) for index in range(count)]
    return [f"token {index}" for index in range(extra)] + [
        f"patch {index // side + 1}, {index % side + 1}" for index in range(side * side)
    ]


def _fitting(names: Sequence[str], count: int) -> list[str]:
    """The names, or numbers where they do not fit."""
    return list(names) if len(names) == count else [str(index) for index in range(count)]
