"""What the Triton attention through functions of rows must do, as functions that need no test framework:
tests/test_triton_row_attention.py runs them in Triton's interpreter or on a GPU, ``python -m benchmarks.gpu`` on a GPU,
both on PyTorch's default device. Results and gradients are held against eager attention in float64.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.fuzz_attention import eager, gradients, through
from hf_multimax import MultiMaxConfig, backend, build_normalizer
from hf_multimax.attention.interface import scaled_dot_product_multimax
from hf_multimax.attention.triton import backend as triton_backend
from hf_multimax.rows.triton.arguments import KINDS
from tests.tolerances import RELATIVE, assert_close, relative_error

__all__ = ["CALLS", "CHECKS", "FUNCTIONS", "Call", "agrees_with_float64", "ours"]

FUNCTIONS = tuple(kind for kind in KINDS if kind != "multimax")
#: options that are not the default; tensors for each of two heads get gradients
OPTIONS: dict[str, dict[str, Any]] = {
    "softmax": {"temperature": 0.7},
    "entmax": {"alpha": [1.3, 1.7]},
    "rsoftmax": {"sparsity": [0.3, 0.6]},
    "tsoftmax": {"t": 2.0},
    "topk_softmax": {"k": 3},
    "scalable_softmax": {"s": [0.4, 0.6]},
    "asentmax": {"alpha": [1.5, 1.4], "beta": [0.3, 0.5], "gamma": [0.1, -0.2]},
}
#: float32 against float64, relative to the largest entry; an option's gradient is a sum that cancels
TOLERANCE, OF_OPTIONS = 1e-5, 2e-4
ours = through(triton_backend)


@dataclass(frozen=True)
class Call:
    """One call: shapes, and which features it has. ``build`` makes its tensors."""

    shape: tuple[int, int, int, int, int] = (1, 2, 1, 21, 37)  # batch, heads, key heads, queries, keys
    dims: tuple[int, int] = (16, 16)
    mask: str | None = None
    bias: tuple[int, ...] | None = None
    ties: bool = False
    spread: float = 2.0
    features: dict[str, Any] = field(default_factory=dict)

    def build(self, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """q, k, v and the bias by name, and the features."""
        torch.manual_seed(sum(self.shape))
        batch, heads, key_heads, rows, keys = self.shape
        q = self.spread * torch.randn(batch, heads, rows, self.dims[0])
        k, v = (torch.randn(batch, key_heads, keys, width) for width in self.dims)
        features = dict(self.features)
        if self.ties:  # sums of small integers are exact
            q, k, features["scale"] = q.round(), k.round(), 0.25
        if self.mask is not None:
            keep = torch.rand(batch, 1, rows, keys) < 0.7
            keep[:, :, 5:7] = False
            features["mask"] = keep if self.mask == "boolean" else _additive(keep, dtype)
        tensors = {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype)}
        if self.bias is not None:
            tensors["bias"] = torch.randn(self.bias)
        return tensors, features


def _additive(keep: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.randn(keep.shape).to(dtype).masked_fill(~keep, torch.finfo(dtype).min)


CALLS = {
    "causal, grouped": Call(features={"causal": True}),
    "window": Call((1, 2, 2, 34, 50), mask="boolean", features={"causal": True, "window": 9}),
    "all": Call(
        (1, 2, 1, 20, 34), (7, 13), mask="additive", bias=(1, 2, 20, 34), features={"softcap": 4.0, "causal": True}
    ),
}
MORE = {
    "sparsemax": {
        "window on both sides": Call((1, 1, 1, 50, 50), features={"window": 20}),
        "one query": Call((1, 2, 1, 1, 70)),
        "one key": Call((1, 2, 2, 1, 1)),
        "bias over batch and queries": Call((2, 2, 2, 17, 17), bias=(1, 2, 1, 17)),
        "wide": Call((1, 2, 2, 17, 17), (80, 136)),
    },
    "topk_softmax": {"ties in a window": Call((1, 1, 1, 40, 40), ties=True, features={"causal": True, "window": 12})},
    "entmax15": {"ties": Call(ties=True)},
}


def agrees_with_float64(name: str, call: Call) -> None:
    """Result and every gradient, but for what rounding decides, which plain float32 gets wrong, too."""
    tensors, features = call.build()
    grad = torch.randn(*tensors["q"].shape[:3], call.dims[1])
    given = OPTIONS.get(name, {})
    learned = {key: torch.tensor(x) for key, x in given.items() if isinstance(x, list)}
    tensors, numbers = {**tensors, **learned}, {key: x for key, x in given.items() if key not in learned}
    found = gradients(ours, name, numbers, tensors, features, grad)
    exact = gradients(eager, name, numbers, _doubled(tensors), features, grad.double())
    plain = gradients(eager, name, numbers, tensors, features, grad)
    for what, x in found.items():
        assert x.isfinite().all(), what
        tolerance = (OF_OPTIONS if what in learned else TOLERANCE) + 2 * relative_error(plain[what], exact[what])
        assert_close(x, exact[what], tolerance, f"{name}: {what}")


def half_precision(name: str, dtype: torch.dtype) -> None:
    """Weights and the scores' gradients are rounded before products; the interpreter truncates to bfloat16."""
    call = Call((1, 2, 1, 33, 33), features={"causal": True})
    tensors, features = call.build(dtype)
    grad = torch.randn(1, 2, 33, 16).to(dtype)
    found = gradients(ours, name, {}, tensors, features, grad)
    exact = gradients(eager, name, {}, _doubled(tensors), features, grad.double())
    for what, x in found.items():
        assert x.dtype == dtype, what
        assert_close(x, exact[what], 4 * RELATIVE[dtype], what)


