"""Sparsity against multi-modality of every layer, beside SoftMax of the same scores and beside other models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_multimax.plots.style import COLORS, MARKERS, new_figure, saved

__all__ = ["plot_measures"]


def plot_measures(models: Mapping[str, Mapping[str, Mapping[str, Any]]], path: str | Path | None = None) -> Any:
    """Draw sparsity against multi-modality, a point a layer with its number; hollow is SoftMax of the same scores.

    Args:
        models: ``{name: layers}``, layers being what :meth:`hf_multimax.diagnostics.LayerMeasures.to_dict` gives, by
            layer; seven models at most. A layer whose measures are not defined is left out.
        path: where to save the figure, by its ending; None does not save.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: without matplotlib.
        ValueError: for no model, more than seven, or no layer with both measures.
    """
    if not 1 <= len(models) <= len(COLORS):
        raise ValueError(f"between one and {len(COLORS)} models can be told apart in one figure, got {len(models)}")
    figure = new_figure(6.4, 4.6)
    axes = figure.subplots()
    numbers: dict[str, str] = {}
    drawn = 0
    for index, (color, marker, (name, layers)) in enumerate(zip(COLORS, MARKERS, models.items())):
        size = 6 + 2.5 * (len(models) - 1 - index)  # of two in one place both are seen
        labelled = twin_labelled = False
        for layer, values in layers.items():
            point, twin = _point(values["measures"]), _point(values.get("softmax") or {})
            if point is None:
                continue
            number = numbers.setdefault(layer, "out" if layer == "output" else str(len(numbers)))
            if twin is not None:
                axes.plot(*zip(twin, point), color=color, linewidth=0.7, alpha=0.6)
                label = None if twin_labelled else f"{name}: SoftMax of the same scores"
                axes.plot(*twin, marker, mfc="white", mec=color, ms=size, label=label)
                twin_labelled = True
            axes.plot(*point, marker, color=color, ms=size + 1, label=None if labelled else name)
            axes.annotate(number, point, xytext=(5, 4), textcoords="offset points", fontsize="x-small", color=color)
            labelled, drawn = True, drawn + 1
    if not drawn:
        raise ValueError("no layer has both measures: give more data")
    axes.set(xlabel="sparsity", ylabel="multi-modality", title="Sparsity and multi-modality of every layer")
    axes.margins(0.08)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    names = [f"{number} {layer}" for layer, number in numbers.items() if number != "out"]
    if 0 < len(names) <= 12:
        axes.text(1.02, 1.0, "\n".join(names), transform=axes.transAxes, va="top", fontsize="x-small", color="0.3")
    return saved(figure, path)


def _point(measures: Mapping[str, Any]) -> tuple[float, float] | None:
    values = []
    for name in ("sparsity", "multi_modality"):
        value = measures.get(name)
        value = value.get("value") if isinstance(value, Mapping) else value
        if value is None or value != value:
            return None
        values.append(value)
    return values[0], values[1]
