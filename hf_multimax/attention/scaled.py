"""Attention whose scores a normalizer multiplies query by query, for kernels that do not know of it."""

import torch
from torch import Tensor

from hf_multimax.attention.call import Call
from hf_multimax.attention.eager import band, split_mask
from hf_multimax.functional import compute_dtype

__all__ = ["visible_keys", "with_scaled_queries"]


def visible_keys(call: Call) -> Tensor:
    """How many keys each query sees, integers that broadcast to ``[B, H, Nq, 1]``."""
    rows, keys = call.q.shape[2], call.k.shape[2]
    keep, _ = split_mask(call.mask)
    if keep is not None:
        keep = keep & band(call) if call.banded else keep
        return keep.expand(*keep.shape[:-1], keys).sum(-1, keepdim=True)
    own = torch.arange(keys - rows, keys, device=call.q.device)[:, None]
    first, last = torch.zeros_like(own), torch.full_like(own, keys)
    if call.causal:
        last = own + 1
    if call.window >= 0:
        first, last = (own - call.window + 1).clamp(min=0), torch.minimum(last, own + call.window)
    return last - first


def with_scaled_queries(call: Call, factor: Tensor) -> Call | None:
    """The call with the factor, ``[B, H, Nq, 1]``, in its queries, in the type that scores are computed in.

    None where scores are not the queries' products alone, so that the factor would not reach all of them.
    """
    if call.bias is not None or call.softcap:
        return None
    dtype = compute_dtype(call.q.dtype)  # in half precision the queries would be rounded once more
    return call._replace(q=call.q.to(dtype) * factor, k=call.k.to(dtype), v=call.v.to(dtype))
