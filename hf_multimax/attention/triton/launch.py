"""Host side of the Triton kernels: tile sizes, buffers and launches. Importing it needs Triton."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from hf_multimax.attention.triton.backward import dkdv_kernel, dq_kernel
from hf_multimax.attention.triton.bias import bias_kernel
from hf_multimax.attention.triton.forward import combine_kernel, decode_kernel, forward_kernel

__all__ = ["Problem", "Tile", "backward", "forward", "tile"]

_INTERPRETED = bool(triton.knobs.runtime.interpret)
#: a call with at most this many queries per head, and at least that many keys, splits its keys over programs
_DECODE_QUERIES, _DECODE_KEYS = 16, 32 if _INTERPRETED else 256
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


@dataclass(frozen=True)
class Problem:
    """One call. Tensors are 4-D ``[B, H, N, D]`` views; packed sequences have B = 1 and ``cu_q``, ``cu_k``."""

    q: Tensor
    k: Tensor
    v: Tensor
    ranges: Tensor
    ts: Tensor
    affine_scale: Tensor | None
    affine_shift: Tensor | None
    sinks: Tensor | None
    mask: Tensor | None
    bias: Tensor | None
    seed: Tensor | None
    cu_q: Tensor | None
    cu_k: Tensor | None
    max_q: int
    max_k: int
    dropout_p: float
    causal: bool
    window: int | None
    scale: float
    softcap: float | None

    @property
    def sequences(self) -> int:
        return self.q.shape[0] if self.cu_q is None else self.cu_q.numel() - 1

    @property
    def order(self) -> int:
        return self.ranges.shape[-1] // 2

    @property
    def empty(self) -> bool:
        return self.q.numel() == 0 or self.sequences == 0

    def kernel_arguments(self) -> dict[str, Any]:
        """The arguments that every attention kernel takes."""
        (batch, heads, n_rows, d), (_, key_heads, n_cols, d_v) = self.q.shape, self.v.shape
        shape = (batch, heads, n_rows, n_cols)
        mask = None if self.mask is None else self.mask.expand(shape)
        bias = None if self.bias is None else self.bias.expand(shape)
        boolean = mask is not None and mask.dtype == torch.bool
        return {
            "q": self.q,
            "k": self.k,
            "v": self.v,
            "ranges": self.ranges,
            "ts": self.ts,
            "affine_scale": self.affine_scale,
            "affine_shift": self.affine_shift,
            "mask": mask.view(torch.uint8) if boolean else mask,
            "bias": bias,
            "seed": self.seed,
            "s_q": self.q.stride(),
            "s_k": self.k.stride(),
            "s_v": self.v.stride(),
            "s_mask": (0, 0, 0, 0) if mask is None else mask.stride(),
            "s_bias": (0, 0, 0, 0) if bias is None else bias.stride(),
            "s_head": tuple(
                0 if p is None or p.ndim == own else p.stride(0)
                for p, own in ((self.ranges, 1), (self.affine_scale, 0), (self.affine_shift, 0))
            ),
            "heads": heads,
            "group": heads // key_heads,
            "n_rows": n_rows,
            "n_cols": n_cols,
            # the 32 random bits of a dropped score are below this, read as a signed number
            "threshold": min(int(self.dropout_p * 2**32) - 2**31, 2**31 - 1),
            "scale": self.scale,
            "softcap": self.softcap,
            # one that hides nothing costs nothing
            "window": None if self.window is None or self.window >= n_rows + n_cols else self.window,
            "ORDER": self.order,
            # a sink does see what all scores of a row have in common
            "NEAR": self.q.dtype != torch.float32 and self.sinks is None,
            "MASK_MIN": None if mask is None or boolean else torch.finfo(mask.dtype).min / 2,
            "MASK_BY_ROW": mask is not None and mask.stride(2) != 0,
            "BIAS_BY_ROW": bias is not None and bias.stride(2) != 0,
            "CAUSAL": self.causal,
            "D": d,
            "DV": d_v,
            "BLOCK_D": _padded(d),
            "BLOCK_DV": _padded(d_v),
            "UPCAST": _INTERPRETED and self.q.dtype == torch.bfloat16,
        }

    @property
    def keep_scale(self) -> float:
        return 1.0 / (1.0 - self.dropout_p)


def tile(kernel: str, width: int, dtype: torch.dtype, shared: int = 227, lean: bool = False) -> Tile:
    """Tile of a kernel ("forward", "short", "decode", "dq", "dkdv" or "bias") for head dimensions up to ``width``.

    ``shared``: KiB of shared memory that the device gives a program. ``lean``: a call without mask, bias and dropout.
    """
    if _INTERPRETED:
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


def forward(problem: Problem, o: Tensor, residual: Tensor | None, norms: Tensor) -> None:
    """Fill the output ``[B, H, Nq, Dv]`` and the rows' norms ``[2 or 1, B, H, Nq]``.

    Norms in base 2: the peak and the log of the sum relative to it, or one number for both.
    """
    if problem.empty:
        return
    with torch.cuda.device_of(problem.q):
        if problem.cu_q is None and problem.max_q <= _DECODE_QUERIES and problem.max_k >= _DECODE_KEYS:
            _decode(problem, o, residual, norms)
        else:
            _forward(problem, o, residual, norms)


def backward(
    problem: Problem, do: Tensor, o: Tensor, residual: Tensor | None, norms: Tensor, needs: Sequence[bool]
) -> list[Tensor]:
    """Gradients of (q, k, v, ranges, ts, affine scale, affine shift, sinks, bias); empty where ``needs`` is False.

    Deterministic: partial sums of the scalars are stored by program and reduced in float64.
    """
    p = problem
    need_k, need_v, need_bias = needs[1], needs[2], needs[8]
    need_scalars, need_sinks = any(needs[3:7]), needs[7]
    make = torch.empty_like if p.cu_q is None else torch.zeros_like
    dq, dk, dv = (make(x, memory_format=torch.contiguous_format) for x in (p.q, p.k, p.v))
    dbias = torch.zeros_like(p.bias, memory_format=torch.contiguous_format) if need_bias else None
    delta = torch.zeros_like(norms[0], dtype=_sum_type(p))
    scalars = torch.zeros(p.q.shape[1], 2 * p.ranges.shape[-1] + 2, dtype=torch.float64, device=p.q.device)
    if p.empty:
        dk.zero_()
        dv.zero_()
    else:
        with torch.cuda.device_of(p.q):
            _dq(p, do, o, residual, norms, dq, delta)
            if need_k or need_v or need_scalars:
                partial = _dkdv(p, do, norms, delta, dk, dv, need_scalars)
                if partial is not None:
                    scalars[:, : partial.shape[-1]] = partial.sum((0, 2), dtype=torch.float64)
            if dbias is not None:
                _dbias(p, do, norms, delta, dbias)

    size = p.ranges.shape[-1]
    columns = (scalars[:, :size], scalars[:, size : 2 * size], scalars[:, 2 * size], scalars[:, 2 * size + 1])
    inputs = (p.ranges, p.ts, p.affine_scale, p.affine_shift)
    scalar_gradients = [
        (c if c.shape == x.shape else c.sum(0)).to(x.dtype, copy=True) if need else None
        for c, x, need in zip(columns, inputs, needs[3:7])
    ]
    dsinks = _sink_gradient(p.sinks, norms, delta) if need_sinks else None
    gradients = (dq, dk, dv, *scalar_gradients, dsinks, dbias)
    return [g if need else p.q.new_empty(0) for g, need in zip(gradients, needs)]


# --- launches ----------------------------------------------------------------------------------------------------


def _forward(p: Problem, o: Tensor, residual: Tensor | None, norms: Tensor) -> None:
    arguments = p.kernel_arguments()
    t = _tile(p, "forward" if p.max_q > 64 else "short", arguments)
    blocks = triton.cdiv(p.max_q, t.m)
    forward_kernel[(blocks * p.q.shape[1] * p.sequences,)](
        **arguments,
        o=o,
        residual=residual,
        peaks=_peaks(norms),
        totals=norms[-1],
        sinks=p.sinks,
        cu_q=p.cu_q,
        cu_k=p.cu_k,
        s_o=o.stride(),
        s_row=norms[0].stride(),
        blocks=blocks,
        keep_scale=p.keep_scale,
        **_options(t),
    )


def _decode(p: Problem, o: Tensor, residual: Tensor | None, norms: Tensor) -> None:
    arguments = p.kernel_arguments()
    t = _tile(p, "decode", arguments)
    batch, heads, n_rows, _ = p.q.shape
    blocks = triton.cdiv(arguments["group"] * n_rows, t.m)
    programs = batch * p.k.shape[1] * blocks
    splits = max(1, min(_MAX_SPLITS, 2 * _multiprocessors(p.q.device) // programs, p.max_k // (2 * t.n)))
    d_v = p.v.shape[-1]
    partial = torch.empty(batch, heads, n_rows, splits, d_v, dtype=torch.float32, device=p.q.device)
    peaks, totals = torch.empty(2, batch, heads, n_rows, splits, dtype=torch.float32, device=p.q.device)
    decode_kernel[(programs * splits,)](
        **arguments,
        partial=partial,
        split_peaks=peaks,
        split_totals=totals,
        blocks=blocks,
        splits=splits,
        **_options(t),
    )
    combine_kernel[(batch * heads * n_rows,)](
        partial=partial,
        split_peaks=peaks,
        split_totals=totals,
        o=o,
        residual=residual,
        peaks=_peaks(norms),
        totals=norms[-1],
        sinks=p.sinks,
        s_o=o.stride(),
        heads=heads,
        n_rows=n_rows,
        splits=splits,
        keep_scale=p.keep_scale,
        DV=d_v,
        BLOCK_DV=_padded(d_v),
        BLOCK_S=triton.next_power_of_2(splits),
    )


def _dq(p: Problem, do: Tensor, o: Tensor, residual: Tensor | None, norms: Tensor, dq: Tensor, delta: Tensor) -> None:
    arguments = p.kernel_arguments()
    t = _tile(p, "dq", arguments)
    blocks, heads = triton.cdiv(p.max_q, t.m), p.q.shape[1]
    dq_kernel[(blocks * heads * p.sequences,)](
        **arguments,
        o=o,
        residual=residual,
        do=do,
        dq=dq,
        peaks=_peaks(norms),
        totals=norms[-1],
        delta=delta,
        sinks=p.sinks,
        cu_q=p.cu_q,
        cu_k=p.cu_k,
        s_o=o.stride(),
        s_do=do.stride(),
        s_dq=dq.stride(),
        s_row=norms[0].stride(),
        blocks=blocks,
        keep_scale=p.keep_scale,
        **_options(t),
    )


def _dkdv(
    p: Problem, do: Tensor, norms: Tensor, delta: Tensor, dk: Tensor, dv: Tensor, need_scalars: bool
) -> Tensor | None:
    """Fill ``dk`` and ``dv``; the scalars' partial sums ``[sequences, H, blocks, 4N (+ 2)]`` if needed."""
    arguments = p.kernel_arguments()
    t = _tile(p, "dkdv", arguments)
    blocks = triton.cdiv(p.max_k, t.n)
    if blocks == 0:
        return None
    partial = None
    if need_scalars:
        count = 4 * p.order + (0 if p.affine_scale is None else 2)
        make = torch.empty if p.cu_q is None else torch.zeros  # short sequences leave programs idle
        partial = make(p.sequences, p.q.shape[1], blocks, count, dtype=_sum_type(p), device=p.q.device)
    dkdv_kernel[(blocks * p.k.shape[1] * p.sequences,)](
        **arguments,
        do=do,
        dk=dk,
        dv=dv,
        partial=partial,
        peaks=_peaks(norms),
        totals=norms[-1],
        delta=delta,
        cu_q=p.cu_q,
        cu_k=p.cu_k,
        s_do=do.stride(),
        s_dk=dk.stride(),
        s_dv=dv.stride(),
        s_row=norms[0].stride(),
        blocks=blocks,
        keep_scale=p.keep_scale,
        **_options(t),
    )
    return partial


