"""Compare normalizers honestly: the arms of a recipe, each with the same seeds, data order, initial weights and budget.

    python -m recipes.compare recipes/configs/compare_lm_web.yaml
    python -m recipes.compare recipes/configs/compare_lm_web.yaml --budget time
    python -m recipes.compare recipes/configs/compare_lm_web.yaml --seeds 0 1 2 3 4 --jobs 2

Every run is the recipe's own command in a process of its own. What has finished is not run again; an interrupted run
goes on from its last checkpoint. The table pairs each arm with the reference, seed by seed; ``comparison.json`` and
``curves.png`` are written to the output folder.

``--budget time`` gives each arm the time of the reference (processor time, on a GPU the wall clock's) instead of its
number of steps, by the step times that the comparison with equal steps has measured, which must have finished.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from scipy import stats
from tqdm import tqdm

from hf_multimax.publishing.results import Results
from recipes.shared.checks import DataError, check_numbers, explained
from recipes.shared.curves import draw_curves
from recipes.shared.record import RESULTS, over_seeds, read_yaml, recorded_config, write_json
from recipes.shared.table import columns, comparison_rows

COMPARISON = "comparison.json"
#: The recipes, and the metrics of each that can decide.
METRICS = {
    "language_modeling": ("perplexity", "byte_perplexity", "loss"),
    "image_classification": ("accuracy", "top5_accuracy", "loss"),
    "translation": ("bleu", "chrf", "perplexity", "loss"),
}
#: Fewer pairs make a p-value that says nothing.
SEEDS_FOR_P = 5
CONFIDENCE = 0.95


@dataclass
class Plan:
    """What a comparison's YAML file says.

    Attributes:
        recipe: name of the recipe.
        config: its YAML file.
        arms: name -> the recipe's options that make the arm.
        reference: the arm that the others are compared with.
        metric: the metric that decides; lower_is_better says which way.
        seeds: one run of each arm for each.
        options: the recipe's options that all arms share, over those of ``config``.
        processes: of each run, by torchrun.
        budget: "steps" or "time".
        jobs: runs at a time, which share the processor's cores.
    """

    recipe: str
    config: str
    arms: dict[str, dict[str, Any]]
    reference: str
    metric: str
    lower_is_better: bool
    output_dir: str
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    options: dict[str, Any] = field(default_factory=dict)
    processes: int = 1
    budget: str = "steps"
    jobs: int = 1

    def __post_init__(self) -> None:
        if self.recipe not in METRICS:
            raise DataError(f"recipe must be one of {', '.join(METRICS)}, got {self.recipe!r}")
        if self.metric not in METRICS[self.recipe]:
            raise DataError(f"metric must be one of {', '.join(METRICS[self.recipe])}, got {self.metric!r}")
        if not isinstance(self.lower_is_better, bool):
            raise DataError(f"lower_is_better must be true or false, got {self.lower_is_better!r}")
        if not isinstance(self.config, str):
            raise DataError(f"config must name the recipe's YAML file, got {self.config!r}")
        if not isinstance(self.arms, dict) or not all(isinstance(arm, dict) for arm in self.arms.values()):
            raise DataError("arms must be `name: {option: value}` lines, with {} for no option")
        for name, options in {"options": self.options, **self.arms}.items():
            empty = [option for option, value in options.items() if value is None]
            if empty:
                raise DataError(f"{name} gives {empty[0]} no value: leave it out for the default")
        if self.reference not in self.arms:
            raise DataError(f"the reference {self.reference!r} is none of the arms {', '.join(self.arms)}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise DataError(f"seeds must be different and at least one, got {self.seeds}")
        if self.budget not in ("steps", "time"):
            raise DataError(f"budget must be steps or time, got {self.budget!r}")
        check_numbers(self, "[1, inf)", "processes", "jobs")

    @property
    def folder(self) -> Path:
        """Where this comparison writes; that of equal time lies in that of equal steps."""
        return Path(self.output_dir) / ("equal_time" if self.budget == "time" else "")


@dataclass(frozen=True)
class Run:
    """One training of one arm."""

    arm: str
    seed: int
    folder: Path
    command: list[str]
    config: dict[str, Any]

    def results(self) -> dict[str, Any] | None:
        """What it wrote, if it has finished.

        Raises:
            DataError: if what is there came from another command, or from other values in the config.
        """
        path = self.folder / RESULTS
        if not path.exists():
            return None
        results = json.loads(path.read_text(encoding="utf-8"))
        if results["command"] != shlex.join(self.command):
            raise DataError(
                f"{path} came from another command ({results['command']}): choose another --output_dir or delete it"
            )
        if results.get("config") != self.config:
            raise DataError(
                f"{path} was made before {self.command[3]} was changed: choose another --output_dir or delete it"
            )
        return results


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run what is missing, then write and print the comparison; exits with 1 if runs are missing."""
    try:
        plan, command = parse(sys.argv[1:] if arguments is None else arguments)
        runs = list(plan_runs(plan))
        for run in runs:
            run.results()
        execute(runs, plan)
        comparison = compare(plan, runs, command)
    except ValueError as error:  # a DataError, or results that cannot be read
        sys.exit(f"error: {error}")
    plan.folder.mkdir(parents=True, exist_ok=True)
    write_json(plan.folder / COMPARISON, comparison)
    print_table(comparison)
    draw_curves(comparison, plan.folder / "curves.png")
    if not comparison["complete"]:
        sys.exit(1)
    return comparison


