"""What the Triton attention must do, as functions that need no test framework: tests/test_triton_attention.py runs them
in Triton's interpreter or on a GPU, ``python -m benchmarks.gpu`` on a GPU, both on PyTorch's default device.
"""

import functools
import importlib.util
import itertools
from collections.abc import Callable
from contextlib import nullcontext
from unittest import mock

import numpy as np
import torch

from hf_multimax.attention.call import make_call
from hf_multimax.attention.eager import eager_attention
from hf_multimax.attention.triton import backend
from hf_multimax.functional import masked_softmax, modulate
from tests import extreme_scores
from tests.attention_cases import Case, check, doubled, reference, run, through
from tests.tolerances import RELATIVE, assert_close, assert_draws_no_worse, assert_none_worse, relative_error

if importlib.util.find_spec("triton") is not None:
    from triton import knobs
    from triton.runtime import interpreter

__all__ = [
    "CASES",
    "CHECKS",
    "HALF_CASES",
    "assert_equal",
    "compiles_as_one_graph",
    "dropout_is_the_same_in_backward",
    "half_precision_is_no_worse_than_eager",
    "repeats_bit_by_bit",
]

Check = Callable[[], None]
attention = through(backend)

CAUSAL = {"causal": True}
CASES = [
    Case("gqa causal per head", (1, 4, 2, 21, 37), per_head=True, options=CAUSAL),
    Case("order 1 affine", (1, 1, 1, 17, 17), order=1, affine=True),
    Case("order 3", (1, 1, 1, 17, 19), order=3, slope=0.3),
    Case("129 causal", (1, 1, 1, 65, 129), options=CAUSAL),
    Case("one key", (1, 2, 2, 1, 1), options=CAUSAL),
    Case("decode 129", (1, 2, 1, 1, 129), per_head=True, sinks=True),
    Case("few queries", (1, 4, 2, 3, 70), mask="padding", bias=(1, 4, 3, 70), options=CAUSAL),
    Case("odd dims", (1, 1, 1, 19, 35), (7, 13)),
    Case("wide", (1, 1, 1, 17, 17), (80, 136)),
    Case("boolean causal", (2, 1, 1, 17, 40), mask="boolean", options=CAUSAL),
    Case("padding", (2, 2, 1, 17, 33), mask="padding", bias=(33,)),
    Case("additive half", (2, 1, 1, 17, 17), mask="half"),
    Case("bias over batch", (2, 2, 2, 17, 17), bias=(1, 2, 17, 17), mask="additive"),
    Case("bias per query", (2, 2, 2, 17, 17), bias=(2, 1, 17, 1)),
    Case("sinks boolean", (1, 2, 2, 17, 17), sinks=True, mask="boolean"),
    Case("window", (1, 1, 1, 50, 70), options={"causal": True, "window": 9}),
    Case("window two-sided", (1, 1, 1, 50, 50), options={"window": 20}),
    Case(
        "all", (1, 4, 2, 17, 34), per_head=True, affine=True, sinks=True, mask="additive", bias=(1, 4, 17, 34),
        options={"causal": True, "window": 12, "softcap": 4.0},
    ),
    Case("large scores", (1, 1, 1, 17, 17), spread=20.0),
    Case("steep", (1, 1, 1, 17, 17), spread=20.0, slope=5.0, threshold=100.0),
]  # fmt: skip

_ONE_HEAD = (1, 1, 1, 33, 33)
HALF_CASES = [
    Case("ordinary", _ONE_HEAD),
    Case("large scores", _ONE_HEAD, spread=20.0),
    Case("slopes of 5", _ONE_HEAD, slope=5.0),
    Case("steep", _ONE_HEAD, spread=20.0, slope=5.0),
    Case("few queries", (1, 2, 1, 3, 70), spread=20.0, slope=5.0),
    Case("far thresholds", _ONE_HEAD, spread=20.0, slope=5.0, threshold=100.0),
]


def _exact_dot(self, a, b, accumulator, *options):
    """A product whose sums do not depend on the side an operand is on, as on tensor cores; NumPy's float32 sums do."""
    product = np.matmul(a.data, b.data, dtype=np.float64).astype(np.float32)
    return interpreter.TensorHandle(product + accumulator.data, accumulator.dtype.scalar)


def _as_on_tensor_cores():
    """In the interpreter, products as :func:`_exact_dot` makes them."""
    if not knobs.runtime.interpret:
        return nullcontext()
    return mock.patch.object(interpreter.InterpreterBuilder, "create_dot", _exact_dot)


