"""hf_multimax.training: the optimizer's groups, the clips, the log, and what they refuse."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from huggingface_hub import ModelCard
from models import inputs_for, make
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.utils import get_total_norm
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_multimax import (
    MultiMaxCallback,
    MultiMaxSeq2SeqTrainer,
    MultiMaxSeq2SeqTrainingArguments,
    MultiMaxTrainer,
    MultiMaxTrainingArguments,
    freeze_base,
    multimax_parameters,
    parameter_groups,
    patch_model,
)
from hf_multimax.diagnostics import attention_statistics
from hf_multimax.publishing.card import layer_modulators

QUIET = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}


class Listener(TrainerCallback):
    """What a tracker gets."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(logs)


def patched(name="GPT2LMHeadModel", **options):
    model = patch_model(make(name), **options)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in multimax_parameters(model).values():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return model


def rows(model, count=4):
    batch = inputs_for(model)
    return [{key: value[i % len(value)] for key, value in batch.items()} for i in range(count)]


def trainer(model, folder, cls=MultiMaxTrainer, arguments=MultiMaxTrainingArguments, **options):
    values = {**QUIET, "max_steps": 2, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, **options}
    if arguments is not TrainingArguments:
        values.setdefault("multimax_figures", False)  # they take longer than the training
    data = rows(model.get_base_model() if isinstance(model, PeftModel) else model)
    return cls(model=model, args=arguments(str(folder), **values), train_dataset=data, eval_dataset=data)


def backward(model):
    model.train()
    model(**inputs_for(model)).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


