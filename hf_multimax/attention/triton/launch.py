"""Host side of the Triton kernels: tile sizes, buffers and launches. Importing it needs Triton."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_multimax.attention.call import Call
from hf_multimax.attention.operators import fitted
from hf_multimax.attention.triton.arguments import Inputs, Rows
from hf_multimax.attention.triton.backward import dkdv_kernel, dq_kernel
from hf_multimax.attention.triton.bias import bias_kernel
from hf_multimax.attention.triton.forward import combine_kernel, decode_kernel, forward_kernel
from hf_multimax.attention.triton.inputs import (
    INTERPRETED,
    bias_parts,
    inputs_of,
    multiprocessors,
    padded,
    shared_memory,
)

__all__ = ["Tile", "backward", "forward", "tile"]

#: a call with at most this many queries per head, and at least that many keys, splits its keys over programs
_DECODE_QUERIES, _DECODE_KEYS = 16, 32 if INTERPRETED else 256
_MAX_SPLITS = 64


class Tile(NamedTuple):
    """Queries and keys per tile, warps per program and pipeline stages of one kernel."""

    m: int
    n: int
    warps: int
    stages: int


# By kernel and padded head dimension: for sm_90 the fewest instructions per score among those that spill in no loop.
_HALF = {
    "forward": {64: Tile(128, 128, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
    "short": {64: Tile(64, 64, 4, 3), 128: Tile(64, 64, 4, 2), 256: Tile(64, 32, 8, 2)},
    "decode": {64: Tile(16, 128, 4, 2), 128: Tile(16, 64, 4, 2), 256: Tile(16, 64, 4, 2)},
    "dq": {64: Tile(128, 64, 8, 2), 128: Tile(128, 32, 8, 2), 256: Tile(128, 16, 8, 1)},
    "dkdv": {64: Tile(32, 128, 8, 3), 128: Tile(16, 128, 8, 2), 256: Tile(32, 32, 8, 1)},
    "bias": {64: Tile(64, 64, 8, 2), 128: Tile(64, 64, 8, 1), 256: Tile(64, 32, 8, 1)},
}
# The same without mask, bias and dropout, where registers are left for more; they take up to 160 KiB of shared memory.
_LEAN = {"forward": {128: Tile(128, 128, 8, 2)}, "dq": {128: Tile(128, 64, 8, 2)}}
# Exact float32 products run on the ordinary units: small tiles, more registers per score.
_SINGLE = {
    "forward": {64: Tile(64, 32, 8, 2), 128: Tile(32, 32, 8, 2), 256: Tile(32, 16, 8, 1)},
    "short": {64: Tile(32, 32, 4, 2), 128: Tile(32, 32, 8, 2), 256: Tile(32, 16, 8, 1)},
    "decode": {64: Tile(16, 64, 4, 2), 128: Tile(16, 32, 4, 2), 256: Tile(16, 16, 4, 1)},
    "dq": {64: Tile(32, 32, 8, 1), 128: Tile(32, 32, 8, 1), 256: Tile(16, 16, 8, 1)},
    "dkdv": {64: Tile(32, 32, 8, 1), 128: Tile(32, 32, 8, 1), 256: Tile(16, 16, 8, 1)},
    "bias": {64: Tile(32, 32, 8, 1), 128: Tile(32, 32, 8, 1), 256: Tile(16, 16, 8, 1)},
}
# The interpreter works tile by tile in NumPy; small ones let small tests cross their borders.
_TINY = {
    "forward": Tile(32, 16, 1, 1),
    "decode": Tile(16, 16, 1, 1),
    "dq": Tile(32, 16, 1, 1),
    "dkdv": Tile(32, 16, 1, 1),
}


def tile(kernel: str, width: int, dtype: torch.dtype, shared: int = 227, lean: bool = False) -> Tile:
    """Tile of a kernel ("forward", "short", "decode", "dq", "dkdv" or "bias") for head dimensions up to ``width``.

    ``shared``: KiB of shared memory that the device gives a program. ``lean``: a call without mask, bias and dropout.
    """
    if INTERPRETED:
        return _TINY.get(kernel, _TINY["forward"])
    width = max(64, width)
    if dtype == torch.float32:
        chosen = _SINGLE[kernel][width]
    elif lean and shared > 200:
        chosen = _LEAN.get(kernel, {}).get(width, _HALF[kernel][width])
    else:
        chosen = _HALF[kernel][width]
    # below 160 KiB, that of compute capability 8.0, all that fits
    return chosen if shared >= 160 else Tile(min(chosen.m, 64), min(chosen.n, 64 if width <= 64 else 32), 4, 1)


def forward(call: Call, o: Tensor, residual: Tensor | None, norms: Tensor) -> None:
    """Fill the output ``[B, H, Nq, Dv]`` and the rows' norms ``[2 or 1, B, H, Nq]``.

    Norms in base 2: the peak and the log of the sum relative to it, or one number for both.
    """
    if not call.q.numel():
        return
    rows = _rows(call, o, residual, norms)
    with torch.cuda.device_of(call.q):
        run = _decode if call.q.shape[2] <= _DECODE_QUERIES and call.k.shape[2] >= _DECODE_KEYS else _forward
        run(call, rows)


def backward(
    call: Call, do: Tensor, o: Tensor, residual: Tensor | None, norms: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of a call's differentiable tensors, None where ``needed`` is False.

    Deterministic: partial sums of the scalars are stored by program and reduced in float64.
    """
    wanted = dict(zip(Call._fields, needed))
    need_scalars = any(wanted[name] for name in ("ranges", "ts", "affine_scale", "affine_shift"))
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (call.q, call.k, call.v))
    dbias = torch.zeros_like(call.bias, memory_format=torch.contiguous_format) if wanted["bias"] else None
    delta = torch.zeros_like(norms[0], dtype=_sum_type(call))
    rows = _rows(call, o, residual, norms)._replace(do=do, s_do=do.stride(), delta=delta)
    size = call.ranges.shape[-1]
    scalars = torch.zeros(call.q.shape[1], 2 * size + 2, dtype=torch.float64, device=call.q.device)
    if not call.q.numel():
        dk.zero_()
        dv.zero_()
    else:
        with torch.cuda.device_of(call.q):
            _dq(call, rows, dq)
            if wanted["k"] or wanted["v"] or need_scalars:
                partial = _dkdv(call, rows, dk, dv, need_scalars)
                if partial is not None:
                    scalars[:, : partial.shape[-1]] = partial.sum((0, 2), dtype=torch.float64)
            if dbias is not None:
                _dbias(call, rows, dbias)
    found = (
        dq, dk, dv, scalars[:, :size], scalars[:, size : 2 * size], None, dbias, scalars[:, 2 * size],
        scalars[:, 2 * size + 1], None if call.sinks is None else _sink_gradient(call.sinks, norms, delta),
    )  # fmt: skip
    return fitted(found, call, needed)


