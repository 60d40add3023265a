"""MultiMax as a PEFT adapter: the scalars of a model's attention, trained, kept, switched and shared by themselves."""

import copy
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from hub_server import TOKEN, HubServer
from huggingface_hub import ModelCard
from models import inputs_for, make
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from tolerances import assert_close
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from zoo import zoo_inputs, zoo_model

from hf_multimax import (
    MultiMaxConfig,
    MultiMaxTrainer,
    MultiMaxTrainingArguments,
    backend,
    is_patched,
    multimax_parameters,
    parameter_groups,
    patch_model,
    unpatch_model,
)
from hf_multimax.models import discovery
from hf_multimax.normalizers.base import named_normalizers
from hf_multimax.peft import MultiMaxAdapterConfig, bridge, names
from hf_multimax.peft.files import RECORD

ARCHITECTURES = {
    "GPT2LMHeadModel": {"output": True},
    "ViTForImageClassification": {"per_head": True},
    "T5ForConditionalGeneration": {"exclude": "EncDec"},
    "MarianMTModel": {"affine": True},
    "LlamaForCausalLM": {"order": 1, "include": r"layers\.0"},
    "BertForMaskedLM": {"order": 3},
    "BloomForCausalLM": {},  # attention outside the interface
}
LEARNED = {
    "entmax": {"alpha": 1.3, "learn": True},
    "rsoftmax": {"sparsity": 0.3, "learn": True},
    "scalable_softmax": {},
}


def stock(name="GPT2LMHeadModel", **config):
    model = zoo_model(name, **config) if name in ("LlamaForCausalLM", "BertForMaskedLM", "BloomForCausalLM") else None
    return make(name, **config) if model is None else model


