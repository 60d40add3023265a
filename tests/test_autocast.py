"""Mixed precision as people train with it: autocast, gradient checkpointing, no cache, any trainer."""

import math

import pytest
import torch
from test_architectures import randomised
from torch.nn.functional import scaled_dot_product_attention
from transformers import Trainer, TrainingArguments
from zoo import CAUSAL, ZOO, zoo_inputs, zoo_model

from hf_multimax import backend, multimax_attention, multimax_parameters, normalize, patch_model, registered_normalizers
from tests.tolerances import RELATIVE, relative_error

TYPES = (torch.bfloat16, torch.float16)


def tensors(length=70):
    torch.manual_seed(1)
    found = {name: torch.randn(2, 4, length, 16) for name in ("q", "k", "v")}
    found |= {"ranges": torch.randn(4), "ts": torch.rand(4) * 0.2}
    return {name: x.requires_grad_() for name, x in found.items()}


def computed(dtype, autocast, mixed=False, backward_inside=False, **options):
    """Output and gradients of a call, under autocast or with its inputs cast by hand."""
    leaves = tensors()
    q, k, v = (leaves[name] for name in ("q", "k", "v"))
    with torch.autocast("cpu", dtype, enabled=autocast):
        if not autocast:
            q, k, v = (x.to(dtype) for x in (q, k, v))
        elif mixed:
            v = v.to(dtype)
        out = multimax_attention(q, k, v, leaves["ranges"], leaves["ts"], is_causal=True, **options)
        if backward_inside:
            out.float().square().sum().backward()
    if not backward_inside:
        out.float().square().sum().backward()
    assert out.dtype == dtype
    return {"out": out.detach(), **{name: x.grad for name, x in leaves.items()}}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("which", ["eager", "tiled", "native", "auto"])
def test_attention_casts_as_sdpa_does(which, dtype):
    """As the inputs cast by hand, bit for bit, whatever autocast would do to what is computed inside."""
    with backend(which):
        expected = computed(dtype, autocast=False)
        for mixed in (False, True):
            for inside in (False, True):
                found = computed(dtype, True, mixed, inside)
                assert all(torch.equal(found[name], expected[name]) for name in expected), (mixed, inside)


def test_float64_stays():
    q, k, v = (torch.randn(1, 2, 5, 8, dtype=torch.float64) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        assert multimax_attention(q, k, v, torch.zeros(4), torch.zeros(4)).dtype == torch.float64
        assert scaled_dot_product_attention(q, k, v).dtype == torch.float64


@pytest.mark.parametrize("name", registered_normalizers())
def test_every_normalizer(name):
    options = {"tsoftmax": {"t": 2.0}, "topk_softmax": {"k": 3}}.get(name, {})
    model = patch_model(zoo_model("LlamaForCausalLM"), normalizer=name, normalizer_kwargs=options)
    batch = zoo_inputs("LlamaForCausalLM", length=40)
    for which in ("eager", "auto", "tiled"):
        with backend(which), torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert normalize(name, torch.randn(3, 9), **options).dtype == torch.float32


def trained(model, batch, dtype):
    """Loss and gradients of one step as Trainer takes it, in autocast's ``dtype`` or in float32."""
    model.train()
    if dtype is not None and model.supports_gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    options = {"use_cache": False} if "input_ids" in batch and hasattr(model.config, "use_cache") else {}
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        loss = model(**batch, **options).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", [name for name in ZOO if name != "CLIPTextModelWithProjection"])
def test_a_training_step_is_stocks_within_the_types_rounding(name, dtype):
    batch = zoo_inputs(name)
    stock, exact = trained(zoo_model(name), batch, dtype), trained(zoo_model(name), batch, None)
    loss, gradients = trained(patch_model(zoo_model(name)), batch, dtype)
    digits = 16
    if not math.isfinite(stock[0]):  # LongT5's own float16
        stock, digits = exact, 64
    assert abs(loss - exact[0]) <= 4 * abs(stock[0] - exact[0]) + 4 * RELATIVE[dtype] * abs(exact[0])
    for key in stock[1]:
        errors = [relative_error(x[key], exact[1][key]) for x in (gradients, stock[1])]
        assert errors[0] <= 4 * errors[1] + digits * RELATIVE[dtype], (key, errors)
    ours = [value for key, value in gradients.items() if "multimax" in key]
    assert ours and all(value.dtype == torch.float32 and value.isfinite().all() for value in ours)


@pytest.mark.parametrize("name", CAUSAL)
def test_the_stock_trainer(name, tmp_path):
    model = randomised(patch_model(zoo_model(name)), 0.05)
    before = {key: value.clone() for key, value in multimax_parameters(model).items()}
    rows = [{"input_ids": row, "labels": row} for row in zoo_inputs(name)["input_ids"]] * 2
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, bf16=True, gradient_checkpointing=True, report_to=[], use_cpu=True,
        learning_rate=1e-2, save_strategy="no",
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows).train()
    after = multimax_parameters(model)
    assert all(value.isfinite().all() and not torch.equal(value, before[key]) for key, value in after.items())
