"""Figures: what a modulator does to scores and to the distribution over them. Needs matplotlib (``[plots]``)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hf_multimax.functional import modulate
from hf_multimax.normalizers.base import Normalizer
from hf_multimax.normalizers.registry import normalize

__all__ = ["plot_modulators", "plot_normalizer"]

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
    figure = _new_figure(8.0, 2.8)
    if getattr(normalizer, "num_heads", None) is not None:
        raise ValueError("plot_normalizer draws one head: this normalizer has parameters per head")
    if scores.ndim != 1:
        raise ValueError(f"scores must be one row, [n], got {list(scores.shape)}")
    left, right = figure.subplots(1, 2)
    with torch.no_grad():
        x = torch.linspace(float(scores.min()) - 1, float(scores.max()) + 1, 400)
        left.plot(x, x, color="0.7", label="identity (SoftMax)")
        left.plot(x, normalizer.modulate(x), color="C3", label=r"$\sigma(x)$")
        left.set(xlabel="score x", title="modulator")
        left.legend(frameon=False)
        rows = {"SoftMax": normalize("softmax", scores), "sparsemax": normalize("sparsemax", scores)}
        rows["MultiMax"] = normalizer(scores)
        positions = torch.arange(len(scores))
        for offset, color, (name, p) in zip((-0.27, 0.0, 0.27), ("0.7", "C0", "C3"), rows.items()):
            right.bar(positions + offset, p, width=0.27, color=color, label=name)
        right.set(xlabel="entry, by score", title="distribution", xticks=positions.tolist())
        right.legend(frameon=False)
    if path is not None:
        figure.savefig(path, dpi=110)
    return figure


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
    curves = {name: values for name, values in layers.items() if values.get("ranges")}
    if not curves:
        raise ValueError("no layer has the `ranges` and `ts` of a MultiMax modulator: there is nothing to draw")
    figure = _new_figure(8.0, 3.0)
    from matplotlib import cm, colormaps, colors

    limit = max(5.0, *(1.5 * torch.tensor(values["ranges"]).abs().max().item() for values in curves.values()))
    x = torch.linspace(-limit, limit, 201)
    left, right = figure.subplots(1, 2)
    left.plot(x, x, color="0.7", label="identity (SoftMax)")
    order = cm.ScalarMappable(colors.Normalize(0, max(1.1 * (len(curves) - 1), 1)), colormaps["viridis"])
    for color, (name, values) in zip(order.to_rgba(range(len(curves))), curves.items()):
        for head, y in enumerate(_sigma(values, x)):
            left.plot(x, y, color=color, linewidth=1.0, label=name if head == 0 else None)
            right.plot(x, y - x, color=color, linewidth=1.0)
    left.set(xlabel="score x", title=r"$\sigma(x)$")
    right.set(xlabel="score x", title=r"$\sigma(x) - x$")
    if len(curves) <= _LEGEND:
        figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", fontsize="x-small", frameon=False)
    else:
        figure.colorbar(order, ax=right, label="layer, from the first to the last")
    if path is not None:
        figure.savefig(path, dpi=80)
    return figure


def _sigma(values: Mapping[str, Any], x: torch.Tensor) -> torch.Tensor:
    """``[heads, points]``, one head where the parameters are the layer's."""
    ranges, ts = (torch.tensor(values[key]) for key in ("ranges", "ts"))
    heads = 1 if ranges.ndim == 1 else len(ranges)
    affine = None
    if values.get("scale") is not None:
        affine = tuple(torch.tensor(values[key]).reshape(heads) for key in ("scale", "shift"))
    return modulate(x.expand(heads, 1, -1), ranges.reshape(heads, -1), ts.reshape(heads, -1), affine).squeeze(1)


def _new_figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'hf-multimax[plots]'") from error
    return Figure(figsize=(width, height), layout="constrained")
