"""Addresses, tiles and vectors of the Triton kernels: loading and storing."""

import triton
import triton.language as tl


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
def load_elements(pointer, strides, where, call, BY_ROW: tl.constexpr):
    """Elements of a mask or bias for a tile; one vector of keys, left to broadcast, unless it differs by row."""
    rows, cols = where
    pointers = pointer + cols.to(tl.int64) * strides[3]
    exists = cols < call.n_cols
    if BY_ROW:
        pointers = pointers + rows.to(tl.int64) * strides[2]
        exists = exists & (rows < call.n_rows)
    return tl.load(pointers, mask=exists, other=0)


@triton.jit
def load_norm(by_row, call, batch, head, rows):
    """What the forward pass divided rows by, in base 2: (log,), or (peak, log of the sum relative to it).

    The pair costs one more subtraction per score and keeps float32's accuracy where scores are large. Rows that do not
    exist get p = 0.
    """
    exists = rows < call.n_rows
    totals = head_base(by_row.totals, by_row.s_row, batch, head)
    norm = (tl.load(totals + rows, mask=exists, other=float("inf")),)
    if by_row.EXACT:
        peaks = head_base(by_row.peaks, by_row.s_row, batch, head)
        norm = (tl.load(peaks + rows, mask=exists, other=0.0),) + norm
    return norm


@triton.jit
def store_norm(by_row, batch, head, rows, exists, peak, total):
    """Store a norm as :func:`load_norm` reads it: plus infinity for rows without anything."""
    empty = total == 0.0
    log = tl.log2(tl.where(empty, 1.0, total))
    if not by_row.EXACT:
        log += peak
    else:
        peaks = head_base(by_row.peaks, by_row.s_row, batch, head)
        tl.store(peaks + rows, tl.where(empty, 0.0, peak), mask=exists)
    totals = head_base(by_row.totals, by_row.s_row, batch, head)
    tl.store(totals + rows, tl.where(empty, float("inf"), log), mask=exists)


@triton.jit
def load_queries(call, by_row, batch, head, m0, BLOCK_M: tl.constexpr):
    """What the queries from ``m0`` have in the backward pass: (numbers, q, gradient of the output, norm, delta)."""
    rows = m0 + tl.arange(0, BLOCK_M)
    q = head_base(call.q, call.s_q, batch, head)
    do = head_base(by_row.do, by_row.s_do, batch, head)
    delta = head_base(by_row.delta, by_row.s_row, batch, head)
    q_tile = load_rows(q, m0, call.n_rows, call.s_q, BLOCK_M, call.D, call.BLOCK_D, True)
    do_tile = load_rows(do, m0, call.n_rows, by_row.s_do, BLOCK_M, call.DV, call.BLOCK_DV, True)
    norm = load_norm(by_row, call, batch, head, rows)
    return rows, q_tile, do_tile, norm, tl.load(delta + rows, mask=rows < call.n_rows, other=0.0)
