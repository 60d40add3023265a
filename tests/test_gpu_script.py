"""``benchmarks/gpu.sh``: how it runs cases and keeps what they gave, and all of it with sizes of a few rows."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import summary
from benchmarks.gpu.plan import STEPS
from benchmarks.gpu.pool import Pool, worker_command
from benchmarks.gpu.results import StepResults, slug

ROOT = Path(__file__).parents[1]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
MADE_UP = Path(__file__).with_name("made_up_gpu_run.py")


def start(folder: Path, cases: str, *arguments: str, **environment: str) -> subprocess.Popen:
    """Start the script on made-up cases."""
    environment = {"MADE_UP_CASES": cases, "MADE_UP_MARKER": str(folder / "marker"), **environment}
    return subprocess.Popen(
        [sys.executable, str(MADE_UP), "--results", str(folder), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder: Path, cases: str, *arguments: str, **environment: str) -> tuple[int, str]:
    """Run it to its end: its exit code and what it printed."""
    process = start(folder, cases, *arguments, **environment)
    out, errors = process.communicate(timeout=100)
    assert not errors, errors
    return process.returncode, out


def rows(folder: Path) -> dict[str, dict]:
    content = json.loads((folder / "made-up-gpu-1" / "made_up.json").read_text())
    return {row["case"]: row for row in content["rows"]}


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def gone(pids: set[int]) -> bool:
    """Whether all of them end soon."""
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, pids))


# -- cases that fail ---------------------------------------------------------------------------------------------------


def test_what_fails_costs_itself_alone(tmp_path):
    names = ["takes_its_time1", "raises", "dies", "is_noisy", "hangs", "skips", "takes_its_time2"]
    code, out = run(tmp_path, ",".join(names))
    found = rows(tmp_path)
    assert code == 1 and list(found) == names
    statuses = {name: row["status"] for name, row in found.items()}
    assert [name for name in names if statuses[name] == "passed"] == ["takes_its_time1", "is_noisy", "takes_its_time2"]
    assert statuses["skips"] == "skipped" and found["skips"]["error"] == "no such thing here"
    assert found["raises"]["error"] == "ValueError: this one" and "is wrong" in found["raises"]["traceback"]
    assert found["dies"]["error"] == "the process was killed by signal 9: the last words"
    assert found["hangs"]["error"] == "took longer than 2 s and was killed" and 2 <= found["hangs"]["seconds"] < 20
    assert found["is_noisy"]["measured"] == {"value": "nan", "values": [1.0, "inf"]}
    for name in ("raises", "dies", "hangs"):
        assert f"FAILED {name}: {found[name]['error']}" in out
    assert "made_up: 3 passed, 3 failed, 1 skipped" in out and "skipped: skips: no such thing here" in out


def test_one_process_runs_what_is_timed(tmp_path):
    run(tmp_path, "takes_its_time1,takes_its_time2,takes_its_time3", MADE_UP_WORKERS="1")
    assert len({row["measured"]["pid"] for row in rows(tmp_path).values()}) == 1
    run(tmp_path, "takes_its_time1,takes_its_time2,takes_its_time3,takes_its_time4", "--again", "--workers", "2")
    assert len({row["measured"]["pid"] for row in rows(tmp_path).values()}) == 2


def test_where_there_is_no_room_for_more_processes_one_does_it_all(tmp_path):
    names = [f"takes_its_time{i}" for i in range(5)]
    code, out = run(
        tmp_path, ",".join(names), "--workers", "3", MADE_UP_WORKERS="3", MADE_UP_ROOM=str(tmp_path / "taken")
    )
    assert code == 0 and "5 passed" in out
    assert len({row["measured"]["pid"] for row in rows(tmp_path).values()}) == 1


def test_what_takes_too_long_to_prepare_is_not_waited_for(monkeypatch):
    monkeypatch.setenv("MADE_UP_CASES", "hangs,takes_its_time1,takes_its_time2")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    prepared, found = {}, {}
    with Pool([sys.executable, str(MADE_UP), "worker"], 50.0, time.monotonic() + 100.0) as pool:
        cases = pool.start(2)["cases"]
        assert pool.run(cases, 2, prepared.__setitem__, prepare_for=3.0) == ["hangs"]
        assert pool.run(cases[1:], 1, found.__setitem__) == []
    assert set(prepared) == set(found) == set(cases[1:])
    pids = {row["measured"]["pid"] for row in (*prepared.values(), *found.values())}
    assert len(pids) == 1 and gone(pids)


def test_processes_of_a_case_end_with_the_step(tmp_path):
    run(tmp_path, "starts_others")
    assert gone({rows(tmp_path)["starts_others"]["measured"]["child"]})


def test_where_nothing_can_run_one_sentence_says_why(tmp_path):
    code, out = run(tmp_path, "raises", MADE_UP_BROKEN="1")
    assert code == 1 and "made_up: nothing\n  could not run: RuntimeError: nothing to run on" in out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["--device", "cpu"], ["--steps", "nonsense"], ["--again", "nonsense"]])
def test_mistakes_are_named(arguments):
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and ("--tiny" in done.stderr or "nonsense" in done.stderr)


# -- going on ----------------------------------------------------------------------------------------------------------


def test_the_next_run_tries_again_what_failed_and_keeps_what_passed(tmp_path):
    cases = "takes_its_time1,fails_once,takes_its_time2"
    assert run(tmp_path, cases)[0] == 1
    first = rows(tmp_path)
    code, out = run(tmp_path, cases)
    second = rows(tmp_path)
    assert code == 0 and "1 of 3 cases" in out
    assert second["fails_once"]["status"] == "passed"
    assert all(second[name] == first[name] for name in ("takes_its_time1", "takes_its_time2"))
    code, out = run(tmp_path, cases, "--again", "made_up")
    assert code == 0 and "3 of 3 cases" in out
    assert rows(tmp_path)["takes_its_time1"] != first["takes_its_time1"]


def test_a_case_that_is_gone_leaves_no_row(tmp_path):
    run(tmp_path, "takes_its_time1,skips")
    run(tmp_path, "takes_its_time2,takes_its_time1")
    assert list(rows(tmp_path)) == ["takes_its_time2", "takes_its_time1"]


@pytest.mark.parametrize("after", [0, 1, 4])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_cut_off_keeps_what_it_had_and_the_next_goes_on(tmp_path, after, number):
    names = [f"takes_its_time{i}" for i in range(8)]
    process = start(tmp_path, ",".join(names), MADE_UP_WORKERS="1")
    path = tmp_path / "made-up-gpu-1" / "made_up.json"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (path.exists() and len(rows(tmp_path)) >= after):
        time.sleep(0.01)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    before = rows(tmp_path)
    assert process.returncode == (-9 if number == signal.SIGKILL else 143)
    assert after <= len(before) < len(names)
    if number == signal.SIGTERM:  # there is time to sum up
        assert f"made_up: {f'{len(before)} passed, ' if before else ''}{8 - len(before)} not reached" in out
    assert gone({row["measured"]["pid"] for row in before.values()})
    code, out = run(tmp_path, ",".join(names))
    assert code == 0 and f"{8 - len(before)} of 8 cases" in out
    assert list(rows(tmp_path)) == names
    assert all(rows(tmp_path)[name] == row for name, row in before.items())
    assert [p.name for p in path.parent.iterdir()] == ["made_up.json"]


def test_time_that_is_up_leaves_the_rest_for_the_next_run(tmp_path):
    names = ",".join(f"takes_its_time{i}" for i in range(40))
    begun = time.monotonic()
    code, out = run(tmp_path, names, "--minutes", "0.05")
    assert code == 0 and "not reached" in out and time.monotonic() - begun < 30
    assert 0 < len(rows(tmp_path)) < 40


def test_what_was_measured_before_is_gone_on_with_elsewhere(tmp_path):
    seed, folder = tmp_path / "seed", tmp_path / "new"
    old = StepResults("correctness", seed)
    old.begin(["a", "b"], {"commit": "first"})
    old.enter("a", {"status": "passed", "measured": {}})
    new = StepResults("correctness", folder, seed)
    new.begin(["a", "b"], {"commit": "second"})
    new.enter("b", {"status": "passed", "measured": {}})
    content = json.loads((folder / "correctness.json").read_text())
    assert [(row["case"], row["commit"]) for row in content["rows"]] == [("a", "first"), ("b", "second")]
    assert content["environment"] == {"commit": "second"}
    assert "1 measured at another commit" in summary.summary([new], 1.0)
    (folder / "correctness.json").write_text("{")
    with pytest.raises(ValueError, match="correctness.json is not a file of results: remove it"):
        StepResults("correctness", folder)


def test_results_say_nothing_of_where_they_came_from(tmp_path):
    results = StepResults("correctness", tmp_path)
    results.begin(["a"], {})
    trace = f'File "{ROOT}/benchmarks/x.py"\nFile "{sys.prefix}/lib/y.py"\nFile "{Path.home()}/z.py"'
    results.enter("a", {"status": "failed", "error": f"no {ROOT}/file", "traceback": trace})
    text = results.path.read_text()
    assert str(ROOT) not in text and f"{sys.prefix}/" not in text and str(Path.home()) not in text
    assert "benchmarks/x.py" in text


def test_a_gpu_has_a_folder_of_a_plain_name():
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert slug("Tesla T4 (rev. a1)") == "tesla-t4-rev-a1"


# -- the summary -------------------------------------------------------------------------------------------------------


def time_row(dim: int, keys: int, both: float | None, queries: int | None = None, forward: float = 1.0) -> dict:
    """A row of the attention step as a GPU gives it."""
    row = {"table": "rows", "shape": f"{keys} at {dim}", "dim": dim, "keys": keys, "queries": queries or keys}
    row |= {"forward triton ms": 1.25, "forward triton": forward, "forward reference": "cudnn", "not run": {}}
    row |= {"forward TFLOP/s": 321.0, "forward share of roof": 0.75}
    return row if both is None else row | {"training triton": both, "training reference": "flash"}


def finished(tmp_path: Path, step: str, measured: list[dict], failed: int = 0, missing: int = 0) -> StepResults:
    """A step with these results."""
    cases = [f"{step} {i}" for i in range(len(measured) + failed + missing)]
    results = StepResults(step, tmp_path)
    results.begin(cases, {"gpu": "Made-up GPU 1", "commit": "abc", "versions": {"torch": "2.11"}})
    for case, values in zip(cases, measured):
        results.enter(case, {"status": "passed", "measured": values})
    for case in cases[len(measured) :][:failed]:
        results.enter(case, {"status": "failed", "error": "AssertionError: out: relative error 0.5 > 1e-05"})
    return results


def test_goals_are_met_by_the_worst_figure_or_not_measured(tmp_path):
    times = [time_row(128, 2048, 1.2), time_row(128, 16384, 1.26), time_row(128, 1024, 9.0), time_row(64, 4096, 1.5)]
    times += [time_row(128, 32768, None, queries=1, forward=1.04)]
    steps = [{"model": "GPT-2 small, 1024 tokens", "patched / stock": 1.04}]
    found = [
        finished(tmp_path, "correctness", [{}, {}]),
        finished(tmp_path, "attention", times),
        finished(tmp_path, "training_step", steps),
    ]
    assert summary.goals(found) == [
        "  attention at D = 128, forward + backward, at most 1.25: missed in 1 of 2, worst 1.260 (16384 at 128)",
        "  attention at D = 64, forward + backward, at most 1.5: met, worst 1.500 (4096 at 64)",
        "  decoding, at most 1.05: met, worst 1.040 (32768 at 128)",
        "  training step of DeiT-small, at most 1.05: not measured",
        "  training step of GPT-2 small, at most 1.05: met, worst 1.040 (GPT-2 small, 1024 tokens)",
        "  wrong results, at most 0: 0, met",
    ]
    assert summary.goals([])[-1] == "  wrong results, at most 0: not measured to the end"
    unfinished = finished(tmp_path / "1", "correctness", [{}], missing=1)
    assert summary.goals([unfinished])[-1] == "  wrong results, at most 0: not measured to the end"
    wrong = finished(tmp_path / "2", "correctness", [{}], failed=2)
    assert summary.goals([wrong])[-1] == "  wrong results, at most 0: 2, missed"


def test_the_summary_fits_into_what_is_seen_of_a_long_output(tmp_path):
    tile = {"kernel": "dq", "width": 64, "present": [128, 64, 8, 2]}
    tiles = [tile | {"tile": [64, 64, 4, 2], "ratio": 0.9, "present ms": 1.0}, tile | {"tile": [128, 128, 8, 2]}]
    tiles[1]["unfit"] = "OutOfResources: shared memory"
    memory = {"table": "memory", "shape": "1x8x4096", "training sdpa MB": 12.0, "training triton MB": 14.0}
    peers = time_row(64, 4096, 1.4) | {
        "forward plain": 12.0,
        "training compile": 5.0,
        "not run": {"flex": "RuntimeError"},
    }
    arms = {"softmax": 3.0, "multimax": 2.9}
    losses = [{"computation": "fused MultiMax", "time / unfused": 0.3, "load": 1.0}]
    functions = {"function": "entmax, alpha learned", "shape": "1024 x 32768", "f32 forward plain": 123.4}
    functions |= {f"{dtype} {phase} triton": 1.234567 for dtype in ("f32", "bf16") for phase in ("forward", "training")}
    attention = {"shape": "1x16x8192, D 64, causal, bfloat16"}
    attention |= {f"{phase} {name}": 1.234567 for phase in ("forward", "training") for name in ("triton", "tiled")}
    attention["not run"] = {"adasplash": "not installed: pip install adasplash"}
    calls = [{"normalizer": f"entmax, alpha learned {i % 14}", **attention} for i in range(19)]
    found = [
        finished(tmp_path, "environment", [{"gpu": "Made-up GPU 1"}]),
        finished(tmp_path, "correctness", [{}] * 250, failed=60),
        finished(tmp_path, "attention", [time_row(128, 1024 + i, 1.234567) for i in range(28)] + [peers, memory]),
        finished(tmp_path, "tiles", tiles),
        finished(tmp_path, "training_step", [{"model": "GPT-2 small", "stock s": 0.1, "patched / stock": 1.0}] * 5),
        finished(tmp_path, "cross_entropy", [{"rows": losses}]),
        finished(tmp_path, "rows", [functions] * 30),
        finished(tmp_path, "row_attention", [{}] * 80 + calls),
        finished(tmp_path, "evidence", [{"bits per byte": arms}, {"bits per byte": {"softmax": 3.2, "multimax": 3.0}}]),
    ]
    text = summary.summary(found, 601.0)
    assert len(text) < 12000
    assert "correctness: 250 passed, 60 failed" in text and "... and 30 more" in text
    assert '_LEAN["dq"][64] = Tile(64, 64, 4, 2)' in text and "OutOfResources: shared memory" in text
    assert "multimax: 2.9500, minus softmax -0.1500 +- 0.0500 (standard error)" in text
    for part in ("| 0.75 ", "| cudnn/flash", "flex: RuntimeError", "goals:", "they are tried again"):
        assert part in text, part


# -- the steps themselves, with sizes of a few rows --------------------------------------------------------------------

#: What the script must do without: all that PyTorch and Transformers can do without.
OPTIONAL = (
    "accelerate", "adasplash", "datasets", "entmax", "evaluate", "hypothesis", "jinja2", "liger_kernel", "matplotlib",
    "pandas", "peft", "PIL", "psutil", "pytest", "sacrebleu", "scipy", "sentencepiece", "sklearn", "torchvision",
)  # fmt: skip
HIDDEN = f"""
from importlib import machinery
find_spec = machinery.PathFinder.find_spec


