"""Attention through functions of rows on GPUs, as operators. Triton itself is imported at the first call."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hf_multimax.attention.call import Call, seeded
from hf_multimax.attention.operators import fitted
from hf_multimax.attention.rowwise import (
    TENSORS,
    Function,
    define_backward,
    define_forward,
    differentiable,
    function_of,
    register_gradient,
    split,
)
from hf_multimax.attention.triton.conditions import unsupported
from hf_multimax.rows.function import Rowwise
from hf_multimax.rows.triton.arguments import KINDS, STATS

__all__ = ["rowwise_attention", "rowwise_unsupported"]


def rowwise_unsupported(rows: Rowwise, call: Call) -> str | None:
    """The first feature of this call that :func:`rowwise_attention` lacks."""
    function = rows.compiled
    if function is None or function.kind not in KINDS or function.kind == "multimax":
        return rows.name
    # those that are tensors are learned, and below 2
    if function.kind in ("entmax", "asentmax") and function.value is None and function.a > 2:
        return f"{rows.name} with an alpha above 2"
    if call.sinks is not None:
        return "attention sinks"
    return unsupported(call)


def rowwise_attention(rows: Rowwise, call: Call) -> Tensor:
    """The call through a function of rows, computed in float32; differentiable once in every tensor but the mask.

    Values of an additive mask are added to the scores. Nothing is accumulated atomically, so results are bitwise
    reproducible; beside inputs and results there are at most as many scores in memory as the processors work on.
    """
    arguments = (*function_of(rows, call), *seeded(call, call.q.device))
    train = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in differentiable(arguments))
    return _training_op(*arguments)[0] if train else _inference_op(*arguments)


def _launch() -> ModuleType:
    from hf_multimax.attention.triton.rows import launch

    return launch


def _output(*arguments: Any) -> Tensor:
    """``[B, H, Nq, Dv]``, laid out as ``[B, Nq, H, Dv]``, so that merging the heads is a view."""
    _, call = split(arguments)
    batch, heads, n_rows, _ = call.q.shape
    return call.v.new_empty((batch, n_rows, heads, call.v.shape[-1])).transpose(1, 2)


def _outputs(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The output, and numbers of every row for the backward pass."""
    _, call = split(arguments)
    return _output(*arguments), call.q.new_empty((STATS, *call.q.shape[:3]), dtype=torch.float32)


def _inference(*arguments: Any) -> Tensor:
    out = _output(*arguments)
    _launch().forward(*_contiguous(arguments), out, None)
    return out


def _training(*arguments: Any) -> tuple[Tensor, Tensor]:
    out, stats = _outputs(*arguments)
    _launch().forward(*_contiguous(arguments), out, stats)
    return out, stats


def _gradients(grad_out: Tensor, stats: Tensor, *arguments: Any) -> list[Tensor | None]:
    """The gradients of the tensors that may need some, None for those that do not; ``needed`` is the last argument."""
    *inputs, needed = arguments
    function, call = _contiguous(inputs)
    bias = needed[TENSORS + Call._fields.index("bias")]
    of_rows, of_call = _launch().backward(function, call, grad_out, stats, needed[:TENSORS], bias)
    options = [None if x is None else x.sum((0, 2), dtype=torch.float64).float() for x in of_rows]
    return [*options, *fitted([of_call.get(name) for name in Call._fields], call, needed[TENSORS:])]


def _contiguous(arguments: Sequence[Any]) -> tuple[Function, Call]:
    """The function, with options that the kernels read without strides, and the call."""
    function, call = split(arguments)
    options = [None if option is None else option.contiguous() for option in function[:TENSORS]]
    return Function(*options, *function[TENSORS:]), call


_KEY = "CompositeExplicitAutograd"
_inference_op = define_forward("triton_row_attention", "Tensor", _inference, _output, _KEY)
_training_op = define_forward("triton_row_attention_training", "(Tensor, Tensor)", _training, _outputs, _KEY)
_backward_op = define_backward("triton_row_attention_backward", ["grad_out", "stats"], _gradients, _KEY)
register_gradient("triton_row_attention_training", "triton", lambda output: output[1:], _backward_op)
