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

from hf_multimax import modulate
from hf_multimax.kernels import cross_entropy_chunks, cross_entropy_problem
from hf_multimax.kernels.cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_rows,
    linear_cross_entropy_rows_backward,
    multimax_linear_cross_entropy,
)
from tests.tolerances import RELATIVE, assert_no_worse, relative_error

NAMES = ("hidden", "weight", "ranges", "ts", "bias", "scale", "shift")
SCALARS = ("ranges", "ts", "scale", "shift")
TOKENS, VOCAB, WIDTH = 37, 53, 16


def inputs(dtype=torch.float32, tokens=TOKENS, vocab=VOCAB, width=WIDTH, order=2, ignored=True, seed=0):
    """hidden, weight, labels, and the small parameters by name; every float requires a gradient."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, factor=1.0, kind=torch.float32):
        return (factor * torch.randn(shape, generator=g, dtype=torch.float64)).to(kind)

    labels = torch.randint(0, vocab, (tokens,), generator=g)
    if ignored:
        labels[::5] = -100
    found = {
        "hidden": normal(tokens, width, kind=dtype),
        "weight": normal(vocab, width, factor=width**-0.5, kind=dtype),
        "bias": normal(vocab, kind=dtype),
    }
    small = torch.float64 if dtype == torch.float64 else torch.float32
    found["ranges"] = normal(2 * order, kind=small)
    found["ts"] = normal(2 * order, factor=0.4, kind=small)
    found["scale"], found["shift"] = 1.0 + normal(factor=0.2, kind=small), normal(factor=0.2, kind=small)
    return {name: x.requires_grad_() for name, x in found.items()}, labels


def sigma(x: Tensor, ranges: Tensor, ts: Tensor) -> Tensor:
    out = x
    for n in range(1, len(ts) // 2 + 1):
        b, d = ranges[2 * n - 2], ranges[2 * n - 1]
        out = out + ts[2 * n - 2] * F.relu(b - x) ** n + ts[2 * n - 1] * F.relu(x - d) ** n
    return out


def unfused(p, labels, *, features=NAMES, softcap=None, num_items_in_batch=None, reduction="mean", **options):
    """What the fused loss must equal, in the type of its inputs."""
    logits = p["hidden"] @ p["weight"].T
    if "bias" in features:
        logits = logits + p["bias"]
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if "scale" in features:
        logits = p["scale"] * logits + p["shift"]
    if "ts" in features:
        logits = sigma(logits, p["ranges"], p["ts"])
    if num_items_in_batch is None:
        return F.cross_entropy(logits, labels, reduction=reduction, **options)
    losses = F.cross_entropy(logits, labels, reduction="none" if reduction == "none" else "sum", **options)
    return losses / num_items_in_batch


def fused(p, labels, *, features=NAMES, **options):
    modulator = (p["ranges"], p["ts"]) if "ts" in features else (None, None)
    bias = p["bias"] if "bias" in features else None
    affine = (p["scale"], p["shift"]) if "scale" in features else None
    return multimax_linear_cross_entropy(
        p["hidden"], p["weight"], labels, *modulator, bias=bias, affine=affine, **options
    )


def gradients(loss: Tensor, p, names=NAMES) -> dict[str, Tensor]:
    """Of a fixed weighting of ``loss``; a scalar loss is taken times 1.5, so that the upstream factor is seen."""
    weights = torch.linspace(-1.0, 2.0, loss.numel(), dtype=loss.dtype) if loss.ndim else loss.new_tensor(1.5)
    return dict(zip(names, torch.autograd.grad((loss * weights).sum(), [p[name] for name in names])))


def doubled(p):
    return {name: x.detach().double().requires_grad_() for name, x in p.items()}


def check(dtype, names=NAMES, given=None, chunk_size=None, tolerance=None, **options):
    """Value and every gradient of the fused loss against float64."""
    p, labels = given or inputs(dtype)
    reference_p = doubled(p)
    loss = fused(p, labels, features=names, chunk_size=chunk_size, **options)
    reference = unfused(reference_p, labels, features=names, **options)
    tolerance = tolerance or RELATIVE[dtype]
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.shape == reference.shape
    assert relative_error(loss, reference) <= tolerance
    found, expected = gradients(loss, p, names), gradients(reference, reference_p, names)
    for name in names:
        assert found[name].dtype == p[name].dtype, name
        assert found[name].shape == p[name].shape, name
        # scalars are sums over all logits, of terms that cancel
        allowed = 10 * tolerance if name in SCALARS else tolerance
        assert relative_error(found[name], expected[name]) <= allowed, name


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
    p, labels = inputs(dtype, tokens=64, vocab=301)
    exact = doubled(p)
    found, plain, reference = (
        f(q, labels, reduction=reduction) for f, q in ((fused, p), (unfused, p), (unfused, exact))
    )
    assert found.dtype == torch.float32
    assert_no_worse(found, plain, reference, "loss")
    grads = [gradients(loss, q) for loss, q in ((found, p), (plain, p), (reference, exact))]
    for name in NAMES:
        assert grads[0][name].dtype == p[name].dtype
        assert_no_worse(*(g[name] for g in grads), name)


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
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter's own process")
KERNEL_CASES = {
    "everything": {"softcap": 2.5, "label_smoothing": 0.1, "chunk_size": 4},
    "none": {"reduction": "none", "softcap": 20.0, "chunk_size": 6},
    "softmax": {"names": NAMES[:2], "chunk_size": 6},
    "bias": {"names": NAMES[:5], "label_smoothing": 0.3, "chunk_size": 6},
}


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

    from hf_multimax.kernels import triton_cross_entropy as kernels

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


@pytest.fixture
def kernel(monkeypatch):
    """The Triton kernel on CPU tensors, in blocks that do not divide the vocabulary."""
    triton_module = pytest.importorskip("hf_multimax.kernels.triton_cross_entropy")
    monkeypatch.setattr(triton_module, "BLOCK", 32)
    monkeypatch.setattr(cross_entropy_chunks, "row_kernel", lambda problem: triton_module.row_losses)


@interpreted
@pytest.mark.parametrize("case", KERNEL_CASES)
def test_kernel_matches_float64(kernel, case):
    check(torch.float32, given=inputs(tokens=6), tolerance=1e-5, **KERNEL_CASES[case])


@interpreted
@pytest.mark.parametrize("order", [1, 3])
def test_kernel_orders(kernel, order):
    check(torch.float32, given=inputs(tokens=6, order=order), tolerance=1e-5, chunk_size=6)


@interpreted
def test_kernel_with_masked_classes_and_nan(kernel):
    p, labels = inputs(tokens=6, ignored=False)
    labels.copy_(torch.arange(6))
    with torch.no_grad():
        p["bias"][labels[4]] = float("-inf")
        p["hidden"][3, 0] = float("nan")
    losses = fused(p, labels, reduction="none", chunk_size=6)
    assert losses[4] == float("inf") and losses[3].isnan()
    assert losses[[0, 1, 2, 5]].isfinite().all()
    (grad,) = torch.autograd.grad(losses.sum(), p["hidden"])
    assert grad[3].isnan().any() and grad[torch.arange(6) != 3].isfinite().all()


@interpreted
@pytest.mark.parametrize("order", [1, 2, 3, 16])
@pytest.mark.parametrize("huge", [-1e4, -1e20, -1e30, 1e20])
def test_kernel_with_huge_logits(kernel, order, huge):
    """Without slopes it is SoftMax; with the last negative, what is huge and negative does not take part."""
    p, labels = inputs(tokens=6, order=order, ignored=False)
    labels.fill_(4)
    with torch.no_grad():
        p["bias"][7] = huge
        p["ts"].zero_()
    for last in (0.0, *([-0.5] if huge < -1e4 and order > 1 else [])):
        with torch.no_grad():
            p["ts"][-2] = last
        losses = fused(p, labels, reduction="none", chunk_size=6)
        scores = p["scale"] * (p["hidden"] @ p["weight"].T + p["bias"]) + p["shift"]
        expected = F.cross_entropy(modulate(scores, p["ranges"], p["ts"]), labels, reduction="none")
        torch.testing.assert_close(losses, expected)
        if huge < 0:
            assert all(g.isfinite().all() for g in gradients(losses.sum(), p).values())


@interpreted
def test_kernel_with_nothing_to_learn_from(kernel):
    p, labels = inputs(tokens=6)
    losses = fused(p, labels.fill_(-100), reduction="none", chunk_size=6)
    assert (losses == 0).all()
    assert all((g == 0).all() for g in gradients(losses, p).values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_on_cuda(dtype, reduction):
    p, labels = inputs(dtype, tokens=256, vocab=5003, width=64)
    device, exact = {name: x.detach().cuda().requires_grad_() for name, x in p.items()}, doubled(p)
    options = {"reduction": reduction, "label_smoothing": 0.1, "softcap": 5.0}
    loss, reference = fused(device, labels.cuda(), **options), unfused(exact, labels, **options)
    assert_no_worse(loss.cpu(), unfused(p, labels, **options), reference, "loss")
    found, expected = gradients(loss.cpu(), device), gradients(reference, exact)
    for name in NAMES:
        assert relative_error(found[name].cpu(), expected[name]) <= 4 * RELATIVE[dtype] + 1e-5, name


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
