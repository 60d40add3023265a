"""Attention on CPUs through the compiled functions of rows, by ``hf_multimax/extension/row_attention.h``.

A thread takes a block of query rows, whose scores stay in its cache until they are weights; the keys that no row of the
block gives weight cost nothing more. The backward pass computes the weights anew, from a few numbers of every row, such
as its threshold, which are all that is kept for it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_multimax.attention.call import DIFFERENTIABLE, Call, seeded
from hf_multimax.attention.context import refuse_second_derivative
from hf_multimax.attention.native.conditions import unseen, unsupported_tensors
from hf_multimax.attention.native.packed import Packed, dense_rows, parameter
from hf_multimax.attention.operators import fitted
from hf_multimax.attention.schema import LIBRARY, arguments_of, define
from hf_multimax.rows.call import KINDS, stats_size
from hf_multimax.rows.function import Rowwise

__all__ = ["rowwise_attention", "rowwise_unsupported"]


class _Function(NamedTuple):
    """A function of rows: options that are tensors, ``[heads]``, then what is a number."""

    value: Tensor | None
    beta: Tensor | None
    gamma: Tensor | None
    kind: int
    a: float
    b: float


_TENSORS = 3
#: of a function and a call together: the tensors that may need gradients
_NEEDED = (*range(_TENSORS), *range(len(_Function._fields), len(_Function._fields) + DIFFERENTIABLE))


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
    chosen, heads = rows.compiled, call.q.shape[1]
    options = (_of_heads(option, heads, call.q) for option in (chosen.value, chosen.beta, chosen.gamma))
    function = _Function(*options, KINDS.index(chosen.kind), float(chosen.a), float(chosen.b))
    arguments = (*function, *seeded(call))
    tensors = (*function[:_TENSORS], *call.differentiable)
    trains = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    if not unseen(call.q, call.k, call.v):
        return _training_op(*arguments)[0] if trains else _inference_op(*arguments)
    return _Attention.apply(*arguments) if trains else _inference(*arguments)


def _of_heads(option: float | Tensor | None, heads: int, like: Tensor) -> Tensor | None:
    if option is None:
        return None
    if not isinstance(option, Tensor):
        return torch.full((heads,), float(option), device=like.device)
    return option.to(torch.float32).expand(heads)


def _split(arguments: Sequence[Any]) -> tuple[_Function, Call]:
    size = len(_Function._fields)
    return _Function(*arguments[:size]), Call(*arguments[size:])


def _packed(function: _Function, call: Call) -> Packed:
    packed = Packed(call)
    packed.set(kind=function.kind, a=function.a, b=function.b)
    options = zip(function._fields[:_TENSORS], function)
    packed.pointers(**{name: parameter(option) for name, option in options if option is not None})
    return packed


def _output(*arguments: Any) -> Tensor:
    _, call = _split(arguments)
    return call.v.new_empty((*call.q.shape[:3], call.v.shape[3]))


def _outputs(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The result and what every row leaves to the backward pass."""
    out, size = _output(*arguments), stats_size(_split(arguments)[0].kind)
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
    function, call = _split(arguments)
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
    function, call = _split(arguments[:-1])
    needed = arguments[-1]
    if not grad_out.numel() or not call.k.numel():
        given = (*function[:_TENSORS], *call.differentiable)
        return [torch.zeros_like(x) if wanted and x is not None else None for x, wanted in zip(given, needed)]
    wanted = dict(zip((*function._fields[:_TENSORS], *Call._fields), needed))
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
    of_rows = [
        q.new_zeros(q.shape[:3], dtype=torch.float32) if wanted[x] else None for x in function._fields[:_TENSORS]
    ]
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
    return [*options, *fitted([found.get(name) for name in Call._fields], original, needed[_TENSORS:])]


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
        _save(ctx, arguments, output)
        return output[0]

    @staticmethod
    def backward(ctx, grad_out):
        return _differentiate(ctx, grad_out, _gradients)


def _save(ctx, inputs, output) -> None:
    function, call = _split(inputs)
    ctx.save_for_backward(output[1], *function[:_TENSORS], *call[: DIFFERENTIABLE + 1])
    ctx.options = function[_TENSORS:], call[DIFFERENTIABLE + 1 :]


def _differentiate(ctx, grad_out, backward) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("native")
    (stats, *saved), (of_function, of_call) = ctx.saved_tensors, ctx.options
    arguments = (*saved[:_TENSORS], *of_function, *saved[_TENSORS:], *of_call)
    needed = [ctx.needs_input_grad[i] for i in _NEEDED]
    grads = [None] * len(arguments)
    for i, wanted, grad in zip(_NEEDED, needed, backward(grad_out, stats, *arguments, needed)):
        grads[i] = grad if wanted else None
    return tuple(grads)


def _run_backward(grad_out: Tensor, *arguments: Any) -> list[Tensor]:
    return [grad_out.new_empty(0) if x is None else x for x in _gradients(grad_out, *arguments)]


def _fake_backward(grad_out: Tensor, stats: Tensor, *arguments: Any) -> list[Tensor]:
    needed, inputs = arguments[-1], [arguments[i] for i in _NEEDED]
    return [x.new_empty(x.shape) if wanted else grad_out.new_empty(0) for x, wanted in zip(inputs, needed)]


_ARGUMENTS = f"{arguments_of(_Function)}, {arguments_of(Call)}"
_inference_op = define(f"native_row_attention({_ARGUMENTS}) -> Tensor", _inference, _output, "CPU")
_training_op = define(f"native_row_attention_training({_ARGUMENTS}) -> (Tensor, Tensor)", _training, _outputs, "CPU")
_backward_op = define(
    f"native_row_attention_backward(Tensor grad_out, Tensor stats, {_ARGUMENTS}, bool[] needed) -> Tensor[]",
    _run_backward,
    _fake_backward,
    "CPU",
)
torch.library.register_autograd(
    "hf_multimax::native_row_attention_training",
    lambda ctx, grad_out, _: _differentiate(ctx, grad_out, _backward_op),
    setup_context=_save,
    lib=LIBRARY,
)
