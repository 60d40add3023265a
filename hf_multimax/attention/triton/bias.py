"""Gradient of the position bias in Triton, the last launch of the backward pass: it reads the delta of the first."""

import triton
import triton.language as tl

from hf_multimax.attention.triton.bounds import query_bounds
from hf_multimax.attention.triton.memory import head_base, load_queries, load_rows
from hf_multimax.attention.triton.scores import load_head, probabilities


@triton.jit
def bias_part(
    call,
    batches,
    row_blocks,
    col_blocks,
    PER_BATCH: tl.constexpr,
    PER_HEAD: tl.constexpr,
    PER_ROW: tl.constexpr,
    PER_COL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What a program sums over, (first, end) each: of the batch, of the heads, of the queries, of the keys.

    PER_*: the bias has that dimension; where it has not, the program loops over it, in a fixed order.
    """
    pid = tl.program_id(0)
    own_cols = pid % col_blocks
    own_rows = pid // col_blocks % row_blocks
    pair = pid // col_blocks // row_blocks
    head_lo = 0
    head_hi = call.heads
    batch_lo = 0
    batch_hi = batches
    if PER_HEAD:
        head_lo = pair % call.heads
        head_hi = head_lo + 1
        pair = pair // call.heads
    if PER_BATCH:
        batch_lo = pair
        batch_hi = pair + 1
    row_lo = 0
    row_hi = call.n_rows
    if PER_ROW:
        row_lo = own_rows * BLOCK_M
        row_hi = tl.minimum(row_lo + BLOCK_M, call.n_rows)
    col_lo = 0
    col_hi = call.n_cols
    if PER_COL:
        col_lo = own_cols * BLOCK_N
        col_hi = tl.minimum(col_lo + BLOCK_N, call.n_cols)
    return batch_lo, batch_hi, head_lo, head_hi, row_lo, row_hi, col_lo, col_hi


@triton.jit
def store_bias(
    dbias,
    s_dbias,
    acc,
    part,
    call,
    PER_ROW: tl.constexpr,
    PER_COL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Store a program's sums, over queries or keys where the bias has no such dimension."""
    rows = part[4] + tl.arange(0, BLOCK_M)
    cols = part[6] + tl.arange(0, BLOCK_N)
    if not PER_ROW:
        acc = tl.sum(acc, 0)[None, :] + tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        rows = rows + tl.where(rows > 0, call.n_rows, 0)  # only the first row is stored
    if not PER_COL:
        acc = tl.sum(acc, 1)[:, None] + tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        cols = cols + tl.where(cols > 0, call.n_cols, 0)
    dbias += tl.cast(part[0], tl.int64) * s_dbias[0] + tl.cast(part[2], tl.int64) * s_dbias[1]
    tl.store(
        dbias + tl.cast(rows, tl.int64)[:, None] * s_dbias[2] + tl.cast(cols, tl.int64)[None, :] * s_dbias[3],
        acc.to(dbias.dtype.element_ty),
        mask=(rows < call.n_rows)[:, None] & (cols < call.n_cols)[None, :],
    )


@triton.jit
def bias_kernel(
    call,
    by_row,
    dbias,
    s_dbias,
    batches,
    row_blocks,
    col_blocks,
    PER_BATCH: tl.constexpr,
    PER_HEAD: tl.constexpr,
    PER_ROW: tl.constexpr,
    PER_COL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per tile of the bias gradient, summed over the dimensions along which the bias was broadcast."""
    part = bias_part(call, batches, row_blocks, col_blocks, PER_BATCH, PER_HEAD, PER_ROW, PER_COL, BLOCK_M, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for batch in range(part[0], part[1]):
        for head in range(part[2], part[3]):
            stream = batch * call.heads + head
            k_base = head_base(call.k, call.s_k, batch, head // call.group)
            v_base = head_base(call.v, call.s_v, batch, head // call.group)
            own = load_head(call, batch, head)
            for n0 in range(part[6], part[7], BLOCK_N):
                k_tile = load_rows(k_base, n0, call.n_cols, call.s_k, BLOCK_N, call.D, call.BLOCK_D, True)
                v_tile = load_rows(v_base, n0, call.n_cols, call.s_v, BLOCK_N, call.DV, call.BLOCK_DV, True)
                visible = query_bounds(n0, call, BLOCK_M, BLOCK_N)
                for m0 in range(tl.maximum(part[4], visible[0]), tl.minimum(part[5], visible[3]), BLOCK_M):
                    rows, q_tile, do_tile, norm, row_delta = load_queries(call, by_row, batch, head, m0, BLOCK_M)
                    tiles, place = (q_tile, k_tile, v_tile, do_tile), (rows, n0, stream)
                    _, _, g, _, _, slope, chain = probabilities(
                        tiles, norm, row_delta, place, call, own, True, True, True, False, False, False
                    )
                    acc += (g * slope * chain[0]).to(tl.float32)
    store_bias(dbias, s_dbias, acc, part, call, PER_ROW, PER_COL, BLOCK_M, BLOCK_N)
