"""Scores of any size: random calls with them, and MultiMax of them in float64 with what float32 makes of overflow."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT = torch.finfo(torch.float32)
ORDERS = (1, 2, 3, 4, 8, 16)
#: values that masks, biases and failed layers have
VALUES = (0.0, 1.0, -1.0, 1e4, -1e4, -1e9, 1e20, -1e20, 1e30, -1e30, 1e37, -1e37, FLOAT.min, -math.inf)


@dataclass
class Call:
    """Rows of scores ``[heads, rows, n]``, a modulator, which entries are kept, and a gradient of the weights."""

    scores: Tensor
    ranges: Tensor
    ts: Tensor
    affine: tuple[Tensor, Tensor] | None
    keep: Tensor
    grad: Tensor


def rows(rng: random.Random, heads: int, count: int, n: int) -> Tensor:
    """Rows of some kind: usual, with huge entries, all equal, nearly equal, with a single entry, half masked, wide."""

    def choices(values: tuple[float, ...], *shape: int) -> Tensor:
        return torch.tensor([rng.choice(values) for _ in range(math.prod(shape))]).view(shape)

    x, kind = torch.randn(heads, count, n), rng.randrange(7)
    if kind == 1:
        return torch.where(torch.rand(heads, count, n) < 0.3, choices(VALUES, heads, count, n), x)
    if kind == 2:
        return choices(VALUES, heads, count, 1).expand(heads, count, n).clone()
    if kind == 3:
        nearly = 1 + torch.randint(0, 3, (heads, count, n)) * FLOAT.eps
        return choices((0.0, 3.0, 100.0, -200.0), heads, count, 1) * nearly
    if kind == 4:
        x.fill_(-math.inf)[..., rng.randrange(n)] = rng.choice(VALUES[:-2])
    if kind == 5:
        x[torch.rand(heads, count, n) < 0.5] = rng.choice((-1e4, -1e9, -1e20, -1e30, -1e37))
    return x * rng.choice((10, 100, 1000)) if kind == 6 else x


def draw(seed: int) -> Call:
    """A random call; two thirds of the slopes are zero."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    heads, count, n, order = 2, rng.choice((1, 3, 8)), rng.choice((1, 2, 7, 24)), rng.choice(ORDERS)
    scores = rows(rng, heads, count, n)
    ts = torch.tensor([rng.choice((0.0, 0.0, 0.01, 0.1, -0.1, 1.0, -1.0, -3.0)) for _ in range(heads * 2 * order)])
    ts = ts.view(heads, -1) * rng.choice((0, 1, 1)) * (torch.rand(heads, 2 * order) < 0.5)
    ranges = torch.randn(heads, 2 * order) * rng.choice((0, 1, 3))
    if rng.random() < 0.5:
        ranges, ts = ranges[0].clone(), ts[0].clone()
    affine = None
    if rng.random() < 0.2:
        affine = torch.tensor(rng.choice((1.0, 2.0, -1.0, 0.5))), torch.tensor(rng.choice((0.0, 1.0, -3.0)))
        scores = torch.where(scores > FLOAT.min, scores.clamp(-1e30, 1e30), scores)
    keep = torch.rand_like(scores) < rng.choice((0.5, 1.0, 1.0))
    if rng.random() < 0.3:  # what is masked may hold anything
        scores = torch.where(keep, scores, rng.choice((math.inf, math.nan, FLOAT.max, 1e30)))
    return Call(scores, ranges, ts, affine, keep, torch.randn_like(scores) * rng.choice((0, 1, 1, 1)))


@dataclass
class Expected:
    """In float64: the weights, the gradients of scores, ranges and ts, and how large the rounding of those may be.

    ``broken`` rows are NaN. What ``unclear`` rows are is decided by float32's rounding.
    """

    weights: Tensor
    scores: Tensor
    ranges: Tensor
    ts: Tensor
    scores_scale: Tensor
    ranges_scale: Tensor
    ts_scale: Tensor
    broken: Tensor
    unclear: Tensor


