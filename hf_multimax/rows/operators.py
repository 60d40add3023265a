"""The compiled functions of rows as operators: what runs, what autograd and ``torch.compile`` know of it.

Where nothing traces or intercepts operators the dispatcher is left out, whose share of a short call is as large as the
work itself.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_multimax.attention.operators import LIBRARY, define_operator
from hf_multimax.rows.call import KINDS, STATS, call, items_of

__all__ = ["compute"]

#: x, value, ranges, ts and affine have gradients; the mask stands behind them
_DIFFERENTIABLE = 5
_STRUCTURED = (KINDS.index("fusedmax"), KINDS.index("oscarmax"))
_NEED_SCORES = {KINDS.index(name) for name in ("multimax", "adaptive_temperature", "rsoftmax", "tsoftmax", "oscarmax")}
_NEED_STATS = {
    KINDS.index(name) for name in ("scalable_softmax", "adaptive_temperature", "rsoftmax", "tsoftmax", "multimax")
} - {KINDS.index("multimax")}


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
    given = _given(x=x, value=value, ranges=ranges, ts=ts, affine=affine, mask=mask)
    call("forward", x.shape, x.dtype, kind, a, b, out=out, **given)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, p, stats, groups = outputs = _outputs(x, kind)
    given = _given(x=x, value=value, ranges=ranges, ts=ts, affine=affine, mask=mask, p=p, stats=stats, groups=groups)
    call("forward", x.shape, x.dtype, kind, a, b, out=out, **given)
    return outputs


def _outputs(x: Tensor, kind: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result; then for the backward pass, where wanted, its float32 copy, numbers of every row and groups."""

    def tensor(wanted: bool, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return x.new_empty(shape if wanted else (0,), dtype=dtype)

    return (
        torch.empty_like(x),
        tensor(x.dtype != torch.float32, x.shape, torch.float32),
        tensor(kind in _NEED_STATS, (*x.shape[:-1], STATS), torch.float32),
        tensor(kind in _STRUCTURED, x.shape, torch.int32),
    )


def _given(**tensors: Tensor | None) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor is not None and tensor.numel()}


def _backward(
    grad: Tensor,
    p: Tensor,
    stats: Tensor,
    groups: Tensor,
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
    grad_x, by_value, *_ = found = _fake_backward(
        grad, p, stats, groups, x, value, ranges, ts, affine, kind, a, b, needed
    )
    rows = _given(p=p, stats=stats, groups=groups, x=x, value=value, ranges=ranges, ts=ts, affine=affine)
    rows |= _given(grad=grad.contiguous(), grad_value=by_value, grad_x=torch.empty_like(p, dtype=grad.dtype))
    if ranges is None or ts is None or not any(needed[2:]):
        call("backward", p.shape, grad.dtype, kind, a, b, **rows)
    else:
        heads, size = (ranges.shape[0] if ranges.ndim == 2 else 0), ranges.shape[-1]
        sums = p.new_zeros((items_of(p.shape, heads)[3], 2 * size + 2), dtype=torch.float64)
        call("backward", p.shape, grad.dtype, kind, a, b, **rows, sums=sums)
        sums = sums.view(-1, heads, sums.shape[0] // (p.shape[:-2].numel()), sums.shape[1]).sum((0, 2)) if heads else sums.sum(0)
        by_ranges, by_ts, by_affine = sums.to(torch.float32).split((size, size, 2), -1)
        found[2:] = [
            part.contiguous() if wanted else empty
            for part, wanted, empty in zip((by_ranges, by_ts, by_affine), needed[2:], found[2:])
        ]
    found[0] = rows["grad_x"] if needed[0] else grad_x
    return found


def _fake_inference(x, *rest):
    return torch.empty_like(x)


def _fake_training(x, value, ranges, ts, affine, mask, kind, a, b):
    return _outputs(x, kind)


def _fake_backward(grad, p, stats, groups, x, value, ranges, ts, affine, kind, a, b, needed):
    shapes = [p.shape, *(None if t is None else t.shape for t in (value, ranges, ts, affine))]
    dtypes = (grad.dtype, *(torch.float32,) * 4)
    return [
        p.new_empty(shape if wanted and shape is not None else (0,), dtype=dtype)
        for shape, dtype, wanted in zip(shapes, dtypes, needed)
    ]


def _save(ctx, inputs, output) -> None:
    x, value, ranges, ts, affine, _mask, *ctx.options = inputs
    out, p, stats, groups = output
    kind = ctx.options[0]
    scores = kind in _NEED_SCORES or (value is not None and value.requires_grad)
    ctx.save_for_backward(
        p if p.numel() else out, stats, groups, x if scores else None, value, ranges, ts, affine
    )


def _gradients(ctx, grad: Tensor, backward) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "compiled functions of rows have no second derivative: call backward without create_graph=True, or compute "
            "under hf_multimax.backend('eager')"
        )
    needed = list(ctx.needs_input_grad[:_DIFFERENTIABLE])
    grads = backward(grad, *ctx.saved_tensors, *ctx.options, needed)
    return *(grad if wanted else None for grad, wanted in zip(grads, needed)), None, None, None, None


class _Rows(torch.autograd.Function):
    """The training operator without the dispatcher."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _training(*inputs)
        _save(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx, grad):
        return _gradients(ctx, grad, _backward)


_inference_op = define_operator("row_function", _inference, _fake_inference, "CPU")
_training_op = define_operator("row_function_training", _training, _fake_training, "CPU")
_backward_op = define_operator("row_function_backward", _backward, _fake_backward, "CPU")
torch.library.register_autograd(
    "hf_multimax::row_function_training",
    lambda ctx, grad, *_: _gradients(ctx, grad, _backward_op),
    setup_context=_save,
    lib=LIBRARY,
)
