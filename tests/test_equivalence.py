"""Whole models of every head class: identical to stock at first, and equal to the definition in float64 later."""

import copy

import pytest
import reference
import torch
from models import ALL, inputs_for, make
from tolerances import assert_draws_no_worse, relative_error, root_mean_square_error

from hf_multimax import backend, multimax_parameters, patch_model
from hf_multimax.models.discovery import attention_layers


def objective(outputs) -> torch.Tensor:
    """The loss, or else a fixed weighting of the largest output."""
    if outputs.get("loss") is not None:
        return outputs["loss"]
    output = next(v for v in outputs.values() if torch.is_tensor(v) and v.is_floating_point())
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return (output * weights).sum()


def run(model, batch) -> tuple[dict, dict]:
    """Every output tensor, and the gradient of every parameter, by name."""
    dtype = next(model.parameters()).dtype
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    outputs = model(**batch)
    model.zero_grad()
    objective(outputs).backward()
    tensors = {k: v.detach() for k, v in outputs.items() if torch.is_tensor(v) and v.is_floating_point()}
    return tensors, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("name", ALL)
def test_a_patched_model_is_the_stock_model_bit_for_bit(name, padded):
    model = make(name)
    batch = inputs_for(model, padded=padded)
    outputs, gradients = run(model, batch)
    with backend("eager"):
        new_outputs, new_gradients = run(patch_model(model), batch)
    assert outputs.keys() == new_outputs.keys()
    assert all(torch.equal(value, new_outputs[key]) for key, value in outputs.items())
    assert gradients.keys() == new_gradients.keys() - multimax_parameters(model).keys()
    assert [key for key, value in gradients.items() if not torch.equal(value, new_gradients[key])] == []


@pytest.mark.parametrize("options", [{}, {"order": 3}, {"per_head": True}, {"affine": True}], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_a_patched_model_is_the_definition_in_float64(name, options):
    if options and name not in ("GPT2LMHeadModel", "ViTForImageClassification", "T5ForConditionalGeneration"):
        pytest.skip("the options do not depend on the head class")
    errors: dict[int, tuple[list[float], list[float]]] = {0: ([], []), 1: ([], [])}
    for draw in range(4):  # one errs by luck
        stock = make(name)
        batch = inputs_for(stock)
        plain, exact = copy.deepcopy(stock), copy.deepcopy(stock).double()
        model = patch_model(stock, **options)
        torch.manual_seed(draw)
        with torch.no_grad():
            for parameter in multimax_parameters(model).values():
                parameter.copy_(0.5 * torch.randn_like(parameter))
        for twin, dtype in ((plain, torch.float32), (exact, torch.float64)):
            prepare_reference(twin, model, dtype)
        with backend("eager"):
            results = run(model, batch)
        for part, (found, plainly, exactly) in enumerate(zip(results, run(plain, batch), run(exact, batch))):
            for key in [key for key, value in exactly.items() if value.abs().max() < 1e-12]:
                assert found.pop(key).abs().max() < 1e-6  # sums that cancel, as over a bias that all classes share
                del plainly[key], exactly[key]
            for own, tensors in zip(errors[part], (found, plainly)):
                own.append(root_mean_square_error(tensors, exactly))
            wrong = {key: relative_error(found[key], exactly[key]) for key in found}
            assert max(wrong.values()) < 1e-2, wrong
    for both in errors.values():
        assert_draws_no_worse(*both, name)


def prepare_reference(twin, model, dtype):
    """Let the stock ``twin`` compute by the written-down definition, with the scalars of ``model``."""
    layers = attention_layers(twin)
    for name, module in layers.items():
        source = model.get_submodule(name).multimax
        holder = torch.nn.Module()
        for key, value in source.named_parameters():
            holder.register_parameter(key, torch.nn.Parameter(value.detach().to(dtype)))
        module.multimax = holder
        affine = (holder.scale, holder.shift) if hasattr(holder, "scale") else None
        module.reference = (holder.ranges, holder.ts, affine)
        module.config._attn_implementation_internal = reference.NAME
    twin.config._attn_implementation_internal = reference.NAME
