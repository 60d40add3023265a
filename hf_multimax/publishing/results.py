"""results.json, as recipes write it: read, checked, and its figures as text. Cards and reports show nothing else."""

import functools
import json
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_multimax.numbers import is_number

__all__ = ["MEASURES", "NOTHING", "Arm", "Figure", "Results", "metric_label", "one_line", "with_spread"]

#: What a table shows where results.json has no figure.
NOTHING = "-"

#: What a layer's entry has besides the normalizer's own parameters: the measures of its attention.
MEASURES = ("sparsity", "multi_modality", "entropy", "topk_mass")

_SCHEMA = 1
_RUN = ("task", "command", "seed", "model", "data", "training", "metrics")
_COMPARISON = ("task", "command", "reference", "seeds_asked", "metric", "lower_is_better", "data", "arms", "summary")
_OBJECTS = (
    "model",
    "data",
    "training",
    "metrics",
    "time",
    "memory",
    "layers",
    "versions",
    "machine",
    "arms",
    "summary",
)
#: The types of fields, and what must be in some.
_KINDS: dict[str, type] = {**dict.fromkeys(_OBJECTS, dict), "task": str, "command": str}
_JSON = {dict: "object", str: "string"}
_INNER = {"model": ("class", "type", "parameters", "multimax_parameters"), "data": ("name",)}
_LABELS = {
    "byte_perplexity": "perplexity per byte",
    "accuracy": "top-1 accuracy",
    "top5_accuracy": "top-5 accuracy",
    "bleu": "BLEU",
    "chrf": "chrF",
}


def metric_label(metric: str) -> str:
    """What a table calls a metric of results.json."""
    return _LABELS.get(metric, metric.replace("_", " "))


@dataclass(frozen=True)
class Figure:
    """A measured number over seeds: mean, standard deviation (None where undefined) and number of seeds."""

    mean: float
    std: float | None = None
    n: int = 1


@dataclass(frozen=True)
class Arm:
    """One way of training: its finished runs, and the figures over them by name."""

    name: str
    runs: tuple[Mapping[str, Any], ...]
    figures: Mapping[str, Figure]
    overrides: Mapping[str, Any]

    @property
    def metrics(self) -> dict[str, Figure]:
        """The figures that are results of an evaluation: no cost, and no setting, which is an integer (beams)."""
        evaluated = {name for run in self.runs for name, value in run["metrics"].items() if isinstance(value, float)}
        return {name: figure for name, figure in self.figures.items() if name in evaluated}


