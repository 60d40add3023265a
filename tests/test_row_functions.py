"""The compiled functions of rows: random calls against float64, where they run and where plain PyTorch does."""

import random
import warnings

import pytest
import torch
from tolerances import RELATIVE, relative_error

from benchmarks.fuzz_rows import UNNORMALIZED, check, drawn_options
from hf_multimax import MultiMax, backend, multimax, normalize
from hf_multimax.extension.library import load
from hf_multimax.rows import choose
from hf_multimax.rows.call import KINDS

pytestmark = pytest.mark.skipif(load()[0] is None, reason="no compiler")


def options_of(kind: str) -> dict:
    options = drawn_options(random.Random(3), kind)[1]
    return {**options, "alpha": torch.tensor(1.3, requires_grad=True)} if kind == "entmax" else options


@pytest.mark.parametrize("kind", KINDS)
def test_random_calls(kind):
    for seed in range(60):
        check(seed, kind)


def test_a_score_at_the_threshold_has_no_weight():
    """What random calls found: the rounding of the operator's float64 made it a weight of 1e-16, and a gradient."""
    x = torch.tensor([[0.0, 5.0, 0.0, 0.0, 4.0, 0.0]], requires_grad=True)
    p = normalize("fusedmax", x, lam=0.3)
    assert p.tolist() == [[0.0, 1.0, 0.0, 0.0, 0.0, 0.0]]
    assert not torch.autograd.grad(p, x, torch.randn(1, 6))[0].any()


def test_a_sigma_that_overflows_breaks_its_row_alone():
    x, ranges, ts = torch.tensor([[1e30, 1.0, 2.0], [0.0, 1.0, 2.0]]), torch.zeros(4), torch.full((4,), 0.1)
    x.requires_grad_()
    p = multimax(x, ranges, ts)
    with backend("eager"):
        assert torch.equal(multimax(x, ranges, ts).isnan(), p.isnan())
    assert p[0].isnan().all() and torch.autograd.grad(p.sum(), x)[0][1].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_masked_passes_no_gradient_whatever_it_holds(kind):
    options, keep, grad = options_of(kind), torch.rand(4, 20) < 0.7, torch.randn(4, 20)
    x, grads = torch.randn(4, 20), []
    for held in (0.0, -1.0, 1e30, float("nan")):
        scores = x.masked_fill(~keep, held).requires_grad_()
        grads += torch.autograd.grad(normalize(kind, scores, mask=keep, **options), scores, grad)
    assert all(torch.equal(found, grads[0]) for found in grads) and not grads[0][~keep].any()


@pytest.mark.parametrize("chosen", ["auto", "eager"])
def test_softpick_without_eps_of_scores_of_zero_is_zero(chosen):
    x = torch.tensor([[0.0, 0.0, 0.0], [0.0, -2.0, 0.0], [0.0, 1e-30, 0.0]], requires_grad=True)
    with backend(chosen):
        p = normalize("softpick", x, eps=0.0)
        (grad,) = torch.autograd.grad(p, x, torch.randn(3, 3))
    assert p.tolist() == [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    assert grad.isfinite().all() and not grad[:2].any()


@pytest.mark.parametrize("kind", KINDS)
def test_long_rows(kind):
    """A row's sums keep their digits."""
    x, grad = torch.randn(2, 100_000), torch.randn(2, 100_000)
    x[1] *= 1e-4
    options = options_of(kind)
    if kind == "fusedmax":
        options["lam"] = 0.05  # the plain definition takes minutes for what a large one fuses
    found, plain, exact = [], [], []
    for name, dtype, into in (
        ("auto", torch.float32, found),
        ("eager", torch.float32, plain),
        ("auto", torch.float64, exact),
    ):
        with backend(name):
            scores = x.to(dtype).requires_grad_()
            p = normalize(kind, scores, **options)
            into += [p, torch.autograd.grad(p, scores, grad.to(dtype))[0]]
    total = found[0].double().sum(-1)
    if kind not in UNNORMALIZED:
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-6)
    for ours, theirs, reference in zip(found, plain, exact):
        for row, other, expected in zip(ours, theirs, reference):
            assert relative_error(row, expected) <= 4 * relative_error(other, expected) + 4e-6


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_code_calls_them(kind):
    torch._dynamo.reset()
    options, keep = options_of(kind), torch.rand(3, 20) < 0.8
    x, weights = torch.randn(3, 20, requires_grad=True), torch.randn(3, 20)
    leaves = [x, *(t for o in options.values() for t in (o if isinstance(o, tuple) else (o,)) if torch.is_tensor(t))]

    def loss(x):
        return (normalize(kind, x, mask=keep, **options) * weights).sum()

    expected = torch.autograd.grad(loss(x), leaves)
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), leaves)
    for actual, reference in zip(found, expected):
        torch.testing.assert_close(actual, reference)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), loss(x))


