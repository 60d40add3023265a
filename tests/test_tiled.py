"""The PyTorch backend: accuracy of every feature, any row function, tiles of every shape, memory and registration."""

import pytest
import torch

from hf_multimax.attention.call import make_call
from hf_multimax.attention.tiled import backend as tiled
from hf_multimax.attention.tiled import tiles
from hf_multimax.functional import masked_softmax
from hf_multimax.rows.function import Rowwise
from tests.attention_cases import CASES, Case, check, reference, run, through

tiled_attention = through(tiled)

NAN, INFINITY = float("nan"), float("inf")


def _call(case: Case, dtype=torch.float32, **more):
    tensors, options = case.build(dtype)
    return tensors, {**options, **more}, torch.randn(*tensors["q"].shape[:3], case.dims[1], dtype=dtype)


@pytest.mark.parametrize("case", [*CASES, Case("mask gradient", mask="additive_grad")], ids=lambda c: c.name)
def test_float32_agrees_with_float64(case):
    check(tiled_attention, case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["plain", "all", "decode"])
def test_half_precision_is_no_worse_than_eager(name, dtype):
    check(tiled_attention, next(c for c in CASES if c.name == name), dtype)


@pytest.mark.parametrize("name", ["all", "gqa per head", "window two-sided", "bias per key"])
@pytest.mark.parametrize("elements", [1, 3000, 20000])
def test_tiles_of_any_size_in_float64(name, elements, monkeypatch):
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", elements)
    monkeypatch.setattr(tiles, "CAUSAL_ROWS", 24)
    tensors, options, grad = _call(next(c for c in CASES if c.name == name), torch.float64)
    tensors = {key: x.double() for key, x in tensors.items()}
    actual, expected = (run(f, tensors, options, grad) for f in (tiled_attention, reference))
    for key in expected:
        torch.testing.assert_close(actual[key], expected[key], rtol=1e-9, atol=1e-9)


def test_gradients_pass_gradcheck():
    tensors, options, _ = _call(Case("", (1, 2, 1, 3, 5), (4, 3)), causal=True, softcap=2.0)
    leaves = [x.double().requires_grad_() for x in tensors.values()]
    assert torch.autograd.gradcheck(lambda *x: tiled_attention(*x, **options), leaves)


def test_fully_masked_rows_are_zero_with_zero_gradients():
    tensors, options, grad = _call(Case(""), mask=torch.zeros(2, 1, 33, 33, dtype=torch.bool))
    assert all((x == 0).all() for x in run(tiled_attention, tensors, options, grad).values())


@pytest.mark.parametrize("value", [NAN, INFINITY])
def test_bad_scores_stay_in_their_row(value):
    tensors, options, _ = _call(Case("", (1, 2, 2, 33, 60), bias=(1, 2, 33, 60)))
    tensors["bias"][0, 0, 0, 5] = value
    bias = tensors.pop("bias")
    out = tiled_attention(*tensors.values(), bias=bias)
    assert out[0, 0, 0].isnan().all()
    assert out.flatten(0, 2)[1:].isfinite().all()
    mask = torch.ones(33, 60, dtype=torch.bool)
    mask[0, 5] = False  # a masked entry does not count, whatever it holds
    assert tiled_attention(*tensors.values(), bias=bias, mask=mask).isfinite().all()


def test_infinite_queries_make_masked_or_bad_scores():
    tensors, _, _ = _call(Case("", (1, 1, 1, 4, 6)))
    tensors["q"][0, 0, 2, 0] = INFINITY
    out, expected = (f(*tensors.values()) for f in (tiled_attention, reference))
    assert torch.equal(out.isnan(), expected.isnan()) and out[0, 0, [0, 1, 3]].isfinite().all()


def test_dropout_is_the_same_in_backward_and_fair(monkeypatch):
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 2000)
    case = Case("", (2, 4, 2, 40, 90), (16, 90), per_head=True)
    tensors, options, grad = _call(case)
    tensors["v"] = torch.eye(90).expand_as(tensors["v"]).clone()  # the output shows the dropped weights
    actual = run(tiled_attention, tensors, {"dropout_p": 0.3}, grad)
    factors = torch.where(actual["out"] != 0, 1 / 0.7, 0.0)
    assert abs((factors == 0).float().mean() - 0.3) < 0.02
    expected = run(reference, {n: x.double() for n, x in tensors.items()}, {"dropout": factors.double()}, grad.double())
    for name in actual:
        torch.testing.assert_close(actual[name].double(), expected[name], rtol=1e-4, atol=1e-4)


def _rows(function, *parameters):
    return Rowwise(function.__name__, lambda: (function, parameters))


def _softmax(scores, keep):
    return scores.softmax(-1)


def _temperature(scores, keep, temperature):
    return masked_softmax(scores * temperature[:, None, None], -1, None if keep is None else keep.expand_as(scores))