def repeats_bit_by_bit(rows: int = 20, dtype: torch.dtype = torch.float32) -> None:
    """More blocks than programs, of heads that share their keys."""
    tensors, features = Call((1, 6, 2, rows, rows + 13), features={"causal": True}).build(dtype)
    grad = torch.randn(tensors["q"].shape).to(dtype)
    first, second = (gradients(ours, "entmax15", {}, tensors, features, grad) for _ in range(2))
    assert all(torch.equal(x, second[what]) for what, x in first.items())
    exact = gradients(eager, "entmax15", {}, _doubled(tensors), features, grad.double())
    tolerance = TOLERANCE if dtype == torch.float32 else 4 * RELATIVE[dtype]
    for what, x in first.items():
        assert_close(x, exact[what], tolerance, what)


def tiles_without_weight_are_left_out(keys: int = 96) -> None:
    """Values that no query weighs may be anything: they are read in no tile, in neither pass."""
    tensors, features = Call((1, 1, 1, 20, keys)).build()
    shift = torch.zeros(1, 1, 1, keys)
    shift[..., keys // 3 :] = -100.0
    features["bias"] = shift
    grad = torch.randn(1, 1, 20, 16)
    expected = gradients(ours, "sparsemax", {}, tensors, features, grad)
    tensors["v"][:, :, keys // 3 :] = float("nan")
    found = gradients(ours, "sparsemax", {}, tensors, features, grad)
    assert all(torch.equal(x, expected[what]) for what, x in found.items())
    assert not found["k"][:, :, keys // 3 :].any() and not found["v"][:, :, keys // 3 :].any()


def dropout_is_the_same_in_both_passes(name: str) -> None:
    """As of MultiMax: the same bits."""
    keys = 40
    tensors, _ = Call((1, 2, 1, 17, keys), (16, keys)).build()
    identity, grad = torch.eye(keys), torch.randn(1, 2, 17, keys)
    shown = {**tensors, "v": identity.expand(1, 1, keys, keys)}  # the result is what is left of the weights
    torch.manual_seed(7)
    left = gradients(ours, name, {}, shown, {"dropout_p": 0.3}, grad)["out"]
    weights = gradients(ours, name, {}, shown, {}, grad)["out"]
    factors = torch.where(left != 0, 1 / 0.7, 0.0)
    dropped = (factors[weights > 0] == 0).double()
    assert abs(dropped.mean() - 0.3) < 4 * (0.21 / dropped.numel()) ** 0.5
    torch.testing.assert_close(left, weights * factors)

    def dropping(call, name, options):
        return eager(call._replace(v=identity.double().expand_as(call.v)), name, options) * factors.double() @ call.v

    torch.manual_seed(7)
    found = gradients(ours, name, {}, tensors, {"dropout_p": 0.3}, grad)
    exact = gradients(dropping, name, {}, _doubled(tensors), {}, grad.double())
    for what, x in found.items():
        assert relative_error(x, exact[what]) < TOLERANCE, what


def rows_that_see_nothing_or_what_is_broken(name: str) -> None:
    """Zeros without a gradient; NaN in its own row alone."""
    tensors, _ = Call((1, 1, 1, 20, 40)).build()
    keep, bias = torch.rand(20, 40) < 0.7, torch.zeros(1, 1, 20, 40)
    keep[3], keep[17], keep[9, 5], keep[9, 6] = False, False, True, True
    bias[..., 9, 5] = float("nan")
    grad = torch.randn(1, 1, 20, 16)
    found = gradients(ours, name, {}, tensors, {"mask": keep, "bias": bias}, grad)
    assert not found["out"][:, :, [3, 17]].any() and not found["q"][:, :, [3, 17]].any()
    assert found["out"][:, :, 9].isnan().all()
    others = [i for i in range(20) if i != 9]
    assert found["out"][:, :, others].isfinite().all() and found["q"].isfinite().all()
    keep[9, 5] = False  # a masked entry does not count, whatever it holds
    again = gradients(ours, name, {}, tensors, {"mask": keep, "bias": bias}, grad)
    assert all(x.isfinite().all() for x in again.values())


def no_queries_or_no_keys() -> None:
    for rows, keys in ((0, 3), (3, 0), (0, 0)):
        tensors = {"q": torch.randn(2, 4, rows, 8), **dict.fromkeys("kv", torch.randn(2, 2, keys, 8))}
        found = gradients(ours, "sparsemax", {}, tensors, {}, torch.randn(2, 4, rows, 8))
        assert all(found[what].shape == x.shape and not found[what].any() for what, x in tensors.items())
        assert found["out"].shape == (2, 4, rows, 8) and not found["out"].any()


def modules_run_through_it() -> None:
    """What a patched layer calls, any strides, inference, too; its learned options get gradients."""
    module = build_normalizer(MultiMaxConfig(normalizer="scalable_softmax", per_head=True), 4).to(_device())
    q, k, v = (torch.randn(2, 9, heads, 32)[..., ::2].transpose(1, 2).requires_grad_() for heads in (4, 2, 2))
    results = []
    for name in ("triton", "eager"):
        with backend(name):
            out = scaled_dot_product_multimax(module, q, k, v, is_causal=True)
            with torch.no_grad():
                assert torch.equal(out, scaled_dot_product_multimax(module, q, k, v, is_causal=True))
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v, *module.parameters()))))
    for found, expected in zip(*results):
        assert relative_error(found, expected) < TOLERANCE


