"""`python -m benchmarks.architectures`: models of every kind are no worse than before, and its checks see faults."""

import json
import os
import random
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.architectures import attempt, command, page, results
from benchmarks.architectures.attempt import try_type
from benchmarks.architectures.inputs import make_inputs
from benchmarks.architectures.models import build, model_types
from benchmarks.architectures.sites import attention_sites
from benchmarks.architectures.workers import run_all
from hf_multimax import patch_model

#: A type of each kind: what is special about it.
KINDS = {
    "gpt2": "decoder with learned positions",
    "llama": "decoder with rotary positions and grouped queries",
    "gemma2": "soft-capping, sliding windows",
    "gpt_oss": "attention sinks, experts",
    "mixtral": "experts",
    "deepseek_v3": "latent attention",
    "jamba": "state space and attention",
    "mamba2": "no attention",
    "bloom": "attention outside the interface",
    "bert": "encoder",
    "modernbert": "encoder with local attention",
    "deberta-v2": "disentangled attention outside the interface",
    "t5": "encoder-decoder with a position bias",
    "bart": "encoder-decoder",
    "nllb-moe": "written for masks that are always there",
    "vit": "image",
    "swin": "image in windows",
    "resnet": "convolutions",
    "detr": "object detection",
    "timesformer": "video",
    "wav2vec2": "waveform",
    "whisper": "spectrogram and text",
    "clip": "image beside text",
    "llava": "image in text",
    "qwen2_vl": "image and video in text, packed",
    "time_series_transformer": "time series",
    "esm": "protein",
}
KNOWN = {row["type"]: row for row in results.read()["rows"]}


@pytest.mark.parametrize("model_type", KINDS)
def test_a_model_of_this_kind_is_no_worse_than_the_results(model_type):
    row = try_type(model_type)
    assert row["status"] != "not run", row["reason"]
    assert not results.worse([KNOWN[model_type]], [row])


@pytest.mark.slow
def test_a_sample_of_all_types_is_no_worse_than_the_results():
    names = sorted(set(KNOWN) & set(model_types()) - set(KINDS))
    sample = random.Random(0).sample(names, 60)
    rows = list(run_all(try_type, sample, jobs=2, seconds=300, gigabytes=12))
    assert sorted(row["type"] for row in rows) == sorted(sample)
    assert not results.worse(KNOWN.values(), rows)


@pytest.mark.parametrize(
    "model_type, towers",
    [
        ("llava", ("vision_tower", "language_model")),
        ("qwen2_vl", ("visual", "language_model")),
        ("whisper", ("encoder.", "decoder.", "encoder_attn")),
        ("clip", ("vision_model",)),
    ],
)
def test_the_inputs_reach_every_tower(model_type, towers):
    model = build(model_type)
    batch = make_inputs(model)
    found = attention_sites(model, lambda: model(**batch))
    for tower in towers:
        assert any(tower in name for name in found), tower


# -- the checks see faults that are put in


def _failed(row):
    return set(results.failures(row))


def test_a_layer_that_stays_softmax_is_seen(monkeypatch):
    monkeypatch.setattr(attempt, "patch_model", lambda model: patch_model(model, exclude=r"h\.0\."))
    row = try_type("gpt2")
    assert row["status"] == "failed"
    assert row["checks"]["discovery"] == "SoftMax stays in transformer.h.0.attn (GPT2Attention)"


def _without_mask(module, args, kwargs):
    return args, {**kwargs, "attention_mask": None}


def test_a_patch_that_forgets_the_causal_mask_is_seen(monkeypatch):
    def patch(model):
        patch_model(model)
        for module in model.modules():
            if hasattr(module, "is_causal"):
                module.is_causal = False
                module.register_forward_pre_hook(_without_mask, with_kwargs=True)

    monkeypatch.setattr(attempt, "patch_model", patch)
    assert {"identity", "identity by default", "no future"} <= _failed(try_type("gpt2"))


def test_a_patch_that_does_nothing_is_seen(monkeypatch):
    monkeypatch.setattr(attempt, "patch_model", lambda model: model)
    assert {"discovery", "save and load", "unpatch"} <= _failed(try_type("gpt2"))


def _forget(module, state, prefix, metadata):
    state[f"{prefix}ts"] = torch.zeros_like(state[f"{prefix}ts"])


def test_scalars_without_gradient_or_lost_in_a_file_are_seen(monkeypatch):
    def patch(model):
        patch_model(model)
        normalizer = model.transformer.h[1].attn.multimax
        normalizer.ts.requires_grad_(False)
        normalizer.register_state_dict_post_hook(_forget)

    monkeypatch.setattr(attempt, "patch_model", patch)
    row = try_type("gpt2")
    assert "transformer.h.1.attn.multimax.ts" in row["checks"]["gradients"]
    assert {"save and load", "base and head"} <= _failed(row)


