"""Attention with the whole score matrix in memory: what runs where weights are wanted, in small calls, in exports."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import dropout as apply_dropout

from hf_multimax.attention.call import Call
from hf_multimax.functional import compute_dtype

__all__ = ["band", "eager_attention", "split_mask", "with_mask"]


def eager_attention(
    call: Call, modulator: Callable[[Tensor], Tensor], normalize: Callable[..., Tensor], factor: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention with the whole score matrix in memory: ``[B, H, Nq, Dv]`` and the weights after dropout.

    The order of operations is that of Transformers' eager attention, so that with an identity modulator the float32
    results are the same bit for bit.

    Args:
        factor: multiplies the modulated scores of every query, ``[B, H, Nq, 1]``.
    """
    k, v = call.k, call.v
    groups = call.q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = torch.matmul(call.q, k.transpose(-1, -2)) * call.scale
    if call.softcap:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    if call.bias is not None:
        scores = scores + call.bias
    scores = modulator(scores.to(compute_dtype(scores.dtype)))
    scores = scores if factor is None else scores * factor
    keep, additive = split_mask(with_mask(call.mask, band(call)) if call.banded else call.mask)
    if additive is not None:
        scores = scores + additive
    if call.sinks is None:
        weights = normalize(scores, -1, keep)
    else:
        weights = _normalize_with_sinks(scores, normalize, keep, call.sinks)
    weights = apply_dropout(weights.to(v.dtype), p=call.dropout_p)
    return torch.matmul(weights, v), weights


def band(call: Call) -> Tensor:
    """What causality and the window keep, ``[Nq, Nk]``, aligned at the last query and the last key."""
    queries, keys = call.q.shape[2], call.k.shape[2]
    ahead = torch.arange(keys, device=call.q.device) - torch.arange(keys - queries, keys, device=call.q.device)[:, None]
    keep = ahead <= 0 if call.causal else ahead < call.window
    return keep if call.window < 0 else keep & (ahead > -call.window)


def _normalize_with_sinks(
    scores: Tensor, normalize: Callable[..., Tensor], keep: Tensor | None, sinks: Tensor
) -> Tensor:
    """Probabilities of the keys where each head has one more logit, its sink, that takes a share and gives nothing."""
    sinks = sinks.to(scores.dtype)
    sink = (sinks.view(1, -1, 1, 1) if sinks.ndim == 1 else sinks).expand(*scores.shape[:-1], 1)
    if keep is not None:
        keep = torch.cat([keep.expand_as(scores), torch.ones_like(sink, dtype=torch.bool)], dim=-1)
    return normalize(torch.cat([scores, sink], dim=-1), -1, keep)[..., :-1]


def split_mask(mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """A mask as (what to keep, what to add to the kept scores)."""
    if mask is None or mask.dtype == torch.bool:
        return mask, None
    masked = mask <= torch.finfo(mask.dtype).min / 2  # false for NaN, which is not to vanish
    return ~masked, mask.masked_fill(masked, 0.0)


def with_mask(mask: Tensor | None, keep: Tensor) -> Tensor:
    """A mask of either kind and a boolean one in one."""
    if mask is None:
        return keep
    return mask & keep if mask.dtype == torch.bool else mask.masked_fill(~keep, torch.finfo(mask.dtype).min)
