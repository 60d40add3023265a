"""The compiled functions of rows as operators: what runs, what autograd and ``torch.compile`` know of it.

Where nothing traces or intercepts operators the dispatcher is left out, whose share of a short call is as large as the
work itself.
"""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hf_multimax.attention.schema import LIBRARY, arguments_of, define
from hf_multimax.rows.call import KINDS, STATS, RowCall, items_of, run
from hf_multimax.rows.triton.arguments import STATS as TRITON_STATS

__all__ = ["compute"]

#: the fields of a call that have gradients are its first
_DIFFERENTIABLE = 7
_STRUCTURED = {KINDS.index(name) for name in ("fusedmax", "oscarmax")}
_NEED_STATS = {
    KINDS.index(name)
    for name in ("scalable_softmax", "adaptive_temperature", "rsoftmax", "tsoftmax", "asentmax", "softpick")
}
#: what the backward pass computes from the scores, too; with a gradient for one of the rows' options all do
_NEED_SCORES = {
    KINDS.index(name) for name in ("multimax", "adaptive_temperature", "rsoftmax", "tsoftmax", "oscarmax", "softpick")
}
#: where a weight of 0 does not tell that an entry has no gradient
_NEED_MASK = {KINDS.index("softpick")}
#: what the backward pass gets: of the forward pass, then of the call
_SAVED = "Tensor p, Tensor? stats, Tensor? groups, Tensor? mask, Tensor? x, " + ", ".join(
    f"Tensor? {name}" for name in RowCall._fields[1:_DIFFERENTIABLE]
)


def compute(call: RowCall) -> Tensor:
    """A function of rows: the result, shaped and typed like ``call.x``."""
    unseen = not (torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or call.x.is_neg())
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in call[:_DIFFERENTIABLE]):
        return _Rows.apply(*call) if unseen else _training_op(*call)[0]
    return _inference(*call) if unseen else _inference_op(*call)


def _inference(*inputs: Any) -> Tensor:
    call = RowCall(*inputs)
    out = torch.empty_like(call.x)
    _fill(call, out)
    return out


def _training(*inputs: Any) -> list[Tensor]:
    return _filled(inputs[0], _outputs_of(RowCall(*inputs)))


def _outputs_of(call: RowCall) -> list[Tensor | None]:
    """The result; then for the backward pass its float32 copy, numbers of every row, groups: None where not needed."""
    outputs = _outputs(call)
    _fill(call, *outputs)
    return outputs


def _fill(
    call: RowCall, out: Tensor, p: Tensor | None = None, stats: Tensor | None = None, groups: Tensor | None = None
) -> None:
    if call.triton:
        _launch().forward(call, out, p, stats)
    else:
        run("forward", call.x, call.kind, call.a, call.b, **call.tensors(), out=out, p=p, stats=stats, groups=groups)


def _launch() -> ModuleType:
    """The launch module, imported at the first call because it needs Triton."""
    from hf_multimax.rows.triton import launch

    return launch


def _outputs(call: RowCall) -> list[Tensor | None]:
    x, kind, numbers = call.x, call.kind, TRITON_STATS if call.triton else STATS
    return [
        torch.empty_like(x),
        torch.empty_like(x, dtype=torch.float32) if x.dtype != torch.float32 else None,
        x.new_empty((*x.shape[:-1], numbers), dtype=torch.float32) if kind in _NEED_STATS else None,
        torch.empty_like(x, dtype=torch.int32) if kind in _STRUCTURED else None,
    ]


