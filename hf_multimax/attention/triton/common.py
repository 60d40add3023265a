"""Device functions that every Triton kernel of MultiMax attention shares.

Scores live in the base-2 domain: ``y = log2(e) * x``, so that the softmax needs ``exp2`` alone. Thresholds and slopes
are folded into that domain once per program; the ``max(b - y, 0)`` form of the modulator is kept because the expanded
polynomial cancels at large thresholds.

Tiles are indexed by ``rows`` (queries) and ``cols`` (keys), two index tensors that broadcast against each other. The
dk/dv kernel holds its tiles transposed (``rows`` along the second dimension); everything here works for both.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
#: A score at or below this (log2(e) * finfo(float32).min / 2) is a masked entry.
MASKED = tl.constexpr(-2.4547e38)
#: With NEAR, a threshold of a linear term beyond this (base 2; 710 in base e) counts as this: the same for all scores
#: that are not as far, but for a constant of the row, and their digits are kept.
FARTHEST = tl.constexpr(1024.0)
PHILOX_ROUNDS = tl.constexpr(7)
#: Logarithm (base 2) of the largest power that the scalars' gradients count; scores that have larger ones are left out.
LARGEST_POWER = tl.constexpr(120.0)


class Inputs(NamedTuple):
    """What every attention kernel takes; ``attention/triton/__init__.py`` says what each is."""

    q: Any
    k: Any
    v: Any
    ranges: Any
    ts: Any
    affine_scale: Any
    affine_shift: Any
    mask: Any
    bias: Any
    seed: Any
    s_q: Any
    s_k: Any
    s_v: Any
    s_mask: Any
    s_bias: Any
    s_head: Any
    heads: Any
    group: Any
    n_rows: Any
    n_cols: Any
    threshold: Any
    keep_scale: Any
    scale: Any
    softcap: Any
    window: Any
    ORDER: Any
    NEAR: Any
    MASK_MIN: Any
    MASK_BY_ROW: Any
    BIAS_BY_ROW: Any
    CAUSAL: Any
    D: Any
    DV: Any
    BLOCK_D: Any
    BLOCK_DV: Any
    UPCAST: Any


@triton.jit
def dot(a, b, UPCAST: tl.constexpr):
    """Matrix product in float32. ``UPCAST`` is for the interpreter, which multiplies the raw bits of bfloat16."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def head_base(pointer, strides, batch, head):
    """Address of one head; None of a tensor that is absent."""
    base = pointer
    if pointer is not None:
        base = pointer + tl.cast(head, tl.int64) * strides[1] + tl.cast(batch, tl.int64) * strides[0]
    return base


@triton.jit
def load_rows(
    base, start, length, strides, ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, EDGE: tl.constexpr
):
    """Tile [ROWS, PADDED] of the tokens from ``start``; zeros past ``length`` (checked if EDGE) and past WIDTH."""
    rows = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, PADDED)[None, :]
    pointers = base + tl.cast(start, tl.int64) * strides[2] + (rows.to(tl.int64) * strides[2] + cols * strides[3])
    if EDGE and WIDTH != PADDED:
        tile = tl.load(pointers, mask=(rows < length - start) & (cols < WIDTH), other=0.0)
    elif EDGE:
        tile = tl.load(pointers, mask=rows < length - start, other=0.0)
    elif WIDTH != PADDED:
        tile = tl.load(pointers, mask=cols < WIDTH, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def store_rows(base, start, length, strides, tile, ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Store the part of a tile [ROWS, PADDED] that exists, rounded to the destination's type."""
    rows = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, PADDED)[None, :]
    pointers = base + tl.cast(start, tl.int64) * strides[2] + (rows.to(tl.int64) * strides[2] + cols * strides[3])
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=(rows < length - start) & (cols < WIDTH))


@triton.jit
def store_rounded(
    base, start, length, strides, tile, residual, ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr
):
    """:func:`store_rows`, and what the rounding cut off in a ``residual`` of the same layout, which may be absent."""
    store_rows(base, start, length, strides, tile, ROWS, WIDTH, PADDED)
    if residual is not None:
        cut = tile - tile.to(base.dtype.element_ty).to(tl.float32)
        store_rows(residual, start, length, strides, cut, ROWS, WIDTH, PADDED)


@triton.jit
def load_elements(pointer, strides, where, BY_ROW: tl.constexpr):
    """Elements of a mask or bias for a tile; one vector of keys, left to broadcast, unless it differs by row."""
    rows, cols, n_rows, n_cols = where
    pointers = pointer + cols.to(tl.int64) * strides[3]
    exists = cols < n_cols
    if BY_ROW:
        pointers = pointers + rows.to(tl.int64) * strides[2]
        exists = exists & (rows < n_rows)
    return tl.load(pointers, mask=exists, other=0)


# --- the modulator -----------------------------------------------------------------------------------------------


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


# --- from products of queries and keys to scores -----------------------------------------------------------------


