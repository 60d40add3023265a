"""Normalizers on scores that are huge, equal or all but equal, against exact arithmetic and against float64."""

import math
import random
from fractions import Fraction

import exact_normalizers as exact
import mpmath
import pytest
import torch

from hf_multimax import normalize
from hf_multimax.normalizers import registered_normalizers

FLOAT = torch.finfo(torch.float32)
HUGE = (1e4, -1e4, 1e9, -1e9, 1e20, -1e20, 1e30, -1e30, -1e38)


def row(rng: random.Random, n: int) -> torch.Tensor:
    """A row of some kind: usual, with huge entries, equal, all but equal, with lowest entries, tiny, spread."""
    x = [rng.gauss(0, 1) for _ in range(n)]
    kind = rng.randrange(7)
    if kind == 1:
        x = [rng.choice(HUGE) if rng.random() < 0.4 else value for value in x]
    if kind == 2:
        x = [rng.choice((0.0, 1.0, 3.3, -100.0, 1e20))] * n
    if kind == 3:
        base = rng.choice((1.0, 100.0, -200.0, 0.1))
        x = [base * (1 + rng.randrange(3) * FLOAT.eps) for _ in x]
    if kind == 4:
        x = [rng.choice((-1e9, -1e20, -1e30)) if rng.random() < 0.5 else value for value in x]
    factor = {5: rng.choice((1e-3, 1e-6, 1e-20)), 6: rng.choice((3.0, 10.0, 30.0))}.get(kind, 1.0)
    return torch.tensor([value * factor for value in x])


def fractions(x: torch.Tensor) -> list[Fraction]:
    return [Fraction(value) for value in x.tolist()]


def compare(found: torch.Tensor, exactly: list, what: str) -> None:
    worst = max(abs(float(want) - value) for want, value in zip(exactly, found.tolist()))
    assert worst < 1e-5, f"{what}: {worst}"


@pytest.mark.parametrize("lam", [0.0, 0.1, 1.0, 30.0])
def test_fusedmax_is_exact(lam):
    for seed in range(40):
        rng = random.Random(seed)
        x = row(rng, rng.choice((1, 2, 3, 5)))
        compare(normalize("fusedmax", x, lam=lam), exact.sparsemax(exact.prox_tv(fractions(x), Fraction(lam))), f"{x}")