# -- the optimizer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [None, 0.05])
def test_every_parameter_is_in_one_group_with_its_own_rate_and_decay(tmp_path, rate):
    model = patched(output=True, per_head=True)
    run = trainer(model, tmp_path, learning_rate=0.01, weight_decay=0.1, multimax_learning_rate=rate)
    groups = run.create_optimizer().param_groups
    place = {id(p): group for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(place) == len(list(model.parameters()))
    scalars = multimax_parameters(model)
    assert len(scalars) == 6
    for name, parameter in model.named_parameters():
        group = place[id(parameter)]
        own = (rate or 0.01) / (30 if name.endswith(".ts") else 1)  # of order 2
        assert group["lr"] == (own if name in scalars else 0.01), name
        if name in scalars:
            assert group["weight_decay"] == 0
    assert place[id(model.transformer.wte.weight)]["weight_decay"] == 0.1


def test_a_rate_of_its_own_moves_the_scalars_only(tmp_path):
    results = []
    for rate in (None, 1e-12):
        model = patched()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        trainer(model, tmp_path, learning_rate=1e-2, multimax_learning_rate=rate, max_steps=1).train()
        moved = {name: (p.detach() - before[name]).abs().max().item() for name, p in model.named_parameters()}
        results.append(moved)
    scalars = multimax_parameters(model).keys()
    assert all(results[1][name] < 1e-9 < results[0][name] for name in scalars)
    assert all(results[1][name] == results[0][name] for name in results[0].keys() - scalars)  # one step: no feedback


@pytest.mark.parametrize(
    "options, slopes",  # and the rate of slopes, of 0.5 for the others
    [({"order": 1}, 0.5), ({}, 0.5 / 30), ({"order": 3}, 0.5 / 900), ({"init": "paper"}, 0.5), ({"affine": True}, 0.5)],
    ids=str,
)
def test_parameter_groups_for_a_loop_of_ones_own(options, slopes):
    model = patched(**options)
    groups = parameter_groups(model, weight_decay=0.1, multimax_learning_rate=0.5)
    rates = {id(p): group.get("lr") for group in groups for p in group["params"]}
    scalars = multimax_parameters(model)
    assert [group["weight_decay"] for group in groups][:2] == [0.1, 0.0]
    assert not any(group["weight_decay"] for group in groups[2:])
    assert {name: rates.pop(id(p)) for name, p in scalars.items()} == {
        name: slopes if name.endswith(".ts") else 0.5 for name in scalars
    }
    assert set(rates.values()) == {None}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    together = parameter_groups(model)
    assert len(together) == 3 and not any("lr" in group for group in together)
    torch.optim.AdamW(groups, lr=0.1)
    assert len(parameter_groups(freeze_base(model))) == 1
    assert len(parameter_groups(make("GPT2LMHeadModel"))) == 2


def test_muon_is_refused(tmp_path):
    model = patched(per_head=True)
    run = trainer(model, tmp_path)
    run.optimizer_cls_and_kwargs = (type("Muon", (torch.optim.SGD,), {}), {"lr": 0.1})
    with pytest.raises(ValueError, match="AdamW"):
        run.create_optimizer()


# -- the clip ----------------------------------------------------------------------------------------------------------


def test_the_groups_are_clipped_apart(tmp_path):
    model = patched(output=True)
    before = backward(model)
    scalars = multimax_parameters(model).keys()
    base_norm = get_total_norm([g for name, g in before.items() if name not in scalars])
    norm = trainer(model, tmp_path, max_grad_norm=1e-3, multimax_max_grad_norm=1e-4)._clip_grad_norm(model)
    assert norm.item() == pytest.approx(base_norm.item(), rel=1e-5)
    ours = [p.grad for p in multimax_parameters(model).values()]
    others = [p.grad for name, p in model.named_parameters() if name not in scalars]
    assert get_total_norm(ours).item() == pytest.approx(1e-4, rel=1e-2)
    assert get_total_norm(others).item() == pytest.approx(1e-3, rel=1e-2)


def test_large_gradients_of_the_scalars_leave_the_others_alone_in_groups_only(tmp_path):
    shrunk = {}
    for clip in ("group", "global"):
        model = patched()
        before = backward(model)
        for parameter in multimax_parameters(model).values():
            parameter.grad.mul_(1e6)
        trainer(model, tmp_path, max_grad_norm=1e3, multimax_clip=clip)._clip_grad_norm(model)
        name = "transformer.wte.weight"
        shrunk[clip] = (model.get_parameter(name).grad.norm() / before[name].norm()).item()
    assert shrunk["group"] == 1.0 and shrunk["global"] < 0.5


def test_scaled_norms_join_one_global_clip(tmp_path):
    model = patched(output=True)
    before = backward(model)
    total = 0.0
    for name, gradient in before.items():
        n = 1
        if name in multimax_parameters(model):
            n = model.config.vocab_size if "multimax_output" in name else 16
        total += gradient.double().square().sum().item() / n
    run = trainer(model, tmp_path, max_grad_norm=1e-3, multimax_clip="scale", multimax_clip_keys=16)
    assert run._clip_grad_norm(model).item() == pytest.approx(math.sqrt(total), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, before[name] * 1e-3 / math.sqrt(total), rtol=1e-3, atol=1e-9)


def test_global_is_the_stock_clip_and_a_stock_model_trains_alike(tmp_path):
    losses = []
    for cls, arguments in ((MultiMaxTrainer, MultiMaxTrainingArguments), (Trainer, TrainingArguments)):
        model = make("GPT2LMHeadModel")
        run = trainer(model, tmp_path, cls, arguments, max_steps=3, max_grad_norm=0.1, learning_rate=1e-2)
        run.train()
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]


