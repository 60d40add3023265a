"""Host side of attention through functions of rows: tile sizes, scratch and launches. Importing it needs Triton."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_multimax.attention.call import Call
from hf_multimax.attention.rowwise import Function
from hf_multimax.attention.triton.inputs import (
    INTERPRETED,
    bias_parts,
    inputs_of,
    multiprocessors,
    padded,
    shared_memory,
)
from hf_multimax.attention.triton.rows.backward import rows_dkdv_kernel, rows_dq_kernel
from hf_multimax.attention.triton.rows.bias import rows_bias_kernel
from hf_multimax.attention.triton.rows.forward import rows_forward_kernel
from hf_multimax.rows.call import KINDS
from hf_multimax.rows.triton.arguments import Rows, count_sums, exponent_of

__all__ = ["Tile", "backward", "forward", "tile"]

#: bytes of all scratch together that stay in the L2 cache beside what else passes through it
_SCRATCH = 32 << 20
#: programs of the forward pass to a processor, where their scratch allows it
_PROGRAMS = 2
#: scores of a chunk in a walk over the scratch
_CHUNK = 512 if INTERPRETED else 4096
#: of a row, that leave registers for large tiles
_FEW_SUMS = 2
#: what gives no weights of zero
_DENSE = {"softmax", "scalable_softmax", "adaptive_temperature", "softmax1", "sigmoid"}


class Tile(NamedTuple):
    """Queries and keys per tile, warps per program and pipeline stages of one kernel."""

    m: int
    n: int
    warps: int
    stages: int


# By kernel and padded head dimension: none of these spills registers on sm_90. The forward pass takes fewer queries at
# a time where there are fewer, or many keys would let the scratch outgrow the cache.
_HALF = {
    "forward": {64: Tile(64, 64, 8, 2), 128: Tile(64, 64, 8, 2), 256: Tile(32, 32, 4, 2)},
    "dq": {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 8, 2), 256: Tile(32, 32, 8, 1)},
    "dkdv": {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 8, 2), 256: Tile(32, 32, 8, 1)},
}
# The same with a mask, a bias or dropout, and of functions with many sums of a row: only those of 256 spill, a little.
_LOADED = {
    "forward": {64: Tile(64, 64, 8, 2), 128: Tile(64, 32, 8, 2), 256: Tile(32, 32, 8, 2)},
    "dq": {64: Tile(32, 32, 4, 2), 128: Tile(32, 32, 8, 1), 256: Tile(32, 32, 8, 1)},
    "dkdv": {64: Tile(32, 32, 4, 1), 128: Tile(32, 32, 8, 1), 256: Tile(32, 32, 8, 1)},
}
# Exact float32 products run on the ordinary units.
_SINGLE = {
    "forward": {64: Tile(32, 32, 8, 2), 128: Tile(32, 32, 8, 2), 256: Tile(32, 16, 8, 1)},
    "dq": {64: Tile(32, 32, 8, 1), 128: Tile(16, 16, 8, 1), 256: Tile(16, 16, 8, 1)},
    "dkdv": {64: Tile(32, 32, 8, 1), 128: Tile(32, 32, 8, 1), 256: Tile(16, 16, 8, 1)},
}
# The interpreter works tile by tile in NumPy; small ones let small tests cross their borders.
_TINY = {"forward": Tile(16, 32, 1, 1), "dq": Tile(32, 32, 1, 1), "dkdv": Tile(32, 32, 1, 1)}


def tile(kernel: str, width: int, dtype: torch.dtype, shared: int = 227, lean: bool = False) -> Tile:
    """Tile of a kernel ("forward", "dq" or "dkdv", which is the bias's, too) for head dimensions up to ``width``.

    ``shared``: KiB of shared memory that the device gives a program. ``lean``: a call without mask, bias and dropout
    through a function with at most two sums of a row.
    """
    if INTERPRETED:
        return _TINY[kernel]
    table = _SINGLE if dtype == torch.float32 else _HALF if lean else _LOADED
    chosen = table[kernel][max(64, width)]
    # below 160 KiB, that of compute capability 8.0, all that fits
    return chosen if shared >= 160 else Tile(min(chosen.m, 32), min(chosen.n, 32), 4, 1)


def forward(function: Function, call: Call, o: Tensor, stats: Tensor | None) -> None:
    """Fill the output ``[B, H, Nq, Dv]`` and, where given, the rows' numbers ``[STATS, B, H, Nq]``."""
    if not o.numel() or not call.k.numel():
        o.zero_()
        return
    rows = _rows(function)
    t = _tile(call, "forward", rows.SUMS.value)
    from_zero = _from_zero(function, call)
    width = _scratch_width(call, t, from_zero)
    m, programs = _shares(call, t, width)
    blocks = triton.cdiv(call.q.shape[2], m)
    items = blocks * call.q.shape[0] * call.q.shape[1]
    programs = min(programs, items)
    with torch.cuda.device_of(call.q):
        scratch = torch.empty(programs * m * width, dtype=torch.float32, device=call.q.device)
        rows_forward_kernel[(programs,)](
            inputs_of(call),
            rows._replace(x=scratch, s_row=width, n_rows=programs * m),
            o=o,
            stats=stats,
            s_o=o.stride(),
            plane=_plane(call),
            blocks=blocks,
            items=items,
            CHUNK=_CHUNK // m,
            FROM_ZERO=from_zero,
            SPARSE=_sparse(function),
            **_options(t._replace(m=m)),
        )


def backward(
    function: Function, call: Call, do: Tensor, stats: Tensor, options: Sequence[bool], bias: bool = False
) -> tuple[list[Tensor | None], dict[str, Tensor]]:
    """The gradients of the options (those wanted) by row, ``[B, H, Nq]``, and by name of q, k, v and, if wanted, the
    bias.
    """
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (call.q, call.k, call.v))
    shape = call.q.shape[:3]
    d_options = [do.new_zeros(shape, dtype=torch.float32) if wanted else None for wanted in options]
    found = {"q": dq, "k": dk, "v": dv}
    if bias:
        found["bias"] = torch.empty_like(call.bias, memory_format=torch.contiguous_format)
    if not do.numel() or not call.k.numel():
        for x in found.values():
            x.zero_()
        return d_options, found
    rows, inputs, heads = _rows(function, any(options)), inputs_of(call), call.q.shape[0] * call.q.shape[1]
    sums = do.new_empty((rows.SUMS.value, *shape), dtype=torch.float32)
    shared = {"function": rows, "do": do, "stats": stats, "sums": sums, "s_do": do.stride(), "plane": _plane(call)}
    shared |= {"SPARSE": _sparse(function)}
    with torch.cuda.device_of(call.q):
        t = _tile(call, "dq", rows.SUMS.value)
        blocks = triton.cdiv(call.q.shape[2], t.m)
        rows_dq_kernel[(blocks * heads,)](
            inputs,
            dq=dq,
            d_options=tuple(d_options),
            s_dq=dq.stride(),
            blocks=blocks,
            **shared,
            **_options(t),
        )
        t = _tile(call, "dkdv", rows.SUMS.value)
        blocks = triton.cdiv(call.k.shape[2], t.n)
        rows_dkdv_kernel[(blocks * call.k.shape[0] * call.k.shape[1],)](
            inputs, dk=dk, dv=dv, s_dk=dk.stride(), s_dv=dv.stride(), blocks=blocks, **shared, **_options(t)
        )
        if bias:
            programs, parts = bias_parts(call, found["bias"], t.m, t.n)
            rows_bias_kernel[(programs,)](inputs, **parts, **shared, **_options(t))
    return d_options, found


