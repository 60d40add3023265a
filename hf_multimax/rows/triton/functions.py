"""Every function of rows in five steps that a kernel takes one after the other; the package's docstring shows how.

``stats`` are six numbers of a row, of which the first is its largest score, infinite where the row is not usable, and
for those that are divided by a sum the fourth is 1 over it.
"""

import triton
import triton.language as tl

from hf_multimax.rows.triton.entmax import (
    alpha_gradient,
    alpha_sums,
    centred,
    entmax_slopes,
    find_entmax,
    weigh_entmax,
)
from hf_multimax.rows.triton.memory import extremes
from hf_multimax.rows.triton.softmaxes import (
    THRESHOLD_SHIFT,
    adaptive_scale,
    by_first,
    count_largest,
    inverse,
    mean_score,
    raw_weights,
    shifted,
    sparsity_threshold,
    top_k,
    top_of,
    total_weight,
    unit_of,
)


@triton.constexpr_function
def is_entmax(kind):
    return kind in ("sparsemax", "entmax15", "entmax", "asentmax")


@triton.constexpr_function
def is_weighted(kind):
    """Whether weights are e^z times what z is above a threshold."""
    return kind in ("rsoftmax", "tsoftmax")


@triton.jit
def find(rows, at, options, BLOCK_N: tl.constexpr):
    """The rows' ``stats``: six float32 vectors [BLOCK_M]."""
    value, beta, gamma = options
    peak, lowest, kept = extremes(rows, at, BLOCK_N)
    usable = (peak > float("-inf")) & (peak < float("inf"))
    base = tl.where(usable, peak, 0.0)
    zero = tl.zeros(base.shape, tl.float32)
    first = zero
    second = zero
    third = zero + 1.0
    fourth = zero
    fifth = zero
    if rows.KIND == "softmax1":
        first = tl.maximum(base, 0.0)
    elif rows.KIND == "sigmoid":
        first = tl.where(rows.b != 0.0, value, -tl.log(tl.maximum(kept, 1.0)))
    elif rows.KIND == "scalable_softmax":
        fourth = tl.log(tl.maximum(kept, 1.0))
        first = rows.b + value * fourth
        second = top_of(first, base, lowest)
    elif rows.KIND == "adaptive_temperature":
        first, fourth, fifth = adaptive_scale(rows, at, base, BLOCK_N)
    elif rows.KIND == "evsoftmax":
        first = mean_score(rows, at, base, kept, BLOCK_N)
    elif rows.KIND == "topk_softmax":
        first, second = top_k(rows, at, peak, kept, usable, value, BLOCK_N)
    elif rows.KIND == "rsoftmax":
        first, fifth = sparsity_threshold(rows, at, base, kept, usable, value, BLOCK_N)
    elif rows.KIND == "tsoftmax":
        first = value
        fifth = zero + 1.0
    elif rows.KIND == "asentmax":
        log_length = tl.log(kept + 1.0)
        fifth = kept
        power = tl.exp(gamma * tl.log(tl.maximum(log_length, 0.6931471)))
        fourth = rows.b + beta * power
        third = top_of(fourth, base, lowest)
    if is_weighted(rows.KIND):
        second = count_largest(rows, at, base, BLOCK_N)
        fourth = (first > 2.0 * THRESHOLD_SHIFT).to(tl.float32)
    if is_entmax(rows.KIND):
        shift = (base, fourth, third)
        first, second = find_entmax(rows, at, shift, usable, value, BLOCK_N)
    elif rows.KIND == "softmax1":
        third = 1.0 / (total_weight(rows, at, first, first, second, value, BLOCK_N) + tl.exp(-first))
    elif rows.KIND != "sigmoid":
        third = 1.0 / total_weight(rows, at, base, first, second, value, BLOCK_N)
    return peak, first, second, third, fourth, fifth


@triton.jit
def weigh(rows, x, n0, stats, options):
    """The probabilities of a chunk of scores [BLOCK_M, BLOCK_N] whose first column is ``n0``."""
    peak, first, second, third, fourth, _ = stats
    value, _, _ = options
    if is_entmax(rows.KIND):
        p = weigh_entmax(rows, centred(rows, x, peak, fourth, third), first, second, value)
    elif rows.KIND == "sigmoid":
        v = x + first[:, None]
        e = tl.exp(-tl.abs(v))
        p = tl.where(v < 0.0, e, 1.0) / (1.0 + e)
    elif rows.KIND == "softmax1":
        p = raw_weights(rows, x, n0, first, first, second, value) * third[:, None]
    else:
        p = raw_weights(rows, x, n0, peak, first, second, value) * third[:, None]
    p = tl.where(peak[:, None] == float("inf"), float("nan"), p)
    return tl.where(x == float("-inf"), 0.0, p)


@triton.jit
def slopes(rows, p, options):
    """By what the gradients of a row are weighed before their mean is taken from them."""
    if is_entmax(rows.KIND):
        w = entmax_slopes(rows, p, options[0])
    else:
        w = p
    return w


@triton.jit
def over(w, g):
    """w g, and nothing where w is 0, whatever stands there."""
    return tl.where(w == 0.0, 0.0, w * g)


@triton.jit
def zero_row_sums(row, COUNT: tl.constexpr):
    out = ()
    for _ in tl.static_range(COUNT):
        out = out + (tl.zeros(row.shape, tl.float32),)
    return out