def parse(arguments: list[str]) -> tuple[Plan, str]:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # what is not given stays as the plan has it
    )
    parser.add_argument("plan", type=Path, help="YAML file: recipe, config, arms, reference, metric, ...")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--arms", nargs="+", metavar="NAME", help="only these of the plan's arms, and the reference")
    parser.add_argument("--output_dir")
    parser.add_argument("--budget", choices=("steps", "time"))
    parser.add_argument("--processes", type=int, help="of each run, by torchrun")
    parser.add_argument("--jobs", type=int, help="runs at a time")
    given = vars(parser.parse_args(arguments))
    path, chosen = given.pop("plan"), given.pop("arms", None)
    values = read_yaml(path, (f.name for f in fields(Plan))) | given
    if chosen is not None:
        arms = values.get("arms", {})
        missing = [name for name in chosen if name not in arms]
        if missing:
            raise DataError(f"{path} has no arms {', '.join(missing)}: it has {', '.join(arms)}")
        values["arms"] = {name: arm for name, arm in arms.items() if name in (*chosen, values.get("reference"))}
    with explained(str(path), TypeError):
        plan = Plan(**values)
    return plan, shlex.join(["python", "-m", "recipes.compare", *arguments])


# -- running -----------------------------------------------------------------------------------------------------------


def plan_runs(plan: Plan) -> Iterator[Run]:
    """Seed by seed, so that an interrupted comparison has whole pairs."""
    steps = equal_time_steps(plan) if plan.budget == "time" else {}
    config = recorded_config(Path(plan.config))
    for seed in plan.seeds:
        for arm, options in plan.arms.items():
            folder = plan.folder / arm / f"seed{seed}"
            given = {**plan.options, **options, **steps.get(arm, {}), "seed": seed, "output_dir": folder.as_posix()}
            given["resume_from_checkpoint"] = "last"
            words = [word for name, value in given.items() for word in (f"--{name}", _word(value))]
            command = ["python", "-m", f"recipes.{plan.recipe}", plan.config, *words]
            yield Run(arm, seed, folder, command, config)


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def equal_time_steps(plan: Plan) -> dict[str, dict[str, int]]:
    """The number of steps that costs each arm what the reference's steps cost it, by the measured step times."""
    path = Path(plan.output_dir) / COMPARISON
    if not path.exists():
        raise DataError(f"--budget time needs the step times of {path}: run the comparison with --budget steps first")
    measured = Results(path)
    kind = measured.step_time
    missing = [arm for arm in plan.arms if arm not in measured.arms or kind not in measured.arms[arm].figures]
    if missing or measured.unfinished:
        lacks = f"no runs of {', '.join(missing)}" if missing else "not all runs"
        raise DataError(f"{path} has {lacks}: run the comparison with --budget steps to its end first")
    cost = {arm: measured.arms[arm].figures[kind].mean for arm in plan.arms}
    steps = measured.arms[plan.reference].runs[0]["training"]["steps"]
    return {arm: {"max_steps": max(1, round(steps * cost[plan.reference] / cost[arm]))} for arm in plan.arms}


def execute(runs: list[Run], plan: Plan) -> None:
    """Run what has no results yet; a run that fails leaves ``log.txt`` in its folder and the others go on."""
    missing = [run for run in runs if run.results() is None]
    progress = tqdm(total=len(runs), initial=len(runs) - len(missing), desc="runs", unit="run")
    with progress, ThreadPoolExecutor(plan.jobs) as pool:
        for run, code in zip(missing, pool.map(lambda run: start(run, plan), missing)):
            progress.update()
            if code:
                progress.write(f"{run.arm}, seed {run.seed} ended with {code}: see {run.folder / 'log.txt'}")


