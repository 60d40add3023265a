"""The metrics of the recipes: loaded by path without a network, and equal to their definitions."""

import math
import os
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import sacrebleu
import torch
from sklearn.metrics import top_k_accuracy_score

from hf_multimax import diagnostics, multimax
from recipes.shared.metrics import METRICS, compute

ROOT = Path(__file__).parents[1]
NAMES = sorted(path.name for path in METRICS.iterdir() if (path / f"{path.name}.py").exists())


def test_the_metrics_are_these():
    assert NAMES == ["attention", "perplexity", "topk_accuracy", "translation"]


@pytest.mark.parametrize("name", NAMES)
def test_a_metric_loads_by_its_path_and_says_what_it_takes(name):
    module = evaluate.load(str(METRICS / name))
    assert isinstance(module, evaluate.EvaluationModule)
    assert all(argument in module.inputs_description for argument in module.features)
    assert "Returns:" in module.inputs_description and module.description.strip()


def test_nothing_is_fetched():
    """In a process that may not open a connection, and was not told to stay offline."""
    script = """
import socket
def refuse(*arguments):
    raise AssertionError(f"a connection was opened: {arguments}")
socket.socket.connect = socket.getaddrinfo = refuse
from recipes.shared.metrics import compute
print(compute("perplexity", losses=[0.0], tokens=[3])["perplexity"])
"""
    environment = {k: v for k, v in os.environ.items() if "OFFLINE" not in k}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.stdout.split() == ["1.0"], done.stderr


def test_a_metric_that_does_not_load_is_said_before_training(tmp_path, monkeypatch):
    from recipes import language_modeling
    from recipes.shared import run

    def broken(name):
        raise OSError(f"{name} cannot be loaded")

    (tmp_path / "text.txt").write_text("a line of text\n" * 400)
    monkeypatch.setattr(run, "load_metric", broken)
    monkeypatch.setattr(run, "run", lambda *_: pytest.fail("the training began"))
    options = {"data": tmp_path / "text.txt", "vocab_size": 260, "context": 8, "output_dir": tmp_path / "out"}
    options |= {"model_config": '{"n_layer": 1, "n_embd": 8, "n_head": 2}', "use_cpu": "true"}
    with pytest.raises(SystemExit, match="error: perplexity cannot be loaded"):
        language_modeling.main(
            *language_modeling.RECIPE, [str(w) for name, value in options.items() for w in (f"--{name}", value)]
        )


def test_perplexity_weighs_every_token_alike():
    losses, tokens = [2.0, 1.0, 0.5], [30, 10, 2]
    results = compute("perplexity", losses=losses, tokens=tokens, num_bytes=100)
    nats = np.dot(losses, tokens)
    assert results["loss"] == pytest.approx(nats / 42)
    assert results["perplexity"] == pytest.approx(math.exp(nats / 42))
    assert results["byte_perplexity"] == pytest.approx(math.exp(nats / 100))
    assert results["bytes_per_token"] == pytest.approx(100 / 42)
    assert compute("perplexity", losses=losses, tokens=tokens).keys() == {"loss", "perplexity"}


@pytest.mark.parametrize("loss", [1e4, math.inf, math.nan])
def test_a_diverged_model_has_no_finite_perplexity(loss):
    results = compute("perplexity", losses=[loss], tokens=[1], num_bytes=1)
    assert results["perplexity"] == results["byte_perplexity"] == math.inf


@pytest.mark.parametrize("classes", [3, 10])
def test_top_k_accuracy_is_that_of_scikit_learn(classes):
    logits = np.random.default_rng(0).standard_normal((200, classes))
    labels = np.arange(200) % classes
    best = np.argsort(-logits)[:, :5]
    results = compute("topk_accuracy", predictions=torch.from_numpy(best), references=labels, ks=(1, 2, 5))
    assert list(results) == ["accuracy", "top2_accuracy", "top5_accuracy"]
    for k, value in zip((1, 2, 5), results.values()):
        expected = 1.0 if k >= classes else top_k_accuracy_score(labels, logits, k=k)
        assert value == pytest.approx(expected)


def test_translations_are_scored_by_sacrebleu():
    predictions, references = ["the cat sat on the mat", "a b"], ["the cat is on the mat", "a b c d"]
    results = compute("translation", predictions=predictions, references=references)
    for name, metric in (("bleu", sacrebleu.BLEU()), ("chrf", sacrebleu.CHRF())):
        assert results[name] == metric.corpus_score(predictions, [references]).score
        assert results[f"{name}_signature"] == str(metric.get_signature())


def test_attention_measures_ragged_rows_as_diagnostics_does_masked_ones():
    x = torch.randn(6, 9)
    mask = torch.arange(9) < torch.tensor([9, 4, 7, 9, 2, 5])[:, None]
    p = multimax(x, torch.zeros(4), torch.ones(4), mask=mask)
    rows = {"scores": x, "probabilities": p}
    results = compute("attention", k=2, **{key: [v[m].tolist() for v, m in zip(rows[key], mask)] for key in rows})
    expected = {
        "sparsity": diagnostics.sparsity(x, p, mask=mask),
        "multi_modality": diagnostics.multi_modality(x, p, mask=mask),
        "entropy": diagnostics.entropy(p, mask=mask),
        "topk_mass": diagnostics.topk_mass(p, 2, mask=mask),
    }
    assert results == pytest.approx({name: measure.value for name, measure in expected.items()}, rel=1e-6)
