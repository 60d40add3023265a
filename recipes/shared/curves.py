"""Learning curves of a comparison."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipes.shared.record import over_seeds

_COLORS = ("0.35", "C3", "C1", "C0", "C2", "C4", "C5", "C6", "C8", "C9")


def draw_curves(comparison: Mapping[str, Any], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Draw the losses of a comparison over the steps: the mean of each arm, and one standard deviation around it.

    Args:
        comparison: what comparison.json holds. The evaluation losses are drawn, or where an arm has fewer than two of
            them, all arms' training losses.
        path: the file to write.
        metadata: stored in the file, as its format allows.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'hf-multimax[plots]'") from error
    runs = {arm: entry["runs"] for arm, entry in comparison["arms"].items() if entry["runs"]}
    evaluated = all(len(_curve(of_arm, "eval_loss")) > 1 for of_arm in runs.values())
    key = "eval_loss" if evaluated else "loss"
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for color, (arm, of_arm) in zip(_COLORS * len(runs), runs.items()):
        points = _curve(of_arm, key)
        figures = [over_seeds(values) for values in points.values()]
        axes.plot(list(points), [f.mean for f in figures], color=color, linewidth=1.2, label=arm)
        low, high = ([f.mean + sign * (f.std or 0.0) for f in figures] for sign in (-1, 1))
        axes.fill_between(list(points), low, high, color=color, alpha=0.15, linewidth=0)
    seeds = sorted({run["seed"] for of_arm in runs.values() for run in of_arm})
    title = f"{comparison['data']['name']}, seeds {', '.join(map(str, seeds))}: mean ± standard deviation"
    axes.set(xlabel="step", ylabel="evaluation loss" if evaluated else "training loss")
    axes.set_title(title, fontsize="medium")
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=80, metadata=metadata)


def _curve(runs: list[Mapping[str, Any]], key: str) -> dict[int, list[float]]:
    """The values at every step that all runs have, step by step."""
    curves = [
        {point["step"]: point[key] for point in run.get("curve", ()) if point.get(key) is not None} for run in runs
    ]
    steps = sorted(set.intersection(*map(set, curves)))
    return {step: [curve[step] for curve in curves] for step in steps}
