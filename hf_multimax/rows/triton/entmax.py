"""The entmax family: thresholds by Newton steps on the whole row, weights, and the sums of the backward pass.

Written with ``z``, the scores less the row's largest, and ``d = alpha - 1``.
"""

import triton
import triton.language as tl

from hf_multimax.rows.triton.memory import MOST, chunk

#: what the passes over a row end at; Newton's steps take 4 to 10 as a rule, sparsemax's at most 50 at any length
MOST_PASSES = tl.constexpr(64)
TOLERANCE = tl.constexpr(4.8e-7)


@triton.jit
def scaled(x, base, scale, top):
    """Scores less the largest, times a factor that may be 0 or negative, less the largest of these; see asentmax."""
    z = scale[:, None] * tl.maximum(x - base[:, None], -MOST) - top[:, None]
    return tl.where(x == float("-inf"), x, z)


@triton.jit
def centred(rows, x, base, scale, top):
    """``z`` of a chunk."""
    if rows.KIND == "asentmax":
        z = scaled(x, base, scale, top)
    else:
        z = x - base[:, None]
    return z


@triton.jit
def beyond(rows, z, high, low, SQUARED: tl.constexpr):
    """What of z (SQUARED: of z / 2) is above a threshold ``high + low``, else 0."""
    if SQUARED:
        z = 0.5 * z
    return tl.maximum((z - high[:, None]) - low[:, None], 0.0)


@triton.jit
def root_threshold(rows, at, shift, usable, SQUARED: tl.constexpr, BLOCK_N: tl.constexpr):
    """The threshold of sparsemax or (SQUARED) 1.5-entmax as a sum of two numbers, from below.

    Newton's method on the sum of what is beyond it, for 1.5-entmax on the root of the squares' sum: both are convex.
    That of sparsemax is exact once the support stays.
    """
    base, scale, top = shift
    tau = tl.full(base.shape, -1.0, tl.float64)
    seen = tl.zeros(base.shape, tl.float32)
    active = usable
    passes = 0
    more = 1
    while more > 0:
        high = tau.to(tl.float32)
        low = (tau - high.to(tl.float64)).to(tl.float32)
        first = tl.zeros(base.shape, tl.float32)
        second = tl.zeros(base.shape, tl.float32)
        for n0 in range(0, at[2], BLOCK_N):
            z = centred(rows, chunk(rows, at, n0, BLOCK_N), base, scale, top)
            r = beyond(rows, z, high, low, SQUARED)
            first += tl.sum(r, 1)
            second += tl.sum(r * r if SQUARED else (r > 0.0).to(tl.float32), 1)
        if SQUARED:
            norm = tl.sqrt(second)
            move = (norm - 1.0) * norm / first
            stays = tl.abs(move) < -1e-4 * high  # the next step would be its square
        else:
            move = (first - 1.0) / second
            stays = second == seen
            seen = second
        tau = tl.where(active, tau + move.to(tl.float64), tau)
        active = active & (stays == 0)
        passes += 1
        more = tl.max(active.to(tl.int32), 0) * (passes < MOST_PASSES).to(tl.int32)
    high = tau.to(tl.float32)
    return high, (tau - high.to(tl.float64)).to(tl.float32)


@triton.jit
def log1p(u):
    """log(1 + u) for u in [-1, 0], to the last digits near 0."""
    t = u / (2.0 + u)
    s = t * t
    near = 2.0 * t * (1.0 + s * (1.0 / 3 + s * (1.0 / 5 + s * (1.0 / 7 + s * (1.0 / 9)))))
    return tl.where(u > -0.25, near, tl.log(tl.maximum(1.0 + u, 1.2e-38)))


@triton.jit
def expm1_over(u):
    """(e^u - 1) / u"""
    near = 1.0 + u * (1.0 / 2 + u * (1.0 / 6 + u * (1.0 / 24 + u * (1.0 / 120 + u * (1.0 / 720)))))
    small = tl.abs(u) < 0.25
    return tl.where(small, near, (tl.exp(u) - 1.0) / tl.where(small, 1.0, u))


@triton.jit
def expm1_minus_over(u):
    """(e^u - 1 - u) / u^2"""
    near = 1.0 / 5040 + u * (1.0 / 40320 + u * (1.0 / 362880))
    near = 1.0 / 2 + u * (1.0 / 6 + u * (1.0 / 24 + u * (1.0 / 120 + u * (1.0 / 720 + u * near))))
    small = tl.abs(u) < 0.5
    divisor = tl.where(small, 1.0, u)
    return tl.where(small, near, ((tl.exp(u) - 1.0) / divisor - 1.0) / divisor)


