"""What looks a class up by its name finds the stock class, which loads, saves and trains what the checkpoint is."""

import copy
import inspect
import pickle

import pytest
import torch
import transformers
from peft import AutoPeftModel, LoraConfig, get_peft_model
from test_architectures import randomised
from transformers import AutoModel
from zoo import ZOO, zoo_inputs, zoo_model

from hf_multimax import is_patched, patch_model

HEADS = {
    "ViTForImageClassification": "vit", "DeiTForImageClassification": "deit", "BeitForImageClassification": "beit",
    "Dinov2ForImageClassification": "dinov2", "IJepaForImageClassification": "ijepa", "LlamaForCausalLM": "model",
    "GPTNeoXForCausalLM": "gpt_neox", "Gemma3ForCausalLM": "model", "BertForSequenceClassification": "bert",
    "ElectraForPreTraining": "electra", "BartForConditionalGeneration": "model", "MixtralForCausalLM": "model",
    "RobertaForSequenceClassification": "roberta", "Qwen3ForCausalLM": "model",
}  # fmt: skip


def patched(name, **options):
    return randomised(patch_model(zoo_model(name), **options), 0.2)


def inputs(name):
    batch = zoo_inputs(name)
    labels = batch.pop("labels", None)
    return {**batch, **({"decoder_input_ids": labels} if ZOO[name].seq2seq else {})}


def first(model, batch):
    with torch.no_grad():
        return model(**batch)[0]


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "ViTForImageClassification", "BartForConditionalGeneration"])
def test_a_generated_class_goes_by_the_stock_names(name):
    model, stock = patched(name), getattr(transformers, name)
    for generated, native in ((type(model), stock), (type(model.config), stock.config_class)):
        assert generated is not native and issubclass(generated, native)
        assert (generated.__name__, generated.__qualname__, generated.__module__) == (
            native.__name__, native.__qualname__, native.__module__,
        )  # fmt: skip
        assert inspect.signature(generated) == inspect.signature(native)
        assert inspect.signature(generated.__init__) == inspect.signature(native.__init__)
        assert pickle.loads(pickle.dumps(generated)) is generated
        assert copy.deepcopy(generated) is generated
    assert inspect.signature(type(model).forward) == inspect.signature(stock.forward)
    assert is_patched(model) and repr(model).startswith(f"MultiMax{name}(")


def test_arguments_of_a_stock_constructor_are_passed_on(tmp_path):
    model = patched("ViTForImageClassification")
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path, add_pooling_layer=False, use_mask_token=True)
    assert base.pooler is None and base.embeddings.mask_token is not None
    again = type(base)(base.config, use_mask_token=True, add_pooling_layer=False)
    assert again.pooler is None and again.embeddings.mask_token is not None


def test_models_and_their_classes_pickle_and_torch_saves_them(tmp_path):
    model, batch = patched("LlamaForCausalLM", output=True), inputs("LlamaForCausalLM")
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(other) is type(model) and type(other.config) is type(model.config)
        assert torch.equal(first(other, batch), first(model, batch))
    torch.save(model, tmp_path / "model.pt")
    other = torch.load(tmp_path / "model.pt", weights_only=False)
    assert type(other) is type(model)


@pytest.mark.parametrize("name", HEADS)
def test_base_and_head_load_each_other(name, tmp_path):
    """With the weight conversions that Transformers keeps by class name."""
    model, batch = patched(name), inputs(name)
    inner = getattr(model, HEADS[name])
    model.save_pretrained(tmp_path / "head")
    inner.save_pretrained(tmp_path / "base")
    for folder in ("head", "base"):
        base, info = AutoModel.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert is_patched(base) and not [key for key in info["missing_keys"] if "pooler" not in key]
        assert torch.equal(first(base, batch), first(inner, batch))
    zoo_model(name).base_model.save_pretrained(tmp_path / "stock")
    loaded = getattr(transformers, name).from_pretrained(tmp_path / "stock", output_loading_info=True)
    if any("attention" in key for key in loaded[1]["missing_keys"]):  # a stock head of this version loses its base
        with pytest.raises(ValueError, match="missing"):
            type(model).from_pretrained(tmp_path / "base")
        return
    head = type(model).from_pretrained(tmp_path / "base")
    torch.testing.assert_close(first(getattr(head, HEADS[name]), batch), first(inner, batch), rtol=0, atol=0)
    stock = getattr(transformers, name).from_pretrained(tmp_path / "head")
    assert type(stock) is type(model) and torch.equal(first(stock, batch), first(model, batch))


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "ViTForImageClassification"])
def test_auto_peft_imports_the_base_by_name(name, tmp_path):
    model, batch = patched(name), inputs(name)
    model.save_pretrained(tmp_path / "base")
    base = getattr(transformers, name).from_pretrained(tmp_path / "base")
    targets = ["q_proj"] if "Llama" in name else r".*attention.*(query|q_proj)"
    adapted = get_peft_model(base, LoraConfig(target_modules=targets, init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter").eval()
    assert is_patched(loaded.get_base_model())
    assert torch.equal(first(loaded, batch), first(adapted, batch))
    direct = getattr(transformers, name).from_pretrained(tmp_path / "adapter")
    assert is_patched(direct)
    torch.testing.assert_close(first(direct.eval(), batch), first(adapted, batch))


def test_a_stock_checkpoint_is_not_run_by_multimax_attention(tmp_path):
    zoo_model("LlamaForCausalLM").save_pretrained(tmp_path)
    for loader in (transformers.LlamaForCausalLM, transformers.AutoModelForCausalLM):
        with pytest.raises(ValueError, match="stock checkpoint.*ref_model=copy.deepcopy"):
            loader.from_pretrained(tmp_path, attn_implementation="multimax")
