"""The compiled functions of rows as operators: what runs, what autograd and ``torch.compile`` know of it.

Where nothing traces or intercepts operators the dispatcher is left out, whose share of a short call is as large as the
work itself.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_multimax.attention.operators import LIBRARY, define_operator
from hf_multimax.rows.call import KINDS, STATS, call, items_of

__all__ = ["compute"]

#: x, value, ranges, ts and affine have gradients; the mask stands behind them
_DIFFERENTIABLE = 5
_STRUCTURED = {KINDS.index(name) for name in ("fusedmax", "oscarmax")}
_NEED_STATS = {KINDS.index(name) for name in ("scalable_softmax", "adaptive_temperature", "rsoftmax", "tsoftmax")}
#: what the backward pass computes from the scores, too; with a gradient for ``value`` all do
_NEED_SCORES = {KINDS.index(name) for name in ("multimax", "adaptive_temperature", "rsoftmax", "tsoftmax", "oscarmax")}


def compute(
    x: Tensor,
    value: Tensor | None,
    ranges: Tensor | None,
    ts: Tensor | None,
    affine: Tensor | None,
    mask: Tensor | None,
    kind: int,
    a: float,
    b: float,
) -> Tensor:
    """A function of the rows of ``x``, contiguous ``[..., n]`` of float32, bfloat16 or float16.

    Args:
        value: an option of every row, float32 ``[rows]``, in place of the number ``a``.
        ranges, ts: float32 ``[2N]`` or ``[heads, 2N]``, heads being the third dimension of ``x`` from the right.
        affine: float32 ``[2]`` or ``[heads, 2]``.
        mask: boolean, shaped like ``x``, True = keep.
        kind: the function's place in ``KINDS``.
        a, b: its options that are numbers.
    """
    inputs = (x, value, ranges, ts, affine, mask, kind, a, b)
    unseen = not (torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or x.is_neg())
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs[:_DIFFERENTIABLE]):
        return _Rows.apply(*inputs) if unseen else _training_op(*inputs)[0]
    return _inference(*inputs) if unseen else _inference_op(*inputs)


def _inference(
    x: Tensor,
    value: Tensor | None,
    ranges: Tensor | None,
    ts: Tensor | None,
    affine: Tensor | None,
    mask: Tensor | None,
    kind: int,
    a: float,
    b: float,
) -> Tensor:
    out = torch.empty_like(x)
    call("forward", x, kind, a, b, x=x, value=value, ranges=ranges, ts=ts, affine=affine, mask=mask, out=out)
    return out


def _training(
    x: Tensor,
    value: Tensor | None,
    ranges: Tensor | None,
    ts: Tensor | None,
    affine: Tensor | None,
    mask: Tensor | None,
    kind: int,
    a: float,
    b: float,
) -> list[Tensor]:
    """The result; then for the backward pass its float32 copy, numbers of every row, groups: empty where not needed."""
    outputs = _outputs(x, kind)
    _run_forward(outputs, x, value, ranges, ts, affine, mask, kind, a, b)
    return _filled(x, outputs)


def _outputs(x: Tensor, kind: int) -> list[Tensor | None]:
    return [
        torch.empty_like(x),
        torch.empty_like(x, dtype=torch.float32) if x.dtype != torch.float32 else None,
        x.new_empty((*x.shape[:-1], STATS), dtype=torch.float32) if kind in _NEED_STATS else None,
        torch.empty_like(x, dtype=torch.int32) if kind in _STRUCTURED else None,
    ]


def _run_forward(outputs, x, value, ranges, ts, affine, mask, kind, a, b) -> None:
    out, p, stats, groups = outputs
    call(
        "forward", x, kind, a, b, x=x, value=value, ranges=ranges, ts=ts, affine=affine, mask=mask, out=out, p=p,
        stats=stats, groups=groups,
    )  # fmt: skip


def _filled(like: Tensor, tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [like.new_empty(0) if tensor is None else tensor for tensor in tensors]


def _backward(
    grad: Tensor,
    p: Tensor,
    stats: Tensor | None,
    groups: Tensor | None,
    x: Tensor | None,
    value: Tensor | None,
    ranges: Tensor | None,
    ts: Tensor | None,
    affine: Tensor | None,
    kind: int,
    a: float,
    b: float,
    needed: Sequence[bool],
) -> list[Tensor]:
    """The gradients of the differentiable inputs, empty for those that need none."""
    return _filled(grad, _gradients(grad, p, stats, groups, x, value, ranges, ts, affine, kind, a, b, needed))


def _gradients(
    grad, p, stats, groups, x, value, ranges, ts, affine, kind, a, b, needed: Sequence[bool]
) -> list[Tensor | None]:
    grad = grad.contiguous()
    grad_x, grad_value, sums = torch.empty_like(grad), None, None
    if needed[1]:
        grad_value = torch.empty_like(value)
    if ranges is not None and any(needed[2:]):
        heads, size = (ranges.shape[0] if ranges.ndim == 2 else 0), ranges.shape[-1]
        sums = p.new_zeros((items_of(p.shape, heads)[3], 2 * size + 2), dtype=torch.float64)
    call(
        "backward", grad, kind, a, b, p=p, stats=stats, groups=groups, x=x, value=value, ranges=ranges, ts=ts,
        affine=affine, grad=grad, grad_x=grad_x, grad_value=grad_value, sums=sums,
    )  # fmt: skip
    found = [grad_x if needed[0] else None, grad_value, None, None, None]
    if sums is not None:
        sums = sums.sum(0) if not heads else sums.view(p.shape[:-3].numel(), heads, -1, 2 * size + 2).sum((0, 2))
        parts = sums.to(torch.float32).split((size, size, 2), -1)
        # apart, as what an operator returns must not share memory
        found[2:] = [part.clone() if wanted else None for part, wanted in zip(parts, needed[2:])]
    return found


def _fake_inference(x, *rest):
    return torch.empty_like(x)


def _fake_training(x, value, ranges, ts, affine, mask, kind, a, b):
    return _filled(x, _outputs(x, kind))


def _fake_backward(grad, p, stats, groups, x, value, ranges, ts, affine, kind, a, b, needed):
    shapes = [grad, value, ranges, ts, affine]
    return [t.new_empty(t.shape) if wanted else grad.new_empty(0) for t, wanted in zip(shapes, needed)]


def _save(ctx, inputs, output) -> None:
    x, value, ranges, ts, affine, _mask, *ctx.options = inputs
    out, p, stats, groups = output
    scores = ctx.options[0] in _NEED_SCORES or ctx.needs_input_grad[1]
    p = out if out.dtype == torch.float32 else p
    ctx.save_for_backward(p, stats, groups, x if scores else None, value, ranges, ts, affine)


def _differentiate(ctx, grad: Tensor, backward: Callable[..., Sequence[Tensor | None]]) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "compiled functions of rows have no second derivative: call backward without create_graph=True, or compute "
            "under hf_multimax.backend('eager')"
        )
    needed = ctx.needs_input_grad[:_DIFFERENTIABLE]
    grads = backward(grad, *ctx.saved_tensors, *ctx.options, list(needed))
    return *(grad if wanted else None for grad, wanted in zip(grads, needed)), None, None, None, None


class _Rows(torch.autograd.Function):
    """The training operator without the dispatcher."""

    @staticmethod
    def forward(ctx, *inputs):
        outputs = _outputs(inputs[0], inputs[6])
        _run_forward(outputs, *inputs)
        _save(ctx, inputs, outputs)
        return outputs[0]

    @staticmethod
    def backward(ctx, grad):
        return _differentiate(ctx, grad, _gradients)


_inference_op = define_operator("row_function", _inference, _fake_inference, "CPU")
_training_op = define_operator("row_function_training", _training, _fake_training, "CPU")
_backward_op = define_operator("row_function_backward", _backward, _fake_backward, "CPU")
torch.library.register_autograd(
    "hf_multimax::row_function_training",
    lambda ctx, grads: _differentiate(ctx, grads[0], _backward_op),
    setup_context=_save,
    lib=LIBRARY,
)
