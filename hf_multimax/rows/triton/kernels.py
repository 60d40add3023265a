"""The functions of rows by themselves, forward and backward: one program per block of rows."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from hf_multimax.attention.triton.modulator import (
    LOG2E,
    add_sums,
    load_affine,
    load_modulator,
    modulate_slope,
    scalar_moments,
    zero_sums,
)
from hf_multimax.rows.triton.functions import (
    differentiate,
    find,
    option_gradients,
    row_sums,
    weigh,
    zero_row_sums,
)
from hf_multimax.rows.triton.memory import argument, chunk, head_of, load_options, place


class Backward(NamedTuple):
    """What the backward pass has beside the call; all contiguous, ``[rows, n]`` or ``[rows]``.

    Attributes:
        p: probabilities, float32.
        grad: their gradients; ``grad_x`` gets the scores'.
        stats: ``[rows, STATS]``, or None for functions whose backward pass needs none.
        grad_value, grad_beta, grad_gamma: get the options' gradients, or are None.
        moments: gets ``[rows, 4N (+ 2)]`` sums of which MultiMax's scalars' gradients are made, or is None.
        AFFINE, MOMENTS: whether there is an affine map; whether moments are wanted.
    """

    p: Any
    grad: Any
    grad_x: Any
    stats: Any
    grad_value: Any
    grad_beta: Any
    grad_gamma: Any
    moments: Any
    AFFINE: Any
    MOMENTS: Any


@triton.jit
def rows_forward_kernel(rows, out, p, stats, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Probabilities in the scores' type, and where they are wanted in float32, too, and the rows' stats."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = row < rows.n_rows
    at = place(rows, row, rows.n, BLOCK_N)
    options = load_options(rows, row)
    found = find(rows, at, options, BLOCK_N)
    for n0 in range(0, at[2], BLOCK_N):
        weights = weigh(rows, chunk(rows, at, n0, BLOCK_N), n0, found, options)
        cols = (n0 + tl.arange(0, BLOCK_N))[None, :]
        to = row[:, None] * rows.n + cols
        inside = exists[:, None] & (cols < rows.n)
        tl.store(out + to, weights.to(out.dtype.element_ty), mask=inside)
        if p is not None:
            tl.store(p + to, weights, mask=inside)
    if stats is not None:
        for i in tl.static_range(6):
            tl.store(stats + row * 6 + i, found[i], mask=exists)


@triton.jit
def load_stats(stats, row, exists):
    """A row's stats as the forward pass left them, zeros where it has not."""
    out = ()
    for i in tl.static_range(6):
        x = tl.zeros(row.shape, tl.float32)
        if stats is not None:
            x = tl.load(stats + row * 6 + i, mask=exists, other=0.0)
        out = out + (x,)
    return out


@triton.jit
def load_back(rows, back, row, n0, BLOCK_N: tl.constexpr):
    """Scores, probabilities and gradients of a chunk; a row that is NaN has no probabilities, but MultiMax's."""
    cols = (n0 + tl.arange(0, BLOCK_N))[None, :]
    at = row[:, None] * rows.n + cols
    inside = (row < rows.n_rows)[:, None] & (cols < rows.n)
    p = tl.load(back.p + at, mask=inside, other=0.0)
    if rows.KIND != "multimax":
        p = tl.where(p != p, 0.0, p)
    g = tl.load(back.grad + at, mask=inside, other=0.0).to(tl.float32)
    x = p
    if rows.x is not None:
        x = tl.load(rows.x + at, mask=inside, other=0.0).to(tl.float32)
    return x, p, g, at, inside


@triton.jit
def rows_backward_kernel(rows, back, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Gradients of the scores, and of the rows' options and MultiMax's scalars where they are wanted."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = row < rows.n_rows
    options = load_options(rows, row)
    stats = load_stats(back.stats, row, exists)
    end = 1 if rows.HELD else rows.n
    sums = zero_row_sums(row, rows.SUMS)
    for n0 in range(0, end, BLOCK_N):
        x, p, g, _, _ = load_back(rows, back, row, n0, BLOCK_N)
        sums = add_sums(sums, row_sums(rows, x, p, g, stats, options), rows.SUMS)
    COUNT: tl.constexpr = 4 * rows.ORDER + (2 if back.AFFINE else 0) if back.MOMENTS else 0
    moments = zero_sums(BLOCK_M, tl.float32, COUNT)
    for n0 in range(0, end, BLOCK_N):
        x, p, g, at_, inside = load_back(rows, back, row, n0, BLOCK_N)
        dx = differentiate(rows, x, p, g, stats, options, sums)
        if rows.KIND == "multimax":
            dx, own = through_modulator(rows, back, x, p, dx, row)
            if back.MOMENTS:
                moments = add_sums(moments, own, COUNT)
        tl.store(back.grad_x + at_, dx.to(back.grad_x.dtype.element_ty), mask=inside)
    if rows.OPTIONS:
        found = option_gradients(rows, stats, options, sums)
        if back.grad_value is not None:
            tl.store(back.grad_value + row, found[0], mask=exists)
        if back.grad_beta is not None:
            tl.store(back.grad_beta + row, found[1], mask=exists)
        if back.grad_gamma is not None:
            tl.store(back.grad_gamma + row, found[2], mask=exists)
    if back.MOMENTS:
        for i in tl.static_range(COUNT):
            tl.store(back.moments + row * COUNT + i, tl.sum(moments[i], 1), mask=exists)


@triton.jit
def through_modulator(rows, back, x, p, ds, row):
    """The scores' gradients from those of the modulated scores, and the rows' moments."""
    left_alone = (p == 0.0) | (x == float("-inf"))
    x = tl.where(left_alone, 0.0, x)
    head = head_of(rows, row)[:, None]
    modulator = load_modulator(rows, head)
    affine = load_affine(rows, head)
    y = argument(x, affine)
    slope = modulate_slope(y, modulator, rows.ORDER)
    dx = tl.where(left_alone, 0.0, ds * slope)
    moments = ()
    if back.MOMENTS:
        moments = scalar_moments(ds, y, x * LOG2E, slope, modulator, tl.float32, back.AFFINE, rows.ORDER, True)
    if back.AFFINE:
        dx = dx * affine[0]
    return dx, moments
