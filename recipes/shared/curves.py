"""Learning curves of a comparison."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_multimax.plots.style import COLORS, DASHES, MARKERS, new_figure
from recipes.shared.record import over_seeds


def draw_curves(comparison: Mapping[str, Any], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Draw the losses of a comparison over the steps, and what each arm's differ from the first's.

    A line is the mean over seeds, the band one standard deviation around it.

    Args:
        comparison: what comparison.json holds. The evaluation losses are drawn, or where an arm has fewer than two of
            them, all arms' training losses.
        path: the file to write.
        metadata: stored in the file, as its format allows.

    Raises:
        ImportError: without matplotlib.
    """
    runs = {arm: entry["runs"] for arm, entry in comparison["arms"].items() if entry["runs"]}
    evaluated = all(len(_curve(of_arm, "eval_loss")) > 1 for of_arm in runs.values())
    key = "eval_loss" if evaluated else "loss"
    means = {arm: {step: over_seeds(v) for step, v in _curve(of_arm, key).items()} for arm, of_arm in runs.items()}
    first, reference = next(iter(means.items()))
    figure = new_figure(10.0, 3.8)
    left, right = figure.subplots(1, 2)
    for index, (arm, points) in enumerate(means.items()):
        color, dashes = COLORS[index % len(COLORS) - 1], DASHES[index % len(DASHES)]  # black, the last, comes first
        style = {"color": color, "marker": MARKERS[index % len(MARKERS)]}
        # an arm that lies on an earlier one is thinner, so that both are seen
        width = 1.2 + 3.3 * (1 - index / max(1, len(means) - 1))
        values = [f.mean for f in points.values()]
        left.plot(list(points), values, linewidth=width, ms=width + 3, label=arm, **style)
        low, high = ([f.mean + sign * (f.std or 0.0) for f in points.values()] for sign in (-1, 1))
        left.fill_between(list(points), low, high, color=color, alpha=0.1, linewidth=0)
        steps = [step for step in points if step in reference]
        apart = [points[step].mean - reference[step].mean for step in steps]
        right.plot(steps, apart, linewidth=1.6, linestyle=dashes, ms=5, **style)
    seeds = sorted({run["seed"] for of_arm in runs.values() for run in of_arm})
    title = f"{comparison['data']['name']}, seeds {', '.join(map(str, seeds))}: mean ± standard deviation"
    what = "evaluation loss" if evaluated else "training loss"
    left.set(xlabel="step", ylabel=f"{what} [nats]")
    left.set_title(title, fontsize="medium")
    right.set(xlabel="step", ylabel=f"{what}, arm minus {first} [nats]")
    right.set_title(f"difference from {first}", fontsize="medium")
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False, fontsize="small"
    )
    figure.savefig(path, dpi=80, metadata=metadata)


def _curve(runs: list[Mapping[str, Any]], key: str) -> dict[int, list[float]]:
    """The values at every step that all runs have, step by step."""
    curves = [
        {point["step"]: point[key] for point in run.get("curve", ()) if point.get(key) is not None} for run in runs
    ]
    steps = sorted(set.intersection(*map(set, curves)))
    return {step: [curve[step] for curve in curves] for step in steps}