@pytest.mark.parametrize("alpha", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("beta", [None, 0.0, 0.1, 10.0])
def test_oscarmax_is_exact(alpha, beta):
    for seed in range(60):
        rng = random.Random(seed)
        x = row(rng, rng.choice((1, 2, 3, 7, 15)))
        slope = Fraction(1, max(len(x) - 1, 1)) if beta is None else Fraction(beta)
        expected = exact.sparsemax(exact.prox_oscar(fractions(x), Fraction(alpha), slope))
        compare(normalize("oscarmax", x, alpha=alpha, beta=beta), expected, f"{x}")


@pytest.mark.parametrize("alpha", [1.0, 1.0001, 1.5, 2.0, 2.001, 2.5, 5.0, 10.0, 50.0])
def test_entmax_is_exact(alpha):
    for seed in range(8 if alpha < 50 else 3):
        rng = random.Random(seed)
        x = torch.stack([row(rng, 4) for _ in range(2)])
        for scores, found in zip(x, normalize("entmax", x, alpha=alpha)):
            compare(found, exact.entmax(fractions(scores), Fraction(alpha)), f"{scores}")


@pytest.mark.parametrize("alpha", [2.5, 5.0, 10.0, 50.0])
def test_steep_entmax_has_the_gradients_of_its_definition(alpha):
    """``diag(w) - w w^T / sum(w)`` with ``w = p^(2 - alpha)``, in many digits; and in alpha, by differences."""
    for seed in range(6):
        rng = random.Random(seed)
        scores = torch.tensor([rng.gauss(0, 1) / (alpha - 1) for _ in range(4)], dtype=torch.float64)
        x = scores.clone().requires_grad_()
        a, grad = torch.tensor(alpha, dtype=torch.float64, requires_grad=True), torch.randn(4, dtype=torch.float64)
        p = exact.entmax(fractions(scores), Fraction(alpha))
        if any(0 < value < 1e-3 for value in p):  # of which the digits are not to be trusted
            continue
        with mpmath.workdps(200):
            w = [mpmath.power(value, 2 - alpha) if value > 0 else mpmath.mpf(0) for value in p]
            mean = sum(weight * g for weight, g in zip(w, grad.tolist())) / sum(w)
            exactly = [float(weight * (g - mean)) for weight, g in zip(w, grad.tolist())]
        step = Fraction(1, 10**9)
        ends = [exact.entmax(fractions(scores), Fraction(alpha) + sign * step) for sign in (1, -1)]
        by_alpha = sum(float((high - low) / (2e-9)) * g for high, low, g in zip(*ends, grad.tolist()))
        found, found_by_alpha = torch.autograd.grad(normalize("entmax", x, alpha=a), (x, a), grad)
        torch.testing.assert_close(found, torch.tensor(exactly, dtype=torch.float64), rtol=1e-6, atol=1e-9)
        assert math.isclose(found_by_alpha.item(), by_alpha, rel_tol=1e-6, abs_tol=1e-9)


@pytest.mark.parametrize("alpha", [10.0, 50.0, 200.0])
def test_steep_entmax_of_near_ties_keeps_its_gradients_finite(alpha):
    x = (1 + torch.randint(0, 3, (50, 20)) * FLOAT.eps).requires_grad_()
    a = torch.tensor(alpha, requires_grad=True)
    grads = torch.autograd.grad(normalize("entmax", x, alpha=a), (x, a), torch.randn(50, 20))
    assert all(grad.isfinite().all() for grad in grads) and grads[0].abs().amax() > 1


OPTIONS = {
    "softmax": [{}, {"temperature": 0.01}, {"temperature": 50.0}],
    "entmax": [{"alpha": alpha} for alpha in (1.0, 1.25, 2.0, 3.0)],
    "fusedmax": [{"lam": 0.0}, {"lam": 1.0}],
    "oscarmax": [{}, {"alpha": 0.5, "beta": 0.1}],
    "rsoftmax": [{"sparsity": rate} for rate in (0.0, 0.5, 1.0)],
    "tsoftmax": [{"t": 1e-3}, {"t": 1.0}],
    "evsoftmax": [{}, {"training": True}],
    "topk_softmax": [{"k": 1}, {"k": 3}],
    "scalable_softmax": [{}, {"s": 2.0}],
}
DISTRIBUTIONS = [
    name for name in registered_normalizers() if name in OPTIONS or name.endswith(("max", "max15", "ture"))
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_distributions_stay_distributions(name, dtype):
    """Finite, summing to one, with the weights of float64 and finite gradients (in float32's range)."""
    most = torch.finfo(dtype).max * 0.9
    for seed in range(60):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        x = torch.stack([row(rng, 17) for _ in range(2)])
        if seed % 5 == 0:
            x[0, 3] = FLOAT.max
        x = x.clamp(-most, most).to(dtype).requires_grad_()
        keep = torch.rand(2, 17) < 0.8
        keep[:, 0] = True
        for options in OPTIONS.get(name, [{}]):
            p = normalize(name, x, mask=keep, **options)
            exactly = normalize(name, x.detach().double(), mask=keep, **options)
            torch.testing.assert_close(p.double(), exactly, rtol=0, atol=max(1e-3, 4 * torch.finfo(dtype).eps))
            torch.testing.assert_close(exactly.sum(-1), torch.ones(2, dtype=torch.float64))
            (grad,) = torch.autograd.grad(p, x, torch.randn_like(p))
            # a weight of a few ulps has a slope that no half precision holds
            assert grad.isfinite().all() or (dtype == torch.float16 and name == "rsoftmax"), (seed, options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("value", [0.0, 3.3, -1e4])
def test_rsoftmax_of_equal_scores_has_the_gradients_of_softmax(dtype, sparsity, value):
    """The shift of the threshold, 1e-8, is no slope to go by: its gradients of 1e8 overflowed half precision."""
    x, grad = torch.full((2, 9), value, dtype=dtype, requires_grad=True), torch.randn(2, 9).to(dtype)
    (found,) = torch.autograd.grad(normalize("rsoftmax", x, sparsity=sparsity), x, grad)
    (expected,) = torch.autograd.grad(x.softmax(-1), x, grad)
    torch.testing.assert_close(found, expected, rtol=0, atol=max(1e-6, torch.finfo(dtype).eps))


@pytest.mark.parametrize("name", ["rsoftmax", "tsoftmax"])
def test_weights_of_a_few_ulps_have_gradients_that_cancel_exactly(name):
    x = torch.tensor([1 + 2 * FLOAT.eps, 1 + FLOAT.eps, 1.0])
    options = {"sparsity": 0.4} if name == "rsoftmax" else {"t": 2e-7}
    grads = []
    for dtype in (torch.float32, torch.float64):
        scores = x.to(dtype).requires_grad_()
        p = normalize(name, scores, **options)
        grads.append(torch.autograd.grad(p, scores, torch.tensor([1.0, -0.3, 0.4], dtype=dtype))[0].double())
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4 * grads[1].abs().max().item())
    assert abs(grads[0].sum()) <= 1e-6 * grads[0].abs().max()


@pytest.mark.parametrize("name", ["scalable_softmax", "adaptive_temperature", "softmax"])
def test_a_factor_takes_no_score_beyond_a_float(name):
    options = {"softmax": {"temperature": 0.01}, "scalable_softmax": {"s": 2.0}}.get(name, {})
    x = torch.tensor([[FLOAT.max, 1.0, -1e38], [FLOAT.max, FLOAT.max, 0.0]], requires_grad=True)
    p = normalize(name, x, **options)
    assert torch.equal(p, torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]))
    assert torch.autograd.grad(p.square().sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("lowest", [-math.inf, FLOAT.min, FLOAT.min / 2])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_lowest_scores_are_masked_entries(name, lowest):
    options = OPTIONS.get(name, [{}])[-1]
    x = torch.randn(2, 5)
    x[0, 1:3] = lowest
    x[1] = lowest
    keep = x > FLOAT.min / 2
    assert torch.equal(normalize(name, x, **options), normalize(name, x, mask=keep, **options))
    assert not normalize(name, x, **options)[1].any()
