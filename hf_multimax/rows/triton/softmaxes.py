"""SoftMax and what leaves SoftMax with something left out or sharpened: what is found of a row, unnormalised weights,
and sums of the backward pass.
"""

import triton
import triton.language as tl

from hf_multimax.rows.triton.entmax import scaled
from hf_multimax.rows.triton.memory import MOST, chunk
from hf_multimax.rows.triton.select import last_tie, nth_smallest, smallest_above

#: whose exponential is no positive float, not even a subnormal one
UNDERFLOW = tl.constexpr(-103.972077)
THRESHOLD_SHIFT = tl.constexpr(1e-8)
EV_TRAINING_FACTOR = tl.constexpr(1e-6)
#: -log(1e-9): adaptive temperature's logarithms end there
LEAST_LOG = tl.constexpr(20.7232658)


@triton.jit
def inverse(temperature):
    return tl.minimum(1.0 / temperature, MOST)


@triton.jit
def unit_of(threshold):
    """A factor that keeps the weights of t-softmax from overflow."""
    return tl.where(threshold > 1.0, 1.0 / threshold, 1.0)


@triton.jit
def raw_weights(rows, x, n0, base, first, second, value):
    """The weights of a chunk before they are divided by their sum."""
    z = x - base[:, None]
    if rows.KIND == "multimax":
        w = tl.exp2(z)
    elif rows.KIND == "softmax":
        w = tl.exp(tl.maximum(z, -MOST) * inverse(value)[:, None])
    elif rows.KIND == "scalable_softmax" or rows.KIND == "adaptive_temperature":
        w = tl.exp(scaled(x, base, first, second))
    elif rows.KIND == "evsoftmax":
        likely = (z >= first[:, None]) | (z == 0.0)
        w = tl.exp(z) * tl.where(likely, 1.0, tl.where(rows.b != 0.0, EV_TRAINING_FACTOR, 0.0))
    elif rows.KIND == "topk_softmax":
        cols = (n0 + tl.arange(0, x.shape[1]))[None, :].to(tl.float32)
        chosen = (x > first[:, None]) | ((x == first[:, None]) & (cols <= second[:, None]))
        w = tl.where(chosen, tl.exp(z), 0.0)
    elif rows.KIND == "rsoftmax" or rows.KIND == "tsoftmax":
        w = tl.maximum(z + first[:, None], 0.0) * unit_of(first)[:, None] * tl.exp(z)
    else:
        w = tl.exp(z)
    return tl.where(x == float("-inf"), 0.0, w)


@triton.jit
def total_weight(rows, at, base, first, second, value, BLOCK_N: tl.constexpr):
    total = tl.zeros(base.shape, tl.float32)
    for n0 in range(0, at[2], BLOCK_N):
        total += tl.sum(raw_weights(rows, chunk(rows, at, n0, BLOCK_N), n0, base, first, second, value), 1)
    return total


@triton.jit
def top_of(scale, base, lowest):
    """The largest of the scaled scores: the lowest's where the scale is negative."""
    return tl.where(scale < 0.0, scale * tl.maximum(lowest - base, -MOST), 0.0)


@triton.jit
def mean_score(rows, at, base, kept, BLOCK_N: tl.constexpr):
    """The mean of the scores that are kept, less ``base``."""
    total = tl.zeros(base.shape, tl.float32)
    for n0 in range(0, at[2], BLOCK_N):
        x = chunk(rows, at, n0, BLOCK_N)
        total += tl.sum(tl.where(x == float("-inf"), 0.0, x - base[:, None]), 1)
    return total / kept


