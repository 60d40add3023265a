"""Gradient of the position bias in attention through a function of rows; it reads the sums of the first launch."""

import triton
import triton.language as tl

from hf_multimax.attention.triton.bias import bias_part, store_bias
from hf_multimax.attention.triton.bounds import query_bounds
from hf_multimax.attention.triton.memory import head_base, load_rows
from hf_multimax.attention.triton.rows.tiles import (
    COUNT,
    any_weight,
    head_options,
    kept_at,
    load_numbers,
    weighed,
    weight_gradients,
)
from hf_multimax.attention.triton.scores import load_added
from hf_multimax.rows.triton.functions import differentiate


@triton.jit
def rows_bias_kernel(
    call,
    function,
    do,
    dbias,
    stats,
    sums,
    s_do,
    s_dbias,
    plane,
    batches,
    row_blocks,
    col_blocks,
    PER_BATCH: tl.constexpr,
    PER_HEAD: tl.constexpr,
    PER_ROW: tl.constexpr,
    PER_COL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPARSE: tl.constexpr,
):
    """One program per tile of the bias gradient, summed over the dimensions along which the bias was broadcast."""
    part = bias_part(call, batches, row_blocks, col_blocks, PER_BATCH, PER_HEAD, PER_ROW, PER_COL, BLOCK_M, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for batch in range(part[0], part[1]):
        for head in range(part[2], part[3]):
            stream = batch * call.heads + head
            k = head_base(call.k, call.s_k, batch, head // call.group)
            v = head_base(call.v, call.s_v, batch, head // call.group)
            q = head_base(call.q, call.s_q, batch, head)
            do_base = head_base(do, s_do, batch, head)
            added = load_added(call, batch, head)
            options = head_options(function, head, BLOCK_M)
            for n0 in range(part[6], part[7], BLOCK_N):
                k_tile = load_rows(k, n0, call.n_cols, call.s_k, BLOCK_N, call.D, call.BLOCK_D, True)
                visible = query_bounds(n0, call, BLOCK_M, BLOCK_N)
                for m0 in range(tl.maximum(part[4], visible[0]), tl.minimum(part[5], visible[3]), BLOCK_M):
                    rows = m0 + tl.arange(0, BLOCK_M)
                    at = kept_at(call, stream, rows)
                    q_tile = load_rows(q, m0, call.n_rows, call.s_q, BLOCK_M, call.D, call.BLOCK_D, True)
                    numbers, place = load_numbers(stats, plane, at, COUNT), (rows, n0)
                    x, p, _ = weighed(call, function, (q_tile, k_tile), place, added, numbers, options, True)
                    if any_weight(p, SPARSE):
                        do_tile = load_rows(do_base, m0, call.n_rows, s_do, BLOCK_M, call.DV, call.BLOCK_DV, True)
                        v_tile = load_rows(v, n0, call.n_cols, call.s_v, BLOCK_N, call.DV, call.BLOCK_DV, True)
                        g, p = weight_gradients(call, (do_tile, v_tile), place, stream, p)
                        totals = load_numbers(sums, plane, at, function.SUMS)
                        acc += differentiate(function, x, p, g, numbers, options, totals)
    store_bias(dbias, s_dbias, acc, part, call, PER_ROW, PER_COL, BLOCK_M, BLOCK_N)
