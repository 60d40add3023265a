"""Forward pass of attention through a function of rows."""

import triton
import triton.language as tl

from hf_multimax.attention.triton.bounds import key_bounds
from hf_multimax.attention.triton.memory import head_base, load_rows, store_rows
from hf_multimax.attention.triton.rows.tiles import (
    COUNT,
    any_weight,
    drop,
    head_options,
    kept_at,
    pinned,
    row_scores,
    store_numbers,
)
from hf_multimax.attention.triton.scores import dot, load_added
from hf_multimax.rows.triton.functions import find, weigh
from hf_multimax.rows.triton.memory import chunk, place


@triton.jit
def rows_forward_kernel(
    call,
    function,
    o,
    stats,
    s_o,
    plane,
    blocks,
    items,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    FROM_ZERO: tl.constexpr,
    SPARSE: tl.constexpr,
):
    """Some programs, each with a scratch for the scores of a block of queries: scores, walk, weights, output."""
    program = tl.program_id(0)
    line = tl.cast(program, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    scratch = function.x + line * function.s_row
    for item in range(program, items, tl.num_programs(0)):
        # 1. which head, which queries: the longest rows first
        stream = item // blocks
        block = item % blocks
        if call.CAUSAL:
            block = blocks - 1 - block
        m0 = block * BLOCK_M
        batch, head = stream // call.heads, stream % call.heads
        rows = m0 + tl.arange(0, BLOCK_M)
        k = head_base(call.k, call.s_k, batch, head // call.group)
        v = head_base(call.v, call.s_v, batch, head // call.group)
        added = load_added(call, batch, head)
        q = head_base(call.q, call.s_q, batch, head)
        q_tile = load_rows(q, m0, call.n_rows, call.s_q, BLOCK_M, call.D, call.BLOCK_D, True)

        # 2. all their scores
        bounds = key_bounds(m0, call, BLOCK_M, BLOCK_N)
        first = bounds[0]
        if FROM_ZERO:
            first = first * 0
            bounds = (first, first, first, bounds[3])
        tl.debug_barrier()  # the last block's scores have been read
        for phase in tl.static_range(3):
            if phase > 0 or call.window is not None:
                for n0 in range(bounds[phase], bounds[phase + 1], BLOCK_N):
                    k_tile = load_rows(k, n0, call.n_cols, call.s_k, BLOCK_N, call.D, call.BLOCK_D, phase != 1)
                    qk = dot(q_tile, tl.trans(k_tile), call.UPCAST)
                    x, _ = row_scores(qk, rows, n0, call, added, phase != 1, phase != 1)
                    tl.store(scratch[:, None] + (n0 - first + tl.arange(0, BLOCK_N))[None, :], x)
        tl.debug_barrier()  # they are there for all threads

        # 3. what their weights depend on
        n = bounds[3] - first
        options = head_options(function, head, BLOCK_M)
        numbers = find(function, place(function, line, n, CHUNK), options, CHUNK)
        if stats is not None:
            store_numbers(stats, plane, kept_at(call, stream, rows), numbers, COUNT)

        # 4. weights and their product with the values, where there are some
        at = place(function, line, n, BLOCK_N)
        acc = tl.zeros([BLOCK_M, call.BLOCK_DV], tl.float32)
        for n0 in range(0, n, BLOCK_N):
            p = weigh(function, chunk(function, at, n0, BLOCK_N), n0, numbers, options)
            if any_weight(p, SPARSE):
                p = drop(p, call, rows, first + n0, stream)
                v_tile = load_rows(v, first + n0, call.n_cols, call.s_v, BLOCK_N, call.DV, call.BLOCK_DV, True)
                acc += dot(pinned(p).to(v_tile.dtype), v_tile, call.UPCAST)
        o_base = head_base(o, s_o, batch, head)
        store_rows(o_base, m0, call.n_rows, s_o, acc, BLOCK_M, call.DV, call.BLOCK_DV)
