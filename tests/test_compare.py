"""The comparison: which runs there are, what is resumed, how seeds are paired, and what is said of missing ones."""

import json
import math
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from scipy import stats

from hf_multimax import is_patched
from hf_multimax.publishing.results import Results
from recipes import compare, language_modeling
from recipes.shared.checks import DataError
from recipes.shared.data.text import load_text


def plan_file(folder, **values):
    text = folder / "text.txt"
    text.write_text(load_text("pydoc")[:30_000], encoding="utf-8")
    config = {
        "data": str(text),
        "vocab_size": 300,
        "context": 16,
        "max_eval_windows": 4,
        "model_config": {"n_layer": 1, "n_head": 2, "n_embd": 16},
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "learning_rate": 0.01,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    plan = {
        "recipe": "language_modeling",
        "config": str(folder / "config.yaml"),
        "output_dir": str(folder / "out"),
        "reference": "softmax",
        "metric": "perplexity",
        "lower_is_better": True,
        "seeds": [0, 1],
        "arms": {"softmax": {"normalizer": "softmax"}, "multimax": {"output": True}},
        **values,
    }
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    return str(folder / "plan.yaml")


@pytest.fixture
def started(monkeypatch):
    """Runs happen in this process, which is faster; the list of those that were started."""
    runs = []

    def start(run, plan):
        runs.append((run.arm, run.seed))
        language_modeling.main(*language_modeling.RECIPE, run.command[3:])
        return 0

    monkeypatch.setattr(compare, "start", start)
    return runs


def test_arms_share_seeds_and_what_has_finished_is_not_run_again(tmp_path, started, capsys):
    plan = plan_file(tmp_path)
    first = compare.main([plan])
    assert started == [("softmax", 0), ("multimax", 0), ("softmax", 1), ("multimax", 1)]  # whole pairs first
    written = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert written == json.loads(json.dumps(first))
    assert written["complete"] and written["seeds_asked"] == 2
    assert (tmp_path / "out" / "curves.png").stat().st_size > 1000
    for arm, runs in ((name, entry["runs"]) for name, entry in written["arms"].items()):
        assert [run["seed"] for run in runs] == [0, 1]
        values = [run["metrics"]["perplexity"] for run in runs]
        assert written["summary"][arm]["perplexity"]["mean"] == pytest.approx(statistics.fmean(values))
        assert written["summary"][arm]["perplexity"]["std"] == pytest.approx(statistics.stdev(values))
        assert all(run["multimax"] is None for run in runs) == (arm == "softmax")
    # The first loss is measured before any step: both arms saw the same batch with the same weights.
    for seed in (0, 1):
        losses = [written["arms"][arm]["runs"][seed]["curve"][0]["loss"] for arm in ("softmax", "multimax")]
        assert losses[0] == pytest.approx(losses[1], rel=0.02)
    out = capsys.readouterr().out
    assert "multimax" in out and "95 % interval" in out and "Not all runs" not in out

    (tmp_path / "out" / "multimax" / "seed1" / "results.json").unlink()
    started.clear()
    again = compare.main([plan])
    assert started == [("multimax", 1)]
    assert again["paired"]["multimax"]["perplexity"] == first["paired"]["multimax"]["perplexity"]

    started.clear()
    more = compare.main([plan, "--seeds", "0", "1", "2"])
    assert started == [("softmax", 2), ("multimax", 2)] and more["seeds_asked"] == 3


def test_equal_time_gives_each_arm_the_references_seconds(tmp_path, started):
    plan = plan_file(tmp_path)
    with pytest.raises(SystemExit, match="--budget steps first"):
        compare.main([plan, "--budget", "time"])
    compare.main([plan])
    path = tmp_path / "out" / "comparison.json"
    measured = json.loads(path.read_text())
    for arm, cost in (("softmax", 0.2), ("multimax", 0.4)):
        measured["summary"][arm]["cpu_seconds_per_step"]["mean"] = cost
    path.write_text(json.dumps(measured))
    result = compare.main([plan, "--budget", "time"])
    steps = {arm: entry["runs"][0]["training"]["steps"] for arm, entry in result["arms"].items()}
    assert steps == {"softmax": 4, "multimax": 2} and result["budget"] == "time"
    assert (tmp_path / "out" / "equal_time" / "comparison.json").exists()
    assert json.loads(path.read_text()) == measured
    del measured["arms"]["multimax"]["runs"][1]
    measured["summary"]["multimax"] = compare.summarize({0: compare.figures(measured["arms"]["multimax"]["runs"][0])})
    path.write_text(json.dumps(measured))
    with pytest.raises(SystemExit, match="has not all runs: .*to its end first"):
        compare.main([plan, "--budget", "time"])


def test_a_failed_run_is_said_and_the_others_count(tmp_path, started, monkeypatch, capsys):
    good = compare.start
    monkeypatch.setattr(compare, "start", lambda run, plan: 1 if run.seed == 1 else good(run, plan))
    with pytest.raises(SystemExit) as stop:
        compare.main([plan_file(tmp_path)])
    assert stop.value.code == 1
    written = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert not written["complete"] and written["seeds_asked"] == 2
    assert written["summary"]["multimax"]["perplexity"] == {
        "mean": written["arms"]["multimax"]["runs"][0]["metrics"]["perplexity"],
        "std": None,
        "n": 1,
    }
    captured = capsys.readouterr()
    assert "2 seeds were asked for" in captured.out and "seed 1 ended with 1" in captured.out + captured.err
    monkeypatch.setattr(compare, "start", lambda run, plan: 1)
    with pytest.raises(SystemExit, match="no run has finished"):
        compare.main([plan_file(tmp_path), "--output_dir", str(tmp_path / "none")])


def test_results_of_another_command_are_not_taken(tmp_path, started):
    compare.main([plan_file(tmp_path)])
    with pytest.raises(SystemExit, match="came from another command"):
        compare.main([plan_file(tmp_path, options={"learning_rate": 0.5})])


def test_results_of_a_config_that_was_changed_are_not_taken(tmp_path, started):
    plan = plan_file(tmp_path)
    values = yaml.safe_load(Path(plan).read_text())
    config = tmp_path / "config.yaml"
    config.write_text(Path(values["config"]).read_text())
    Path(plan).write_text(yaml.safe_dump(values | {"config": str(config)}))
    compare.main([plan])
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"warmup_steps": 3}))
    with pytest.raises(SystemExit, match=r"made before .*config\.yaml was changed"):
        compare.main([plan])


