"""What the Triton functions of rows must do, as functions that need no test framework: tests/test_triton_rows.py runs
them in Triton's interpreter or on a GPU, ``python -m benchmarks.gpu`` on a GPU, both on PyTorch's default device.
"""

import functools
import random
import warnings
from collections.abc import Callable
from unittest import mock

import torch

from benchmarks.fuzz_rows import check, definition, drawn_options
from hf_multimax import MultiMax, backend, multimax, normalize
from hf_multimax.rows import choose, operators
from hf_multimax.rows.call import KINDS as ALL
from hf_multimax.rows.triton.arguments import KINDS
from tests.tolerances import RELATIVE, assert_close, assert_no_worse, relative_error

__all__ = ["CHECKS", "LARGE"]

Check = Callable[[], None]
#: the interpreter's chunks have 32 columns
SIZES = (1, 2, 5, 31, 32, 33, 65, 100)
LONG = (17, 1024, 2049, 40_000)


def options_of(kind: str) -> dict:
    options = drawn_options(random.Random(3), kind)[1]
    return {**options, "alpha": torch.tensor(1.3, requires_grad=True)} if kind == "entmax" else options


def leaves_of(options: dict) -> list[torch.Tensor]:
    found = [t for o in options.values() for t in (o if isinstance(o, tuple) else (o,))]
    return [t for t in found if torch.is_tensor(t) and t.requires_grad]


def computed(kind: str, x: torch.Tensor, mask: torch.Tensor | None) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Probabilities and the scores' gradients: Triton's, plain PyTorch's and those of float64."""
    options, grad, found = options_of(kind), torch.randn(x.shape), {}
    for name, dtype in (("triton", torch.float32), ("eager", torch.float32), ("exact", torch.float64)):
        with backend("triton" if name == "triton" else "eager"):
            scores = x.to(dtype).requires_grad_()
            called, its_options = (kind, options) if name == "triton" else definition(kind, options)
            p = normalize(called, scores, mask=mask, **its_options)
            found[name] = p.detach(), torch.autograd.grad(p, scores, grad.to(dtype))[0]
    return found


def random_calls(kind: str, calls: int, sizes: tuple[int, ...]) -> None:
    """Values, zeros and every gradient against float64, as the compiled functions on CPUs are tried."""
    for seed in range(calls):
        check(seed, kind, "triton", sizes)


def rows_of_every_sort(kind: str) -> None:
    """NaN and infinity break their own row, masked they do nothing; empty rows, one entry, ties, huge scores."""
    x = torch.randn(9, 40)
    x[0, 3], x[1, 35], x[2, 3], x[2, 39] = float("nan"), float("inf"), float("nan"), float("inf")
    x[3] = float("-inf")
    x[5] = x[5].round()
    x[6] = 0.25
    if kind != "multimax":  # whose sigma overflows
        x[7, ::7], x[7, 1] = 1e30, -1e30
    keep = torch.rand(9, 40) < 0.9
    keep[0, 3] = keep[1, 35] = True
    keep[2, 3] = keep[2, 39] = keep[4] = False
    keep[8] = torch.arange(40) == 37
    found = computed(kind, x, keep)
    p, dx = found["triton"]
    assert torch.equal(p.isnan(), found["eager"][0].isnan()) and p[:2].isnan().any(-1).all()
    assert not p[~keep].any() and not p[3:5].any() and not dx[3:5].any()
    for ours, plain, exact in zip(*found.values()):
        for row in (2, 5, 6, 7, 8):
            assert_no_worse(ours[row], plain[row], exact[row], f"{kind}, row {row}")


def any_layout(kind: str) -> None:
    """Other dimensions than the last, and masks that are not contiguous, change nothing."""
    options = {name: o.detach() if torch.is_tensor(o) else o for name, o in options_of(kind).items()}
    x, grad = torch.randn(2, 2, 1, 2, 33), torch.randn(2, 2, 1, 2, 33)
    mask = (torch.rand(2, 1, 33, 2) < 0.8).transpose(-1, -2)

    def both(x, dim, mask, grad):
        x = x.detach().requires_grad_()
        with backend("triton"):
            p = normalize(kind, x, dim, mask, **options)
            return p.detach(), torch.autograd.grad(p, x, grad)[0]

    whole = mask.expand_as(x)
    moved = both(x.movedim(-1, 1), 1, whole.movedim(-1, 1), grad.movedim(-1, 1))
    for first, second, third in zip(both(x, -1, mask, grad), both(x, -1, whole.contiguous(), grad), moved):
        assert torch.equal(first, second) and torch.equal(first, third.movedim(1, -1))


def modulators_of_heads(affine: bool, order: int) -> None:
    """Each head's scalars act on its rows alone, and get their gradients from them."""
    module = MultiMax(order, 3, init="paper", init_std=0.3, affine=affine)
    module.to(torch.empty(()).device)
    x, weights = torch.randn(2, 3, 7, 40), torch.randn(2, 3, 7, 40)
    found = {}
    for name, dtype in (("triton", torch.float32), ("eager", torch.float64)):
        module.zero_grad()
        with backend(name):
            p = module(x.to(dtype))
            (p * weights).sum().backward()
        found[name] = {"p": p, **{n: parameter.grad.clone() for n, parameter in module.named_parameters()}}
    for name, expected in found["eager"].items():  # the scalars' gradients are sums that cancel
        assert_close(found["triton"][name], expected, RELATIVE[torch.float32] if name == "p" else 1e-4, name)
    with backend("triton"):
        shared = multimax(x, module.ranges[0], module.ts[0], affine=affine and tuple(s[0] for s in module.affine))
    assert relative_error(shared[:, 0], found["triton"]["p"][:, 0]) < RELATIVE[torch.float32]


