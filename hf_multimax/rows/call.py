"""A call of the compiled functions of rows, and its arguments packed as ``rows.h`` reads them."""

import struct
from typing import NamedTuple

import torch
from torch import Tensor

from hf_multimax.extension.library import load

__all__ = ["KINDS", "MAX_ORDER", "STATS", "TYPES", "RowCall", "items_of", "run", "stats_size"]

#: ``Kind`` of rows.h, in its order
KINDS = (
    "multimax", "softmax", "scalable_softmax", "adaptive_temperature", "sparsemax", "entmax15", "entmax", "rsoftmax",
    "tsoftmax", "evsoftmax", "topk_softmax", "fusedmax", "oscarmax", "softmax1", "sigmoid", "asentmax",
    "softpick",
)  # fmt: skip
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MAX_ORDER = 16
#: floats that the forward pass leaves to the backward pass for every row
STATS = 8
#: scores that a thread takes at a time, and below which one thread is faster than several
ITEM, SEVERAL_THREADS = 1 << 13, 1 << 15
_POINTERS = (
    "x", "mask", "out", "p", "stats", "groups", "value", "beta", "gamma", "ranges", "ts", "affine", "grad", "grad_x",
    "grad_value", "grad_beta", "grad_gamma", "sums",
)  # fmt: skip
_PACKED = struct.Struct(f"={len(_POINTERS) + 15}q2d")


class RowCall(NamedTuple):
    """A function of the rows of ``x``.

    Attributes:
        x: contiguous scores ``[..., n]`` of float32, bfloat16 or float16.
        value: an option of every row, float32 ``[rows]``, in place of the number ``a``.
        beta, gamma: asentmax's, alike.
        ranges, ts: float32 ``[2N]`` or ``[heads, 2N]``, heads being the third dimension of ``x`` from the right.
        affine: float32 ``[2]`` or ``[heads, 2]``.
        mask: boolean, shaped like ``x``, True = keep.
        kind: the function's place in ``KINDS``.
        a, b: its options that are numbers.
        triton: whether Triton computes it, on a GPU or in its interpreter; else the extension does.
    """

    x: Tensor
    value: Tensor | None = None
    beta: Tensor | None = None
    gamma: Tensor | None = None
    ranges: Tensor | None = None
    ts: Tensor | None = None
    affine: Tensor | None = None
    mask: Tensor | None = None
    kind: int = 0
    a: float = 0.0
    b: float = 0.0
    triton: bool = False

    def tensors(self) -> dict[str, Tensor | None]:
        """The fields that are tensors."""
        return dict(zip(self._fields[:8], self))


class Items(NamedTuple):
    """How ``rows`` are shared out: in items of ``item_rows``, of ``head_rows`` that follow each other."""

    rows: int
    head_rows: int
    item_rows: int
    items: int


def stats_size(kind: int) -> int:
    """``STATS``, and what the pieces of fusedmax and oscarmax take in attention: as in ``rows.h``."""
    return STATS + 48 if KINDS[kind] in ("fusedmax", "oscarmax") else STATS


def items_of(shape: torch.Size, heads: int) -> Items:
    """The items of scores ``[..., n]``, whatever the number of threads; heads 0: all rows alike."""
    n = shape[-1]
    rows = shape.numel() // n
    head_rows = shape[-2] if heads else rows
    item_rows = min(max(1, ITEM // n), head_rows)
    return Items(rows, head_rows, item_rows, rows // head_rows * -(-head_rows // item_rows))


def run(name: str, like: Tensor, kind: int, a: float, b: float, **tensors: Tensor | None) -> None:
    """Call ``multimax_rows_<name>`` of the extension on rows shaped and typed like ``like``.

    The tensors are contiguous, but for ``mask``; absent ones are null pointers.

    Raises:
        RuntimeError: where the extension is not available.
    """
    library, why = load()
    if library is None:
        raise RuntimeError(f"compiled functions of rows are not available: {why}; use backend('eager')")
    shape, ranges, mask = like.shape, tensors.get("ranges"), tensors.get("mask")
    heads, order = 0, 1
    if ranges is not None:
        heads, order = ranges.shape[0] if ranges.ndim == 2 else 0, ranges.shape[-1] // 2
    rows, head_rows, item_rows, _ = items_of(shape, heads)
    places = (0, 0, 0, 0, 0, 0)
    if mask is not None:
        if mask.ndim > 4:
            tensors["mask"] = mask = mask.reshape(-1, mask.shape[-1]).contiguous()
        stride, size = (0, 0, 0, *mask.stride())[-4:], (1, 1, 1, *mask.shape)[-4:]
        places = (stride[3], *stride[:3], *size[1:3])
    threads = torch.get_num_threads() if rows * shape[-1] >= SEVERAL_THREADS else 1
    pointers = [0 if (tensor := tensors.get(field)) is None else tensor.data_ptr() for field in _POINTERS]
    numbers = (TYPES[like.dtype], kind, rows, shape[-1], order, heads, head_rows, item_rows, threads)
    getattr(library, f"multimax_rows_{name}")(_PACKED.pack(*pointers, *places, *numbers, a, b))
