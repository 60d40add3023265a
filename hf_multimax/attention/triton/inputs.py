"""The host side that all Triton attention kernels share: a call as they take it, and what the device has."""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_multimax.attention.call import Call
from hf_multimax.attention.triton.arguments import Inputs

__all__ = ["INTERPRETED", "bias_parts", "constant", "inputs_of", "multiprocessors", "padded", "shared_memory"]

INTERPRETED = bool(triton.knobs.runtime.interpret)


def inputs_of(call: Call) -> Inputs:
    """The call as every attention kernel takes it."""
    (batch, heads, n_rows, d), (_, key_heads, n_cols, d_v) = call.q.shape, call.v.shape
    shape = (batch, heads, n_rows, n_cols)
    mask = None if call.mask is None else call.mask.expand(shape)
    bias = None if call.bias is None else call.bias.expand(shape)
    boolean = mask is not None and mask.dtype == torch.bool
    return Inputs(
        q=call.q,
        k=call.k,
        v=call.v,
        ranges=call.ranges,
        ts=call.ts,
        affine_scale=call.affine_scale,
        affine_shift=call.affine_shift,
        mask=mask.view(torch.uint8) if boolean else mask,
        bias=bias,
        seed=call.seed,
        s_q=call.q.stride(),
        s_k=call.k.stride(),
        s_v=call.v.stride(),
        s_mask=(0, 0, 0, 0) if mask is None else mask.stride(),
        s_bias=(0, 0, 0, 0) if bias is None else bias.stride(),
        s_head=tuple(
            0 if p is None or p.ndim == own else p.stride(0)
            for p, own in ((call.ranges, 1), (call.affine_scale, 0), (call.affine_shift, 0))
        ),
        heads=heads,
        group=heads // key_heads,
        n_rows=n_rows,
        n_cols=n_cols,
        # the 32 random bits of a dropped score are below this, read as a signed number
        threshold=min(int(call.dropout_p * 2**32) - 2**31, 2**31 - 1),
        keep_scale=1.0 / (1.0 - call.dropout_p),
        scale=call.scale,
        softcap=call.softcap or None,
        # one that hides nothing costs nothing
        window=call.window if 0 <= call.window < n_rows + n_cols else None,
        ORDER=constant(0 if call.ranges is None else call.ranges.shape[-1] // 2),
        # a sink does see what all scores of a row have in common
        NEAR=constant(call.q.dtype != torch.float32 and call.sinks is None),
        MASK_MIN=constant(None if mask is None or boolean else torch.finfo(mask.dtype).min / 2),
        MASK_BY_ROW=constant(mask is not None and mask.stride(2) != 0),
        BIAS_BY_ROW=constant(bias is not None and bias.stride(2) != 0),
        CAUSAL=constant(call.causal),
        D=constant(d),
        DV=constant(d_v),
        BLOCK_D=constant(padded(d)),
        BLOCK_DV=constant(padded(d_v)),
        UPCAST=constant(INTERPRETED and call.q.dtype == torch.bfloat16),
    )


def bias_parts(call: Call, dbias: Tensor, m: int, n: int) -> tuple[int, dict[str, Any]]:
    """How many programs share out the gradient of a bias in tiles ``[m, n]``, and the arguments that tell them how."""
    full = dbias.view((1,) * (4 - dbias.ndim) + dbias.shape)
    batch, heads, n_rows, n_cols = full.shape
    row_blocks, col_blocks = triton.cdiv(n_rows, m), triton.cdiv(n_cols, n)
    return batch * heads * row_blocks * col_blocks, {
        "dbias": full,
        "s_dbias": full.stride(),
        "batches": call.q.shape[0],
        "row_blocks": row_blocks,
        "col_blocks": col_blocks,
        "PER_BATCH": batch > 1,
        "PER_HEAD": heads > 1,
        "PER_ROW": n_rows > 1,
        "PER_COL": n_cols > 1,
    }


def constant(value: Any) -> Any:
    """What is compiled in, as None is by itself."""
    return None if value is None else tl.constexpr(value)


def padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


@lru_cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


@lru_cache
def shared_memory(device: torch.device) -> int:
    """KiB that a program may hold; elsewhere than on CUDA (compiling without a device) as on sm_90."""
    if device.type != "cuda":
        return 227
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0) // 1024
