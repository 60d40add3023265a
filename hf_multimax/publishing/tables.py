"""The tables of a card, ``{"header": [...], "rows": [[...]]}``: formatted figures of results.json, learned scalars."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from hf_multimax.publishing.results import NOTHING, Results, metric_label, one_line
from hf_multimax.publishing.subject import Subject, modulator_of

__all__ = ["arms", "costs", "measures", "modulators", "scores"]


def arms(results: Results) -> dict[str, Any]:
    """What each arm of a comparison is."""
    rows = []
    for arm in results.arms.values():
        settings = ", ".join(f"`{key}={one_line(value)}`" for key, value in arm.overrides.items())
        facts = arm.runs[0]["model"] if arm.runs else {}
        counts = [f"{facts[key]:,}" if key in facts else NOTHING for key in ("parameters", "multimax_parameters")]
        rows.append([_code(arm.name), settings or NOTHING, *counts])
    return {"header": ["arm", "settings", "parameters", "of these the normaliser's"], "rows": rows}


def scores(results: Results) -> dict[str, Any]:
    """Every metric of every arm; of a comparison the difference to the reference, too."""
    columns = {metric_label(metric): _measured(results, metric) for metric in results.metrics}
    if results.is_comparison:
        columns["difference"] = results.difference
        columns |= {"p": results.p_value} if results.has_p_values else {}
        columns |= {"verdict": results.verdict, "seeds": results.seeds}
    return _by_arm(results, columns)


def costs(results: Results) -> dict[str, Any]:
    """Time of a step and memory of every arm, with ratios to the reference of a comparison."""
    processor = "processor " if results.step_time == "cpu_seconds_per_step" else ""
    time, memory = f"{processor}seconds per step", "peak memory, MB"
    if not results.is_comparison:
        return _by_arm(results, {time: results.step_seconds, memory: results.peak_megabytes})
    columns = {
        time: results.step_seconds,
        "time ratio": lambda arm: results.ratio(arm, results.step_time),
        memory: results.peak_megabytes,
        "memory ratio": lambda arm: results.ratio(arm, "peak_bytes"),
    }
    return _by_arm(results, columns)


def modulators(subject: Subject | None, results: Results | None) -> list[dict[str, Any]]:
    """The scalars of the model's layers; without a model, of the first run of every arm that has some."""
    if subject:
        found = {"The learned scalars of every layer.": subject.layers}
    else:
        found = {
            f"The learned scalars of {_code(arm.name)}, seed {run['seed']}.": {
                layer: modulator_of(values) for layer, values in run.get("layers", {}).items()
            }
            for arm in results.arms.values()
            for run in arm.runs[:1]
        }
    tables = [{"title": title, **_modulator_table(layers)} for title, layers in found.items() if any(layers.values())]
    for table in tables:
        if any("…" in cell for row in table["rows"] for cell in row):
            table["title"] += " Each head has its own: the lowest and the highest."
    return tables


def measures(results: Results) -> dict[str, Any] | None:
    """Sparsity and multi-modality of every layer, arm beside arm, in the first run of each; None if not measured."""
    runs = {arm.name: arm.runs[0] for arm in results.arms.values() if arm.runs}
    measured = {name: layers for name, run in runs.items() if (layers := _measured_layers(run))}
    layers = dict.fromkeys(layer for found in measured.values() for layer in found)
    if not layers:
        return None
    seeds = ", ".join(str(seed) for seed in sorted({runs[name]["seed"] for name in measured}))
    return {
        "title": "Sparsity / multi-modality of the attention (the paper's Definitions 3.3 and 3.2, between 0 and 1), "
        f"on evaluation data, seed {seeds}.",
        "header": ["layer", *map(_code, measured)],
        "rows": [[_code(layer), *(found.get(layer, NOTHING) for found in measured.values())] for layer in layers],
    }


def _by_arm(results: Results, columns: Mapping[str, Callable[[str], str]]) -> dict[str, Any]:
    rows = [[_code(arm), *(column(arm) for column in columns.values())] for arm in results.arms]
    return {"header": ["arm", *columns], "rows": rows}


def _measured(results: Results, metric: str) -> Callable[[str], str]:
    return lambda arm: results.measured(arm, metric)


def _modulator_table(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    cells = {layer: _scalars(values) for layer, values in layers.items() if values}
    columns = list(dict.fromkeys(column for row in cells.values() for column in row))
    rows = [[_code(layer), *(row.get(column, NOTHING) for column in columns)] for layer, row in cells.items()]
    return {"header": ["layer", *columns], "rows": rows}


def _scalars(values: Mapping[str, Any]) -> dict[str, str]:
    """A cell for each scalar of a layer, named as in the paper: b1, d1, ..., t_b1, t_d1, ..."""
    cells = {}
    for key, value in values.items():
        scalars = torch.tensor(value, dtype=torch.float64)
        if key in ("ranges", "ts"):
            prefix = "t_" if key == "ts" else ""
            for index, scalar in enumerate(scalars.unbind(-1)):
                cells[f"{prefix}{'bd'[index % 2]}{index // 2 + 1}"] = _extent(scalar)
        else:
            cells[key] = _extent(scalars)
    return cells


def _extent(scalars: torch.Tensor) -> str:
    if scalars.ndim == 0:
        return f"{scalars.item():.4f}"
    return f"{scalars.min().item():.4f} … {scalars.max().item():.4f}"


def _measured_layers(run: Mapping[str, Any]) -> dict[str, str]:
    """``sparsity / multi-modality`` of each layer of a run that has them."""
    layers = {}
    for layer, values in run.get("layers", {}).items():
        pair = [values.get("sparsity"), values.get("multi_modality")]
        if any(value is not None for value in pair):
            layers[layer] = " / ".join(NOTHING if value is None else f"{value:.3f}" for value in pair)
    return layers


def _code(name: str) -> str:
    return f"`{one_line(name)}`"
