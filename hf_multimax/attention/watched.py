"""Eager attention tile by tile, for those who read its scores and weights: none holds more than one tile of them."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_multimax.attention.call import Call
from hf_multimax.attention.eager import eager_attention, with_mask
from hf_multimax.attention.tiled.tiles import Tile, plan_tiles

__all__ = ["Watch", "attention_in_tiles", "watch", "watched"]


@dataclass
class Watch:
    """Where attention is at present.

    Attributes:
        tile: the tile whose scores the normalizer gets; None where it gets the whole score matrix.
        shape: ``[B, H, Nq, Nk]`` of the call that the tile belongs to.
    """

    tile: Tile | None = None
    shape: tuple[int, int, int, int] = (0, 0, 0, 0)


_watch: ContextVar[Watch | None] = ContextVar("hf_multimax.watch", default=None)


@contextlib.contextmanager
def watch() -> Iterator[Watch]:
    """Inside the block, eager attention calls a layer's normalizer for one tile of whole rows after the other."""
    watching = Watch()
    token = _watch.set(watching)
    try:
        yield watching
    finally:
        _watch.reset(token)


def watched() -> bool:
    """Whether a :func:`watch` block is open; compiled code, which cannot ask, is not watched."""
    return not torch.compiler.is_compiling() and _watch.get() is not None


def attention_in_tiles(
    call: Call, modulator: Callable[[Tensor], Tensor], normalize: Callable[..., Tensor], factor: Tensor | None = None
) -> Tensor:
    """:func:`eager_attention` without its weights, in tiles; a :func:`watch` block must be open."""
    watching = _watch.get()
    assert watching is not None
    watching.shape = shape = (*call.q.shape[:3], call.k.shape[2])
    out = call.v.new_zeros(*shape[:3], call.v.shape[-1])
    whole = call._replace(
        mask=None if call.mask is None else call.mask.expand(shape),
        bias=None if call.bias is None else call.bias.expand(shape),
    )
    try:
        for tile in plan_tiles(call, whole_heads=True):
            watching.tile = tile
            own = None if factor is None else factor[tile.batch, tile.heads, tile.rows]
            part, _ = eager_attention(_part(whole, tile), modulator, normalize, own)
            out[tile.batch, tile.heads, tile.rows] = part
    finally:
        watching.tile = None
    return out


def _part(call: Call, tile: Tile) -> Call:
    """The call that computes one tile; what its place hides is in its mask."""
    queries, keys = (tile.batch, tile.heads, tile.rows), (tile.batch, tile.kv_heads, tile.keys)
    mask = None if call.mask is None else call.mask[tile.scores]
    if call.banded:
        own = torch.arange(tile.rows.start, tile.rows.stop, device=call.q.device) + call.k.shape[2] - call.q.shape[2]
        ahead = torch.arange(tile.keys.start, tile.keys.stop, device=call.q.device) - own[:, None]
        keep = ahead <= 0 if call.causal else ahead < call.window
        mask = with_mask(mask, keep if call.window < 0 else keep & (ahead > -call.window))
    sinks = call.sinks if call.sinks is None or call.sinks.ndim == 1 else call.sinks[queries]
    bias = None if call.bias is None else call.bias[tile.scores]
    q, k, v = call.q[queries], call.k[keys], call.v[keys]
    return call._replace(q=q, k=k, v=v, mask=mask, bias=bias, sinks=sinks, causal=False, window=-1)