def find_others(cls, name, path=None, target=None):
    return None if name.split(".")[0] in {OPTIONAL!r} else find_spec(name, path, target)


machinery.PathFinder.find_spec = classmethod(find_others)
"""


@pytest.fixture
def script_environment(tmp_path):
    """The environment of the script, with the optional packages there or hidden."""

    def environment(hide: bool) -> dict[str, str]:
        found = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        found["PYTHON"] = sys.executable
        if hide:
            (tmp_path / "sitecustomize.py").write_text(HIDDEN)
            found["PYTHONPATH"] = str(tmp_path)
        return found

    return environment


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("hide", [False, True], ids=["all packages", "without optional ones"])
def test_everything_runs_with_tiny_sizes(hide, script_environment, tmp_path):
    if hide:
        command = [sys.executable, "-c", "import entmax"]
        assert subprocess.run(command, env=script_environment(hide), capture_output=True).returncode == 1
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--tiny", "--device", "cpu", "--results", "results"]
    done = subprocess.run(command, cwd=tmp_path, env=script_environment(hide), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "results" / "cpu"
    assert {path.name for path in folder.iterdir()} == {f"{step.name}.json" for step in STEPS}
    for step in STEPS:
        content = json.loads((folder / f"{step.name}.json").read_text())
        rows = content["rows"]
        assert rows and content["environment"]["versions"]["torch"]
        assert all(row["status"] == "passed" or row["error"].endswith("need a GPU") for row in rows), rows
        assert sum(row["status"] == "passed" for row in rows) > len(rows) / 2
    assert "CUDA graph, tiles" in done.stdout and "CUDA graphs need a GPU" in done.stdout
    assert "failed" not in done.stdout.lower() and "goals" not in done.stdout


@needs_triton
def test_a_machine_without_optional_packages_is_described_and_computes(script_environment, tmp_path, monkeypatch):
    for name, value in {**script_environment(hide=True), "TRITON_INTERPRET": "1"}.items():
        monkeypatch.setenv(name, value)
    found = {}
    for step, chosen in {
        "environment": ("imports", "device", "tools", "a kernel runs"),
        "correctness": ("float32 agrees with float64, additive half", "loss: order 1", "CUDA graph, decode"),
    }.items():
        with Pool(worker_command(step, "cpu", tiny=True), 200.0, time.monotonic() + 400.0) as pool:
            assert set(chosen) < set(pool.start(1)["cases"])
            assert pool.run(chosen, 1, found.__setitem__) == []
    unlike = {name: row for name, row in found.items() if row["status"] != "passed"}
    assert set(unlike) == {"device", "CUDA graph, decode"}, unlike
    assert {row["error"] for row in unlike.values()} == {
        "the properties of the device need a GPU", "CUDA graphs need a GPU"
    }  # fmt: skip


def test_without_a_gpu_one_sentence_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--steps", "environment", "--results", str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stderr
    assert "could not run: RuntimeError: PyTorch finds no CUDA device" in done.stdout
