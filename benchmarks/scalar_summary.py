"""What ``benchmarks.scalar_start`` measured, arm by arm: the rate that was chosen, and how the arm compares at it."""

import statistics
from collections.abc import Sequence
from typing import Any

from scipy import stats

__all__ = ["REFERENCE", "UNTUNED", "chosen_rate", "summary"]

UNTUNED, REFERENCE = "untuned", "one temperature per layer"
Row = dict[str, Any]


def chosen_rate(rows: Sequence[Row], arm: str) -> float:
    """The rate with which the first seed's loss is smallest on the windows to choose by."""
    searched = [row for row in rows if row["arm"] == arm]
    first = min(row["seed"] for row in searched)
    return min((row for row in searched if row["seed"] == first), key=lambda row: row["validation"])["rate"]


def summary(rows: Sequence[Row]) -> list[Row]:
    """One row an arm, losses on the windows to judge by.

    ``"rate"`` is the chosen one, ``"gain"`` the untuned model's loss minus the mean over seeds there, and ``"against"``
    the loss minus that of one temperature per layer, seed by seed, with ``"low"`` and ``"high"`` of the 95 % interval
    (Student's t; None for one seed). ``"gains"`` are the means at every rate, ``"worst"`` is the least gain of any run.
    """
    untuned = next(row["test"] for row in rows if row["arm"] == UNTUNED)
    arms = dict.fromkeys(row["arm"] for row in rows if row["arm"] != UNTUNED)
    best = {arm: _runs(rows, arm, chosen_rate(rows, arm)) for arm in arms}
    found = []
    for arm, runs in best.items():
        every = [row for row in rows if row["arm"] == arm]
        by_rate = {rate: _runs(rows, arm, rate).values() for rate in sorted({row["rate"] for row in every})}
        gains = {rate: untuned - statistics.fmean(row["test"] for row in of_rate) for rate, of_rate in by_rate.items()}
        rate = chosen_rate(rows, arm)
        found.append(
            {
                "arm": arm,
                "trained": every[0]["trained"],
                "file bytes": every[0]["file bytes"],
                "rate": rate,
                "gain": gains[rate],
                **(_paired(runs, best[REFERENCE]) if arm != REFERENCE and REFERENCE in best else {}),
                "gains": gains,
                "worst": untuned - max(row["test"] for row in every),
                "seeds": len(runs),
                "step s": statistics.median(row["step s"] for row in every),
                "step MB": statistics.median(row["step MB"] for row in every),
            }
        )
    return found


def _runs(rows: Sequence[Row], arm: str, rate: float) -> dict[int, Row]:
    """By seed."""
    return {row["seed"]: row for row in rows if row["arm"] == arm and row["rate"] == rate}


def _paired(runs: dict[int, Row], reference: dict[int, Row]) -> Row:
    seeds = sorted(runs.keys() & reference.keys())
    ours, theirs = ([of[seed]["test"] for seed in seeds] for of in (runs, reference))
    difference = {"against": statistics.fmean(a - b for a, b in zip(ours, theirs)), "low": None, "high": None}
    if len(seeds) > 1:
        low, high = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
        difference |= {"low": float(low), "high": float(high)}
    return difference
