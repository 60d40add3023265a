"""From products of queries and keys to modulated scores, probabilities and, in the backward pass, their gradients.

Scores live in the base-2 domain: ``y = log2(e) * x``, so that the softmax needs ``exp2`` alone. Tiles are indexed by
``where``, their queries and keys, two index tensors that broadcast against each other: the dk/dv kernel holds its tiles
transposed, and everything here works for both.
"""

import triton
import triton.language as tl

from hf_multimax.attention.triton.memory import head_base, load_elements
from hf_multimax.attention.triton.modulator import (
    LOG2E,
    apply_affine,
    load_affine,
    load_modulator,
    modulate,
    modulate_slope,
)

#: A score at or below this (finfo(float32).min / 2) is a masked entry.
MASKED = tl.constexpr(-1.7014e38)
#: scores times this, or as they are
BASE_2 = LOG2E
NATURAL = tl.constexpr(1.0)
PHILOX_ROUNDS = tl.constexpr(7)


@triton.jit
def dot(a, b, UPCAST: tl.constexpr):
    """Matrix product in float32. ``UPCAST`` is for the interpreter, which multiplies the raw bits of bfloat16."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


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
def load_head(call, batch, head):
    """What scores of a head go through: (modulator, affine map, address of its mask, of its bias), or () for none.

    ``head`` may be a tensor of heads, [rows, 1].
    """
    mask, bias = load_added(call, batch, head)
    return load_modulator(call, head), load_affine(call, head), mask, bias


@triton.jit
def load_added(call, batch, head):
    """(address of a head's mask, of its bias), or () for none."""
    mask = ()
    if call.mask is not None:
        mask = (head_base(call.mask, call.s_mask, batch, head),)
    bias = ()
    if call.bias is not None:
        bias = (head_base(call.bias, call.s_bias, batch, head),)
    return mask, bias


@triton.jit
def places(rows, n0, COLS: tl.constexpr, TRANSPOSED: tl.constexpr):
    """``where`` of a tile of the queries ``rows`` and the keys from ``n0``: [queries, keys], or turned."""
    cols = n0 + tl.arange(0, COLS)
    if TRANSPOSED:
        where = (rows[None, :], cols[:, None])
    else:
        where = (rows[:, None], cols[None, :])
    return where


@triton.jit
def scores(qk, where, call, bias, UNIT: tl.constexpr = BASE_2):
    """Scores before the modulator, times ``UNIT``, and the soft cap's slope (1 without a cap)."""
    if call.softcap is None:
        y = qk * (call.scale * UNIT)
        slope = 1.0
    else:
        t = tanh(qk * (call.scale / call.softcap))
        y = t * (call.softcap * UNIT)
        slope = 1.0 - t * t
    if len(bias) > 0:
        y += load_elements(bias[0], call.s_bias, where, call, call.BIAS_BY_ROW).to(tl.float32) * UNIT
    return y, slope


@triton.jit
def mask_scores(
    z,
    y,
    where,
    call,
    mask,
    CHECK: tl.constexpr,
    EDGE: tl.constexpr,
    TAIL: tl.constexpr,
    UNIT: tl.constexpr = BASE_2,
):
    """Modulated scores ``z`` with minus infinity at every masked entry; NaN stays NaN.

    CHECK: a score ``y`` may be minus infinity. EDGE: the tile may leave the band of visible keys. TAIL: it may hold
    keys that do not exist.
    """
    rows, cols = where
    hidden = y <= MASKED * UNIT if CHECK else tl.zeros(z.shape, tl.int1)
    if TAIL:
        hidden = hidden | (cols >= call.n_cols)
    if EDGE:
        position = rows + (call.n_cols - call.n_rows)
        if call.CAUSAL:
            hidden = hidden | (cols > position)
        if call.window is not None:
            hidden = hidden | (cols <= position - call.window)
            if not call.CAUSAL:
                hidden = hidden | (cols >= position + call.window)
    if len(mask) > 0:
        m = load_elements(mask[0], call.s_mask, where, call, call.MASK_BY_ROW)
        if call.MASK_MIN is None:
            hidden = hidden | (m == 0)
        else:
            m = m.to(tl.float32)
            hidden = hidden | (m <= call.MASK_MIN)
            z += m * UNIT
    return tl.where(hidden, float("-inf"), z)


@triton.jit
def modulated_scores(
    qk,
    where,
    call,
    own,
    CHECK: tl.constexpr,
    EDGE: tl.constexpr,
    TAIL: tl.constexpr,
    CLAMP: tl.constexpr = False,
):
    """(z, x, y, slope): modulated and masked scores, the modulator's argument, the scores and the soft cap's slope.

    ``own``: the head's, as :func:`load_head` gives it.
    """
    modulator, affine, mask, bias = own
    y, slope = scores(qk, where, call, bias)
    x = apply_affine(y, affine)
    z = mask_scores(modulate(x, modulator, call.ORDER, CLAMP), y, where, call, mask, CHECK, EDGE, TAIL)
    return z, x, y, slope


@triton.jit
def softmax_step(z, peak, total):
    """One tile more in a running softmax: (its weights, what the rows' earlier ones shrink by, peak, total)."""
    new_peak = tl.maximum(peak, tl.max(z, 1))
    # a row that has seen nothing yet: any finite reference avoids inf - inf
    reference = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    p = tl.exp2(z - reference[:, None])
    shrink = tl.exp2(peak - reference)
    return p, shrink, new_peak, total * shrink + tl.sum(p, 1)


@triton.jit
def product(queries, keys, UPCAST: tl.constexpr, TRANSPOSED: tl.constexpr, EXACT: tl.constexpr):
    """Products of every query row with every key row: [queries, keys], or turned.

    EXACT: those of the other kernels to the last bit, since steep slopes magnify their differences.
    """
    if TRANSPOSED and EXACT:
        out = tl.trans(dot(queries, tl.trans(keys), UPCAST))
    elif TRANSPOSED:
        out = dot(keys, tl.trans(queries), UPCAST)
    else:
        out = dot(queries, tl.trans(keys), UPCAST)
    return out


@triton.jit
def probabilities(
    tiles,
    norm,
    row_delta,
    place,
    call,
    own,
    CHECK: tl.constexpr,
    EDGE: tl.constexpr,
    TAIL: tl.constexpr,
    CLAMP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Recompute for the backward pass: (p, used, g, x, y, slope, chain) of a tile.

    ``tiles``: queries, keys, values and gradients of the output; ``norm`` and ``row_delta``: of the rows, as
    :func:`~hf_multimax.attention.triton.memory.load_norm` gives them; ``place``: the queries' numbers, the first key,
    and which head of the batch.

    ``used``: p after dropout; ``g``: gradient of the modulated scores; ``y``: score, ``x``: the modulator's argument,
    both with CHECK 0 where p is, so that gradients stay finite there; ``slope``: d sigma / dx; ``chain``: what
    d loss / dx is multiplied by for the score (affine scale) and for the product of query and key (affine scale and
    soft cap), a pair.
    """
    q, k, v, do = tiles
    rows, n0, stream = place
    modulator, affine, mask, bias = own
    AXIS: tl.constexpr = 0 if TRANSPOSED else 1
    where = places(rows, n0, k.shape[0], TRANSPOSED)
    qk = product(q, k, call.UPCAST, TRANSPOSED, EXACT)
    z, x, y, cap_slope = modulated_scores(qk, where, call, own, CHECK, EDGE, TAIL, CLAMP)
    z -= tl.expand_dims(norm[0], AXIS)
    if len(norm) > 1:
        z -= tl.expand_dims(norm[1], AXIS)
    p = tl.exp2(z)
    if CHECK:
        y = tl.where(p == 0.0, 0.0, y)
        x = tl.where(p == 0.0, 0.0, x)
    slope = modulate_slope(x, modulator, call.ORDER)
    chain = (1.0, cap_slope)
    if len(affine) > 0:
        chain = (affine[0], affine[0] * cap_slope)
    dp = product(do, v, call.UPCAST, TRANSPOSED, EXACT)
    used = p
    if call.seed is not None:
        keep = dropout_keep(tl.load(call.seed), call.threshold, rows, n0, stream, TRANSPOSED, k.shape[0])
        dp = tl.where(keep, dp * call.keep_scale, 0.0)
        used = tl.where(keep, p * call.keep_scale, 0.0)
    return p, used, p * (dp - tl.expand_dims(row_delta, AXIS)), x, y, slope, chain


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
