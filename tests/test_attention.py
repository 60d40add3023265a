"""The attention function by itself: masks, grouped queries, biases, sinks, dropout, and what it refuses."""

import pytest
import reference
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import hf_multimax
import hf_multimax.attention.choose
from hf_multimax import MultiMax, backend, multimax_attention
from hf_multimax.attention.interface import attention_forward

F64 = torch.float64


def qkv(heads=4, kv_heads=2, queries=5, keys=7, dtype=F64, grad=False):
    shapes = ((2, heads, queries, 8), (2, kv_heads, keys, 8), (2, kv_heads, keys, 6))
    return [torch.randn(shape, dtype=dtype).requires_grad_(grad) for shape in shapes]


def scalars(heads=None, dtype=F64):
    shape = (4,) if heads is None else (heads, 4)
    return [torch.randn(shape, dtype=dtype).requires_grad_() for _ in range(2)]


def written_down(q, k, v, ranges, ts, keep=None, bias=0.0, additive=0.0, scale=None):
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale) + bias
    weights = reference.sigma(scores, ranges, ts) + additive
    weights = weights if keep is None else weights.masked_fill(~keep, float("-inf"))
    return weights.softmax(-1).nan_to_num(0.0) @ v


@pytest.mark.parametrize("heads", [None, 4])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_grouped_queries_scales_and_heads(heads, kv_heads, scale):
    q, k, v = qkv(kv_heads=kv_heads)
    ranges, ts = scalars(heads)
    with backend("eager"):
        out = multimax_attention(q, k, v, ranges, ts, scale=scale)
    torch.testing.assert_close(out, written_down(q, k, v, ranges, ts, scale=scale))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["none", "boolean", "lowest", "minus infinity", "additive"])
def test_masks_act_after_sigma(kind, causal):
    q, k, v = qkv()
    ranges, ts = scalars()
    keep = torch.rand(2, 1, 5, 7) < 0.6
    keep[0, 0, 1] = False
    additive, mask = 0.0, None
    if kind == "boolean":
        mask = keep
    elif kind == "lowest":
        mask = torch.zeros(2, 1, 5, 7).masked_fill(~keep, torch.finfo(torch.float32).min)
    elif kind == "minus infinity":
        mask = torch.zeros(2, 1, 5, 7).masked_fill(~keep, float("-inf"))
    elif kind == "additive":
        additive = torch.randn(2, 4, 5, 7, dtype=F64)
        mask = additive.masked_fill(~keep, torch.finfo(F64).min)
    kept = keep if mask is not None else torch.ones_like(keep)
    if causal:
        kept = kept & torch.ones(5, 7, dtype=torch.bool).tril(2)
    with backend("eager"):
        out = multimax_attention(q, k, v, ranges, ts, attn_mask=mask, is_causal=causal)
    torch.testing.assert_close(out, written_down(q, k, v, ranges, ts, kept, additive=additive))
    assert out.isfinite().all()


def test_the_bias_acts_before_sigma_and_gets_a_gradient():
    inputs = [*qkv(grad=True), *scalars(), torch.randn(1, 4, 5, 7, dtype=F64, requires_grad=True)]
    with backend("eager"):
        assert torch.autograd.gradcheck(lambda q, k, v, r, t, b: multimax_attention(q, k, v, r, t, bias=b), inputs)
        out = multimax_attention(*inputs[:5], bias=inputs[5])
    torch.testing.assert_close(out, written_down(*inputs[:5], bias=inputs[5]))


def test_identity_is_scaled_dot_product_attention():
    q, k, v = qkv(kv_heads=4, dtype=torch.float32)
    ranges, ts = torch.randn(4), torch.zeros(4)
    keep = torch.rand(2, 1, 5, 7) < 0.7
    out = multimax_attention(q, k, v, ranges, ts, attn_mask=keep)
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v, keep), rtol=1e-5, atol=1e-6)


def test_dropout_drops_and_rescales_weights():
    q, k, v = qkv(dtype=torch.float32)
    v = torch.ones_like(v)
    ranges, ts = (p.detach().float() for p in scalars())
    with backend("eager"):
        out = multimax_attention(
            q.repeat(50, 1, 1, 1), k.repeat(50, 1, 1, 1), v.repeat(50, 1, 1, 1), ranges, ts, dropout_p=0.4
        )
    assert out.std() > 0.1
    assert out.mean().item() == pytest.approx(1.0, abs=0.1)


class Layer(nn.Module):
    """The least that an attention layer must be."""

    def __init__(self, is_causal=True):
        super().__init__()
        self.is_causal = is_causal
        self.multimax = MultiMax(init="paper", init_std=1.0)


def layer_reference(layer, q, k, v, **options):
    scalars = layer.multimax.ranges.double(), layer.multimax.ts.double()
    return written_down(q, k, v, *scalars, **options).transpose(1, 2)


