"""Try the compiled functions of rows on random calls against float64, and against plain PyTorch's own error there.

    python -m benchmarks.fuzz_rows [--calls 2000] [--first 0] [--only entmax]

A call is drawn from its seed: function, options, shape, type, mask and the kind of scores (usual, nearly equal, equal,
tied, with huge entries, sorted). Values and gradients may err by 4 times what plain PyTorch errs in float32, plus 4
units of rounding where those count; zeros must be those of float64. What fails is printed with its seed.
"""

import argparse
import importlib.util
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_multimax import backend, normalize
from hf_multimax.extension.library import load
from hf_multimax.rows.call import KINDS

__all__ = ["UNNORMALIZED", "check", "definition", "drawn_options", "main", "try_calls"]

SIZES = (1, 2, 3, 5, 15, 16, 17, 31, 32, 33, 64, 65, 100, 257, 1000, 2049)
EPS = torch.finfo(torch.float32).eps
#: below it float32 loses digits, and what is computed in it may be 0
SMALLEST = 2 * torch.finfo(torch.float32).tiny
#: whose weights need not sum to one
UNNORMALIZED = ("softmax1", "sigmoid", "softpick")


def main() -> None:
    torch.set_num_threads(1)
    try_calls(__doc__, check, KINDS, calls=2000)


def try_calls(description: str | None, check: Callable[..., None], functions: Sequence[str], calls: int) -> None:
    """The command line of a script of random calls: prints the seeds that fail, and exits with 1 if there are any."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=calls)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--only", choices=functions, help="one function")
    arguments = parser.parse_args()
    if load()[0] is None:
        raise SystemExit(f"there is nothing to try: {load()[1]}")
    failed = 0
    for seed in range(arguments.first, arguments.first + arguments.calls):
        try:
            check(seed, arguments.only)
        except AssertionError as error:
            failed += 1
            print(f"seed {seed}: {error}", flush=True)
    print(f"{arguments.calls} calls, {failed} failed")
    if failed:
        raise SystemExit(1)


def drawn_options(rng: random.Random, only: str | None = None) -> tuple[str, dict[str, Any]]:
    """A function and its options; tensors for what can be learned, now and then."""
    name = only or rng.choice(KINDS)

    def maybe_tensor(value: float) -> float | Tensor:
        return torch.tensor(value, requires_grad=True) if rng.random() < 0.4 else value

    options: dict[str, Any] = {
        "softmax": lambda: {"temperature": rng.choice((0.1, 0.7, 1.0, 5.0))},
        "scalable_softmax": lambda: {"s": maybe_tensor(rng.choice((0.1, 0.43, 1.0)))},
        "entmax": lambda: {"alpha": maybe_tensor(rng.choice((1.0, 1.01, 1.2, 1.25, 4 / 3, 1.5, 1.7, 2.0, 2.5, 4.0)))},
        "asentmax": lambda: {
            "alpha": rng.choice((1.0, 1.25, 1.5, 2.0)),
            "beta": maybe_tensor(rng.choice((-0.1, 0.2, 0.9))),
            "gamma": maybe_tensor(rng.choice((-0.7, 0.0, 0.4))),
        },
        "rsoftmax": lambda: {"sparsity": maybe_tensor(rng.choice((0.0, 0.3, 0.5, 0.9, 1.0)))},
        "tsoftmax": lambda: {"t": rng.choice((0.01, 1.0, 4.0, 100.0))},
        "topk_softmax": lambda: {"k": rng.choice((1, 2, 7, 32, 5000))},
        "fusedmax": lambda: {"lam": rng.choice((0.0, 0.05, 0.31, 0.97, 10.3))},
        "oscarmax": lambda: {"alpha": rng.choice((0.0, 0.1)), "beta": rng.choice((None, 0.011, 0.5))},
        "adaptive_temperature": lambda: {"training": rng.random() < 0.2},
        "evsoftmax": lambda: {"training": rng.random() < 0.3},
        "softpick": lambda: {"eps": rng.choice((0.0, 1e-8, 1e-3))},
    }.get(name, dict)()
    if name == "multimax":
        order = rng.choice((1, 2, 2, 3))
        options = {
            "ranges": torch.tensor([rng.gauss(0, 1) for _ in range(2 * order)], requires_grad=True),
            "ts": torch.tensor(
                [0.2 * rng.gauss(0, 1) / (i // 2 + 1) ** 3 for i in range(2 * order)], requires_grad=True
            ),
        }
        if order == 1 and rng.random() < 0.5:
            options["affine"] = tuple(torch.tensor(rng.gauss(1, 0.3), requires_grad=True) for _ in range(2))
    return name, options


def definition(name: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A function that plain PyTorch computes: where the entmax package is missing, entmax of that alpha."""
    alpha = {"sparsemax": 2.0, "entmax15": 1.5}.get(name)
    return (name, options) if alpha is None or importlib.util.find_spec("entmax") else ("entmax", {"alpha": alpha})


