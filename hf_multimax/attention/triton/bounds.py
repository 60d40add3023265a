"""Which tiles a program of the Triton kernels visits."""

import triton
import triton.language as tl


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
