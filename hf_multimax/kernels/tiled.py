"""MultiMax attention in tiles of whole score rows: PyTorch only, any device, memory linear in the sequence length.

A tile holds all keys that a few query rows see, so that a row function (MultiMax here, any other normaliser through
:func:`rowwise_attention`) meets complete rows. The backward pass recomputes the tiles instead of keeping them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from . import refuse_second_derivative

__all__ = ["attention", "check_arguments", "rowwise_attention", "unsupported"]

Affine = tuple[Tensor, Tensor]
RowFunction = Callable[..., Tensor]

#: scores in a tile: three such buffers of float32 (five in the backward pass) stay in a core's outer caches
TILE_ELEMENTS = 1 << 18
#: rows of a tile whatever the number of keys: matrix products of fewer are slow
SMALLEST_HEIGHT = 32
#: rows of a tile under a causal mask or a window, where the scores that a tile computes in vain grow with its height
CAUSAL_ROWS = 128
#: scores below this stay finite under any modulator in use
REGULAR = 1e6
MINUS_INFINITY = float("-inf")


# ------------------------------------------------------------------------------------------------------ public


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    ts: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    affine: Affine | None = None,
    dropout_p: float = 0.0,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """``softmax(mask(sigma(softcap(q k^T * scale) + bias))) v`` (paper, section 4), differentiable in every tensor.

    Args:
        q: ``[B, H, Nq, D]``; float32, float64, bfloat16 or float16, any strides.
        k: ``[B, Hkv, Nk, D]``, H a multiple of Hkv (query head h reads head ``h // (H // Hkv)``).
        v: ``[B, Hkv, Nk, Dv]``.
        ranges, ts: the modulator, ``[2N]`` or ``[H, 2N]``.
        mask: boolean (True = keep) or additive, broadcastable to ``[B, H, Nq, Nk]``. An additive entry at or below half
            of its type's lowest value masks, any other is added after the modulation; it may require a gradient.
        bias: added to the scores before the modulation, broadcastable to ``[B, H, Nq, Nk]``; may require a gradient.
        affine: ``(scale, shift)``, each a scalar or ``[H]``, applied to the scores before the modulation.
        dropout_p: probability that a weight is dropped; drawn from PyTorch's default CPU generator.
        causal: query i sees keys up to ``i + Nk - Nq``; combines with ``mask``.
        window: with ``causal`` the last ``window`` keys, itself included; without it keys at a distance below it.
        scale: factor of the scores, ``D ** -0.5`` if None.
        softcap: c in ``c * tanh(score / c)``, applied before the bias.
        sinks: ``[H]``, extra unmodulated logits that join the denominator only.

    Returns:
        ``[B, H, Nq, Dv]`` in v's type. A row that sees nothing is zero and passes no gradient.

    Raises:
        ValueError: for shapes that do not fit, and causal or window with more queries than keys.
        TypeError: for types that do not fit.
    """
    check_arguments(q, k, v, ranges, ts, mask, bias, affine, dropout_p, causal, window, softcap, sinks)
    affine_scale, affine_shift = affine or (None, None)
    seed = dropout_seed(dropout_p)
    return _forward_op(
        q, k, v, ranges, ts, mask, bias, affine_scale, affine_shift, sinks, seed,
        *_options(q, dropout_p, causal, window, scale, softcap),
    )  # fmt: skip


def unsupported(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, ts: Tensor, **features: object) -> str | None:
    """The first feature of this call that the backend lacks; this one has them all."""
    return None


def rowwise_attention(
    row_function: RowFunction,
    parameters: Sequence[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention through any row-wise normaliser, in the same tiles, recomputed by autograd in the backward pass.

    Args:
        row_function: ``row_function(scores, keep, *parameters) -> probabilities``, differentiable in scores and
            parameters. ``scores`` is ``[batch, H, rows, keys]`` in float32 (float64 for float64 inputs), some batch
            elements and rows, all heads, and all keys that one of the rows may see; ``keep`` is None or boolean and
            broadcastable to it (True = keep). It must give zero wherever ``keep`` is False or the score is minus
            infinity.
        parameters: tensors passed on whole; gradients flow to those that require one.
        q, k, v, bias, dropout_p, causal, window, scale, softcap: as for :func:`attention`.
        mask: as for :func:`attention`; the values of an additive mask are added to the scores.

    Returns:
        ``[B, H, Nq, Dv]`` in v's type.

    Raises:
        ValueError, TypeError: as :func:`attention`.
    """
    check_arguments(q, k, v, None, None, mask, bias, None, dropout_p, causal, window, softcap)
    options = Options(*_options(q, dropout_p, causal, window, scale, softcap))
    seed = dropout_seed(dropout_p)
    return _RowwiseAttention.apply(row_function, options, seed, q, k, v, mask, bias, *parameters)


def dropout_seed(dropout_p: float) -> Tensor | None:
    """A seed from the default CPU generator (no synchronisation on other devices); None without dropout."""
    return torch.randint(1 << 62, (1,), dtype=torch.int64, device="cpu") if dropout_p > 0 else None


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor | None,
    ts: Tensor | None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    affine: Affine | None = None,
    dropout_p: float = 0.0,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> None:
    """Raise ValueError or TypeError, naming the argument, for a call that no backend could mean anything by."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 4:
            raise ValueError(f"{name} must be [batch, heads, length, dim], got {list(tensor.shape)}")
        if not tensor.is_floating_point() or tensor.dtype != q.dtype:
            raise TypeError(f"q, k and v must share one floating type, got {q.dtype}, {k.dtype} and {v.dtype}")
    batch, heads, rows, dim = q.shape
    keys = k.shape[2]
    if k.shape[0] != batch or v.shape[:3] != k.shape[:3] or k.shape[3] != dim or heads % max(k.shape[1], 1):
        raise ValueError(
            "q [B, H, Nq, D], k [B, Hkv, Nk, D] and v [B, Hkv, Nk, Dv] with H a multiple of Hkv do not fit "
            f"{list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    if ranges is not None and ts is not None:
        _check_parameters(ranges, ts, affine, sinks, heads)
    for name, tensor in (("mask", mask), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.ndim > 4 or any(a not in (1, b) for a, b in zip(reversed(tensor.shape), (keys, rows, heads, batch))):
            raise ValueError(f"{name} of shape {list(tensor.shape)} does not broadcast to {[batch, heads, rows, keys]}")
        if not tensor.is_floating_point() and (name == "bias" or tensor.dtype != torch.bool):
            raise TypeError(f"{name} must be {'boolean or ' if name == 'mask' else ''}floating point: {tensor.dtype}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if (causal or window is not None) and rows > keys:
        raise ValueError(f"causal and window need as many keys as queries at least, got {rows} queries, {keys} keys")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive (None for no cap), got {softcap}")


def _check_parameters(ranges: Tensor, ts: Tensor, affine: Affine | None, sinks: Tensor | None, heads: int) -> None:
    if ranges.shape != ts.shape or ranges.ndim not in (1, 2) or ranges.shape[-1] < 2 or ranges.shape[-1] % 2:
        raise ValueError(
            f"ranges and ts must both be [2N] or [heads, 2N] with N >= 1, got {list(ranges.shape)} and {list(ts.shape)}"
        )
    if ranges.ndim == 2 and ranges.shape[0] != heads:
        raise ValueError(f"ranges and ts have {ranges.shape[0]} heads, but q has {heads}")
    for name, tensor in zip(("affine scale", "affine shift"), affine or ()):
        if tensor.shape not in ((), (heads,)):
            raise ValueError(f"{name} must be a scalar or [{heads}], got {list(tensor.shape)}")
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks must be [{heads}], got {list(sinks.shape)}")


def _options(
    q: Tensor, dropout_p: float, causal: bool, window: int | None, scale: float | None, softcap: float | None
) -> tuple[float, bool, int, float, float]:
    """The plain numbers of a call: (dropout_p, causal, window or -1, scale, softcap or 0)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return dropout_p, causal, -1 if window is None else window, scale, 0.0 if softcap is None else softcap


# ------------------------------------------------------------------------------------------------------ tiles


@dataclass(frozen=True)
class Options:
    """The plain numbers of a call; window -1 and softcap 0 mean none."""

    dropout_p: float
    causal: bool
    window: int
    scale: float
    softcap: float


@dataclass(frozen=True)
class Tile:
    """Some batch elements, key-value heads (with all query heads of each) and query rows, and the keys they see."""

    index: int
    batch: slice
    kv_heads: slice
    heads: slice
    rows: slice
    keys: slice

    @property
    def scores(self) -> tuple[slice, slice, slice, slice]:
        """Where the tile lies in ``[B, H, Nq, Nk]``."""
        return self.batch, self.heads, self.rows, self.keys


def plan_tiles(
    batch: int, heads: int, kv_heads: int, rows: int, keys: int, options: Options, whole_heads: bool
) -> Iterator[Tile]:
    """The tiles of a call: a function of its shapes alone, so that forward and backward drop the same weights."""
    group, banded = heads // kv_heads, options.causal or options.window >= 0
    height = min(rows, CAUSAL_ROWS) if banded else rows
    kv_step = kv_heads
    if not whole_heads:
        kv_step = min(kv_heads, max(1, TILE_ELEMENTS // (group * min(height, CAUSAL_ROWS) * keys)))
    height = min(height, max(SMALLEST_HEIGHT, TILE_ELEMENTS // (kv_step * group * keys)))
    batch_step = max(1, TILE_ELEMENTS // (heads * rows * keys)) if kv_step == kv_heads and height == rows else 1
    index, shift = 0, keys - rows
    for b in range(0, batch, batch_step):
        for h in range(0, kv_heads, kv_step):
            h_end = min(h + kv_step, kv_heads)
            for row in range(0, rows, height):
                row_end = min(row + height, rows)
                first, last = 0, keys
                if options.causal:
                    last = row_end + shift
                if options.window >= 0:
                    first = max(0, row + shift - options.window + 1)
                    last = min(last, row_end - 1 + shift + options.window)
                yield Tile(
                    index,
                    slice(b, min(b + batch_step, batch)),
                    slice(h, h_end),
                    slice(h * group, h_end * group),
                    slice(row, row_end),
                    slice(first, last),
                )
                index += 1


@dataclass
class Scores:
    """A tile's scores ``[batch, heads, rows, keys]`` after the bias, and what comes after the modulation."""

    values: Tensor
    capped: Tensor | None  # before the bias, where a softcap is set
    keep: Tensor | None  # the mask: boolean, broadcastable to values
    band: tuple[slice, Tensor] | None  # some columns, and which of them causality and the window leave to each row
    added: Tensor | None  # an additive mask's values, 0 where it masks
    irregular: bool  # whether values may be infinite, NaN, or so large that the modulation overflows

    @property
    def all_kept(self) -> Tensor | None:
        """What mask, causality and window keep together, broadcastable to values; None where it is everything."""
        if self.band is None:
            return self.keep
        columns, keep = self.band
        whole = keep.new_ones(keep.shape[0], self.values.shape[-1])
        whole[:, columns] = keep
        return whole if self.keep is None else whole & self.keep

    def hide(self, x: Tensor) -> bool:
        """Write minus infinity into ``x``, shaped like values, where it is not kept; whether a row may be all that."""
        if self.keep is not None:
            _hide(x, self.keep, self.irregular)
        if self.band is not None:
            columns, keep = self.band
            _hide(x[..., columns], keep, self.irregular)
        return self.keep is not None


def _hide(x: Tensor, keep: Tensor, irregular: bool) -> None:
    """Minus infinity where ``keep`` is False."""
    if irregular or x.device.type != "cpu":
        x.masked_fill_(~keep, MINUS_INFINITY)
    else:  # on a CPU a tenth of the time, but it would let a NaN through
        cap = keep.to(x.dtype).sub_(0.5).mul_(float("inf"))
        torch.minimum(x, cap, out=x)


class Problem:
    """The inputs of a call in the type it is computed in, tile by tile."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, seed: Tensor | None,
        options: Options, whole_heads: bool,
    ) -> None:  # fmt: skip
        self.dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.q, self.k, self.v = q, _contiguous(k, self.dtype), _contiguous(v, self.dtype)
        self.shape = (*q.shape[:3], k.shape[2])
        self.mask, self.bias = _four_dimensional(mask), _four_dimensional(bias)
        self.seed = None if seed is None else int(seed)
        self.options = options
        self.tiles = list(plan_tiles(*q.shape[:2], k.shape[1], q.shape[2], k.shape[2], options, whole_heads))
        self._buffers: dict[str, Tensor] = {}

    def buffer(self, name: str, tile: Tile) -> Tensor:
        """A reused contiguous ``[batch, heads, rows, keys]`` buffer for the tile."""
        shape = [axis.stop - axis.start for axis in tile.scores]
        count = shape[0] * shape[1] * shape[2] * shape[3]
        held = self._buffers.get(name)
        if held is None or held.numel() < count:
            held = self._buffers[name] = torch.empty(count, dtype=self.dtype, device=self.q.device)
        return held[:count].view(shape)

    def queries(self, x: Tensor, tile: Tile) -> Tensor:
        """The tile's rows of a ``[B, H, Nq, *]`` tensor as ``[batch * kv_heads, group * rows, *]``."""
        part = x[tile.batch, tile.heads, tile.rows].to(self.dtype)
        return part.reshape(-1, part.shape[1] // _length(tile.kv_heads) * part.shape[2], part.shape[3])

    def keys(self, x: Tensor, tile: Tile) -> Tensor:
        """The tile's keys of a contiguous ``[B, Hkv, Nk, *]`` tensor as ``[batch * kv_heads, keys, *]``."""
        return x[tile.batch, tile.kv_heads, tile.keys].flatten(0, 1)

    def product(self, x: Tensor, y: Tensor, name: str, tile: Tile, alpha: float = 1.0) -> Tensor:
        """``alpha x y^T`` for the tile's queries x and keys y, in the buffer ``name``."""
        out = self.buffer(name, tile)
        flat = out.view(x.shape[0], x.shape[1], y.shape[1])
        torch.baddbmm(flat, x, y.mT, beta=0.0, alpha=alpha, out=flat)
        return out

    def scores(self, tile: Tile, keep_capped: bool) -> Scores:
        """The tile's scores before the modulation."""
        q, k = self.queries(self.q, tile), self.keys(self.k, tile)
        values, capped = self.product(q, k, "scores", tile, self.options.scale), None
        if self.options.softcap:
            values.div_(self.options.softcap).tanh_().mul_(self.options.softcap)
            capped = values.clone() if keep_capped else None
        if self.bias is not None:
            values.add_(_part(self.bias, tile))
        keep, added = self._mask(tile)
        return Scores(values, capped, keep, self._band(tile), added, _is_irregular(values))

    def _mask(self, tile: Tile) -> tuple[Tensor | None, Tensor | None]:
        if self.mask is None:
            return None, None
        mask = _part(self.mask, tile)
        if mask.dtype == torch.bool:
            return mask, None
        keep = ~(mask <= torch.finfo(mask.dtype).min / 2)
        return keep, mask.to(self.dtype).masked_fill(~keep, 0.0)

    def _band(self, tile: Tile) -> tuple[slice, Tensor] | None:
        """Columns of the tile, and which of them causality and the window leave to each row; None for all of them."""
        causal, window = self.options.causal, self.options.window
        if not causal and window < 0:
            return None
        device, shift = self.q.device, self.shape[3] - self.shape[2]
        # without a window, the keys up to the first row's last one are seen by all
        first = tile.keys.start if window >= 0 else tile.rows.start + shift + 1
        row = torch.arange(tile.rows.start + shift, tile.rows.stop + shift, device=device)[:, None]
        key = torch.arange(first, tile.keys.stop, device=device)
        keep = key <= row if causal else key < row + window
        return slice(first - tile.keys.start, None), keep & (key > row - window) if window >= 0 else keep

    def dropout(self, tile: Tile) -> Tensor | None:
        """The tile's dropout factors, 0 or 1 / (1 - p), the same at every call."""
        if self.seed is None:
            return None
        generator = torch.Generator(self.q.device).manual_seed((self.seed + 0x9E3779B9 * tile.index) % (1 << 62))
        kept = 1.0 - self.options.dropout_p
        return self.buffer("dropout", tile).bernoulli_(kept, generator=generator).div_(kept)


def _length(part: slice) -> int:
    return part.stop - part.start


def _contiguous(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).contiguous()


def _four_dimensional(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.view((1,) * (4 - x.ndim) + x.shape)


def _part(x: Tensor, tile: Tile) -> Tensor:
    """What a tensor that broadcasts to ``[B, H, Nq, Nk]`` holds for the tile, broadcastable to the tile."""
    return x[tuple(slice(None) if size == 1 else part for size, part in zip(x.shape, tile.scores))]


def _is_irregular(x: Tensor) -> bool:
    """Whether scores are infinite, NaN or could become so; always yes where asking would wait for the device."""
    if x.device.type != "cpu" or not x.numel():
        return True
    low, high = torch.aminmax(x)
    return not (low.item() > -REGULAR and high.item() < REGULAR)


class Rows(Protocol):
    """A row function with its derivative, in the form the tile loops call it."""

    def forward(self, problem: Problem, tile: Tile, scores: Scores, differentiate: bool) -> Tensor:
        """Probabilities of the scores; the scores stay as :meth:`backward` wants them if ``differentiate``."""

    def backward(
        self, problem: Problem, tile: Tile, scores: Scores, probabilities: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients for (the scores, the added values); the last two arguments may be overwritten."""


def run_forward(problem: Problem, rows: Rows, out: Tensor) -> Tensor:
    """Attention through ``rows`` into ``out`` ``[B, H, Nq, Dv]``."""
    for tile in problem.tiles:
        p = rows.forward(problem, tile, problem.scores(tile, keep_capped=False), differentiate=False)
        drop = problem.dropout(tile)
        if drop is not None:
            p = p.mul_(drop)
        where = out[tile.batch, tile.heads, tile.rows]
        product = torch.bmm(_per_kv_head(p, tile), problem.keys(problem.v, tile))
        where.copy_(product.view(where.shape))
    return out


def _per_kv_head(x: Tensor, tile: Tile) -> Tensor:
    """``[batch, heads, rows, keys]`` as ``[batch * kv_heads, group * rows, keys]``."""
    return x.reshape(x.shape[0] * _length(tile.kv_heads), -1, x.shape[3])


@dataclass
class Gradients:
    """Accumulators in the type of the computation; None where no gradient is wanted."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    mask: Tensor | None


def run_backward(problem: Problem, rows: Rows, grad_out: Tensor, bias: Tensor | None, mask: Tensor | None) -> Gradients:
    """Recompute every tile and push ``grad_out`` through it; ``bias`` and ``mask`` are given where wanted."""
    grads = Gradients(
        q=torch.empty(problem.q.shape, dtype=problem.q.dtype, device=problem.q.device),
        k=torch.zeros_like(problem.k),
        v=torch.zeros_like(problem.v),
        bias=None if bias is None else torch.zeros(bias.shape, dtype=problem.dtype, device=bias.device),
        mask=None if mask is None else torch.zeros(mask.shape, dtype=problem.dtype, device=mask.device),
    )
    for tile in problem.tiles:
        _backward_tile(problem, rows, tile, grad_out, grads)
    return grads


def _backward_tile(problem: Problem, rows: Rows, tile: Tile, grad_out: Tensor, grads: Gradients) -> None:
    scores, options = problem.scores(tile, keep_capped=True), problem.options
    p = rows.forward(problem, tile, scores, differentiate=True)
    q, do = problem.queries(problem.q, tile), problem.queries(grad_out, tile)
    grad = problem.product(do, problem.keys(problem.v, tile), "gradient", tile)
    drop, dropped = problem.dropout(tile), p
    if drop is not None:
        dropped = torch.mul(p, drop, out=problem.buffer("scratch", tile))
        grad.mul_(drop)
    _add_product(grads.v, tile, _per_kv_head(dropped, tile).mT, do, 1.0)
    grad, grad_added = rows.backward(problem, tile, scores, p, grad)
    _add_reduced(grads.mask, grad_added, tile)
    _add_reduced(grads.bias, grad, tile)
    if scores.capped is not None:
        grad = grad.mul(1.0 - (scores.capped / options.softcap).square_())
    grad = _per_kv_head(grad, tile)
    where = grads.q[tile.batch, tile.heads, tile.rows]
    where.copy_(torch.bmm(grad, problem.keys(problem.k, tile)).mul_(options.scale).view(where.shape))
    _add_product(grads.k, tile, grad.mT, q, options.scale)


def _add_product(into: Tensor, tile: Tile, x: Tensor, y: Tensor, alpha: float) -> None:
    """Add ``alpha x y`` to the tile's keys of a contiguous ``[B, Hkv, Nk, *]`` accumulator."""
    where = into[tile.batch, tile.kv_heads, tile.keys]
    where.flatten(0, 1).baddbmm_(x, y, alpha=alpha) if _flattens(where) else where.add_(
        torch.bmm(x, y).view(where.shape), alpha=alpha
    )


def _flattens(x: Tensor) -> bool:
    """Whether the first two dimensions of ``x`` can be joined without a copy."""
    return x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)


def _add_reduced(into: Tensor | None, grad: Tensor, tile: Tile) -> None:
    """Add a tile's gradient to an accumulator that broadcasts against ``[B, H, Nq, Nk]``."""
    if into is None:
        return
    into = into.view((1,) * (4 - into.ndim) + into.shape)
    summed = [axis for axis, size in enumerate(into.shape) if size == 1]
    where = tuple(slice(None) if size == 1 else part for size, part in zip(into.shape, tile.scores))
    into[where].add_(grad.sum(summed, keepdim=True) if summed else grad)


# ------------------------------------------------------------------------------------------------------ MultiMax


class MultiMaxRows:
    """``softmax(sigma(scores))`` in place, with gradients for the scalars summed in float64."""

    def __init__(
        self, ranges: Tensor, ts: Tensor, scale: Tensor | None, shift: Tensor | None, sinks: Tensor | None,
        heads: int, dtype: torch.dtype, want_scalars: bool = False,
    ) -> None:  # fmt: skip
        self._terms = _terms(ranges.to(dtype), ts.to(dtype))
        self.scale, self.shift, self.sinks = (
            None if x is None else x.to(dtype).reshape(-1, 1, 1) for x in (scale, shift, sinks)
        )
        # per head, the sums of g f(u) over the terms that :meth:`_through_sigma` lists, for ranges and for ts
        self._sums = torch.zeros(2, ranges.shape[-1], heads, dtype=torch.float64, device=ranges.device)
        self._ts = ts.detach().double()
        self.grad_scale, self.grad_shift, self.grad_sinks = (
            torch.zeros(heads, dtype=torch.float64, device=ranges.device) for _ in range(3)
        )
        self.want_scalars = want_scalars
        self._sink_share: Tensor | None = None

    @property
    def grad_ranges(self) -> Tensor:
        """``[heads, 2N]``"""
        order = torch.arange(1, self._ts.shape[-1] // 2 + 1, device=self._ts.device)
        signed = torch.stack((order, -order), -1).flatten()  # b_n - x grows with b_n, x - d_n falls with d_n
        return self._sums[0].T * (signed * self._ts)

    @property
    def grad_ts(self) -> Tensor:
        """``[heads, 2N]``"""
        return self._sums[1].T

    def forward(self, problem: Problem, tile: Tile, scores: Scores, differentiate: bool) -> Tensor:
        """See :class:`Rows`. The scores are left as sigma saw them."""
        x, out = scores.values, problem.buffer("probabilities", tile)
        self._dead = self._plain = None
        if scores.irregular:
            self._dead = x <= torch.finfo(x.dtype).min / 2
            x.masked_fill_(self._dead, 0.0)
        if self.scale is not None and self.shift is not None:
            self._plain = x.clone() if differentiate else None
            x.mul_(_of(self.scale, tile)).add_(_of(self.shift, tile))
        self._modulate(x, out, problem.buffer("scratch", tile), tile)
        if scores.added is not None:
            out.add_(scores.added)
        may_be_empty = scores.hide(out)
        if self._dead is not None:
            out.masked_fill_(self._dead, MINUS_INFINITY)
        return self._softmax(out, tile, may_be_empty or self._dead is not None)

    def _modulate(self, x: Tensor, out: Tensor, u: Tensor, tile: Tile) -> None:
        """``out = sigma(x)``; ``u`` is scratch."""
        source = x
        for term in self._terms:
            if not term.vanishes:
                term.excess(x, u, tile).relu_()
                _add_power(source, u, _of(term.t, tile), term.n, out)
                source = out
        if source is x:
            out.copy_(x)

    def _softmax(self, x: Tensor, tile: Tile, may_be_empty: bool) -> Tensor:
        empty = x.amax(-1, keepdim=True) == MINUS_INFINITY if may_be_empty else None
        if self.sinks is not None:
            self._sink_share = torch.sigmoid(_of(self.sinks, tile) - x.logsumexp(-1, keepdim=True))
        torch.softmax(x, -1, out=x)
        if empty is not None and empty.any():
            x.masked_fill_(empty, 0.0)
        if self._sink_share is not None:
            x.mul_(1.0 - self._sink_share)
        return x

    def backward(
        self, problem: Problem, tile: Tile, scores: Scores, probabilities: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See :class:`Rows`."""
        g, p = problem.buffer("scratch", tile), probabilities
        if self._sink_share is not None:
            delta = torch.mul(p, grad, out=g).sum(-1, keepdim=True)
            self._add(self.grad_sinks, tile, -(self._sink_share * delta))
        torch.ops.aten._softmax_backward_data.out(grad, p, -1, p.dtype, grad_input=g)
        if self._dead is not None:
            g.masked_fill_(self._dead, 0.0)
        grad_x = self._through_sigma(scores.values, g, problem.buffer("grad_x", tile), grad, p, tile)
        if self.scale is not None:
            if self._plain is not None:
                self._add(self.grad_scale, tile, grad_x * self._plain)
            self._add(self.grad_shift, tile, grad_x)
            grad_x = grad_x.mul_(_of(self.scale, tile))
        return grad_x, g

    def _through_sigma(self, x: Tensor, g: Tensor, out: Tensor, u: Tensor, w: Tensor, tile: Tile) -> Tensor:
        """``out = g dsigma/dx``; adds g's share to the gradients of ranges and ts. ``u`` and ``w`` are scratch."""
        source = g
        sums = torch.zeros(2, len(self._terms), *x.shape[:3], dtype=x.dtype, device=x.device)
        for column, term in enumerate(self._terms):
            if term.vanishes and not self.want_scalars:
                continue
            term.excess(x, u, tile)
            # w = g times the derivative of relu(u)^n, without its factor n
            if term.n == 1:
                torch.ops.aten.threshold_backward.grad_input(g, u, 0.0, grad_input=w)
            else:
                u.relu_()
                torch.mul(g, u if term.n == 2 else u ** (term.n - 1), out=w)
            if not term.vanishes:
                _add_power(source, w, _of(term.slope, tile), 1, out)
                source = out
            if self.want_scalars:
                torch.sum(w, -1, out=sums[0, column])
                torch.sum(torch.mul(w, u, out=u), -1, out=sums[1, column])
        if self.want_scalars:
            self._sums[:, :, tile.heads] += sums.sum((2, 4), dtype=torch.float64)
        return out.copy_(g) if source is g else out

    @staticmethod
    def _add(into: Tensor, tile: Tile, x: Tensor) -> None:
        """``into[heads] += sum(x)`` over all but the heads."""
        into[tile.heads] += x.sum(-1, keepdim=True).sum((0, 2, 3), dtype=torch.float64)


@dataclass(frozen=True)
class Term:
    """``t * max(b - x, 0)**n`` or ``t * max(x - d, 0)**n``.

    A parameter is a number where that is known without waiting for a device, else broadcastable to a tile.
    """

    bound: Tensor
    t: Tensor | float
    n: int
    below: bool

    def excess(self, x: Tensor, out: Tensor, tile: Tile) -> Tensor:
        """``b - x`` or ``x - d``."""
        bound = _of(self.bound, tile)
        return torch.sub(bound, x, out=out) if self.below else torch.sub(x, bound, out=out)

    @property
    def vanishes(self) -> bool:
        """Whether the term is known to be zero everywhere."""
        return isinstance(self.t, float) and self.t == 0.0

    @property
    def slope(self) -> Tensor | float:
        """The derivative's factor in front of ``max(.., 0)**(n - 1)``."""
        return self.t * (-self.n if self.below else self.n)


def _terms(ranges: Tensor, ts: Tensor) -> list[Term]:
    """The 2N terms of a modulator ``[2N]`` or ``[heads, 2N]``."""
    shared = ts.ndim == 1
    bounds, slopes = ([x if shared else x[:, None, None] for x in parameter.unbind(-1)] for parameter in (ranges, ts))
    if shared and ts.device.type == "cpu":
        slopes = ts.tolist()
    return [Term(b, t, i // 2 + 1, i % 2 == 0) for i, (b, t) in enumerate(zip(bounds, slopes))]


def _of(x: Tensor | float, tile: Tile) -> Tensor | float:
    """The tile's heads of a ``[heads, 1, 1]`` parameter; one that all heads share passes through."""
    return x if isinstance(x, float) or x.ndim == 0 or x.shape[0] == 1 else x[tile.heads]


def _add_power(x: Tensor, u: Tensor, t: Tensor | float, n: int, out: Tensor) -> None:
    """``out = x + t * u**n``."""
    if isinstance(t, float) and n == 1:
        torch.add(x, u, alpha=t, out=out)
    elif isinstance(t, float) and n == 2:
        torch.addcmul(x, u, u, value=t, out=out)
    elif isinstance(t, float):
        torch.add(x, u**n, alpha=t, out=out)
    else:
        torch.addcmul(x, u if n == 1 else u.square() if n == 2 else u**n, t, out=out)


def _attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    ts: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    affine_scale: Tensor | None,
    affine_shift: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    causal: bool,
    window: int,
    scale: float,
    softcap: float,
) -> Tensor:
    options = Options(dropout_p, causal, window, scale, softcap)
    problem = Problem(q, k, v, mask, bias, seed, options, whole_heads=False)
    rows = MultiMaxRows(ranges, ts, affine_scale, affine_shift, sinks, q.shape[1], problem.dtype)
    return run_forward(problem, rows, _empty_output(q, v))


def _empty_output(q: Tensor, v: Tensor) -> Tensor:
    return torch.empty((*q.shape[:3], v.shape[3]), dtype=v.dtype, device=v.device)


def _fake_forward(q, k, v, *rest):
    return _empty_output(q, v)


def _attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    ts: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    affine_scale: Tensor | None,
    affine_shift: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    causal: bool,
    window: int,
    scale: float,
    softcap: float,
    needed: Sequence[bool],
) -> list[Tensor]:
    options = Options(dropout_p, causal, window, scale, softcap)
    problem = Problem(q, k, v, mask, bias, seed, options, whole_heads=False)
    scalars = needed[3] or needed[4]
    rows = MultiMaxRows(ranges, ts, affine_scale, affine_shift, sinks, q.shape[1], problem.dtype, scalars)
    inputs = (q, k, v, ranges, ts, mask, bias, affine_scale, affine_shift, sinks)
    grads = run_backward(problem, rows, grad_out, bias if needed[6] else None, mask if needed[5] else None)
    found = (
        grads.q, grads.k, grads.v, rows.grad_ranges, rows.grad_ts, grads.mask, grads.bias,
        rows.grad_scale, rows.grad_shift, rows.grad_sinks,
    )  # fmt: skip
    return [fitted(*pair) if wanted else q.new_empty(0) for *pair, wanted in zip(found, inputs, needed)]


def fitted(grad: Tensor, like: Tensor) -> Tensor:
    """A gradient in its input's type and shape; one kept per head is summed where the heads share the parameter."""
    while grad.ndim > like.ndim:
        grad = grad.sum(0)
    return grad.to(like.dtype)


def _fake_backward(grad_out, q, k, v, ranges, ts, mask, bias, affine_scale, affine_shift, sinks, *rest):
    inputs = (q, k, v, ranges, ts, mask, bias, affine_scale, affine_shift, sinks)
    return fake_gradients(inputs, rest[-1])


def fake_gradients(inputs: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor]:
    """Contiguous tensors shaped like the inputs that need a gradient, empty ones for the others."""
    q = inputs[0]
    return [x.new_empty(x.shape) if x is not None and wanted else q.new_empty(0) for x, wanted in zip(inputs, needed)]


DIFFERENTIABLE = 10  # the leading arguments that gradients are defined for: q ... sinks


def _save(ctx, inputs, output) -> None:
    tensors, ctx.options = inputs[: DIFFERENTIABLE + 1], inputs[DIFFERENTIABLE + 1 :]
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad_out: Tensor):
    refuse_second_derivative("tiled")
    needed = list(ctx.needs_input_grad[:DIFFERENTIABLE])
    grads = _backward_op(grad_out, *ctx.saved_tensors, *ctx.options, needed)
    absent = [None] * (1 + len(ctx.options))
    return *(grad if wanted else None for grad, wanted in zip(grads, needed)), *absent


#: the fragment that the operators below and those of the native backend live in, as long as the process does
LIBRARY = torch.library.Library("hf_multimax", "FRAGMENT")


def define_operator(name: str, function: Callable, fake: Callable, dispatch_key: str) -> Callable:
    """A functional operator ``hf_multimax::name`` (a third of the overhead of ``torch.library.custom_op``)."""
    LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
    LIBRARY.impl(name, function, dispatch_key)
    torch.library.register_fake(f"hf_multimax::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.hf_multimax, name).default


_forward_op = define_operator("tiled_attention", _attention_forward, _fake_forward, "CompositeExplicitAutograd")
_backward_op = define_operator(
    "tiled_attention_backward", _attention_backward, _fake_backward, "CompositeExplicitAutograd"
)
torch.library.register_autograd("hf_multimax::tiled_attention", _differentiate, setup_context=_save, lib=LIBRARY)


# ------------------------------------------------------------------------------------------------------ any function


class AutogradRows:
    """A row function without a derivative of its own: autograd differentiates it tile by tile."""

    def __init__(self, function: RowFunction, parameters: Sequence[Tensor], needed: Sequence[bool] = ()) -> None:
        self.function = function
        self.parameters = [x.detach().requires_grad_(wanted) for x, wanted in zip(parameters, needed)] or parameters
        self.grads = [torch.zeros_like(x) if x.requires_grad else None for x in self.parameters]
        self.differentiate = bool(needed) or not parameters
        self._graph: tuple[Tensor, Tensor] | None = None

    def forward(self, problem: Problem, tile: Tile, scores: Scores, differentiate: bool) -> Tensor:
        """See :class:`Rows`."""
        x = scores.values if scores.added is None else scores.values + scores.added
        if not differentiate:
            return self.function(x, scores.all_kept, *self.parameters)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            self._graph = x, self.function(x, scores.all_kept, *self.parameters)
        return self._graph[1].detach()

    def backward(
        self, problem: Problem, tile: Tile, scores: Scores, probabilities: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See :class:`Rows`."""
        x, p = self._graph
        wanted = [x, *(parameter for parameter in self.parameters if parameter.requires_grad)]
        grad_x, *rest = torch.autograd.grad(p, wanted, grad, allow_unused=True, materialize_grads=True)
        for total, part in zip((total for total in self.grads if total is not None), rest):
            total += part
        self._graph = None
        return grad_x, grad_x


class _RowwiseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, options, seed, q, k, v, mask, bias, *parameters):
        ctx.function, ctx.options = function, options
        ctx.save_for_backward(seed, q, k, v, mask, bias, *parameters)
        problem = Problem(q, k, v, mask, bias, seed, options, whole_heads=True)
        return run_forward(problem, AutogradRows(function, parameters), _empty_output(q, v))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        seed, q, k, v, mask, bias, *parameters = ctx.saved_tensors
        _, _, _, *_qkv, need_mask, need_bias = ctx.needs_input_grad[:8]
        problem = Problem(q, k, v, mask, bias, seed, ctx.options, whole_heads=True)
        rows = AutogradRows(ctx.function, parameters, ctx.needs_input_grad[8:])
        grads = run_backward(problem, rows, grad_out, bias if need_bias else None, mask if need_mask else None)
        found = (grads.q, grads.k, grads.v, grads.mask, grads.bias, *rows.grads)
        inputs = (q, k, v, mask, bias, *parameters)
        return None, None, None, *(None if g is None else g.to(x.dtype) for g, x in zip(found, inputs))
