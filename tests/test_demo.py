"""The main job, with a few steps of a tiny model, as a user starts it; and what it refuses before it trains."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

import hf_multimax
from recipes import demo
from recipes.shared import causal
from recipes.shared.tokens import train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
MEASURES = {"sparsity", "multi_modality", "entropy", "topk_mass"}


@pytest.fixture(autouse=True)
def _new_processes_have_one_thread(monkeypatch):
    """As this one has: logits can only be equal for equal threads."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def check_results(results, layers):
    perplexity = results["perplexity"]
    assert perplexity["patched"] == pytest.approx(perplexity["checkpoint"], rel=1e-5)
    assert results["reload"]["equal_logits"], results["reload"]["largest_difference"]
    assert results["reload"]["generated"] and results["reload"]["class"] == "MultiMaxGPT2LMHeadModel"
    assert list(results["arms"]) == ["SoftMax", "MultiMax"]
    assert [arm["extra_parameters"] for arm in results["arms"].values()] == [0, 8 * len(layers)]
    for arm in results["arms"].values():
        assert arm["step_seconds"] > 0 and math.isfinite(arm["perplexity"])
        assert list(arm["layers"]) == layers
        assert all(set(measures) == MEASURES for measures in arm["layers"].values())
        assert all(measures["sparsity"]["s"] > 0 for measures in arm["layers"].values())
    assert results["seconds"] > 0 and set(results["versions"]) == {"torch", "transformers", "hf_multimax", "python"}


def test_the_demo_runs_as_a_user_starts_it(tmp_path):
    command = [sys.executable, "-m", "recipes.demo", "--quick", "--output", str(tmp_path / "made")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "made" / demo.RESULTS).read_text())
    check_results(results, ["transformer.h.0.attn", "transformer.h.1.attn"])
    assert results["data"] == "pydoc" and results["pretraining_steps"] == results["steps"] == 4
    for line in ("held-out perplexity", "extra parameters", "sparsity, transformer.h.1.attn", "logits equal"):
        assert line in done.stdout
    assert "pre-training: 100%" in done.stderr and "SoftMax and MultiMax: 100%" in done.stderr  # progress bars
    assert os.listdir(tmp_path) == ["made"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    assert hf_multimax.is_patched(model)
    assert any(parameter.any() for name, parameter in model.named_parameters() if name.endswith("multimax.ts"))


# -- with a checkpoint, in this process ------------------------------------------------------------------------------

TEXT = "It is a text about nothing, written for a test, and it goes on and on.\n" * 60


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "stock"
    tokenizer = train_tokenizer(TEXT, 280, 24)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=24)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder.parent / "text.txt").write_text(TEXT)
    return folder


def start(checkpoint, tmp_path, *arguments):
    text = str(checkpoint.parent / "text.txt")
    demo.main(["--quick", "--output", str(tmp_path / "out"), "--data", text, "--model", str(checkpoint), *arguments])


def test_the_demo_starts_from_a_checkpoint_and_replaces_an_earlier_demo(checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    for name in (demo.RESULTS, "model.safetensors", "of-the-earlier-demo"):
        (tmp_path / "out" / name).write_text("{}")
    start(checkpoint, tmp_path)
    results = json.loads((tmp_path / "out" / demo.RESULTS).read_text())
    check_results(results, ["transformer.h.0.attn"])
    assert results["model"] == str(checkpoint) and "pretraining_steps" not in results
    assert not (tmp_path / "out" / "of-the-earlier-demo").exists() and os.listdir(tmp_path) == ["out"]


def test_with_an_adapter_only_the_scalars_are_trained(checkpoint, tmp_path):
    start(checkpoint, tmp_path, "--adapter")
    folder = tmp_path / "out"
    results = json.loads((folder / demo.RESULTS).read_text())
    soft, ours = results["arms"].values()
    assert soft["perplexity"] == results["perplexity"]["checkpoint"]
    assert soft["step_seconds"] is None and ours["step_seconds"] > 0 and results["reload"]["equal_logits"]
    assert 0 < results["adapter_bytes"] < 10_000
    stock, merged = (AutoModelForCausalLM.from_pretrained(path) for path in (checkpoint, folder))
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), folder / demo.ADAPTER)
    scalars, weights = hf_multimax.multimax_parameters(merged), dict(merged.named_parameters())
    assert ours["extra_parameters"] == sum(p.numel() for p in scalars.values())
    assert any(p.any() for p in scalars.values())
    assert all(torch.equal(weights[name], p) for name, p in stock.named_parameters())
    prompt = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(adapted(prompt).logits, merged(prompt).logits)


