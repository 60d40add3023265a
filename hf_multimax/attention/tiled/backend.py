"""MultiMax attention in tiles of whole score rows: PyTorch only, any device, memory linear in the sequence length.

A tile holds all keys that a few query rows see, so that a row function (MultiMax here, any other normaliser through
:func:`rowwise_attention`) meets complete rows. The backward pass recomputes the tiles instead of keeping them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_multimax.attention.call import Call, seeded
from hf_multimax.attention.operators import define_backward, define_forward, fitted, keep, kept, register_gradient
from hf_multimax.attention.tiled.passes import run_backward, run_forward
from hf_multimax.attention.tiled.rows import AutogradRows, MultiMaxRows
from hf_multimax.attention.tiled.tiles import Problem
from hf_multimax.rows.function import Rowwise

__all__ = ["attention", "rowwise_attention", "rowwise_unsupported", "unsupported"]


def attention(call: Call) -> Tensor:
    """The call, computed; differentiable once in every tensor."""
    return _forward_op(*seeded(call))


def unsupported(call: Call) -> str | None:
    """The first feature of this call that the backend lacks; this one has them all."""
    return None


def rowwise_unsupported(rows: Rowwise, call: Call) -> str | None:
    """The first feature of this call that :func:`rowwise_attention` lacks."""
    if call.sinks is not None:
        return "attention sinks"
    # its values would have to come between the normalizer's two steps
    return None if call.mask is None or call.mask.dtype == torch.bool else "an additive mask"


def rowwise_attention(rows: Rowwise, call: Call) -> Tensor:
    """Attention through any row-wise normaliser, in the same tiles, recomputed by autograd in the backward pass.

    Args:
        rows: of its ``plain`` function, ``scores`` is ``[batch, H, rows, keys]`` in float32 (float64 for float64
            inputs), some batch elements and rows, all heads, and all keys that one of the rows may see; ``keep`` is
            None or boolean and broadcastable to it (True = keep). It must give zero wherever ``keep`` is False or the
            score is minus infinity. The parameters are passed on whole; gradients flow to those that require one.
        call: without a modulator and sinks; the values of an additive mask are added to the scores.
    """
    call, (row_function, parameters) = seeded(call), rows.plain()
    return _RowwiseAttention.apply(row_function, len(parameters), *parameters, *call)


def _empty_output(call: Call) -> Tensor:
    make = torch.empty if call.v.shape[2] else torch.zeros  # without keys there are no tiles that fill it
    return make((*call.q.shape[:3], call.v.shape[3]), dtype=call.v.dtype, device=call.v.device)


def _forward(*arguments: Any) -> Tensor:
    call = Call(*arguments)
    rows = MultiMaxRows(call)
    return run_forward(Problem(call, regular=rows.regular), rows, _empty_output(call))


def _backward(grad_out: Tensor, call: Call, needed: Sequence[bool]) -> list[Tensor | None]:
    if not call.q.numel() or not call.k.numel():
        return fitted([x if x is None else x.new_zeros(x.shape) for x in call.differentiable], call, needed)
    wanted = dict(zip(Call._fields, needed))
    rows = MultiMaxRows(call, scalars=wanted["ranges"] or wanted["ts"])
    grads = run_backward(Problem(call, regular=rows.regular), rows, grad_out, wanted["bias"], wanted["mask"])
    found = (
        grads.q, grads.k, grads.v, rows.grad_ranges, rows.grad_ts, grads.mask, grads.bias,
        rows.grad_scale, rows.grad_shift, rows.grad_sinks,
    )  # fmt: skip
    return fitted(found, call, needed)


_KEY = "CompositeExplicitAutograd"
_forward_op = define_forward("tiled_attention", "Tensor", _forward, lambda *call: _empty_output(Call(*call)), _KEY)
_backward_op = define_backward("tiled_attention_backward", ["grad_out"], _backward, _KEY)
register_gradient("tiled_attention", "tiled", lambda call, output: (), _backward_op)


class _RowwiseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, count, *arguments):
        parameters, call = arguments[:count], Call(*arguments[count:])
        ctx.function = function
        keep(ctx, call, parameters)
        return run_forward(Problem(call, whole_heads=True), AutogradRows(function, parameters), _empty_output(call))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        parameters, call = kept(ctx)
        _, _, *needed = ctx.needs_input_grad
        of_parameters, wanted = needed[: len(parameters)], dict(zip(Call._fields, needed[len(parameters) :]))
        rows = AutogradRows(ctx.function, parameters, of_parameters)
        problem = Problem(call, whole_heads=True)
        grads = run_backward(problem, rows, grad_out, wanted["bias"], wanted["mask"])
        found = [getattr(grads, name, None) for name in Call._fields]
        inputs = (*parameters, *call)
        return None, None, *(None if g is None else g.to(x.dtype) for g, x in zip((*rows.grads, *found), inputs))
