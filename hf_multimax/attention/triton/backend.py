"""MultiMax attention on GPUs, in Triton: flash attention with the modulator between the scores and the softmax.

Memory is linear in the sequence length, nothing is accumulated atomically, so results are bitwise reproducible. Masks
and biases are read through their strides and never expanded. Triton itself is imported at the first call.

``TRITON_INTERPRET=1``, set before the import, runs everything on CPU tensors in Triton's interpreter (slowly).
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from hf_multimax.attention.call import Call, seeded
from hf_multimax.attention.operators import define_backward, define_forward, register_gradient
from hf_multimax.attention.triton.conditions import unsupported
from hf_multimax.attention.triton.rows.backend import rowwise_attention, rowwise_unsupported

__all__ = ["attention", "rowwise_attention", "rowwise_unsupported", "unsupported"]


def attention(call: Call) -> Tensor:
    """The call, computed; D and Dv are at most 256.

    In half precision without a bias, a row with a score that is infinite, as q or k must then be, is NaN.
    """
    call = seeded(call, call.q.device)
    train = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in call.differentiable)
    return _training_op(*call)[0] if train else _inference_op(*call)


def _outputs(call: Call, train: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Buffers for the output, the rows' norms (two numbers per row in float32, else one) and what rounding cut off.

    The output is laid out as ``[B, Nq, H, Dv]``, so that merging the heads is a view. The backward pass wants the
    output in twice half precision: :func:`~hf_multimax.attention.triton.backward.dq_kernel` says why.
    """
    q, v = call.q, call.v
    batch, heads, n_rows, _ = q.shape
    single = q.dtype == torch.float32
    o = torch.empty(batch, n_rows, heads, v.shape[-1], dtype=v.dtype, device=v.device).transpose(1, 2)
    norms = torch.empty(2 if single else 1, batch, heads, n_rows, dtype=torch.float32, device=q.device)
    return o, norms, o.new_empty(0) if single or not train else torch.empty_like(o)


def _launch() -> ModuleType:
    """The launch module, imported at the first call because it needs Triton."""
    from hf_multimax.attention.triton import launch

    return launch


def _forward(call: Call, train: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Output, norms and what rounding the output cut off; the last is empty in float32 and unless ``train``."""
    o, norms, residual = _outputs(call, train)
    _launch().forward(_contiguous(call), o, residual if residual.numel() else None, norms)
    return o, norms, residual


def _backward(
    do: Tensor, o: Tensor, norms: Tensor, residual: Tensor, call: Call, needed: Sequence[bool]
) -> list[Tensor | None]:
    return _launch().backward(_contiguous(call), do, o, residual if residual.numel() else None, norms, needed)


def _contiguous(call: Call) -> Call:
    """The call with parameters that the kernels read without strides."""
    sinks = None if call.sinks is None else call.sinks.contiguous()
    return call._replace(ranges=call.ranges.contiguous(), ts=call.ts.contiguous(), sinks=sinks)


_KEY = "CompositeExplicitAutograd"
_inference_op = define_forward(
    "triton_attention",
    "Tensor",
    lambda *call: _forward(Call(*call), train=False)[0],
    lambda *call: _outputs(Call(*call), train=False)[0],
    _KEY,
)
_training_op = define_forward(
    "triton_attention_training",
    "(Tensor, Tensor, Tensor)",
    lambda *call: _forward(Call(*call), train=True),
    lambda *call: _outputs(Call(*call), train=True),
    _KEY,
)
_backward_op = define_backward("triton_attention_backward", ["grad_out", "o", "norms", "residual"], _backward, _KEY)
register_gradient("triton_attention_training", "triton", lambda call, output: output, _backward_op)
