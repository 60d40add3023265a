"""What every attention backend is tested on: a plain PyTorch reference, calls with every feature, comparisons."""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

from hf_multimax.attention.call import make_call
from hf_multimax.functional import masked_softmax, modulate
from tests.tolerances import ATTENTION, RELATIVE, assert_close, assert_draws_no_worse, assert_no_worse, relative_error


def reference(
    q, k, v, ranges, ts, *, mask=None, bias=None, affine=None, causal=False, window=None, scale=None, softcap=None,
    sinks=None, dropout=None,
) -> Tensor:  # fmt: skip
    """The definition of an attention call, in the inputs' own type; ``dropout`` holds the factors of the weights."""
    group, (rows, keys) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2])
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    x = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    if bias is not None:
        x = x + bias
    x = modulate(x, ranges, ts, affine)
    row, key = torch.arange(rows)[:, None] + keys - rows, torch.arange(keys)
    keep = key <= row if causal else torch.ones(rows, keys, dtype=torch.bool)
    if window is not None:
        keep = keep & (key > row - window) & (key < row + window)
    if mask is not None and mask.dtype == torch.bool:
        keep = keep & mask
    elif mask is not None:
        masked = mask <= torch.finfo(mask.dtype).min / 2
        x, keep = x + mask.masked_fill(masked, 0.0).to(x.dtype), keep & ~masked
    keep = keep.expand(x.shape)
    if sinks is None:
        p = masked_softmax(x, -1, keep)
    else:
        sink = sinks[:, None, None].expand(*x.shape[:3], 1)
        p = masked_softmax(torch.cat((x, sink), -1), -1, torch.cat((keep, keep.new_ones(sink.shape)), -1))[..., :-1]
    return (p if dropout is None else p * dropout) @ v


@dataclass
class Case:
    """One call: shapes, and which features it has. ``build`` makes its tensors."""

    name: str
    shape: tuple[int, int, int, int, int] = (2, 2, 2, 33, 33)  # batch, heads, kv heads, queries, keys
    dims: tuple[int, int] = (16, 16)
    order: int = 2
    per_head: bool = False
    affine: bool = False
    sinks: bool = False
    mask: str | None = None
    bias: tuple[int, ...] | None = None
    spread: float = 1.0  # standard deviation of the scores
    slope: float = 1.0  # |ts| at most
    threshold: float = 1.0
    options: dict = field(default_factory=dict)

    def build(self, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], dict[str, object]]:
        """(the tensors that need gradients by name, the rest of the keywords)."""
        batch, heads, kv_heads, rows, keys = self.shape
        tensors = {
            "q": torch.randn(batch, heads, rows, self.dims[0]) * self.spread,
            "k": torch.randn(batch, kv_heads, keys, self.dims[0]),
            "v": torch.randn(batch, kv_heads, keys, self.dims[1]),
        }
        tensors = {name: x.to(dtype) for name, x in tensors.items()}
        parameters = (heads, 2 * self.order) if self.per_head else (2 * self.order,)
        tensors["ranges"] = torch.randn(parameters) * self.threshold
        tensors["ts"] = (torch.rand(parameters) * 2 - 1) * self.slope
        if self.affine:
            shape = (heads,) if self.per_head else ()
            tensors["affine_scale"], tensors["affine_shift"] = 1 + 0.2 * torch.randn(shape), 0.3 * torch.randn(shape)
        if self.sinks:
            tensors["sinks"] = torch.randn(heads)
        if self.bias is not None:
            tensors["bias"] = torch.randn(self.bias)
        options = dict(self.options)
        if self.mask is not None:
            mask = MASKS[self.mask](batch, rows, keys)
            (tensors if self.mask == "additive_grad" else options)["mask"] = mask
        return tensors, options


def _boolean(batch: int, rows: int, keys: int) -> Tensor:
    mask = torch.rand(batch, 1, rows, keys) > 0.3
    mask[:, :, 0] = False  # rows that see nothing
    mask[..., -1, :] = False
    return mask


