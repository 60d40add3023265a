"""What the custom operators of the attention backends share: their definition and the form of their gradients."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_multimax.attention.call import DIFFERENTIABLE, Call
from hf_multimax.attention.context import refuse_second_derivative
from hf_multimax.attention.schema import LIBRARY, arguments_of, define

__all__ = ["define_backward", "define_forward", "fitted", "gradients", "keep", "kept", "register_gradient"]

#: a call as an operator's arguments
_CALL = arguments_of(Call)


def define_forward(name: str, returns: str, function: Callable, fake: Callable, dispatch_key: str) -> Callable:
    """The operator ``hf_multimax::name(*call)``."""
    return define(f"{name}({_CALL}) -> {returns}", function, fake, dispatch_key)


def define_backward(name: str, before: Sequence[str], function: Callable, dispatch_key: str) -> Callable:
    """The operator ``hf_multimax::name(*before, *call, needed) -> gradients`` of a call's differentiable tensors.

    Args:
        before: names of the tensors of the forward pass that come first.
        function: ``(*before, call, needed)``, to a gradient for each, None where ``needed`` is False.
    """

    def run(*arguments):
        *first, needed = arguments
        call = Call(*first[len(before) :])
        return [call.q.new_empty(0) if x is None else x for x in function(*first[: len(before)], call, needed)]

    def fake(*arguments):
        inputs, needed = arguments[len(before) : len(before) + DIFFERENTIABLE], arguments[-1]
        return [
            x.new_empty(x.shape) if x is not None and wanted else inputs[0].new_empty(0)
            for x, wanted in zip(inputs, needed)
        ]

    tensors = "".join(f"Tensor {tensor}, " for tensor in before)
    return define(f"{name}({tensors}{_CALL}, bool[] needed) -> Tensor[]", run, fake, dispatch_key)


def register_gradient(name: str, kind: str, save: Callable, backward: Callable) -> None:
    """Make ``hf_multimax::name`` differentiable once.

    Args:
        kind: the backend, as a message names it.
        save: ``(call, output)``, to the tensors that come after ``grad_out`` in the backward operator.
        backward: that operator.
    """

    def setup(ctx, inputs, output) -> None:
        call = Call(*inputs)
        keep(ctx, call, save(call, output))

    def differentiate(ctx, grad_out: Tensor, *_: Tensor | None):
        def run(grad_out: Tensor, *rest):
            *first, call, needed = rest
            return backward(grad_out, *first, *call, needed)

        return gradients(ctx, kind, grad_out, run)

    torch.library.register_autograd(f"hf_multimax::{name}", differentiate, setup_context=setup, lib=LIBRARY)


def keep(ctx: Any, call: Call, tensors: Sequence[Tensor] = ()) -> None:
    """Save a call, and tensors beside it, for :func:`kept`."""
    ctx.save_for_backward(*tensors, *call[: DIFFERENTIABLE + 1])
    ctx.options = call[DIFFERENTIABLE + 1 :]


def kept(ctx: Any) -> tuple[tuple[Tensor, ...], Call]:
    """What :func:`keep` saved: the tensors beside the call, and the call."""
    saved = ctx.saved_tensors
    beside = len(saved) - DIFFERENTIABLE - 1
    return saved[:beside], Call(*saved[beside:], *ctx.options)


def gradients(ctx: Any, kind: str, grad_out: Tensor, backward: Callable) -> tuple[Tensor | None, ...]:
    """The gradients of a call's fields, by ``backward(grad_out, *beside, call, needed)``."""
    refuse_second_derivative(kind)
    beside, call = kept(ctx)
    needed = list(ctx.needs_input_grad[:DIFFERENTIABLE])
    found = backward(grad_out, *beside, call, needed)
    absent = [None] * (len(call) - DIFFERENTIABLE)
    return *(grad if wanted else None for grad, wanted in zip(found, needed)), *absent


def fitted(found: Sequence[Tensor | None], call: Call, needed: Sequence[bool]) -> list[Tensor | None]:
    """Gradients in their inputs' types and shapes, contiguous as the fake ones, None for those not needed.

    They are summed where heads share a parameter.
    """
    return [
        _fitted(grad, x) if wanted and x is not None and grad is not None else None
        for grad, x, wanted in zip(found, call.differentiable, needed)
    ]


def _fitted(grad: Tensor, like: Tensor) -> Tensor:
    while grad.ndim > like.ndim:
        grad = grad.sum(0)
    grad = grad.to(like.dtype).contiguous()
    return grad.clone() if grad._is_view() else grad  # what an operator returns must not share memory
