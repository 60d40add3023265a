"""PEFT adapters of MultiMax models: each row its adapter's scalars, and no public way that loads one without them."""

import json
import subprocess
import sys

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from zoo import zoo_inputs, zoo_model

from hf_multimax import backend, is_patched, multimax_parameters, patch_model
from hf_multimax.peft.files import RECORD

IDS = zoo_inputs("LlamaForCausalLM")["input_ids"]


def randomise(model, part):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.add_(0.3 * torch.randn_like(parameter))


def lora(**options):
    return LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False, **options)


def logits(model, ids=IDS, **options):
    with torch.no_grad():
        return model.eval()(input_ids=ids, **options).logits


@pytest.fixture
def stock(tmp_path):
    zoo_model("LlamaForCausalLM").save_pretrained(tmp_path / "stock")
    return tmp_path / "stock"


def adapter(stock, folder, scalars=True, base_scalars=0.0, **options):
    """Train-like an adapter of a model that was patched in memory; its logits."""
    base = patch_model(AutoModelForCausalLM.from_pretrained(stock), **options)
    with torch.no_grad():
        for parameter in multimax_parameters(base).values():
            parameter.add_(base_scalars)
    names = ["multimax", *(["multimax_output"] if options.get("output") else [])]
    model = get_peft_model(base, lora(modules_to_save=names if scalars else None))
    randomise(model, "modules_to_save")
    model.save_pretrained(folder)
    return logits(model)


LOADERS = {
    "PeftModel": lambda stock, folder: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(stock), folder),
    "AutoPeft": lambda stock, folder: AutoPeftModelForCausalLM.from_pretrained(folder),
    "AutoModel": lambda stock, folder: AutoModelForCausalLM.from_pretrained(folder),
    "stock class": lambda stock, folder: LlamaForCausalLM.from_pretrained(folder),
    "model.load_adapter": lambda stock, folder: _loaded(AutoModelForCausalLM.from_pretrained(stock), folder),
    "second adapter": lambda stock, folder: _second(AutoModelForCausalLM.from_pretrained(stock), folder),
}


def _loaded(model, folder):
    model.load_adapter(str(folder))
    return model


def _second(base, folder):
    model = get_peft_model(base, lora())
    model.load_adapter(folder, adapter_name="b")
    model.set_adapter("b")
    return model


@pytest.mark.parametrize("way", LOADERS)
@pytest.mark.parametrize("options", [{}, {"order": 1, "per_head": True}, {"output": True}], ids=str)
def test_on_a_stock_base_the_scalars_come_along(way, options, stock, tmp_path):
    expected = adapter(stock, tmp_path / "adapter", **options)
    model = LOADERS[way](stock, tmp_path / "adapter")
    torch.testing.assert_close(logits(model), expected)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert is_patched(base)


@pytest.mark.parametrize("way", LOADERS)
def test_without_a_record_they_are_missed(way, stock, tmp_path):
    adapter(stock, tmp_path / "adapter")
    (tmp_path / "adapter" / RECORD).unlink()
    with pytest.raises(ValueError, match="carries MultiMax scalars.*patch_model"):
        LOADERS[way](stock, tmp_path / "adapter")


@pytest.mark.parametrize("way", LOADERS)
def test_an_adapter_without_scalars_needs_its_base(way, stock, tmp_path):
    adapter(stock, tmp_path / "adapter", scalars=False, base_scalars=0.1)
    with pytest.raises(ValueError, match="trained scalars it does not carry.*load the MultiMax checkpoint"):
        LOADERS[way](stock, tmp_path / "adapter")
    expected = adapter(stock, tmp_path / "identity", scalars=False)
    torch.testing.assert_close(logits(LOADERS[way](stock, tmp_path / "identity")), expected)


def test_on_a_base_that_was_patched_otherwise(stock, tmp_path):
    adapter(stock, tmp_path / "adapter", order=1)
    for options, text in (
        ({"order": 2}, r"another order \(1, not 2\)"),
        ({"order": 1, "include": r"layers\.0"}, "none in"),
    ):
        base = patch_model(AutoModelForCausalLM.from_pretrained(stock), **options)
        with pytest.raises(ValueError, match=text):
            PeftModel.from_pretrained(base, tmp_path / "adapter")
        assert not any("lora" in name for name, _ in base.named_parameters())


@pytest.mark.parametrize("text", ["{", "{}", '{"multimax": {"order": 0}, "base_is_softmax": true}'])
def test_a_damaged_record_is_refused(text, stock, tmp_path):
    adapter(stock, tmp_path / "adapter")
    (tmp_path / "adapter" / RECORD).write_text(text)
    with pytest.raises(ValueError, match=RECORD):
        LOADERS["PeftModel"](stock, tmp_path / "adapter")


def test_adapters_of_stock_models_are_as_ever(stock, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(stock), lora())
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / RECORD).exists()
    for load in LOADERS.values():
        torch.testing.assert_close(logits(load(stock, tmp_path / "adapter")), logits(model))


def test_several_adapters_have_a_record_each(stock, tmp_path):
    base = patch_model(AutoModelForCausalLM.from_pretrained(stock))
    model = get_peft_model(base, lora(modules_to_save=["multimax"]))
    model.add_adapter("b", lora(modules_to_save=["multimax"]))
    model.save_pretrained(tmp_path / "both")
    model.save_pretrained(tmp_path / "one", selected_adapters=["b"])
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob(RECORD))
    assert found == [f"both/{RECORD}", f"both/b/{RECORD}", f"one/b/{RECORD}"] or len(found) == 3
    assert json.loads((tmp_path / "both" / RECORD).read_text())["multimax"]["order"] == 2


@pytest.mark.parametrize("which", ["auto", "eager", "tiled"])
@pytest.mark.parametrize("options", [{"output": True}, {"per_head": True}], ids=str)
def test_each_row_has_the_scalars_of_its_adapter(which, options):
    torch.manual_seed(0)
    names = ["multimax", *(["multimax_output"] if "output" in options else [])]
    model = get_peft_model(patch_model(zoo_model("LlamaForCausalLM"), **options), lora(modules_to_save=names), "a")
    model.add_adapter("b", lora(modules_to_save=names))
    model.add_adapter("c", lora())  # has no scalars of its own: the base's
    randomise(model, "multimax")
    ids = torch.randint(3, 60, (5, 9))
    mask = torch.ones_like(ids)
    mask[2, 6:] = 0
    rows = ["a", "b", "__base__", "b", "c"]
    with backend(which):
        mixed = logits(model, ids, attention_mask=mask, adapter_names=rows)
        for i, name in enumerate(rows):
            own = {"ids": ids[i : i + 1], "attention_mask": mask[i : i + 1]}
            if name == "__base__":
                with model.disable_adapter():
                    expected = logits(model, **own)
            else:
                model.set_adapter(name)
                expected = logits(model, **own)
            torch.testing.assert_close(mixed[i : i + 1], expected)
    with pytest.raises(ValueError, match="adapter_names"):
        logits(model, ids, adapter_names=rows[:3])


def test_peft_is_not_imported_by_those_who_do_not_use_it():
    code = """
import sys, importlib.util, hf_multimax
assert "peft" not in sys.modules and importlib.util.find_spec("peft").origin  # asking is not importing
assert "peft" not in sys.modules
import peft
print(peft.PeftModel.load_adapter.__code__.co_filename, type(peft.__spec__.loader).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "hf_multimax" in done.stdout and "_Loader" not in done.stdout
