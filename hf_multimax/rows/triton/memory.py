"""Where rows lie, and how their scores and options are read."""

import triton
import triton.language as tl

from hf_multimax.attention.triton.modulator import LOG2E, apply_affine, load_affine, load_modulator, modulate

#: a score at or below this, half of finfo(float32).min, is a masked entry
MASKED = tl.constexpr(-1.7014117e38)
MOST = tl.constexpr(3.4028234e38)


@triton.jit
def place(rows, row, n, BLOCK_N: tl.constexpr):
    """``at``: rows [BLOCK_M], their columns, where the last chunk ends, and the scores that are held."""
    held = 0
    end = n
    if rows.HELD:
        held = load_scores(rows, row, n, 0, BLOCK_N)
        end = 1
    return row, n, end, held


@triton.jit
def chunk(rows, at, n0, BLOCK_N: tl.constexpr):
    """Scores of the columns from ``n0``: :func:`load_scores`."""
    if rows.HELD:
        x = at[3]
    else:
        x = load_scores(rows, at[0], at[1], n0, BLOCK_N)
    return x


@triton.jit
def load_scores(rows, row, n, n0, BLOCK_N: tl.constexpr):
    """Scores [BLOCK_M, BLOCK_N] in float32, MultiMax's modulated and in base 2: minus infinity where an entry is
    masked or there is none, plus infinity for NaN.
    """
    cols = (n0 + tl.arange(0, BLOCK_N))[None, :]
    inside = (row < rows.n_rows)[:, None] & (cols < n)
    x = tl.load(rows.x + row[:, None] * rows.s_row + cols, mask=inside, other=float("-inf")).to(tl.float32)
    if rows.mask is not None:
        last = row % rows.mask_sizes[1]
        middle = row // rows.mask_sizes[1] % rows.mask_sizes[0]
        first = row // rows.mask_sizes[1] // rows.mask_sizes[0]
        start = first * rows.s_mask[0] + middle * rows.s_mask[1] + last * rows.s_mask[2]
        keep = tl.load(rows.mask + start[:, None] + cols.to(tl.int64) * rows.s_mask[3], mask=inside, other=0)
        x = tl.where(keep == 0, float("-inf"), x)
    x = tl.where(x != x, float("inf"), x)
    x = tl.where(x <= MASKED, float("-inf"), x)
    if rows.KIND == "multimax":
        finite = (x > float("-inf")) & (x < float("inf"))
        head = head_of(rows, row)[:, None]
        y = argument(tl.where(finite, x, 0.0), load_affine(rows, head))
        z = modulate(y, load_modulator(rows, head), rows.ORDER)
        x = tl.where(finite, tl.where(z != z, float("inf"), z), x)
    return x


@triton.jit
def argument(x, affine):
    """The modulator's argument in base 2, finite."""
    return tl.minimum(tl.maximum(apply_affine(x * LOG2E, affine), -MOST), MOST)


@triton.jit
def head_of(rows, row):
    return row // rows.head_rows % rows.heads


@triton.jit
def load_options(rows, row):
    """(value, beta, gamma) of the rows, float32 [BLOCK_M] each."""
    value = tl.zeros(row.shape, tl.float32) + rows.a
    beta = tl.zeros(row.shape, tl.float32)
    gamma = tl.zeros(row.shape, tl.float32)
    exists = row < rows.n_rows
    if rows.value is not None:
        value = tl.load(rows.value + row, mask=exists, other=1.5)
    if rows.beta is not None:
        beta = tl.load(rows.beta + row, mask=exists, other=0.0)
        gamma = tl.load(rows.gamma + row, mask=exists, other=0.0)
    return value, beta, gamma


@triton.jit
def extremes(rows, at, BLOCK_N: tl.constexpr):
    """The rows' largest and smallest score, and how many are kept; minus and plus infinity where none is."""
    peak = tl.full(at[0].shape, float("-inf"), tl.float32)
    lowest = tl.full(at[0].shape, float("inf"), tl.float32)
    kept = tl.zeros(at[0].shape, tl.int32)
    for n0 in range(0, at[2], BLOCK_N):
        x = chunk(rows, at, n0, BLOCK_N)
        inside = x > float("-inf")
        peak = tl.maximum(peak, tl.max(x, 1))
        lowest = tl.minimum(lowest, tl.min(tl.where(inside, x, float("inf")), 1))
        kept += tl.sum(inside.to(tl.int32), 1)
    return peak, lowest, kept.to(tl.float32)