def test_half_precision_gradients_are_unscaled_once(tmp_path):
    model = patched()
    run = trainer(model, tmp_path, max_grad_norm=1e-3)
    calls = []
    run.accelerator.unscale_gradients = lambda *a: calls.append(a)
    backward(model)
    run._clip_grad_norm(model)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"multimax_clip": "apart"}, "group, scale, global"),
        ({"multimax_learning_rate": 0.0}, "multimax_learning_rate must be positive"),
        ({"multimax_max_grad_norm": -1.0}, "multimax_max_grad_norm must be positive"),
        ({"multimax_clip_keys": 0}, "multimax_clip_keys must be positive"),
    ],
    ids=str,
)
def test_impossible_arguments_are_refused_by_name(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        MultiMaxTrainingArguments(str(tmp_path), **wrong)


def test_a_scaled_clip_needs_the_number_of_keys(tmp_path):
    with pytest.raises(ValueError, match="multimax_clip_keys"):
        trainer(patched(), tmp_path, multimax_clip="scale")
    trainer(patched(attention=False, output=True), tmp_path, multimax_clip="scale")


def test_plain_arguments_are_refused(tmp_path):
    with pytest.raises(TypeError, match="MultiMaxTrainingArguments"):
        trainer(patched(), tmp_path, arguments=TrainingArguments)


@pytest.mark.parametrize(
    ("kind", "name"), [(DistributedType.DEEPSPEED, "DeepSpeed"), (DistributedType.FSDP, "use FSDP 2")]
)
def test_deepspeed_and_fsdp_1_need_the_global_clip(tmp_path, monkeypatch, kind, name):
    run = trainer(patched(), tmp_path)
    monkeypatch.setattr(run.accelerator.state, "distributed_type", kind)
    monkeypatch.setattr(run.accelerator.state, "fsdp_plugin", SimpleNamespace(fsdp_version=1), raising=False)
    with pytest.raises(ValueError, match=f"(?s){name}.*multimax_clip='global'|multimax_clip='global'.*{name}"):
        run._check_clip()
    run.args.multimax_clip = "global"
    run._check_clip()


# -- the log -----------------------------------------------------------------------------------------------------------


def check_logs(logs, model):
    numbers = {key: value for log in logs for key, value in log.items() if key.startswith("multimax/")}
    layer = "transformer.h.1.attn"
    values = layer_modulators(model)[layer]
    for i, name in enumerate(("b1", "d1", "b2", "d2")):
        assert numbers[f"multimax/{layer}/ts_{name}"] == values["ts"][i]
        assert numbers[f"multimax/{layer}/ranges_{name}"] == values["ranges"][i]
    batch = {key: torch.stack([row[key] for row in rows(model, 2)]) for key in rows(model, 1)[0]}
    measured = attention_statistics(model, [batch])[layer]
    for name in ("sparsity", "multi_modality", "entropy"):
        assert numbers[f"multimax/{layer}/{name}"] == pytest.approx(measured[name].value, rel=1e-6)
    return numbers


def test_peft_trains_logs_and_closes(tmp_path):
    model = patched()
    adapted = get_peft_model(model, LoraConfig(modules_to_save=["multimax"], target_modules=["c_attn"]))
    run = trainer(adapted, tmp_path, eval_strategy="steps", eval_steps=1, learning_rate=0.01, label_names=["labels"])
    order = []

    class Closing(Listener):
        def on_train_end(self, *args, **kwargs):
            order.append(len(self.logs))

    listener = Closing()
    run.add_callback(listener)
    run.train()
    assert order == [len(listener.logs)]
    numbers = {key: value for log in listener.logs for key, value in log.items() if key.startswith("multimax/")}
    layer = "base_model.model.transformer.h.1.attn"
    trained = adapted.get_submodule(f"{layer}.multimax").modules_to_save["default"].ts.tolist()
    original = adapted.get_submodule(f"{layer}.multimax").original_module.ts.tolist()
    assert trained != original
    assert [numbers[f"multimax/{layer}/ts_{name}"] for name in ("b1", "d1", "b2", "d2")] == trained
    assert f"multimax/{layer}/sparsity" in numbers and not any("original_module" in key for key in numbers)
    with adapted.disable_adapter():
        assert layer_modulators(adapted)[layer]["ts"] == original


@pytest.mark.parametrize(
    "options, message",
    [
        ({"multimax_max_grad_norm": 1.0, "multimax_clip": "global"}, "multimax_max_grad_norm acts"),
        ({"multimax_max_grad_norm": 1.0, "max_grad_norm": 0.0}, "multimax_max_grad_norm acts"),
        ({"multimax_clip_keys": 5}, "multimax_clip_keys acts"),
    ],
)
def test_options_that_cannot_act_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        MultiMaxTrainingArguments(str(tmp_path), **options)


def test_a_rate_for_an_optimizer_of_ones_own_is_refused(tmp_path):
    model = patched()
    optimizer = torch.optim.AdamW(model.parameters())
    arguments = MultiMaxTrainingArguments(str(tmp_path), **QUIET, multimax_learning_rate=0.1)
    with pytest.raises(ValueError, match="optimizer of your own"):
        MultiMaxTrainer(model=model, args=arguments, train_dataset=rows(model), optimizers=(optimizer, None))


def test_what_cannot_be_measured_does_not_end_training(tmp_path, caplog):
    run = trainer(patched(), tmp_path, dataloader_drop_last=True, per_device_eval_batch_size=50)
    run.train()
    assert run.state.global_step == 2 and "no measures of attention" in caplog.text


def test_trackers_and_the_history_get_scalars_and_measures(tmp_path, capsys):
    model = patched()
    run = trainer(model, tmp_path, eval_strategy="steps", eval_steps=1)
    listener = Listener()
    run.add_callback(listener)
    run.train()
    numbers = check_logs(listener.logs, model)
    history = [entry for entry in run.state.log_history if any(key.startswith("multimax/") for key in entry)]
    assert [entry["step"] for entry in history] == [1, 2]
    assert history[-1] == {**numbers, "epoch": run.state.epoch, "step": 2}
    assert "multimax/" not in capsys.readouterr().out
    json.dumps(run.state.log_history, allow_nan=False)


def test_the_stock_trainer_takes_the_callback(tmp_path):
    model = patched()
    run = trainer(model, tmp_path, Trainer, TrainingArguments)
    listener = Listener()
    for callback in (MultiMaxCallback(run), listener):
        run.add_callback(callback)
    run.train()  # without evaluation it logs at the end
    check_logs(listener.logs, model)


def test_parameters_per_head_are_logged_by_head(tmp_path):
    run = trainer(patched(per_head=True), tmp_path, max_steps=1)
    run.train()
    keys = {key for entry in run.state.log_history for key in entry}
    assert {f"multimax/transformer.h.0.attn/ts_b1_head{head}" for head in range(4)} <= keys


def test_logging_leaves_training_as_it_was(tmp_path):
    losses = []
    for logging in (True, False):
        run = trainer(patched(), tmp_path, max_steps=3, eval_strategy="steps", eval_steps=1, multimax_logging=logging)
        run.train()
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
        assert any("multimax/" in key for entry in run.state.log_history for key in entry) == logging
    assert losses[0] == losses[1]


def test_the_trainers_card_has_multimaxs_part(tmp_path):
    model = patched()
    run = trainer(model, tmp_path)
    run.train()
    run.create_model_card(model_name="mine", tags="a-tag")
    card = ModelCard.load(tmp_path / "README.md")
    assert {"a-tag", "multimax"} <= set(card.data.tags)
    assert "Training hyperparameters" in card.text and "transformer.h.1.attn" in card.text
    assert "pip install" in card.text


def test_seq2seq(tmp_path):
    model = patched("MarianMTModel", output=True)
    run = trainer(
        model, tmp_path, MultiMaxSeq2SeqTrainer, MultiMaxSeq2SeqTrainingArguments, multimax_learning_rate=0.01
    )
    run.train()
    keys = {key for entry in run.state.log_history for key in entry}
    assert "multimax/model.decoder.layers.1.encoder_attn/entropy" in keys
    assert "multimax/multimax_output/ts_b1" in keys


def test_figures_are_drawn_at_the_end_and_shown_in_trackers(tmp_path):
    pytest.importorskip("matplotlib")

    class TensorBoard(TrainerCallback):
        tb_writer = SimpleNamespace(images={})

        def __init__(self):
            self.tb_writer.add_image = lambda name, pixels, step, dataformats: self.tb_writer.images.update(
                {name: (pixels.shape, str(pixels.dtype), step, dataformats)}
            )

    class WeightsAndBiases(TrainerCallback):
        _initialized, logged = True, []
        _wandb = SimpleNamespace(Image=Path, log=logged.append)

    run = trainer(patched(), tmp_path, eval_strategy="steps", eval_steps=1, multimax_figures=True)
    for callback in (TensorBoard(), WeightsAndBiases()):
        run.add_callback(callback)
    run.train()
    folder = tmp_path / "multimax_figures"
    names = {"curves", "modulators", "measures"}
    assert {path.name for path in folder.iterdir()} == {f"{name}.png" for name in names}
    shown = TensorBoard.tb_writer.images
    assert set(shown) == {f"multimax/{name}" for name in names}
    for shape, *rest in shown.values():
        assert shape[2] == 3 and min(shape[:2]) > 100 and rest == ["uint8", 2, "HWC"]
    (logged,) = WeightsAndBiases.logged
    assert logged == {"train/global_step": 2} | {f"multimax/{name}": folder / f"{name}.png" for name in names}


def test_figures_can_be_left_out_and_never_end_a_training(tmp_path):
    run = trainer(patched(), tmp_path / "without")
    run.train()
    assert not (tmp_path / "without" / "multimax_figures").exists()
    run = trainer(patched(), tmp_path / "in_the_way", multimax_figures=True)
    (tmp_path / "in_the_way").mkdir(exist_ok=True)
    (tmp_path / "in_the_way" / "multimax_figures").write_text("a file")
    run.train()
    assert run.state.global_step == 2
