"""The arguments that every attention backend takes: their checks, and the seed of dropout."""

import torch
from torch import Tensor

__all__ = ["Affine", "check_arguments", "dropout_seed"]

Affine = tuple[Tensor, Tensor]


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
    named = {"k": k, "v": v, "ranges": ranges, "ts": ts, "mask": mask, "bias": bias, "sinks": sinks}
    for name, tensor in named.items():
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"q is on {q.device}, but {name} is on {tensor.device}: move it there")
    batch, heads, rows, dim = q.shape
    keys = k.shape[2]
    if not dim:
        raise ValueError(f"the head dimension must be at least 1, got q {list(q.shape)}")
    if (
        k.shape[0] != batch
        or v.shape[:3] != k.shape[:3]
        or k.shape[3] != dim
        or (heads % k.shape[1] if k.shape[1] else heads)
    ):
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
