"""Attention maps, of several models side by side: over a text, and over an image."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_multimax.plots.style import new_figure, saved

__all__ = ["plot_image_maps", "plot_text_maps"]


def plot_text_maps(
    maps: Mapping[str, Tensor], tokens: Sequence[str], path: str | Path | None = None, head: int | None = None
) -> Any:
    """Draw which token looks at which, a panel a model, all in one scale. A weight of exactly 0 is left white.

    Args:
        maps: ``{model: [heads, length, length]}``, of one layer each, as
            :func:`hf_multimax.diagnostics.attention_maps` gives them (without the batch).
        tokens: the ``length`` tokens.
        path: where to save the figure, by its ending; None does not save.
        head: the head to draw; None for the mean over heads.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: without matplotlib. ValueError: for no map, or maps that do not fit the tokens.
    """
    chosen = {name: _of_head(weights, head) for name, weights in maps.items()}
    for name, weights in chosen.items():
        if weights.shape != (len(tokens), len(tokens)):
            raise ValueError(f"the map of {name} is {list(weights.shape)}, but there are {len(tokens)} tokens")
    if not chosen:
        raise ValueError("there is no map to draw")
    side = min(9.0, max(2.6, 0.24 * len(tokens) + 1.0))
    figure = new_figure(side * len(chosen) + 1.0, side + 0.6)
    from matplotlib.colors import PowerNorm

    panels = figure.subplots(1, len(chosen), squeeze=False)
    most = max(float(weights.max()) for weights in chosen.values())
    labels = [token.replace("\n", "⏎").replace("$", r"\$") for token in tokens]
    image = None
    for axes, (name, weights) in zip(panels.flat, chosen.items()):
        scale = PowerNorm(0.5, vmin=0, vmax=most)  # small weights are most of them
        image = axes.imshow(weights.masked_fill(weights == 0, math.nan).numpy(), norm=scale, cmap="cividis_r")
        ticks = range(len(tokens))
        size = "small" if len(tokens) <= 24 else "xx-small"
        axes.set_xticks(ticks, labels, rotation=90, fontsize=size)
        axes.set_yticks(ticks, labels, fontsize=size)
        axes.set_title(f"{name}\n{_zeros(weights):.0%} of what it could look at is exactly 0", fontsize="small")
        axes.set(xlabel="looked at", ylabel="looking" if axes is panels.flat[0] else "")
    figure.colorbar(image, ax=panels, label=_label(head), shrink=0.8)
    return saved(figure, path)


def plot_image_maps(
    maps: Mapping[str, Tensor], pixels: Tensor, path: str | Path | None = None, head: int | None = None
) -> Any:
    """Draw an image and, a panel a model, how much each of its patches is looked at, all in one scale.

    With a class token in front of the patches it is what that token looks at; without one, the mean over all patches.

    Args:
        maps: ``{model: [heads, length, length]}``, of one layer each. In front of the patches, a square of them,
            there may be other tokens.
        pixels: ``[channels, height, width]``, as the model gets it.
        path: where to save the figure, by its ending; None does not save.
        head: the head to draw; None for the mean over heads.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: without matplotlib. ValueError: for no map, or patches that are no square.
    """
    if not maps:
        raise ValueError("there is no map to draw")
    squares = {name: _on_patches(name, _of_head(weights, head)) for name, weights in maps.items()}
    low, high = pixels.amin(), pixels.amax()
    picture = ((pixels - low) / (high - low).clamp_min(1e-12)).permute(1, 2, 0)
    picture = picture.expand(-1, -1, 3).cpu() if picture.shape[-1] == 1 else picture.cpu()
    figure = new_figure(2.7 * (len(squares) + 1) + 0.9, 3.1)
    panels = figure.subplots(1, len(squares) + 1)
    panels[0].imshow(picture.numpy())
    panels[0].set_title("image", fontsize="small")
    most = max(float(square.max()) for square in squares.values())
    shown = None
    for axes, (name, square) in zip(panels[1:], squares.items()):
        axes.imshow(picture.mean(-1).numpy(), cmap="gray", extent=(0, 1, 0, 1))
        shown = axes.imshow(square.numpy(), cmap="cividis", alpha=0.75, extent=(0, 1, 0, 1), vmin=0, vmax=most)
        axes.set_title(name, fontsize="small")
    for axes in panels:
        axes.set(xticks=[], yticks=[])
    figure.colorbar(shown, ax=panels, label=_label(head), shrink=0.8)
    return saved(figure, path)


def _of_head(weights: Tensor, head: int | None) -> Tensor:
    weights = weights.detach().float().cpu()
    if weights.ndim != 3:
        raise ValueError(f"a map must be [heads, queries, keys], got {list(weights.shape)}")
    if head is None:
        return weights.mean(0)
    if not 0 <= head < len(weights):
        raise ValueError(f"head must be in [0, {len(weights) - 1}], got {head}")
    return weights[head]


def _zeros(weights: Tensor) -> float:
    """The share of exact zeros; of a causal map those below the diagonal."""
    causal = not weights.triu(1).any()
    places = torch.ones_like(weights).tril() if causal else torch.ones_like(weights)
    return float((weights[places.bool()] == 0).double().mean())


def _on_patches(name: str, weights: Tensor) -> Tensor:
    """``[side, side]``: how much each patch is looked at."""
    side = math.isqrt(weights.shape[-1])
    extra = weights.shape[-1] - side * side
    if extra > 4:
        raise ValueError(f"{name} has {weights.shape[-1]} positions, which are no square of patches")
    row = weights[0, extra:] if extra else weights.mean(0)
    return row.reshape(side, side)


def _label(head: int | None) -> str:
    return "attention, mean over heads" if head is None else f"attention of head {head}"