@pytest.mark.parametrize("kind", ["multimax", "scalable_softmax", "asentmax", "fusedmax", "oscarmax"])
def test_the_operators_are_what_they_claim(kind):
    x = torch.randn(2, 3, 5, requires_grad=True)
    ranges = ts = affine = value = beta = gamma = None
    if kind == "multimax":
        ranges, ts, affine = (torch.randn(s, requires_grad=True) for s in ((2, 2), (2, 2), (2, 2)))
        x = torch.randn(2, 2, 3, 5, requires_grad=True)
    elif kind == "scalable_softmax":
        value = torch.rand(6).requires_grad_()
    elif kind == "asentmax":
        beta, gamma = (torch.rand(6).requires_grad_() for _ in range(2))
    mask = torch.rand(x.shape) < 0.8
    arguments = (x, value, beta, gamma, ranges, ts, affine, mask, KINDS.index(kind), 1.3, 0.1, False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.library.opcheck(torch.ops.hf_multimax.row_function_training.default, arguments)
        torch.library.opcheck(torch.ops.hf_multimax.row_function.default, arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_any_layout_and_number_of_threads(kind):
    options = {name: o.detach() if torch.is_tensor(o) else o for name, o in options_of(kind).items()}
    x, grad = torch.randn(2, 3, 2, 40, 300), torch.randn(2, 3, 2, 40, 300)
    mask = (torch.rand(3, 1, 300, 40) < 0.8).transpose(-1, -2)

    def both(x, dim, mask, grad):
        x = x.detach().requires_grad_()
        p = normalize(kind, x, dim, mask, **options)
        return p.detach(), torch.autograd.grad(p, x, grad)[0]

    expected = both(x, -1, mask, grad)
    torch.set_num_threads(2)  # set back by a fixture
    threaded = both(x, -1, mask.expand_as(x).contiguous(), grad)
    moved = both(x.movedim(-1, 1), 1, mask.expand_as(x).movedim(-1, 1), grad.movedim(-1, 1))
    for first, second, third in zip(expected, threaded, moved):
        assert torch.equal(first, second) and torch.equal(first, third.movedim(1, -1))


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_modulators_of_heads(affine, threads):
    """Each head's scalars act on its rows alone, and get their gradients from them."""
    torch.set_num_threads(threads)
    module = MultiMax(1, 3, init="paper", init_std=0.3, affine=affine)
    x, weights = torch.randn(2, 3, 50, 120), torch.randn(2, 3, 50, 120)
    (module(x) * weights).sum().backward()
    own = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    module.zero_grad()
    with backend("eager"):
        (module(x) * weights).sum().backward()
    for name, parameter in module.named_parameters():
        assert relative_error(own[name], parameter.grad) < 1e-5, name
    shared = multimax(x, module.ranges[0], module.ts[0], affine=module.affine)
    assert relative_error(shared[:, 0], module(x)[:, 0]) < RELATIVE[torch.float32]


def test_where_they_run(monkeypatch):
    """Anywhere but where plain PyTorch is asked for or alone can do it; and the results agree."""
    calls = []
    compute = choose.compute
    monkeypatch.setattr(choose, "compute", lambda *arguments: calls.append(1) or compute(*arguments))
    x, r = torch.randn(2, 3, 4, 6), torch.randn(4)

    def runs(function) -> bool:
        calls.clear()
        function()
        return bool(calls)

    for function in (lambda x: normalize("evsoftmax", x), lambda x: multimax(x, r, r), MultiMax(init="paper")):
        assert runs(lambda f=function: f(x)) and runs(lambda f=function: f(x.bfloat16()))
        assert not runs(lambda f=function: f(x.double()))
        for name in ("eager", "tiled"):
            with backend(name):
                assert not runs(lambda f=function: f(x))
        with backend("native"):
            assert runs(lambda f=function: f(x))
        assert not runs(lambda f=function: torch.func.vmap(f)(x))
    assert not runs(lambda: torch.func.grad(lambda x: normalize("evsoftmax", x).square().sum())(x))
    assert not runs(lambda: torch.func.jvp(lambda x: normalize("softmax", x), (x,), (x,)))
    monkeypatch.setattr(choose, "load", lambda: (None, "no compiler"))
    assert not runs(lambda: normalize("entmax15", x))


def test_a_second_derivative_is_refused():
    x = torch.randn(3, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivative.*eager"):
        torch.autograd.grad(normalize("softmax", x).square().sum(), x, create_graph=True)
    with backend("eager"):
        (grad,) = torch.autograd.grad(normalize("softmax", x).square().sum(), x, create_graph=True)
    assert torch.autograd.grad(grad.sum(), x)[0].isfinite().all()
