"""What a call must be for the Triton kernels."""

import importlib.util
import os

import torch

from hf_multimax.attention.call import Call

__all__ = ["unsupported"]

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_HEAD_DIM = 256


def unsupported(call: Call) -> str | None:
    """The first feature of a call that these kernels cannot do, as a short phrase; else None."""
    q, v, mask = call.q, call.v, call.mask
    device = q.device.type
    if device == "cpu" and not _INTERPRETED:
        return "CPU tensors"
    if device not in ("cpu", "cuda", "meta"):
        return f"{device} tensors"
    if device != "meta" and not _HAS_TRITON:
        return "no Triton installation"
    if q.dtype not in _DTYPES:
        return f"{str(q.dtype).removeprefix('torch.')} tensors"
    if max(q.shape[-1], v.shape[-1]) > _MAX_HEAD_DIM:
        return f"head dimensions above {_MAX_HEAD_DIM}"
    # asked without gradients too: a forward pass under no_grad may be a checkpointed one, whose choice must not change
    if mask is not None and mask.requires_grad:
        return "a gradient for the mask"
    return None
