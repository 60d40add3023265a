"""DeepSpeed's ZeRO-2 and ZeRO-3 with the recipes' configs, in two processes on CPUs, against one process without it."""

import json
import os
import subprocess
import sys

import pytest
from distributed import trainers
from distributed.common import errors, stirred
from distributed.launching import CONFIGS
from transformers import AutoModelForCausalLM

from hf_multimax import is_patched

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow

WORKER = CONFIGS.parents[1] / "tests" / "distributed" / "deepspeed_worker.py"


RUNS = ("plain", "output")


def launch(folder, stage, precision):
    for name in RUNS:
        stirred(**trainers.RUNS[name][0]).save_pretrained(folder / "start" / name)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, str(WORKER), str(folder), str(CONFIGS / f"zero{stage}.json"), precision],
        env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("precision", ["float32", "autocast"])
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_is_one_process(stage, precision, tmp_path):
    found = launch(tmp_path / "zero", stage, precision)
    half = precision == "autocast"
    assert tuple(found) == RUNS
    for name, result in found.items():
        more = {"bf16": True} if half else {}
        single = trainers.train(tmp_path / name, name, 1, tmp_path / "zero" / "start" / name, **more)
        assert (result["distributed_type"], result["processes"]) == ("DEEPSPEED", 2)
        assert len(result["losses"]) == 3
        assert result["losses"] == pytest.approx(single["losses"], rel=5e-3 if half else 1e-5)
        both = [AutoModelForCausalLM.from_pretrained(path / name) for path in (tmp_path / "zero", tmp_path)]
        assert all(is_patched(model) for model in both)
        wrong = errors(*(dict(model.named_parameters()) for model in both))
        assert wrong["scalars"] < (0.05 if half else 1e-4), wrong
        assert wrong["rest"] < (0.1 if half else 1e-4), wrong
