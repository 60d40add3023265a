"""``inspect``, ``measure`` and ``compare``: what a model learned and does, in numbers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import hf_multimax
from hf_multimax import plots
from hf_multimax.command_line import screen
from hf_multimax.command_line.data import batches
from hf_multimax.command_line.loading import Loaded, check_patched, load, new_folder
from hf_multimax.command_line.options import DataOptions, Device, Json, ModelPath, Revision
from hf_multimax.diagnostics import LayerMeasures, measure_models, modulator_curve, same_weight
from hf_multimax.models.patching import OUTPUT
from hf_multimax.normalizers.base import MultiMax, named_normalizers
from hf_multimax.publishing.card import layer_modulators

__all__ = ["compare", "inspect", "load_telling", "measure", "measured_on", "plain"]

Probability = Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Reference probability s; default 1/n.")]

_COLUMNS = {
    "sparsity": "sparsity",
    "multi_modality": "multi-modality",
    "entropy": "entropy [nats]",
    "topk_mass": "top-8 mass",
    "exact_zeros": "exact zeros",
    "entries_above": "entries > 1 %",
}
_QUANTILES = (0.05, 0.5, 0.95)


def inspect(
    path: ModelPath,
    data: DataOptions,
    device: Device = "cpu",
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Show the learned scalars of every layer, and what they do to the model's own scores.

    For each layer: what sigma makes of the scores at their 5, 50 and 95 % quantiles. Named are layers whose sigma rises
    again for small scores (or falls for large ones): there a smaller score weighs more.
    """
    loaded = load_telling(path, revision, device)
    check_patched(loaded)
    if data.data is None and (loaded.takes_images or loaded.tokenizer is None):
        layers: dict[str, LayerMeasures] = {}
    else:
        layers = measured_on([loaded], data)[0]
    found = _scalars(loaded, layers)
    if as_json:
        screen.show_json({"path": path, "class": loaded.class_name, "layers": found})
        return
    columns = ("layer", "normalizer", "ranges", "ts", *(f"sigma at {q:.0%}" for q in _QUANTILES))
    rows = []
    for name, layer in found.items():
        texts = [_list(layer.get(key)) for key in ("ranges", "ts")]
        others = {key: value for key, value in layer["parameters"].items() if key not in ("ranges", "ts")}
        if others:
            texts[1] += ("; " if texts[1] else "") + ", ".join(f"{key} {_list(value)}" for key, value in others.items())
        ends = [f"{screen.number(x, 2)} → {screen.number(y, 2)}" for x, y in layer["sigma"]] or ["-"] * len(_QUANTILES)
        rows.append((name, layer["normalizer"], *texts, *ends))
    screen.show_table(f"{path} ({loaded.class_name})", columns, rows, left=4)
    for name, layer in found.items():
        for text in layer["falls_in_words"]:
            screen.say(f"{name}: {text}")
    if not layers:
        screen.say("Give --data to see what they do to scores.")