@triton.jit
def power(rows, z, s, d):
    """(1 + d (z - s))_+ ^ (1 / d), and what is raised to it."""
    u = tl.maximum(d * (z - s), -1.0)
    root = 1.0 + u
    if rows.EXPONENT > 0:
        p = root
        for _ in tl.static_range(rows.EXPONENT - 1):
            p = p * root
    else:
        p = tl.where(root > 0.0, tl.exp(log1p(u) / d), 0.0)
    return p, root


@triton.jit
def entmax_shift(rows, at, shift, usable, d, BLOCK_N: tl.constexpr):
    """s with ``sum (1 + d (z - s))_+ ^ (1 / d) = 1``, and the sum that rounding leaves.

    Newton's method on the norm, which is convex, from 0 up, between bounds.
    """
    base, scale, top = shift
    s = tl.zeros(base.shape, tl.float32)
    low = s
    total = s + 1.0
    span = -d * tl.log(s + at[1])
    high = -expm1_over(span) * span / d
    active = usable
    passes = 0
    more = 1
    while more > 0:
        total = tl.zeros(base.shape, tl.float32)
        slope = tl.zeros(base.shape, tl.float32)
        for n0 in range(0, at[2], BLOCK_N):
            z = centred(rows, chunk(rows, at, n0, BLOCK_N), base, scale, top)
            p, root = power(rows, z, s[:, None], d[:, None])
            total += tl.sum(p, 1)
            slope += tl.sum(tl.where(p > 0.0, p / root, 0.0), 1)
        low = tl.where(total >= 1.0, s, low)
        high = tl.where(total >= 1.0, high, s)
        log_total = tl.log(total)
        moved = s + log_total * expm1_over(d * log_total) * tl.exp((1.0 - d) * log_total) / slope
        moved = tl.where((moved >= low) & (moved <= high), moved, 0.5 * (low + high))
        active = active & (tl.abs(moved - s) > TOLERANCE * (1.0 + tl.abs(s)))
        s = tl.where(active, moved, s)
        passes += 1
        more = tl.max(active.to(tl.int32), 0) * (passes < MOST_PASSES).to(tl.int32)
    return s, total


@triton.jit
def distance(value):
    """alpha - 1, kept off zero by so little that only the division by zero changes."""
    return tl.maximum(value - 1.0, 1e-12)


@triton.jit
def find_entmax(rows, at, shift, usable, value, BLOCK_N: tl.constexpr):
    """A pair of numbers of the rows by which :func:`weigh_entmax` gives the probabilities."""
    if rows.KIND == "sparsemax" or rows.EXPONENT == 1:
        first, second = root_threshold(rows, at, shift, usable, False, BLOCK_N)
    elif rows.KIND == "entmax15" or rows.EXPONENT == 2:
        first, second = root_threshold(rows, at, shift, usable, True, BLOCK_N)
    else:
        first, total = entmax_shift(rows, at, shift, usable, distance(value), BLOCK_N)
        second = 1.0 / total
    return first, second


@triton.jit
def weigh_entmax(rows, z, first, second, value):
    if rows.KIND == "sparsemax" or rows.EXPONENT == 1:
        p = beyond(rows, z, first, second, False)
    elif rows.KIND == "entmax15" or rows.EXPONENT == 2:
        r = beyond(rows, z, first, second, True)
        p = r * r
    else:
        p, _ = power(rows, z, first[:, None], distance(value)[:, None])
        p = p * second[:, None]
    return p


@triton.jit
def log_of(p):
    return tl.log(tl.where(p > 0.0, p, 1.0))


@triton.jit
def entmax_slopes(rows, p, value):
    """p ^ (2 - alpha), by which the gradients of a row are weighed; 0 where p is."""
    if rows.KIND == "sparsemax" or rows.EXPONENT == 1:
        w = (p > 0.0).to(tl.float32)
    elif rows.KIND == "entmax15" or rows.EXPONENT == 2:
        w = tl.sqrt(p)
    else:
        w = tl.where(p > 0.0, tl.exp((1.0 - distance(value)[:, None]) * log_of(p)), 0.0)
    return w


@triton.jit
def alpha_sums(p, g, value):
    """Seven sums of which :func:`alpha_gradient` is made; the terms in 1/d and 1/d^2 of the published form cancel."""
    log_p = log_of(p)
    u = -distance(value)[:, None] * log_p
    first = -log_p * expm1_over(u)
    second = log_p * log_p * expm1_minus_over(u)
    pg = tl.where(p > 0.0, p * g, 0.0)
    means = (tl.sum(p * first, 1), tl.sum(p * second, 1), tl.sum(p * log_p, 1))
    return means + (tl.sum(pg, 1), tl.sum(pg * first, 1), tl.sum(pg * second, 1), tl.sum(pg * log_p, 1))


@triton.jit
def alpha_gradient(first, second, log_p, g, g_first, g_second, g_log_p, value):
    return (second * g - g_second - first * g_log_p + log_p * g_first) / (1.0 + distance(value) * first)