def test_a_checkpoint_that_is_known_by_name_is_fetched_and_trained_as_an_adapter(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(causal, "place_of", lambda name: {"smollm2": str(checkpoint)}[name])
    text = str(checkpoint.parent / "text.txt")
    demo.main(["--quick", "--output", str(tmp_path / "out"), "--data", text, "--model", "smollm2"])
    assert (tmp_path / "out" / demo.ADAPTER / "adapter_config.json").exists()
    assert json.loads((tmp_path / "out" / demo.RESULTS).read_text())["model"] == "smollm2"
    assert not demo.parse(["--model", "smollm2", "--no-adapter"]).adapter


def test_an_adapter_needs_a_checkpoint(capsys):
    with pytest.raises(SystemExit):
        demo.parse(["--adapter"])
    assert "give --model" in capsys.readouterr().err


def test_a_folder_that_is_no_demo_is_left_alone(checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    refused(checkpoint, tmp_path, "is not from an earlier demo")
    assert (tmp_path / "out" / "precious").read_text() == "mine" and os.listdir(tmp_path / "out") == ["precious"]


def refused(checkpoint, tmp_path, message, *arguments):
    with pytest.raises(SystemExit) as error:
        start(checkpoint, tmp_path, *arguments)
    text = str(error.value)
    assert text.startswith("error: ") and "\n" not in text and message in text


def test_bad_input_is_one_sentence_and_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "train", lambda *_: pytest.fail("the training began"))
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    refused(checkpoint, tmp_path, "needs at least 240", "--data", str(short))
    refused(checkpoint, tmp_path, "there is no file or folder", "--data", str(tmp_path / "missing"))
    short.write_text(" ")
    refused(checkpoint, tmp_path, "there is no text in", "--data", str(short))
    missing = str(tmp_path / "no-model")
    refused(checkpoint, tmp_path, f"--model {missing} is no causal language model", "--model", missing)

    patched = tmp_path / "patched"
    hf_multimax.patch_model(AutoModelForCausalLM.from_pretrained(checkpoint)).save_pretrained(patched)
    tokenizer = train_tokenizer(TEXT, 280, 24)
    tokenizer.save_pretrained(patched)
    refused(checkpoint, tmp_path, "is a MultiMax model already", "--model", str(patched))

    other = tmp_path / "t5"
    T5ForConditionalGeneration(
        T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ).save_pretrained(other)
    tokenizer.save_pretrained(other)
    refused(checkpoint, tmp_path, "is no causal language model", "--model", str(other))

    GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=1, n_positions=24)).save_pretrained(other)
    refused(checkpoint, tmp_path, "280 tokens and the model only 20", "--model", str(other))
    assert sorted(os.listdir(tmp_path)) == ["patched", "short.txt", "t5"]


@pytest.mark.parametrize("option", ["--steps", "--minutes", "--batch-size", "--learning-rate"])
def test_numbers_must_be_positive(option, capsys):
    with pytest.raises(SystemExit):
        demo.parse([option, "0"])
    assert f"{option} must be positive" in capsys.readouterr().err


def test_batches_depend_on_the_seed_alone():
    held_out = torch.zeros(1, 8, dtype=torch.long)
    data = demo.Data(torch.arange(100), held_out, None)
    assert torch.equal(data.batches(3, 2, 5), data.batches(3, 2, 5))
    assert not torch.equal(data.batches(3, 2, 5), data.batches(3, 2, 6))
    batches = data.batches(50, 4, 0)
    assert batches.shape == (50, 4, 8) and torch.equal(
        batches[..., 1:] - batches[..., :-1], torch.ones(50, 4, 7).long()
    )


def test_a_training_that_diverges_is_told_in_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match="error: optimizer step .* lower the learning rate"):
        demo.main(["--quick", "--learning-rate", "1e8", "--output", str(tmp_path / "made")])
    assert not os.listdir(tmp_path)