# --- values and gradients ----------------------------------------------------------------------------------------


def float32_agrees_with_float64(case: Case) -> None:
    check(attention, case, draws=12)


def scores_of_any_size(seed: int) -> None:
    extreme_scores.check(functools.partial(extreme_scores.attention_weights, attention), seed)


def far_thresholds() -> None:
    """Thresholds at 100: sums of terms of 1e4 that cancel, in the plain computation too."""
    tensors, _ = Case("", (1, 1, 1, 33, 33), slope=5.0, threshold=100.0, affine=True).build()
    grad = torch.randn(1, 1, 33, 16)
    actual, plain = (run(f, tensors, {}, grad) for f in (attention, reference))
    assert_none_worse(actual, plain, run(reference, doubled(tensors), {}, grad.double()))


def half_precision(dtype: torch.dtype) -> None:
    """Weights and score gradients are rounded before the products; the interpreter truncates to bfloat16."""
    tensors, options = Case("", (1, 2, 1, 33, 33), sinks=True, options=CAUSAL).build(dtype)
    grad = torch.randn(1, 2, 33, 16).to(dtype)
    actual = run(attention, tensors, options, grad)
    exact = run(reference, doubled(tensors), options, grad.double())
    for name in ("out", "q", "k", "v"):
        assert actual[name].dtype == dtype, name
        assert_close(actual[name], exact[name], 4 * RELATIVE[dtype], name)
    for name in ("ranges", "ts", "sinks"):  # these are not rounded, and the error of delta is taken out
        assert_close(actual[name], exact[name], 1e-4, name)


def half_precision_is_no_worse_than_eager(case: Case, dtype: torch.dtype, draws: int = 8) -> None:
    """Where one weight of a row is nearly 1, its gradient is a difference of equals, magnified by the slope."""

    def eager(q, k, v, ranges, ts):
        call = make_call(q, k, v, ranges, ts)
        return eager_attention(call, lambda scores: modulate(scores, ranges, ts), masked_softmax)[0]

    errors: dict[str, tuple[list[float], list[float]]] = {}
    with _as_on_tensor_cores():
        for _ in range(draws):
            tensors, _ = case.build(dtype)
            grad = torch.randn(*tensors["q"].shape[:3], case.dims[1]).to(dtype)
            exact = run(reference, doubled(tensors), {}, grad.double())
            for i, function in enumerate((attention, eager)):
                for name, found in run(function, tensors, {}, grad).items():
                    errors.setdefault(name, ([], []))[i].append(relative_error(found, exact[name]))
    for name, both in errors.items():
        assert_draws_no_worse(*both, f"{case.name}: {name}")


def thresholds_beyond_any_score_cost_no_digits(
    ranges: tuple[float, ...], sinks: bool, rows: int, dtype: torch.dtype
) -> None:
    """Terms that never act, and linear ones that always act, which leaves a slope and, for sinks, a constant."""
    tensors, _ = Case("", (1, 1, 1, rows, 40), sinks=sinks).build(dtype)
    slope = 1e-6 if sinks else 0.5
    tensors |= {"ranges": torch.tensor(ranges), "ts": torch.tensor([slope, -2 * slope, 0.5, 0.5])}
    grad = torch.randn(1, 1, rows, 16).to(dtype)
    actual = run(attention, tensors, {}, grad)
    exact = run(reference, doubled(tensors), {}, grad.double())
    for name in ("out", "q", "k", "v", *(("sinks",) if sinks else ())):
        assert_close(actual[name], exact[name], 4 * RELATIVE[dtype], name)


def a_parameter_that_is_no_number_shows(name: str, dtype: torch.dtype) -> None:
    q, k, v = torch.randn(3, 1, 1, 17, 16).to(dtype)
    parameters = {"ranges": torch.randn(4), "ts": torch.rand(4)}
    parameters[name][1] = float("nan")
    assert attention(q, k, v, **parameters).isnan().all()


def repeats_bit_by_bit(rows: int = 33, dtype: torch.dtype = torch.float32) -> None:
    tensors, options = Case("", (1, 2, 1, rows, 40 + rows), bias=(1, 2, rows, 40 + rows), options=CAUSAL).build(dtype)
    first, second = (run(attention, tensors, options, torch.ones(1, 2, rows, 16)) for _ in range(2))
    assert_equal(first, second)


