"""A call of the compiled functions of rows: its arguments, packed as ``rows.h`` reads them."""

import struct

import torch
from torch import Tensor

from hf_multimax.extension.library import load

__all__ = ["KINDS", "MAX_ORDER", "STATS", "TYPES", "call", "items_of"]

#: ``Kind`` of rows.h, in its order
KINDS = (
    "multimax", "softmax", "scalable_softmax", "adaptive_temperature", "sparsemax", "entmax15", "entmax", "rsoftmax",
    "tsoftmax", "evsoftmax", "topk_softmax", "fusedmax", "oscarmax", "softmax1", "sigmoid",
)  # fmt: skip
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MAX_ORDER = 16
#: floats that the forward pass leaves to the backward pass for every row
STATS = 6
#: scores that a thread takes at a time, and below which one thread is faster than several
ITEM, SEVERAL_THREADS = 1 << 13, 1 << 15
_POINTERS = ("x", "mask", "out", "p", "stats", "groups", "value", "ranges", "ts", "affine", "grad", "grad_x")
_POINTERS = (*_POINTERS, "grad_value", "sums")
_PACKED = struct.Struct(f"={len(_POINTERS) + 15}q2d")


def items_of(shape: torch.Size, heads: int) -> tuple[int, int, int, int]:
    """(rows, consecutive rows of one head, rows of an item, items) of scores ``[..., n]``; heads 0: all rows alike."""
    n = shape[-1]
    rows = shape.numel() // n
    head_rows = shape[-2] if heads else rows
    item_rows = min(max(1, ITEM // n), head_rows)
    return rows, head_rows, item_rows, rows // head_rows * -(-head_rows // item_rows)


def call(name: str, rows: Tensor, kind: int, a: float, b: float, **tensors: Tensor | None) -> None:
    """Call ``multimax_rows_<name>`` of the extension on tensors shaped and typed like ``rows``.

    All are contiguous, but for ``mask``. Absent and empty ones are null pointers.
    """
    library, why = load()
    if library is None:
        raise RuntimeError(f"compiled functions of rows are not available: {why}; use backend('eager')")
    shape, ranges, mask = rows.shape, tensors.get("ranges"), tensors.get("mask")
    heads, order = 0, 1
    if ranges is not None:
        heads, order = ranges.shape[0] if ranges.ndim == 2 else 0, ranges.shape[-1] // 2
    count, head_rows, item_rows, _ = items_of(shape, heads)
    places = (0, 0, 0, 0, 0, 0)
    if mask is not None:
        if mask.ndim > 4:
            tensors["mask"] = mask = mask.reshape(-1, mask.shape[-1]).contiguous()
        stride, size = (0, 0, 0, *mask.stride())[-4:], (1, 1, 1, *mask.shape)[-4:]
        places = (stride[3], *stride[:3], *size[1:3])
    threads = torch.get_num_threads() if count * shape[-1] >= SEVERAL_THREADS else 1
    pointers = [0 if (tensor := tensors.get(name)) is None else tensor.data_ptr() for name in _POINTERS]
    numbers = (TYPES[rows.dtype], kind, count, shape[-1], order, heads, head_rows, item_rows, threads)
    getattr(library, f"multimax_rows_{name}")(_PACKED.pack(*pointers, *places, *numbers, a, b))
