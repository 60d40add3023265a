"""The fused output loss by its formulas, and comparisons with them on PyTorch's default device."""

import contextlib
import functools
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_multimax import modulate
from hf_multimax.loss import chunks as cross_entropy_chunks
from hf_multimax.loss.cross_entropy import multimax_linear_cross_entropy
from tests.tolerances import RELATIVE, assert_no_worse, relative_error

NAMES = ("hidden", "weight", "ranges", "ts", "bias", "scale", "shift")
SCALARS = ("ranges", "ts", "scale", "shift")
TOKENS, VOCAB, WIDTH = 37, 53, 16


def inputs(dtype=torch.float32, tokens=TOKENS, vocab=VOCAB, width=WIDTH, order=2, ignored=True, seed=0):
    """hidden, weight, labels, and the small parameters by name; every float requires a gradient."""
    g = torch.Generator(torch.get_default_device()).manual_seed(seed)

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
    weights = torch.linspace(-1.0, 2.0, loss.numel(), dtype=loss.dtype) if loss.ndim else loss.new_full((), 1.5)
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
    _assert_at_most(loss, reference, tolerance, "loss")
    found, expected = gradients(loss, p, names), gradients(reference, reference_p, names)
    for name in names:
        assert found[name].dtype == p[name].dtype, name
        assert found[name].shape == p[name].shape, name
        # scalars are sums over all logits, of terms that cancel
        _assert_at_most(found[name], expected[name], 10 * tolerance if name in SCALARS else tolerance, name)


def low_precision_is_no_worse_than_unfused(dtype, size=(64, 301, WIDTH), **options):
    """Value and every gradient in half precision, against what the unfused loss of that type errs.

    ``size`` is tokens, vocabulary and width.
    """
    p, labels = inputs(dtype, *size)
    exact = doubled(p)
    losses = [f(q, labels, **options) for f, q in ((fused, p), (unfused, p), (unfused, exact))]
    assert losses[0].dtype == torch.float32
    assert_no_worse(*losses, "loss")
    grads = [gradients(loss, q) for loss, q in zip(losses, (p, p, exact))]
    for name in NAMES:
        assert grads[0][name].dtype == p[name].dtype, name
        assert_no_worse(*(g[name] for g in grads), name)


# -- the row part as one Triton kernel ---------------------------------------------------------------------------------


@contextlib.contextmanager
def kernel_on_cpu_tensors():
    """Where Triton interprets: its kernel runs on CPU tensors, in blocks that do not divide the vocabulary."""
    from hf_multimax.loss import triton_rows as triton_cross_entropy

    with (
        mock.patch.object(triton_cross_entropy, "BLOCK", 32),
        mock.patch.object(cross_entropy_chunks, "row_kernel", lambda problem: triton_cross_entropy.row_losses),
    ):
        yield


def kernel_orders(order):
    check(torch.float32, given=inputs(tokens=6, order=order), tolerance=1e-5, chunk_size=6)


def kernel_with_masked_classes_and_nan():
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


def kernel_with_huge_logits(order, huge):
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


def kernel_with_nothing_to_learn_from():
    p, labels = inputs(tokens=6)
    losses = fused(p, labels.fill_(-100), reduction="none", chunk_size=6)
    assert (losses == 0).all()
    assert all((g == 0).all() for g in gradients(losses, p).values())


_OPTIONS = {
    "everything": {"softcap": 2.5, "label_smoothing": 0.1, "chunk_size": 4},
    "none": {"reduction": "none", "softcap": 20.0, "chunk_size": 6},
    "softmax": {"names": NAMES[:2], "chunk_size": 6},
    "bias": {"names": NAMES[:5], "label_smoothing": 0.3, "chunk_size": 6},
}


def kernel_matches_float64(options):
    check(torch.float32, given=inputs(tokens=6), tolerance=1e-5, **options)


#: what the kernel must do: in the interpreter, or on a GPU as PyTorch's default device
KERNEL_CHECKS = {
    **{f"matches float64, {name}": functools.partial(kernel_matches_float64, _OPTIONS[name]) for name in _OPTIONS},
    **{f"order {order}": functools.partial(kernel_orders, order) for order in (1, 3)},
    **{
        f"huge logits, order {order}, {huge:g}": functools.partial(kernel_with_huge_logits, order, huge)
        for order in (1, 2, 3, 16)
        for huge in (-1e4, -1e20, -1e30, 1e20)
    },
    "masked classes and NaN": kernel_with_masked_classes_and_nan,
    "nothing to learn from": kernel_with_nothing_to_learn_from,
}


def matches_float64_at_size(size, **options):
    check(torch.float32, given=inputs(torch.float32, *size), tolerance=1e-5, **options)


def in_float64(**options):
    check(torch.float64, **options)


_SIZE = (256, 5003, 64)
_HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_REDUCTIONS = ("mean", "sum", "none")

#: what the loss must do on a GPU as PyTorch's default device
DEVICE_CHECKS = {
    **{f"kernel: {name}": function for name, function in KERNEL_CHECKS.items()},
    **{f"float64, {r}": functools.partial(in_float64, reduction=r) for r in _REDUCTIONS},
    **{
        f"float32, 256 x 5003, {r}": functools.partial(
            matches_float64_at_size, _SIZE, reduction=r, label_smoothing=0.1, softcap=5.0
        )
        for r in _REDUCTIONS
    },
    **{
        f"{name}, 256 x 5003, {r}": functools.partial(
            low_precision_is_no_worse_than_unfused, dtype, _SIZE, reduction=r, label_smoothing=0.1, softcap=5.0
        )
        for name, dtype in _HALF.items()
        for r in _REDUCTIONS
    },
}


def _assert_at_most(actual, expected, tolerance, what):
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{what}: relative error {error:.3g} > {tolerance:.3g}"
