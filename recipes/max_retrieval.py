"""The task of "softmax is not enough" (arXiv:2410.01104): retrieve the maximum of a set, ever larger than in training.

    python -m recipes.max_retrieval [--functions softmax multimax ...] [--seeds 3] [--steps 2000] [--out DIR]

An item has a priority, uniform in [0, 1], and one of ten classes; the class of the item of highest priority is asked
for. One attention head over the items, between two small networks, is trained on sets of 5 to 16 items and tested on
up to 16,384: SoftMax must spread its weight over so many. Adaptive temperature acts on the model trained with SoftMax,
as its authors do; every other function is trained with. Writes ``results.json``, ``table.md`` and, where matplotlib
is installed, ``figure.png``.
"""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from hf_multimax import MultiMaxConfig, Normalizer, build_normalizer
from hf_multimax.plots.style import COLORS, MARKERS, new_figure
from hf_multimax.publishing.results import Figure, with_spread
from recipes.shared.record import RESULTS, over_seeds, write_json
from recipes.shared.table import markdown

logger = logging.getLogger(__name__)

CLASSES = 10
#: label -> fields of MultiMaxConfig. fusedmax and oscarmax are far weaker here than by default: what they fuse gets no
#: gradient, and scores start so close together that the default fuses all of them for good.
FUNCTIONS: dict[str, dict[str, Any]] = {
    "softmax": {"normalizer": "softmax"},
    "multimax": {"normalizer": "multimax", "init": "paper"},
    "multimax, order 1": {"normalizer": "multimax", "init": "paper", "order": 1},
    "sparsemax": {"normalizer": "sparsemax"},
    "entmax15": {"normalizer": "entmax15"},
    "entmax, learned alpha": {"normalizer": "entmax", "normalizer_kwargs": {"learn": True}},
    "fusedmax, lam 0.01": {"normalizer": "fusedmax", "normalizer_kwargs": {"lam": 0.01}},
    "oscarmax, beta 0.001": {"normalizer": "oscarmax", "normalizer_kwargs": {"beta": 0.001}},
    "rsoftmax, 0.5": {"normalizer": "rsoftmax"},
    "tsoftmax, t 4": {"normalizer": "tsoftmax", "normalizer_kwargs": {"t": 4.0}},
    "evsoftmax": {"normalizer": "evsoftmax"},
    "topk_softmax, k 4": {"normalizer": "topk_softmax", "normalizer_kwargs": {"k": 4}},
    "scalable_softmax": {"normalizer": "scalable_softmax"},
    "adaptive_temperature": {"normalizer": "adaptive_temperature"},
    "asentmax": {"normalizer": "asentmax"},
    "softpick": {"normalizer": "softpick"},
    "softmax1": {"normalizer": "softmax1"},
    "sigmoid": {"normalizer": "sigmoid"},
}
#: Functions that act on a model trained with another one.
ON_TOP_OF = {"adaptive_temperature": "softmax"}


@dataclass(frozen=True)
class Settings:
    """Everything that a run depends on."""

    functions: tuple[str, ...]
    seeds: int = 3
    steps: int = 2000
    batch_size: int = 128
    width: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 1e-3
    smallest: int = 5
    largest: int = 16
    test_lengths: tuple[int, ...] = tuple(2**k for k in range(4, 15))
    test_sets: int = 128
    device: str = "cpu"


