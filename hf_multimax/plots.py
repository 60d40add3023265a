"""Figures: what a modulator does to scores and to the distribution over them. Needs matplotlib (``[plots]``)."""

from pathlib import Path
from typing import Any

import torch

from hf_multimax.modulator import Normalizer
from hf_multimax.registry import normalize

__all__ = ["plot_normalizer"]


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
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'hf-multimax[plots]'") from error
    if getattr(normalizer, "num_heads", None) is not None:
        raise ValueError("plot_normalizer draws one head: this normalizer has parameters per head")
    if scores.ndim != 1:
        raise ValueError(f"scores must be one row, [n], got {list(scores.shape)}")
    figure = Figure(figsize=(8.0, 2.8), layout="constrained")
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
