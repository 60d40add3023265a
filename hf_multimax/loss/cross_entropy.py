"""Linear layer, output modulation and cross-entropy in one operator that never holds ``[tokens, vocab]``.

``loss = CE(sigma(softcap(hidden @ weight.T + bias)), labels)`` is computed in chunks of tokens. Where the reduction is
a sum, every gradient is known up to one factor as soon as a chunk's probabilities are: the forward pass computes them
all and the backward pass only multiplies by that factor. With ``reduction="none"`` the factors differ by row, so the
backward pass computes the chunks again.

Operators: ``hf_multimax::linear_cross_entropy`` (sum), ``..._rows`` and ``..._rows_backward`` (one loss per token).
"""

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from hf_multimax.attention.context import differentiated_by_functions
from hf_multimax.attention.schema import LIBRARY, arguments_of, define
from hf_multimax.loss.arguments import LossOptions, check_modulator, check_tensors, checked_options, matmul_dtype
from hf_multimax.loss.chunks import solve
from hf_multimax.loss.problem import SOURCES, Problem, kept_dtype

__all__ = ["multimax_linear_cross_entropy"]


def multimax_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ranges: Tensor | None,
    ts: Tensor | None,
    **options: Unpack[LossOptions],
) -> Tensor:
    """Cross-entropy of modulated logits without ever holding the logits of all tokens.

    Equal to ``cross_entropy(modulate(hidden @ weight.T + bias, ranges, ts), labels)`` with the same meaning of
    ``ignore_index``, ``label_smoothing`` and ``reduction``; computed in float32 (float64 for float64 input) except for
    the factors of the matrix products, which have the type of ``hidden`` or, under autocast, autocast's. The gradient
    of ``weight`` is accumulated in float32 whatever its type. Gradients flow to every floating input that requires one;
    work is saved for those that do not. Double backward is refused.

    Args:
        hidden: ``[tokens, d]``, float32, float64, bfloat16 or float16.
        weight: ``[vocab, d]``, of the same type (any of them under autocast).
        labels: ``[tokens]``, int64 or int32: a class in ``[0, vocab)`` or ``ignore_index``.
        ranges, ts: the modulator, ``[2N]`` each; both None for SoftMax.
        bias: ``[vocab]``, added to the logits before anything else. A logit of minus infinity is a class that does
            not take part: probability 0, no gradient, no share of the smoothing.
        ignore_index: the label of tokens that do not count.
        label_smoothing: the share of the target spread evenly over the classes, in [0, 1].
        reduction: "mean" over the tokens that count (NaN if none does), "sum" (0 if none does) or "none".
        num_items_in_batch: divides the sum of the losses instead, whatever the reduction: "mean" and "sum" then give
            the sum divided by it, "none" losses that add up to that.
        affine: ``(scale, shift)``, scalars: the modulator acts on ``scale * logits + shift``.
        softcap: ``c > 0`` turns the logits into ``c * tanh(logits / c)`` before the modulator.
        chunk_size: tokens computed at a time; by default as many as fit a fixed workspace, at most a quarter.

    Returns:
        The loss, float32 (float64 for float64 input): a scalar, or ``[tokens]`` with zeros at ignored tokens.

    Raises:
        ValueError: for shapes that do not fit, labels out of range (on a CPU; a device assertion elsewhere), an unknown
            reduction, only one of ``ranges`` and ``ts``, ``affine`` without them, numbers out of their range.
        TypeError: for arguments of the wrong type, or unknown ones.
        RuntimeError: where ``torch.func`` differentiates it.

    Examples:
        >>> import torch
        >>> from hf_multimax import multimax_linear_cross_entropy
        >>> hidden, weight, labels = torch.randn(6, 8), torch.randn(11, 8), torch.tensor([1, 2, -100, 4, 5, 10])
        >>> loss = multimax_linear_cross_entropy(hidden, weight, labels, torch.zeros(4), torch.zeros(4))
        >>> torch.allclose(loss, torch.nn.functional.cross_entropy(hidden @ weight.T, labels))  # slopes of 0: SoftMax
        True
    """
    if differentiated_by_functions():
        raise RuntimeError(
            "multimax_linear_cross_entropy has no derivative for torch.func: use torch.autograd, or cross_entropy of "
            "hf_multimax.modulate(logits, ranges, ts)"
        )
    given = checked_options(options)
    reduction, num_items_in_batch = given["reduction"], given["num_items_in_batch"]
    check_tensors(hidden, weight, labels, given["bias"])
    check_modulator(ranges, ts, given["affine"])
    problem = Problem(
        hidden, weight, labels, ranges, ts, given["bias"], *(given["affine"] or (None, None)), given["ignore_index"],
        float(given["label_smoothing"]), given["softcap"], given["chunk_size"], matmul_dtype(hidden, weight),
    )  # fmt: skip
    if reduction == "none":
        losses = linear_cross_entropy_rows(*problem)
        return losses if num_items_in_batch is None else losses / _on(losses.device, num_items_in_batch)
    recorded = torch.is_grad_enabled()
    wanted = [recorded and x is not None and x.requires_grad for x in problem.sources]
    total = linear_cross_entropy(*problem, wanted)[0]
    if num_items_in_batch is not None:
        return total / _on(total.device, num_items_in_batch)
    if reduction == "sum":
        return total
    count = (labels != problem.ignore_index).sum()
    # where, not 0 / 0: the gradients are zero then, as torch's are
    return torch.where(count > 0, total / count.clamp_min(1), float("nan"))


