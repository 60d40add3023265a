"""Gradient checkpointing of a model whose scalars alone are trained, whatever its inputs."""

import pytest
import torch
from models import inputs_for, make

from hf_multimax import freeze_base, multimax_parameters, patch_model


def frozen(name, checkpointing=None, first=False, **options):
    """A model with its scalars away from zero, frozen but for these; checkpointing is switched on first or last."""
    model = make(name).train()
    if first:
        model.gradient_checkpointing_enable(checkpointing)
    patch_model(model, **options)
    freeze_base(model)
    if checkpointing and not first:
        model.gradient_checkpointing_enable(checkpointing)
    model.disable_input_require_grads()  # which Transformers does not do for every model
    with torch.no_grad():
        for parameter in multimax_parameters(model).values():
            parameter.add_(0.3)
    return model


def gradients(model):
    model(**inputs_for(model)).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("first", [True, False], ids=["before", "after patching"])
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "ViTForImageClassification", "T5ForConditionalGeneration"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_scalars_get_the_gradients_that_they_get_without(name, reentrant, first):
    expected = gradients(frozen(name))
    found = gradients(frozen(name, {"use_reentrant": reentrant}, first))
    assert expected.keys() == found.keys() == multimax_parameters(frozen(name)).keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-7)


def test_blocks_below_the_first_trained_one_need_no_backward_pass():
    model = frozen("GPT2LMHeadModel", {"use_reentrant": True}, include=r"h\.1\.")
    calls = [0, 0]
    for i, block in enumerate(model.transformer.h):
        block.attn.register_forward_pre_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    assert len(gradients(model)) == 2
    assert calls == [1, 2]  # the second is computed again, in the backward pass
