"""What ``benchmarks.scalar_start`` measured, arm by arm: the rate that was chosen, and how the arm compares at it."""

import statistics
from collections.abc import Sequence
from typing import Any

from scipy import stats

__all__ = ["REFERENCE", "UNTUNED", "summary"]

UNTUNED, REFERENCE = "untuned", "one temperature per layer"
Row = dict[str, Any]


def summary(rows: Sequence[Row]) -> list[Row]:
    """One row an arm, losses on the windows to judge by.

    ``"worst"`` is the largest mean over seeds, at any of the rates, of the loss minus the untuned model's; ``"rate"`` the
    one with the smallest mean loss on the windows to choose by, and ``"gain"`` the untuned model's loss minus the arm's
    there; ``"against"`` the loss minus that of one temperature per layer, seed by seed, with ``"low"`` and ``"high"`` of
    the 95 % interval (Student's t; None for one seed).
    """
    untuned = next(row["test"] for row in rows if row["arm"] == UNTUNED)
    arms = dict.fromkeys(row["arm"] for row in rows if row["arm"] != UNTUNED)
    best = {arm: _best(rows, arm) for arm in arms}
    found = []
    for arm, runs in best.items():
        test = statistics.fmean(row["test"] for row in runs.values())
        means = [
            statistics.fmean(row["test"] for row in _runs(rows, arm, rate).values()) for rate in _rates(rows, arm)
        ]
        every = [row for row in rows if row["arm"] == arm]
        found.append(
            {
                "arm": arm,
                "trained": every[0]["trained"],
                "file bytes": every[0]["file bytes"],
                "rate": next(iter(runs.values()))["rate"],
                "gain": untuned - test,
                "worst": max(means) - untuned,
                **(_paired(runs, best[REFERENCE]) if arm != REFERENCE and REFERENCE in best else {}),
                "seeds": len(runs),
                "step s": statistics.median(row["step s"] for row in every),
                "step MB": statistics.median(row["step MB"] for row in every),
            }
        )
    return found


def _rates(rows: Sequence[Row], arm: str) -> list[float]:
    return sorted({row["rate"] for row in rows if row["arm"] == arm})


def _runs(rows: Sequence[Row], arm: str, rate: float) -> dict[int, Row]:
    """By seed."""
    return {row["seed"]: row for row in rows if row["arm"] == arm and row["rate"] == rate}


def _best(rows: Sequence[Row], arm: str) -> dict[int, Row]:
    searched = [_runs(rows, arm, rate) for rate in _rates(rows, arm)]
    return min(searched, key=lambda runs: statistics.fmean(row["validation"] for row in runs.values()))


def _paired(runs: dict[int, Row], reference: dict[int, Row]) -> Row:
    seeds = sorted(runs.keys() & reference.keys())
    ours, theirs = ([of[seed]["test"] for seed in seeds] for of in (runs, reference))
    difference = {"against": statistics.fmean(a - b for a, b in zip(ours, theirs)), "low": None, "high": None}
    if len(seeds) > 1:
        low, high = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
        difference |= {"low": float(low), "high": float(high)}
    return difference
