"""The fused output loss against cross_entropy of modulated logits in float64, written from the formulas."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_multimax.loss import problem as cross_entropy_problem
from hf_multimax.loss.cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_rows,
    linear_cross_entropy_rows_backward,
    multimax_linear_cross_entropy,
)
from tests.cross_entropy_cases import (
    DEVICE_CHECKS,
    KERNEL_CHECKS,
    NAMES,
    TOKENS,
    VOCAB,
    check,
    doubled,
    fused,
    gradients,
    inputs,
    kernel_on_cpu_tensors,
    low_precision_is_no_worse_than_unfused,
    unfused,
)
from tests.tolerances import RELATIVE, assert_no_worse, relative_error


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any tensor of its block had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [
            leaf.untyped_storage().nbytes() // leaf.itemsize for leaf in tree_leaves(out) if isinstance(leaf, Tensor)
        ]
        self.elements = max(self.elements, *sizes, 0)
        return out


# -- values and gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_matches_float64_with_everything(dtype, label_smoothing, reduction):
    check(dtype, label_smoothing=label_smoothing, reduction=reduction, softcap=2.5)


@pytest.mark.parametrize("names", [NAMES[:2], NAMES[:2] + ("bias",), NAMES[:4], NAMES[:5], NAMES[:4] + NAMES[5:]])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_matches_float64_with_some_features(names, reduction):
    check(torch.float32, names, reduction=reduction)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_orders(order):
    check(torch.float64, given=inputs(torch.float64, order=order))


def test_gradcheck():
    p, labels = inputs(torch.float64, tokens=7, vocab=5, width=3)

    def loss(*tensors):
        return fused(dict(zip(NAMES, tensors)), labels, label_smoothing=0.2, softcap=3.0)

    assert torch.autograd.gradcheck(loss, [p[name] for name in NAMES])


@pytest.mark.parametrize("num", [11, torch.tensor(11), torch.tensor([11.0])])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_num_items_in_batch_divides_the_sum(reduction, num):
    p, labels = inputs(torch.float64)
    loss = fused(p, labels, reduction=reduction, num_items_in_batch=num)
    reference = unfused(p, labels, reduction=reduction, num_items_in_batch=11)
    assert relative_error(loss, reference) < 1e-12
    assert relative_error(gradients(loss, p)["ts"], gradients(reference, p)["ts"]) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_low_precision_is_no_worse_than_unfused(dtype, reduction):
    low_precision_is_no_worse_than_unfused(dtype, reduction=reduction)


def test_weight_gradient_is_accumulated_in_float32():
    """One token in bfloat16 many times: sums of bfloat16 would stall at 256 times one token's share."""
    p, _ = inputs(torch.bfloat16, tokens=1, ignored=False)
    copies = 2048
    many = dict(p, hidden=p["hidden"].detach().repeat(copies, 1).requires_grad_())
    labels = torch.full((copies,), 3)
    one = gradients(fused(p, labels[:1], reduction="sum"), p)["weight"]
    all_ = gradients(fused(many, labels, reduction="sum", chunk_size=1), many)["weight"]
    assert relative_error(all_ / copies, one) <= 2 * RELATIVE[torch.bfloat16]


def test_float16_sums_beyond_its_range_survive():
    p, _ = inputs(torch.float16, tokens=4096, ignored=False)
    with torch.no_grad():
        p["hidden"].abs_().add_(20.0)
    labels = torch.full((4096,), 3)
    grads = gradients(fused(p, labels, features=NAMES[:2]), p, NAMES[:2])
    assert all(g.isfinite().all() for g in grads.values())


def test_large_thresholds_lose_no_more_than_unfused():
    p, labels = inputs(tokens=64, vocab=301)
    with torch.no_grad():
        p["ranges"].copy_(torch.tensor([100.0, -100.0, 100.0, -100.0]))
        p["ts"].mul_(1e-2)
    exact = doubled(p)
    losses = fused(p, labels), unfused(p, labels), unfused(exact, labels)
    assert_no_worse(*losses, "loss")
    grads = [gradients(loss, q) for loss, q in zip(losses, (p, p, exact))]
    for name in NAMES:
        assert_no_worse(*(g[name] for g in grads), name)