def _dbias(p: Problem, do: Tensor, norms: Tensor, delta: Tensor, dbias: Tensor) -> None:
    arguments = p.kernel_arguments()
    t = _tile(p, "bias", arguments)
    full = dbias.view((1,) * (4 - dbias.ndim) + dbias.shape)
    batch, heads, n_rows, n_cols = full.shape
    row_blocks, col_blocks = triton.cdiv(n_rows, t.m), triton.cdiv(n_cols, t.n)
    bias_kernel[(batch * heads * row_blocks * col_blocks,)](
        **arguments,
        do=do,
        dbias=full,
        peaks=_peaks(norms),
        totals=norms[-1],
        delta=delta,
        s_do=do.stride(),
        s_dbias=full.stride(),
        s_row=norms[0].stride(),
        batches=p.q.shape[0],
        row_blocks=row_blocks,
        col_blocks=col_blocks,
        keep_scale=p.keep_scale,
        PER_BATCH=batch > 1,
        PER_HEAD=heads > 1,
        PER_ROW=n_rows > 1,
        PER_COL=n_cols > 1,
        **_options(t),
    )


def _sink_gradient(sinks: Tensor, norms: Tensor, delta: Tensor) -> Tensor:
    """A sink takes probability from the keys and adds nothing: its gradient is -p_sink * delta, summed over rows."""
    log2e = 1.4426950408889634
    share = torch.exp2(sinks.float()[:, None] * log2e - norms.double().sum(0))
    return -(share * delta).sum((0, 2)).to(sinks.dtype)


def _sum_type(p: Problem) -> torch.dtype:
    """Type of delta and of the scalars' partial sums."""
    return torch.float64 if p.q.dtype == torch.float32 else torch.float32


def _peaks(norms: Tensor) -> Tensor | None:
    return norms[0] if len(norms) == 2 else None


def _tile(p: Problem, kernel: str, arguments: dict[str, Any]) -> Tile:
    """The tile of a launch, put into its arguments."""
    width = max(arguments["BLOCK_D"], arguments["BLOCK_DV"])
    lean = p.mask is None and p.bias is None and p.seed is None
    t = tile(kernel, width, p.q.dtype, _shared_memory(p.q.device), lean)
    arguments.update(BLOCK_M=t.m, BLOCK_N=t.n)
    return t


def _options(t: Tile) -> dict[str, Any]:
    # Newer Triton versions fuse multiplications and additions only on demand.
    return {"num_warps": t.warps, "num_stages": t.stages, "enable_fp_fusion": True}


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


@lru_cache
def _shared_memory(device: torch.device) -> int:
    """KiB that a program may hold; elsewhere than on CUDA (compiling without a device) as on sm_90."""
    if device.type != "cuda":
        return 227
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0) // 1024
