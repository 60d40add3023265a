"""Attention on CPUs through the compiled functions of rows, by ``hf_multimax/extension/row_attention.h``.

A thread takes a block of query rows, whose scores stay in its cache until they are weights; the keys that no row of the
block gives weight cost nothing more. The backward pass computes the weights anew, from a few numbers of every row, such
as its threshold, which are all that is kept for it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_multimax.attention.call import Call, seeded
from hf_multimax.attention.native.conditions import unseen, unsupported_tensors
from hf_multimax.attention.native.packed import Packed, dense_rows, parameter
from hf_multimax.attention.operators import fitted
from hf_multimax.attention.rowwise import (
    TENSORS,
    Function,
    define_backward,
    define_forward,
    differentiable,
    differentiate,
    function_of,
    register_gradient,
    save,
    split,
)
from hf_multimax.rows.call import stats_size
from hf_multimax.rows.function import Rowwise

__all__ = ["rowwise_attention", "rowwise_unsupported"]


def rowwise_unsupported(rows: Rowwise, call: Call) -> str | None:
    """The first feature of this call that :func:`rowwise_attention` lacks."""
    if rows.compiled is None:
        return rows.name
    return "attention sinks" if call.sinks is not None else unsupported_tensors(call)


def rowwise_attention(rows: Rowwise, call: Call) -> Tensor:
    """The call through a compiled function of rows, computed in float32; differentiable once in every tensor.

    Values of an additive mask are added to the scores.

    Raises:
        RuntimeError: if the extension could not be built; the text says why.
    """
    function = function_of(rows, call)
    arguments = (*function, *seeded(call))
    tensors = differentiable(arguments)
    trains = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    if not unseen(call.q, call.k, call.v):
        return _training_op(*arguments)[0] if trains else _inference_op(*arguments)
    return _Attention.apply(*arguments) if trains else _inference(*arguments)


def _packed(function: Function, call: Call) -> Packed:
    packed = Packed(call)
    packed.set(kind=function.kind, a=function.a, b=function.b)
    options = zip(function._fields[:TENSORS], function)
    packed.pointers(**{name: parameter(option) for name, option in options if option is not None})
    return packed


def _output(*arguments: Any) -> Tensor:
    _, call = split(arguments)
    return call.v.new_empty((*call.q.shape[:3], call.v.shape[3]))


def _outputs(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The result and what every row leaves to the backward pass."""
    out, size = _output(*arguments), stats_size(split(arguments)[0].kind)
    return out, torch.empty((*out.shape[:3], size), dtype=torch.float32, device=out.device)


def _inference(*arguments: Any) -> Tensor:
    out = _output(*arguments)
    _compute(arguments, out, None)
    return out


def _training(*arguments: Any) -> tuple[Tensor, Tensor]:
    out, stats = _outputs(*arguments)
    _compute(arguments, out, stats)
    return out, stats


def _compute(arguments: Sequence[Any], out: Tensor, stats: Tensor | None) -> None:
    function, call = split(arguments)
    if not out.numel() or not call.k.numel():
        out.zero_()
        return
    packed = _packed(function, call)
    packed.views(out=out)
    if stats is not None:
        packed.pointers(stats=stats)
    packed.run("row_attention_forward")


def _gradients(grad_out: Tensor, stats: Tensor, *arguments: Any) -> list[Tensor | None]:
    """The gradients of the tensors that may need some, None for those that do not; ``needed`` is the last argument."""
    function, call = split(arguments[:-1])
    needed = arguments[-1]
    if not grad_out.numel() or not call.k.numel():
        given = zip(differentiable(arguments), needed)
        return [torch.zeros_like(x) if wanted and x is not None else None for x, wanted in given]
    wanted = dict(zip((*function._fields[:TENSORS], *Call._fields), needed))
    # floats for the products; the keys' gradients are sums over blocks of rows
    call = call._replace(k=call.k.float(), v=call.v.float())
    packed = _packed(function, call)
    splits = _splits(packed, call.bias if wanted["bias"] else None)
    packed.set(splits=splits)
    packed.pointers(stats=stats)
    packed.views(grad_out=dense_rows(grad_out))
    q, k, v = call.q, call.k, call.v
    grad_q = q.new_empty(q.shape, dtype=torch.float32) if wanted["q"] else None
    copies = () if splits == 1 else (splits,)
    grad_k, grad_v = (x.new_zeros((*copies, *x.shape)) if wanted[name] else None for name, x in (("k", k), ("v", v)))
    grad_bias = call.bias.new_zeros(call.bias.shape, dtype=torch.float32) if wanted["bias"] else None
    of_rows = [q.new_zeros(q.shape[:3], dtype=torch.float32) if wanted[x] else None for x in function._fields[:TENSORS]]
    if grad_bias is not None:
        packed.grad_bias(grad_bias)
    pointers = {"grad_q": grad_q, **dict(zip(("grad_value", "grad_beta", "grad_gamma"), of_rows))}
    packed.pointers(**{name: x for name, x in pointers.items() if x is not None})
    keys = (("grad_k", grad_k), ("grad_v", grad_v))
    packed.views(**{name: x[0] if copies else x for name, x in keys if x is not None})
    packed.run("row_attention_backward")
    found = {"q": grad_q, "k": grad_k, "v": grad_v, "bias": grad_bias}
    options = [None if x is None else x.sum((0, 2), dtype=torch.float64).float() for x in of_rows]
    original = Call(*arguments[len(function) : -1])
    return [*options, *fitted([found.get(name) for name in Call._fields], original, needed[TENSORS:])]


def _splits(packed: Packed, bias: Tensor | None) -> int:
    """Shares of the rows that give every thread work where heads are few; each costs one more copy of k's and v's
    gradients.
    """
    items = packed.batch * packed.kv_heads
    if bias is not None:  # heads that share a bias entry go to one thread
        batch, heads, rows, _ = (1,) * (4 - bias.ndim) + bias.shape
        if rows == 1 < packed.rows:
            return 1
        items = (packed.batch if batch > 1 else 1) * (packed.kv_heads if heads > 1 else 1)
    if packed.threads == 1 or items >= 2 * packed.threads:
        return 1
    return max(1, min(-(-2 * packed.threads // items), packed.rows // 64))


class _Attention(torch.autograd.Function):
    """The operator without the dispatcher, whose share of a short call is as large as the work itself."""

    @staticmethod
    def forward(ctx, *arguments):
        output = _training(*arguments)
        save(ctx, arguments, output[1:])
        return output[0]

    @staticmethod
    def backward(ctx, grad_out):
        return differentiate(ctx, grad_out, "native", _gradients)


_inference_op = define_forward("native_row_attention", "Tensor", _inference, _output, "CPU")
_training_op = define_forward("native_row_attention_training", "(Tensor, Tensor)", _training, _outputs, "CPU")
_backward_op = define_backward("native_row_attention_backward", ["grad_out", "stats"], _gradients, "CPU")
register_gradient("native_row_attention_training", "native", lambda output: output[1:], _backward_op)
