"""The README's tables of speed are what was measured."""

import json

import pytest

from benchmarks import report
from benchmarks.common import ROOT


@pytest.fixture
def results(tmp_path, monkeypatch):
    """The folder that results are read from, with a copy of those of this repository."""
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(report, "results_path", lambda name, device: tmp_path / f"{name}-{device}.json")
    return tmp_path


@pytest.fixture
def readme(tmp_path):
    """A copy of README.md."""
    path = tmp_path / "README.md"
    path.write_bytes((ROOT / "README.md").read_bytes())
    return path


def test_the_readme_is_up_to_date():
    report.main(["--check"])


def test_another_measurement_is_noticed_and_written(results, readme):
    path = results / "training_step-cpu.json"
    found = json.loads(path.read_text())
    found["rows"][0]["patched / stock"] = 7.125
    path.write_text(json.dumps(found))
    with pytest.raises(SystemExit, match="README.md is not what benchmarks/results says"):
        report.main(["--check", "--readme", str(readme)])
    report.main(["--readme", str(readme)])
    assert "| 7.12 | not yet measured |" in readme.read_text()
    report.main(["--check", "--readme", str(readme)])


def test_a_gpu_has_a_table_of_its_own(results, readme):
    found = json.loads((results / "attention-cpu.json").read_text())
    row = {key: found["rows"][0][key] for key in ("shape", "batch", "heads", "queries", "keys", "causal")}
    row |= {"dim": 128, "dtype": "bfloat16", "forward triton": 1.125, "training triton": 1.25, "forward flex": 12.5}
    (results / "attention-cuda.json").write_text(json.dumps({"rows": [row], "memory": []}))
    report.main(["--readme", str(readme)])
    text = readme.read_text()
    table = text[text.index("<!-- speed: attention -->") : text.index("<!-- speed: attention_memory -->")]
    here, there = table.split("On a GPU:")
    assert "not yet measured" not in table and "`native`" in here
    assert "| 2x8x1024, bfloat16, D = 128 | 1.12 / 1.25 | - | - | - | 12.5 | - |" in there


def test_the_default_table_goes_before_longer_ones(results):
    found = json.loads((results / "attention-cpu.json").read_text())
    again, more = dict(found["rows"][0]), dict(found["rows"][0]) | {"batch": 9}
    again["forward native"], again["forward flex"] = 99.0, 88.0
    (results / "attention_full-cpu.json").write_text(json.dumps({"rows": [again, more], "memory": []}))
    table = report.attention()
    assert "99.0" not in table and table.count("2x8x1024, float32 |") == 1 and table.count("9x8x1024, float32 |") == 1
    assert table.index("2x8x1024, float32 |") < table.index("9x8x1024")
    assert table.count("| 88.0 |") == 1  # what the default table has not measured is filled in


def test_mistakes_are_named(results, readme):
    (results / "attention-cpu.json").unlink()
    for path in results.glob("attention_*-cpu.json"):
        path.unlink()
    with pytest.raises(SystemExit, match="run `python -m benchmarks.attention`"):
        report.main(["--readme", str(readme)])
    readme.write_text("no tables")
    with pytest.raises(SystemExit, match="there must be one table .* got none"):
        report.main(["--readme", str(readme)])