def batch(model):
    """Inputs without labels for a stock model or an adapted one."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    name = getattr(type(base), "stock_class", type(base)).__name__
    if name in ("LlamaForCausalLM", "BertForMaskedLM", "BloomForCausalLM"):
        found = zoo_inputs(name)
        del found["labels"]
        return found
    return inputs_for(base, labels=False)


def logits(model, **options):
    with torch.no_grad():
        return model.eval()(**batch(model), **options).logits


def train_like(model, adapter=""):
    """Give the scalars of an adapter values that matter; they stay positive, as alpha and s must."""
    with torch.no_grad():
        for name, parameter in multimax_parameters(model).items():
            if adapter in name:
                parameter.add_(0.3 * torch.rand_like(parameter) + 0.1)


def adapted(name="GPT2LMHeadModel", adapter="default", **options):
    model = get_peft_model(stock(name), MultiMaxAdapterConfig(**options), adapter)
    train_like(model)
    return model


def trainable(model):
    return sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)


# -- one adapter -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_life_of_an_adapter(name, tmp_path):
    options = ARCHITECTURES[name]
    base, reference = stock(name), stock(name)
    reference_class, before = type(reference), logits(reference)
    model = get_peft_model(base, MultiMaxAdapterConfig(**options))
    assert_close(logits(model), before, 1e-5)
    ours = multimax_parameters(model)
    assert trainable(model) == sorted(ours) and len(ours) > 0
    assert {p.dtype for p in ours.values()} == {torch.float32}
    train_like(model)
    trained = logits(model)
    assert (trained - before).abs().max() > 1e-4
    with model.disable_adapter():
        assert torch.equal(logits(model), before)  # SoftMax bit for bit
    assert torch.equal(logits(model), trained)

    model.save_pretrained(tmp_path / "adapter")
    for low in (False, True):
        loaded = PeftModel.from_pretrained(stock(name), tmp_path / "adapter", low_cpu_mem_usage=low)
        assert torch.equal(logits(loaded), trained)
    unloaded = loaded.unload()
    assert type(unloaded) is reference_class and torch.equal(logits(unloaded), before)
    assert not any("multimax" in key for key in unloaded.state_dict())

    merged = model.merge_and_unload(safe_merge=True)
    assert is_patched(merged) and torch.equal(logits(merged), trained)
    merged.save_pretrained(tmp_path / "merged")
    again = reference_class.from_pretrained(tmp_path / "merged")
    assert is_patched(again)
    assert_close(logits(again), trained, 1e-5)
    assert torch.equal(logits(unpatch_model(merged)), before)


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM", "BloomForCausalLM"])
def test_without_it_attention_is_the_stock_models_whichever_that_is(name):
    for attention in ("eager", "sdpa") if name != "BloomForCausalLM" else ("eager",):
        model = make(name) if name == "GPT2LMHeadModel" else zoo_model(name, attention=attention)
        model.set_attn_implementation(attention)
        before = logits(model)
        adapter = get_peft_model(model, MultiMaxAdapterConfig())
        train_like(adapter)
        with adapter.disable_adapter():
            assert torch.equal(logits(adapter), before)
            assert torch.equal(logits(adapter, output_attentions=True), logits(stock_with(name, "eager"), **ATTENTIONS))


ATTENTIONS = {"output_attentions": True}


def stock_with(name, attention):
    model = stock(name)
    model.set_attn_implementation(attention)
    return model


def test_on_a_patched_model_it_starts_from_the_scalars_that_are_there(tmp_path):
    model = patch_model(stock(), order=1, output=True)
    train_like(model)
    before, entry = logits(model), dict(model.config.multimax)
    adapter = get_peft_model(model, MultiMaxAdapterConfig(order=1, output=True))
    assert torch.equal(logits(adapter), before)
    assert all("multimax_adapter_layers.default" in name for name in trainable(adapter))
    train_like(adapter, ".default.")
    trained = logits(adapter)
    with adapter.disable_adapter():
        assert torch.equal(logits(adapter), before)
    adapter.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(stock(), tmp_path)  # it has all the scalars that there are
    assert torch.equal(logits(loaded), trained)
    assert torch.equal(logits(copy.deepcopy(adapter).unload()), before)
    merged = adapter.merge_and_unload()
    assert torch.equal(logits(merged), trained) and merged.config.multimax == entry


@pytest.mark.parametrize("normalizer", LEARNED)
def test_every_learned_normalizer(normalizer, tmp_path):
    options = {"normalizer": normalizer, "normalizer_kwargs": LEARNED[normalizer]}
    before = logits(stock())
    model = adapted(**options)
    trained = logits(model)
    assert (trained - before).abs().max() > 1e-4
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(stock(), tmp_path)
    assert torch.equal(logits(loaded), trained)
    assert torch.equal(logits(loaded.merge_and_unload()), trained)


@pytest.mark.parametrize("normalizer", ["sparsemax", "softmax", "entmax"])
def test_a_normalizer_that_learns_nothing_is_no_adapter(normalizer):
    with pytest.raises(ValueError, match=f"{normalizer}.*learns nothing"):
        MultiMaxAdapterConfig(normalizer=normalizer)


@pytest.mark.parametrize(
    "options", [{"target_modules": ["0.attn"]}, {"target_modules": r".*h\.0.*"}, {"include": r"h\.0\."}], ids=str
)
def test_some_layers(options, tmp_path):
    model = adapted(**options)
    assert {name.partition(".attn")[0][-1] for name in trainable(model)} == {"0"}
    trained = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(stock(), tmp_path / "adapter")), trained)
    merged = model.merge_and_unload()
    assert [name for name, _ in named_normalizers(merged)] == ["transformer.h.0.attn"]
    merged.save_pretrained(tmp_path / "merged")
    assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), trained, 1e-5)


def test_config_has_the_fields_of_both_and_checks_them(tmp_path):
    config = MultiMaxAdapterConfig(task_type="CAUSAL_LM", order=3, include=["a"], target_modules="b")
    config.save_pretrained(tmp_path)
    assert type(config).from_pretrained(tmp_path) == config
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {*MultiMaxConfig().to_dict(), "outside", "target_modules", "peft_type", "task_type"} <= values.keys()
    assert MultiMaxAdapterConfig().order == 1 and MultiMaxAdapterConfig(affine=True).order == 1
    assert MultiMaxAdapterConfig().per_head and not MultiMaxAdapterConfig(attention=False, output=True).per_head
    for wrong, error in (({"order": 0}, ValueError), ({"typo": 1}, TypeError), ({"task_type": "first"}, ValueError)):
        with pytest.raises(error):
            MultiMaxAdapterConfig(**wrong)


@pytest.mark.parametrize(
    "options", [{}, {"order": 1}, {"order": 3, "per_head": True}, {"affine": True}, {"normalizer": "scalable_softmax"}]
)
def test_what_is_left_open_is_as_a_patched_model_has_it(options, tmp_path):
    base = patch_model(stock(), **options)
    has, shapes = base.config.multimax, {tuple(p.shape) for p in multimax_parameters(base).values()}
    given = {name: value for name, value in options.items() if name not in ("order", "per_head")}
    model = get_peft_model(base, MultiMaxAdapterConfig(**given))
    model.add_adapter("second", MultiMaxAdapterConfig(**given))
    assert {tuple(p.shape) for p in multimax_parameters(model).values()} == shapes
    assert {(c.order, c.per_head) for c in model.peft_config.values()} == {(has["order"], has["per_head"])}
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["order"], saved["per_head"]) == (has["order"], has["per_head"])
    for name, other in (("order", has["order"] + 1), ("per_head", not has["per_head"])):
        with pytest.raises(ValueError, match=rf"(?s){name}={other}|must be 1 when affine is true"):
            get_peft_model(patch_model(stock(), **options), MultiMaxAdapterConfig(**given, **{name: other}))


@pytest.mark.parametrize(
    "name, heads", [("GPT2LMHeadModel", 4), ("T5ForConditionalGeneration", 4), ("BloomForCausalLM", 0)]
)
def test_on_a_stock_model_each_head_has_two_slopes_where_attention_tells_heads(name, heads):
    model = get_peft_model(stock(name), MultiMaxAdapterConfig())
    assert {tuple(p.shape) for p in multimax_parameters(model).values()} == {(heads, 2) if heads else (2,)}
    used = MultiMaxAdapterConfig()
    get_peft_model(patch_model(stock(), order=3), used)
    again = get_peft_model(stock(name), used)
    assert [p.shape for p in multimax_parameters(again).values()] == [
        p.shape for p in multimax_parameters(model).values()
    ]
    shared = get_peft_model(stock(name), MultiMaxAdapterConfig(per_head=False, order=2))
    assert {tuple(p.shape) for p in multimax_parameters(shared).values()} == {(4,)}


def test_layers_that_do_not_tell_their_heads_have_scalars_for_all(monkeypatch):
    monkeypatch.setattr(discovery, "HEAD_COUNT_ATTRIBUTES", ("unknown",))
    adapter = get_peft_model(stock(), MultiMaxAdapterConfig())
    assert {tuple(p.shape) for p in multimax_parameters(adapter).values()} == {(2,)}


def test_size_of_a_gpt2_small_adapter(tmp_path):
    base = make("GPT2LMHeadModel", n_layer=12, n_head=12, n_embd=48)
    model = get_peft_model(base, MultiMaxAdapterConfig(task_type="CAUSAL_LM"))
    assert model.get_nb_trainable_parameters()[0] == 12 * 12 * 4
    model.save_pretrained(tmp_path)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes["adapter_model.safetensors"] < 6_000
    del sizes["README.md"]  # half of it is PEFT's form of a card
    assert sum(sizes.values()) < 7_000, sizes


def test_it_is_copied_and_pickled():
    model = adapted(output=True)
    trained = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), trained)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), trained)


def test_a_new_head_is_trained_with_it(tmp_path):
    def base():
        return make("GPT2ForSequenceClassification")

    model = get_peft_model(base(), MultiMaxAdapterConfig(task_type="SEQ_CLS"))
    assert any("score" in name for name in trainable(model))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path)), expected)
    assert torch.equal(logits(model.merge_and_unload()), expected)


def test_the_card_says_what_it_is_once(tmp_path):
    model = adapted(task_type="CAUSAL_LM")
    for _ in range(2):
        model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert "multimax" in card.data.tags and card.data.library_name == "peft"
    assert card.text.count("## Learned attention") == 1
    assert "`multimax`, whose 32 scalars in 2 places" in card.text and "pip install hf-multimax" in card.text
    get_peft_model(stock(), LoraConfig(target_modules=["c_attn"])).save_pretrained(tmp_path / "lora")
    assert "Learned attention" not in (tmp_path / "lora" / "README.md").read_text()


# -- several -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def two():
    """Adapters of different layers of one stock model, and what each gives."""
    model = adapted(adapter="first", include=r"h\.0\.")
    first = logits(model)
    model.add_adapter("second", MultiMaxAdapterConfig(output=True))
    assert all(".first." in name for name in trainable(model)) and torch.equal(logits(model), first)
    train_like(model, ".second.")
    model.set_adapter("second")
    assert all(".second." in name for name in trainable(model))
    return model, {"first": first, "second": logits(model)}


def test_switching_and_deleting(two, tmp_path):
    model, expected = two
    assert (expected["first"] - expected["second"]).abs().max() > 1e-4
    for name in ("first", "second", "first"):
        model.set_adapter(name)
        assert torch.equal(logits(model), expected[name])
        assert all(f".{name}." in entry for entry in trainable(model))
    before = logits(stock())
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(stock(), tmp_path / "second", adapter_name="second")
    loaded.load_adapter(tmp_path / "first", "first")
    assert torch.equal(logits(loaded), expected["second"])
    loaded.set_adapter("first")
    assert torch.equal(logits(loaded), expected["first"])
    loaded.delete_adapter("first")
    assert loaded.active_adapters == ["second"] and torch.equal(logits(loaded), expected["second"])
    loaded.delete_adapter("second")
    assert torch.equal(logits(loaded.base_model.model), before)
    loaded.base_model.peft_config.clear()
    loaded.add_adapter("third", MultiMaxAdapterConfig(order=2))  # of another kind, now that there is none
    loaded.set_adapter("third")
    train_like(loaded)
    assert (logits(loaded) - before).abs().max() > 1e-4


def test_merging_one_of_several(two, tmp_path):
    model, expected = two
    with pytest.raises(ValueError, match="one set can be merged"):
        model.merge_and_unload(adapter_names=["first", "second"])
    assert torch.equal(logits(model), expected["second"])
    model.set_adapter("first")
    model.merge_adapter(["first"])
    assert torch.equal(logits(model), expected["first"])
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected["first"])
    merged = model.merge_and_unload(adapter_names=["second"])
    assert torch.equal(logits(merged), expected["second"]) and merged.config.multimax["output"]
    merged.save_pretrained(tmp_path)
    assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected["second"], 1e-5)


@pytest.mark.parametrize("which", ["auto", "eager", "tiled"])
def test_each_row_has_its_adapter(two, which):
    model, _ = two
    ids = torch.randint(3, 60, (5, 9))
    mask = torch.ones_like(ids)
    mask[2, 6:] = 0
    rows = ["first", "second", "__base__", "second", "first"]

    def run(chosen=slice(None), **options):
        with torch.no_grad():
            return model.eval()(input_ids=ids[chosen], attention_mask=mask[chosen], **options).logits

    with backend(which):
        mixed = run(adapter_names=rows)
        for i, name in enumerate(rows):
            if name == "__base__":
                with model.disable_adapter():
                    expected = run(slice(i, i + 1))
            else:
                model.set_adapter(name)
                expected = run(slice(i, i + 1))
            torch.testing.assert_close(mixed[i : i + 1], expected)
        assert torch.equal(run(), run())  # nothing of it stays
    with pytest.raises(ValueError, match="adapter_names has third, and the adapters are first, second"):
        run(adapter_names=["third"] * 5)
    with pytest.raises(ValueError, match="3 names for a batch of 5"):
        run(adapter_names=rows[:3])
    with pytest.raises(ValueError, match="inference"):
        model.train()(input_ids=ids, adapter_names=rows)


@pytest.mark.parametrize("name", ["MarianMTModel", "T5ForConditionalGeneration"])
def test_each_row_has_its_adapter_under_beam_search(name):
    model = adapted(name, adapter="first", task_type="SEQ_2_SEQ_LM")
    model.add_adapter("second", MultiMaxAdapterConfig(task_type="SEQ_2_SEQ_LM"))
    with torch.no_grad():
        for entry, parameter in multimax_parameters(model).items():
            parameter.copy_(torch.randn_like(parameter) * (3 if ".second." in entry else 1))
    ids = torch.randint(3, 60, (3, 8))
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "min_new_tokens": 6}
    rows = ["second", "__base__", "first"]
    mixed = model.eval().generate(input_ids=ids, adapter_names=rows, **options)
    for i, row in enumerate(rows):
        if row == "__base__":
            with model.disable_adapter():
                expected = model.generate(input_ids=ids[i : i + 1], **options)
        else:
            model.set_adapter(row)
            expected = model.generate(input_ids=ids[i : i + 1], **options)
        assert torch.equal(mixed[i : i + 1], expected)


def test_rows_cannot_be_told_apart_outside_the_interface():
    model = adapted("BloomForCausalLM", adapter="first")
    with pytest.raises(ValueError, match="adapter_names cannot be served in BloomAttention"):
        logits(model, adapter_names=["first", "__base__"])


def test_what_acts_is_what_is_seen(two):
    model, _ = two
    seen = dict(named_normalizers(model))
    assert sorted(seen) == [
        "base_model.model.multimax_output", "base_model.model.transformer.h.0.attn",
        "base_model.model.transformer.h.1.attn",
    ]  # fmt: skip
    model.set_adapter("first")
    assert list(dict(named_normalizers(model))) == ["base_model.model.transformer.h.0.attn"]
    (group,) = parameter_groups(model, weight_decay=0.1, multimax_learning_rate=0.5)
    assert group["lr"] == 0.5 and group["weight_decay"] == 0.0 and len(group["params"]) == 2


# -- Transformers' own integration -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "MarianMTModel"])
def test_adapters_of_transformers_itself(name, tmp_path):
    model, before = stock(name), logits(stock(name))
    model.add_adapter(MultiMaxAdapterConfig(), "first")
    assert trainable(model) == sorted(multimax_parameters(model))
    train_like(model)
    first = logits(model)
    model.disable_adapters()
    assert torch.equal(logits(model), before)
    model.enable_adapters()
    model.save_pretrained(tmp_path / "first")
    assert not (tmp_path / "first" / "model.safetensors").exists()

    model.load_adapter(str(tmp_path / "first"), "same")
    model.add_adapter(MultiMaxAdapterConfig(), "second")
    train_like(model, ".second.")
    second = logits(model)
    for adapter, expected in (("first", first), ("same", first), ("second", second)):
        model.set_adapter(adapter)
        assert torch.equal(logits(model), expected)
    with pytest.raises(ValueError, match="first, second all have scalars for one layer"):
        model.set_adapter(["first", "second"])
    model.delete_adapter("second")
    model.set_adapter("same")
    assert torch.equal(logits(model), first)

    for loaded in (stock(name), stock(name).to(torch.bfloat16)):
        loaded.load_adapter(str(tmp_path / "first"))
        values = {key.replace(".default.", ".first."): p for key, p in multimax_parameters(loaded).items()}
        assert values and all(torch.equal(p, model.get_parameter(key)) for key, p in values.items())
    assert torch.equal(logits(PeftModel.from_pretrained(stock(name), tmp_path / "first")), first)


def test_auto_classes_load_an_adapter_by_its_folder(tmp_path):
    stock().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    model = get_peft_model(base, MultiMaxAdapterConfig(task_type="CAUSAL_LM"))
    train_like(model)
    model.save_pretrained(tmp_path / "adapter")
    trained = logits(model)
    for loaded in (
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"),
        transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "adapter"),
    ):
        torch.testing.assert_close(logits(loaded), trained)


def test_beside_a_lora_adapter(tmp_path):
    model = stock()
    model.add_adapter(LoraConfig(target_modules=["c_attn"], init_lora_weights=False), "lora")
    model.add_adapter(MultiMaxAdapterConfig(), "scalars")
    train_like(model)
    model.set_adapter(["lora", "scalars"])
    assert {"lora_A", "lora_B", "ts"} <= {part for name in trainable(model) for part in name.split(".")}
    both = logits(model)
    for name in ("lora", "scalars"):
        model.set_adapter(name)
        model.save_pretrained(tmp_path / name)
    loaded = stock()
    for name in ("scalars", "lora"):
        loaded.load_adapter(str(tmp_path / name), name)
    loaded.set_adapter(["lora", "scalars"])
    torch.testing.assert_close(logits(loaded), both)


# -- the LoRA trap -----------------------------------------------------------------------------------------------------


def test_lora_and_scalars_as_one_adapter(tmp_path):
    options = {"target_modules": ["c_attn"], "init_lora_weights": False, "modules_to_save": ["multimax"]}
    model = get_peft_model(patch_model(stock(), order=1), LoraConfig(**options))
    train_like(model, "modules_to_save")
    expected = logits(model)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(stock(), tmp_path)), expected)


@pytest.mark.parametrize("add", ["get_peft_model", "add_adapter", "model.add_adapter"])
def test_lora_cannot_be_told_to_train_scalars_that_are_not_there(add):
    config = LoraConfig(target_modules=["c_attn"], modules_to_save=["multimax"])
    with pytest.raises(ValueError, match="modules_to_save names multimax.*stock model.*patch_model"):
        if add == "get_peft_model":
            get_peft_model(stock(), config)
        elif add == "add_adapter":
            get_peft_model(stock(), LoraConfig(target_modules=["c_attn"])).add_adapter("b", config)
        else:
            stock().add_adapter(config)
    with pytest.raises(ValueError, match="those of MultiMax adapters"):
        adapted().get_base_model().add_adapter(config, "b")


@pytest.mark.parametrize("kind", ["lora", "ours"])
@pytest.mark.parametrize("way", ["state dict", "pickle", "pickle by Transformers"])
def test_no_public_way_drops_scalars_in_silence(kind, way, tmp_path):
    def lora(**options):
        return LoraConfig(target_modules=["c_attn"], init_lora_weights=False, **options)

    if kind == "ours":
        model = adapted()
    else:
        model = get_peft_model(patch_model(stock()), lora(modules_to_save=["multimax"]))
        train_like(model, "modules_to_save")
    expected = logits(model)
    if way == "state dict":
        values = get_peft_model_state_dict(model)
        target = get_peft_model(stock(), lora())
        with pytest.raises(ValueError, match="scalars that the model has no place for"):
            set_peft_model_state_dict(target, values)
        return
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.glob("*.safetensors"))
    loaded = stock()
    if way == "pickle":
        loaded = PeftModel.from_pretrained(loaded, tmp_path)
    else:
        loaded.load_adapter(str(tmp_path), use_safetensors=False)
    torch.testing.assert_close(logits(loaded), expected)


def test_scalars_that_an_adapter_leaves_out_are_missed(tmp_path):
    model = patch_model(stock())
    train_like(model)
    for config in (
        MultiMaxAdapterConfig(include=r"h\.0\."),
        LoraConfig(target_modules=["c_attn"], modules_to_save=["h.0.attn.multimax"]),
    ):
        get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path)
        assert not json.loads((tmp_path / RECORD).read_text())["base_is_softmax"]
        with pytest.raises(ValueError, match="trained scalars it does not carry"):
            PeftModel.from_pretrained(stock(), tmp_path)
        PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)


# -- errors ------------------------------------------------------------------------------------------------------------


def edit_scalars(folder, edit):
    file = folder / "adapter_model.safetensors"
    values = load_file(file)
    edit(values)
    save_file(values, file)


def drop(values):
    del values[sorted(values)[0]]


def poison(value):
    def edit(values):
        values[sorted(values)[0]][0] = value

    return edit


def reshape(values):
    values[sorted(values)[0]] = torch.zeros(6)


@pytest.mark.parametrize(
    "base, edit, text",
    [
        (lambda: stock(n_layer=1), None, "the adapter has and the model has no place for transformer.h.1"),
        (lambda: stock(n_layer=3), None, "the model needs and the adapter lacks transformer.h.2"),
        (lambda: stock("LlamaForCausalLM"), None, "does not fit this LlamaForCausalLM"),
        (
            lambda: patch_model(stock(), order=2),
            None,
            r"patched with order=2.*MultiMaxAdapterConfig\(order=2, per_head=False\)",
        ),
        (lambda: patch_model(stock(), order=1), None, "per_head=False"),
        (lambda: patch_model(stock(), normalizer="sparsemax"), None, "normalizer='sparsemax'"),
        (
            lambda: patch_model(stock(), order=1, per_head=True, include=r"h\.0\."),
            None,
            "h.1.attn, where this patched.*has SoftMax",
        ),
        (lambda: torch.nn.Linear(2, 2), None, "needs a Transformers model"),
        (lambda: stock("GPT2LMHeadModel"), drop, "the model needs and the adapter lacks transformer.h.0.*ranges"),
        (lambda: stock("GPT2LMHeadModel"), reshape, r"another shape: .*\[6\], not \[4, 2\]"),
        (lambda: stock("GPT2LMHeadModel"), poison(float("nan")), "NaN or infinite: transformer.h.0"),
        (lambda: stock("GPT2LMHeadModel"), poison(float("inf")), "NaN or infinite: transformer.h.0"),
    ],
)
@pytest.mark.parametrize("way", ["PeftModel", "load_adapter"])
def test_an_adapter_that_does_not_fit_is_refused_in_one_sentence(base, edit, text, way, tmp_path):
    adapted().save_pretrained(tmp_path)
    if edit is not None:
        edit_scalars(tmp_path, edit)
    model = base()
    if not isinstance(model, transformers.PreTrainedModel) and way == "load_adapter":
        pytest.skip("a method of Transformers models")
    patched, entries = is_patched(model), set(model.state_dict())
    with pytest.raises((ValueError, TypeError), match=text):
        if way == "PeftModel":
            PeftModel.from_pretrained(model, tmp_path)
        else:
            model.load_adapter(str(tmp_path))
    assert is_patched(model) == patched and set(model.state_dict()) == entries  # as it was


def no_attention():
    config = transformers.MambaConfig(vocab_size=60, hidden_size=16, num_hidden_layers=1, state_size=4)
    return transformers.MambaForCausalLM(config)


@pytest.mark.parametrize(
    "base, options, text",
    [
        (no_attention, {}, "MambaForCausalLM.*has no attention layer"),
        (stock, {"include": "nothing"}, "'nothing' matches no attention layer"),
        (stock, {"target_modules": ["mlp"]}, r"target_modules=\['mlp'\] matches no attention layer.*h.0.attn"),
        (stock, {"target_modules": "(h.0"}, r"target_modules=.\(h.0. is no regular expression"),
        (lambda: make("GPT2DoubleHeadsModel"), {"output": True}, "output=True does not support"),
        (lambda: patch_model(stock()), {"output": True}, "scalars in multimax_output"),
        (lambda: torch.nn.Linear(2, 2), {}, "needs a Transformers model"),
    ],
)
def test_a_model_that_cannot_have_one_is_refused_in_one_sentence(base, options, text):
    model = base()
    entries = set(model.state_dict())
    with pytest.raises((ValueError, TypeError), match=text):
        get_peft_model(model, MultiMaxAdapterConfig(**options))
    assert set(model.state_dict()) == entries


def test_what_cannot_be_done_with_several(two):
    model, _ = two
    with pytest.raises(NotImplementedError, match="cannot be added up"):
        model.add_weighted_adapter(["first", "second"], [0.5, 0.5], "third")
    with pytest.raises(ValueError, match="first, second all have scalars for one layer"):
        model.base_model.set_adapter(["first", "second"])
    with pytest.raises(ValueError, match="patched with order=1 already, and the adapter says order=2"):
        model.add_adapter("third", MultiMaxAdapterConfig(order=2))


def test_the_model_inside_is_not_saved_or_patched_by_itself(tmp_path):
    model = adapted().get_base_model()
    with pytest.raises(ValueError, match="holds MultiMax adapters: save the PeftModel"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="patched already"):
        patch_model(model)
    with pytest.raises(ValueError, match="holds MultiMax adapters.*unload"):
        unpatch_model(model)


def test_scalars_that_are_nan_are_not_saved(tmp_path):
    model = adapted()
    with torch.no_grad():
        next(iter(multimax_parameters(model).values())).fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or infinite are not saved"):
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


# -- training ----------------------------------------------------------------------------------------------------------


def gradients(model):
    for parameter in model.parameters():
        parameter.grad = None
    base = model.get_base_model()
    inputs = batch(model) if isinstance(base, transformers.PreTrainedModel) else None
    model.train()(**inputs).logits.float().square().mean().backward()
    assert all(p.grad is None for name, p in model.named_parameters() if not p.requires_grad)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "BloomForCausalLM"])
def test_gradient_checkpointing_of_a_frozen_base(name, reentrant):
    model = adapted(name, order=2)  # of order 1 the gradient of a threshold that no score reaches is zero
    expected = gradients(model)
    assert sorted(expected) == trainable(model) and all(g.abs().max() > 0 for g in expected.values())
    for order in ("before", "after"):
        base = stock(name)
        if order == "before":
            base.gradient_checkpointing_enable({"use_reentrant": reentrant})
        again = get_peft_model(base, MultiMaxAdapterConfig(order=2))
        if order == "after":
            again.gradient_checkpointing_enable({"use_reentrant": reentrant})
        base.disable_input_require_grads()  # inputs need no gradients
        again.load_state_dict(model.state_dict())
        found = gradients(again)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scalars_stay_float32_under_autocast_and_in_half_precision(dtype):
    model = get_peft_model(stock().to(dtype), MultiMaxAdapterConfig())
    train_like(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model)
    assert len(found) == 4
    for name, parameter in multimax_parameters(model).items():
        assert parameter.dtype == found[name].dtype == torch.float32
        assert found[name].isfinite().all() and found[name].abs().max() > 0
    values = {name: parameter.clone() for name, parameter in multimax_parameters(model.half()).items()}
    assert {value.dtype for value in values.values()} == {torch.float32}


def rows():
    ids = torch.randint(3, 60, (16, 9), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


@pytest.mark.parametrize("kind", [Trainer, MultiMaxTrainer])
def test_the_trainer_trains_only_the_scalars_and_resumes(kind, tmp_path):
    def run(steps, resume=None):
        arguments = (TrainingArguments if kind is Trainer else MultiMaxTrainingArguments)(
            output_dir=tmp_path / "run", max_steps=steps, save_steps=2, learning_rate=0.05, weight_decay=0.5,
            lr_scheduler_type="constant", per_device_train_batch_size=4, use_cpu=True, report_to=[], logging_steps=1,
            gradient_checkpointing=kind is Trainer, seed=3,
        )  # fmt: skip
        model = get_peft_model(stock(), MultiMaxAdapterConfig(task_type="CAUSAL_LM"))
        frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
        trainer = kind(model, arguments, train_dataset=rows(), eval_dataset=rows()[:2])
        trainer.train(resume_from_checkpoint=resume)
        assert all(torch.equal(model.get_parameter(name), value) for name, value in frozen.items())
        logged = [key for entry in trainer.state.log_history for key in entry if key.startswith("multimax/")]
        assert not any("adapter" in key for key in logged)
        decayed = {id(p) for group in trainer.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
        assert not decayed & {id(p) for p in multimax_parameters(model).values()}
        return {name: p.detach().clone() for name, p in multimax_parameters(model).items()}

    straight = run(4)
    assert all(value.abs().max() > 0.01 for value in straight.values())
    files = {path.name for path in (tmp_path / "run" / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    resumed = run(4, str(tmp_path / "run" / "checkpoint-2"))
    for name, value in straight.items():
        torch.testing.assert_close(resumed[name], value)


# -- being known to PEFT -----------------------------------------------------------------------------------------------


def python(code, *arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
        capture_output=True, text=True, timeout=300, env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_through_the_hub(tmp_path):
    model = adapted(task_type="CAUSAL_LM")
    model.save_pretrained(tmp_path / "adapter")
    stock().save_pretrained(tmp_path / "base")
    torch.save({"inputs": batch(model), "logits": logits(model)}, tmp_path / "expected.pt")
    code = """
