"""What the custom operators of the attention backends share: their definition and the form of their gradients."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["DIFFERENTIABLE", "LIBRARY", "define_operator", "fake_gradients", "fitted"]

#: the leading arguments of the operators that gradients are defined for: q, k, v, ranges, ts, mask, bias, affine scale,
#: affine shift, sinks
DIFFERENTIABLE = 10
#: the fragment that the operators live in, as long as the process does
LIBRARY = torch.library.Library("hf_multimax", "FRAGMENT")


def define_operator(name: str, function: Callable, fake: Callable, dispatch_key: str) -> Callable:
    """A functional operator ``hf_multimax::name`` (a third of the overhead of ``torch.library.custom_op``)."""
    LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
    LIBRARY.impl(name, function, dispatch_key)
    torch.library.register_fake(f"hf_multimax::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.hf_multimax, name).default


def fitted(grad: Tensor, like: Tensor) -> Tensor:
    """A gradient in its input's type and shape, contiguous as the fake one; summed where heads share the parameter."""
    while grad.ndim > like.ndim:
        grad = grad.sum(0)
    return grad.to(like.dtype).contiguous()


def fake_gradients(inputs: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor]:
    """Contiguous tensors shaped like the inputs that need a gradient, empty ones for the others."""
    q = inputs[0]
    return [x.new_empty(x.shape) if x is not None and wanted else q.new_empty(0) for x, wanted in zip(inputs, needed)]
