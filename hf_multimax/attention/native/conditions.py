"""What a call must be for the compiled extension, and when its operators need not be dispatched."""

import torch
from torch import Tensor

from hf_multimax.attention.call import Call
from hf_multimax.attention.native.packed import TYPES

__all__ = ["unseen", "unsupported_tensors"]


def unseen(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether nothing traces, transforms or intercepts operators, so that dispatching them would be time lost.

    Dispatching also writes out tensors that are kept as their negatives.
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or type(q) not in (Tensor, torch.nn.Parameter)
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or q.is_neg()
        or k.is_neg()
        or v.is_neg()
    )


def unsupported_tensors(call: Call) -> str | None:
    """The first tensor of a call that the extension does not take, None where it takes them all."""
    q, mask, bias = call.q, call.mask, call.bias
    if not q.is_cpu:
        return f"tensors on {q.device.type}"
    if q.dtype not in TYPES:
        return f"{q.dtype} inputs"
    if mask is not None and mask.dtype not in TYPES:
        return f"a mask of type {mask.dtype}"
    if bias is not None and bias.dtype not in TYPES:
        return f"a bias of type {bias.dtype}"
    # asked without gradients too: a forward pass under no_grad may be a checkpointed one, whose choice must not change
    if mask is not None and mask.requires_grad:
        return "a gradient for the mask"
    if bias is not None and bias.requires_grad and bias.shape[-1:] != call.k.shape[2:3]:
        return "a gradient for a bias that is broadcast over the keys"
    return None
