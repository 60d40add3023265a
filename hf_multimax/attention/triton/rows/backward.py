"""Backward pass of attention through a function of rows: tiles are weighed anew by what was kept of their rows.

Nothing is accumulated atomically. :func:`rows_dq_kernel` comes first: it finds the rows' sums that
:func:`rows_dkdv_kernel` reads. Scores of rows that are NaN get no gradient.
"""

import triton
import triton.language as tl

from hf_multimax.attention.triton.bounds import key_bounds, query_block, query_bounds
from hf_multimax.attention.triton.memory import head_base, load_rows, store_rows
from hf_multimax.attention.triton.modulator import add_sums
from hf_multimax.attention.triton.rows.tiles import (
    COUNT,
    any_weight,
    drop,
    head_options,
    kept_at,
    load_numbers,
    pinned,
    store_numbers,
    weighed,
    weight_gradients,
)
from hf_multimax.attention.triton.scores import dot, load_added
from hf_multimax.rows.triton.functions import differentiate, option_gradients, row_sums, zero_row_sums


@triton.jit
def rows_dq_kernel(
    call,
    function,
    do,
    dq,
    stats,
    sums,
    d_options,
    s_do,
    s_dq,
    plane,
    blocks,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPARSE: tl.constexpr,
):
    """One program per block of queries of one head, in two sweeps over its keys: the rows' sums, then dq."""
    stream, batch, head, m0 = query_block(call, blocks, BLOCK_M)
    rows = m0 + tl.arange(0, BLOCK_M)
    k = head_base(call.k, call.s_k, batch, head // call.group)
    v = head_base(call.v, call.s_v, batch, head // call.group)
    added = load_added(call, batch, head)
    q_base = head_base(call.q, call.s_q, batch, head)
    q_tile = load_rows(q_base, m0, call.n_rows, call.s_q, BLOCK_M, call.D, call.BLOCK_D, True)
    do_base = head_base(do, s_do, batch, head)
    do_tile = load_rows(do_base, m0, call.n_rows, s_do, BLOCK_M, call.DV, call.BLOCK_DV, True)
    options = head_options(function, head, BLOCK_M)
    at = kept_at(call, stream, rows)
    numbers = load_numbers(stats, plane, at, COUNT)
    bounds = key_bounds(m0, call, BLOCK_M, BLOCK_N)

    totals = zero_row_sums(rows, function.SUMS)
    acc = tl.zeros([BLOCK_M, call.BLOCK_D], tl.float32)
    for sweep in tl.static_range(2):
        for phase in tl.static_range(3):
            if phase > 0 or call.window is not None:
                for n0 in range(bounds[phase], bounds[phase + 1], BLOCK_N):
                    k_tile = load_rows(k, n0, call.n_cols, call.s_k, BLOCK_N, call.D, call.BLOCK_D, phase != 1)
                    tiles, place = (q_tile, k_tile), (rows, n0)
                    x, p, slope = weighed(call, function, tiles, place, added, numbers, options, phase != 1)
                    if any_weight(p, SPARSE):
                        v_tile = load_rows(v, n0, call.n_cols, call.s_v, BLOCK_N, call.DV, call.BLOCK_DV, phase != 1)
                        g, p = weight_gradients(call, (do_tile, v_tile), place, stream, p)
                        if sweep == 0:
                            found = row_sums(function, x, p, g, numbers, options)
                            totals = add_sums(totals, found, function.SUMS)
                        else:
                            dx = differentiate(function, x, p, g, numbers, options, totals) * slope
                            acc += dot(pinned(dx).to(k_tile.dtype), k_tile, call.UPCAST)

    store_numbers(sums, plane, at, totals, function.SUMS)
    if function.OPTIONS:
        found = option_gradients(function, numbers, options, totals)
        for i in tl.static_range(3):
            if d_options[i] is not None:
                tl.store(d_options[i] + at[0], found[i], mask=at[1])
    dq_base = head_base(dq, s_dq, batch, head)
    store_rows(dq_base, m0, call.n_rows, s_dq, acc * call.scale, BLOCK_M, call.D, call.BLOCK_D)


@triton.jit
def rows_dkdv_kernel(
    call,
    function,
    do,
    dk,
    dv,
    stats,
    sums,
    s_do,
    s_dk,
    s_dv,
    plane,
    blocks,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPARSE: tl.constexpr,
):
    """One program per block of keys of one key head, over the queries of every head of its group."""
    pid = tl.program_id(0)
    pair = pid // blocks
    key_heads = call.heads // call.group
    batch, key_head = pair // key_heads, pair % key_heads
    n0 = pid % blocks * BLOCK_N
    k_base = head_base(call.k, call.s_k, batch, key_head)
    v_base = head_base(call.v, call.s_v, batch, key_head)
    k_tile = load_rows(k_base, n0, call.n_cols, call.s_k, BLOCK_N, call.D, call.BLOCK_D, True)
    v_tile = load_rows(v_base, n0, call.n_cols, call.s_v, BLOCK_N, call.DV, call.BLOCK_DV, True)
    acc_k = tl.zeros([BLOCK_N, call.BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_N, call.BLOCK_DV], tl.float32)
    bounds = query_bounds(n0, call, BLOCK_M, BLOCK_N)
    for member in range(call.group):
        head = key_head * call.group + member
        stream = batch * call.heads + head
        added = load_added(call, batch, head)
        options = head_options(function, head, BLOCK_M)
        q = head_base(call.q, call.s_q, batch, head)
        do_base = head_base(do, s_do, batch, head)
        for m0 in range(bounds[0], bounds[3], BLOCK_M):
            rows = m0 + tl.arange(0, BLOCK_M)
            at = kept_at(call, stream, rows)
            q_tile = load_rows(q, m0, call.n_rows, call.s_q, BLOCK_M, call.D, call.BLOCK_D, True)
            numbers = load_numbers(stats, plane, at, COUNT)
            place = (rows, n0)
            x, p, slope = weighed(call, function, (q_tile, k_tile), place, added, numbers, options, True)
            if any_weight(p, SPARSE):
                do_tile = load_rows(do_base, m0, call.n_rows, s_do, BLOCK_M, call.DV, call.BLOCK_DV, True)
                used = drop(p, call, rows, n0, stream)
                acc_v += dot(tl.trans(pinned(used).to(do_tile.dtype)), do_tile, call.UPCAST)
                g, p = weight_gradients(call, (do_tile, v_tile), place, stream, p)
                totals = load_numbers(sums, plane, at, function.SUMS)
                dx = differentiate(function, x, p, g, numbers, options, totals) * slope
                acc_k += dot(tl.trans(pinned(dx).to(q_tile.dtype)), q_tile, call.UPCAST)
    dk_base = head_base(dk, s_dk, batch, key_head)
    dv_base = head_base(dv, s_dv, batch, key_head)
    store_rows(dk_base, n0, call.n_cols, s_dk, acc_k * call.scale, BLOCK_N, call.D, call.BLOCK_D)
    store_rows(dv_base, n0, call.n_cols, s_dv, acc_v, BLOCK_N, call.DV, call.BLOCK_DV)