import sys, torch, hf_multimax
from peft import PeftModel
from transformers import AutoModelForCausalLM
def base():
    return AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/base", attn_implementation="eager")
expected = torch.load(sys.argv[1] + "/expected.pt")
name = "me/attention"
if sys.argv[2] == "push":
    PeftModel.from_pretrained(base(), sys.argv[1] + "/adapter").push_to_hub(name)
    PeftModel.from_pretrained(base(), sys.argv[1] + "/adapter").push_to_hub(name, revision="other", create_pr=False)
else:
    found = [PeftModel.from_pretrained(base(), name, **options) for options in ({}, {"revision": "other"})]
    found.append(base())
    found[-1].load_adapter(name)
    for model in found:
        with torch.no_grad():
            print((model(**expected["inputs"]).logits - expected["logits"]).abs().max().item())
"""
    with HubServer() as hub:
        hub.users[TOKEN] = "me"
        python(code, tmp_path, "push", **hub.environment(tmp_path / "pusher"))
        said = python(code, tmp_path, "load", **hub.environment(tmp_path / "stranger"))
    assert said.split() == ["0.0"] * 3


def test_a_fresh_process_needs_only_the_import(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "adapter")
    base = stock()
    base.save_pretrained(tmp_path / "base")
    torch.save({"inputs": batch(model), "logits": logits(model)}, tmp_path / "expected.pt")
    code = """
