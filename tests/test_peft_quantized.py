"""A MultiMax adapter on a quantised base, where the package that quantises is installed."""

import importlib

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_multimax import multimax_parameters
from hf_multimax.peft import MultiMaxAdapterConfig


def quantization(kind):
    if kind == "torchao":
        return transformers.TorchAoConfig(importlib.import_module("torchao.quantization").Int8WeightOnlyConfig())
    if kind == "optimum.quanto":
        return transformers.QuantoConfig(weights="int8")
    return transformers.BitsAndBytesConfig(load_in_8bit=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torchao", "optimum.quanto", "bitsandbytes"])
def test_scalars_alone_are_trained_on_a_quantised_base(kind, tmp_path):
    pytest.importorskip(kind)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **size)).save_pretrained(tmp_path / "base")

    def base():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantization(kind))
        return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)

    ids = torch.randint(3, 60, (2, 9))
    stock = base().eval()
    before = stock(input_ids=ids).logits
    model = get_peft_model(stock, MultiMaxAdapterConfig(task_type="CAUSAL_LM"))
    with torch.no_grad():
        for parameter in multimax_parameters(model).values():
            parameter.add_(0.3 * torch.rand_like(parameter))
    model.train()(input_ids=ids, labels=ids).loss.backward()
    ours = multimax_parameters(model)
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(ours)
    assert {p.dtype for p in ours.values()} == {torch.float32} == {p.grad.dtype for p in ours.values()}
    trained = model.eval()(input_ids=ids).logits
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, before)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(PeftModel.from_pretrained(base(), tmp_path / "adapter")(input_ids=ids).logits, trained)
    assert torch.equal(model.merge_and_unload()(input_ids=ids).logits, trained)
