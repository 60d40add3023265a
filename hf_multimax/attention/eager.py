"""Attention with the whole score matrix in memory: what runs where weights are wanted, in small calls, in exports."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import dropout as apply_dropout

from hf_multimax.functional import compute_dtype

__all__ = ["eager_attention", "with_causal", "with_mask"]


def eager_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    modulator: Callable[[Tensor], Tensor],
    normalize: Callable[..., Tensor],
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention with the whole score matrix in memory: ``[B, H, Nq, Dv]`` and the weights after dropout.

    The order of operations is that of Transformers' eager attention, so that with an identity modulator the float32
    results are the same bit for bit.
    """
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = torch.matmul(q, k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    scores = modulator(scores.to(compute_dtype(scores.dtype)))
    keep, additive = _split_mask(mask)
    if additive is not None:
        scores = scores + additive
    if sinks is None:
        weights = normalize(scores, -1, keep)
    else:
        weights = _normalize_with_sinks(scores, normalize, keep, sinks)
    weights = apply_dropout(weights.to(v.dtype), p=dropout_p)
    return torch.matmul(weights, v), weights


def _normalize_with_sinks(
    scores: Tensor, normalize: Callable[..., Tensor], keep: Tensor | None, sinks: Tensor
) -> Tensor:
    """Probabilities of the keys where each head has one more logit, its sink, that takes a share and gives nothing."""
    sinks = sinks.to(scores.dtype)
    sink = (sinks.view(1, -1, 1, 1) if sinks.ndim == 1 else sinks).expand(*scores.shape[:-1], 1)
    if keep is not None:
        keep = torch.cat([keep.expand_as(scores), torch.ones_like(sink, dtype=torch.bool)], dim=-1)
    return normalize(torch.cat([scores, sink], dim=-1), -1, keep)[..., :-1]


def _split_mask(mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """A mask as (what to keep, what to add to the kept scores)."""
    if mask is None or mask.dtype == torch.bool:
        return mask, None
    if not mask.is_floating_point():
        raise TypeError(
            f"an attention mask must be boolean (True = keep) or floating point (additive), got {mask.dtype}"
        )
    masked = mask <= torch.finfo(mask.dtype).min / 2  # false for NaN, which is not to vanish
    return ~masked, mask.masked_fill(masked, 0.0)


def with_causal(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor:
    """``mask`` and the causal mask, aligned at the last query and the last key."""
    queries, keys = q.shape[2], k.shape[2]
    causal = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    return causal if mask is None else with_mask(mask, causal)


def with_mask(mask: Tensor, keep: Tensor) -> Tensor:
    """A mask of either kind and a boolean one in one."""
    return mask & keep if mask.dtype == torch.bool else mask.masked_fill(~keep, torch.finfo(mask.dtype).min)