def _rows(function: Function, options: bool = False) -> Rows:
    """The function as the kernels take it; ``options``: whether their gradients are wanted."""
    kind = KINDS[function.kind]
    absent = dict.fromkeys(Rows._fields)
    return Rows(
        **absent
        | {"value": function.value, "beta": function.beta, "gamma": function.gamma, "a": function.a, "b": function.b}
        | {
            "KIND": tl.constexpr(kind),
            "SUMS": tl.constexpr(count_sums(kind, options)),
            "OPTIONS": tl.constexpr(options),
            "EXPONENT": tl.constexpr(exponent_of(kind, function.a if function.value is None else None)),
            "ORDER": tl.constexpr(0),
            "NEAR": tl.constexpr(False),
            "HELD": tl.constexpr(False),
        }
    )


def _sparse(function: Function) -> bool:
    return KINDS[function.kind] not in _DENSE


def _from_zero(function: Function, call: Call) -> bool:
    """Whether columns are counted from the first key on, which a window may hide: what tells ties by their place."""
    return call.window >= 0 and KINDS[function.kind] == "topk_softmax"


def _scratch_width(call: Call, t: Tile, from_zero: bool) -> int:
    """Scores of a row in the scratch, in whole tiles."""
    keys = call.k.shape[2]
    if call.window >= 0 and not from_zero:
        keys = min(keys, (1 if call.causal else 2) * call.window + t.m + t.n)
    return triton.cdiv(keys, t.n) * t.n


def _shares(call: Call, t: Tile, width: int) -> tuple[int, int]:
    """(queries of a block, programs) whose scratch stays in the cache, if any does."""
    processors, m = multiprocessors(call.q.device), t.m
    fitting = _SCRATCH // (4 * width * processors)  # rows to a processor
    while m > 16 and (m > fitting or m // 2 >= call.q.shape[2]):
        m //= 2
    return m, processors * max(1, min(_PROGRAMS, fitting // m))


def _plane(call: Call) -> int:
    return call.q.shape[0] * call.q.shape[1] * call.q.shape[2]


def _tile(call: Call, kernel: str, sums: int) -> Tile:
    width = max(padded(call.q.shape[-1]), padded(call.v.shape[-1]))
    lean = call.mask is None and call.bias is None and call.seed is None and sums <= _FEW_SUMS
    return tile(kernel, width, call.q.dtype, shared_memory(call.q.device), lean)


def _options(t: Tile) -> dict[str, Any]:
    # Newer Triton versions fuse multiplications and additions only on demand.
    return {"BLOCK_M": t.m, "BLOCK_N": t.n, "num_warps": t.warps, "num_stages": t.stages, "enable_fp_fusion": True}