def test_identity_parameters_give_the_softmax_loss():
    p, labels = inputs(ignored=False)
    zeros = torch.zeros(4, requires_grad=True)
    loss = multimax_linear_cross_entropy(p["hidden"], p["weight"], labels, zeros, zeros)
    softmax = F.cross_entropy(p["hidden"] @ p["weight"].T, labels)
    assert relative_error(loss, softmax) < 3e-7
    assert loss == multimax_linear_cross_entropy(p["hidden"], p["weight"], labels, None, None)


def test_tied_weights():
    p, labels = inputs(torch.float64)
    tokens = torch.arange(TOKENS) % VOCAB

    def loss(f):
        table = p["weight"].detach().clone().requires_grad_()
        f(dict(p, weight=table, hidden=table[tokens]), labels).backward()
        return table.grad

    assert relative_error(loss(fused), loss(unfused)) < 1e-12


def test_non_contiguous_inputs():
    p, labels = inputs(torch.float64)
    q = dict(p)
    for name in ("hidden", "weight"):
        q[name] = p[name].detach().T.contiguous().T.requires_grad_()
    found, expected = gradients(fused(q, labels), q), gradients(unfused(p, labels), p)
    assert all(relative_error(found[name], expected[name]) < 1e-12 for name in NAMES)


# -- chunks and memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 1, 5, 16, 1000])
@pytest.mark.parametrize("tokens", [1, 2, 17, 64])
def test_chunks_and_tiles_do_not_matter(tokens, chunk, monkeypatch):
    monkeypatch.setattr(cross_entropy_problem, "CPU_TILE", 3 * VOCAB)
    for reduction in ("sum", "none"):
        check(
            torch.float64,
            given=inputs(torch.float64, tokens=tokens, ignored=False),
            chunk_size=chunk,
            reduction=reduction,
        )


@pytest.mark.parametrize("empty", ["no tokens", "all ignored"])
def test_nothing_to_learn_from(empty):
    p, labels = inputs(tokens=0 if empty == "no tokens" else TOKENS)
    labels.fill_(-100)
    total = fused(p, labels, reduction="sum")
    assert total == 0
    assert all((g == 0).all() for g in gradients(total, p).values())
    mean = fused(p, labels)
    assert mean.isnan()
    assert all((g == 0).all() for g in gradients(mean, p).values())
    assert (fused(p, labels, reduction="none") == torch.zeros(len(labels))).all()
    assert fused(p, labels, num_items_in_batch=3) == 0


