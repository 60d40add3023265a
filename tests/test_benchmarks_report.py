"""The tables of speed in docs/ are what was measured."""

import importlib.util
import json
import re
import time

import pytest

from benchmarks import report
from benchmarks.common import ROOT
from benchmarks.gpu import results as gpu_results
from benchmarks.gpu.pool import Pool, worker_command
from benchmarks.gpu.results import StepResults

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture
def results(tmp_path, monkeypatch):
    """The folder that results are read from, with a copy of those of this repository."""
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(report, "results_path", lambda name, device: tmp_path / f"{name}-{device}.json")
    monkeypatch.setattr(gpu_results, "COMMITTED", tmp_path / "gpu")
    return tmp_path


@pytest.fixture
def pages(tmp_path):
    """A folder with copies of the pages that have tables."""
    folder = tmp_path / "docs"
    folder.mkdir()
    for name in ("normalizers.md", "performance.md", "training.md"):
        (folder / name).write_bytes((ROOT / "docs" / name).read_bytes())
    return folder


def test_the_pages_are_up_to_date():
    report.main(["--check"])


def test_another_measurement_is_noticed_and_written(results, pages):
    path = results / "training_step-cpu.json"
    found = json.loads(path.read_text())
    found["rows"][0]["patched / stock"] = 7.125
    path.write_text(json.dumps(found))
    with pytest.raises(SystemExit, match="not what benchmarks/results says: performance.md. Run"):
        report.main(["--check", "--pages", str(pages)])
    report.main(["--pages", str(pages)])
    assert "| 7.12 | not yet measured |" in (pages / "performance.md").read_text()
    report.main(["--check", "--pages", str(pages)])


@pytest.fixture(scope="module")
def gpu_step(tmp_path_factory):
    """Results of a step of benchmarks/gpu.sh as the script writes them: of its tiny sizes, on a CPU."""
    folder = tmp_path_factory.mktemp("gpu")

    def run(step: str, *cases: str) -> StepResults:
        with (
            pytest.MonkeyPatch.context() as patch,
            Pool(worker_command(step, "cpu", tiny=True), 200.0, time.monotonic() + 400.0) as pool,
        ):
            patch.setenv("TRITON_INTERPRET", "1")
            announced = pool.start(1)
            results = StepResults(step, folder)
            results.begin(announced["cases"], {**announced["environment"], "gpu": "Made-up GPU 1"})
            chosen = [case for case in announced["cases"] if case.startswith(cases)]
            assert pool.run(chosen, 1, results.enter) == [] and results.with_status("passed") == results.in_order()
        return results

    return run


@needs_triton
def test_a_gpu_has_a_table_of_its_own(results, pages, gpu_step, tmp_path):
    measured = gpu_step("attention", "1x1x40", "1x4x1 of 40", "memory")
    path = tmp_path / "gpu" / "made-up-gpu-1" / "attention.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(measured.path.read_bytes())
    report.main(["--pages", str(pages)])
    text = (pages / "performance.md").read_text()
    tables = dict(re.findall(r"<!-- speed: (\w+) -->\n(.*?)<!-- /speed -->", text, flags=re.DOTALL))
    here, there = tables["attention"].split("On one Made-up GPU 1:")
    assert "not yet measured" not in tables["attention"] and "`native`" in here
    rows = [row["measured"] for row in measured.in_order()]
    both = f"{report._ratio(rows[0]['forward triton'])} / {report._ratio(rows[0]['training triton'])}"
    rates = " / ".join(report._ratio(rows[0][f"{phase} TFLOP/s"]) for phase in ("forward", "training"))
    assert f"| 1x1x40, float32, causal, D = 16 | {both} | {rates} | - | - | - | - |" in there
    assert f"4 heads to a key head | {report._ratio(rows[1]['forward triton'])} |" in there
    assert f"| {rows[2]['shape']} | " in tables["attention_memory"].split("On one Made-up GPU 1:")[1]
    assert "not yet measured" in tables["training_step"] and "Made-up" not in tables["training_step"]
    report.main(["--check", "--pages", str(pages)])


@needs_triton
@pytest.mark.slow
def test_steps_and_losses_of_a_gpu_have_tables_of_their_own(results, pages, gpu_step, tmp_path):
    for step in ("training_step", "cross_entropy"):
        path = tmp_path / "gpu" / "made-up-gpu-1" / f"{step}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gpu_step(step, "").path.read_bytes())
    report.main(["--pages", str(pages)])
    text = (pages / "performance.md").read_text()
    assert text.count("On one Made-up GPU 1:") == 2
    there = text.split("On one Made-up GPU 1:")
    assert "| model | batch | patched / stock | in plain PyTorch / stock |" in there[1]
    assert "| DeiT-small, 224 pixels | 2 | " in there[1] and "| 6 | 53 | " in there[2]


def test_the_default_table_goes_before_longer_ones(results):
    found = json.loads((results / "attention-cpu.json").read_text())
    again, more = dict(found["rows"][0]), dict(found["rows"][0]) | {"batch": 9}
    again["forward native"], again["forward flex"] = 99.0, 88.0
    (results / "attention_full-cpu.json").write_text(json.dumps({"rows": [again, more], "memory": []}))
    table = report.attention()
    assert "99.0" not in table and table.count("2x8x1024, float32 |") == 1 and table.count("9x8x1024, float32 |") == 1
    assert table.index("2x8x1024, float32 |") < table.index("9x8x1024")
    assert table.count("| 88.0 |") == 1  # what the default table has not measured is filled in


def test_mistakes_are_named(results, pages):
    (results / "attention-cpu.json").unlink()
    for path in results.glob("attention_*-cpu.json"):
        path.unlink()
    with pytest.raises(SystemExit, match="run `python -m benchmarks.attention`"):
        report.main(["--pages", str(pages)])
    for path in pages.glob("*.md"):
        path.write_text("no tables")
    with pytest.raises(SystemExit, match="there must be one table .* got none"):
        report.main(["--pages", str(pages)])
