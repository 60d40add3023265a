"""Try native attention through the functions of rows on random calls, against eager attention in float64.

    python -m benchmarks.fuzz_attention [--calls 500] [--first 0] [--only entmax]

A call is drawn from its seed: function, options (tensors for each head, too), shapes, type, layout, and which of mask,
bias, causality, window, softcap and grouped heads it has; scores are usual, peaked, tied, or of queries that are all
zero. The result and every gradient may err by 4 times what eager attention errs in float32 and what a relative change
of the queries by 1e-6 makes of them in float64, plus the rounding of the type. What fails is printed with its seed.
"""

import random
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.fuzz_rows import definition, drawn_options, try_calls
from hf_multimax import normalize
from hf_multimax.attention.call import Call, make_call
from hf_multimax.attention.eager import eager_attention
from hf_multimax.attention.native import backend as native_backend
from hf_multimax.normalizers.registry import get_normalizer
from hf_multimax.rows.call import KINDS
from hf_multimax.rows.function import Rowwise

__all__ = ["FUNCTIONS", "check", "eager", "gradients", "main", "native", "through"]

FUNCTIONS = tuple(kind for kind in KINDS if kind != "multimax")
#: queries and keys: one of each, few, what fills vectors, panels and blocks of rows or just not, thousands
LENGTHS = (1, 2, 5, 16, 17, 33, 64, 100, 130)


def main() -> None:
    try_calls(__doc__, check, FUNCTIONS, calls=500)


def check(seed: int, only: str | None = None) -> None:
    """Raises AssertionError where the call of that seed is worse than it may be."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    name, options = drawn_options(rng, only or rng.choice(FUNCTIONS))
    tensors, features = drawn_call(rng)
    heads, dtype = tensors["q"].shape[1], tensors["q"].dtype
    if rng.random() < 0.5:  # options of their own for every head
        options = {key: x.detach().expand(heads).clone() if torch.is_tensor(x) else x for key, x in options.items()}
    tensors |= {key: x.detach() for key, x in options.items() if torch.is_tensor(x)}
    numbers = {key: x for key, x in options.items() if not torch.is_tensor(x)}
    grad = torch.randn(*tensors["q"].shape[:3], tensors["v"].shape[3]).to(dtype)
    torch.set_num_threads(rng.choice((1, 1, 2)))
    ours = gradients(native, name, numbers, tensors, features, grad)
    torch.set_num_threads(1)
    plain = gradients(eager, name, numbers, {key: x.float() for key, x in tensors.items()}, features, grad.float())
    double = {key: x.double() for key, x in tensors.items()}
    exact = gradients(eager, name, numbers, double, features, grad.double())
    moved = double | {"q": double["q"] * (1 + 1e-6 * torch.randn_like(double["q"]))}
    moved = gradients(eager, name, numbers, moved, features, grad.double())
    text = f"{name} {options} { ({key: tuple(x.shape) for key, x in tensors.items()}) } {dtype} {features}"
    for what, found in ours.items():
        reference, rounding = exact[what], torch.finfo(found.dtype).eps
        error, theirs, move = ((x.double() - reference).abs().max().item() for x in (found, plain[what], moved[what]))
        # the gradient of an option, or of a bias that rows share, is a sum over the rows; what r-softmax passes to the
        # largest score, over the keys
        shared = what == "bias" and found.numel() < grad.shape[:3].numel() * tensors["k"].shape[2]
        summed = shared or tensors.get(what, grad).ndim < 4 or name in ("rsoftmax", "tsoftmax")
        size = max(reference.abs().max().item(), 1.0 if summed else 0.1)
        if name in ("fusedmax", "oscarmax"):  # means of a group's gradients, which may cancel
            size = max(size, (grad.abs().max() * tensors["v"].abs().max()).item())
        allowed = 4 * (theirs + move) + 8 * rounding * size
        assert error <= allowed, f"{what} errs by {error:.3g}, allowed are {allowed:.3g}: {text}"


def drawn_call(rng: random.Random) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors that get gradients, and the other features of a call."""
    rows, keys = rng.choice((1, *LENGTHS)), rng.choice((*LENGTHS, 700, 1500))
    kv_heads, group, batch = rng.choice((1, 2)), rng.choice((1, 1, 3)), rng.choice((1, 2))
    dim, value_dim = rng.choice(((16, 16), (64, 64), (7, 13), (40, 80)))
    dtype = rng.choice((torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float16))
    features: dict[str, Any] = {}
    if rng.random() < 0.5 and rows <= keys:
        features["causal"] = True
    if rng.random() < 0.2 and rows <= keys:
        features["window"] = rng.choice((1, 5, 40))
    if rng.random() < 0.15:
        features["softcap"] = rng.choice((2.0, 10.0))
    shapes = (batch, kv_heads * group, rows, dim), (batch, kv_heads, keys, dim), (batch, kv_heads, keys, value_dim)
    q, k, v = (torch.randn(shape) for shape in shapes)
    kind = rng.randrange(6)
    if kind == 1:
        q = q * rng.choice((4.0, 10.0))
    elif kind == 2:  # ties: sums of small integers are exact
        q, k, features["scale"] = q.round(), k.round(), 0.25
    elif kind == 3:
        q = torch.zeros_like(q)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    if rng.random() < 0.3:  # heads behind the sequence
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    tensors = {"q": q, "k": k, "v": v}
    if rng.random() < 0.25:
        tensors["bias"] = torch.randn(
            rng.choice((1, batch)), rng.choice((1, kv_heads * group)), rng.choice((1, rows)), keys
        )
    mask = rng.randrange(6)
    keep = torch.rand(batch, 1, rows, keys) < rng.choice((0.2, 0.8))
    if mask == 1:
        keep[:, :, rng.randrange(rows)] = False  # a row that sees nothing
        features["mask"] = keep
    elif mask == 2:
        features["mask"] = torch.arange(keys) < torch.randint(1, keys + 1, (batch, 1, 1, 1))
    elif mask == 3:
        added = torch.randn(keep.shape).to(dtype)
        features["mask"] = added.masked_fill(~keep, torch.finfo(dtype).min)
    return tensors, features


