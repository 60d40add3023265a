"""The modulator in the Triton kernels, its slope, and the sums of which its scalars' gradients are made.

Thresholds and slopes are folded into base 2 once per program; the ``max(b - y, 0)`` form is kept because the expanded
polynomial cancels at large thresholds.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
#: With NEAR, a threshold of a linear term beyond this (base 2; 710 in base e) counts as this: the same for all scores
#: that are not as far, but for a constant of the row, and their digits are kept.
FARTHEST = tl.constexpr(1024.0)
#: Logarithm (base 2) of the largest power that the scalars' gradients count; scores that have larger ones are left out.
LARGEST_POWER = tl.constexpr(120.0)


@triton.jit
def times_power(t, x, N: tl.constexpr):
    """t * x^N, multiplied from t on: where t is 0 it stays 0, however large the power."""
    out = t
    for _ in tl.static_range(N):
        out = out * x
    return out


@triton.jit
def load_modulator(call, head):
    """(b, d, t_b, t_d) of a head, or of a tensor of them: tuples of ORDER float32 values in the base-2 domain."""
    ranges = call.ranges + head * call.s_head[0]
    ts = call.ts + head * call.s_head[0]
    b = ()
    d = ()
    t_b = ()
    t_d = ()
    fold = 1.0
    for n in tl.static_range(call.ORDER):
        low = tl.load(ranges + 2 * n).to(tl.float32)
        high = tl.load(ranges + (2 * n + 1)).to(tl.float32)
        slope_low = tl.load(ts + 2 * n).to(tl.float32)
        slope_high = tl.load(ts + (2 * n + 1)).to(tl.float32)
        if call.NEAR and n == 0:
            b = b + (tl.minimum(tl.maximum(low * LOG2E, -FARTHEST), FARTHEST),)
            d = d + (tl.minimum(tl.maximum(high * LOG2E, -FARTHEST), FARTHEST),)
        else:
            b = b + (low * LOG2E,)
            d = d + (high * LOG2E,)
        # a threshold that is NaN would vanish in a maximum: its slope tells
        t_b = t_b + (tl.where(low == low, slope_low, low) * fold,)
        t_d = t_d + (tl.where(high == high, slope_high, high) * fold,)
        fold = fold * LN2
    return b, d, t_b, t_d


@triton.jit
def load_affine(call, head):
    """(scale, shift) of a head in the base-2 domain, or ()."""
    affine = ()
    if call.affine_scale is not None:
        a = tl.load(call.affine_scale + head * call.s_head[1]).to(tl.float32)
        c = tl.load(call.affine_shift + head * call.s_head[2]).to(tl.float32)
        affine = (a, c * LOG2E)
    return affine


@triton.jit
def apply_affine(y, affine):
    x = y
    if len(affine) > 0:
        x = y * affine[0] + affine[1]
    return x


@triton.jit
def modulate(y, modulator, ORDER: tl.constexpr, CLAMP: tl.constexpr = False):
    """sigma in the base-2 domain; with CLAMP less :func:`clamp_constant`, for two instructions less.

    CLAMP costs half an ulp of that constant in every score: it wants NEAR thresholds and half precision.
    """
    b, d, t_b, t_d = modulator
    z = y
    if CLAMP:
        z -= t_b[0] * tl.minimum(y, b[0])
        z += t_d[0] * tl.maximum(y, d[0])
    for n in tl.static_range(1 if CLAMP else 0, ORDER):
        below = tl.maximum(b[n] - y, 0.0)
        above = tl.maximum(y - d[n], 0.0)
        z += times_power(t_b[n], below, n) * below
        z += times_power(t_d[n], above, n) * above
    return z


@triton.jit
def clamp_constant(modulator):
    """What :func:`modulate` leaves out of sigma with CLAMP."""
    b, d, t_b, t_d = modulator
    return t_b[0] * b[0] - t_d[0] * d[0]


@triton.jit
def modulate_slope(y, modulator, ORDER: tl.constexpr):
    """d sigma / d score, the same in either domain."""
    b, d, t_b, t_d = modulator
    slope = 1.0 - t_b[0] * (y < b[0]).to(tl.float32)
    slope += t_d[0] * (y > d[0]).to(tl.float32)
    for n in tl.static_range(1, ORDER):
        slope -= times_power((n + 1) * t_b[n], tl.maximum(b[n] - y, 0.0), n)
        slope += times_power((n + 1) * t_d[n], tl.maximum(y - d[n], 0.0), n)
    return slope


@triton.jit
def quarter_sums(x):
    """Sums [R, 4] of a tile [R, C] over every fourth pair of columns: what each thread of a matrix product holds.

    They need no exchange between threads, which full sums would at every tile.
    """
    pairs = tl.reshape(x, (x.shape[0], x.shape[1] // 8, 4, 2))
    return tl.sum(tl.sum(pairs, 3), 1)


@triton.jit
def modulator_moments(weight, y, modulator, SUM: tl.constexpr, ORDER: tl.constexpr, CHECK: tl.constexpr):
    """Sums that the scalar gradients are made of, a tuple of 4 * ORDER results of :func:`quarter_sums`.

    For n = 1..ORDER: sum of weight * r^n for r = max(b_n - y, 0) and for r = max(y - d_n, 0), then the same with
    r^(n-1) restricted to r > 0. They are taken in the type SUM. CHECK: a score may be so large that powers overflow.
    """
    b, d, t_b, t_d = modulator
    out = ()
    for n in tl.static_range(ORDER):
        below = tl.maximum(b[n] - y, 0.0)
        above = tl.maximum(y - d[n], 0.0)
        if n == 0:
            weight_b = weight * (y < b[n]).to(tl.float32)
            weight_d = weight * (y > d[n]).to(tl.float32)
        else:
            if CHECK:
                below = tl.where(below < 2.0 ** (LARGEST_POWER / (n + 1)), below, 0.0)
                above = tl.where(above < 2.0 ** (LARGEST_POWER / (n + 1)), above, 0.0)
            weight_b = times_power(weight, below, n)
            weight_d = times_power(weight, above, n)
        out = out + (quarter_sums((weight_b * below).to(SUM)), quarter_sums((weight_d * above).to(SUM)))
        out = out + (quarter_sums(weight_b.to(SUM)), quarter_sums(weight_d.to(SUM)))
    return out


@triton.jit
def scalar_moments(
    weight,
    x,
    y,
    slope,
    modulator,
    SUM: tl.constexpr,
    AFFINE: tl.constexpr,
    ORDER: tl.constexpr,
    CHECK: tl.constexpr,
):
    """:func:`modulator_moments` at ``x``, and for the affine map the sums of weight * slope times score and times 1."""
    out = modulator_moments(weight, x, modulator, SUM, ORDER, CHECK)
    if AFFINE:
        weight = weight * slope
        out = out + (quarter_sums((weight * y).to(SUM)) * LN2, quarter_sums(weight.to(SUM)))
    return out


@triton.jit
def zero_sums(SIZE: tl.constexpr, TYPE: tl.constexpr, COUNT: tl.constexpr):
    """As many zeros as :func:`quarter_sums` gives, COUNT times."""
    out = ()
    for _ in tl.static_range(COUNT):
        out = out + (tl.zeros([SIZE, 4], TYPE),)
    return out


@triton.jit
def add_sums(a, b, COUNT: tl.constexpr):
    out = ()
    for n in tl.static_range(COUNT):
        out = out + (a[n] + b[n],)
    return out