def dropout_is_the_same_in_backward(shape: tuple[int, int, int, int, int]) -> None:
    tensors, options = Case("", shape, (16, shape[4])).build()
    eye = {**tensors, "v": torch.eye(shape[4])[None, None]}

    def dropped(*arguments, **more):
        torch.manual_seed(3)
        return attention(*arguments, **more, dropout_p=0.3)

    factors = dropped(*eye.values()) / reference(*eye.values())
    kept = factors > 0.5
    torch.testing.assert_close(factors[kept], torch.full_like(factors[kept], 1 / 0.7), rtol=1e-4, atol=0)
    assert 0.6 < kept.double().mean() < 0.8, f"{kept.double().mean()} of the weights were kept, not 0.7"
    assert not torch.equal(kept[:, 0], kept[:, 1])
    grad = torch.randn(*shape[:2], shape[3], shape[4])
    actual = run(dropped, tensors, options, grad)
    exact = run(reference, doubled(tensors), {"dropout": kept.double() / 0.7}, grad.double())
    for name in actual:
        assert_close(actual[name], exact[name], 1e-5, name)


def nan_stays_in_its_row() -> None:
    tensors, _ = Case("", (1, 1, 1, 35, 20)).build()
    tensors["q"][0, 0, 5] = float("nan")
    found = run(attention, tensors, {}, torch.ones(1, 1, 35, 16))
    for name in ("out", "q"):
        assert found[name][0, 0, 5].isnan().all(), name
        assert found[name].isnan().any(-1).sum() == 1, name


def score_of_minus_infinity_is_masked() -> None:
    tensors, _ = Case("", (1, 1, 1, 17, 18), affine=True, bias=(17, 18)).build()
    hidden = torch.rand(17, 18) < 0.4
    hidden[3] = True
    tensors["bias"][hidden] = float("-inf")
    grad = torch.randn(1, 1, 17, 16)
    actual = run(attention, tensors, {}, grad)
    exact = run(reference, doubled(tensors), {}, grad.double())
    for name in actual:
        assert_close(actual[name], exact[name], 5e-5, name)
    assert not actual["out"][0, 0, 3].any() and not actual["bias"][hidden].any()


# --- layouts -----------------------------------------------------------------------------------------------------


def sinks_of_any_strides() -> None:
    tensors, _ = Case("", (1, 2, 2, 17, 17)).build()
    inputs = [tensor.detach() for tensor in tensors.values()]
    wide = torch.randn(4)
    expected = attention(*inputs, sinks=wide[::2].clone())
    assert torch.equal(attention(*inputs, sinks=wide[::2]), expected)


def any_strides() -> None:
    fused = torch.randn(2, 17, 3, 2, 16)
    q, k, v = fused.permute(2, 0, 3, 1, 4)
    k = k[:1].expand_as(k)
    ranges, ts = torch.randn(2, 4)
    expected = attention(q.contiguous(), k.contiguous(), v.contiguous(), ranges, ts)
    assert torch.equal(attention(q, k, v, ranges, ts), expected)


def gradients_only_where_asked() -> None:
    tensors, _ = Case("", (1, 1, 1, 17, 17)).build()
    full = run(attention, tensors, {}, torch.ones(1, 1, 17, 16))
    for wanted in (("q",), ("ts",), ("k", "ranges")):
        leaves = {name: x.clone().requires_grad_(name in wanted) for name, x in tensors.items()}
        attention(*leaves.values()).sum().backward()
        for name, leaf in leaves.items():
            assert (leaf.grad is not None) == (name in wanted), f"{name} where {wanted} was asked for"
            assert leaf.grad is None or torch.equal(leaf.grad, full[name]), f"{name} where {wanted} was asked for"


def scalars_of_each_head_in_float64() -> None:
    """Their gradients are rounded from one float64 buffer: here they must not share it."""
    tensors, _ = Case("", (1, 2, 2, 17, 17), per_head=True).build()
    doubles = {**tensors, "ranges": tensors["ranges"].double(), "ts": tensors["ts"].double()}
    single, double = (run(attention, x, {}, torch.ones(1, 2, 17, 16)) for x in (tensors, doubles))
    for name in ("ranges", "ts"):
        assert double[name].is_contiguous() and double[name].untyped_storage().nbytes() == 2 * 4 * 8, name
        assert torch.equal(double[name].float(), single[name]), name