def test_without_a_mask_a_causal_layer_is_causal():
    q, k, v = qkv(queries=7)
    for causal, override, expected in (
        (True, None, True),
        (False, None, False),
        (True, False, False),
        (False, True, True),
    ):
        layer = Layer(causal)
        out, _ = attention_forward(layer, q, k, v, None, is_causal=override)
        keep = torch.ones(7, 7, dtype=torch.bool).tril() if expected else None
        torch.testing.assert_close(out, layer_reference(layer, q, k, v, keep=keep))


def test_one_query_sees_every_key():
    q, k, v = qkv(queries=1)
    layer = Layer()
    torch.testing.assert_close(attention_forward(layer, q, k, v, None)[0], layer_reference(layer, q, k, v))


def test_the_first_call_of_a_static_cache_sees_only_what_was_written():
    q, k, v = qkv(queries=5, keys=9)
    k[:, :, 5:], v[:, :, 5:] = 0.0, 0.0
    bias = torch.randn(1, 4, 5, 9, dtype=F64)
    layer = Layer()
    keep = torch.ones(5, 5, dtype=torch.bool).tril()
    expected = layer_reference(layer, q, k[:, :, :5], v[:, :, :5], keep=keep, bias=bias[..., :5])
    torch.testing.assert_close(attention_forward(layer, q, k, v, None, position_bias=bias)[0], expected)


def test_soft_cap_then_bias_then_sigma():
    q, k, v = qkv()
    bias = torch.randn(1, 4, 5, 7, dtype=F64)
    layer = Layer(False)
    out, _ = attention_forward(layer, q, k, v, None, softcap=0.5, position_bias=bias)
    scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 8**-0.5
    scores = 0.5 * torch.tanh(scores / 0.5) + bias
    weights = reference.sigma(scores, layer.multimax.ranges.double(), layer.multimax.ts.double()).softmax(-1)
    torch.testing.assert_close(out, (weights @ v.repeat_interleave(2, 1)).transpose(1, 2))


@pytest.mark.parametrize("keyword", ["s_aux", "sinks"])
def test_sinks_take_a_share_and_stay_unmodulated(keyword):
    q, k, v = qkv()
    sinks = torch.randn(4, dtype=F64, requires_grad=True)
    layer = Layer(False)
    keep = torch.rand(2, 1, 5, 7) < 0.6
    out, weights = attention_forward(layer, q, k, v, keep, **{keyword: sinks})
    scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 8**-0.5
    scores = reference.sigma(scores, layer.multimax.ranges.double(), layer.multimax.ts.double())
    scores = torch.cat([scores.masked_fill(~keep, float("-inf")), sinks.view(1, 4, 1, 1).expand(2, 4, 5, 1)], -1)
    expected = scores.softmax(-1)[..., :-1]
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(out, (expected @ v.repeat_interleave(2, 1)).transpose(1, 2))
    out.sum().backward()
    assert sinks.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"q": torch.ones(2, 3, 4)}, ValueError, r"\[2, 3, 4\]"),
        ({"k": torch.ones(2, 3, 7, 8)}, ValueError, "do not fit"),
        ({"k": torch.ones(2, 3, 7, 8), "v": torch.ones(2, 3, 7, 6)}, ValueError, "multiple"),
        ({"is_causal": True, "k": torch.ones(2, 2, 3, 8), "v": torch.ones(2, 2, 3, 6)}, ValueError, "causal"),
        ({"q": torch.ones(2, 4, 5, 8).long()}, TypeError, "int64"),
        ({"v": torch.ones(2, 2, 7, 6).double()}, TypeError, "float64"),
        ({"bias": torch.ones(3, 7)}, ValueError, "bias"),
        ({"ranges": torch.ones(4, device="meta"), "ts": torch.ones(4, device="meta")}, ValueError, "meta"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p"),
        ({"attn_mask": torch.ones(5, 7).long()}, TypeError, "int64"),
        ({"ranges": torch.ones(3, 4), "ts": torch.ones(3, 4)}, ValueError, "3 heads"),
        ({"ts": torch.ones(2)}, ValueError, r"\[2\]"),
    ],
)
def test_bad_input_is_named(change, error, text):
    q, k, v = qkv(dtype=torch.float32)
    arguments = {"q": q, "k": k, "v": v, "ranges": torch.ones(4), "ts": torch.ones(4), **change}
    with pytest.raises(error, match=text):
        multimax_attention(**arguments)


def test_backends_nest_and_unknown_ones_are_refused():
    before = hf_multimax.attention.choose.current_backend()
    with backend("eager"):
        with backend("auto"):
            assert hf_multimax.attention.choose.current_backend() == "auto"
        assert hf_multimax.attention.choose.current_backend() == "eager"
    with pytest.raises(ValueError, match="nonsense.*eager"), backend("nonsense"):
        pass
    assert hf_multimax.attention.choose.current_backend() == before