def operators() -> None:
    value, beta, gamma = (x.requires_grad_() for x in torch.rand(3, 2) + 0.2)
    q, k, v = (torch.randn(1, 5, 2, 16).transpose(1, 2).requires_grad_() for _ in range(3))
    options = (
        torch.rand(5, 5) > 0.2,
        torch.randn(1, 2, 5, 5),
        None,
        None,
        None,
        torch.tensor([7]),
        0.1,
        True,
        4,
        1.0,
        2.0,
    )
    call = (value + 1, beta, gamma, KINDS.index("asentmax"), 1.5, 1.0, q, k, v, None, None, *options)
    torch.library.opcheck(torch.ops.hf_multimax.triton_row_attention_training.default, call)
    detached = [x.detach() if isinstance(x, Tensor) else x for x in call]
    torch.library.opcheck(torch.ops.hf_multimax.triton_row_attention.default, detached)


def _doubled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: x.double() for key, x in tensors.items()}


def _device() -> torch.device:
    return torch.empty(0).device


def _calls() -> dict[str, Callable[[], None]]:
    found = {}
    for i, name in enumerate(FUNCTIONS):
        # each function meets two of the calls, each call many functions
        chosen = dict(list(CALLS.items())[j % len(CALLS)] for j in (i, i + 1)) | MORE.get(name, {})
        found |= {
            f"{name}, {what}": functools.partial(agrees_with_float64, name, call) for what, call in chosen.items()
        }
    return found


CHECKS: dict[str, Callable[[], None]] = {
    **_calls(),
    **{
        f"{name} in {str(dtype).removeprefix('torch.')}": functools.partial(half_precision, name, dtype)
        for name, dtype in (("sparsemax", torch.bfloat16), ("entmax15", torch.float16), ("softmax1", torch.bfloat16))
    },
    "repeats bit by bit": repeats_bit_by_bit,
    "tiles without weight are left out": tiles_without_weight_are_left_out,
    **{
        f"dropout, {name}": functools.partial(dropout_is_the_same_in_both_passes, name)
        for name in ("entmax15", "sigmoid")
    },
    **{
        f"nothing and NaN, {name}": functools.partial(rows_that_see_nothing_or_what_is_broken, name)
        for name in ("sparsemax", "softmax1", "entmax")
    },
    "no queries or no keys": no_queries_or_no_keys,
    "modules": modules_run_through_it,
    "operators": operators,
}
