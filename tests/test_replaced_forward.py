"""Who replaces the forward of an output-modulated model is refused at that moment; who wraps it is not."""

import functools
import types

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from accelerate.state import AcceleratorState
from test_architectures import randomised
from zoo import zoo_inputs, zoo_model

from hf_multimax import patch_model, unpatch_model

NAMES = ("LlamaForCausalLM", "ViTForImageClassification", "BartForConditionalGeneration")


def fused(model):
    """As fused heads do it: the original in a closure, its name and signature, and labels taken away from it."""
    original = model.forward

    @functools.wraps(type(model).forward)
    def forward(self, *args, fused_head=False, labels=None, **kwargs):
        return original(*args, labels=labels, **kwargs) if not fused_head else self.base_model(*args, **kwargs)

    return types.MethodType(forward, model)


def lce(model):
    def lce_forward(self, input_ids=None, labels=None, **kwargs):
        return self.get_output_embeddings()(self.base_model(input_ids)[0])

    return types.MethodType(lce_forward, model)


REPLACEMENTS = {
    "fused head": fused,
    "a forward of its own": lce,
    "a function": lambda model: lambda *args, **kwargs: None,
    "a partial": lambda model: functools.partial(lambda m, *args, **kwargs: None, model),
    "the stock forward": lambda model: functools.partial(type(model).stock_class.forward, model),
}


@pytest.mark.parametrize("which", REPLACEMENTS)
@pytest.mark.parametrize("name", NAMES)
def test_a_replacement_is_refused_with_the_way_out(name, which):
    model = patch_model(zoo_model(name), output=True)
    before = model(**zoo_inputs(name)).loss
    with pytest.raises(ValueError, match="output modulator.*patch_model\\(model, output=False\\)"):
        model.forward = REPLACEMENTS[which](model)
    assert "forward" not in vars(model)
    assert torch.equal(model(**zoo_inputs(name)).loss, before)


@pytest.mark.parametrize("which", REPLACEMENTS)
def test_attention_alone_is_free(which):
    model = patch_model(zoo_model("LlamaForCausalLM"))
    model.forward = REPLACEMENTS[which](model)
    del model.forward
    model = patch_model(unpatch_model(patch_model(zoo_model("LlamaForCausalLM"), output=True)))
    model.forward = REPLACEMENTS[which](model)


@pytest.mark.parametrize("which", ["fused head", "a function"])
def test_a_model_whose_forward_is_replaced_gets_no_output_modulator(which):
    model = zoo_model("LlamaForCausalLM")
    model.forward = lce(model)
    with pytest.raises(ValueError, match="replace the forward"):
        patch_model(model, output=True)
    patch_model(model)


def test_a_class_whose_forward_is_replaced_is_refused(monkeypatch):
    def lce_forward(self, *args, **kwargs):
        return None

    lce_forward.__module__ = "liger_kernel.transformers.model.llama"
    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", lce_forward)
    with pytest.raises(ValueError, match="liger_kernel.*fused_linear_cross_entropy=False"):
        patch_model(zoo_model("LlamaForCausalLM"), output=True)


@pytest.mark.parametrize("name", NAMES)
def test_wrappers_pass(name):
    """Mixed precision, hooks and decorators hand every call on."""
    model, batch = randomised(patch_model(zoo_model(name), output=True), 0.1), zoo_inputs(name)
    expected = model(**batch).loss
    calls = []

    def counted(function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            calls.append(1)
            return function(*args, **kwargs)

        return call

    model.forward = counted(model.forward)
    add_hook_to_module(model, ModelHook())
    assert torch.equal(model(**batch).loss, expected) and calls == [1]
    remove_hook_from_module(model)
    del model.forward
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
        assert "forward" in vars(prepared)
        torch.testing.assert_close(prepared(**batch).loss, expected, rtol=0.02, atol=0.02)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