def test_a_run_that_diverged_is_said(tmp_path, started, monkeypatch, capsys):
    whole = language_modeling.perplexities

    def sometimes(trainer, *rest):
        diverged = trainer.args.seed == 1 and is_patched(trainer.model)
        return whole(trainer, *rest) | ({"perplexity": math.inf} if diverged else {})

    monkeypatch.setattr(language_modeling, "perplexities", sometimes)
    results = Results(compare.main([plan_file(tmp_path)]))
    assert results.seeds("multimax") == "1 of 2" and results.seeds("softmax") == "2"
    assert results.unfinished == ["Of the 2 runs of `multimax`, 1 diverged: the figures are of the others."]
    assert results.unfinished[0] in capsys.readouterr().out


def test_pairs_are_over_the_seeds_that_both_arms_have():
    reference = {seed: {"loss": float(seed)} for seed in range(7)}
    arm = {seed: {"loss": seed + difference} for seed, difference in enumerate((0.5, 0.1, 0.3, -0.2, 0.4), start=1)}
    paired = compare.pair(arm, reference)["loss"]
    test = stats.ttest_rel([v["loss"] for v in arm.values()], [reference[seed]["loss"] for seed in arm])
    interval = test.confidence_interval(0.95)
    assert paired["n"] == 5 and paired["difference"] == pytest.approx(0.22)
    assert (paired["low"], paired["high"]) == pytest.approx((interval.low, interval.high))
    assert paired["p"] == pytest.approx(test.pvalue)


def test_fewer_seeds_give_no_p_and_one_gives_no_interval():
    arm, reference = ({seed: {"loss": seed * factor} for seed in range(5)} for factor in (1.0, 2.0))
    four = compare.pair({seed: arm[seed] for seed in range(4)}, reference)["loss"]
    assert four["p"] is None and four["low"] < four["difference"] < four["high"]
    one = compare.pair({0: arm[0]}, reference)["loss"]
    assert (one["low"], one["high"], one["p"]) == (None, None, None)
    assert compare.pair({}, reference) == {}
    equal = compare.pair(arm, arm)["loss"]  # no spread: no test
    assert equal["difference"] == 0 and equal["p"] is None and math.isfinite(equal["low"])