def options_of_heads() -> None:
    """Options with a value for each head, which keep gradients of their own."""
    alpha = torch.tensor([1.1, 1.5, 1.9])[:, None, None].requires_grad_()
    x, weights = torch.randn(2, 3, 4, 40), torch.randn(2, 3, 4, 40)
    found = {}
    for name in ("triton", "eager"):
        with backend(name):
            p = normalize("entmax", x, alpha=alpha)
            found[name] = p, torch.autograd.grad((p * weights).sum(), alpha)[0]
    for ours, expected in zip(found["triton"], found["eager"]):
        assert relative_error(ours, expected) < 1e-5


def where_they_run() -> None:
    """Everything but fusedmax, oscarmax, softpick, an alpha above 2 and float64; nothing where eager is asked for."""
    x, launch = torch.randn(2, 6), operators._launch()

    def runs(kind: str, name: str = "triton", dtype: torch.dtype = torch.float32, **options: object) -> bool:
        with mock.patch.object(operators, "_launch", return_value=mock.Mock(wraps=launch)) as calls, backend(name):
            normalize(kind, x.to(dtype), **(options or options_of(kind)))
        return calls.called

    assert all(runs(kind) for kind in KINDS)
    with backend("triton"):
        assert not any(choose._kernel(kind, x) for kind in set(ALL) - set(KINDS))
    assert runs("tsoftmax", dtype=torch.bfloat16) and not runs("tsoftmax", dtype=torch.float64)
    assert not runs("tsoftmax", "eager") and not runs("softpick")
    for kind in ("entmax", "asentmax"):
        assert runs(kind, alpha=2.0) and runs(kind, alpha=torch.tensor(2.0))
        assert not runs(kind, alpha=2.1) and not runs(kind, alpha=torch.tensor([[1.5], [2.1]]))


def operators_are_what_they_claim(kind: str) -> None:
    tensors: dict[str, torch.Tensor | None] = dict.fromkeys(("value", "beta", "gamma", "ranges", "ts", "affine"))
    x = torch.randn(2, 2, 3, 5, requires_grad=True)
    if kind == "multimax":
        tensors |= {name: torch.randn(2, 2, requires_grad=True) for name in ("ranges", "ts", "affine")}
    elif kind == "entmax":
        tensors["value"] = (1.2 + 0.5 * torch.rand(12)).requires_grad_()
    elif kind == "asentmax":
        tensors |= {name: torch.rand(12).requires_grad_() for name in ("beta", "gamma")}
    arguments = (x, *tensors.values(), torch.rand(x.shape) < 0.8, ALL.index(kind), 1.3, 0.1, True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.library.opcheck(torch.ops.hf_multimax.row_function_training.default, arguments)
        torch.library.opcheck(torch.ops.hf_multimax.row_function.default, arguments)


def compiles_as_one_graph(kind: str, compiler: str) -> None:
    torch._dynamo.reset()
    options, keep = options_of(kind), torch.rand(3, 40) < 0.8
    x, weights = torch.randn(3, 40, requires_grad=True), torch.randn(3, 40)

    def loss(x):
        return (normalize(kind, x, mask=keep, **options) * weights).sum()

    leaves = [x, *leaves_of(options)]
    with backend("triton"):
        expected = torch.autograd.grad(loss(x), leaves)
        found = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend=compiler)(x), leaves)
    for actual, reference in zip(found, expected):
        torch.testing.assert_close(actual, reference)


def long_rows(kind: str, n: int = 100_000) -> None:
    """A row's sums keep their digits."""
    x = torch.randn(2, n)
    x[1] *= 1e-4
    found = computed(kind, x, None)
    for ours, plain, exact in zip(*found.values()):
        for row, other, expected in zip(ours, plain, exact):
            assert relative_error(row, expected) <= 4 * relative_error(other, expected) + 4e-6


def _of_kinds(function: Callable[..., None], kinds: tuple[str, ...], *arguments: object) -> dict[str, Check]:
    name = function.__name__.replace("_", " ")
    return {f"{name}, {kind}": functools.partial(function, kind, *arguments) for kind in kinds}


CHECKS: dict[str, Check] = {
    **_of_kinds(random_calls, KINDS, 5, SIZES),
    **_of_kinds(rows_of_every_sort, KINDS),
    **_of_kinds(any_layout, ("sparsemax", "topk_softmax", "asentmax")),
    **{
        f"modulators of heads, order {order}, affine {affine}": functools.partial(modulators_of_heads, affine, order)
        for affine, order in ((True, 1), (False, 2), (False, 3))
    },
    "options of heads": options_of_heads,
    "where they run": where_they_run,
    **_of_kinds(operators_are_what_they_claim, ("multimax", "entmax", "asentmax")),
    **_of_kinds(compiles_as_one_graph, ("multimax", "rsoftmax"), "aot_eager"),
}
#: what only a GPU is fast enough for
LARGE: dict[str, Check] = {
    **{f"{name}, long": check for name, check in _of_kinds(random_calls, KINDS, 16, LONG).items()},
    **_of_kinds(long_rows, KINDS),
    **{f"{name}, inductor": c for name, c in _of_kinds(compiles_as_one_graph, ("entmax15",), "inductor").items()},
}
