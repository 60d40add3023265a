"""The compiled CPU backend: accuracy of every feature, odd inputs, threads, building, operator registration."""

import ctypes
import platform
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from hf_multimax.attention.native import backend as native
from hf_multimax.attention.native import packed
from hf_multimax.extension import build as native_build
from hf_multimax.extension import library as native_library
from tests.attention_cases import CASES, Case, check, reference, run, through

native_attention = through(native)

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no native backend here: {native.reason()}")

NAN, INFINITY = float("nan"), float("inf")


def _call(case: Case, **more):
    tensors, options = case.build()
    return tensors, {**options, **more}, torch.randn(*tensors["q"].shape[:3], case.dims[1])


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_float32_agrees_with_float64(case):
    check(native_attention, case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["plain", "cache", "odd dims", "bias gqa mask", "all", "decode", "large scores"])
def test_half_precision_is_no_worse_than_eager(name, dtype):
    check(native_attention, next(c for c in CASES if c.name == name), dtype)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", ["1000", "decode", "all", "bias per batch"])
def test_any_number_of_threads(name, threads):
    torch.set_num_threads(threads)
    check(native_attention, next(c for c in CASES if c.name == name))


def test_results_do_not_change_from_run_to_run():
    tensors, options, grad = _call(Case("", (2, 4, 2, 300, 300)), causal=True)
    first, second = (run(native_attention, tensors, options, grad) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_python_and_cpp_agree_on_the_arguments():
    library, _ = native_library.load()
    library.multimax_arguments_size.restype = library.multimax_max_order.restype = ctypes.c_int64
    assert library.multimax_arguments_size() == packed.PACKED.size
    assert library.multimax_max_order() == native.MAX_ORDER


@pytest.mark.parametrize(("rows", "keys"), [(0, 3), (3, 0), (0, 0)])
def test_no_queries_or_no_keys(rows, keys):
    tensors, options, grad = _call(Case("", (2, 4, 2, rows, keys), bias=(1, 4, rows, keys)))
    found = run(native_attention, tensors, options, grad)
    assert all(found[name].shape == tensors[name].shape and not found[name].any() for name in tensors)
    assert found["out"].shape == (2, 4, rows, 16) and not found["out"].any()


def test_any_strides():
    """The layouts that models use: heads behind the sequence, one fused tensor, a broadcast batch."""
    fused = torch.randn(2, 33, 3, 4, 16)
    q, k, v = fused.permute(2, 0, 3, 1, 4)
    k = k[:1].expand_as(k)
    ranges, ts = torch.randn(4), torch.rand(4)
    for view in (lambda x: x, lambda x: x.mT.contiguous().mT, lambda x: x[..., ::2]):
        arguments = tuple(map(view, (q, k, v)))
        expected = native_attention(*(x.contiguous() for x in arguments), ranges, ts)
        assert torch.equal(native_attention(*arguments, ranges, ts), expected)


def test_fully_masked_rows_are_zero_with_zero_gradients():
    tensors, options, grad = _call(Case(""), mask=torch.zeros(2, 1, 33, 33, dtype=torch.bool))
    assert all((x == 0).all() for x in run(native_attention, tensors, options, grad).values())


@pytest.mark.parametrize("value", [NAN, INFINITY])
@pytest.mark.parametrize("rows", [1, 33])
def test_bad_scores_stay_in_their_row(rows, value):
    tensors, options, _ = _call(Case("", (1, 2, 2, rows, 600), bias=(1, 2, rows, 600)))
    tensors["bias"][0, 0, 0, 5] = value
    bias = tensors.pop("bias")
    out = native_attention(*tensors.values(), bias=bias)
    assert out[0, 0, 0].isnan().all()
    assert out.flatten(0, 2)[1:].isfinite().all()
    options["mask"] = torch.ones(rows, 600, dtype=torch.bool)
    options["mask"][0, 5] = False  # a masked entry does not count, whatever it holds
    assert native_attention(*tensors.values(), bias=bias, **options).isfinite().all()


def test_a_row_of_nan_alone_is_not_an_empty_row():
    tensors, options, _ = _call(Case("", (1, 1, 1, 2, 3)))
    tensors["q"][0, 0, 1] = NAN
    out = native_attention(*tensors.values())
    assert out[0, 0, 0].isfinite().all() and out[0, 0, 1].isnan().all()


def test_minus_infinite_scores_are_masked_entries():
    tensors, options, grad = _call(Case("", bias=(1, 2, 33, 33)))
    keep = torch.rand(1, 2, 33, 33) > 0.4
    keep[..., 3, :] = False
    tensors["bias"] = tensors["bias"].masked_fill(~keep, -INFINITY)
    infinite = run(native_attention, tensors, {}, grad)
    tensors["bias"] = tensors["bias"].masked_fill(~keep, 0.0)
    masked = run(native_attention, tensors, {"mask": keep}, grad)
    for name in infinite:
        torch.testing.assert_close(infinite[name], masked[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 4, 2, 40, 90), (1, 2, 1, 1, 2000)])
