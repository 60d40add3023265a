"""Attention through a function of rows as operators: their arguments, and the form of their gradients.

What :mod:`hf_multimax.attention.operators` is for MultiMax; a function's options come before the call.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_multimax.attention.call import DIFFERENTIABLE, Call
from hf_multimax.attention.context import refuse_second_derivative
from hf_multimax.attention.schema import LIBRARY, arguments_of, define
from hf_multimax.rows.call import KINDS
from hf_multimax.rows.function import Rowwise

__all__ = [
    "TENSORS",
    "Function",
    "define_backward",
    "define_forward",
    "differentiate",
    "differentiable",
    "function_of",
    "register_gradient",
    "save",
    "split",
]


class Function(NamedTuple):
    """A function of rows: options that are tensors, float32 ``[heads]``, then what is a number."""

    value: Tensor | None
    beta: Tensor | None
    gamma: Tensor | None
    kind: int
    a: float
    b: float


#: how many of a function's fields are tensors
TENSORS = 3
#: of a function and a call together: the tensors that may need gradients
_NEEDED = (*range(TENSORS), *range(len(Function._fields), len(Function._fields) + DIFFERENTIABLE))
_ARGUMENTS = f"{arguments_of(Function)}, {arguments_of(Call)}"


def function_of(rows: Rowwise, call: Call) -> Function:
    """The compiled function of rows with its options for every head."""
    chosen, heads = rows.compiled, call.q.shape[1]
    options = (_of_heads(option, heads, call.q) for option in (chosen.value, chosen.beta, chosen.gamma))
    return Function(*options, KINDS.index(chosen.kind), float(chosen.a), float(chosen.b))


def _of_heads(option: float | Tensor | None, heads: int, like: Tensor) -> Tensor | None:
    if option is None:
        return None
    if not isinstance(option, Tensor):
        return torch.full((heads,), float(option), device=like.device)
    return option.to(torch.float32).expand(heads)


def split(arguments: Sequence[Any]) -> tuple[Function, Call]:
    """An operator's arguments as what they are."""
    size = len(Function._fields)
    return Function(*arguments[:size]), Call(*arguments[size:])


def differentiable(arguments: Sequence[Any]) -> list[Tensor | None]:
    """Those of an operator's arguments that gradients are defined for."""
    return [arguments[i] for i in _NEEDED]


def define_forward(name: str, returns: str, function: Callable, fake: Callable, dispatch_key: str) -> Callable:
    """The operator ``hf_multimax::name(*function, *call)``."""
    return define(f"{name}({_ARGUMENTS}) -> {returns}", function, fake, dispatch_key)


def define_backward(name: str, before: Sequence[str], function: Callable, dispatch_key: str) -> Callable:
    """The operator ``hf_multimax::name(*before, *function, *call, needed) -> gradients``.

    Args:
        before: names of the tensors of the forward pass that come first.
        function: of the operator's arguments, to a gradient for each of :func:`differentiable`, None where ``needed``
            is False.
    """

    def run(*arguments: Any) -> list[Tensor]:
        return [arguments[0].new_empty(0) if x is None else x for x in function(*arguments)]

    def fake(*arguments: Any) -> list[Tensor]:
        inputs, needed = differentiable(arguments[len(before) : -1]), arguments[-1]
        return [x.new_empty(x.shape) if wanted else arguments[0].new_empty(0) for x, wanted in zip(inputs, needed)]

    tensors = "".join(f"Tensor {tensor}, " for tensor in before)
    return define(f"{name}({tensors}{_ARGUMENTS}, bool[] needed) -> Tensor[]", run, fake, dispatch_key)


def register_gradient(name: str, kind: str, saved: Callable, backward: Callable) -> None:
    """Make ``hf_multimax::name`` differentiable once.

    Args:
        kind: the backend, as a message names it.
        saved: of the operator's output, to the tensors that come after ``grad_out`` in the backward operator.
        backward: that operator.
    """
    torch.library.register_autograd(
        f"hf_multimax::{name}",
        lambda ctx, grad_out, *_: differentiate(ctx, grad_out, kind, backward),
        setup_context=lambda ctx, inputs, output: save(ctx, inputs, saved(output)),
        lib=LIBRARY,
    )


def save(ctx: Any, inputs: Sequence[Any], beside: Sequence[Tensor] = ()) -> None:
    """Keep an operator's arguments, and tensors beside them, for :func:`differentiate`."""
    function, call = split(inputs)
    ctx.save_for_backward(*beside, *function[:TENSORS], *call[: DIFFERENTIABLE + 1])
    ctx.options = function[TENSORS:], call[DIFFERENTIABLE + 1 :]


def differentiate(ctx: Any, grad_out: Tensor, kind: str, backward: Callable) -> tuple[Tensor | None, ...]:
    """The gradients of the operator's arguments, by ``backward(grad_out, *beside, *function, *call, needed)``."""
    refuse_second_derivative(kind)
    saved, (of_function, of_call) = ctx.saved_tensors, ctx.options
    first = len(saved) - TENSORS - DIFFERENTIABLE - 1
    beside, options, tensors = saved[:first], saved[first : first + TENSORS], saved[first + TENSORS :]
    arguments = (*options, *of_function, *tensors, *of_call)
    needed = [ctx.needs_input_grad[i] for i in _NEEDED]
    grads: list[Tensor | None] = [None] * len(arguments)
    for i, wanted, grad in zip(_NEEDED, needed, backward(grad_out, *beside, *arguments, needed)):
        grads[i] = grad if wanted else None
    return tuple(grads)
