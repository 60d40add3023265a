"""Where the compiled functions of rows run, and how a call of any shape becomes rows."""

import torch
from torch import Tensor

from hf_multimax.attention import choice
from hf_multimax.extension.library import load
from hf_multimax.rows.call import KINDS, MAX_ORDER, TYPES, RowCall
from hf_multimax.rows.function import RowFunction
from hf_multimax.rows.operators import compute

__all__ = ["compiled_multimax", "compiled_rows"]


def compiled_rows(function: RowFunction, x: Tensor, dim: int, mask: Tensor | None) -> Tensor | None:
    """The function along a dimension; None where plain PyTorch has to compute it.

    That is: on other devices and in float64, under ``backend("eager")`` or ``backend("tiled")``, where ``torch.func``
    transforms or forward derivatives are taken, in what is exported, and where the extension cannot be built.
    """
    options = (function.value, function.beta, function.gamma)
    if not _runs(x, *(option for option in options if isinstance(option, Tensor))):
        return None
    last = dim in (-1, x.ndim - 1)
    rows = (x if last else x.movedim(dim, -1)).contiguous()
    value, beta, gamma = (None if option is None else _of_rows(option, x, dim, rows) for option in options)
    kind, a, b = KINDS.index(function.kind), float(function.a), float(function.b)
    p = compute(RowCall(rows, value, beta, gamma, mask=_mask(x, dim, mask), kind=kind, a=a, b=b))
    return p if last else p.movedim(-1, dim)


def compiled_multimax(
    x: Tensor, ranges: Tensor, ts: Tensor, dim: int, mask: Tensor | None, affine: tuple[Tensor, Tensor] | None
) -> Tensor | None:
    """MultiMax along a dimension, as :func:`compiled_rows`; modulators per head along the last dimension only.

    Slopes that are all 0, the identity start, are left to plain PyTorch: that is SoftMax bit for bit.
    """
    if not _runs(x, ranges, ts, *(affine or ())) or ranges.shape[-1] > 2 * MAX_ORDER:
        return None
    if not torch.compiler.is_compiling() and not ts.any():
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
    p = compute(RowCall(rows, ranges=ranges, ts=ts, affine=pair, mask=_mask(x, dim, mask)))
    return p if last else p.movedim(-1, dim)


def _runs(x: Tensor, *others: Tensor | None) -> bool:
    if not x.is_cpu or x.dtype not in TYPES or not x.ndim or not x.numel():
        return False
    if any(other is not None and not other.is_cpu for other in others):
        return False
    if torch.compiler.is_compiling():
        return not torch.compiler.is_exporting() and _chosen() and _is_available()
    plain = all(other is None or type(other) in (Tensor, torch.nn.Parameter) for other in (x, *others))
    transformed = torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    written_down = torch._C._is_tracing() or torch.compiler.is_exporting()
    return plain and not transformed and not written_down and _chosen() and load()[0] is not None


def _chosen() -> bool:
    name = choice.traced[-1] if torch.compiler.is_dynamo_compiling() and choice.traced else choice.name
    return name in ("auto", "native")


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
