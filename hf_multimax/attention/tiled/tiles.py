"""Tiles of whole score rows: which there are, what each holds, and its scores.

A tile holds all keys that a few query rows see, so that a row function meets complete rows.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hf_multimax.attention.call import Call

__all__ = ["Problem", "Scores", "Tile", "computed_in", "length", "plan_tiles"]

#: scores in a tile: three such buffers of float32 (five in the backward pass) stay in a processor's outer cache
TILE_ELEMENTS = 1 << 19
#: rows of a tile whatever the number of keys: matrix products of fewer are slow
SMALLEST_HEIGHT = 32
#: rows of a tile under a causal mask or a window, where the scores that a tile computes in vain grow with its height
CAUSAL_ROWS = 128
#: scores below this are no masked entries
REGULAR = 1e6
MINUS_INFINITY = float("-inf")


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

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """``(batch, heads, rows, keys)``"""
        return tuple(length(axis) for axis in self.scores)


def plan_tiles(call: Call, whole_heads: bool) -> Iterator[Tile]:
    """The tiles of a call: a function of its shapes alone, so that forward and backward drop the same weights."""
    (batch, heads, rows, _), (_, kv_heads, keys, _) = call.q.shape, call.k.shape
    if not batch * heads * kv_heads * rows * keys:
        return
    group = heads // kv_heads
    height = min(rows, CAUSAL_ROWS) if call.banded else rows
    kv_step = kv_heads
    if not whole_heads:
        kv_step = min(kv_heads, max(1, TILE_ELEMENTS // (group * height * keys)))
    height = min(height, max(SMALLEST_HEIGHT, TILE_ELEMENTS // (kv_step * group * keys)))
    batch_step = max(1, TILE_ELEMENTS // (heads * rows * keys)) if kv_step == kv_heads and height == rows else 1
    index, shift = 0, keys - rows
    for b in range(0, batch, batch_step):
        for h in range(0, kv_heads, kv_step):
            h_end = min(h + kv_step, kv_heads)
            for row in range(0, rows, height):
                row_end = min(row + height, rows)
                first, last = 0, keys
                if call.causal:
                    last = row_end + shift
                if call.window >= 0:
                    first = max(0, row + shift - call.window + 1)
                    last = min(last, row_end - 1 + shift + call.window)
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
    irregular: bool  # whether values may be masked, infinite, NaN, or overflow by the modulation, or added be NaN

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

    def __init__(self, call: Call, whole_heads: bool = False, regular: float = REGULAR) -> None:
        q, mask, bias = call.q, call.mask, call.bias
        self.call, self.dtype = call, computed_in(q.dtype)
        self.q, self.k, self.v = q, _contiguous(call.k, self.dtype), _contiguous(call.v, self.dtype)
        self.shape = (*q.shape[:3], self.k.shape[2])
        self.mask, self.bias = _four_dimensional(mask), _four_dimensional(bias)
        self.seed = None if call.seed is None else int(call.seed)
        self.tiles = list(plan_tiles(call, whole_heads))
        self._largest = max((math.prod(tile.shape) for tile in self.tiles), default=0)
        self._buffers: dict[str, Tensor] = {}
        self._views: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        # where the inputs alone bound the scores, no tile need be asked
        bound = _magnitude(q) * _magnitude(self.k) * q.shape[3] * abs(call.scale)
        self._limit = min(regular, REGULAR)
        self._regular = bound + (0.0 if bias is None else _magnitude(bias)) < self._limit
        self._nan_mask = mask is not None and mask.is_floating_point() and math.isnan(_magnitude(mask))

    def buffer(self, name: str, tile: Tile) -> Tensor:
        """A reused contiguous ``[batch, heads, rows, keys]`` buffer for the tile."""
        view = self._views.get((name, tile.shape))
        if view is None:
            if name not in self._buffers:
                self._buffers[name] = torch.empty(self._largest, dtype=self.dtype, device=self.q.device)
            view = self._buffers[name][: math.prod(tile.shape)].view(tile.shape)
            self._views[name, tile.shape] = view
        return view

    def queries(self, x: Tensor, tile: Tile) -> Tensor:
        """The tile's rows of a ``[B, H, Nq, *]`` tensor as ``[batch * kv_heads, group * rows, *]``."""
        part = x[tile.batch, tile.heads, tile.rows].to(self.dtype)
        batch, heads, rows, width = part.shape
        kv_heads = length(tile.kv_heads)
        return part.reshape(batch * kv_heads, heads // kv_heads * rows, width)

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
        values, capped = self.product(q, k, "scores", tile, self.call.scale), None
        if self.call.softcap:
            values.div_(self.call.softcap).tanh_().mul_(self.call.softcap)
            capped = values.clone() if keep_capped else None
        if self.bias is not None:
            values.add_(_part(self.bias, tile))
        keep, added = self._mask(tile)
        irregular = self._nan_mask or (not self._regular and not _magnitude(values) < self._limit)
        return Scores(values, capped, keep, self._band(tile), added, irregular)

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
        causal, window = self.call.causal, self.call.window
        if not self.call.banded:
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
        kept = 1.0 - self.call.dropout_p
        return self.buffer("dropout", tile).bernoulli_(kept, generator=generator).div_(kept)


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The type that a call of this type is computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def length(part: slice) -> int:
    return part.stop - part.start


def _contiguous(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).contiguous()


def _four_dimensional(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.view((1,) * (4 - x.ndim) + x.shape)


def _part(x: Tensor, tile: Tile) -> Tensor:
    """What a tensor that broadcasts to ``[B, H, Nq, Nk]`` holds for the tile, broadcastable to the tile."""
    return x[tuple(slice(None) if size == 1 else part for size, part in zip(x.shape, tile.scores))]


def _magnitude(x: Tensor) -> float:
    """The largest absolute value in ``x``, NaN if it holds one; infinity where asking would wait for the device."""
    if x.device.type != "cpu" or not x.numel():
        return float("inf")
    # what broadcasting repeats is read once; aminmax copies what is not in the order of its memory
    x = x[tuple(slice(None) if stride else slice(1) for stride in x.stride())]
    x = x.permute(sorted(range(x.ndim), key=x.stride, reverse=True))
    low, high = (end.item() for end in torch.aminmax(x))
    return high if high > -low else -low