@triton.jit
def tanh(x):
    """tanh within 3e-7 relative: a polynomial near zero, where the quotient would cancel."""
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    far = (1.0 - e) / (1.0 + e)
    far = tl.where(x < 0, -far, far)
    s = x * x
    # least-squares fit of (tanh(x) - x) / x^3 over s = x^2 in [0, 0.37]
    near = -0.3333333135 + s * (0.1333288103 + s * (-0.0538680591 + s * (0.0210800171 - s * 0.0062197191)))
    near = x + x * s * near
    return tl.where(s < 0.36, near, far)


@triton.jit
def scores(qk, where, call, bias):
    """Scores before the modulator (base 2), and the soft cap's slope (1 without a cap).

    ``where``: (rows, cols, number of rows, number of columns) of the tile; ``bias``: its head's.
    """
    if call.softcap is None:
        y = qk * (call.scale * LOG2E)
        slope = 1.0
    else:
        t = tanh(qk * (call.scale / call.softcap))
        y = t * (call.softcap * LOG2E)
        slope = 1.0 - t * t
    if bias is not None:
        y += load_elements(bias, call.s_bias, where, call.BIAS_BY_ROW).to(tl.float32) * LOG2E
    return y, slope


@triton.jit
def mask_scores(z, y, where, call, mask, CHECK: tl.constexpr, EDGE: tl.constexpr, TAIL: tl.constexpr):
    """Modulated scores ``z`` with minus infinity at every masked entry; NaN stays NaN.

    CHECK: a score ``y`` may be minus infinity. EDGE: the tile may leave the band of visible keys. TAIL: it may hold
    keys that do not exist. ``mask``: that of the head.
    """
    rows, cols, n_rows, n_cols = where
    hidden = y <= MASKED if CHECK else tl.zeros(z.shape, tl.int1)
    if TAIL:
        hidden = hidden | (cols >= n_cols)
    if EDGE:
        position = rows + (n_cols - n_rows)
        if call.CAUSAL:
            hidden = hidden | (cols > position)
        if call.window is not None:
            hidden = hidden | (cols <= position - call.window)
            if not call.CAUSAL:
                hidden = hidden | (cols >= position + call.window)
    if mask is not None:
        m = load_elements(mask, call.s_mask, where, call.MASK_BY_ROW)
        if call.MASK_MIN is None:
            hidden = hidden | (m == 0)
        else:
            m = m.to(tl.float32)
            hidden = hidden | (m <= call.MASK_MIN)
            z += m * LOG2E
    return tl.where(hidden, float("-inf"), z)


@triton.jit
def load_norm(peaks, totals, rows, n_rows):
    """What the forward pass divided rows by, in base 2: (log,), or (peak, log of the sum relative to it).

    The pair costs one more subtraction per score and keeps float32's accuracy where scores are large. Rows that do not
    exist get p = 0.
    """
    norm = (tl.load(totals + rows, mask=rows < n_rows, other=float("inf")),)
    if peaks is not None:
        norm = (tl.load(peaks + rows, mask=rows < n_rows, other=0.0),) + norm
    return norm


@triton.jit
def store_norm(peaks, totals, rows, exists, peak, total):
    """Store a norm as :func:`load_norm` reads it: plus infinity for rows without anything."""
    empty = total == 0.0
    log = tl.log2(tl.where(empty, 1.0, total))
    if peaks is None:
        log += peak
    else:
        tl.store(peaks + rows, tl.where(empty, 0.0, peak), mask=exists)
    tl.store(totals + rows, tl.where(empty, float("inf"), log), mask=exists)


@triton.jit
def broadcast_norm(norm, TRANSPOSED: tl.constexpr):
    """The norm of a vector of rows, against a tile [rows, cols] or [cols, rows]."""
    AXIS: tl.constexpr = 0 if TRANSPOSED else 1
    out = (tl.expand_dims(norm[0], AXIS),)
    if len(norm) > 1:
        out = out + (tl.expand_dims(norm[1], AXIS),)
    return out


@triton.jit
def probabilities(
    qk,
    norm,
    where,
    modulator,
    affine,
    call,
    mask,
    bias,
    CHECK: tl.constexpr,
    EDGE: tl.constexpr,
    TAIL: tl.constexpr,
    CLAMP: tl.constexpr = False,
):
    """Recompute for the backward pass: (p, x, y, slope, chain), from each row's ``norm`` as :func:`load_norm` gives it.

    ``y``: score, ``x``: the modulator's argument, both with CHECK 0 where p is, so that gradients stay finite there;
    ``slope``: d sigma / dx; ``chain``: what d loss / dx is multiplied by for the score (affine scale) and for the
    product of query and key (affine scale and soft cap), a pair.
    """
    y, cap_slope = scores(qk, where, call, bias)
    x = apply_affine(y, affine)
    z = modulate(x, modulator, call.ORDER, CLAMP)
    z = mask_scores(z, y, where, call, mask, CHECK, EDGE, TAIL)
    z -= norm[0]
    if len(norm) > 1:
        z -= norm[1]
    p = tl.exp2(z)
    if CHECK:
        y = tl.where(p == 0.0, 0.0, y)
        x = tl.where(p == 0.0, 0.0, x)
    slope = modulate_slope(x, modulator, call.ORDER)
    chain = (1.0, cap_slope)
    if len(affine) > 0:
        chain = (affine[0], affine[0] * cap_slope)
    return p, x, y, slope, chain


