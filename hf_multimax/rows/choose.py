"""Where the compiled functions of rows run, and how a call of any shape becomes rows."""

import importlib.util
import os

import torch
from torch import Tensor

from hf_multimax.attention import choice
from hf_multimax.extension.library import load
from hf_multimax.rows.call import KINDS, MAX_ORDER, TYPES, RowCall
from hf_multimax.rows.function import RowFunction
from hf_multimax.rows.operators import compute
from hf_multimax.rows.triton.arguments import KINDS as TRITON_KINDS

__all__ = ["compiled_multimax", "compiled_rows"]

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
#: rows of fewer entries are counted in float32
_MOST_ENTRIES = 1 << 24


def compiled_rows(function: RowFunction, x: Tensor, dim: int, mask: Tensor | None) -> Tensor | None:
    """The function along a dimension; None where plain PyTorch has to compute it.

    That is: in float64, under ``backend("eager")`` or ``backend("tiled")``, where ``torch.func`` transforms or forward
    derivatives are taken, in what is exported; on CPUs where the extension cannot be built; on GPUs without Triton, and
    there for fusedmax, oscarmax and an alpha above 2; and on other devices.
    """
    options = (function.value, function.beta, function.gamma)
    kernel = _kernel(function.kind, x, *(option for option in options if isinstance(option, Tensor)))
    if kernel is None or (kernel == "triton" and _is_steep(function)):
        return None
    last = dim in (-1, x.ndim - 1)
    rows = (x if last else x.movedim(dim, -1)).contiguous()
    value, beta, gamma = (None if option is None else _of_rows(option, x, dim, rows) for option in options)
    kind, a, b = KINDS.index(function.kind), float(function.a), float(function.b)
    p = compute(
        RowCall(rows, value, beta, gamma, mask=_mask(x, dim, mask), kind=kind, a=a, b=b, triton=kernel == "triton")
    )
    return p if last else p.movedim(-1, dim)


def compiled_multimax(
    x: Tensor, ranges: Tensor, ts: Tensor, dim: int, mask: Tensor | None, affine: tuple[Tensor, Tensor] | None
) -> Tensor | None:
    """MultiMax along a dimension, as :func:`compiled_rows`; modulators per head along the last dimension only.

    Slopes that are all 0, the identity start, are left to plain PyTorch: that is SoftMax bit for bit.
    """
    kernel = _kernel("multimax", x, ranges, ts, *(affine or ()))
    if kernel is None or ranges.shape[-1] > 2 * MAX_ORDER:
        return None
    unseen = torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())
    if not unseen and not ts.any():
        return None
    scale, shift = affine or (None, None)
    heads = [t for t, own in ((ranges, 1), (scale, 0), (shift, 0)) if t is not None and t.ndim > own]
    last = dim in (-1, x.ndim - 1)
    if heads and not last:
        return None
    ranges, ts = _parameter(ranges), _parameter(ts)
    pair = None
    if scale is not None and shift is not None:
        pair = torch.stack(torch.broadcast_tensors(_parameter(scale), _parameter(shift)), -1)
    if heads and ranges.ndim == 1:
        ranges, ts = (t.expand(heads[0].shape[0], -1).contiguous() for t in (ranges, ts))
    elif heads and pair is not None and pair.ndim == 1:
        pair = pair.expand(heads[0].shape[0], -1).contiguous()
    rows = (x if last else x.movedim(dim, -1)).contiguous()
    p = compute(RowCall(rows, ranges=ranges, ts=ts, affine=pair, mask=_mask(x, dim, mask), triton=kernel == "triton"))
    return p if last else p.movedim(-1, dim)


def _kernel(kind: str, x: Tensor, *others: Tensor | None) -> str | None:
    """What computes a function of x: "native", "triton", or None for plain PyTorch."""
    if x.dtype not in TYPES or not x.ndim or not x.numel():
        return None
    if any(other is not None and other.device != x.device for other in others):
        return None
    name = choice.traced[-1] if torch.compiler.is_dynamo_compiling() and choice.traced else choice.name
    kernel = None
    if x.is_cpu and name in ("auto", "native"):
        kernel = "native"
    elif (x.is_cuda and name in ("auto", "triton")) or (x.is_cpu and _INTERPRETED and name == "triton"):
        kernel = "triton" if _HAS_TRITON and kind in TRITON_KINDS and max(x.shape) < _MOST_ENTRIES else None
    if kernel is None:
        return None
    if torch.compiler.is_compiling():
        runs = not torch.compiler.is_exporting() and (kernel == "triton" or _is_available())
        return kernel if runs else None
    plain = all(other is None or type(other) in (Tensor, torch.nn.Parameter) for other in (x, *others))
    transformed = torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    written_down = torch._C._is_tracing() or torch.compiler.is_exporting()
    runs = plain and not transformed and not written_down and (kernel == "triton" or load()[0] is not None)
    return kernel if runs else None


def _is_steep(function: RowFunction) -> bool:
    """Whether an alpha is above 2; of a tensor that costs a look, and code that is traced takes it for so."""
    if function.kind not in ("entmax", "asentmax"):
        return False
    if function.value is None:
        return function.a > 2
    return torch.compiler.is_compiling() or bool((function.value.detach() > 2).any())


@torch.compiler.assume_constant_result
def _is_available() -> bool:
    return load()[0] is not None


def _of_rows(option: float | Tensor, x: Tensor, dim: int, rows: Tensor) -> Tensor:
    """An option of the scores ``x`` as one number for each of their rows."""
    if not isinstance(option, Tensor):
        return torch.full((rows.shape[:-1].numel(),), float(option), device=rows.device)
    option = option.to(torch.float32)
    if option.ndim:
        option = option.reshape((1,) * (x.ndim - option.ndim) + option.shape).movedim(dim, -1)
    return option.expand(*rows.shape[:-1], 1).reshape(-1).contiguous()


def _mask(x: Tensor, dim: int, mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.expand(x.shape).movedim(dim, -1)


def _parameter(t: Tensor) -> Tensor:
    return t.to(torch.float32).contiguous()