def drawn_scores(rng: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    x = torch.randn(shape)
    kind = rng.randrange(8)
    if kind == 1:
        x = x * rng.choice((1e-6, 1e-3, 0.1))
    elif kind == 2:
        x = torch.full(shape, rng.choice((0.0, 3.3, -100.0)))
    elif kind == 3:
        x = x.mul(2).round()
    elif kind == 4:
        x = torch.where(torch.rand(shape) < 0.3, -(10.0 ** torch.randint(1, 31, shape)), x)
    elif kind == 5:
        x = (3 * x).sort(-1, descending=rng.random() < 0.5).values
    elif kind == 6:
        x = x * rng.choice((3.0, 10.0))
    most = torch.finfo(dtype).max * 0.9
    return x.clamp(-most, most).to(dtype)


def drawn_mask(rng: random.Random, shape: tuple[int, ...]) -> Tensor | None:
    kind = rng.randrange(5)
    if kind < 2:
        return None
    keep = torch.rand(shape) < rng.choice((0.2, 0.8))
    if kind == 3:
        keep = keep[..., :1, :]
    elif kind == 4:
        keep = (torch.rand((*shape[:-2], shape[-1], shape[-2])) < 0.7).transpose(-1, -2)
    return keep


def check(seed: int, only: str | None = None, kernel: str = "auto", sizes: Sequence[int] = SIZES) -> None:
    """Raises AssertionError where the call of that seed is worse than it may be.

    Args:
        only: one function.
        kernel: the backend that is tried.
        sizes: of rows, one of which is drawn.
    """
    rng = random.Random(seed)
    torch.manual_seed(seed)
    name, options = drawn_options(rng, only)
    shape = (*((rng.randint(1, 3),) if rng.random() < 0.5 else ()), rng.randint(1, 4), rng.choice(sizes))
    dtype = rng.choice((torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float16))
    x, mask, grad = drawn_scores(rng, shape, dtype), drawn_mask(rng, shape), torch.randn(shape).to(dtype)
    text = f"{name} {options} {tuple(shape)} {dtype}"
    with backend(kernel):
        ours = _call(name, x, mask, options, grad)
    with backend("eager"):
        defined, its_options = definition(name, options)
        plain = _call(defined, x.float(), mask, its_options, grad.float())
        exact = _call(defined, x.double(), mask, its_options, grad.double())
    p, q = ours["p"].double(), exact["p"]
    assert torch.equal(p.isnan(), plain["p"].isnan()) and not (p < 0).any(), f"{text}: not a distribution"
    if p.isnan().any():  # sigma of huge scores
        return
    if mask is not None:
        assert (p[~mask.expand(shape)] == 0).all(), f"{text}: masked entries have weight"
    if _jumps(name, options, x, mask, exact["p"], plain["p"]):
        return
    _check_zeros(name, p, q, dtype, text)
    rounding = EPS if dtype == torch.float32 else torch.finfo(dtype).eps
    for what, found in ours.items():
        if found is None:
            continue
        reference, theirs = exact[what].double(), plain[what].double()
        if not theirs.isfinite().all() or reference.abs().max() > torch.finfo(dtype).max:
            continue
        # sums of many terms that cancel are as exact as their terms are large
        size = max(
            reference.abs().max().item(),
            {"p": 1e-3, "x": _slope(name, x, q)}.get(what, p.numel() / shape[-1]),
        )
        error = (found.double() - reference).abs().max().item()
        allowed = 4 * (theirs - reference).abs().max().item() + 4 * rounding * size * _condition(name, options, x, q)
        assert error <= allowed, f"{text}: {what} errs by {error:.3g}, allowed are {allowed:.3g}"


def _call(name: str, x: Tensor, mask: Tensor | None, options: dict[str, Any], grad: Tensor) -> dict[str, Tensor | None]:
    x = x.detach().requires_grad_()
    p = normalize(name, x, mask=mask, **options)
    leaves = {"x": x}
    for key, value in options.items():
        for i, tensor in enumerate(value if isinstance(value, tuple) else (value,)):
            if isinstance(tensor, Tensor):
                leaves[f"{key}{i}"] = tensor
    found = torch.autograd.grad(p, list(leaves.values()), grad, allow_unused=True)
    return {"p": p.detach(), **dict(zip(leaves, found))}


def _condition(name: str, options: dict[str, Any], x: Tensor, q: Tensor) -> float:
    """How many units of rounding a weight may move by one unit of its score's: as large as scores that have weight."""
    z = x.double() - x.double().amax(-1, keepdim=True)
    seen = z[(q > 1e-7) & z.isfinite()].abs()
    spread = seen.max().item() if seen.numel() else 0.0
    if name in ("multimax", "oscarmax", *UNNORMALIZED):  # which act on the scores themselves
        spread = max(spread, x.double()[q > 1e-7].abs().max().item() if (q > 1e-7).any() else 0.0)
    alpha = torch.as_tensor(options.get("alpha", 1.5)).item()
    steep = max(1.0, alpha) if name in ("entmax", "asentmax") else 1.0
    return (1 + min(spread, 1e4) / options.get("temperature", 1.0)) * steep**3


def _slope(name: str, x: Tensor, q: Tensor) -> float:
    """How large the terms of a score's gradient are that cancel."""
    if name in ("rsoftmax", "tsoftmax"):
        return 1.0
    if name != "softpick":
        return 0.1
    slopes = q / -torch.expm1(-x.double())  # e^x over the denominator: scores near 0 have steep weights
    return max(0.1, slopes[q > 0].max().item() if (q > 0).any() else 0.0)


def _jumps(name: str, options: dict[str, Any], x: Tensor, mask: Tensor | None, exact: Tensor, plain: Tensor) -> bool:
    """Whether plain float32 leaves out other entries than float64, where what is left out is not small."""
    return bool(((exact == 0) != (plain.double() == 0)).logical_and((exact > 1e-4) | (plain > 1e-4)).any())


def _check_zeros(name: str, p: Tensor, q: Tensor, dtype: torch.dtype, text: str) -> None:
    """Zeros are float64's, but for scores within 1e-6 of a threshold and weights that the type cannot hold."""
    near = {"entmax15": 1e-12, "asentmax": 1e-5, "entmax": 1e-6, "rsoftmax": 1e-6, "tsoftmax": 1e-6}.get(name, 2e-6)
    if name in (
        *UNNORMALIZED,
        "softmax",
        "scalable_softmax",
        "adaptive_temperature",
        "evsoftmax",
        "topk_softmax",
        "multimax",
    ):
        near = SMALLEST
    near = max(near, torch.finfo(dtype).smallest_normal * 2, SMALLEST)
    differ = (p == 0) != (q == 0)
    assert not (differ & (torch.maximum(p, q) > near)).any(), f"{text}: other zeros"
    if name in UNNORMALIZED:
        return
    total, kept = p.sum(-1), (q > 0).any(-1)
    most = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps * 2
    assert ((total - 1).abs()[kept] <= most + math.sqrt(p.shape[-1]) * 1e-7).all(), f"{text}: sums to {total}"


if __name__ == "__main__":
    main()