@pytest.mark.parametrize("mask", [None, "boolean", "additive_grad"])
def test_any_row_function_runs_through_the_tiles(mask, monkeypatch):
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 3000)
    tensors, options, grad = _call(Case("", (2, 4, 2, 50, 70), mask=mask, bias=(1, 4, 50, 70)), causal=True)
    tensors = {name: x.double() for name, x in tensors.items() if name not in ("ranges", "ts")}
    tensors["temperature"] = torch.rand(4, dtype=torch.float64) + 0.5

    def through_tiles(q, k, v, bias, temperature, **more):
        return tiled.rowwise_attention(
            _rows(_temperature, temperature), make_call(q, k, v, None, None, bias=bias, **more)
        )

    def whole(q, k, v, bias, temperature, mask=None, **more):
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        keep, x = torch.ones(50, 70, dtype=torch.bool).tril(20), q @ k.mT / 4 + bias
        if mask is not None:
            kept = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            keep, x = keep & kept, x if mask.dtype == torch.bool else x + mask.masked_fill(~kept, 0.0)
        return _temperature(x, keep, temperature) @ v

    if mask == "additive_grad":
        tensors["mask"] = tensors["mask"].masked_fill(tensors["mask"] < -1e30, torch.finfo(torch.float64).min)
    leaves = [[x.detach().clone().requires_grad_() for x in tensors.values()] for _ in range(2)]
    outs = [f(**dict(zip(tensors, own)), **options) for f, own in zip((through_tiles, whole), leaves)]
    grads = [torch.autograd.grad(out, own, grad.double()) for out, own in zip(outs, leaves)]
    torch.testing.assert_close(outs[0], outs[1])
    for name, actual, expected in zip(tensors, *grads):
        torch.testing.assert_close(actual, expected, msg=lambda text, name=name: f"{name}: {text}")


def test_row_function_without_gradients_and_with_dropout():
    q = torch.randn(1, 2, 5, 4)
    out = tiled.rowwise_attention(_rows(_softmax), make_call(q, q, q, None, None))
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, q, q))
    q.requires_grad_()
    tiled.rowwise_attention(_rows(_softmax), make_call(q, q, q, None, None, dropout_p=0.5)).sum().backward()
    assert q.grad.isfinite().all()


def test_operators_are_registered_fully():
    tensors, options, _ = _call(Case("", (1, 4, 2, 9, 12), per_head=True))
    leaves = [x.requires_grad_() for x in tensors.values()]
    bias, sinks = (torch.randn(shape, requires_grad=True) for shape in ((1, 4, 9, 12), (4,)))
    affine = torch.ones((), requires_grad=True), torch.zeros(4, requires_grad=True)
    numbers = (0.1, True, 5, 0.25, 3.0)
    call = (*leaves, torch.rand(9, 12) > 0.2, bias, *affine, sinks, torch.tensor([3]), *numbers)
    torch.library.opcheck(torch.ops.hf_multimax.tiled_attention, call)


@pytest.mark.parametrize(
    ("change", "error", "phrase"),
    [
        ({"ts": torch.zeros(6)}, ValueError, "ranges and ts"),
        ({"ranges": torch.zeros(3, 4), "ts": torch.zeros(3, 4)}, ValueError, "3 heads"),
        ({"mask": torch.zeros(5, 4)}, ValueError, "mask of shape"),
        ({"mask": torch.zeros(5, 5, dtype=torch.int64)}, TypeError, "mask must be"),
        ({"bias": torch.zeros(5, 5, dtype=torch.bool)}, TypeError, "bias must be"),
        ({"q": torch.zeros(1, 2, 6, 8), "causal": True}, ValueError, "6 queries, 5 keys"),
        ({"q": torch.zeros(2, 5, 8)}, ValueError, "q must be"),
        ({"q": torch.zeros(1, 2, 5, 8, dtype=torch.float64)}, TypeError, "share one floating type"),
        ({"q": torch.zeros(1, 3, 5, 8)}, ValueError, "multiple of Hkv"),
        ({"window": 0}, ValueError, "window"),
        ({"window": "3"}, TypeError, "window must be an integer or None, got '3'"),
        ({"window": 2.5}, TypeError, "window must be an integer or None, got 2.5"),
        ({"window": True}, TypeError, "window must be an integer or None, got True"),
        ({"softcap": "30"}, TypeError, "softcap must be a number or None, got '30'"),
        ({"dropout_p": "0.1"}, TypeError, "dropout_p must be a number"),
        ({"scale": "1"}, TypeError, "scale must be a number"),
        ({"affine": torch.ones(())}, TypeError, "affine must be a pair"),
        ({"affine": (torch.ones(()),) * 3}, TypeError, "affine must be a pair"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p"),
        ({"softcap": 0.0}, ValueError, "softcap"),
        ({"sinks": torch.zeros(3)}, ValueError, "sinks"),
        ({"affine": (torch.ones(3), torch.zeros(()))}, ValueError, "affine scale"),
        ({"affine": (1.0, 0.0)}, TypeError, "affine scale must be a tensor"),
        ({"q": torch.zeros(1, 2, 5, 0), "k": torch.zeros(1, 2, 5, 0)}, ValueError, "head dimension"),
    ],
)
def test_mistakes_are_named(change, error, phrase):
    arguments = {name: torch.zeros(1, 2, 5, 8) for name in "qkv"}
    arguments.update(ranges=torch.zeros(4), ts=torch.zeros(4))
    with pytest.raises(error, match=phrase):
        tiled_attention(**{**arguments, **change})


@pytest.mark.parametrize("per_head", [False, True])
def test_terms_that_vanish_still_have_gradients(per_head):
    tensors, options, grad = _call(Case("", (2, 4, 2, 40, 90), per_head=per_head), torch.float64, causal=True)
    tensors = {key: x.double() for key, x in tensors.items()}
    tensors["ts"] = tensors["ts"].clone().zero_()
    actual, expected = (run(f, tensors, options, grad) for f in (tiled_attention, reference))
    for key in expected:
        torch.testing.assert_close(actual[key], expected[key], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [1e4, 1e12])
def test_large_scores_are_masked_too(size):
    tensors, _, _ = _call(Case("", (1, 2, 2, 33, 60)), torch.float64)
    tensors = {key: x.double() for key, x in tensors.items()}
    tensors["q"] *= size
    mask = torch.rand(33, 60) > 0.5
    mask[3] = False
    out, expected = (f(*tensors.values(), mask=mask, causal=True) for f in (tiled_attention, reference))
    torch.testing.assert_close(out, expected)
    assert (out[:, :, 3] == 0).all()
