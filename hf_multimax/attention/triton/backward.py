"""Backward pass of MultiMax attention in Triton: probabilities are recomputed, nothing is accumulated atomically.

Order of the launches: :func:`dq_kernel`, which also finds delta, then :func:`dkdv_kernel` (also the scalars' partial
sums) and :func:`hf_multimax.attention.triton.bias.bias_kernel`, which read it.
"""

import triton
import triton.language as tl

from hf_multimax.attention.triton.bounds import key_bounds, query_block, query_bounds
from hf_multimax.attention.triton.memory import head_base, load_norm, load_queries, load_rows, store_rows
from hf_multimax.attention.triton.modulator import (
    LN2,
    LOG2E,
    add_sums,
    clamp_constant,
    scalar_moments,
    zero_sums,
)
from hf_multimax.attention.triton.scores import dot, load_head, probabilities

#: a row whose largest modulated score (base 2) is beyond this may have slopes that magnify delta's rounding
STEEP = tl.constexpr(256.0)


@triton.jit
def _store_scalar_gradients(partial, sums, exists, modulator, AFFINE: tl.constexpr, ORDER: tl.constexpr):
    """Gradients from sums by key, laid out as ranges [2N], ts [2N], then scale and shift of the affine map."""
    b, d, t_b, t_d = modulator
    fold = LN2
    for n in tl.static_range(ORDER):
        tl.store(partial + 2 * n, (n + 1) * t_b[n] * _total(sums[4 * n + 2], exists))
        tl.store(partial + (2 * n + 1), -(n + 1) * t_d[n] * _total(sums[4 * n + 3], exists))
        tl.store(partial + (2 * ORDER + 2 * n), fold * _total(sums[4 * n], exists))
        tl.store(partial + (2 * ORDER + 2 * n + 1), fold * _total(sums[4 * n + 1], exists))
        fold = fold * LN2
    if AFFINE:
        tl.store(partial + 4 * ORDER, _total(sums[4 * ORDER], exists))
        tl.store(partial + (4 * ORDER + 1), _total(sums[4 * ORDER + 1], exists))


@triton.jit
def _total(sums, exists):
    return tl.sum(tl.where(exists[:, None], sums, 0.0))