import peft, hf_multimax  # the other way round in the test before
import sys, torch
from transformers import AutoModelForCausalLM
expected = torch.load(sys.argv[1] + "/expected.pt")
base = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/base", attn_implementation="eager")
model = peft.PeftModel.from_pretrained(base, sys.argv[1] + "/adapter")
with torch.no_grad():
    print((model(**expected["inputs"]).logits - expected["logits"]).abs().max().item())
"""
    assert float(python(code, tmp_path)) == 0.0


def test_a_peft_that_changed_is_named_and_stays_importable():
    code = """
import peft.utils.peft_types
def register_peft_method(*, name): ...
peft.utils.register_peft_method = register_peft_method
import hf_multimax
try:
    from hf_multimax.peft import MultiMaxAdapterConfig
except RuntimeError as error:
    print(error)
"""
    said = python(code)
    assert "cannot be registered with PEFT" in said and "unexpected keyword" in said and "install a version" in said


def test_registering_again_changes_nothing():
    from peft.utils import PeftType

    members = list(PeftType)
    bridge.register()
    assert list(PeftType) == members and members.count(names.TYPE) == 1
    assert PeftType(names.TYPE) is PeftType.MULTIMAX_ADAPTER is MultiMaxAdapterConfig().peft_type
    assert pickle.loads(pickle.dumps(PeftType.MULTIMAX_ADAPTER)) is PeftType.MULTIMAX_ADAPTER


def test_mixed_models_of_peft_refuse_it():
    with pytest.raises(ValueError, match="MULTIMAX_ADAPTER.*not compatible"):
        get_peft_model(stock(), MultiMaxAdapterConfig(), mixed=True)
