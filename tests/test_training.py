"""Training a patched model with what people train with: Trainer, PEFT, checkpointing, autocast, compile, accelerate."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from models import TRAINED, inputs_for, make
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

from hf_multimax import backend, multimax_parameters, patch_model


def stirred(name, seed=0, **options):
    model = patch_model(make(name, seed), **options)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in multimax_parameters(model).values():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return model


def trainer(model, folder, **arguments):
    arguments = {"per_device_train_batch_size": 2, "report_to": [], "use_cpu": True, "max_steps": 2, **arguments}
    arguments = TrainingArguments(str(folder), save_strategy="no", disable_tqdm=True, **arguments)
    batch = inputs_for(model)
    rows = [{key: value[i] for key, value in batch.items()} for i in (0, 1)]
    return Trainer(model, arguments, train_dataset=rows)


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("options", [{}, {"output": True, "per_head": True}, {"affine": True}], ids=str)
def test_twenty_steps_lower_the_loss(name, options):
    model = patch_model(make(name), **options).train()
    batch = inputs_for(model)
    before = {k: p.clone() for k, p in multimax_parameters(model).items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    moved = {k for k, p in multimax_parameters(model).items() if not torch.equal(p, before[k])}
    assert {k for k in before if "ts" in k} <= moved


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "T5ForConditionalGeneration"])
def test_the_stock_trainer_decays_none_of_the_scalars(name, tmp_path):
    model = patch_model(make(name), output=True, affine=True)
    optimizer = trainer(model, tmp_path, weight_decay=0.1).create_optimizer()
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {decay[id(p)] for p in multimax_parameters(model).values()} == {0.0}
    linear = [m.weight for m in model.modules() if isinstance(m, nn.Linear | Conv1D)]
    assert {decay[id(weight)] for weight in linear if id(weight) in decay} == {0.1}


@pytest.mark.parametrize("options", [{}, {"output": True}], ids=str)
def test_the_stock_trainer_trains_and_its_label_smoothing_shifts_the_labels(tmp_path, options):
    model = stirred("GPT2LMHeadModel", **options)
    batch = inputs_for(model)
    run = trainer(model, tmp_path, label_smoothing_factor=0.1)
    logits = model(**batch).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    expected = cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
    with torch.no_grad():
        loss = run.compute_loss(model, dict(batch))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    run.train()


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "T5ForConditionalGeneration", "ViTForImageClassification"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(name, reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = stirred(name).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**inputs_for(model), **({} if "ViT" in name else {"use_cache": False})).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], value)


@pytest.mark.parametrize("name", TRAINED)
def test_bfloat16_autocast_by_accelerate(name):
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    plain = stirred(name).train()
    expected = plain(**inputs_for(plain)).loss.item()
    model = accelerator.prepare(stirred(name, output=False).train())
    loss = model(**inputs_for(plain)).loss
    accelerator.backward(loss)
    assert loss.item() == pytest.approx(expected, rel=5e-2)
    for name, parameter in multimax_parameters(model).items():
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "ViTForImageClassification", "T5ForConditionalGeneration"])
@pytest.mark.parametrize("output", [False, True])
def test_compile_without_graph_breaks(name, output):
    torch._dynamo.reset()
    model = stirred(name, output=output).train()
    batch = inputs_for(model, labels=False)  # stock GPT-2 logs a warning on the way to its loss, which breaks the graph
    expected = model(**batch)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs = compiled(**batch)
    torch.testing.assert_close(outputs.logits, expected.logits, rtol=1e-4, atol=1e-4)
    outputs.logits.square().sum().backward()
    assert all(p.grad is not None for p in multimax_parameters(model).values())


@pytest.mark.slow
def test_compile_with_inductor():
    torch._dynamo.reset()
    model = stirred("GPT2LMHeadModel").train()
    batch = inputs_for(model, labels=False)
    expected = model(**batch).logits
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(**batch).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("GPT2LMHeadModel", None),
        ("T5ForConditionalGeneration", None),
        ("MT5ForConditionalGeneration", None),
        ("MarianMTModel", ["q_proj", "v_proj"]),  # PEFT has no defaults for it
        ("ViTForImageClassification", ["q_proj", "v_proj"]),  # those of PEFT are the names of an older ViT
    ],
)
def test_lora_with_its_default_targets(name, targets, tmp_path):
    model = stirred(name)
    batch = inputs_for(model)
    adapted = get_peft_model(model, LoraConfig(modules_to_save=["multimax"], target_modules=targets)).train()
    scalars = {k: p for k, p in multimax_parameters(adapted).items() if p.requires_grad}
    assert scalars
    before = {key: value.clone() for key, value in scalars.items()}
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = adapted(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert any(not torch.equal(value, before[key]) for key, value in scalars.items())
    adapted.eval()
    with torch.no_grad(), backend("eager"):
        expected = adapted(**batch).logits
    with torch.no_grad(), backend("tiled"):  # the kernels see through PEFT's wrapper
        torch.testing.assert_close(adapted(**batch).logits, expected, rtol=1e-3, atol=1e-4)
    adapted.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(stirred(name), tmp_path)
    torch.testing.assert_close(reloaded.eval()(**batch).logits, adapted.eval()(**batch).logits)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(**batch).logits, adapted(**batch).logits)