def no_keys_and_no_queries() -> None:
    ranges, ts = torch.randn(2, 4)
    for rows, keys in ((3, 0), (0, 3)):
        q = torch.randn(1, 2, rows, 16, requires_grad=True)
        out = attention(q, torch.randn(1, 2, keys, 16), torch.randn(1, 2, keys, 8), ranges, ts)
        out.sum().backward()
        assert out.shape == (1, 2, rows, 8) and not out.any() and not q.grad.any()


# --- what PyTorch asks of an operator ----------------------------------------------------------------------------


def operators() -> None:
    ranges, ts, scale, shift = torch.randn(2, 4), torch.rand(2, 4), torch.ones(2), torch.zeros(2)
    q, k, v = (torch.randn(1, 5, 2, 16).transpose(1, 2) for _ in range(3))
    bias, seed = torch.randn(1, 2, 5, 5), torch.tensor([7])
    tensors = [x.requires_grad_() for x in (q, k, v, ranges, ts, scale, shift)]
    options = (torch.rand(5, 5) > 0.2, bias.requires_grad_(), *tensors[5:], None, seed, 0.1, True, 4, 0.25, 2.0)
    call = (*tensors[:5], *options)
    training = torch.ops.hf_multimax.triton_attention_training.default
    torch.library.opcheck(training, call)
    halves = [x.detach().half().requires_grad_() for x in (q, k, v)]  # with what rounding the output cut off
    torch.library.opcheck(training, (*halves, *call[3:]), test_utils="test_faketensor")
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in call]
    torch.library.opcheck(torch.ops.hf_multimax.triton_attention.default, detached)


def compiles_as_one_graph(compiler: str) -> None:
    """``torch.compile`` by that backend changes nothing."""
    tensors, options = Case("", (1, 2, 1, 17, 17), options=CAUSAL).build()
    compiled = torch.compile(attention, fullgraph=True, backend=compiler)
    grad = torch.randn(1, 2, 17, 16)
    assert_equal(*(run(f, tensors, options, grad) for f in (attention, compiled)))


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """The same tensors bit by bit."""
    differing = [name for name in first if not torch.equal(first[name], second[name])]
    assert not differing, f"{', '.join(differing)} differ"


def _each(function: Callable[..., None], **values: dict[str, object]) -> dict[str, Check]:
    """``function`` with every combination of the named values of its parameters, by name."""
    found: dict[str, Check] = {}
    for combination in itertools.product(*(named.items() for named in values.values())):
        name = ", ".join([function.__name__.replace("_", " "), *(label for label, _ in combination)])
        found[name] = functools.partial(function, **dict(zip(values, (value for _, value in combination))))
    return found


_HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_DROPPED = {"tiles": (1, 2, 1, 33, 40), "decode": (1, 2, 1, 2, 40)}
_THRESHOLDS = {"never": (-1e6, 1e30, -1e3, 1e3), "always": (1e6, -1e6, -1.0, 1.0)}

CHECKS: dict[str, Check] = {
    **_each(float32_agrees_with_float64, case={case.name: case for case in CASES}),
    **_each(scores_of_any_size, seed={f"seed {seed}": seed for seed in (3, 4, 8, 9, 12, 13, 14, 19, 26, 29, 32, 35)}),
    **_each(far_thresholds),
    **_each(half_precision, dtype=_HALF),
    **_each(half_precision_is_no_worse_than_eager, case={case.name: case for case in HALF_CASES}, dtype=_HALF),
    **_each(
        thresholds_beyond_any_score_cost_no_digits,
        ranges=_THRESHOLDS,
        sinks={"no sinks": False, "sinks": True},
        rows={"tiles": 33, "decode": 2},
        dtype=_HALF,
    ),
    **_each(
        a_parameter_that_is_no_number_shows,
        name={"ranges": "ranges", "ts": "ts"},
        dtype={"float32": torch.float32, "float16": torch.float16},
    ),
    **_each(repeats_bit_by_bit),
    **_each(dropout_is_the_same_in_backward, shape=_DROPPED),
    **_each(nan_stays_in_its_row),
    **_each(score_of_minus_infinity_is_masked),
    **_each(sinks_of_any_strides),
    **_each(any_strides),
    **_each(gradients_only_where_asked),
    **_each(scalars_of_each_head_in_float64),
    **_each(no_keys_and_no_queries),
    **_each(operators),
    **_each(compiles_as_one_graph, compiler={"aot_eager": "aot_eager"}),
}
