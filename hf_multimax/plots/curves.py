"""How the scalars and the measures of every layer moved in training."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hf_multimax.plots.style import new_grid, ordered_colors, saved

__all__ = ["plot_training"]

_NAME = re.compile(r"multimax/(?P<layer>.+)/(?P<entry>[^/]+)")
_TITLES = {"sparsity": "sparsity", "multi_modality": "multi-modality", "entropy": "entropy [nats]"}


def plot_training(history: Iterable[Mapping[str, Any]], path: str | Path | None = None) -> Any:
    """Draw what :class:`hf_multimax.MultiMaxCallback` logged over the steps, a panel a quantity and a line a layer.

    Args:
        history: ``trainer.state.log_history``.
        path: where to save the figure, by its ending; None does not save.

    Returns:
        The matplotlib figure; of parameters per head the mean over heads.

    Raises:
        ImportError: without matplotlib. ValueError: if the history holds nothing of MultiMax.
    """
    panels: dict[str, dict[str, dict[int, list[float]]]] = {}
    for entry in history:
        for key, value in entry.items():
            found = _NAME.fullmatch(key)
            if found:
                name = re.sub(r"_?head\d+$", "", found["entry"])
                layers = panels.setdefault(name, {})
                layers.setdefault(found["layer"], {}).setdefault(entry["step"], []).append(value)
    if not panels:
        raise ValueError("the history holds nothing of MultiMax: was MultiMaxCallback there?")
    order = sorted(panels, key=lambda name: (name in _TITLES, name))
    figure, grid = new_grid(len(order), 4, panel=(2.7, 2.0), margins=(1.0, 0.5))
    names = list(dict.fromkeys(layer for layers in panels.values() for layer in layers))
    colors, mappable = ordered_colors(len(names))
    for axes, quantity in zip(grid, order):
        for layer, points in panels[quantity].items():
            at = [sum(values) / len(values) for values in points.values()]
            index = names.index(layer)
            # later layers are thinner, so that a line over another leaves it to be seen
            width = 2.6 - 1.6 * index / max(1, len(names) - 1)
            axes.plot(list(points), at, color=colors[index], linewidth=width, marker="o", ms=width + 1, label=layer)
        axes.set_title(_TITLES.get(quantity, quantity), fontsize="small")
        axes.tick_params(labelsize="small")
    figure.supxlabel("step", fontsize="medium")
    if len(names) <= 10:
        handles = {label: line for axes in grid for line, label in zip(*axes.get_legend_handles_labels())}
        figure.legend(handles.values(), handles, loc="outside right upper", fontsize="x-small", frameon=False)
    else:
        figure.colorbar(mappable, ax=grid, label="layer, from the first to the last")
    return saved(figure, path)
