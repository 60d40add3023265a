"""What adapters learn and cost: the comparison's arms leave the model as it was, its summary says what was measured."""

import pytest
import torch
from zoo import zoo_model

from benchmarks import adapter_step, recipe_step, scalar_start, trained_attention
from benchmarks.scalar_summary import REFERENCE, UNTUNED, chosen_rate, summary
from hf_multimax import is_patched
from recipes.shared.tokens import train_tokenizer

TEXT = "It is a text about nothing, written for a test, and it goes on and on.\n" * 60


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    tokenizer = train_tokenizer(TEXT, 257, 64)
    zoo_model("LlamaForCausalLM", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for name, value in {"LENGTH": 8, "HELD_OUT": 2, "STEPS": 2}.items():
        monkeypatch.setattr(scalar_start, name, value)
    monkeypatch.setattr(scalar_start, "checkpoint_folder", lambda name: tmp_path)
    monkeypatch.setattr(scalar_start, "load_text", lambda name: TEXT)
    return scalar_start.Experiment("pydoc")


def test_every_arm_is_trained_and_taken_off_again(experiment):
    layers, heads = experiment.model.config.num_hidden_layers, experiment.model.config.num_attention_heads
    before = {name: p.clone() for name, p in experiment.model.named_parameters()}
    losses, stock = experiment.evaluate(experiment.model), type(experiment.model)
    trained = {}
    for arm in scalar_start.ARMS:
        row = experiment.run(arm, 2e-2, 0)
        trained[arm] = row["trained"]
        assert row["test"] != losses["test"] and row["file bytes"] > 0 and row["step s"] > 0
        assert type(experiment.model) is stock and not is_patched(experiment.model)
        after = dict(experiment.model.named_parameters())
        assert after.keys() == before.keys() and all(torch.equal(before[name], p) for name, p in after.items())
        assert experiment.evaluate(experiment.model) == losses
    assert trained[REFERENCE] == layers and trained["one temperature per head"] == layers * heads
    assert trained["MultiMax, order 1"] == 4 * layers and trained["MultiMax, order 2"] == 8 * layers
    scalars = trained["MultiMax, order 1, per head"]
    assert scalars == 4 * layers * heads
    assert trained["LoRA + MultiMax, order 1, per head"] == trained["LoRA, rank 8"] + scalars


def test_batches_are_the_same_for_all_arms_and_other_for_other_seeds(experiment):
    assert torch.equal(experiment.batches(1), experiment.batches(1))
    assert not torch.equal(experiment.batches(1), experiment.batches(2))
    assert [len(windows) for windows in experiment.held_out.values()] == [2, 2]


def rows():
    """Two arms whose rates are chosen on the first seed, by the validation windows."""
    found = [{"arm": UNTUNED, "rate": None, "seed": None, "validation": 2.0, "test": 3.0}]
    for arm, gains in ((REFERENCE, {1e-3: 0.1, 1e-2: 0.2}), ("ours", {1e-3: 0.4, 1e-2: -0.3})):
        for rate, gain in gains.items():
            for seed in (0, 1, 2) if gain == max(gains.values()) else (0,):
                losses = {"validation": 2.0 - gain, "test": 3.0 - gain - seed * (0.01 if arm == "ours" else 0.02)}
                costs = {"step s": 1.0 + seed, "step MB": 5.0, "trained": 7, "file bytes": 9}
                found.append({"arm": arm, "rate": rate, "seed": seed, **losses, **costs})
    return found


def test_summary():
    reference, ours = summary(rows())
    assert chosen_rate(rows(), REFERENCE) == reference["rate"] == 1e-2 and ours["rate"] == 1e-3
    assert reference["gain"] == pytest.approx(0.22) and ours["gain"] == pytest.approx(0.41)
    assert ours["gains"] == pytest.approx({1e-3: 0.41, 1e-2: -0.3}) and ours["worst"] == pytest.approx(-0.3)
    assert "against" not in reference and ours["against"] == pytest.approx(-0.19)
    half = 4.303 * 0.01 / 3**0.5  # Student's t of two degrees of freedom; the differences are -0.20, -0.19 and -0.18
    assert (ours["low"], ours["high"]) == (pytest.approx(-0.19 - half, abs=1e-5), pytest.approx(-0.19 + half, abs=1e-5))
    assert ours["seeds"] == 3 and ours["step s"] == 1.5
    (alone,) = summary([row for row in rows() if row["arm"] in (UNTUNED, "ours") and row["seed"] in (None, 0)])
    assert "against" not in alone and alone["seeds"] == 1


def test_steps_of_adapters_are_measured_against_full_fine_tuning():
    for name in adapter_step.MODELS:
        full, *others = adapter_step.measure(name, "tiny", 0.0)
        assert full["arm"] == adapter_step.FULL and full["time / full"] == full["memory / full"] == 1
        assert all(row["trained"] < full["trained"] and row["time / full"] > 0 for row in others)


@pytest.mark.parametrize("name", recipe_step.TASKS)
def test_steps_of_the_recipes_through_other_functions(name):
    row = recipe_step.measure(name, 0.0)
    assert row["softmax s"] > 0 and all(row[f"{arm} / softmax"] > 0 for arm in recipe_step.ARMS)


def test_attention_on_given_scores():
    qkv = tuple(torch.randn(1, heads, 48, 64) for heads in (4, 2, 2))
    row = trained_attention.measure("sparsemax", {"made up": [qkv, trained_attention.made_up(qkv)]}, 0.0)
    assert 50 < row["made up zeros %"] < 100 and row["made up training"] > 0