def _filled(like: Tensor, tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [like.new_empty(0) if tensor is None else tensor for tensor in tensors]


def _gradients(*inputs: Any) -> list[Tensor | None]:
    """The gradients of the differentiable inputs, None for those that need none; arguments as the operator's."""
    grad, p, stats, groups, mask, x, value, beta, gamma, ranges, ts, affine, kind, a, b, triton, needed = inputs
    grad = grad.contiguous()
    if triton:
        call = RowCall(x, value, beta, gamma, ranges, ts, affine, None, kind, a, b)
        return _launch().backward(grad, p, stats, call, needed)
    grad_x = torch.empty_like(grad)
    options = [t.new_empty(t.shape) if wanted else None for t, wanted in zip((value, beta, gamma), needed[1:])]
    given = {"stats": stats, "groups": groups, "mask": mask, "x": x, "value": value, "beta": beta, "gamma": gamma}
    given |= {"ranges": ranges, "ts": ts, "affine": affine, "p": p, "grad": grad, "grad_x": grad_x}
    given |= zip(("grad_value", "grad_beta", "grad_gamma"), options)
    if ranges is None or not any(needed[4:]):
        run("backward", grad, kind, a, b, **given)
        return [grad_x if needed[0] else None, *options, None, None, None]
    heads, size = (ranges.shape[0] if ranges.ndim == 2 else 0), ranges.shape[-1]
    sums = grad.new_zeros((items_of(grad.shape, heads).items, 2 * size + 2), dtype=torch.float64)
    run("backward", grad, kind, a, b, **given, sums=sums)
    by_head = sums.view(grad.shape[:-3].numel(), heads, -1, 2 * size + 2).sum((0, 2)) if heads else sums.sum(0)
    parts = by_head.to(torch.float32).split((size, size, 2), -1)
    # apart, as what an operator returns must not share memory
    scalars = [part.clone() if wanted else None for part, wanted in zip(parts, needed[4:])]
    return [grad_x if needed[0] else None, *options, *scalars]


def _fake_backward(grad, p, stats, groups, mask, *rest):
    *inputs, _kind, _a, _b, _triton, needed = rest
    return [t.new_empty(t.shape) if wanted else grad.new_empty(0) for t, wanted in zip((grad, *inputs[1:]), needed)]


def _save(ctx, inputs, output) -> None:
    call, (out, p, stats, groups) = RowCall(*inputs), output
    ctx.options = call.kind, call.a, call.b, call.triton
    scores = call.kind in _NEED_SCORES or any(ctx.needs_input_grad[1:4])
    p = out if out.dtype == torch.float32 else p
    mask = call.mask if call.kind in _NEED_MASK else None
    ctx.save_for_backward(p, stats, groups, mask, call.x if scores else None, *call[1:_DIFFERENTIABLE])


def _differentiate(ctx, grad: Tensor, backward: Callable[..., Sequence[Tensor | None]]) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "compiled functions of rows have no second derivative: call backward without create_graph=True, or compute "
            "under hf_multimax.backend('eager')"
        )
    needed = ctx.needs_input_grad[:_DIFFERENTIABLE]
    grads = backward(grad, *ctx.saved_tensors, *ctx.options, list(needed))
    absent = [None] * (len(RowCall._fields) - _DIFFERENTIABLE)
    return *(grad if wanted else None for grad, wanted in zip(grads, needed)), *absent


class _Rows(torch.autograd.Function):
    """The training operator without the dispatcher."""

    @staticmethod
    def forward(ctx, *inputs):
        outputs = _outputs_of(RowCall(*inputs))
        _save(ctx, inputs, outputs)
        return outputs[0]

    @staticmethod
    def backward(ctx, grad):
        return _differentiate(ctx, grad, _gradients)


_CALL = arguments_of(RowCall)
_inference_op = define(f"row_function({_CALL}) -> Tensor", _inference, lambda x, *_: torch.empty_like(x))
_training_op = define(
    f"row_function_training({_CALL}) -> Tensor[]",
    _training,
    lambda *inputs: _filled(inputs[0], _outputs(RowCall(*inputs))),
)
_backward_op = define(
    f"row_function_backward(Tensor grad, {_SAVED}, int kind, float a, float b, bool triton, bool[] needed) -> Tensor[]",
    lambda *inputs: _filled(inputs[0], _gradients(*inputs)),
    _fake_backward,
)
torch.library.register_autograd(
    "hf_multimax::row_function_training",
    lambda ctx, grads: _differentiate(ctx, grads[0], _backward_op),
    setup_context=_save,
    lib=LIBRARY,
)