# --- launches ----------------------------------------------------------------------------------------------------


def _forward(call: Call, rows: Rows) -> None:
    inputs, t = _inputs_and_tile(call, "forward" if call.q.shape[2] > 64 else "short")
    blocks = triton.cdiv(call.q.shape[2], t.m)
    forward_kernel[(blocks * call.q.shape[1] * call.q.shape[0],)](inputs, rows, blocks=blocks, **_options(t))


def _decode(call: Call, rows: Rows) -> None:
    inputs, t = _inputs_and_tile(call, "decode")
    batch, heads, n_rows, _ = call.q.shape
    blocks = triton.cdiv(inputs.group * n_rows, t.m)
    programs = batch * call.k.shape[1] * blocks
    splits = max(1, min(_MAX_SPLITS, 2 * multiprocessors(call.q.device) // programs, call.k.shape[2] // (2 * t.n)))
    partial = torch.empty(batch, heads, n_rows, splits, call.v.shape[-1], dtype=torch.float32, device=call.q.device)
    peaks, totals = torch.empty(2, batch, heads, n_rows, splits, dtype=torch.float32, device=call.q.device)
    decode_kernel[(programs * splits,)](
        inputs, partial=partial, split_peaks=peaks, split_totals=totals, blocks=blocks, splits=splits, **_options(t)
    )
    combine_kernel[(batch * heads * n_rows,)](
        inputs, rows, partial, peaks, totals, splits, BLOCK_S=triton.next_power_of_2(splits)
    )


def _dq(call: Call, rows: Rows, dq: Tensor) -> None:
    inputs, t = _inputs_and_tile(call, "dq")
    blocks, heads = triton.cdiv(call.q.shape[2], t.m), call.q.shape[1]
    dq_kernel[(blocks * heads * call.q.shape[0],)](inputs, rows, dq=dq, s_dq=dq.stride(), blocks=blocks, **_options(t))


def _dkdv(call: Call, rows: Rows, dk: Tensor, dv: Tensor, need_scalars: bool) -> Tensor | None:
    """Fill ``dk`` and ``dv``; the scalars' partial sums ``[B, H, blocks, 4N (+ 2)]`` if needed."""
    inputs, t = _inputs_and_tile(call, "dkdv")
    blocks = triton.cdiv(call.k.shape[2], t.n)
    if blocks == 0:
        return None
    partial = None
    if need_scalars:
        count = 4 * _order(call) + (0 if call.affine_scale is None else 2)
        partial = torch.empty(
            call.q.shape[0], call.q.shape[1], blocks, count, dtype=_sum_type(call), device=call.q.device
        )
    dkdv_kernel[(blocks * call.k.shape[1] * call.q.shape[0],)](
        inputs,
        rows,
        dk=dk,
        dv=dv,
        partial=partial,
        s_dk=dk.stride(),
        s_dv=dv.stride(),
        blocks=blocks,
        **_options(t),
    )
    return partial


def _dbias(call: Call, rows: Rows, dbias: Tensor) -> None:
    inputs, t = _inputs_and_tile(call, "bias")
    programs, parts = bias_parts(call, dbias, t.m, t.n)
    bias_kernel[(programs,)](inputs, rows, **parts, **_options(t))


def _sink_gradient(sinks: Tensor, norms: Tensor, delta: Tensor) -> Tensor:
    """A sink takes probability from the keys and adds nothing: its gradient is -p_sink * delta, summed over rows."""
    log2e = 1.4426950408889634
    share = torch.exp2(sinks.float()[:, None] * log2e - norms.double().sum(0))
    return -(share * delta).sum((0, 2))


def _order(call: Call) -> int:
    return call.ranges.shape[-1] // 2


def _sum_type(call: Call) -> torch.dtype:
    """Type of delta and of the scalars' partial sums."""
    return torch.float64 if call.q.dtype == torch.float32 else torch.float32


def _rows(call: Call, o: Tensor, residual: Tensor | None, norms: Tensor) -> Rows:
    """The rows of a forward pass."""
    exact = len(norms) == 2
    return Rows(
        o=o,
        residual=residual,
        do=None,
        peaks=norms[0] if exact else None,
        totals=norms[-1],
        delta=None,
        sinks=call.sinks,
        s_o=o.stride(),
        s_do=None,
        s_row=norms[0].stride(),
        EXACT=tl.constexpr(exact),
    )


def _inputs_and_tile(call: Call, kernel: str) -> tuple[Inputs, Tile]:
    """The inputs of a launch, and its tile."""
    lean = call.mask is None and call.bias is None and call.seed is None
    width = max(padded(call.q.shape[-1]), padded(call.v.shape[-1]))
    return inputs_of(call), tile(kernel, width, call.q.dtype, shared_memory(call.q.device), lean)


def _options(t: Tile) -> dict[str, Any]:
    # Newer Triton versions fuse multiplications and additions only on demand.
    return {"BLOCK_M": t.m, "BLOCK_N": t.n, "num_warps": t.warps, "num_stages": t.stages, "enable_fp_fusion": True}
