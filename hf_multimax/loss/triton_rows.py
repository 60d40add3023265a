"""The row part of the output loss as one Triton kernel: two reads and one write of the logits, no atomics.

One program takes one row. It reads the products hidden @ weight.T once for the maximum, the sum of exponentials and
the label's logit, and once more to put the gradient in their place, with the row's share of the modulator's gradients.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_multimax.attention.triton.modulator import LARGEST_POWER, times_power
from hf_multimax.attention.triton.scores import tanh
from hf_multimax.loss.problem import Problem

__all__ = ["row_losses"]

#: logits at or below this are masked: half of finfo(float32).min
MASKED = tl.constexpr(-1.7014117e38)
LOWEST = tl.constexpr(-3.4028234e38)
TINY = tl.constexpr(1.1754944e-38)
#: 80 registers at order 2 on sm_90 (103 with every feature), no spills
BLOCK, WARPS = 2048, 8


def row_losses(
    problem: Problem, x: Tensor, labels: Tensor, weights: Tensor | None, gradient: bool
) -> tuple[Tensor, Tensor]:
    """Losses of the rows of ``x`` and the row sums that the parameters' gradients are made of.

    Args:
        problem: with contiguous float32 parameters, as :meth:`Problem.prepared` makes them.
        x: ``[rows, vocab]``, contiguous float32: products without bias. With ``gradient`` it holds the gradient of
            ``weights @ losses`` (``weights`` None: of their sum) afterwards.
        labels: ``[rows]`` int64.

    Returns:
        losses ``[rows]`` and sums ``[rows, 4N + 2]`` (zeros without ``gradient``): for each term of sigma the sum of
        gradient * relu**n, for each that of gradient * relu**(n-1), then the gradients of scale and shift.
    """
    rows, vocab = x.shape
    ts, softcap = problem.ts, problem.softcap
    terms = 0 if ts is None else ts.numel()
    losses = x.new_empty(rows)
    sums = x.new_zeros(rows, 2 * terms + 2)
    with torch.cuda.device_of(x):
        _row_kernel[(rows,)](
            x,
            labels,
            losses,
            sums,
            problem.ranges,
            ts,
            problem.bias,
            problem.scale,
            problem.shift,
            weights,
            vocab,
            problem.ignore_index,
            problem.label_smoothing,
            0.0 if softcap is None else softcap,
            ORDER=terms // 2,
            SUMS=2 * terms + 2,
            SUMS_PADDED=triton.next_power_of_2(2 * terms + 2),
            CAPPED=softcap is not None,
            GRADIENT=gradient,
            BLOCK=min(BLOCK, triton.next_power_of_2(vocab)),
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
    return losses, sums


@triton.jit
def _score(row, bias, cols, vocab, cap, CAPPED: tl.constexpr):
    """Capped logits of a block, 0 where masked; the slope of the cap; which are masked."""
    inside = cols < vocab
    x = tl.load(row + cols, mask=inside, other=float("-inf"))
    if bias is not None:
        x += tl.load(bias + cols, mask=inside, other=0.0)
    masked = x <= MASKED
    x = tl.where(masked, 0.0, x)
    slope = 1.0
    if CAPPED:
        bent = tanh(x / cap)
        x = cap * bent
        slope = 1.0 - bent * bent
    return x, slope, masked


@triton.jit
def _affine(x, scale, shift):
    if scale is None:
        return x
    else:
        return x * tl.load(scale) + tl.load(shift)


@triton.jit
def _modulate(x, masked, ranges, ts, ORDER: tl.constexpr):
    """sigma(x), minus infinity where masked."""
    out = x
    for n in tl.static_range(1, ORDER + 1):
        below = tl.maximum(tl.load(ranges + 2 * n - 2) - x, 0.0)
        above = tl.maximum(x - tl.load(ranges + 2 * n - 1), 0.0)
        out += times_power(tl.load(ts + 2 * n - 2), below, n) + times_power(tl.load(ts + 2 * n - 1), above, n)
    return tl.where(masked, float("-inf"), out)


@triton.jit
def _row_kernel(
    x_ptr,
    labels,
    losses,
    sums,
    ranges,
    ts,
    bias,
    scale,
    shift,
    weights,
    vocab,
    ignore_index,
    smoothing,
    cap,
    ORDER: tl.constexpr,
    SUMS: tl.constexpr,
    SUMS_PADDED: tl.constexpr,
    CAPPED: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    row = x_ptr + index * vocab
    label = tl.load(labels + index)
    if label == ignore_index:
        tl.store(losses + index, 0.0)
        if GRADIENT:
            for start in range(0, vocab, BLOCK):
                cols = start + tl.arange(0, BLOCK)
                tl.store(row + cols, tl.zeros([BLOCK], tl.float32), mask=cols < vocab)
        return

    peak = LOWEST
    total = 0.0
    target = 0.0
    classes = 0.0
    kept_sum = 0.0
    for start in range(0, vocab, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        score, _, masked = _score(row, bias, cols, vocab, cap, CAPPED)
        y = _modulate(_affine(score, scale, shift), masked, ranges, ts, ORDER)
        higher = tl.maximum(peak, tl.max(y, 0))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(y - higher), 0)
        peak = higher
        target += tl.sum(tl.where(cols == label, y, 0.0), 0)
        classes += tl.sum(tl.where(masked, 0.0, 1.0), 0)
        kept_sum += tl.sum(tl.where(masked, 0.0, y), 0)
    # a row without any class: p = 0 everywhere; a NaN must stay, hence no maximum
    total = tl.where(total < TINY, TINY, total)
    share = smoothing / tl.maximum(classes, 1.0)
    # without smoothing a logit of minus infinity does not matter
    expected = (1.0 - smoothing) * target + tl.where(smoothing > 0.0, share * kept_sum, 0.0)
    tl.store(losses + index, peak + tl.log(total) - expected)

    if GRADIENT:
        factor = 1.0
        if weights is not None:
            factor = tl.load(weights + index)
        which = tl.arange(0, SUMS_PADDED)
        moments = tl.zeros([SUMS_PADDED], tl.float32)
        for start in range(0, vocab, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            score, cap_slope, masked = _score(row, bias, cols, vocab, cap, CAPPED)
            u = _affine(score, scale, shift)
            y = _modulate(u, masked, ranges, ts, ORDER)
            grad = tl.exp(y - peak) / total - share - tl.where(cols == label, 1.0 - smoothing, 0.0)
            grad = tl.where(masked, 0.0, factor * grad)
            slope = tl.full([BLOCK], 1.0, tl.float32)
            for n in tl.static_range(1, ORDER + 1):
                for side in tl.static_range(2):
                    k = 2 * n - 2 + side
                    if side == 0:
                        relu = tl.maximum(tl.load(ranges + k) - u, 0.0)
                    else:
                        relu = tl.maximum(u - tl.load(ranges + k), 0.0)
                    signed = (2 * side - 1) * n * tl.load(ts + k)
                    if n == 1:
                        slope += tl.where(relu > 0.0, signed, 0.0)
                        part = tl.where(relu > 0.0, grad, 0.0)
                    else:
                        slope += times_power(signed, relu, n - 1)
                        # powers that overflow are left out
                        relu = tl.where(relu < 2.0 ** (LARGEST_POWER / n), relu, 0.0)
                        part = times_power(grad, relu, n - 1)
                    moments += tl.where(which == k, tl.sum(part * relu, 0), 0.0)
                    moments += tl.where(which == 2 * ORDER + k, tl.sum(part, 0), 0.0)
            grad = tl.where(grad == 0.0, 0.0, grad * slope)  # the slope may be infinite there
            if scale is not None:
                moments += tl.where(which == SUMS - 2, tl.sum(grad * score, 0), 0.0)
                moments += tl.where(which == SUMS - 1, tl.sum(grad, 0), 0.0)
                grad = grad * tl.load(scale)
            tl.store(row + cols, grad * cap_slope, mask=cols < vocab)
        tl.store(sums + index * SUMS + which, moments, mask=which < SUMS)