@triton.jit
def dq_kernel(
    call,
    by_row,
    dq,
    s_dq,
    blocks,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per tile of queries of one head: dq and delta.

    rowsum(o * do) is off, by o's rounding to the storage type and by summing in another order than dp does, and the
    modulator's slope magnifies that: where one weight is 1, it would be all of dq. In half precision ``residual`` gives
    back what o's rounding cut off. The rows' sums of the gradients before the slope are zero in exact arithmetic: what
    is left of them corrects the delta that the other kernels read (float64 if o is float32). It corrects dq, too: in
    float32 at the end, in half precision, where that would spill registers, by a second sweep over the keys wherever
    slopes may be steep.
    """
    # 1. which head, which queries
    stream, batch, head, m0 = query_block(call, blocks, BLOCK_M)
    k = head_base(call.k, call.s_k, batch, head // call.group)
    v = head_base(call.v, call.s_v, batch, head // call.group)
    own = load_head(call, batch, head)

    # 2. the rows' queries, gradients and norms, and delta as rounding leaves it
    rows = m0 + tl.arange(0, BLOCK_M)
    q_base = head_base(call.q, call.s_q, batch, head)
    q_tile = load_rows(q_base, m0, call.n_rows, call.s_q, BLOCK_M, call.D, call.BLOCK_D, True)
    o_base = head_base(by_row.o, by_row.s_o, batch, head)
    o_tile = load_rows(o_base, m0, call.n_rows, by_row.s_o, BLOCK_M, call.DV, call.BLOCK_DV, True)
    do_base = head_base(by_row.do, by_row.s_do, batch, head)
    do_tile = load_rows(do_base, m0, call.n_rows, by_row.s_do, BLOCK_M, call.DV, call.BLOCK_DV, True)
    norm = load_norm(by_row, call, batch, head, rows)
    output = o_tile.to(tl.float32)
    if by_row.residual is not None:
        cut = head_base(by_row.residual, by_row.s_o, batch, head)
        cut_tile = load_rows(cut, m0, call.n_rows, by_row.s_o, BLOCK_M, call.DV, call.BLOCK_DV, True)
        output += cut_tile.to(tl.float32)
    row_delta = tl.sum(output * do_tile.to(tl.float32), 1)

    kept = 1.0
    if by_row.sinks is not None:
        log_share = tl.load(by_row.sinks + head).to(tl.float32) * LOG2E - norm[0]
        if len(norm) > 1:
            log_share -= norm[1]
        kept = 1.0 - tl.exp2(log_share)

    SUM: tl.constexpr = tl.float64 if by_row.EXACT else tl.float32
    SWEEPS: tl.constexpr = 1 if by_row.EXACT else 2
    true_delta = row_delta.to(SUM)
    acc = tl.zeros([BLOCK_M, call.BLOCK_D], tl.float32)
    lever = tl.zeros([BLOCK_M, call.BLOCK_D], tl.float32)
    bounds = key_bounds(m0, call, BLOCK_M, BLOCK_N)
    height = tl.abs(norm[0])
    shifted = (norm[0] - clamp_constant(own[0]),) if call.NEAR else norm
    steep = tl.max(tl.where(height < float("inf"), height, 0.0), 0) > STEEP
    # 3. over the keys: p again, its gradient, through sigma's slope to dq; once more where delta was too rough
    for sweep in tl.static_range(SWEEPS):
        if steep | (sweep == 0):
            row_delta = true_delta.to(tl.float32)
            acc = tl.zeros([BLOCK_M, call.BLOCK_D], tl.float32)
            excess = tl.zeros([BLOCK_M], SUM)
            for phase in tl.static_range(3):
                if phase > 0 or call.window is not None:
                    for n0 in range(bounds[phase], bounds[phase + 1], BLOCK_N):
                        k_tile = load_rows(k, n0, call.n_cols, call.s_k, BLOCK_N, call.D, call.BLOCK_D, phase != 1)
                        v_tile = load_rows(v, n0, call.n_cols, call.s_v, BLOCK_N, call.DV, call.BLOCK_DV, phase != 1)
                        p, _, g, _, _, slope, chain = probabilities(
                            (q_tile, k_tile, v_tile, do_tile),
                            shifted,
                            row_delta,
                            (rows, n0, stream),
                            call,
                            own,
                            CHECK=by_row.EXACT or call.bias is not None,
                            EDGE=phase != 1,
                            TAIL=phase != 1,
                            CLAMP=call.NEAR,
                            TRANSPOSED=False,
                            EXACT=by_row.EXACT,
                        )
                        excess += tl.sum(g.to(SUM), 1)
                        slope *= chain[1]
                        acc += dot((g * slope).to(k_tile.dtype), k_tile, call.UPCAST)
                        if by_row.EXACT:
                            lever += dot(p * slope, k_tile, call.UPCAST)
            true_delta = excess + row_delta * kept

    # 4. store delta for the other kernels, and dq
    delta = head_base(by_row.delta, by_row.s_row, batch, head)
    tl.store(delta + rows, true_delta, mask=rows < call.n_rows)
    if by_row.EXACT:
        acc -= (true_delta - row_delta).to(tl.float32)[:, None] * lever
    dq_base = head_base(dq, s_dq, batch, head)
    store_rows(dq_base, m0, call.n_rows, s_dq, acc * call.scale, BLOCK_M, call.D, call.BLOCK_D)


@triton.jit
def dkdv_kernel(
    call,
    by_row,
    dk,
    dv,
    partial,
    s_dk,
    s_dv,
    blocks,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per tile of keys of one key head, over the queries of every head of its group.

    Unless ``partial`` [B, H, blocks, 4N (+ 2)] is None, each head's share of the scalar gradients goes there.
    Those cancel along rows but are summed along columns: in float64 where the inputs are float32.
    Tiles are held transposed, [keys, queries], so that neither product needs its left operand turned.
    """
    SUM: tl.constexpr = tl.float64 if by_row.EXACT else tl.float32
    AFFINE: tl.constexpr = call.affine_scale is not None
    CHECK: tl.constexpr = by_row.EXACT or call.bias is not None
    COUNT: tl.constexpr = 4 * call.ORDER + 2 * (call.affine_scale is not None)
    # 1. which key head, which keys
    pid = tl.program_id(0)
    pair = pid // blocks
    key_heads = call.heads // call.group
    batch, key_head = pair // key_heads, pair % key_heads
    n0 = pid % blocks * BLOCK_N
    cols = n0 + tl.arange(0, BLOCK_N)
    k_base = head_base(call.k, call.s_k, batch, key_head)
    v_base = head_base(call.v, call.s_v, batch, key_head)
    k_tile = load_rows(k_base, n0, call.n_cols, call.s_k, BLOCK_N, call.D, call.BLOCK_D, True)
    v_tile = load_rows(v_base, n0, call.n_cols, call.s_v, BLOCK_N, call.DV, call.BLOCK_DV, True)
    acc_k = tl.zeros([BLOCK_N, call.BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_N, call.BLOCK_DV], tl.float32)
    bounds = query_bounds(n0, call, BLOCK_M, BLOCK_N)
    # 2. over the query heads of the group
    for member in range(call.group):
        head = key_head * call.group + member
        stream = batch * call.heads + head
        own = load_head(call, batch, head)
        sums = zero_sums(BLOCK_N, SUM, COUNT)
        # 3. over the queries: p and its gradient again, to dv, dk and the scalars' sums
        for phase in tl.static_range(3):
            if phase == 1 or call.window is not None or (phase == 0 and call.CAUSAL):
                for m0 in range(bounds[phase], bounds[phase + 1], BLOCK_M):
                    rows, q_tile, do_tile, norm, row_delta = load_queries(call, by_row, batch, head, m0, BLOCK_M)
                    tiles, place = (q_tile, k_tile, v_tile, do_tile), (rows, n0, stream)
                    _, used, g, x, y, slope, chain = probabilities(
                        tiles, norm, row_delta, place, call, own, CHECK, phase != 1, False, False, True, by_row.EXACT
                    )
                    acc_v += dot(used.to(do_tile.dtype), do_tile, call.UPCAST)
                    ds = g * slope * chain[1]
                    acc_k += dot(ds.to(q_tile.dtype), q_tile, call.UPCAST)
                    if partial is not None:
                        moments = scalar_moments(g, x, y, slope, own[0], SUM, AFFINE, call.ORDER, CHECK)
                        sums = add_sums(sums, moments, COUNT)
        if partial is not None:
            own_part = partial + (tl.cast(stream, tl.int64) * blocks + pid % blocks) * COUNT
            _store_scalar_gradients(own_part, sums, cols < call.n_cols, own[0], AFFINE, call.ORDER)

    # 4. store
    dk_base = head_base(dk, s_dk, batch, key_head)
    dv_base = head_base(dv, s_dv, batch, key_head)
    store_rows(dk_base, n0, call.n_cols, s_dk, acc_k * call.scale, BLOCK_N, call.D, call.BLOCK_D)
    store_rows(dv_base, n0, call.n_cols, s_dv, acc_v, BLOCK_N, call.DV, call.BLOCK_DV)