@pytest.mark.parametrize("ignore_index", [-1, 7, -100])
def test_ignored_tokens_have_no_part(ignore_index):
    """Not even through a NaN."""
    p, labels = inputs(torch.float64, ignored=False)
    labels[labels == 7] = 8
    labels[::3] = ignore_index
    reference = gradients(unfused(p, labels, ignore_index=ignore_index), p)
    with torch.no_grad():
        p["hidden"][::3] = float("nan")
    found = gradients(fused(p, labels, ignore_index=ignore_index), p)
    assert all(relative_error(found[name], reference[name]) < 1e-12 for name in NAMES)
    assert (found["hidden"][::3] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens, vocab", [(256, 1000), (64, 5000), (1024, 700)])
def test_logits_never_exist_whole(tokens, vocab, dtype, reduction):
    p, labels = inputs(dtype, tokens=tokens, vocab=vocab, width=8)
    with LargestTensor() as seen:
        fused(p, labels, reduction=reduction, label_smoothing=0.1).sum().backward()
    assert 0 < seen.elements <= tokens * vocab / 3


def test_workspace_is_bounded(monkeypatch):
    monkeypatch.setattr(cross_entropy_problem, "WORKSPACE_BYTES", 2**16)
    p, labels = inputs(tokens=512, vocab=1000, width=4)
    with LargestTensor() as seen:
        fused(p, labels).backward()
    assert seen.elements * 4 <= 2**16


@pytest.mark.parametrize(
    "frozen", [("weight",), ("hidden",), ("hidden", "weight", "bias"), ("ranges", "ts"), NAMES[2:]]
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_frozen_inputs(frozen, reduction):
    p, labels = inputs(torch.float64)
    expected = gradients(unfused(p, labels, reduction=reduction), p)
    for name in frozen:
        p[name].requires_grad_(False)
    names = [name for name in NAMES if name not in frozen]
    loss = fused(p, labels, reduction=reduction)
    found = gradients(loss, p, names)
    assert all(relative_error(found[name], expected[name]) < 1e-12 for name in names)


def test_frozen_weight_has_no_buffer():
    p, labels = inputs(tokens=16, vocab=1000, width=64, ignored=False)
    p["weight"].requires_grad_(False)
    with LargestTensor() as seen:
        fused(p, labels).backward()
    assert seen.elements < p["weight"].numel() / 2


def test_no_grad_computes_the_loss_only():
    p, labels = inputs(tokens=64, vocab=512, width=512)
    expected = fused(p, labels)
    with torch.no_grad(), LargestTensor() as seen:
        loss = fused(p, labels)
    assert loss == expected and not loss.requires_grad
    assert seen.elements < p["weight"].numel() / 2


# -- infinities --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_classes_at_minus_infinity_do_not_take_part(softcap, label_smoothing):
    p, labels = inputs(torch.float64, ignored=False)
    kept = torch.arange(VOCAB) % 3 > 0
    labels = kept.nonzero().squeeze(1)[labels % kept.sum()]
    with torch.no_grad():
        p["bias"][~kept] = float("-inf")
    options = {"softcap": softcap, "label_smoothing": label_smoothing}
    loss = fused(p, labels, **options)
    part = {**p, "weight": p["weight"][kept], "bias": p["bias"][kept]}
    reference = unfused(part, kept.cumsum(0)[labels] - 1, **options)
    assert relative_error(loss, reference) < 1e-12
    found, expected = gradients(loss, p), gradients(reference, p)
    for name in NAMES:
        assert relative_error(found[name], expected[name]) < 1e-12, name
    assert (found["weight"][~kept] == 0).all()


def test_a_masked_label_costs_infinity_and_spreads_nothing():
    p, labels = inputs(ignored=False)
    with torch.no_grad():
        p["bias"][labels[4]] = float("-inf")
    losses = fused(p, labels, reduction="none")
    assert losses[4] == float("inf")
    assert losses[labels != labels[4]].isfinite().all()
    assert all(g.isfinite().all() for g in gradients(fused(p, labels, reduction="sum"), p).values())


def test_a_row_without_classes_is_finite_in_its_gradients():
    p, labels = inputs(ignored=False)
    with torch.no_grad():
        p["bias"].fill_(float("-inf"))
    losses = fused(p, labels, reduction="none")
    assert (losses == float("inf")).all()
    assert all((g == 0).all() for g in gradients(losses, p).values())


def test_nan_stays_in_its_row():
    p, labels = inputs(ignored=False)
    with torch.no_grad():
        p["hidden"][3, 0] = float("nan")
        p["bias"][::7] = float("-inf")
    losses = fused(p, labels, reduction="none")
    others = torch.arange(TOKENS) != 3
    assert losses[3].isnan() and not losses[others].isnan().any()
    (grad,) = torch.autograd.grad(losses.sum(), p["hidden"])
    assert grad[3].isnan().any() and grad[others].isfinite().all()


# -- surroundings ------------------------------------------------------------------------------------------------------


def test_autocast():
    p, labels = inputs(tokens=64, vocab=301)
    exact = doubled(p)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fused(p, labels)
    low = {n: x.detach().bfloat16().requires_grad_() if n in NAMES[:2] else x for n, x in p.items()}
    plain, reference = unfused(low, labels), unfused(exact, labels)
    assert loss.dtype == torch.float32
    # the products did run in bfloat16
    assert loss != fused(p, labels)
    assert_no_worse(loss, plain, reference, "loss")
    found, expected, eager = gradients(loss, p), gradients(reference, exact), gradients(plain, low)
    for name in NAMES:
        assert found[name].dtype == torch.float32
        assert_no_worse(found[name], eager[name], expected[name], name)


def test_autocast_takes_mixed_types():
    p, labels = inputs()
    q = dict(p, hidden=p["hidden"].detach().bfloat16().requires_grad_())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        grads = gradients(fused(q, labels), q)
    assert grads["hidden"].dtype == torch.bfloat16 and grads["weight"].dtype == torch.float32


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_as_one_graph(reduction):
    p, labels = inputs()
    compiled = torch.compile(
        lambda p, labels: fused(p, labels, reduction=reduction, softcap=3.0), fullgraph=True, backend="aot_eager"
    )
    expected = fused(p, labels, reduction=reduction, softcap=3.0)
    loss = compiled(p, labels)
    torch.testing.assert_close(loss, expected)
    found, reference = gradients(loss, p), gradients(expected, p)
    for name in NAMES:
        torch.testing.assert_close(found[name], reference[name])


@pytest.mark.parametrize("features", ["all", "softmax", "frozen"])
def test_operators_are_registered_correctly(features):
    p, labels = inputs(tokens=9, vocab=11, width=4)
    order = ("ranges", "ts", "bias", "scale", "shift")
    small = [None] * 5 if features == "softmax" else [p[name] for name in order]
    if features == "frozen":
        p["weight"].requires_grad_(False)
    tensors = (p["hidden"], p["weight"], labels, *small)
    options = (-100, 0.1, None if features == "softmax" else 3.0, 4, torch.float32)
    wanted = [x is not None and x.requires_grad for x in (*tensors[:2], *tensors[3:])]
    torch.library.opcheck(linear_cross_entropy, (*tensors, *options, wanted))
    torch.library.opcheck(linear_cross_entropy_rows, (*tensors, *options))
    detached = [None if x is None else x.detach() for x in tensors]
    torch.library.opcheck(linear_cross_entropy_rows_backward, (torch.rand(9), *detached, *options, wanted))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_is_refused(reduction):
    p, labels = inputs()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(fused(p, labels, reduction=reduction).sum(), p["hidden"], create_graph=True)


def test_backward_twice_through_one_graph():
    p, labels = inputs()
    loss = fused(p, labels)
    first = torch.autograd.grad(loss, p["weight"], retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, p["weight"])[0])


def test_activation_checkpointing():
    p, labels = inputs()
    expected = gradients(fused(p, labels), p)
    loss = torch.utils.checkpoint.checkpoint(fused, p, labels, use_reentrant=False)
    assert torch.equal(gradients(loss, p)["weight"], expected["weight"])


def test_one_thread():
    p, labels = inputs()
    expected, threads = fused(p, labels), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        torch.testing.assert_close(fused(p, labels), expected)
    finally:
        torch.set_num_threads(threads)


# -- the Triton row kernel ---------------------------------------------------------------------------------------------

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_triton_kernel_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "test_kernel", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
@pytest.mark.skipif(INTERPRETED, reason="needs the compiler")
@pytest.mark.parametrize("full", [True, False])
def test_triton_kernel_compiles_for_sm90(full):
    """The compiler refuses things that the interpreter accepts; no GPU is needed."""
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hf_multimax.loss import triton_rows as kernels

    pointers = ("x_ptr", "losses", "sums", "ranges", "ts", "bias", "scale", "shift", "weights")
    signature = dict.fromkeys(pointers, "*fp32") | {"labels": "*i64", "vocab": "i32", "ignore_index": "i32"}
    signature |= {"smoothing": "fp32", "cap": "fp32"}
    constants = {"ORDER": 2 * full, "SUMS": 10 if full else 2, "SUMS_PADDED": 16 if full else 2, "CAPPED": full}
    constants |= {"GRADIENT": True, "BLOCK": kernels.BLOCK}
    constants |= {} if full else dict.fromkeys(("ranges", "ts", "bias", "scale", "shift", "weights"))
    order = kernels._row_kernel.arg_names
    signature = {name: "constexpr" if name in constants else signature[name] for name in order}
    source = ASTSource(fn=kernels._row_kernel, signature=signature, constexprs=constants)
    compiled = triton_compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": kernels.WARPS})
    assert compiled.asm["cubin"]


@pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter's own process")
@pytest.mark.parametrize("name", KERNEL_CHECKS)
def test_kernel(name):
    with kernel_on_cpu_tensors():
        KERNEL_CHECKS[name]()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", DEVICE_CHECKS)
def test_on_cuda(name):
    with torch.device("cuda"):
        DEVICE_CHECKS[name]()


# -- errors ------------------------------------------------------------------------------------------------------------

H, W, Y, S = torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(4, dtype=torch.long), torch.zeros(4)


@pytest.mark.parametrize(
    "error, name, arguments, options",
    [
        (ValueError, "hidden", (torch.zeros(2, 2, 3), W, Y, S, S), {}),
        (TypeError, "hidden", (H.long(), W, Y, S, S), {}),
        (TypeError, "hidden", ([1.0], W, Y, S, S), {}),
        (ValueError, "weight", (H, torch.zeros(5, 2), Y, S, S), {}),
        (ValueError, "weight", (H, torch.zeros(5), Y, S, S), {}),
        (ValueError, "weight", (H, torch.zeros(0, 3), Y, S, S), {}),
        (TypeError, "weight", (H, W.bfloat16(), Y, S, S), {}),
        (ValueError, "labels", (H, W, Y[:3], S, S), {}),
        (ValueError, "labels", (H, W, Y[:, None], S, S), {}),
        (TypeError, "labels", (H, W, Y.float(), S, S), {}),
        (ValueError, r"labels .* got 5", (H, W, Y + 5, S, S), {}),
        (ValueError, r"labels .* got -1", (H, W, Y - 1, S, S), {}),
        (ValueError, "ts", (H, W, Y, S, None), {}),
        (ValueError, "ranges", (H, W, Y, None, S), {}),
        (ValueError, "ranges and ts", (H, W, Y, S, S[:2]), {}),
        (ValueError, "ranges and ts", (H, W, Y, S[:3], S[:3]), {}),
        (ValueError, "ranges and ts", (H, W, Y, S[:0], S[:0]), {}),
        (ValueError, "ranges and ts", (H, W, Y, torch.zeros(2, 4), torch.zeros(2, 4)), {}),
        (TypeError, "ranges", (H, W, Y, S.long(), S), {}),
        (TypeError, "ts", (H, W, Y, S, [0.0, 0.0, 0.0, 0.0]), {}),
        (ValueError, "bias", (H, W, Y, S, S), {"bias": torch.zeros(4)}),
        (TypeError, "bias", (H, W, Y, S, S), {"bias": 1.0}),
        (TypeError, "affine", (H, W, Y, S, S), {"affine": S[0]}),
        (TypeError, "affine scale", (H, W, Y, S, S), {"affine": (1.0, S[0])}),
        (ValueError, "affine shift", (H, W, Y, S, S), {"affine": (S[0], S)}),
        (ValueError, "affine", (H, W, Y, None, None), {"affine": (S[0], S[0])}),
        (ValueError, "reduction", (H, W, Y, S, S), {"reduction": "batchmean"}),
        (ValueError, "label_smoothing", (H, W, Y, S, S), {"label_smoothing": 1.5}),
        (TypeError, "label_smoothing", (H, W, Y, S, S), {"label_smoothing": "much"}),
        (TypeError, "ignore_index", (H, W, Y, S, S), {"ignore_index": 1.5}),
        (TypeError, "num_items_in_batch", (H, W, Y, S, S), {"num_items_in_batch": "7"}),
        (ValueError, "num_items_in_batch", (H, W, Y, S, S), {"num_items_in_batch": torch.ones(2)}),
        (ValueError, "softcap", (H, W, Y, S, S), {"softcap": 0.0}),
        (TypeError, "softcap", (H, W, Y, S, S), {"softcap": "30"}),
        (ValueError, "chunk_size", (H, W, Y, S, S), {"chunk_size": 0}),
        (TypeError, "chunk_size", (H, W, Y, S, S), {"chunk_size": 2.0}),
    ],
)
def test_mistakes_name_the_argument(error, name, arguments, options):
    with pytest.raises(error, match=name):
        multimax_linear_cross_entropy(*arguments, **options)


def test_tensors_on_different_devices():
    with pytest.raises(ValueError, match="labels is on meta"):
        multimax_linear_cross_entropy(H, W, Y.to("meta"), S, S)
