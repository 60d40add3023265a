"""sigma and MultiMax against their definition, in value and gradient."""

import pytest
import reference
import torch
from torch.autograd import gradcheck

from hf_multimax import modulate, multimax

F64 = torch.float64


def parameters(order: int, heads: int | None = None, dtype=F64, scale: float = 1.0):
    shape = (2 * order,) if heads is None else (heads, 2 * order)
    return [torch.randn(shape, dtype=dtype).mul(scale).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize("affine", [False, True])
def test_sigma_is_its_definition(order, heads, affine):
    x = torch.randn(2, 3, 4, 5, dtype=F64)
    ranges, ts = parameters(order, heads)
    pair = (torch.tensor(1.3, dtype=F64), torch.tensor([0.1, -0.2, 0.3], dtype=F64)) if affine else None
    torch.testing.assert_close(
        modulate(x, ranges, ts, pair), reference.sigma(x, ranges, ts, pair), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("heads", [None, 3])
def test_gradients_are_exact(order, heads):
    x = torch.randn(2, 3, 4, 5, dtype=F64, requires_grad=True)
    keep = torch.rand(2, 1, 4, 5) < 0.7
    keep[0, 0, 0] = False
    inputs = (x, *parameters(order, heads))
    assert gradcheck(modulate, inputs)
    assert gradcheck(lambda *args: multimax(*args, mask=keep), inputs)


def test_affine_gradients_are_exact():
    x = torch.randn(2, 3, 4, 5, dtype=F64, requires_grad=True)
    pair = [torch.tensor(1.2, dtype=F64, requires_grad=True), torch.randn(3, dtype=F64, requires_grad=True)]
    assert gradcheck(lambda x, r, t, a, b: multimax(x, r, t, affine=(a, b)), (x, *parameters(1), *pair))


def test_the_gradient_at_a_threshold_is_zero():
    x = torch.zeros(1, dtype=F64, requires_grad=True)
    ranges, ts = torch.zeros(2, dtype=F64, requires_grad=True), torch.ones(2, dtype=F64, requires_grad=True)
    modulate(x, ranges, ts).sum().backward()
    assert x.grad == 1.0
    assert ranges.grad.eq(0).all()
    assert ts.grad.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_zero_slopes_are_softmax_bit_for_bit(dtype):
    x = (3 * torch.randn(4, 7)).to(dtype)
    ranges, ts = torch.randn(4), torch.zeros(4)
    assert torch.equal(modulate(x, ranges, ts), x)
    expected = x.softmax(-1) if dtype.itemsize > 2 else x.float().softmax(-1).to(dtype)
    assert torch.equal(multimax(x, ranges, ts), expected)
    ts[1] = 1e-30  # the least that is no identity any more, by another path
    torch.testing.assert_close(multimax(x, ranges, ts), expected, rtol=torch.finfo(dtype).eps * 4, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    x = (10 * torch.randn(4, 7)).to(dtype)
    ranges, ts = torch.randn(4), torch.randn(4)
    for function in (modulate, multimax):
        assert torch.equal(function(x, ranges, ts), function(x.float(), ranges, ts).to(dtype))


@pytest.mark.parametrize("masked", ["boolean", "minus infinity"])
def test_a_masked_entry_is_a_removed_entry(masked):
    x = torch.randn(5, 9, dtype=F64)
    ranges, ts = (p.detach() for p in parameters(2, scale=3.0))
    keep = torch.rand(5, 9) < 0.6
    keep[3] = False
    if masked == "boolean":
        out = multimax(x, ranges, ts, mask=keep)
    else:
        out = multimax(x.masked_fill(~keep, float("-inf")), ranges, ts)
    assert out[~keep].eq(0).all()
    for row, kept, result in zip(x, keep, out):
        if kept.any():
            torch.testing.assert_close(result[kept], multimax(row[kept], ranges, ts), rtol=1e-12, atol=1e-15)
    assert out[3].eq(0).all()


def test_masked_entries_and_rows_get_no_gradient():
    x = torch.randn(3, 5, requires_grad=True)
    ranges, ts = parameters(2, dtype=torch.float32)
    keep = torch.tensor([[True] * 5, [True, False, True, False, True], [False] * 5])
    scores = torch.where(torch.tensor([1, 0, 1, 1, 1]).bool(), x, float("-inf"))
    multimax(scores, ranges, ts, mask=keep).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in (x, ranges, ts))
    assert x.grad[~keep].eq(0).all()
    assert x.grad[:, 1].eq(0).all()


@pytest.mark.parametrize("lowest", [float("-inf"), torch.finfo(torch.float32).min])
def test_sigma_leaves_masked_scores_alone(lowest):
    x = torch.tensor([0.5, lowest], requires_grad=True)
    ranges, ts = parameters(3, dtype=torch.float32)
    out = modulate(x, ranges, ts)
    out[0].backward()
    assert out[1] == lowest
    assert x.grad.isfinite().all()
    assert ts.grad.isfinite().all()


def test_a_nan_stays_in_its_row():
    x = torch.randn(3, 4)
    x[1, 2] = float("nan")
    out = multimax(x, torch.randn(4), torch.randn(4))
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()


def test_any_dimension():
    x = torch.randn(3, 4, 5, dtype=F64)
    ranges, ts = parameters(2)
    for dim in range(3):
        torch.testing.assert_close(
            multimax(x, ranges, ts, dim=dim), multimax(x.movedim(dim, -1), ranges, ts).movedim(-1, dim)
        )


@pytest.mark.parametrize(
    ("error", "text", "call"),
    [
        (ValueError, r"\[4\] and \[2\]", lambda: modulate(torch.ones(3), torch.ones(4), torch.ones(2))),
        (ValueError, r"\[3\]", lambda: modulate(torch.ones(3), torch.ones(3), torch.ones(3))),
        (ValueError, "2 heads", lambda: modulate(torch.ones(3, 4, 4), torch.ones(2, 4), torch.ones(2, 4))),
        (TypeError, "int64", lambda: modulate(torch.ones(3).long(), torch.ones(4), torch.ones(4))),
        (TypeError, "float32", lambda: multimax(torch.ones(3), torch.ones(4), torch.ones(4), mask=torch.ones(3))),
        (
            ValueError,
            "scale",
            lambda: modulate(torch.ones(3), torch.ones(2), torch.ones(2), (torch.ones(1, 1), torch.ones(()))),
        ),
    ],
)
def test_bad_input_is_named(error, text, call):
    with pytest.raises(error, match=text):
        call()
