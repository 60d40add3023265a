"""Figures of modulators: what they do to scores, and to the distribution over them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hf_multimax.functional import modulate
from hf_multimax.normalizers.base import Normalizer
from hf_multimax.normalizers.registry import normalize
from hf_multimax.plots.style import COLORS, new_figure, new_grid, ordered_colors, saved, short_names

__all__ = ["plot_modulators", "plot_modulators_on_scores", "plot_normalizer"]

#: More lines than this get a colour bar instead of a legend.
_LEGEND = 10


def plot_normalizer(normalizer: Normalizer, scores: torch.Tensor, path: str | Path | None = None) -> Any:
    """Draw sigma beside the identity, and the distribution over ``scores`` beside those of SoftMax and sparsemax.

    Args:
        normalizer: of one head, e.g. ``model.transformer.h[0].attn.multimax``.
        scores: ``[n]``, the scores of one row of attention.
        path: where to save the figure, by its ending; None does not save.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: without matplotlib.
        ValueError: for a normalizer with parameters per head, or scores that are not one row.
    """
    figure = new_figure(8.0, 2.8)
    if getattr(normalizer, "num_heads", None) is not None:
        raise ValueError("plot_normalizer draws one head: this normalizer has parameters per head")
    if scores.ndim != 1:
        raise ValueError(f"scores must be one row, [n], got {list(scores.shape)}")
    left, right = figure.subplots(1, 2)
    with torch.no_grad():
        x = torch.linspace(float(scores.min()) - 1, float(scores.max()) + 1, 400)
        left.plot(x, x, color="0.7", label="identity (SoftMax)")
        left.plot(x, normalizer.modulate(x), color=COLORS[1], label=r"$\sigma(x)$")
        left.set(xlabel="score x", title="modulator")
        left.legend(frameon=False)
        rows = {"SoftMax": normalize("softmax", scores), "sparsemax": normalize("sparsemax", scores)}
        rows["MultiMax"] = normalizer(scores)
        positions = torch.arange(len(scores))
        for offset, color, (name, p) in zip((-0.27, 0.0, 0.27), ("0.7", COLORS[0], COLORS[1]), rows.items()):
            right.bar(positions + offset, p, width=0.27, color=color, label=name)
        right.set(xlabel="entry, by score", title="distribution", xticks=positions.tolist())
        right.legend(frameon=False)
    return saved(figure, path)


@torch.no_grad()
def plot_modulators(
    layers: Mapping[str, Mapping[str, Any]],
    path: str | Path | None = None,
) -> Any:
    """Draw sigma of every layer beside the identity, and what it adds to a score; colours go from first to last layer.

    Args:
        layers: ``{name: {"ranges": ..., "ts": ...}}``, nested lists of ``[2N]`` or ``[heads, 2N]``, perhaps with
            ``scale`` and ``shift``: what results.json has under ``layers`` and what
            :func:`hf_multimax.publishing.card.layer_modulators` gives. Layers without ``ranges`` are left out.
        path: where to save the figure, by its ending; None does not save.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: without matplotlib.
        ValueError: if no layer has a modulator.
    """
    curves = _with_modulators(layers)
    figure = new_figure(8.0, 3.0)
    limit = max(5.0, *(1.5 * torch.tensor(values["ranges"]).abs().max().item() for values in curves.values()))
    x = torch.linspace(-limit, limit, 201)
    left, right = figure.subplots(1, 2)
    left.plot(x, x, color="0.7", label="identity (SoftMax)")
    colors, order = ordered_colors(len(curves))
    for color, (name, values) in zip(colors, curves.items()):
        for head, y in enumerate(_sigma(values, x)):
            left.plot(x, y, color=color, linewidth=1.0, label=name if head == 0 else None)
            right.plot(x, y - x, color=color, linewidth=1.0)
    left.set(xlabel="score x", title=r"$\sigma(x)$")
    right.set(xlabel="score x", title=r"$\sigma(x) - x$")
    if len(curves) <= _LEGEND:
        figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", fontsize="x-small", frameon=False)
    else:
        figure.colorbar(order, ax=right, label="layer, from the first to the last")
    return saved(figure, path, dpi=80)


@torch.no_grad()
def plot_modulators_on_scores(layers: Mapping[str, Mapping[str, Any]], path: str | Path | None = None) -> Any:
    """Draw sigma of every layer over the histogram of that layer's scores, a panel a layer.

    The identity, which is SoftMax, is beside it; where sigma falls, so that a smaller score weighs more, the panel is
    hatched.

    Args:
        layers: what :meth:`hf_multimax.diagnostics.LayerMeasures.to_dict` gives, by layer. Layers without ``ranges``
            are left out.
        path: where to save the figure, by its ending; None does not save.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: without matplotlib.
        ValueError: if no layer has a modulator.
    """
    chosen = _with_modulators(layers)
    figure, panels = new_grid(len(chosen), 4, panel=(2.6, 2.1), margins=(0.0, 0.7), narrowest=4.2)
    for axes, name, values in zip(panels, short_names(list(chosen)), chosen.values()):
        _panel(axes, name, values)
    handles = {label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=4, frameon=False, fontsize="small")
    figure.supxlabel("score x", fontsize="medium")
    figure.supylabel(r"$\sigma(x)$", fontsize="medium")
    return saved(figure, path)


def _panel(axes: Any, name: str, values: Mapping[str, Any]) -> None:
    edges, counts = torch.tensor(values["scores"]["edges"]), torch.tensor(values["scores"]["counts"])
    low, high = _shown(edges, counts)
    x = torch.linspace(low, high, 300)
    behind = axes.twinx()
    behind.set_zorder(-1)
    axes.patch.set_visible(False)
    if len(counts):
        behind.stairs(counts, edges, fill=True, color="0.86", label="scores")
    behind.set(yticks=[], xlim=(low, high))
    axes.plot(x, x, color="0.35", linewidth=1.0, linestyle=(0, (4, 2)), label="identity (SoftMax)")
    curves = _sigma(values, x)
    for index, y in enumerate(curves):
        faint = 1.0 if len(curves) == 1 else 0.75
        label = None if index else (r"$\sigma$" if len(curves) == 1 else r"$\sigma$ of each head")
        axes.plot(x, y, color=COLORS[1], linewidth=1.6 if len(curves) == 1 else 0.9, alpha=faint, label=label)
    first = "falls" not in (entry.get_label() for entry in axes.patches)
    for fall in values.get("falls", ()):
        start = low if fall["low"] is None else max(low, fall["low"])
        end = high if fall["high"] is None else min(high, fall["high"])
        if start < end and (len(curves) == 1 or fall["head"] is not None):
            label, first = (r"$\sigma$ falls" if first else None), False
            axes.axvspan(start, end, facecolor="none", edgecolor=COLORS[3], hatch="///", linewidth=0, label=label)
    axes.set_title(name, fontsize="small")
    axes.tick_params(labelsize="small")


def _shown(edges: torch.Tensor, counts: torch.Tensor) -> tuple[float, float]:
    """The stretch that all but a thousandth of the scores lie in, at each end."""
    if not len(counts):
        return -5.0, 5.0
    below = counts.cumsum(0) / counts.sum()
    inside = ((below > 1e-3) & (below - counts / counts.sum() < 1 - 1e-3)).nonzero().flatten()
    return float(edges[inside[0]]), float(edges[inside[-1] + 1])


def _with_modulators(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The layers that have one; ValueError if none has."""
    found = {name: values for name, values in layers.items() if values.get("ranges")}
    if not found:
        raise ValueError("no layer has the `ranges` and `ts` of a MultiMax modulator: there is nothing to draw")
    return found


def _sigma(values: Mapping[str, Any], x: torch.Tensor) -> torch.Tensor:
    """``[heads, points]``, one head where the parameters are the layer's."""
    ranges, ts = (torch.tensor(values[key]) for key in ("ranges", "ts"))
    heads = 1 if ranges.ndim == 1 else len(ranges)
    affine = None
    if values.get("scale") is not None:
        affine = tuple(torch.tensor(values[key]).reshape(heads) for key in ("scale", "shift"))
    return modulate(x.expand(heads, 1, -1), ranges.reshape(heads, -1), ts.reshape(heads, -1), affine).squeeze(1)
