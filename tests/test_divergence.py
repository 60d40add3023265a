"""Scalars that become NaN are noticed at the optimizer step that does it, and never saved or loaded."""

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from zoo import zoo_inputs, zoo_model

from hf_multimax import freeze_base, multimax_parameters, patch_model

KEY = "model.layers.1.self_attn.multimax.ts"


def model_and_optimizer(**options):
    model = patch_model(zoo_model("LlamaForCausalLM"), **options).train()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def step(model, optimizer, factor=1.0):
    loss = model(**zoo_inputs("LlamaForCausalLM")).loss * factor
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def poison(model, key=KEY, value=float("nan")):
    with torch.no_grad():
        multimax_parameters(model)[key][0] = value


@pytest.mark.parametrize("output", [False, True])
def test_a_loop_of_ones_own_stops_at_the_step(output):
    model, optimizer = model_and_optimizer(output=output)
    for _ in range(3):
        step(model, optimizer)
    with pytest.raises(FloatingPointError, match=r"step 4 .*layers\.0\.self_attn\.multimax\.ranges"):
        step(model, optimizer, factor=float("nan"))


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.Adafactor])
def test_any_optimizer(optimizer_class):
    model = patch_model(zoo_model("LlamaForCausalLM")).train()
    optimizer = optimizer_class(model.parameters(), lr=1e-3)
    step(model, optimizer)
    with pytest.raises(FloatingPointError, match="step 2"):
        step(model, optimizer, factor=float("inf"))


@pytest.mark.parametrize("wrap", ["copy", "adapter", "frozen", "compiled"])
def test_any_way_of_training(wrap):
    model = patch_model(zoo_model("LlamaForCausalLM")).train()
    if wrap == "copy":
        import copy

        model = copy.deepcopy(model)
    elif wrap == "adapter":
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["multimax"])).train()
    elif wrap == "frozen":
        freeze_base(model)
    elif wrap == "compiled":
        model.compile(backend="aot_eager")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    step(model, optimizer)
    with pytest.raises(FloatingPointError, match="multimax"):
        step(model, optimizer, factor=float("nan"))


def test_a_step_that_a_loss_scaler_skips_is_none():
    model, optimizer = model_and_optimizer()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    for _ in range(2):
        scaler.scale(model(**zoo_inputs("LlamaForCausalLM")).loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert scaler.get_scale() < 2.0**127


def test_the_stock_trainer_stops_and_keeps_the_good_checkpoints(tmp_path):
    class Explodes(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            return loss * float("nan") if self.state.global_step == 3 else loss

    ids = zoo_inputs("LlamaForCausalLM")["input_ids"]
    rows = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=8, save_steps=1, save_total_limit=1, report_to=[], use_cpu=True, logging_steps=1
    )
    trainer = Explodes(patch_model(zoo_model("LlamaForCausalLM")), arguments, train_dataset=rows)
    with pytest.raises(FloatingPointError, match="step 4"):
        trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    assert all(value.isfinite().all() for value in multimax_parameters(loaded).values())


def test_a_resumed_step_has_its_number():
    model, optimizer = model_and_optimizer()
    step(model, optimizer)
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        state["step"] = torch.tensor(100.0)
    resumed = torch.optim.AdamW(model.parameters(), lr=1e-3)
    resumed.load_state_dict(saved)
    with pytest.raises(FloatingPointError, match="step 101 "):
        step(model, resumed, factor=float("nan"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", [KEY, "multimax_output.ranges"])
def test_it_is_not_saved_over_what_is_there(tmp_path, key, value):
    model = patch_model(zoo_model("LlamaForCausalLM"), output=True)
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    poison(model, key, value)
    for options in ({}, {"state_dict": model.state_dict()}):
        with pytest.raises(ValueError, match=key):
            model.save_pretrained(tmp_path, **options)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("key", [KEY, "multimax_output.ts"])
def test_it_is_not_loaded(tmp_path, key, value):
    patch_model(zoo_model("LlamaForCausalLM"), output=True).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    weights[key] = weights[key].clone()
    weights[key][1] = value
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"NaN or infinite.*{key}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_slopes_that_run_away_are_reported_once(caplog):
    model, optimizer = model_and_optimizer()
    poison(model, value=2000.0)
    with caplog.at_level(logging.WARNING, logger="hf_multimax"):
        for _ in range(3):
            step(model, optimizer)
    reports = [record.message for record in caplog.records if "run away" in record.message]
    assert len(reports) == 1 and KEY in reports[0] and "step 1" in reports[0]