def test_a_refusal_that_changes_the_model_is_seen(monkeypatch):
    def patch(model):
        patch_model(model)
        raise ValueError("transformer.h.0.attn is not to be patched")

    monkeypatch.setattr(attempt, "patch_model", patch)
    row = try_type("gpt2")
    assert (row["status"], _failed(row)) == ("failed", {"a refusal changes nothing"})


def test_a_refusal_names_the_place():
    row = try_type("slanet")
    assert row["status"] == "refused" and row["outside"] == ["head.structure_attention_cell"]
    assert row["names the place"] and "head.structure_attention_cell" in row["sentence"]


# -- where attention is


class _Attention(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.softmax, self.dropout = kind, nn.Softmax(dim=-1), nn.Dropout(0.0)
        self.both = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return getattr(self, self.kind)(x)

    def function(self, x):
        return self.dropout(torch.softmax(x @ x.mT, dim=-1).to(x.dtype)) @ x

    def module(self, x):
        return torch.einsum("bqk,bkd->bqd", self.softmax(x @ x.mT), x)

    def method(self, x):
        return torch.bmm((x @ x.mT).softmax(-1), x)

    def fused(self, x):
        return F.scaled_dot_product_attention(x, x, x)

    def torchs(self, x):
        return self.both(x, x, x)[0]

    def router(self, x):
        weights, chosen = torch.softmax(x, dim=-1).topk(2)
        return x * weights.sum(-1, keepdim=True) + chosen.sum()

    def nothing(self, x):
        return x @ x.mT @ x


@pytest.mark.parametrize("kind", ["function", "module", "method", "fused", "torchs", "router", "nothing"])
def test_attention_is_found_by_running_it(kind):
    model = nn.Sequential(nn.Linear(8, 8), _Attention(kind), _Attention("function"))
    found = attention_sites(model, lambda: model[:2](torch.randn(2, 5, 8)))
    where = {"torchs": {"1.both"}, "router": set(), "nothing": set()}.get(kind, {"1"})
    assert set(found) == where


# -- processes, results, the page


def _misbehave(name):
    if name == "dies":
        os._exit(3)
    if name == "hangs":
        time.sleep(600)
    if name == "floods":
        bytearray(2**36)
    return {"type": name, "status": "passed", "checks": {}, "seconds": 0.0}


def test_a_type_that_dies_hangs_or_floods_costs_itself_alone():
    names = ["fine", "dies", "hangs", "floods", "also fine"]
    rows = {row["type"]: row for row in run_all(_misbehave, names, jobs=2, seconds=3, gigabytes=16)}
    assert {name: row["status"] for name, row in rows.items()} == {
        "fine": "passed",
        "dies": "failed",
        "hangs": "failed",
        "floods": "failed",
        "also fine": "passed",
    }
    assert rows["hangs"]["reason"] == "took more than 3 s"


def _row(status, **found):
    return {"type": "a", "status": status, "checks": found, "reason": "why", "class": "A", "layers": 1}


@pytest.mark.parametrize(
    "before, after, is_worse",
    [
        (_row("passed", x="passed"), _row("passed", x="passed"), False),
        (_row("passed", x="passed"), _row("failed", x="no"), True),
        (_row("passed", x="passed"), _row("refused"), True),
        (_row("passed", x="passed"), _row("not run"), True),
        (_row("failed", x="no", y="passed"), _row("failed", x="no, otherwise", y="passed"), False),
        (_row("failed", x="no", y="passed"), _row("failed", x="passed", y="no"), True),
        (_row("refused"), _row("passed", x="passed"), False),
        (_row("refused"), _row("failed", x="no"), True),
        (_row("not run"), _row("failed", x="no"), False),
    ],
)
def test_what_got_worse(before, after, is_worse):
    assert bool(results.worse([before], [after])) == is_worse
    assert not results.worse([], [after])


def test_check_exits_with_1_and_names_what_got_worse(monkeypatch, capsys):
    monkeypatch.setattr(results, "read", lambda: {"rows": [{**_row("passed", identity="passed"), "type": "resnet"}]})
    with pytest.raises(SystemExit) as error:
        command.main(["--types", "resnet", "--jobs", "1", "--check"])
    assert error.value.code == 1 and "resnet: passed before, now refused" in capsys.readouterr().out


def test_an_unknown_type_is_refused():
    with pytest.raises(SystemExit, match="no auto class of the installed Transformers knows gtp2"):
        command.main(["--types", "gtp2"])


def test_the_pages_say_what_the_results_say(tmp_path):
    found = results.read()
    assert page.PAGE.read_text(encoding="utf-8") == page.render(found)
    text = page.DOCUMENT.read_text(encoding="utf-8")
    assert page.document(text, found) == text
    results.write(tmp_path / "again.json", found["rows"])
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["rows"] == found["rows"]
