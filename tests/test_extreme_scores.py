"""Scores of any size in every implementation of MultiMax: zero slopes are SoftMax, and nothing breaks in silence."""

import math
from functools import partial

import extreme_scores
import pytest
import torch
from extreme_scores import FLOAT, ORDERS, Call, attention_weights
from torch.nn.functional import cross_entropy

from hf_multimax import backend, modulate, multimax, multimax_attention, multimax_linear_cross_entropy
from hf_multimax.attention.native import backend as native

HUGE = (1e4, -1e4, 1e20, -1e20, -1e30, 1e37, -1e37)


def weights(call: Call) -> torch.Tensor:
    return multimax(call.scores, call.ranges, call.ts, mask=call.keep, affine=call.affine)


def attention(*tensors: torch.Tensor, mask: torch.Tensor, **options) -> torch.Tensor:
    return multimax_attention(*tensors, attn_mask=mask, **options)


@pytest.mark.parametrize("block", range(4))
@pytest.mark.parametrize("name", ["function", "eager", "tiled", "native"])
def test_random_calls_of_any_size(name, block):
    if name == "native" and not native.available():
        pytest.skip("no native kernels here")
    with backend("auto" if name == "function" else name):
        for seed in range(100 * block, 100 * block + 100):
            try:
                extreme_scores.check(weights if name == "function" else partial(attention_weights, attention), seed)
            except AssertionError as error:
                raise AssertionError(f"seed {seed}: {error}") from error


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["eager", "tiled", "native"])
def test_random_calls_in_half_precision(name, dtype):
    if name == "native" and not native.available():
        pytest.skip("no native kernels here")
    with backend(name):
        for seed in range(400, 480):
            extreme_scores.check(partial(attention_weights, attention, dtype=dtype), seed, 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("huge", HUGE)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_without_slopes_it_is_softmax(huge, order, per_head, dtype):
    x = torch.tensor([[[1.0, 2.0, huge], [huge, huge, huge], [-1.0, -math.inf, 0.5]]], dtype=dtype, requires_grad=True)
    zeros = [torch.zeros((1, 2 * order) if per_head else 2 * order, requires_grad=True) for _ in range(2)]
    p = multimax(x, *zeros)
    assert torch.equal(p, x.softmax(-1))
    grads = torch.autograd.grad(p.square().sum(), (x, *zeros))
    assert all(grad.isfinite().all() for grad in grads)
    (grad,) = torch.autograd.grad(x.softmax(-1).square().sum(), x)
    torch.testing.assert_close(grads[0], grad, rtol=0, atol=1e-3 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("name", ["eager", "tiled", "native"])
@pytest.mark.parametrize("order", ORDERS)
def test_a_bias_instead_of_a_mask(name, order):
    """Columns of -1e30 before sigma: ignored without slopes, and with the last of them negative."""
    if name == "native" and not native.available():
        pytest.skip("no native kernels here")
    q, k, v = (torch.randn(1, 2, n, 8, requires_grad=True) for n in (5, 9, 9))
    hidden = torch.arange(9) >= 6
    bias = torch.zeros(1, 1, 5, 9).masked_fill(hidden, -1e30).requires_grad_()
    ranges, ts = (torch.zeros(2 * order, requires_grad=True) for _ in range(2))
    for last in (0.0, -0.5):
        with torch.no_grad():
            ts[-2] = last
        inputs = (q, k, v, ranges, ts, bias)
        with backend(name):
            out = multimax_attention(*inputs[:5], bias=bias)
            grads = torch.autograd.grad(out.square().sum(), inputs)
        with backend("eager"):
            expected = multimax_attention(*inputs[:5], attn_mask=~hidden)
            references = torch.autograd.grad(expected.square().sum(), inputs[:5])
        torch.testing.assert_close(out, expected)
        for grad, reference in zip(grads, references):
            torch.testing.assert_close(grad, reference, rtol=1e-4, atol=1e-5)
        assert not grads[5][..., 6:].any()


@pytest.mark.parametrize("order", [2, 3, 16])
def test_what_overflows_has_no_weight_or_shows(order):
    ts = torch.zeros(2 * order)
    ts[-2] = -0.1
    x = torch.tensor([1.0, 2.0, -1e20])
    assert modulate(x, torch.zeros(2 * order), ts)[2] == -math.inf
    torch.testing.assert_close(multimax(x, torch.zeros(2 * order), ts), torch.tensor([1.0, 2.0, -math.inf]).softmax(-1))
    assert not multimax(x[2:], torch.zeros(2 * order), ts).any()  # nothing is left
    assert multimax(x, torch.zeros(2 * order), -ts).isnan().all()


def test_infinite_and_lowest_scores_pass_no_gradient():
    x = torch.tensor([0.0, -math.inf, FLOAT.min, math.inf], requires_grad=True)
    ts = torch.ones(4, requires_grad=True)
    out = modulate(x, torch.zeros(4), ts)
    assert torch.equal(out[1:], x[1:])
    grads = torch.autograd.grad(out, (x, ts), torch.ones(4))
    assert not grads[0][1:].any() and grads[1].isfinite().all()


@pytest.mark.parametrize("name", ["eager", "tiled", "native"])
def test_rows_of_the_lowest_score_are_empty_rows(name):
    if name == "native" and not native.available():
        pytest.skip("no native kernels here")
    q, k, v = (torch.randn(1, 2, 3, 8) for _ in range(3))
    bias = torch.zeros(3, 3)
    bias[1] = FLOAT.min
    with backend(name):
        out = multimax_attention(q, k, v, torch.randn(4), torch.randn(4), bias=bias)
    assert not out[:, :, 1].any() and out[:, :, 0].abs().min() > 0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("huge", [x for x in HUGE if abs(x) < 1e37])  # beyond, PyTorch's own sum is infinite
def test_the_output_loss_without_slopes_is_that_of_softmax(huge, order, smoothing):
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    bias = torch.zeros(9)
    bias[3] = huge
    bias.requires_grad_()
    labels = torch.tensor([0, 1, 2, 4, 5, 6]) if huge < 0 and not smoothing else torch.full((6,), 3)
    ranges, ts = (torch.zeros(2 * order, requires_grad=True) for _ in range(2))
    inputs = (hidden, weight, bias)
    loss = multimax_linear_cross_entropy(
        hidden, weight, labels, ranges, ts, bias=bias, label_smoothing=smoothing, reduction="sum"
    )
    plain = cross_entropy(hidden @ weight.T + bias, labels, label_smoothing=smoothing, reduction="sum")
    torch.testing.assert_close(loss, plain)
    grads = torch.autograd.grad(loss, (*inputs, ranges, ts))
    assert all(grad.isfinite().all() for grad in grads)
    for grad, reference in zip(grads, torch.autograd.grad(plain, inputs)):
        torch.testing.assert_close(grad, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("last", [0.5, -0.5])
def test_overflow_in_the_output_loss(order, last):
    hidden, weight, labels = torch.randn(6, 4), torch.randn(9, 4), torch.arange(6)
    bias, ts = torch.zeros(9), torch.zeros(2 * order, requires_grad=True)
    bias[8] = -1e30
    with torch.no_grad():
        ts[-2] = last
    loss = multimax_linear_cross_entropy(hidden, weight, labels, torch.zeros(2 * order), ts, bias=bias)
    if last > 0:
        assert loss.isnan()
        return
    expected = multimax_linear_cross_entropy(hidden, weight[:8], labels, torch.zeros(2 * order), ts, bias=bias[:8])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, ts)[0] for x in (loss, expected)))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_half_precision_keeps_gradients_that_only_their_sum_overflows(reduction):
    """Of float16: a sum's gradient may be beyond 65504 where that of the mean, or of a scaled loss, is not."""
    tokens = 64
    hidden = torch.randn(tokens, 8).half().requires_grad_()
    weight = (torch.randn(50, 8) * 1e4).half().requires_grad_()
    with torch.no_grad():
        hidden *= 1e-3
        weight[7] = 60000.0
        weight[:7] = -60000.0
    labels = torch.full((tokens,), 7)
    loss = multimax_linear_cross_entropy(hidden, weight, labels, None, None, reduction=reduction)
    total = (loss / tokens).sum() if reduction != "mean" else loss
    grads = torch.autograd.grad(total, (hidden, weight))
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    references = torch.autograd.grad(cross_entropy(exact[0] @ exact[1].T, labels), exact)
    assert references[0].abs().max() * tokens > 65504
    for grad, reference in zip(grads, references):
        assert grad.dtype == torch.float16
        torch.testing.assert_close(grad.double(), reference, rtol=2e-3, atol=1e-3 * reference.abs().max().item())