def measure(
    path: ModelPath,
    data: DataOptions,
    heads: Annotated[bool, typer.Option("--heads", help="One row for each head.")] = False,
    s: Probability = None,
    device: Device = "cpu",
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Measure sparsity, multi-modality and more of every attention layer and of the output distribution.

    A stock model is measured, too, with its SoftMax. Memory does not grow with the amount of data.
    """
    loaded = load_telling(path, revision, device)
    (layers,) = measured_on([loaded], data, s=s)
    if as_json:
        values = {name: layer.to_dict() for name, layer in layers.items()}
        screen.show_json({"path": path, "class": loaded.class_name, "layers": values})
        return
    rows = []
    for name, layer in layers.items():
        rows.append((name, *(screen.number(layer.measures[key].value) for key in _COLUMNS)))
        if heads and len(layer.heads) > 1:
            for index, head in enumerate(layer.heads):
                rows.append((f"  head {index}", *(screen.number(head[key].value) for key in _COLUMNS)))
    screen.show_table(f"{path} ({loaded.class_name})", ("layer", *_COLUMNS.values()), rows)
    first = next(iter(layers.values())).measures["sparsity"]
    if first.s is not None:
        screen.say(f"Reference probability of sparsity: {'1/n, here ' if s is None else ''}{first.s:.4g} on average.")
    skipped = sum(layer.measures["multi_modality"].undefined for layer in layers.values())
    if skipped:
        screen.say(f"Multi-modality is not defined in {skipped} rows, which have no relevant entry beside the largest.")


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="A model or an adapter.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    data: DataOptions,
    s: Probability = None,
    out: Annotated[Path | None, typer.Option(help="A folder for figures of both.")] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Measure two models on the same batches, with the same reference probability. The data are prepared as A's."""
    if out is not None:
        new_folder(out)
    both = [load_telling(path, None, device) for path in (a, b)]
    vocabularies = [loaded.tokenizer.get_vocab() for loaded in both if loaded.tokenizer is not None]
    if len(vocabularies) == 2 and vocabularies[0] != vocabularies[1]:
        raise ValueError(f"{a} and {b} have different vocabularies: they cannot be given the same batches")
    measured = measured_on(both, data, s=s)
    names = [name for name in measured[0] if name in measured[1]]
    if not names:
        raise ValueError(f"{a} and {b} have no layer in common: {next(iter(measured[0]))}, {next(iter(measured[1]))}")
    if as_json:
        parts = ({name: layer.to_dict() for name, layer in layers.items()} for layers in measured)
        screen.show_json({label: {"path": path, "layers": part} for label, path, part in zip("ab", (a, b), parts)})
    else:
        rows = []
        for name in names:
            row = [name]
            for key in ("sparsity", "multi_modality", "entropy", "exact_zeros"):
                row += [screen.number(layers[name].measures[key].value) for layers in measured]
            rows.append(row)
        columns = [
            f"{_COLUMNS[key]} {x}" for key in ("sparsity", "multi_modality", "entropy", "exact_zeros") for x in "AB"
        ]
        screen.show_table(f"A: {a}, B: {b}", ("layer", *columns), rows)
    if out is not None:
        figure = plots.plot_measures({label: plain(part) for label, part in zip((a, b), measured)})
        plots.save(figure, out / "measures.png")


def load_telling(path: str, revision: str | None, device: str) -> Loaded:
    with screen.working(f"loading {path}"):
        return load(path, revision, device)


def measured_on(models: list[Loaded], data: DataOptions, **options: Any) -> list[dict[str, LayerMeasures]]:
    found = batches(models[0], data.data, data.batch_size, data.length, data.batches)
    named = {str(index): loaded.model for index, loaded in enumerate(models)}
    measured = measure_models(named, screen.progress("measuring", found, None), **options)
    return list(measured.values())


def plain(layers: Mapping[str, LayerMeasures]) -> dict[str, dict[str, Any]]:
    return {name: layer.to_dict() for name, layer in layers.items()}


def _scalars(loaded: Loaded, layers: Mapping[str, LayerMeasures]) -> dict[str, dict[str, Any]]:
    """What a layer learned and does, by layer, as ``inspect --json`` writes it."""
    normalizers, found = dict(named_normalizers(loaded.model)), {}
    for name, values in layer_modulators(loaded.model).items():
        normalizer = normalizers[name]
        measured = layers.get("output" if name.endswith(OUTPUT) else name)
        entry: dict[str, Any] = {
            "normalizer": hf_multimax.diagnostics.models.normalizer_name(normalizer),
            "parameters": values,
            "ranges": values.get("ranges"),
            "ts": values.get("ts"),
            "quantiles": None,
            "sigma": [],
            "falls": [],
            "falls_in_words": [],
        }
        if measured is not None:
            at = measured.scores.quantiles(_QUANTILES)
            entry["quantiles"] = dict(zip(("0.05", "0.5", "0.95"), at))
            entry["falls"] = measured.to_dict()["falls"]
            if isinstance(normalizer, MultiMax):
                curve = modulator_curve(normalizer, torch.tensor(at)).reshape(-1, len(at)).mean(0)
                entry["sigma"] = list(zip(at, curve.tolist()))
                entry["falls_in_words"] = _in_words(normalizer, measured)
        found[name] = entry
    return found


def _in_words(normalizer: MultiMax, measured: LayerMeasures) -> list[str]:
    """A sentence for every stretch on which sigma falls and scores lie."""
    sentences = []
    for fall, share in measured.falls:
        head = "" if fall.head is None else f"head {fall.head}: "
        low, high = measured.scores.quantiles((0.001, 0.999), fall.head)
        if share < 1e-3:
            continue
        if fall.low == float("-inf"):
            text = f"{head}sigma rises again below {fall.high:.2f}, where {share:.1%} of the scores lie"
            twin = same_weight(normalizer, low, fall.head)
            if twin is not None:
                text += f": {low:.2f} weighs as {twin:.2f}"
        elif fall.high == float("inf"):
            text = f"{head}sigma falls above {fall.low:.2f}, where {share:.1%} of the scores lie"
        else:
            text = f"{head}sigma falls from {fall.low:.2f} to {fall.high:.2f}, where {share:.1%} of the scores lie"
        sentences.append(text)
    return sentences


def _list(value: Any) -> str:
    """Numbers for a table; of many heads how many there are."""
    if value is None:
        return ""
    if isinstance(value, list) and value and isinstance(value[0], list):
        return f"{len(value)} heads"
    return " ".join(f"{x:.2f}" for x in (value if isinstance(value, list) else [value]))
