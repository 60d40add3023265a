"""The proximal operators of fusedmax and oscarmax against generic solvers, and their Jacobians."""

import numpy as np
import pytest
import torch
from scipy.optimize import lsq_linear
from sklearn.isotonic import IsotonicRegression

from hf_multimax.normalizers.structured import prox_oscar, prox_tv


def tv_reference(y: np.ndarray, lam: float) -> np.ndarray:
    """By the dual: ``z = y - D^T u`` with the box-constrained least-squares solution u, ``|u| <= lam``."""
    if lam == 0 or len(y) == 1:
        return y
    difference = np.diff(np.eye(len(y)), axis=0)
    dual = lsq_linear(difference.T, y, bounds=(-lam, lam), method="bvls", tol=1e-14, max_iter=2000)
    return y - difference.T @ dual.x


def oscar_reference(y: np.ndarray, alpha: float, beta: float | None) -> np.ndarray:
    n = len(y)
    beta = 1 / max(n - 1, 1) if beta is None else beta
    order = np.argsort(-np.abs(y), kind="stable")
    shifted = np.abs(y)[order] - (alpha + beta * (n - 1 - np.arange(n)))
    z = np.empty(n)
    z[order] = np.maximum(IsotonicRegression(increasing=False).fit_transform(np.arange(n), shifted), 0)
    return np.sign(y) * z


def tv_objective(z: np.ndarray, y: np.ndarray, lam: float) -> float:
    return 0.5 * np.sum((z - y) ** 2) + lam * np.abs(np.diff(z)).sum()


def oscar_objective(z: np.ndarray, y: np.ndarray, alpha: float, beta: float) -> float:
    pairs = np.maximum(np.abs(z)[:, None], np.abs(z)[None])[np.triu_indices(len(z), 1)]
    return 0.5 * np.sum((z - y) ** 2) + alpha * np.abs(z).sum() + beta * pairs.sum()


def scores(kind: str, rows: int, n: int) -> torch.Tensor:
    x = torch.randn(rows, n, dtype=torch.float64)
    if kind == "wide":
        x = 20 * x
    elif kind == "ties":
        x = (2 * x).round()
    elif kind == "sorted":
        x = x.sort(-1).values
    elif kind == "smooth":
        x = torch.sin(torch.arange(n) / 5.0) + 0.1 * x
    return x


@pytest.mark.parametrize("kind", ["normal", "wide", "ties", "sorted", "smooth"])
@pytest.mark.parametrize("lam", [0.0, 0.1, 1.0, 30.0])
def test_tv_equals_quadratic_program(kind, lam):
    for n in (1, 2, 3, 17, 33, 40):
        x = scores(kind, 3, n)
        for row, z in zip(x.numpy(), prox_tv(x, lam).numpy()):
            np.testing.assert_allclose(z, tv_reference(row, lam), atol=1e-9)


@pytest.mark.parametrize("kind", ["normal", "wide", "ties", "sorted"])
@pytest.mark.parametrize(("alpha", "beta"), [(0.0, None), (0.3, 0.0), (0.1, 0.2), (0.0, 5.0), (0.0, 0.0)])
def test_oscar_equals_isotonic_regression(kind, alpha, beta):
    for n in (1, 2, 3, 17, 40):
        x = scores(kind, 3, n)
        for row, z in zip(x.numpy(), prox_oscar(x, torch.ones_like(x, dtype=torch.bool), alpha, beta).numpy()):
            np.testing.assert_allclose(z, oscar_reference(row, alpha, beta), atol=1e-9)


def test_long_rows_are_optimal():
    x = scores("normal", 2, 3000)
    for row, z in zip(x.numpy(), prox_tv(x, 1.0).numpy()):
        dual = np.cumsum(z - row)
        steps = np.diff(z)
        assert abs(dual[-1]) < 1e-9 and np.abs(dual).max() < 1 + 1e-9
        moving = np.abs(steps) > 1e-9
        np.testing.assert_allclose(dual[:-1][moving], np.sign(steps)[moving], atol=1e-9)


def test_no_other_point_is_better():
    """The references share a derivation with the code; the objective does not."""
    y = scores("normal", 20, 8)
    fused, grouped = prox_tv(y, 0.4), prox_oscar(y, torch.ones_like(y, dtype=torch.bool), 0.1, 0.15)
    for row, z_tv, z_oscar in zip(y.numpy(), fused.numpy(), grouped.numpy()):
        for step in np.random.default_rng(0).normal(size=(200, 8)) * 0.05:
            assert tv_objective(z_tv, row, 0.4) <= tv_objective(z_tv + step, row, 0.4) + 1e-12
            assert oscar_objective(z_oscar, row, 0.1, 0.15) <= oscar_objective(z_oscar + step, row, 0.1, 0.15) + 1e-12


def test_gradients():
    x = scores("normal", 4, 11).requires_grad_()
    keep = torch.rand(4, 11) < 0.8
    lengths = torch.tensor([[11], [7], [1], [4]])
    there = torch.arange(11) < lengths
    assert torch.autograd.gradcheck(lambda x: prox_tv(x, 0.5), x)
    assert torch.autograd.gradcheck(lambda x: prox_tv(x, 0.5, lengths) * there, x)
    assert torch.autograd.gradcheck(lambda x: prox_oscar(x, keep, 0.05, 0.1), x)
    assert torch.autograd.gradcheck(lambda x: prox_oscar(x, keep, 0.0, None), x)


def test_jacobian_averages_within_runs():
    x = torch.tensor([[3.0, 2.9, 0.0, -5.0]], dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: prox_tv(x, 0.5), x)[0, :, 0]
    expected = torch.block_diag(torch.full((2, 2), 0.5), torch.eye(1), torch.eye(1)).double()
    torch.testing.assert_close(jacobian, expected)


def test_lengths_mean_removed():
    x = scores("normal", 5, 12)
    lengths = torch.tensor([[12], [11], [5], [2], [1]])
    z = prox_tv(x, 0.7, lengths)
    for row, out, length in zip(x, z, lengths.flatten().tolist()):
        torch.testing.assert_close(out[:length], prox_tv(row[:length], 0.7), atol=1e-12, rtol=0)


def test_mask_means_removed():
    x, keep = scores("normal", 5, 12), torch.rand(5, 12) < 0.7
    z = prox_oscar(x, keep, 0.02, None)
    assert (z[~keep] == 0).all()
    for row, out, kept in zip(x, z, keep):
        small = prox_oscar(row[kept], torch.ones(int(kept.sum()), dtype=torch.bool), 0.02, None)
        torch.testing.assert_close(out[kept], small, atol=1e-12, rtol=0)


def test_float32_is_rounded_float64():
    x = scores("normal", 4, 300).float()
    torch.testing.assert_close(prox_tv(x, 1.0), prox_tv(x.double(), 1.0).float(), rtol=0, atol=0)
    keep = torch.ones_like(x, dtype=torch.bool)
    torch.testing.assert_close(prox_oscar(x, keep, 0, None), prox_oscar(x.double(), keep, 0, None).float())


def test_any_shape():
    x = scores("normal", 6, 5).view(1, 2, 3, 5)
    assert torch.equal(prox_tv(x, 1.0).view(6, 5), prox_tv(x.view(6, 5), 1.0))
    assert torch.equal(prox_tv(x[0, 0, 0], 1.0), prox_tv(x, 1.0)[0, 0, 0])
    keep = torch.ones_like(x, dtype=torch.bool)
    assert torch.equal(prox_oscar(x, keep, 0.1, 0.1)[0, 0, 0], prox_oscar(x[0, 0, 0], keep[0, 0, 0], 0.1, 0.1))