def same_numbers(found, wanted):
    found, wanted = ({k: v for k, v in figures.items() if v is not None} for figures in (found, wanted))
    return found == pytest.approx(wanted, rel=1e-9, abs=1e-9 * abs(wanted.get("difference", 0.0)))


@pytest.mark.parametrize("name", ["lm_web", "fashion", "help_en_de"])
def test_the_statistics_of_the_committed_comparisons_come_out_again(name):
    path = Path(compare.__file__).parent / "results" / f"{name}.json"
    recorded = json.loads(path.read_text())
    measured = {
        arm: {run["seed"]: compare.figures(run) for run in entry["runs"]} for arm, entry in recorded["arms"].items()
    }
    for arm, by_seed in measured.items():
        for figure, summary in compare.summarize(by_seed).items():
            assert same_numbers(summary, recorded["summary"][arm][figure])
    assert recorded["paired"]
    for arm, paired in recorded["paired"].items():
        again = compare.pair(measured[arm], measured[recorded["reference"]])
        assert again.keys() == paired.keys()
        for figure, values in paired.items():
            assert same_numbers(again[figure], values)


def test_several_processes_and_jobs_share_the_threads(tmp_path, monkeypatch):
    calls = []

    def run(command, stdout, stderr, env, check):
        calls.append((command, env["OMP_NUM_THREADS"]))
        return SimpleNamespace(returncode=0)

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(compare, "subprocess", SimpleNamespace(run=run, STDOUT=None))
    monkeypatch.setattr(compare.os, "cpu_count", lambda: 8)
    plan, _ = compare.parse([plan_file(tmp_path), "--processes", "2", "--jobs", "2"])
    runs = list(compare.plan_runs(plan))
    compare.execute(runs, plan)
    assert len(calls) == 4 and {threads for _, threads in calls} == {"2"}
    commands = sorted(command for command, _ in calls)  # two jobs start in any order
    assert all(c[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] for c in commands)
    assert [command[5:] for command in commands] == sorted(run.command[1:] for run in runs)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"recipe": "cooking"}, "recipe must be one of"),
        ({"reference": "hardmax"}, "none of the arms"),
        ({"seeds": []}, "at least one"),
        ({"seeds": [1, 1]}, "different"),
        ({"budget": "money"}, "steps or time"),
        ({"jobs": 0}, "at least 1"),
        ({"metric": "perplexty"}, "metric must be one of perplexity"),
        ({"lower_is_better": "no"}, "lower_is_better must be"),
        ({"arms": ["softmax", "multimax"]}, "arms must be"),
        ({"arms": {"softmax": None}}, "arms must be"),
        ({"arms": {"softmax": {"include": None}}}, "softmax gives include no value"),
        ({"config": None}, "config must name"),
        ({"sedes": [1]}, "unknown options: sedes"),
    ],
    ids=str,
)
def test_a_wrong_plan_is_refused(tmp_path, values, message):
    with pytest.raises(SystemExit, match=message):
        compare.main([plan_file(tmp_path, **values)])
    assert not (tmp_path / "out").exists()


def test_a_missing_field_or_arm_is_refused(tmp_path):
    path = plan_file(tmp_path)
    with pytest.raises(SystemExit, match="no arms entmax: it has softmax, multimax"):
        compare.main([path, "--arms", "entmax"])
    values = yaml.safe_load((tmp_path / "plan.yaml").read_text())
    del values["metric"]
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(SystemExit, match="metric"):
        compare.main([path])


def test_the_plans_of_the_repository_are_whole(monkeypatch):
    root = Path(compare.__file__).resolve().parent.parent
    monkeypatch.chdir(root)
    plans = sorted(root.glob("recipes/configs/compare_*.yaml"))
    assert plans
    for path in plans:
        plan, _ = compare.parse([str(path)])
        assert Path(plan.config).exists()
        assert any(name == "softmax" or arm.get("normalizer") == "softmax" for name, arm in plan.arms.items()), path
    with pytest.raises(DataError):
        compare.Plan(**{**vars(plan), "processes": 0})