def _additive(batch: int, rows: int, keys: int) -> Tensor:
    return torch.randn(batch, 1, rows, keys).masked_fill(~_boolean(batch, rows, keys), torch.finfo(torch.float32).min)


MASKS: dict[str, Callable[[int, int, int], Tensor]] = {
    "boolean": _boolean,
    "padding": lambda batch, rows, keys: torch.arange(keys) < torch.arange(1, batch + 1)[:, None, None, None] * 7,
    "additive": _additive,
    "additive_grad": _additive,
    "half": lambda *shape: _additive(*shape).clamp(min=-65504.0).half(),
}

CASES = [
    Case("plain"),
    Case("order1", order=1),
    Case("order3", order=3, slope=0.3),
    Case("one key", (1, 2, 2, 1, 1)),
    Case("17", (1, 2, 1, 17, 17), options={"causal": True}),
    Case("129", (1, 2, 1, 129, 129), order=3, slope=0.3, options={"causal": True}),
    Case("1000", (1, 1, 1, 1000, 1000), options={"causal": True}),
    Case("1000 full", (1, 1, 1, 1000, 1000)),
    Case("decode", (2, 4, 2, 1, 1000), per_head=True),
    Case("few queries", (1, 4, 1, 3, 700), options={"causal": True}),
    Case("cache", (1, 4, 2, 40, 300), options={"causal": True}),
    Case("gqa per head", (2, 6, 2, 40, 50), (24, 10), per_head=True),
    Case("odd dims", (2, 2, 2, 19, 35), (7, 13)),
    Case("wide", (1, 2, 1, 40, 40), (80, 136)),
    Case("boolean", mask="boolean"),
    Case("boolean causal", (2, 4, 2, 33, 70), mask="boolean", options={"causal": True}),
    Case("padding", mask="padding"),
    Case("additive", mask="additive"),
    Case("half mask", mask="half"),
    Case("bias", bias=(1, 2, 33, 33)),
    Case("bias per batch", bias=(2, 1, 33, 33), options={"causal": True}),
    Case("bias per key", bias=(33,)),
    Case("bias gqa mask", (2, 4, 2, 33, 33), bias=(1, 4, 33, 33), mask="padding"),
    Case("affine", affine=True, order=1),
    Case("affine per head", affine=True, per_head=True, bias=(1, 2, 33, 33)),
    Case("softcap", options={"softcap": 3.0, "scale": 0.5}),
    Case("sinks", sinks=True),
    Case("sinks decode", (1, 2, 1, 1, 600), sinks=True),
    Case("sinks boolean", sinks=True, mask="boolean"),
    Case("window", (1, 2, 2, 200, 300), options={"causal": True, "window": 37}),
    Case("window two-sided", (1, 2, 2, 150, 150), options={"window": 20}),
    Case("window 1", options={"causal": True, "window": 1}),
    Case("all", (2, 4, 2, 65, 130), per_head=True, affine=True, sinks=True, mask="additive", bias=(1, 4, 65, 130),
         options={"causal": True, "window": 50, "softcap": 4.0}),
    Case("large scores", (2, 2, 2, 129, 129), spread=20.0),
    Case("steep", (2, 2, 2, 129, 129), spread=20.0, slope=5.0, threshold=100.0),
    Case("far thresholds", (2, 4, 4, 129, 129), slope=5.0, threshold=100.0, affine=True),
]  # fmt: skip


def through(kernel: ModuleType) -> Callable[..., Tensor]:
    """``attention(q, k, v, ranges, ts, **features)`` by one backend; ValueError for what it does not support."""

    def attention(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, ts: Tensor, **features: object) -> Tensor:
        call = make_call(q, k, v, ranges, ts, **features)
        missing = kernel.unsupported(call)
        if missing:
            raise ValueError(f"the backend does not support {missing}")
        return kernel.attention(call)

    return attention


