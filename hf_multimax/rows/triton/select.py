"""The k-th smallest score of a row without sorting, by bisection on floats as integers: exact, with ties, too."""

import triton
import triton.language as tl

from hf_multimax.rows.triton.memory import chunk


@triton.jit
def ordered(x):
    """An integer that orders as the float does."""
    i = x.to(tl.int32, bitcast=True)
    return tl.where(i >= 0, i, i ^ 0x7FFFFFFF)


@triton.jit
def from_ordered(i):
    return tl.where(i >= 0, i, i ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def smallest_above(rows, at, base, floor, least, STRICT: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of the scores less ``base`` that are above ``floor``: how many are below ``least``, or not above (STRICT), and
    the smallest of the others, plus infinity without any.
    """
    count = tl.zeros(base.shape, tl.int32)
    found = tl.full(base.shape, float("inf"), tl.float32)
    for n0 in range(0, at[2], BLOCK_N):
        z = chunk(rows, at, n0, BLOCK_N) - base[:, None]
        inside = z > floor
        under = z <= least[:, None] if STRICT else z < least[:, None]
        count += tl.sum((inside & under).to(tl.int32), 1)
        found = tl.minimum(found, tl.min(tl.where(inside & (under == 0), z, float("inf")), 1))
    return count, found


@triton.jit
def nth_smallest(rows, at, base, floor, peak, index, usable, BLOCK_N: tl.constexpr):
    """The one that ``index`` others are below, or ties, of the scores less ``base`` that are above ``floor``; ``peak``
    is the largest of them.
    """
    low = ordered(tl.full(base.shape, floor, tl.float32))  # not more than index of them are below it
    high = ordered(tl.where(usable, peak, 0.0)) + 1  # more are
    active = usable
    more = 1
    while more > 0:
        # their mean without overflow
        middle = (low & high) + ((low ^ high) >> 1)
        bound = from_ordered(middle)
        count = tl.zeros(base.shape, tl.int32)
        for n0 in range(0, at[2], BLOCK_N):
            z = chunk(rows, at, n0, BLOCK_N) - base[:, None]
            count += tl.sum(((z > floor) & (z < bound[:, None])).to(tl.int32), 1)
        low = tl.where(active & (count <= index), middle, low)
        high = tl.where(active & (count > index), middle, high)
        active = active & (count != index) & (high - low > 1)
        more = tl.max(active.to(tl.int32), 0)
    _, found = smallest_above(rows, at, base, floor, from_ordered(low), False, BLOCK_N)
    return found


@triton.jit
def last_tie(rows, at, least, room, usable, BLOCK_N: tl.constexpr):
    """The column up to which ``room`` scores equal ``least``, all columns where not more are."""
    low = tl.full(least.shape, -1, tl.int32)  # up to it there are too few
    high = tl.zeros(least.shape, tl.int32) + at[1]
    total = tl.zeros(least.shape, tl.int32)
    for n0 in range(0, at[2], BLOCK_N):
        total += tl.sum((chunk(rows, at, n0, BLOCK_N) == least[:, None]).to(tl.int32), 1)
    active = usable & (total > room)
    more = tl.max(active.to(tl.int32), 0)
    while more > 0:
        middle = (low + high) // 2
        count = tl.zeros(least.shape, tl.int32)
        for n0 in range(0, at[2], BLOCK_N):
            tied = chunk(rows, at, n0, BLOCK_N) == least[:, None]
            cols = (n0 + tl.arange(0, BLOCK_N))[None, :]
            count += tl.sum((tied & (cols <= middle[:, None])).to(tl.int32), 1)
        low = tl.where(active & (count < room), middle, low)
        high = tl.where(active & (count >= room), middle, high)
        active = active & (high - low > 1)
        more = tl.max(active.to(tl.int32), 0)
    return high.to(tl.float32)
