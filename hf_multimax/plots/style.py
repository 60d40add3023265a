"""What all figures share: how one is made and saved, and colours that colour-blind readers tell apart."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["COLORS", "DASHES", "MARKERS", "new_figure", "new_grid", "ordered_colors", "save", "saved", "short_names"]

#: Of Okabe and Ito (2008), the darkest first; black is for references.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 3)), (0, (8, 2, 1, 2, 1, 2)), ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def new_figure(width: float, height: float) -> Any:
    """A figure of so many inches; raises ImportError, naming the extra, without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'hf-multimax[plots]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def new_grid(
    count: int, columns: int, panel: tuple[float, float], margins: tuple[float, float], narrowest: float = 0.0
) -> tuple[Any, list[Any]]:
    """A figure of so many panels, at most so many beside each other, and the panels; sizes are inches."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = new_figure(max(narrowest, panel[0] * columns + margins[0]), panel[1] * rows + margins[1])
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[count:]:
        axes.remove()
    return figure, panels[:count]


def saved(figure: Any, path: str | Path | None, dpi: int = 110) -> Any:
    """The figure, written where there is a path."""
    if path is not None:
        figure.savefig(path, dpi=dpi)
    return figure


def ordered_colors(count: int) -> Any:
    """``(colours, mappable)`` from the first to the last of so many layers; the mappable is for a colour bar."""
    from matplotlib import cm, colormaps, colors

    mappable = cm.ScalarMappable(colors.Normalize(0, max(1.1 * (count - 1), 1)), colormaps["viridis"])
    return mappable.to_rgba(range(count)), mappable


def short_names(names: Sequence[str], width: int = 24) -> list[str]:
    """Names of layers; where one is wider than ``width`` letters, without the modules in front that all of them share.

    Examples:
        >>> short_names(["base_model.model.model.layers.0.self_attn", "base_model.model.model.layers.1.self_attn"])
        ['layers.0.self_attn', 'layers.1.self_attn']
    """
    if all(len(name) <= width for name in names):
        return list(names)
    parts = [name.split(".") for name in names]
    shared = next((i for i, at in enumerate(zip(*parts)) if len(set(at)) > 1), 1)
    return [".".join(part[max(0, shared - 1) :]) for part in parts]


def save(figure: Any, path: str | Path) -> None:
    """Write a figure; the ending says how (``.png``, ``.svg``, ``.pdf``).

    Raises:
        ValueError: for an ending that matplotlib does not write. OSError: if the file cannot be written.
    """
    figure.savefig(path, dpi=120)
