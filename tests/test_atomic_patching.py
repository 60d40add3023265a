"""A patch happens or does not: whatever stops it, and wherever, the model is as it was or as it is to be."""

import sys

import pytest
import torch
import transformers
from transformers import PreTrainedConfig
from zoo import zoo_inputs, zoo_model

import hf_multimax.models.attachment
import hf_multimax.models.changes
from hf_multimax import is_patched, patch_model, unpatch_model
from hf_multimax.normalizers.base import Normalizer

FILES = {hf_multimax.models.attachment.__file__, hf_multimax.models.changes.__file__}
NAME = "BartForConditionalGeneration"


def interrupted(function, at, error):
    """Call ``function`` with ``error`` raised before line number ``at`` that the two files run; how many there were."""
    lines = 0

    def local(frame, event, argument):
        nonlocal lines
        if event == "line" and not frame.f_code.co_name.startswith("__exit__"):
            lines += 1
            if lines == at:
                raise error
        return local

    def trace(frame, event, argument):
        return local if frame.f_code.co_filename in FILES else None

    sys.settrace(trace)
    try:
        function()
    except type(error):
        pass
    finally:
        sys.settrace(None)
    return lines


def state(model):
    """All that a patch could change."""
    configs = [value for m in model.modules() for value in vars(m).values() if isinstance(value, PreTrainedConfig)]
    return (
        type(model), sorted(model.state_dict()), [type(c) for c in configs], [c.to_json_string() for c in configs],
        [c._attn_implementation for c in configs], sorted(vars(model)), model._no_split_modules,
        model._keep_in_fp32_modules_strict, model._keys_to_ignore_on_save,
        [sorted(vars(m)) for m in model.modules()],
        sum(isinstance(m, Normalizer) for m in model.modules()),
    )  # fmt: skip


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()], ids=["interrupt", "memory"])
@pytest.mark.parametrize("way", ["patch", "unpatch"])
def test_at_any_line(way, error):
    batch = zoo_inputs(NAME)
    stock, after = zoo_model(NAME), patch_model(zoo_model(NAME), output=True)
    ends = {way: state(m) for way, m in (("stock", stock), ("patched", after))}
    with torch.no_grad():
        expected = stock(**batch).logits
    total = interrupted(lambda: patch_model(zoo_model(NAME), output=True), 0, error)
    if way == "unpatch":
        total = interrupted(lambda: unpatch_model(after), 0, error)
    assert total > 50
    for at in range(1, total + 1, max(1, total // 60)):
        model = zoo_model(NAME)
        if way == "unpatch":
            patch_model(model, output=True)
        interrupted(lambda m=model: patch_model(m, output=True) if way == "patch" else unpatch_model(m), at, error)
        assert state(model) == ends["patched" if is_patched(model) else "stock"], at
        (unpatch_model if is_patched(model) else patch_model)(model)
        if is_patched(model):
            unpatch_model(model)
        assert state(model) == ends["stock"]
        assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("options", [
    {"normalizer": "nonsense"}, {"order": 0}, {"include": "nothing"}, {"normalizer": "entmax15", "output": True},
    {"per_head": True, "normalizer": "sparsemax"}, {"normalizer_kwargs": {"temperature": 1}},
], ids=str)  # fmt: skip
def test_a_refused_option_changes_nothing(options):
    model = zoo_model(NAME)
    before = state(model)
    with pytest.raises((ValueError, TypeError)):
        patch_model(model, **options)
    assert state(model) == before


def test_a_layer_that_cannot_be_counted_changes_nothing(monkeypatch):
    model = zoo_model("LlamaForCausalLM")
    before = state(model)
    monkeypatch.setattr(transformers.LlamaConfig, "num_attention_heads", None, raising=False)
    model.config.__dict__.pop("num_attention_heads")
    before = state(model)
    with pytest.raises(ValueError, match="number of heads"):
        patch_model(model, per_head=True)
    assert state(model) == before