@triton.jit
def dropout_keep(seed, threshold, row, col, stream, TRANSPOSED: tl.constexpr, COLS: tl.constexpr):
    """Which probabilities of a tile survive dropout: counter-based, so every tiling draws the same mask.

    One Philox call serves four neighbouring keys. ``row`` [R] and ``stream`` (scalar or [R]) number the queries and the
    heads, ``col`` is the tile's first key, a multiple of 4. Returns [R, COLS], or [COLS, R] if TRANSPOSED.
    """
    group = col // 4 + tl.arange(0, COLS // 4)
    ROWS: tl.constexpr = row.shape[0]
    zero = tl.zeros([ROWS, COLS // 4], tl.uint32)
    c0 = group[None, :].to(tl.uint32) + zero
    c1 = row[:, None].to(tl.uint32) + zero
    if TRANSPOSED:
        c0 = tl.trans(c0)
        c1 = tl.trans(c1)
    c2 = stream.to(tl.uint32)
    if len(c2.shape) == 1:
        c2 = c2[:, None]
        if TRANSPOSED:
            c2 = tl.trans(c2)
    zero = c0 * 0
    r0, r1, r2, r3 = tl.philox(seed, c0, c1, c2 + zero, zero, PHILOX_ROUNDS)
    bits = tl.join(tl.join(r0, r2), tl.join(r1, r3)).to(tl.int32, bitcast=True)
    if TRANSPOSED:
        bits = tl.reshape(tl.permute(bits, (0, 2, 3, 1)), (COLS, ROWS))
    else:
        bits = tl.reshape(bits, (ROWS, COLS))
    return bits >= threshold


# --- which tiles a program visits --------------------------------------------------------------------------------


@triton.jit
def query_block(call, blocks, BLOCK_M: tl.constexpr):
    """(head of the batch, batch, head, first query) of a program that has a tile of one head's queries."""
    pid = tl.program_id(0)
    stream = pid // blocks
    block = pid % blocks
    if call.CAUSAL:
        block = blocks - 1 - block  # the longest rows first
    return stream, stream // call.heads, stream % call.heads, block * BLOCK_M


@triton.jit
def key_bounds(m0, call, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(lo, full_lo, full_hi, hi): keys that queries m0.. may see; tiles in [full_lo, full_hi) need no check.

    Tiles start at multiples of BLOCK_N.
    """
    first = m0 + call.n_cols - call.n_rows
    last = tl.minimum(m0 + BLOCK_M, call.n_rows) - 1 + call.n_cols - call.n_rows
    lo = first * 0
    full_lo = lo
    hi = call.n_cols
    full_hi = call.n_cols
    if call.CAUSAL:
        hi = tl.minimum(hi, last + 1)
        full_hi = tl.minimum(full_hi, first + 1)
    if call.window is not None:
        lo = tl.maximum(first - call.window + 1, 0) // BLOCK_N * BLOCK_N
        full_lo = tl.cdiv(tl.maximum(last - call.window + 1, 0), BLOCK_N) * BLOCK_N
        if not call.CAUSAL:
            hi = tl.minimum(hi, last + call.window)
            full_hi = tl.minimum(full_hi, first + call.window)
    hi = tl.maximum(hi, 0)
    full_lo = tl.minimum(full_lo, hi)
    full_hi = tl.maximum(tl.maximum(full_hi, 0) // BLOCK_N * BLOCK_N, full_lo)
    return lo, full_lo, full_hi, hi


@triton.jit
def query_bounds(n0, call, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(lo, full_lo, full_hi, hi) of the queries that may see keys n0.., likewise.

    Queries that do not exist have no weight, so the last tile counts as full unless there is a window.
    """
    first = n0 - (call.n_cols - call.n_rows)
    last = tl.minimum(n0 + BLOCK_N, call.n_cols) - 1 - (call.n_cols - call.n_rows)
    lo = first * 0
    full_lo = lo
    hi = call.n_rows
    full_hi = call.n_rows
    if call.CAUSAL:
        lo = tl.maximum(first, 0) // BLOCK_M * BLOCK_M
        full_lo = tl.cdiv(tl.maximum(last, 0), BLOCK_M) * BLOCK_M
    if call.window is not None:
        hi = tl.minimum(hi, last + call.window)
        full_hi = tl.minimum(full_hi, first + call.window)
        if not call.CAUSAL:
            lo = tl.maximum(first - call.window + 1, 0) // BLOCK_M * BLOCK_M
            full_lo = tl.cdiv(tl.maximum(last - call.window + 1, 0), BLOCK_M) * BLOCK_M
    hi = tl.maximum(hi, 0)
    full_lo = tl.minimum(full_lo, hi)
    if call.window is not None:
        full_hi = tl.maximum(full_hi, 0) // BLOCK_M * BLOCK_M
    full_hi = tl.maximum(full_hi, full_lo)
    return lo, full_lo, full_hi, hi
