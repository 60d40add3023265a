"""MultiMax attention written down from its definition, in any floating type, apart from the package."""

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask


def sigma(x: Tensor, ranges: Tensor, ts: Tensor, affine=None) -> Tensor:
    """The modulator, term by term; heads of the parameters, if any, against the third dimension from the right."""
    if affine is not None:
        scale, shift = (a if a.ndim == 0 else a[:, None, None] for a in affine)
        x = scale * x + shift
    total = x
    zero = torch.zeros((), dtype=x.dtype)
    for i in range(ranges.shape[-1] // 2):
        b, d, t_b, t_d = ranges[..., 2 * i], ranges[..., 2 * i + 1], ts[..., 2 * i], ts[..., 2 * i + 1]
        if b.ndim:
            b, t_b, d, t_d = (p[:, None, None] for p in (b, t_b, d, t_d))
        total = total + t_b * torch.where(x < b, b - x, zero) ** (i + 1)
        total = total + t_d * torch.where(x > d, x - d, zero) ** (i + 1)
    return total


def probabilities(x: Tensor, ranges: Tensor, ts: Tensor, keep: Tensor | None = None, affine=None) -> Tensor:
    """softmax(sigma(x)) over the kept entries of each row of the last dimension; zeros in rows without any."""
    keep = torch.ones_like(x, dtype=torch.bool) if keep is None else keep.expand_as(x)
    weights = torch.where(keep, sigma(x, ranges, ts, affine), float("-inf"))
    largest = weights.amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).min)  # finite in an empty row
    weights = torch.exp(weights - largest.detach())
    return weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def attention(module, query, key, value, attention_mask, scaling=None, position_bias=None, **kwargs):
    """An attention implementation for stock models whose layers hold ``reference = (ranges, ts, affine)``."""
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if position_bias is not None:
        scores = scores + position_bias
    keep = None if attention_mask is None else attention_mask > torch.finfo(attention_mask.dtype).min / 2
    ranges, ts, affine = module.reference
    weights = probabilities(scores, ranges, ts, keep, affine)
    return (weights @ value).transpose(1, 2).contiguous(), weights


NAME = "written_down"
AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, eager_mask)