def gradients(
    attention, name: str, numbers: dict[str, Any], tensors: dict[str, Tensor], features: dict[str, Any], grad: Tensor
) -> dict[str, Tensor]:
    """The result and the gradient of every tensor, by name; a bias among the features gets none."""
    leaves = {key: x.detach().requires_grad_() for key, x in tensors.items()}
    own = {key: x for key, x in leaves.items() if key not in ("q", "k", "v", "bias")}
    q, k, v = (leaves[key] for key in ("q", "k", "v"))
    call = make_call(q, k, v, None, None, **{"bias": leaves.get("bias"), **features})
    out = attention(call, name, {**numbers, **own})
    return {"out": out.detach(), **dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad)))}


def through(backend: ModuleType) -> Callable[..., Tensor]:
    """Attention by the functions of rows of a backend, as :func:`gradients` takes it."""

    def attention(call: Call, name: str, options: dict[str, Any]) -> Tensor:
        function = get_normalizer(name).function
        training = {} if function.takes_training else {"training": None}
        compiled = function.compiled(**{key: x for key, x in options.items() if key not in training})
        rows = Rowwise(name, lambda: None, compiled)
        assert (missing := backend.rowwise_unsupported(rows, call)) is None, missing
        return backend.rowwise_attention(rows, call)

    return attention


#: what is tried
native = through(native_backend)


def eager(call, name: str, options: dict[str, Any]) -> Tensor:
    """The definition, in the call's own type."""

    def aligned(x: Any) -> Any:
        return x[:, None, None] if torch.is_tensor(x) and x.ndim else x

    name, options = definition(name, {key: aligned(x) for key, x in options.items()})
    return eager_attention(call, lambda x: x, lambda x, dim, keep: normalize(name, x, dim, keep, **options))[0]


if __name__ == "__main__":
    main()