@triton.jit
def row_sums(rows, x, p, g, stats, options):
    """Sums of a chunk, ``rows.SUMS`` vectors [BLOCK_M]; ``x`` may be anything where p is 0."""
    peak, _, _, _, fourth, fifth = stats
    w = slopes(rows, p, options)
    wg = over(w, g)
    out = (tl.sum(wg, 1),)
    if is_entmax(rows.KIND):
        out = out + (tl.sum(w, 1),)
        if rows.OPTIONS and (rows.KIND == "entmax" or rows.KIND == "asentmax"):
            out = out + alpha_sums(p, g, options[0])
        if rows.OPTIONS and rows.KIND == "asentmax":
            z = shifted(x, p, peak)
            out = out + (tl.sum(wg * z, 1), tl.sum(w * z, 1))
    elif rows.KIND == "scalable_softmax" and rows.OPTIONS:
        z = shifted(x, p, peak)
        out = out + (tl.sum(wg * z, 1), tl.sum(w * z, 1))
    elif rows.KIND == "adaptive_temperature":
        z = shifted(x, p, peak)
        own, inner = by_first(z, fifth)
        out = out + (tl.sum(wg * z, 1), tl.sum(w * z, 1), tl.sum(tl.where(p == 0.0, 0.0, own * inner), 1))
    elif is_weighted(rows.KIND):
        # e^z of all but the largest, which is a weight's derivative, and of the largest, where it is 1
        e = tl.where((p == 0.0) | (x == peak[:, None]), 0.0, tl.exp(x - peak[:, None]))
        at_top = (x == peak[:, None]) & (p != 0.0)
        out = out + (tl.sum(over(e, g), 1), tl.sum(e, 1), tl.sum(tl.where(at_top, g, 0.0), 1))
    return out


@triton.jit
def mean_of(rows, sums):
    """The mean of a row's gradients."""
    if is_entmax(rows.KIND):
        mean = tl.where(sums[1] > 0.0, sums[0] / tl.where(sums[1] > 0.0, sums[1], 1.0), 0.0)
    else:
        mean = sums[0]
    return mean


@triton.jit
def pulls(stats, sums):
    """Of r- and t-softmax: what the weights of all but the largest pull, and those of the largest."""
    _, first, second, third, _, _ = stats
    factor = third * unit_of(first)
    return factor * (sums[1] - sums[0] * sums[2]), factor * (sums[3] - sums[0] * second)


@triton.jit
def differentiate(rows, x, p, g, stats, options, sums):
    """The scores' gradients of a chunk; for MultiMax those of the modulated scores."""
    peak, first, second, third, fourth, fifth = stats
    mean = mean_of(rows, sums)[:, None]
    dx = over(slopes(rows, p, options), g - mean)
    if rows.KIND == "softmax":
        dx = dx * inverse(options[0])[:, None]
    elif rows.KIND == "sigmoid":
        dx = over(p * (1.0 - p), g)
    elif rows.KIND == "scalable_softmax":
        dx = dx * first[:, None]
    elif rows.KIND == "asentmax":
        dx = dx * fourth[:, None]
    elif rows.KIND == "adaptive_temperature":
        z = shifted(x, p, peak)
        own, inner = by_first(z, fifth)
        by_entropy = fourth * (sums[1] - sums[0] * sums[2])
        bent = by_entropy[:, None] * own * (inner - sums[3][:, None])
        dx = dx * first[:, None] + tl.where((p == 0.0) | (fourth[:, None] == 0.0), 0.0, bent)
    elif is_weighted(rows.KIND):
        pull, top_pull = pulls(stats, sums)
        factor = (third * unit_of(first))[:, None]
        largest = x == peak[:, None]
        single = second == 1.0
        # one largest entry has a constant weight and gives what the others pull; several share that
        many = tl.maximum(second, 1.0)
        shared = factor * (g - mean) - ((pull + top_pull) / many)[:, None]
        top = tl.where(single[:, None], -pull[:, None], shared)
        other = factor * tl.exp(x - peak[:, None]) * (g - mean)
        dx += tl.where((p == 0.0) | (fourth[:, None] == 0.0), 0.0, tl.where(largest, top, other))
    return dx


@triton.jit
def option_gradients(rows, stats, options, sums):
    """The gradients of value, beta and gamma, [BLOCK_M] each, where OPTIONS; zeros of what has none."""
    _, first, second, third, fourth, fifth = stats
    value, beta, gamma = options
    d_value = tl.zeros(fourth.shape, tl.float32)
    d_beta = d_value
    d_gamma = d_value
    if rows.KIND == "scalable_softmax":
        d_value = fourth * (sums[1] - sums[0] * sums[2])
    elif is_weighted(rows.KIND):
        pull, top_pull = pulls(stats, sums)
        d_value = tl.where(fourth == 0.0, 0.0, (pull + top_pull) * fifth)
    elif rows.KIND == "entmax" or rows.KIND == "asentmax":
        d_value = alpha_gradient(sums[2], sums[3], sums[4], sums[5], sums[6], sums[7], sums[8], value)
    if rows.KIND == "asentmax":
        by_factor = sums[9] - mean_of(rows, sums) * sums[10]
        log_log = tl.log(tl.maximum(tl.log(fifth + 1.0), 0.6931471))
        power = tl.exp(gamma * log_log)
        d_beta = by_factor * power
        d_gamma = by_factor * beta * power * log_log
    return d_value, d_beta, d_gamma
