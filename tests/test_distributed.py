"""Two processes against one: DistributedDataParallel, FSDP2 and the configs for accelerate.

The processes are launched once and run every check of tests/distributed; the tests here look at what they measured.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from distributed import adapters, data_parallel, fully_sharded, prepared, trainers
from distributed.common import errors, stirred
from distributed.launching import COMMAND, CONFIGS, launch
from filelock import FileLock
from torch.distributed.fsdp import StateDictType
from transformers import AutoModelForCausalLM

from hf_multimax import multimax_parameters

ROOT = Path(__file__).parents[1]
#: what the order of a sum may cost in float32, relative to a tensor's largest entry
ROUNDING = 5e-5
FLOAT32, BFLOAT16 = "torch.float32", "torch.bfloat16"


@pytest.fixture(scope="session")
def launched(tmp_path_factory) -> Path:
    """The folder that two gloo processes have left behind; one launch for all workers of the test run."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "two_processes"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
            command = [*launch, str(ROOT / "tests" / "distributed" / "worker.py"), str(folder)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
            (folder / "log").write_text(done.stdout + done.stderr)
    return folder


@pytest.fixture
def measured(launched):
    """What a check measured, which fails here if it failed there, or if it did not run in two processes."""
    path = launched / "results.json"
    assert path.exists(), (launched / "log").read_text()[-5000:]
    results = json.loads(path.read_text())

    def look_up(name: str) -> dict:
        result = results[name]
        assert "error" not in result, result["error"]
        assert result["world_size"] == 2
        return result

    return look_up


# -- DistributedDataParallel -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", data_parallel.CASES)
def test_ddp_has_the_gradients_of_one_process(measured, name):
    result = measured(f"ddp {name}")
    assert result["wrapper"] == "DistributedDataParallel"
    assert result["scalars"] == [FLOAT32]
    assert result["loss"] < 1e-5
    assert result["gradients"]["scalars"] < ROUNDING
    assert result["gradients"]["rest"] < (0.1 if "bfloat16" in name else ROUNDING)


def test_ddp_with_accumulation_and_checkpointing(measured):
    result = measured("ddp accumulation")
    assert result["wrapper"] == "DistributedDataParallel"
    assert max(result["gradients"].values()) < ROUNDING
    assert max(result["weights"].values()) < ROUNDING


@pytest.mark.parametrize("name", trainers.RUNS)
def test_the_trainer_in_two_processes_is_the_trainer_in_one(measured, launched, tmp_path, name):
    result = measured(f"trainer {name}")
    assert (result["wrapper"], result["processes"]) == ("DistributedDataParallel", 2)
    assert result["distributed_type"] == "MULTI_CPU"
    single = trainers.train(tmp_path, name, processes=1)
    assert (single["wrapper"], single["processes"]) == ("GPT2LMHeadModel", 1)
    assert len(result["losses"]) == 3
    half = "bfloat16" in name
    assert result["losses"] == pytest.approx(single["losses"], rel=2e-3 if half else 1e-5)
    assert result["norms"] == pytest.approx(single["norms"], rel=2e-2 if half else 1e-5)
    assert result["scalars"] == [FLOAT32]
    both = [AutoModelForCausalLM.from_pretrained(path) for path in (launched / f"trainer {name}", tmp_path)]
    found = errors(*(dict(model.named_parameters()) for model in both))
    assert found["scalars"] < (1e-3 if half else ROUNDING)
    assert found["rest"] < (2e-2 if half else ROUNDING)
    kinds = {n: p.dtype for n, p in both[0].named_parameters()}
    assert {str(d) for n, d in kinds.items() if "multimax" in n} == {FLOAT32}
    assert {str(d) for n, d in kinds.items() if "multimax" not in n} == {BFLOAT16 if half else FLOAT32}


# -- FSDP2 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", fully_sharded.CASES)
def test_fsdp2_has_the_gradients_of_the_whole_model(measured, name):
    units, _ = fully_sharded.CASES[name]
    result = measured(f"fsdp {name}")
    assert result["wrapper"] == "FSDPModule"
    assert result["sharded"]
    assert (result["units"] > 0) == (units != "block")
    assert result["loss"] < 1e-5
    assert max(result["gradients"].values()) < ROUNDING


def test_fsdp2_trains_saves_and_loads_as_the_whole_model_does(measured):
    result = measured("fsdp training")
    assert result["wrapper"] == "FSDPModule"
    assert result["clipped"]
    assert result["norms"] < ROUNDING
    assert result["moved"] > 1e-5
    assert max(result["weights"].values()) < ROUNDING
    assert result["files"] == ["model.safetensors"]
    assert result["different"] == []
    assert result["logits"] < 1e-5
    assert result["read"] == {"scalars": 0.0, "rest": 0.0}


@pytest.mark.parametrize("name", ["compute, one", "compute, each", "model, one"])
def test_fsdp2_in_bfloat16_keeps_the_scalars_in_float32(measured, name):
    result = measured(f"fsdp bfloat16 {name}")
    assert result["wrapper"] == "FSDPModule"
    assert result["computed"] == [f"q {BFLOAT16}", f"ranges {FLOAT32}", f"ts {FLOAT32}"]
    assert result["scalars"] == [[FLOAT32]] * 3
    assert result["rest"] == BFLOAT16
    assert result["different"] == []
    assert result["gradients"]["scalars"] < ROUNDING
    assert result["gradients"]["rest"] < 0.1


def test_what_fsdp2_cannot_do_is_refused(measured):
    result = measured("fsdp refusals")
    assert "ValueError: FSDP's mixed precision rounds the scalars of MultiMax to torch.bfloat16" in result["rounded"]
    assert "shard_modulators" in result["rounded"]
    assert "uniform original parameter dtype" in result["mixed"]
    assert (
        "h.0.attn.multimax.scale, which has no dimension: patch the model with per_head=True" in result["no dimension"]
    )
    assert "call shard_modulators before fully_shard" in result["late"]
    assert "call patch_model first" in result["unpatched"]


@pytest.mark.parametrize("name", prepared.CASES)
def test_accelerate_prepares_modulators_as_units_of_their_own(measured, name):
    result = measured(f"prepared{name}")
    half = "bf" in name
    assert result["wrapper"] == "FSDPModule"
    assert result["units"][0] == result["units"][1] > 0
    assert result["computed"] == [f"q {BFLOAT16 if half else FLOAT32}", f"ranges {FLOAT32}", f"ts {FLOAT32}"]
    assert result["norm"] < (2e-2 if half else ROUNDING)
    assert max(result["weights"].values()) < (2e-2 if half else ROUNDING)
    assert result["scalars"] == result["loaded"] == [FLOAT32]
    assert result["different"] == []
    assert result["files"] == ["model.safetensors"]


@pytest.mark.parametrize("clip", ["group", "scale"])
def test_the_scalars_are_clipped_apart_under_fsdp2(measured, clip):
    result = measured(f"prepared clip {clip}")
    assert result["norms"][1] == pytest.approx(result["norms"][0], rel=ROUNDING)
    assert result["norms"][0] > 0.1
    assert max(result["gradients"].values()) < ROUNDING


# -- adapters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in adapters.CHECKS if "prepared" in name])
def test_accelerate_prepares_adapters(measured, name):
    result = measured(name)
    assert result["wrapper"] == "FSDPModule"
    assert result["reached"] == result["trained"] == 4
    assert result["scalars"] == [FLOAT32]
    assert result["gradients"]["scalars"] < (2e-2 if "bf16" in name else ROUNDING)


@pytest.mark.parametrize("name", [name for name in adapters.CHECKS if "prepared" not in name])
def test_gradients_reach_an_adapter_and_nothing_else(measured, name):
    result, half = measured(name), "bfloat16" in name
    assert result["wrapper"] == ("DistributedDataParallel" if "ddp" in name else "FSDPModule")
    assert result["reached"] == result["trained"] == (8 if "lora" in name else 4)
    assert result["others"] == []
    assert result["scalars"] == [FLOAT32]
    assert result["loss"] < (2e-2 if half else 1e-5)
    assert max(result["gradients"].values()) < (0.1 if half else ROUNDING)
    assert max(result["weights"].values()) < (2e-2 if half else ROUNDING)
    if "fsdp" in name:
        assert result["saved"] == result["trained"] and result["different"] == []


# -- the configs of the recipes ----------------------------------------------------------------------------------------

LAUNCHERS = {
    "one_gpu": ("simple_launcher", 1, 1),
    "ddp": ("multi_gpu_launcher", 8, 1),
    "two_nodes": ("multi_gpu_launcher", 16, 2),
    "fsdp2": ("multi_gpu_launcher", 8, 1),
    "zero2": ("deepspeed_launcher", 8, 1),
    "zero3": ("deepspeed_launcher", 8, 1),
}


def test_every_config_is_tested():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(LAUNCHERS)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_accelerate_reads_the_configs(name):
    path = CONFIGS / f"{name}.yaml"
    config = load_config_from_file(str(path))
    launcher, arguments, environment = launch(
        name, *(("--main_process_ip", "127.0.0.1") if config.num_machines > 1 else ())
    )
    assert (launcher, arguments.num_processes, arguments.num_machines) == LAUNCHERS[name]
    assert environment["ACCELERATE_MIXED_PRECISION"] == ("no" if "zero" in name else "bf16")
    assert environment.get("ACCELERATE_USE_FSDP", "false") == str(name == "fsdp2").lower()
    assert environment.get("ACCELERATE_USE_DEEPSPEED", "false") == str("zero" in name).lower()
    command = [line for line in path.read_text().splitlines() if line.startswith("#   accelerate launch")]
    assert command
    assert all(f"--config_file recipes/accelerate/{name}.yaml" in line for line in command)
    clip = " --multimax_clip global" if "zero" in name else ""  # DeepSpeed clips by one norm
    assert all(line.endswith(" ".join(COMMAND) + clip) for line in command)


def test_the_fsdp2_config_makes_one_file(monkeypatch):
    for key, value in launch("fsdp2")[2].items():
        if key.startswith("FSDP_"):
            monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
    assert plugin.state_dict_type == StateDictType.FULL_STATE_DICT


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_accelerate_understands_the_deepspeed_configs_without_deepspeed(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    environment = {key: value for key, value in launch(name)[2].items() if key.startswith("ACCELERATE_")}
    with mock.patch.dict(os.environ, environment):
        plugin = DeepSpeedPlugin()
        plugin.set_mixed_precision(environment["ACCELERATE_MIXED_PRECISION"])
    config = plugin.deepspeed_config
    assert plugin.zero_stage == config["zero_optimization"]["stage"] == int(name[-1])
    assert not plugin.zero3_init_flag
    # float32 weights, so that the scalars need no exception; bfloat16 in computation
    assert not config["bf16"]["enabled"]
    assert not config["fp16"]["enabled"]
    assert config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    if name == "zero3":
        assert plugin.zero3_save_16bit_model
        # attention reads the scalars outside their module's forward: they must never be partitioned
        largest = max(p.numel() for p in multimax_parameters(stirred(per_head=True)).values())
        assert config["zero_optimization"]["stage3_param_persistence_threshold"] == 100_000 > 100 * largest