def start(run: Run, plan: Plan) -> int:
    run.folder.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // (plan.jobs * plan.processes))
    variables = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", **os.environ}
    launcher = [sys.executable]
    if plan.processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={plan.processes}"]
    with (run.folder / "log.txt").open("w", encoding="utf-8") as log:
        done = subprocess.run(
            [*launcher, *run.command[1:]], stdout=log, stderr=subprocess.STDOUT, env=variables, check=False
        )
    return done.returncode


# -- comparing ---------------------------------------------------------------------------------------------------------


#: Fields of the plan that the comparison tells.
_RECORDED = ("recipe", "config", "budget", "reference", "metric", "lower_is_better")


def compare(plan: Plan, runs: list[Run], command: str) -> dict[str, Any]:
    """The ``comparison.json`` of what has finished.

    Raises:
        DataError: if nothing has.
    """
    finished: dict[str, dict[int, dict[str, Any]]] = {arm: {} for arm in plan.arms}
    for run in runs:
        results = run.results()
        if results is not None:
            finished[run.arm][run.seed] = results
    measured = {arm: {seed: figures(results) for seed, results in by_seed.items()} for arm, by_seed in finished.items()}
    if not any(measured.values()):
        raise DataError(f"no run has finished: see the log.txt files in {plan.folder}")
    if not any(plan.metric in numbers for by_seed in measured.values() for numbers in by_seed.values()):
        raise DataError(f"no run has the metric {plan.metric!r} that the plan names")
    example = next(results for by_seed in finished.values() for results in by_seed.values())
    reference = measured[plan.reference]
    return {
        "kind": "comparison",
        "schema": 1,
        "task": example["task"],
        "command": command,
        **{name: getattr(plan, name) for name in _RECORDED},
        "seeds_asked": len(plan.seeds),
        "complete": all(len(by_seed) == len(plan.seeds) for by_seed in finished.values()),
        "data": example["data"],
        "arms": {
            arm: {"overrides": plan.arms[arm], "runs": [by_seed[seed] for seed in sorted(by_seed)]}
            for arm, by_seed in finished.items()
        },
        "summary": {arm: summarize(by_seed) for arm, by_seed in measured.items()},
        "paired": {arm: pair(measured[arm], reference) for arm in plan.arms if arm != plan.reference},
        "versions": example.get("versions"),
        "machine": example.get("machine"),
    }


def figures(results: dict[str, Any]) -> dict[str, float]:
    """The numbers of a run that are compared."""
    numbers = {**results["metrics"], **results["time"], "peak_bytes": results["memory"]["peak_bytes"]}
    return {name: value for name, value in numbers.items() if isinstance(value, (int, float))}


def summarize(by_seed: dict[int, dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Mean, standard deviation (None for one seed) and number of seeds of each figure."""
    names = dict.fromkeys(name for numbers in by_seed.values() for name in numbers)
    values = {name: [numbers[name] for numbers in by_seed.values() if name in numbers] for name in names}
    return {name: asdict(over_seeds(of_name)) for name, of_name in values.items()}


def pair(arm: dict[int, dict[str, float]], reference: dict[int, dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Arm minus reference, over the seeds that both have: mean, 95 % interval (Student's t), p of the paired t-test."""
    seeds = sorted(arm.keys() & reference.keys())
    names = [n for n in arm[seeds[0]] if all(n in arm[s] and n in reference[s] for s in seeds)] if seeds else []
    return {name: _paired([arm[s][name] for s in seeds], [reference[s][name] for s in seeds]) for name in names}


def _paired(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    differences = [a - b for a, b in zip(ours, theirs)]
    n, mean = len(differences), statistics.fmean(differences)
    low = high = p = None
    if n > 1 and len(set(differences)) == 1:  # without spread there is no test
        low = high = mean
    elif n > 1:
        test = stats.ttest_rel(ours, theirs)
        low, high = map(float, test.confidence_interval(CONFIDENCE))
        p = float(test.pvalue) if n >= SEEDS_FOR_P else None
    return {"difference": mean, "low": low, "high": high, "n": n, "p": p}


def print_table(comparison: dict[str, Any]) -> None:
    """The arms beside the reference, and what is missing."""
    results = Results(comparison)
    better = "Lower" if comparison["lower_is_better"] else "Higher"
    print(f"\n{columns(comparison_rows(results, results.has_p_values))}\n")
    print(f"{better} is better; step time and peak memory are multiples of {comparison['reference']}'s.")
    for sentence in results.unfinished:
        print(sentence)
    if not comparison["complete"]:
        print(f"Not all runs have finished: {comparison['seeds_asked']} seeds were asked for. Run the command again.")


if __name__ == "__main__":
    main()
