"""Forward pass of MultiMax attention in Triton: whole query tiles, and split keys for a few queries (decoding).

Both store each row's norm for the backward pass: plus infinity where a row attends to nothing, so that the recomputed
probabilities vanish there.
"""

import triton
import triton.language as tl

from hf_multimax.attention.triton.bounds import key_bounds, query_block
from hf_multimax.attention.triton.memory import head_base, load_rows, store_norm, store_rounded
from hf_multimax.attention.triton.modulator import LOG2E, clamp_constant
from hf_multimax.attention.triton.scores import dot, dropout_keep, load_head, modulated_scores, places, softmax_step


@triton.jit
def forward_kernel(
    call,
    by_row,
    blocks,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per tile of queries of one head: running softmax over its keys. Arguments: see the package."""
    # 1. which head, which queries
    stream, batch, head, m0 = query_block(call, blocks, BLOCK_M)
    k = head_base(call.k, call.s_k, batch, head // call.group)
    v = head_base(call.v, call.s_v, batch, head // call.group)
    own = load_head(call, batch, head)
    left_out = clamp_constant(own[0]) if call.NEAR else 0.0
    CHECK: tl.constexpr = call.bias is not None or by_row.EXACT

    # 2. the queries, and an empty softmax (with the sink in it)
    rows = m0 + tl.arange(0, BLOCK_M)
    q_base = head_base(call.q, call.s_q, batch, head)
    q_tile = load_rows(q_base, m0, call.n_rows, call.s_q, BLOCK_M, call.D, call.BLOCK_D, True)
    acc = tl.zeros([BLOCK_M, call.BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if by_row.sinks is not None:
        sink = tl.load(by_row.sinks + head).to(tl.float32) * LOG2E
        peak = tl.full([BLOCK_M], 0.0, tl.float32) + sink
        total += tl.where(sink == float("-inf"), 0.0, 1.0)

    # 3. over the keys: score, sigma, mask, exponential, product with v
    bounds = key_bounds(m0, call, BLOCK_M, BLOCK_N)
    # tiles before, inside and after the band in which every key is visible to every query
    for phase in tl.static_range(3):
        if phase > 0 or call.window is not None:
            for n0 in range(bounds[phase], bounds[phase + 1], BLOCK_N):
                k_tile = load_rows(k, n0, call.n_cols, call.s_k, BLOCK_N, call.D, call.BLOCK_D, phase != 1)
                qk = dot(q_tile, tl.trans(k_tile), call.UPCAST)
                where = places(rows, n0, BLOCK_N, False)
                z, _, _, _ = modulated_scores(qk, where, call, own, CHECK, phase != 1, phase != 1, call.NEAR)
                p, shrink, peak, total = softmax_step(z, peak, total)
                if call.seed is not None:
                    keep = dropout_keep(tl.load(call.seed), call.threshold, rows, n0, stream, False, BLOCK_N)
                    p = tl.where(keep, p, 0.0)
                v_tile = load_rows(v, n0, call.n_cols, call.s_v, BLOCK_N, call.DV, call.BLOCK_DV, phase != 1)
                acc = acc * shrink[:, None] + dot(p.to(v_tile.dtype), v_tile, call.UPCAST)

    # 4. divide, store the rows and what they were divided by
    empty = total == 0.0
    acc *= (call.keep_scale / tl.where(empty, 1.0, total))[:, None]
    o_base = head_base(by_row.o, by_row.s_o, batch, head)
    residual = head_base(by_row.residual, by_row.s_o, batch, head)
    store_rounded(o_base, m0, call.n_rows, by_row.s_o, acc, residual, BLOCK_M, call.DV, call.BLOCK_DV)
    store_norm(by_row, batch, head, rows, rows < call.n_rows, peak + left_out, total)


@triton.jit
def decode_kernel(
    call,
    partial,
    split_peaks,
    split_totals,
    blocks,
    splits,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per share of the keys, for all the query rows (heads of the group x queries) of one key head.

    Writes the unnormalised output ``partial`` [B, H, Nq, splits, Dv] and each row's running peaks and totals
    [B, H, Nq, splits].
    """
    # 1. which key head, which rows, which share of the keys
    pid = tl.program_id(0)
    split = pid % splits
    block = pid // splits % blocks
    pair = pid // splits // blocks
    key_heads = call.heads // call.group
    batch, key_head = pair // key_heads, pair % key_heads
    k = head_base(call.k, call.s_k, batch, key_head)
    v = head_base(call.v, call.s_v, batch, key_head)
    packed = block * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = packed < call.group * call.n_rows
    rows = packed % call.n_rows
    head = tl.minimum(key_head * call.group + packed // call.n_rows, call.heads - 1)
    own = load_head(call, batch, head[:, None])

    # 2. the queries, and an empty softmax
    depth = tl.arange(0, call.BLOCK_D)
    q_rows = head_base(call.q, call.s_q, batch, head) + tl.cast(rows, tl.int64) * call.s_q[2]
    q_tile = tl.load(
        q_rows[:, None] + depth[None, :] * call.s_q[3], mask=exists[:, None] & (depth[None, :] < call.D), other=0.0
    )
    acc = tl.zeros([BLOCK_M, call.BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    # 3. over this share of the band that any of these queries sees, in whole tiles
    band = key_bounds(0, call, call.n_rows, BLOCK_N)
    share = tl.cdiv(tl.cdiv(band[3] - band[0], BLOCK_N), splits) * BLOCK_N
    lo = band[0] + split * share
    for n0 in range(lo, tl.minimum(lo + share, band[3]), BLOCK_N):
        k_tile = load_rows(k, n0, call.n_cols, call.s_k, BLOCK_N, call.D, call.BLOCK_D, True)
        qk = dot(q_tile, tl.trans(k_tile), call.UPCAST)
        z, _, _, _ = modulated_scores(qk, places(rows, n0, BLOCK_N, False), call, own, True, True, True)
        p, shrink, peak, total = softmax_step(z, peak, total)
        if call.seed is not None:
            keep = dropout_keep(tl.load(call.seed), call.threshold, rows, n0, batch * call.heads + head, False, BLOCK_N)
            p = tl.where(keep, p, 0.0)
        v_tile = load_rows(v, n0, call.n_cols, call.s_v, BLOCK_N, call.DV, call.BLOCK_DV, True)
        acc = acc * shrink[:, None] + dot(p.to(v_tile.dtype), v_tile, call.UPCAST)

    # 4. store what combine_kernel joins
    place = (tl.cast(batch * call.heads + head, tl.int64) * call.n_rows + rows) * splits + split
    depth_v = tl.arange(0, call.BLOCK_DV)
    tl.store(
        partial + place[:, None] * call.DV + depth_v[None, :], acc, mask=exists[:, None] & (depth_v[None, :] < call.DV)
    )
    tl.store(split_peaks + place, peak, mask=exists)
    tl.store(split_totals + place, total, mask=exists)


@triton.jit
def combine_kernel(
    call,
    by_row,
    partial,
    split_peaks,
    split_totals,
    splits,
    BLOCK_S: tl.constexpr,
):
    """One program per query row: join its splits and its sink, and normalise."""
    pid = tl.cast(tl.program_id(0), tl.int64)
    batch, head, row = pid // call.n_rows // call.heads, pid // call.n_rows % call.heads, pid % call.n_rows
    split = tl.arange(0, BLOCK_S)
    place = pid * splits + split
    peak = tl.load(split_peaks + place, mask=split < splits, other=float("-inf"))
    total = tl.load(split_totals + place, mask=split < splits, other=0.0)
    top = tl.max(peak, 0)
    if by_row.sinks is not None:
        sink = tl.load(by_row.sinks + head).to(tl.float32) * LOG2E
        top = tl.maximum(top, sink)
    reference = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2(peak - reference)
    total = tl.sum(total * weight, 0)
    if by_row.sinks is not None:
        total += tl.exp2(sink - reference)
    empty = total == 0.0

    depth = tl.arange(0, call.BLOCK_DV)
    tile = tl.load(
        partial + place[:, None] * call.DV + depth[None, :],
        mask=(split[:, None] < splits) & (depth[None, :] < call.DV),
        other=0.0,
    )
    out = tl.sum(tile * weight[:, None], 0) * (call.keep_scale / tl.where(empty, 1.0, total))
    o_base = head_base(by_row.o, by_row.s_o, batch, head)
    residual = head_base(by_row.residual, by_row.s_o, batch, head)
    store_rounded(o_base, row, row + 1, by_row.s_o, out[None, :], residual, 1, call.DV, call.BLOCK_DV)
    store_norm(by_row, batch, head, row, True, reference, total)