def _on(device: torch.device, count: int | Tensor) -> int | Tensor:
    return count.detach().to(device).reshape(()) if isinstance(count, Tensor) else count


# -- operators ---------------------------------------------------------------------------------------------------------


def _sum(*arguments: Any) -> tuple[Tensor, ...]:
    """The sum of the losses, and its gradients in the order of SOURCES (empty where not wanted)."""
    *problem, wanted = arguments
    losses, *gradients = solve(Problem(*problem), wanted)
    return losses.sum(dtype=torch.float64).to(losses.dtype), *gradients


def _fake_sum(*arguments: Any) -> tuple[Tensor, ...]:
    problem = Problem(*arguments[:-1])
    total = problem.hidden.new_empty((), dtype=problem.compute_dtype)
    return total, *_fake_gradients(problem, arguments[-1])


def _rows(*arguments: Any) -> Tensor:
    """The loss of every token, [tokens]."""
    return solve(Problem(*arguments), [False] * len(SOURCES))[0]


def _fake_rows(*arguments: Any) -> Tensor:
    problem = Problem(*arguments)
    return problem.hidden.new_empty(problem.hidden.shape[0], dtype=problem.compute_dtype)


def _of_rows(row_weights: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """The gradients of ``row_weights @ losses`` in the order of SOURCES (empty where not wanted)."""
    *problem, wanted = arguments
    return solve(Problem(*problem), wanted, row_weights)[1:]


def _fake_gradients(problem: Problem, wanted: Sequence[bool]) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_like(getattr(problem, name), dtype=kept_dtype(problem, name))
        if flag
        else problem.hidden.new_empty(0)
        for name, flag in zip(SOURCES, wanted)
    )


_GRADIENTS = ", ".join(["Tensor"] * len(SOURCES))
_PROBLEM = arguments_of(Problem)
linear_cross_entropy = define(
    f"linear_cross_entropy({_PROBLEM}, bool[] wanted) -> (Tensor, {_GRADIENTS})", _sum, _fake_sum
)
linear_cross_entropy_rows = define(f"linear_cross_entropy_rows({_PROBLEM}) -> Tensor", _rows, _fake_rows)
linear_cross_entropy_rows_backward = define(
    f"linear_cross_entropy_rows_backward(Tensor row_weights, {_PROBLEM}, bool[] wanted) -> ({_GRADIENTS})",
    _of_rows,
    lambda row_weights, *arguments: _fake_gradients(Problem(*arguments[:-1]), arguments[-1]),
)


#: where SOURCES stand among the operators' arguments
_PLACES = [Problem._fields.index(name) for name in SOURCES]


def _sum_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.dtypes = [None if x is None else x.dtype for x in Problem(*inputs[:-1]).sources]
    ctx.wanted = inputs[-1]


def _sum_backward(ctx, grad: Tensor | None, *_):
    _refuse_double_backward()
    result: list[Tensor | None] = [None] * (len(Problem._fields) + 1)
    if grad is not None:
        for i, gradient, dtype, flag in zip(_PLACES, ctx.saved_tensors, ctx.dtypes, ctx.wanted):
            if flag:
                # multiplied before it is rounded: float16 would overflow or lose what a loss scale restores
                result[i] = (gradient.to(torch.promote_types(gradient.dtype, grad.dtype)) * grad).to(dtype)
    return tuple(result)


def _rows_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.options = inputs[8:]


def _rows_backward(ctx, grad: Tensor):
    _refuse_double_backward()
    inputs = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[i] for i in _PLACES]
    gradients = linear_cross_entropy_rows_backward(grad, *inputs, *ctx.options, wanted)
    result: list[Tensor | None] = [None] * len(Problem._fields)
    for i, gradient, flag in zip(_PLACES, gradients, wanted):
        if flag:
            result[i] = gradient.to(inputs[i].dtype)
    return tuple(result)


def _refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "multimax_linear_cross_entropy has no second derivative: call backward without create_graph=True, "
            "or compute cross_entropy(modulate(hidden @ weight.T), labels) unfused"
        )


for _name, _differentiate, _setup in (
    ("linear_cross_entropy", _sum_backward, _sum_setup),
    ("linear_cross_entropy_rows", _rows_backward, _rows_setup),
):
    torch.library.register_autograd(f"hf_multimax::{_name}", _differentiate, setup_context=_setup, lib=LIBRARY)
