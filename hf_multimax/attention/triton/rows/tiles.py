"""What the kernels of attention through functions of rows share: scores of a tile, and what is kept of every row."""

import triton
import triton.language as tl

from hf_multimax.attention.triton.scores import MASKED, NATURAL, dot, dropout_keep, mask_scores, places, scores
from hf_multimax.rows.triton.arguments import STATS
from hf_multimax.rows.triton.functions import weigh

COUNT = tl.constexpr(STATS)
COMPILED = tl.constexpr(not triton.knobs.runtime.interpret)  # the interpreter has no assembler


@triton.jit
def row_scores(qk, rows, n0, call, added, EDGE: tl.constexpr, TAIL: tl.constexpr):
    """Scores of a tile as a function of rows takes them (minus infinity: masked, plus infinity: NaN), and the soft
    cap's slope.

    ``added``: the head's mask and bias, as :func:`~hf_multimax.attention.triton.scores.load_added` gives them.
    """
    where = places(rows, n0, qk.shape[1], False)
    y, slope = scores(qk, where, call, added[1], NATURAL)
    x = mask_scores(y, y, where, call, added[0], True, EDGE, TAIL, NATURAL)
    x = tl.where(x != x, float("inf"), x)
    return tl.where(x <= MASKED, float("-inf"), x), slope


@triton.jit
def pinned(x):
    """A left operand of a product as it is: the compiler moves conversions of layouts ahead of comparisons, and at some
    tiles then fails to convert what these give.
    """
    if COMPILED:
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=False, pack=1)
    return x


@triton.jit
def any_weight(p, SPARSE: tl.constexpr):
    """Whether a tile has weights, of which NaN is one."""
    found = True
    if SPARSE:
        found = tl.max(tl.max((p != 0.0).to(tl.int32), 1), 0) > 0
    return found


@triton.jit
def head_options(function, head, ROWS: tl.constexpr):
    """(value, beta, gamma) of a head for each of its rows."""
    value = tl.zeros([ROWS], tl.float32) + function.a
    beta = tl.zeros([ROWS], tl.float32)
    gamma = tl.zeros([ROWS], tl.float32)
    if function.value is not None:
        value = tl.zeros([ROWS], tl.float32) + tl.load(function.value + head)
    if function.beta is not None:
        beta += tl.load(function.beta + head)
        gamma += tl.load(function.gamma + head)
    return value, beta, gamma


@triton.jit
def kept_at(call, stream, rows):
    """Where numbers of the rows of a head lie in a plane [B, H, Nq], and which rows there are."""
    return tl.cast(stream, tl.int64) * call.n_rows + rows, rows < call.n_rows


@triton.jit
def store_numbers(pointer, plane, at, numbers, COUNT: tl.constexpr):
    """Store numbers of the rows, each into a plane of its own."""
    where, exists = at
    for i in tl.static_range(COUNT):
        tl.store(pointer + i * plane + where, numbers[i], mask=exists)


@triton.jit
def load_numbers(pointer, plane, at, COUNT: tl.constexpr):
    """What :func:`store_numbers` stored, 0 for rows that do not exist."""
    where, exists = at
    numbers = ()
    for i in tl.static_range(COUNT):
        numbers = numbers + (tl.load(pointer + i * plane + where, mask=exists, other=0.0),)
    return numbers


@triton.jit
def weighed(call, function, tiles, place, added, numbers, options, EDGE: tl.constexpr):
    """Scores and weights of a tile by what was kept of its rows, and the soft cap's slope.

    ``tiles``: of queries and keys; ``place``: the queries' numbers and the first key.
    """
    rows, n0 = place
    qk = dot(tiles[0], tl.trans(tiles[1]), call.UPCAST)
    x, slope = row_scores(qk, rows, n0, call, added, EDGE, EDGE)
    if EDGE:
        x = tl.where((rows < call.n_rows)[:, None], x, float("-inf"))
    return x, weigh(function, x, n0, numbers, options), slope


@triton.jit
def weight_gradients(call, tiles, place, stream, p):
    """Gradients of a tile's weights, and the weights: 0 where they are NaN, through which none passes on.

    ``tiles``: of the output's gradient and of the values.
    """
    rows, n0 = place
    g = drop(dot(tiles[0], tl.trans(tiles[1]), call.UPCAST), call, rows, n0, stream)
    return g, tl.where(p == p, p, 0.0)


@triton.jit
def drop(x, call, rows, n0, stream):
    """Weights or their gradients after dropout."""
    if call.seed is not None:
        keep = dropout_keep(tl.load(call.seed), call.threshold, rows, n0, stream, False, x.shape[1])
        x = tl.where(keep, x * call.keep_scale, 0.0)
    return x