class Retriever(nn.Module):
    """Items and a query through a small network each, one attention head, and a network on what it retrieves."""

    def __init__(self, width: int, normalizer: Normalizer) -> None:
        super().__init__()
        self.items = nn.Sequential(nn.Linear(1 + CLASSES, width), nn.GELU(), nn.Linear(width, width))
        self.asker = nn.Sequential(nn.Linear(1, width), nn.GELU(), nn.Linear(width, width))
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.reader = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, CLASSES))
        self.normalizer = normalizer

    def forward(self, items: Tensor, question: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Items ``[B, n, 1 + classes]``, question ``[B, 1]`` and mask ``[B, n]`` to logits and weights ``[B, n]``."""
        hidden, query = self.items(items), self.query(self.asker(question))
        scores = torch.einsum("bd,bnd->bn", query, self.key(hidden)) * query.shape[-1] ** -0.5
        weights = self.normalizer(scores, -1, keep)
        retrieved = torch.einsum("bn,bnd->bd", weights, self.value(hidden))
        return self.reader(retrieved), weights


def draw_sets(sets: int, n: int, generator: torch.Generator, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Items, question, priorities and classes of random sets of ``n`` items."""
    priority = torch.rand(sets, n, generator=generator)
    kind = torch.randint(CLASSES, (sets, n), generator=generator)
    question = torch.rand(sets, 1, generator=generator)
    items = torch.cat([priority[..., None], one_hot(kind, CLASSES).float()], dim=-1)
    return items.to(device), question.to(device), priority.to(device), kind.to(device)


def train(label: str, seed: int, settings: Settings) -> Retriever:
    """A model trained with the function ``label`` on sets of the training sizes."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Retriever(settings.width, _normalizer(label)).to(settings.device).train()
    own = list(model.normalizer.parameters())
    rest = [p for p in model.parameters() if not any(p is q for q in own)]
    groups = [{"params": rest}, {"params": own, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    for step in range(settings.steps):
        items, question, priority, kind = draw_sets(settings.batch_size, settings.largest, generator, settings.device)
        sizes = torch.randint(settings.smallest, settings.largest + 1, (settings.batch_size, 1), generator=generator)
        keep = torch.arange(settings.largest, device=settings.device) < sizes.to(settings.device)
        logits, _ = model(items, question, keep)
        loss = cross_entropy(logits, _answer(priority, kind, keep))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 500 == 0:
            logger.info("%s, seed %d, step %d: loss %.3f", label, seed, step, loss.item())
    return model


@torch.no_grad()
def evaluate(model: Retriever, n: int, settings: Settings) -> dict[str, float]:
    """Accuracy, the weight of the maximum and of the largest weight, and exact zeros, on sets of ``n`` items."""
    model.eval()
    generator = torch.Generator().manual_seed(10_000 + n)
    sums: dict[str, float] = {}
    left = settings.test_sets
    while left > 0:
        sets = min(left, max(1, 2**16 // n))
        items, question, priority, kind = draw_sets(sets, n, generator, settings.device)
        keep = torch.ones_like(priority, dtype=torch.bool)
        logits, weights = model(items, question, keep)
        batch = {
            "accuracy": (logits.argmax(-1) == _answer(priority, kind, keep)).double().sum(),
            "weight_of_maximum": weights.gather(1, priority.argmax(-1, keepdim=True)).double().sum(),
            "largest_weight": weights.amax(-1).double().sum(),
            "zeros": (weights == 0).double().mean(-1).sum(),
        }
        sums = {name: sums.get(name, 0.0) + value.item() for name, value in batch.items()}
        left -= sets
    return {name: value / settings.test_sets for name, value in sums.items()}


def run(settings: Settings) -> list[dict[str, Any]]:
    """Every function, seed and length; one row each."""
    rows = []
    for seed in range(settings.seeds):
        trained: dict[str, Retriever] = {}
        for label in settings.functions:
            base = ON_TOP_OF.get(label, label)
            if base not in trained:
                trained[base] = train(base, seed, settings)
            model, normalizer = trained[base], trained[base].normalizer
            if base != label:
                model.normalizer = _normalizer(label).to(settings.device)
            for n in settings.test_lengths:
                rows.append({"function": label, "seed": seed, "items": n, **evaluate(model, n, settings)})
            model.normalizer = normalizer
            last = rows[-1]
            logger.info("%s, seed %d: accuracy %.3f at %d items", label, seed, last["accuracy"], last["items"])
    return rows


def table(rows: Sequence[dict[str, Any]], measure: str) -> str:
    """A Markdown table of one measure, mean and standard deviation over the seeds: functions down, lengths across."""
    figures = _over_seeds(rows, measure)
    cells = [[label, *(with_spread(figure, 3) for figure in of.values())] for label, of in figures.items()]
    return markdown([[measure, *map(str, next(iter(figures.values())))], *cells])


def plot(rows: Sequence[dict[str, Any]], path: Path, largest: int) -> None:
    """Accuracy and the weight of the maximum against the number of items; needs matplotlib.

    Each row of panels has SoftMax and at most six other functions.
    """
    measures = {measure: _over_seeds(rows, measure) for measure in ("accuracy", "weight_of_maximum")}
    labels = list(measures["accuracy"])
    first, others = labels[0], labels[1:]
    count = max(1, -(-len(others) // 6))
    groups = [[first, *others[index::count]] for index in range(count)]
    drawing = new_figure(10, 0.5 + 3.0 * count)
    panels = drawing.subplots(count, 2, squeeze=False)
    for axes, group in zip(panels, groups):
        for axis, (measure, figures) in zip(axes, measures.items()):
            for i, label in enumerate(group):
                of = figures[label]
                # black, the last colour, is the first function's
                style = {"linewidth": 4.0 - 0.45 * i, "color": COLORS[i - 1], "marker": MARKERS[i], "ms": 6.5 - 0.5 * i}
                axis.plot(list(of), [figure.mean for figure in of.values()], label=label, **style)
            axis.axvline(largest, color="grey", linewidth=0.8, linestyle=":")
            axis.set(xlabel="items in the set", ylabel=measure.replace("_", " "), ylim=(-0.02, 1.02))
            axis.set_xscale("log", base=2)
        axes[0].annotate("training sizes end", (largest, 0.0), fontsize=8, color="grey")
        axes[1].legend(fontsize=8, frameon=False)
    drawing.savefig(path, dpi=110)


def _over_seeds(rows: Sequence[dict[str, Any]], measure: str) -> dict[str, dict[int, Figure]]:
    """A measure of each function, by the number of items, from few to many."""
    values: dict[str, dict[int, list[float]]] = {}
    for row in sorted(rows, key=lambda row: row["items"]):
        values.setdefault(row["function"], {}).setdefault(row["items"], []).append(row[measure])
    order = dict.fromkeys(row["function"] for row in rows)
    return {label: {n: over_seeds(of_n) for n, of_n in values[label].items()} for label in order}


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--functions", nargs="+", default=list(FUNCTIONS), choices=list(FUNCTIONS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=Settings.seeds)
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--device", default=Settings.device)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; the model is small")
    parser.add_argument("--out", type=Path, default=Path("runs/max_retrieval"))
    parser.add_argument("--tiny", action="store_true", help="a few steps and short sets, to see that everything runs")
    parser.add_argument("--no-figure", dest="figure", action="store_false")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    settings = Settings(tuple(options.functions), options.seeds, options.steps, device=options.device)
    if options.tiny:
        settings = Settings(settings.functions, 1, 5, 8, 16, test_lengths=(16, 64), test_sets=4, device=options.device)
    rows = run(settings)
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / RESULTS, {"settings": asdict(settings), "rows": rows})
    tables = "\n\n".join(table(rows, measure) for measure in ("accuracy", "weight_of_maximum", "zeros"))
    (options.out / "table.md").write_text(tables + "\n", encoding="utf-8")
    print(tables)
    if options.figure and find_spec("matplotlib"):
        plot(rows, options.out / "figure.png", settings.largest)
    return rows


def _normalizer(label: str) -> Normalizer:
    return build_normalizer(MultiMaxConfig(**FUNCTIONS[label]), None)


def _answer(priority: Tensor, kind: Tensor, keep: Tensor) -> Tensor:
    """The class of the item of highest priority."""
    return kind.gather(1, priority.masked_fill(~keep, -1.0).argmax(-1, keepdim=True)).squeeze(1)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