class Results:
    """One results.json, of a run or a comparison; a run counts as a comparison of one arm without a reference.

    Args:
        source: the path of the file, or what it holds.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no results.json of this schema (the text names the file and the field), has a NaN or
            infinity, or if the summary of a comparison is not that of its runs.
    """

    def __init__(self, source: str | Path | Mapping[str, Any]) -> None:
        self.name = "results" if isinstance(source, Mapping) else str(source)
        self.values = self._read(source)
        self.is_comparison = self.values["kind"] == "comparison"
        self.arms = self._comparison_arms() if self.is_comparison else self._run_arm()
        self.reference: str | None = self.values.get("reference")
        self.seeds_asked: int = self.values.get("seeds_asked", 1)

    # -- reading -------------------------------------------------------------------------------------------------------

    def _read(self, source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
        try:
            text = (
                json.dumps(source, allow_nan=False)
                if isinstance(source, Mapping)
                else Path(source).read_text(encoding="utf-8")
            )
            values = json.loads(text, parse_constant=_refuse)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.name} is no results.json: {error}") from error
        kind = values.get("kind") if isinstance(values, dict) else None
        if kind not in ("run", "comparison"):
            raise ValueError(f"{self.name} is no results.json: 'kind' must be 'run' or 'comparison', got {kind!r}")
        if values.get("schema") != _SCHEMA:
            raise ValueError(
                f"{self.name} has schema {values.get('schema')!r}, this version of hf_multimax reads {_SCHEMA}: "
                "update hf_multimax, or run the recipe again"
            )
        self._require(values, _RUN if kind == "run" else _COMPARISON, "")
        return values

    def _require(self, values: Mapping[str, Any], names: Iterable[str], where: str) -> None:
        missing = [name for name in names if name not in values]
        if missing:
            raise ValueError(f"{self.name} is incomplete: {where}{missing[0]} is missing")
        for name, kind in _KINDS.items():
            if name in values and not isinstance(values[name], kind):
                raise ValueError(
                    f"{self.name}: {where}{name} must be a JSON {_JSON[kind]}, got {json.dumps(values[name])[:50]}"
                )
        for name, inner in _INNER.items():
            lacking = [key for key in inner if name in names and key not in values[name]]
            if lacking:
                raise ValueError(f"{self.name} is incomplete: {where}{name}.{lacking[0]} is missing")

    def _run_arm(self) -> dict[str, Arm]:
        run = self.values
        name = run["multimax"]["normalizer"] if run.get("multimax") else "softmax"
        measured = {**run["metrics"], **run.get("time", {}), "peak_bytes": run.get("memory", {}).get("peak_bytes")}
        figures = {key: Figure(value) for key, value in measured.items() if is_number(value)}
        return {name: Arm(name, (run,), figures, {})}

    def _comparison_arms(self) -> dict[str, Arm]:
        arms = {}
        for name, arm in self.values["arms"].items():
            for index, run in enumerate(arm["runs"]):
                self._require(run, _RUN, f"arms.{name}.runs[{index}].")
            summary = self.values["summary"].get(name) or {}
            figures = {
                key: Figure(value["mean"], value.get("std"), value["n"])
                for key, value in summary.items()
                if is_number(value.get("mean"))
            }
            arms[name] = Arm(name, tuple(arm["runs"]), figures, arm.get("overrides") or {})
            self._check_summary(arms[name])
        if self.values["reference"] not in arms:
            raise ValueError(f"{self.name}: the reference {self.values['reference']!r} is none of the arms")
        return arms

    def _check_summary(self, arm: Arm) -> None:
        for metric, figure in arm.metrics.items():
            measured = [run["metrics"].get(metric) for run in arm.runs]
            measured = [value for value in measured if is_number(value)]
            agrees = measured and math.isclose(figure.mean, statistics.fmean(measured), rel_tol=1e-9, abs_tol=1e-12)
            if not agrees or figure.n != len(measured):
                raise ValueError(
                    f"{self.name}: summary.{arm.name}.{metric} is not the mean of the arm's {len(measured)} runs: "
                    "run recipes.compare again"
                )

    # -- what was measured ---------------------------------------------------------------------------------------------

    @property
    def runs(self) -> list[Mapping[str, Any]]:
        """All runs, arm after arm."""
        return [run for arm in self.arms.values() for run in arm.runs]

    @property
    def metric(self) -> str:
        """The metric that the comparison is about; for a run its first."""
        return self.values["metric"] if self.is_comparison else next(iter(self.metrics))

    @property
    def metrics(self) -> list[str]:
        """The metrics that any arm has, the main one first."""
        found = list(dict.fromkeys(name for arm in self.arms.values() for name in arm.metrics))
        return sorted(found, key=lambda name: name != self.values.get("metric"))

    @property
    def unfinished(self) -> list[str]:
        """A sentence for every arm with fewer runs than seeds asked for, or with runs that diverged."""
        diverged = {name: len(arm.runs) - self._measured_runs(name) for name, arm in self.arms.items()}
        return [
            f"Of the {len(self.arms[name].runs)} runs of `{name}`, {count} diverged: the figures are of the others."
            for name, count in diverged.items()
            if count
        ] + [
            f"Of the {self.seeds_asked} seeds asked for, {len(arm.runs)} {'was' if len(arm.runs) == 1 else 'were'} "
            f"run for `{arm.name}`."
            for arm in self.arms.values()
            if len(arm.runs) < self.seeds_asked
        ]

    def _measured_runs(self, arm: str) -> int:
        return sum(is_number(run["metrics"].get(self.metric)) for run in self.arms[arm].runs)

    @functools.cached_property
    def has_p_values(self) -> bool:
        """Whether any arm has the p-value of a paired test of the main metric."""
        return any(self._paired(name).get("p") is not None for name in self.arms)

    @functools.cached_property
    def step_time(self) -> str:
        """The figure that says what a step costs: processor time on a CPU, which other programs disturb least."""
        on_gpu = any((run.get("memory") or {}).get("kind") == "cuda" for run in self.runs)
        has_cpu = all("cpu_seconds_per_step" in arm.figures for arm in self.arms.values() if arm.runs)
        return "cpu_seconds_per_step" if has_cpu and not on_gpu else "seconds_per_step"

    @functools.cached_property
    def memory_scope(self) -> str:
        """What peak memory is of, as a phrase; runs of earlier versions did not stop the clock after training."""
        memory = [run.get("memory") or {} for run in self.runs]
        where = "allocated on the GPU" if any(m.get("kind") == "cuda" for m in memory) else "of the whole process"
        training = all(m.get("phase") == "training" for m in memory)
        return f"{where}, {'in training' if training else 'evaluation and attention statistics included'}"

    def _paired(self, arm: str) -> Mapping[str, Any]:
        return self.values.get("paired", {}).get(arm, {}).get(self.metric) or {}

    # -- as text -------------------------------------------------------------------------------------------------------

    def seeds(self, arm: str) -> str:
        """``3``, or ``2 of 3`` where seeds are missing."""
        done = self._measured_runs(arm)
        return str(done) if done >= self.seeds_asked else f"{done} of {self.seeds_asked}"

    def measured(self, arm: str, metric: str) -> str:
        """``12.345 ± 0.021``; without the deviation where there is none."""
        figure = self.arms[arm].figures.get(metric)
        return NOTHING if figure is None else with_spread(figure, self._decimals(metric))

    def difference(self, arm: str) -> str:
        """Of the main metric, arm minus reference over the seeds of both: ``-0.12 [-0.30, +0.06]``."""
        paired = self._paired(arm)
        if paired.get("difference") is None:
            return NOTHING
        decimals = self._decimals(self.metric)
        difference = signed(paired["difference"], decimals)
        if paired.get("low") is None or paired.get("high") is None:
            return difference
        return f"{difference} [{signed(paired['low'], decimals)}, {signed(paired['high'], decimals)}]"

    def p_value(self, arm: str) -> str:
        """Of the paired test of the main metric."""
        p = self._paired(arm).get("p")
        return NOTHING if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"

    def verdict(self, arm: str) -> str:
        """What the 95 % interval of the difference says: ``better``, ``worse`` or ``not told apart``.

        One seed has no interval: ``one seed``.
        """
        paired = self._paired(arm)
        low, high = paired.get("low"), paired.get("high")
        if arm == self.reference or paired.get("difference") is None:
            return NOTHING
        if low is None or high is None:
            return "one seed"
        if low <= 0.0 <= high:
            return "not told apart"
        return "better" if (high < 0.0) == self.values["lower_is_better"] else "worse"

    def step_seconds(self, arm: str) -> str:
        """Seconds of a training step, of the kind that ``step_time`` names."""
        figure = self.arms[arm].figures.get(self.step_time)
        return NOTHING if figure is None else f"{figure.mean:.{decimals_of([figure.mean])}f}"

    def peak_megabytes(self, arm: str) -> str:
        """Peak memory in units of 10^6 bytes."""
        figure = self.arms[arm].figures.get("peak_bytes")
        return NOTHING if figure is None else f"{figure.mean / 1e6:.{decimals_of([figure.mean / 1e6])}f}"

    def ratio(self, arm: str, figure: str) -> str:
        """A cost, ``step_time`` or ``peak_bytes``, of the arm over the reference's, by the seeds that both have."""
        own = self._cost_by_seed(arm, figure)
        other = self._cost_by_seed(self.reference, figure) if self.reference else {}
        seeds = own.keys() & other.keys()
        total = sum(other[seed] for seed in seeds)
        return f"{sum(own[seed] for seed in seeds) / total:.2f}" if total else NOTHING

    def _cost_by_seed(self, arm: str, figure: str) -> dict[int, float]:
        costs = {run["seed"]: {**run.get("time", {}), **run.get("memory", {})} for run in self.arms[arm].runs}
        return {seed: cost[figure] for seed, cost in costs.items() if is_number(cost.get(figure))}

    def _decimals(self, metric: str) -> int:
        """Four digits of the smallest mean, and two of the largest deviation, so that a column has one precision."""
        figures = [arm.figures[metric] for arm in self.arms.values() if metric in arm.figures]
        spread = max((figure.std or 0.0 for figure in figures), default=0.0)
        return max(decimals_of(figure.mean for figure in figures), decimals_of([spread], 2))


def decimals_of(values: Iterable[float], digits: int = 4) -> int:
    """Decimals, 0 to 6, that show so many digits of the smallest of ``values`` that is not 0."""
    smallest = min((abs(value) for value in values if value), default=None)
    return 0 if smallest is None else min(max(digits - 1 - math.floor(math.log10(smallest)), 0), 6)


def with_spread(figure: Figure, decimals: int) -> str:
    """Mean and, if there is one, standard deviation, in so many decimals."""
    spread = "" if figure.std is None else f" ± {figure.std:.{decimals}f}"
    return f"{figure.mean:.{decimals}f}{spread}"


def signed(value: float, decimals: int) -> str:
    """A difference, with its sign."""
    return f"{round(value, decimals) + 0.0:+.{decimals}f}"


def one_line(value: Any) -> str:
    """A value as Markdown on one line, without what would end a table's cell or begin HTML."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")


def _refuse(constant: str) -> None:
    raise ValueError(f"it has {constant}, which is no JSON number")
