"""Sliding windows: as an argument of attention, and as the masks of Mistral, Gemma and others tell of them."""

import copy
import math

import pytest
import torch
import transformers

from hf_multimax import backend, multimax_attention, patch_model
from hf_multimax.attention import choose, interface
from hf_multimax.attention.call import make_call
from hf_multimax.attention.native import backend as native
from hf_multimax.attention.tiled.tiles import plan_tiles
from tests.tolerances import relative_error

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "sliding_window": 7, "pad_token_id": 0,
}  # fmt: skip
#: how many layers of each slide
MODELS = {"Mistral": 4, "Gemma2": 2, "Gemma3Text": 4, "Phi3": 4, "Starcoder2": 4, "Cohere2": 3}


def model_of(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES)
    named = "Gemma3ForCausalLM" if name == "Gemma3Text" else f"{name}ForCausalLM"
    return getattr(transformers, named)(config).eval()


@pytest.fixture
def windows(monkeypatch):
    """The window of every call."""
    seen = []

    def spied(*arguments, **features):
        call = make_call(*arguments, **features)
        seen.append(call.window)
        return call

    monkeypatch.setattr(interface, "make_call", spied)
    return seen


@pytest.mark.parametrize("name", ["eager", "tiled", "native"])
@pytest.mark.parametrize("causal", [True, False])
def test_a_window_is_the_mask_that_it_stands_for(name, causal):
    if name == "native" and not native.available():
        pytest.skip("no native kernels here")
    q, k, v = torch.randn(1, 4, 150, 8), torch.randn(1, 2, 190, 8), torch.randn(1, 2, 190, 8)
    ranges, ts = torch.randn(4), torch.rand(4)
    ahead = torch.arange(190) - torch.arange(40, 190)[:, None]
    mask = (ahead > -20) & ((ahead <= 0) if causal else (ahead < 20))
    with backend(name):
        out = multimax_attention(q, k, v, ranges, ts, is_causal=causal, window=20)
        torch.testing.assert_close(out, multimax_attention(q, k, v, ranges, ts, attn_mask=mask))
        more = torch.rand(150, 190) > 0.3
        out = multimax_attention(q, k, v, ranges, ts, is_causal=causal, window=20, attn_mask=more)
        torch.testing.assert_close(out, multimax_attention(q, k, v, ranges, ts, attn_mask=mask & more))


@pytest.mark.parametrize("rows", [1000, 4000])
def test_tiles_hold_a_window_and_not_the_square(rows):
    q = torch.empty(1, 2, rows, 8)
    call = make_call(q, q, q, torch.zeros(4), torch.zeros(4), causal=True, window=100)
    area = sum(math.prod(tile.shape) for tile in plan_tiles(call, whole_heads=False))
    assert area < 2 * rows * (100 + 130)


@pytest.mark.parametrize("backend_name", ["auto", "eager", "tiled"])
@pytest.mark.parametrize("name", MODELS)
def test_sliding_layers_tell_kernels_of_their_window(name, backend_name, windows):
    stock = model_of(name)
    model = patch_model(copy.deepcopy(stock))
    ids = torch.randint(1, 61, (2, 40))
    padded = torch.ones_like(ids)
    padded[0, :11] = 0
    for mask in (None, padded):
        windows.clear()
        with torch.no_grad(), backend(backend_name):
            found, expected = (m(ids, attention_mask=mask).logits for m in (model, stock))
        kept = slice(None) if mask is None else padded.bool()
        assert relative_error(found[kept], expected[kept]) < 1e-5
        assert sorted(windows) == [-1] * (4 - MODELS[name]) + [7] * MODELS[name]


@pytest.mark.parametrize("name", ["Mistral", "Gemma3Text"])
def test_where_a_mask_holds_more_than_the_window_it_decides_alone(name, windows):
    """Packed sequences, masks of the caller's own, a cache."""
    stock = model_of(name)
    model = patch_model(copy.deepcopy(stock))
    ids = torch.randint(1, 61, (1, 40))
    packed = torch.cat([torch.arange(15), torch.arange(25)])[None]
    whole = {"full_attention": torch.zeros(1, 1, 40, 40), "sliding_attention": torch.zeros(1, 1, 40, 40)}
    given = whole if name == "Gemma3Text" else whole["full_attention"]
    for more in ({"position_ids": packed}, {"attention_mask": given}):
        windows.clear()
        with torch.no_grad():
            found, expected = (m(ids, use_cache=False, **more).logits for m in (model, stock))
        assert relative_error(found, expected) < 1e-5
        assert set(windows) == {-1}
    with torch.no_grad():
        assert torch.equal(*(m.generate(ids, max_new_tokens=12, do_sample=False) for m in (model, stock)))
        first = model(ids[:, :20], use_cache=True)
        rest = model(ids[:, 20:], past_key_values=first.past_key_values).logits
        assert relative_error(rest, stock(ids).logits[:, 20:]) < 1e-5


def test_gradients_and_another_normalizer_in_a_window(windows):
    ids = torch.randint(1, 61, (2, 40))
    for options in ({}, {"normalizer": "entmax15"}):
        model = patch_model(model_of("Mistral"), **options)
        gradients = []
        for name in ("auto", "eager", "tiled"):
            model.zero_grad()
            with backend(name):
                model(ids, labels=ids).loss.backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert max(relative_error(x, gradients[1]) for x in gradients) < 1e-4
    assert set(windows) == {7}


def test_compiled_models_have_the_mask_alone():
    stock = model_of("Mistral")
    model = patch_model(copy.deepcopy(stock))
    ids = torch.randint(1, 61, (2, 40))
    with torch.no_grad():
        found = torch.compile(model, backend="aot_eager")(ids).logits
        assert relative_error(found, stock(ids).logits) < 1e-5


def test_only_auto_falls_back(monkeypatch):
    monkeypatch.setattr(choose, "SMALL", 0)
    q = torch.randn(1, 1, 9, 8, dtype=torch.float64)
    with backend("native"), pytest.raises(ValueError, match="float64"):
        multimax_attention(q, q, q, torch.zeros(4), torch.zeros(4), window=3)
    with pytest.raises(ValueError, match="window must be at least 1"):
        multimax_attention(q, q, q, torch.zeros(4), torch.zeros(4), window=0)
    for wrong in ("sliding_window", "mask", "causal"):  # the last two are what kernels call attn_mask and is_causal
        with pytest.raises(TypeError, match=f"multimax_attention has no argument '{wrong}'; there are attn_mask"):
            multimax_attention(q, q, q, torch.zeros(4), torch.zeros(4), **{wrong: 3})