def expected(call: Call) -> Expected:
    """What :class:`Call` gives: terms without a slope are not there, -inf has no weight, +inf breaks a row."""
    x, grad = call.scores.double(), call.grad.double()
    ranges, ts = (p.double() if p.ndim == 2 else p.double().expand(x.shape[0], -1) for p in (call.ranges, call.ts))
    dead = ~call.keep | (x <= FLOAT.min / 2)
    x = torch.where(dead, 0.0, x)
    scale = 1.0
    if call.affine is not None:
        scale, shift = (p.double() for p in call.affine)
        x = scale * x + shift
    total, size, slope = x.clone(), x.abs(), torch.ones_like(x)
    values, slopes, overflown = [], [], torch.zeros_like(dead)
    for k in range(ts.shape[-1]):
        n, sign = k // 2 + 1, 1 - 2 * (k % 2)
        bound, t = ranges[:, k, None, None], ts[:, k, None, None]
        r = (sign * (bound - x)).clamp(min=0)
        term = torch.where(t == 0, 0.0, t * r**n)
        finite = term.abs() <= FLOAT.max
        total = total + torch.where(finite, term, term.sign() * math.inf)
        size = size + torch.where(finite, term.abs(), 0.0)
        derivative = torch.where(r > 0, r ** (n - 1), 0.0)
        slope = slope - torch.where(t == 0, 0.0, sign * n * t * derivative)
        counted = (n == 1) | (r <= (FLOAT.max / 256) ** (1 / n))  # larger powers are left out of the slopes' gradients
        values.append(torch.where(counted, r**n, 0.0))
        slopes.append(torch.where(counted, sign * n * t * derivative, 0.0))
        overflown |= ~counted & (t != 0)
    total = torch.where(dead, -math.inf, torch.where(total.abs() > FLOAT.max, total.sign() * math.inf, total))
    broken = (total.isnan() | (total == math.inf)).any(-1)
    top = total.amax(-1, keepdim=True)
    nothing = broken[..., None] | (top == -math.inf)
    p = torch.where(nothing | dead, 0.0, torch.where(nothing, 0.0, total).softmax(-1))
    mean = (p * grad).sum(-1, keepdim=True)
    g = torch.where(p == 0, 0.0, p * (grad - mean))
    noise = p * (grad.abs() + mean.abs())

    def summed(of: Tensor, parts: list[Tensor], like: Tensor) -> Tensor:
        per_head = torch.stack([(of * part).sum((1, 2)) for part in parts], -1)
        return per_head if like.ndim == 2 else per_head.sum(0)

    # rounding decides where scores that differ compete and are too large for their differences to be known
    error = 8 * FLOAT.eps * size
    compete = (total + error >= top - 30) & (total > -math.inf)
    low, high = torch.where(compete, x, math.inf).amin(-1), torch.where(compete, x, -math.inf).amax(-1)
    unclear = (high > low) & (torch.where(compete, error, 0.0).amax(-1) > 1e-4)
    unclear |= (overflown & (p > 0)).any(-1)
    sizes = [part.abs() for part in slopes]
    of_scores, of_scores_scale = (torch.where(p == 0, 0.0, part * slope * scale) for part in (g, noise))
    return Expected(
        p, of_scores, summed(g, slopes, call.ranges), summed(g, values, call.ts),
        of_scores_scale.abs(), summed(noise, sizes, call.ranges), summed(noise, values, call.ts), broken, unclear,
    )  # fmt: skip


def attention_weights(attention: Callable[..., Tensor], call: Call, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights of ``attention`` to values that show them, for scores that are a bias."""
    heads, count, n = call.scores.shape
    q, k, v = torch.zeros(1, heads, count, 8), torch.zeros(1, heads, n, 8), torch.eye(n).expand(1, heads, n, n)
    tensors = (*(x.to(dtype) for x in (q, k, v)), call.ranges, call.ts)
    return attention(*tensors, bias=call.scores[None], mask=call.keep[None], affine=call.affine)[0]


def check(function: Callable[[Call], Tensor], seed: int, tolerance: float = 2e-5) -> None:
    """Compare the weights ``[heads, rows, n]`` that ``function`` returns with what is expected, gradients included."""
    call = draw(seed)
    want = expected(call)
    leaves = [x.requires_grad_() for x in (call.scores, call.ranges, call.ts)]
    out = function(call)
    assert out.shape == want.weights.shape
    assert out[want.broken].isnan().any(-1).all()
    assert out[~want.broken].isfinite().all()
    clear = ~(want.broken | want.unclear)
    torch.testing.assert_close(out[clear].double(), want.weights[clear], rtol=0, atol=tolerance)
    if want.broken.any():
        return
    found = torch.autograd.grad(out, leaves, call.grad.to(out.dtype))
    assert all(x.isfinite().all() for x in found)
    if want.unclear.any() or out.dtype != torch.float32:
        return
    for actual, exact, scale in (
        (found[0], want.scores, want.scores_scale),
        (found[1], want.ranges, want.ranges_scale),
        (found[2], want.ts, want.ts_scale),
    ):
        assert ((actual.double() - exact).abs() <= 1e-5 * scale + 1e-4 * exact.abs() + 1e-6).all()