@triton.jit
def adaptive_scale(rows, at, base, BLOCK_N: tl.constexpr):
    """(beta of adaptive temperature, its derivative by the entropy, log of SoftMax's denominator)."""
    total = tl.zeros(base.shape, tl.float32)
    for n0 in range(0, at[2], BLOCK_N):
        total += tl.sum(tl.exp(chunk(rows, at, n0, BLOCK_N) - base[:, None]), 1)
    log_total = tl.log(total)
    entropy = tl.zeros(base.shape, tl.float32)
    for n0 in range(0, at[2], BLOCK_N):
        z = chunk(rows, at, n0, BLOCK_N) - base[:, None]
        entropy += tl.sum(tl.exp(z) * tl.minimum(log_total[:, None] - z, LEAST_LOG), 1)
    entropy = entropy / total
    beta = -1.791 + entropy * (4.917 + entropy * (-2.3 + entropy * (0.481 + entropy * -0.037)))
    slope = 4.917 + entropy * (-4.6 + entropy * (1.443 + entropy * -0.148))
    bent = (entropy > 0.5) & (beta >= 1.0) & (rows.b == 0.0)
    return tl.where(bent, beta, 1.0), tl.where(bent, slope, 0.0), log_total


@triton.jit
def top_k(rows, at, peak, kept, usable, k, BLOCK_N: tl.constexpr):
    """The k-th largest score and the last column at which one that equals it is taken."""
    some = usable & (kept > k)
    zero = tl.zeros(peak.shape, tl.float32)
    index = (kept - k).to(tl.int32)
    least = nth_smallest(rows, at, zero, float("-inf"), peak, index, some, BLOCK_N)
    below, _ = smallest_above(rows, at, zero, float("-inf"), least, True, BLOCK_N)
    room = k.to(tl.int32) - (kept.to(tl.int32) - below)
    cutoff = last_tie(rows, at, least, room, some, BLOCK_N)
    return tl.where(some, least, float("-inf")), cutoff


@triton.jit
def sparsity_threshold(rows, at, base, kept, usable, sparsity, BLOCK_N: tl.constexpr):
    """r-softmax: the threshold, and its derivative by the sparsity."""
    zero = tl.zeros(base.shape, tl.float32)
    left_out, _ = smallest_above(rows, at, base, float("-inf"), zero + UNDERFLOW, True, BLOCK_N)
    live = kept - left_out.to(tl.float32)
    already = left_out.to(tl.float32) / kept
    share = (sparsity - already) / (1.0 - already)
    position = tl.minimum(tl.maximum(share, 0.0), 1.0) * (kept - 1.0)
    index = tl.floor(position)
    some = usable & (index < live)
    below = nth_smallest(rows, at, base, UNDERFLOW, zero, index.to(tl.int32), some, BLOCK_N)
    below = tl.where(some, below, 0.0)
    count, above = smallest_above(rows, at, base, UNDERFLOW, below, True, BLOCK_N)
    above = tl.where(count.to(tl.float32) > index + 1.0, below, above)
    # what underflows stands at 0, at the end
    above = tl.where(some & (index + 1.0 < live), above, tl.where(index + 1.0 < kept, 0.0, below))
    threshold = -(below + (position - index) * (above - below)) + THRESHOLD_SHIFT
    inside = (share >= 0.0) & (share <= 1.0)
    return threshold, tl.where(inside, -(above - below) * (kept - 1.0) / (1.0 - already), 0.0)


@triton.jit
def count_largest(rows, at, base, BLOCK_N: tl.constexpr):
    many = tl.zeros(base.shape, tl.int32)
    for n0 in range(0, at[2], BLOCK_N):
        many += tl.sum((chunk(rows, at, n0, BLOCK_N) == base[:, None]).to(tl.int32), 1)
    return many.to(tl.float32)


@triton.jit
def shifted(x, p, peak):
    """The scores less the peak, finite, 0 where p is 0."""
    return tl.where(p == 0.0, 0.0, tl.maximum(x - peak[:, None], -MOST))


@triton.jit
def by_first(z, log_total):
    """Of adaptive temperature: SoftMax's own probability, and what its entropy's derivative by it is."""
    log_p = z - log_total[:, None]
    return tl.exp(log_p), tl.where(log_p >= -LEAST_LOG, -log_p - 1.0, LEAST_LOG)
