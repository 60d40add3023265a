"""--adapter of the three recipes: what is trained and saved is an adapter, which loads onto the stock checkpoint."""

import pytest
import test_image_classification as images
import test_language_modeling as text
import test_translation as sentences
import torch
from models import make
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    ViTImageProcessorPil,
)

from hf_multimax import is_patched
from recipes.shared.models import ADAPTERS

data, files = images.data, sentences.files
_short_text = text._a_short_text


def check(base, folder, results, adapter, inputs):
    """The saved adapter has what it should have, and on the stock checkpoint other outputs than that."""
    assert not (folder / "model.safetensors").exists()
    keys = load_file(folder / "adapter_model.safetensors")
    assert any("lora_" in key for key in keys) == ("lora" in adapter)
    assert any("multimax" in key for key in keys) == ("multimax" in adapter)
    assert (results["multimax"] is not None) == ("multimax" in adapter)
    assert {value.shape[-1] for key, value in keys.items() if key.endswith(".ts")} == (
        {2} if "multimax" in adapter else set()
    )
    with torch.no_grad():
        before = base.eval()(**inputs).logits
        weights = {name: p.clone() for name, p in base.state_dict().items()}
        model = PeftModel.from_pretrained(base, folder)
        after = model.eval()(**inputs).logits
    assert is_patched(model.get_base_model()) == ("multimax" in adapter)
    assert after.isfinite().all() and (after - before).abs().max() > 1e-6
    if adapter == "multimax":
        base = model.unload()
        kept = [name for name in weights if not name.startswith("classifier")]
        assert all(torch.equal(weights[name], base.state_dict()[name]) for name in kept)
    assert results["model"]["class"].removeprefix("MultiMax") == type(base).__name__


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_language_modelling(adapter, tmp_path):
    text.run(tmp_path, "--output_dir", str(tmp_path / "stock"), normalizer="softmax", max_steps=2)
    options = {"model": str(tmp_path / "stock"), "adapter": adapter, "learning_rate": 0.1}
    results = text.run(tmp_path, **options, output=adapter == "lora+multimax")
    ids = torch.arange(12)[None]
    check(
        AutoModelForCausalLM.from_pretrained(tmp_path / "stock"), tmp_path / "out", results, adapter, {"input_ids": ids}
    )
    resumed = text.run(tmp_path, "--resume_from_checkpoint", "last", **options, output=adapter == "lora+multimax")
    assert resumed["metrics"]["perplexity"] == pytest.approx(results["metrics"]["perplexity"], rel=1e-4)


@pytest.mark.parametrize("adapter", ["multimax", "lora+multimax"])
def test_image_classification_trains_the_head_too(adapter, tmp_path, data):
    size = images.SIZE
    make("ViTForImageClassification", num_channels=3, image_size=size, num_labels=4).save_pretrained(tmp_path / "stock")
    ViTImageProcessorPil(size={"height": size, "width": size}).save_pretrained(tmp_path / "stock")
    options = {"model": str(tmp_path / "stock"), "adapter": adapter, "learning_rate": 0.1}
    results = images.run(tmp_path, data=str(data), **options)
    assert any("classifier" in key for key in load_file(tmp_path / "out" / "adapter_model.safetensors"))
    base = AutoModelForImageClassification.from_pretrained(tmp_path / "stock")
    check(base, tmp_path / "out", results, adapter, {"pixel_values": torch.rand(2, 3, size, size)})


def test_translation(tmp_path, files):
    sentences.run(tmp_path / "stock", *files, "--normalizer", "softmax")
    options = ["--model", tmp_path / "stock", "--adapter", "multimax", "--learning_rate", "0.1"]
    results = sentences.run(tmp_path / "out", *files, *options)
    base = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "stock")
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "decoder_input_ids": torch.tensor([[0, 5, 6]])}
    check(base, tmp_path / "out", results, "multimax", inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter": "lora"}, "give --model"),
        ({"adapter": "dora", "model": "somewhere"}, "must be one of multimax, lora, lora+multimax, got 'dora'"),
        ({"adapter": "multimax", "model": "somewhere", "normalizer": "softmax"}, "leave out --normalizer softmax"),
        ({"adapter": "multimax", "model": "somewhere", "normalizer": "sparsemax"}, "learns nothing"),
    ],
)
def test_adapters_of_nothing_are_refused(options, message, tmp_path, capsys):
    if "model" in options:
        text.run(tmp_path, "--output_dir", str(tmp_path / "stock"), normalizer="softmax", max_steps=1)
        options = {**options, "model": str(tmp_path / "stock")}
    assert message in text.refused(tmp_path, capsys, **options)
