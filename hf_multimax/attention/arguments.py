"""The arguments that every attention backend takes: their checks, and the seed of dropout."""

import torch
from torch import Tensor

__all__ = ["LARGEST_WINDOW", "Affine", "check_arguments", "dropout_seed"]

Affine = tuple[Tensor, Tensor]

#: no sequence is as long; sums with a position stay within 32 bits
LARGEST_WINDOW = 1 << 30


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
    if not q.ndim == k.ndim == v.ndim == 4:
        name, tensor = next((name, x) for name, x in (("q", q), ("k", k), ("v", v)) if x.ndim != 4)
        raise ValueError(f"{name} must be [batch, heads, length, dim], got {list(tensor.shape)}")
    if not (q.dtype.is_floating_point and q.dtype == k.dtype == v.dtype):
        raise TypeError(f"q, k and v must share one floating type, got {q.dtype}, {k.dtype} and {v.dtype}")
    device = q.device
    for name, tensor in zip(("k", "v", "ranges", "ts", "mask", "bias", "sinks"), (k, v, ranges, ts, mask, bias, sinks)):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"q is on {device}, but {name} is on {tensor.device}: move it there")
    batch, heads, rows, dim = q.shape
    k_batch, kv_heads, keys, k_dim = k.shape
    if not dim:
        raise ValueError(f"the head dimension must be at least 1, got q {list(q.shape)}")
    if k_batch != batch or v.shape[:3] != k.shape[:3] or k_dim != dim or (heads % kv_heads if kv_heads else heads):
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
    shape = ranges.shape
    if shape != ts.shape or len(shape) not in (1, 2) or shape[-1] < 2 or shape[-1] % 2:
        raise ValueError(
            f"ranges and ts must both be [2N] or [heads, 2N] with N >= 1, got {list(shape)} and {list(ts.shape)}"
        )
    if len(shape) == 2 and shape[0] != heads:
        raise ValueError(f"ranges and ts have {shape[0]} heads, but q has {heads}")
    for name, tensor in zip(("affine scale", "affine shift"), affine or ()):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, a scalar or [{heads}], got {type(tensor).__name__}")
        if tensor.device != ranges.device:
            raise ValueError(f"q is on {ranges.device}, but {name} is on {tensor.device}: move it there")
        if tensor.shape not in ((), (heads,)):
            raise ValueError(f"{name} must be a scalar or [{heads}], got {list(tensor.shape)}")
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks must be [{heads}], got {list(sinks.shape)}")


def dropout_seed(dropout_p: float) -> Tensor | None:
    """A seed from the default CPU generator (no synchronisation on other devices); None without dropout."""
    return torch.randint(1 << 62, (1,), dtype=torch.int64, device="cpu") if dropout_p > 0 else None
