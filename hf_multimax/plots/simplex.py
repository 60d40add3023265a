"""The simplex of three entries: where every function sends the same scores (paper, figure 1)."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_multimax.functional import multimax
from hf_multimax.normalizers.registry import get_normalizer, normalize, registered_normalizers
from hf_multimax.plots.style import COLORS, new_grid, saved

__all__ = ["plot_simplex"]

#: A modulator that pushes small scores down and draws large ones together, in place of a trained one.
_EXAMPLE = {"ranges": [0.0, 1.0, 0.0, 1.0], "ts": [-2.0, -0.9, 0.0, 0.0]}

#: Options of functions that have no default.
_REQUIRED = {"topk_softmax": {"k": 2}, "tsoftmax": {"t": 2.0}}


@torch.no_grad()
def plot_simplex(
    functions: Mapping[str, Mapping[str, Any]] | None = None,
    modulator: Mapping[str, list[float]] | None = None,
    path: str | Path | None = None,
) -> Any:
    """Draw where functions send scores of three entries: inside there are three modes, on edges two, in corners one.

    The scores are a grid of ``(a, b, 0)``, a and b from -2.5 to 2.5, as dark as their largest difference is small.

    Args:
        functions: ``{registered name: options}``; None for every function that comes with the package.
        modulator: ``ranges`` and ``ts`` of ``"multimax"``, ``[2N]`` each, for instance of a trained layer; None for
            an example.
        path: where to save the figure, by its ending; None does not save.

    Returns:
        The matplotlib figure, a panel a function.

    Raises:
        ImportError: without matplotlib. ValueError: for an unknown function, or one whose options are incomplete.
    """
    if functions is None:
        built_in = [name for name in registered_normalizers() if get_normalizer(name).citation]
        functions = {name: _REQUIRED.get(name, {}) for name in built_in}
    values = modulator or _EXAMPLE
    axis = torch.linspace(-2.5, 2.5, 21)
    a, b = torch.meshgrid(axis, axis, indexing="ij")
    x = torch.stack([a.flatten(), b.flatten(), torch.zeros(a.numel())], dim=-1)
    spread = x.amax(-1) - x.amin(-1)
    figure, panels = new_grid(len(functions), 5, panel=(2.1, 2.0), margins=(0.6, 0.7))
    points = None
    for axes, (name, options) in zip(panels, functions.items()):
        if name == "multimax" and not options:
            p = multimax(x, torch.tensor(values["ranges"]), torch.tensor(values["ts"]))
        else:
            p = normalize(name, x, **options)
        corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(0.75)]])
        axes.fill(*corners.T, facecolor="none", edgecolor="0.6", linewidth=0.8)
        at = p @ corners
        points = axes.scatter(*at.T, c=spread, s=7, cmap="cividis", clip_on=False, linewidths=0, zorder=3)
        title = name + "".join(f", {key}={value}" for key, value in options.items())
        color = COLORS[1] if name == "multimax" else "black"
        axes.set_title(f"{title}\n{_shares(p)}", fontsize="x-small", color=color)
        axes.set(aspect="equal", xlim=(-0.05, 1.05), ylim=(-0.06, 0.92))
        axes.axis("off")
    figure.suptitle(
        "Distributions over three entries: three modes inside, two on edges, one in corners", fontsize="medium"
    )
    figure.colorbar(points, ax=panels, label="largest difference of scores", shrink=0.6)
    return saved(figure, path)


def _shares(p: Tensor) -> str:
    """How much of the grid is on edges or in corners: has an entry of exactly 0."""
    return f"{float((p == 0).any(-1).double().mean()):.0%} with zeros"