def run(attention: Callable, tensors: dict[str, Tensor], options: dict, grad: Tensor) -> dict[str, Tensor]:
    """The output and the gradient of every tensor in ``tensors``, by name."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    arguments = dict(leaves)
    if "affine_scale" in arguments:
        arguments["affine"] = arguments.pop("affine_scale"), arguments.pop("affine_shift")
    positional = [arguments.pop(name) for name in ("q", "k", "v", "ranges", "ts")]
    out = attention(*positional, **arguments, **options)
    found = torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype))
    return {"out": out.detach(), **dict(zip(leaves, found))}


def doubled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same in float64."""
    return {name: x.double() for name, x in tensors.items()}


def check(attention: Callable, case: Case, dtype: torch.dtype = torch.float32, draws: int = 24) -> None:
    """Compare ``attention`` with the float64 reference, and with what the plain computation of the same type errs.

    Where large scores or slopes let rounding decide, over ``draws`` of the call.
    """
    if case.spread == 1 and case.slope <= 1:
        actual, plain, exact = _results(attention, case, dtype)
        for name in actual:
            _check_tensor(actual[name], plain[name], exact[name], f"{case.name}: {name}", ATTENTION.get(name, 1e-5))
        return
    errors: dict[str, tuple[list[float], list[float]]] = {}
    for _ in range(draws):
        actual, plain, exact = _results(attention, case, dtype)
        for name in actual:
            both = errors.setdefault(name, ([], []))
            both[0].append(relative_error(actual[name], exact[name]))
            both[1].append(relative_error(plain[name], exact[name]))
    for name, both in errors.items():
        assert_draws_no_worse(*both, f"{case.name}: {name}")


def check_half(attention: Callable, case: Case, dtype: torch.dtype) -> None:
    """Compare one draw of an ordinary call in half precision with float64.

    Weights and score gradients are rounded before the products, and what is stored in half precision once more. The
    gradients of parameters, masks and biases, which are float32, are as good as in float32.
    """
    actual, _, exact = _results(attention, case, dtype)
    for name, found in actual.items():
        tolerance = 4 * RELATIVE[dtype] if found.dtype == dtype else ATTENTION.get(name, 1e-5)
        if exact[name].abs().max() < 1e-6:  # nothing but rounding, as the gradient of the only key
            assert found.abs().max() < 1e-5, f"{case.name}: {name}"
        else:
            assert_close(found, exact[name], tolerance, f"{case.name}: {name}")


def _results(attention: Callable, case: Case, dtype: torch.dtype) -> tuple[dict[str, Tensor], ...]:
    """The results of one draw of the call: of ``attention``, of the plain computation and of the float64 reference."""
    tensors, options = case.build(dtype)
    grad = torch.randn(*tensors["q"].shape[:3], case.dims[1]).to(dtype)
    actual = run(attention, tensors, options, grad)
    for name, value in actual.items():
        assert value.dtype == (dtype if name == "out" else tensors[name].dtype), name
        assert value.isfinite().all(), name
    exact = run(reference, doubled(tensors), options, grad.double())
    return actual, run(_in_type(dtype), tensors, options, grad), exact


def _check_tensor(actual: Tensor, plain: Tensor, exact: Tensor, what: str, tolerance: float) -> None:
    """One result of an ordinary call: within ``tolerance`` if it is float32, else no worse than the plain one."""
    if actual.dtype == torch.float32 and relative_error(actual, exact) <= tolerance:
        return
    if exact.abs().max() < 1e-6:  # nothing but rounding, as the gradient of v's only key
        assert actual.abs().max() < 1e-5, what
        return
    assert_no_worse(actual, plain, exact, what)


def _in_type(dtype: torch.dtype) -> Callable:
    """The plain computation as a model of type ``dtype`` does it: products in that type, weights in float32."""
    if dtype == torch.float32:
        return reference

    def plain(q, k, v, *rest, **options):
        return reference(q.float(), k.float(), v.float(), *rest, **options).to(dtype)

    return plain