def test_dropout_is_the_same_in_backward_and_fair(shape):
    case = Case("", shape, (16, shape[4]), per_head=True)
    tensors, options, grad = _call(case)
    tensors["v"] = torch.eye(shape[4]).expand_as(tensors["v"]).clone()  # the output shows the dropped weights
    torch.manual_seed(7)
    actual = run(native_attention, tensors, {"dropout_p": 0.3}, grad)
    weights = native_attention(*tensors.values())
    factors = torch.where(actual["out"] != 0, 1 / 0.7, 0.0)
    assert abs((factors == 0).float().mean() - 0.3) < 0.03
    torch.testing.assert_close(actual["out"], weights * factors)
    expected = run(reference, {n: x.double() for n, x in tensors.items()}, {"dropout": factors.double()}, grad.double())
    for name in actual:
        torch.testing.assert_close(actual[name].double(), expected[name], rtol=1e-4, atol=1e-4)
    torch.manual_seed(7)
    torch.set_num_threads(1)
    again = run(native_attention, tensors, {"dropout_p": 0.3}, grad)["out"]
    assert torch.equal(again != 0, actual["out"] != 0)


def test_operators_are_registered_fully():
    tensors, options, _ = _call(Case("", (1, 4, 2, 9, 12), per_head=True))
    q, k, v, ranges, ts = (x.requires_grad_() for x in tensors.values())
    bias, sinks = (torch.randn(shape, requires_grad=True) for shape in ((1, 4, 9, 12), (4,)))
    mask, none = torch.rand(9, 12) > 0.2, None
    numbers = (0.1, True, 5, 0.25, 3.0)
    call = (q, k, v, ranges, ts, mask, bias, none, none, sinks, torch.tensor([3]), *numbers)
    torch.library.opcheck(torch.ops.hf_multimax.native_attention_training, call)
    detached = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in call)
    torch.library.opcheck(torch.ops.hf_multimax.native_attention, detached)


@pytest.mark.slow
def test_compiles_without_graph_breaks():
    tensors, options, grad = _call(Case("", (1, 2, 1, 20, 20), affine=True, bias=(1, 2, 20, 20)), causal=True)
    compiled = torch.compile(native_attention, fullgraph=True, backend="aot_eager")
    expected, actual = (run(f, tensors, options, grad) for f in (native_attention, compiled))
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    dropped = compiled(*(tensors[name] for name in ("q", "k", "v", "ranges", "ts")), dropout_p=0.5)
    assert dropped.isfinite().all()


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"mask": torch.zeros(5, 5, requires_grad=True)}, "gradient for the mask"),
        ({"bias": torch.zeros(5, 1, requires_grad=True)}, "broadcast over the keys"),
    ],
)
def test_what_is_missing_is_named(change, phrase):
    dtype = change.pop("dtype", torch.float32)
    q = torch.randn(1, 1, 5, 8, dtype=dtype)
    with pytest.raises(ValueError, match=phrase):
        native_attention(q, q, q, torch.zeros(4), torch.zeros(4), **change)


def test_scalar_scale_and_shift_per_head():
    tensors, options, grad = _call(Case("", (2, 4, 2, 20, 20), affine=True))
    tensors["affine_shift"] = torch.randn(4)
    actual, plain = (run(f, tensors, options, grad) for f in (native_attention, reference))
    for name in tensors:
        torch.testing.assert_close(actual[name], plain[name], rtol=1e-4, atol=1e-4)


def test_threads_of_the_caller_do_not_disturb_each_other():
    case = next(c for c in CASES if c.name == "all")
    tensors, options, grad = _call(case)
    expected = run(native_attention, tensors, options, grad)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: run(native_attention, tensors, options, grad), range(8)))
    for actual in results:
        for name, value in actual.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="compiles for an x86-64 processor without AVX")
def test_narrow_vectors_compute_the_same(tmp_path, monkeypatch):
    path, flags = tmp_path / "narrow.so", (*native_build.COMPILE_FLAGS, "-march=x86-64")
    compiler = native_build.compilers()[0]
    path.write_bytes(native_build.compile_library(compiler, native_build.openmp_runtime(), flags))
    library = native_library.open_library(path)
    monkeypatch.setattr(packed, "load", lambda: (library, ""))
    for case in CASES:
        check(native_attention, case)


def test_operators_are_dispatched_only_where_something_watches():
    q, ranges, ts = torch.randn(1, 2, 8, 16), torch.zeros(4), torch.ones(4)
    traced = make_fx(lambda q, k, v, ranges, ts: native_attention(q, k, v, ranges, ts))(q, q, q, ranges, ts)
    assert "hf_multimax.native_attention" in traced.code
    assert torch.equal(traced(q, q, q, ranges, ts), native_attention(q, q, q, ranges, ts))
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in (q, ranges, ts)]
    assert native_attention(fake[0], fake[0], fake[0], *fake[1:]).shape == q.shape


@pytest.mark.parametrize("wanted", [("ts",), ("q",), ("v", "ranges"), ("k", "bias")])
def test_a_gradient_is_the_same_whichever_others_are_wanted(wanted):
    tensors, options, grad = _call(Case("", (2, 4, 2, 40, 90), bias=(1, 4, 40, 90)), causal=True)
    whole = run(native_attention, tensors, options, grad)
    leaves = {name: x.detach().clone().requires_grad_(name in wanted) for name, x in tensors.items()}
    bias = leaves.pop("bias")
    native_attention(*leaves.values(), bias=bias, **options).backward(grad)
    for name, leaf in {**leaves, "bias": bias}.items():
        assert (leaf.grad is not None) == (name in wanted), name
        assert leaf.grad is None or torch.equal(leaf.grad, whole[name]), name


def test_dispatched_or_not_gradients_are_the_same(monkeypatch):
    tensors, options, grad = _call(Case("", (2, 4, 2, 17, 40), affine=True, sinks=True), causal=True)
    direct = run(native_attention, tensors, options, grad)
    monkeypatch.setattr(native, "unseen", lambda *_: False)
    dispatched = run(native_attention, tensors, options, grad)
    assert all(torch.equal(direct[name], dispatched[name]) for name in direct)
