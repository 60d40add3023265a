"""MultiMax attention in tiles of whole score rows: PyTorch only, any device, memory linear in the sequence length.

A tile holds all keys that a few query rows see, so that a row function (MultiMax here, any other normaliser through
:func:`rowwise_attention`) meets complete rows. The backward pass recomputes the tiles instead of keeping them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_multimax.attention.arguments import LARGEST_WINDOW, Affine, check_arguments, dropout_seed
from hf_multimax.attention.context import refuse_second_derivative
from hf_multimax.attention.operators import DIFFERENTIABLE, LIBRARY, define_operator, fake_gradients, fitted
from hf_multimax.attention.tiled.passes import run_backward, run_forward
from hf_multimax.attention.tiled.rows import AutogradRows, MultiMaxRows, RowFunction
from hf_multimax.attention.tiled.tiles import Options, Problem, computed_in

__all__ = ["attention", "check_arguments", "rowwise_attention", "unsupported"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    ts: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    affine: Affine | None = None,
    dropout_p: float = 0.0,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """``softmax(mask(sigma(softcap(q k^T * scale) + bias))) v`` (paper, section 4), differentiable in every tensor.

    Args:
        q: ``[B, H, Nq, D]``; float32, float64, bfloat16 or float16, any strides.
        k: ``[B, Hkv, Nk, D]``, H a multiple of Hkv (query head h reads head ``h // (H // Hkv)``).
        v: ``[B, Hkv, Nk, Dv]``.
        ranges, ts: the modulator, ``[2N]`` or ``[H, 2N]``.
        mask: boolean (True = keep) or additive, broadcastable to ``[B, H, Nq, Nk]``. An additive entry at or below half
            of its type's lowest value masks, any other is added after the modulation; it may require a gradient.
        bias: added to the scores before the modulation, broadcastable to ``[B, H, Nq, Nk]``; may require a gradient.
        affine: ``(scale, shift)``, each a scalar or ``[H]``, applied to the scores before the modulation.
        dropout_p: probability that a weight is dropped; drawn from PyTorch's default CPU generator.
        causal: query i sees keys up to ``i + Nk - Nq``; combines with ``mask``.
        window: with ``causal`` the last ``window`` keys, itself included; without it keys at a distance below it.
        scale: factor of the scores, ``D ** -0.5`` if None.
        softcap: c in ``c * tanh(score / c)``, applied before the bias.
        sinks: ``[H]``, extra unmodulated logits that join the denominator only.

    Returns:
        ``[B, H, Nq, Dv]`` in v's type. A row that sees nothing is zero and passes no gradient.

    Raises:
        ValueError: for shapes that do not fit, and causal or window with more queries than keys.
        TypeError: for types that do not fit.
    """
    check_arguments(q, k, v, ranges, ts, mask, bias, affine, dropout_p, causal, window, softcap, sinks)
    affine_scale, affine_shift = affine or (None, None)
    seed = dropout_seed(dropout_p)
    return _forward_op(
        q, k, v, ranges, ts, mask, bias, affine_scale, affine_shift, sinks, seed,
        *_options(q, dropout_p, causal, window, scale, softcap),
    )  # fmt: skip


def unsupported(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, ts: Tensor, **features: object) -> str | None:
    """The first feature of this call that the backend lacks; this one has them all."""
    return None


def rowwise_attention(
    row_function: RowFunction,
    parameters: Sequence[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention through any row-wise normaliser, in the same tiles, recomputed by autograd in the backward pass.

    Args:
        row_function: ``row_function(scores, keep, *parameters) -> probabilities``, differentiable in scores and
            parameters. ``scores`` is ``[batch, H, rows, keys]`` in float32 (float64 for float64 inputs), some batch
            elements and rows, all heads, and all keys that one of the rows may see; ``keep`` is None or boolean and
            broadcastable to it (True = keep). It must give zero wherever ``keep`` is False or the score is minus
            infinity.
        parameters: tensors passed on whole; gradients flow to those that require one.
        q, k, v, bias, dropout_p, causal, window, scale, softcap: as for :func:`attention`.
        mask: as for :func:`attention`; the values of an additive mask are added to the scores.

    Returns:
        ``[B, H, Nq, Dv]`` in v's type.

    Raises:
        ValueError, TypeError: as :func:`attention`.
    """
    check_arguments(q, k, v, None, None, mask, bias, None, dropout_p, causal, window, softcap)
    options = Options(*_options(q, dropout_p, causal, window, scale, softcap))
    seed = dropout_seed(dropout_p)
    return _RowwiseAttention.apply(row_function, options, seed, q, k, v, mask, bias, *parameters)


def _options(
    q: Tensor, dropout_p: float, causal: bool, window: int | None, scale: float | None, softcap: float | None
) -> tuple[float, bool, int, float, float]:
    """The plain numbers of a call: (dropout_p, causal, window or -1, scale, softcap or 0)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    window = -1 if window is None else min(window, LARGEST_WINDOW)
    return dropout_p, causal, window, scale, 0.0 if softcap is None else softcap


def _attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    ts: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    affine_scale: Tensor | None,
    affine_shift: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    causal: bool,
    window: int,
    scale: float,
    softcap: float,
) -> Tensor:
    options = Options(dropout_p, causal, window, scale, softcap)
    rows = MultiMaxRows(ranges, ts, affine_scale, affine_shift, sinks, q.shape[1], computed_in(q.dtype))
    problem = Problem(q, k, v, mask, bias, seed, options, whole_heads=False, regular=rows.regular)
    return run_forward(problem, rows, _empty_output(q, v))


def _empty_output(q: Tensor, v: Tensor) -> Tensor:
    make = torch.empty if v.shape[2] else torch.zeros  # without keys there are no tiles that fill it
    return make((*q.shape[:3], v.shape[3]), dtype=v.dtype, device=v.device)


def _fake_forward(q, k, v, *rest):
    return _empty_output(q, v)


def _attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    ts: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    affine_scale: Tensor | None,
    affine_shift: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    causal: bool,
    window: int,
    scale: float,
    softcap: float,
    needed: Sequence[bool],
) -> list[Tensor]:
    inputs = (q, k, v, ranges, ts, mask, bias, affine_scale, affine_shift, sinks)
    if not q.numel() or not k.numel():
        return [
            x.new_zeros(x.shape) if wanted and x is not None else q.new_empty(0) for x, wanted in zip(inputs, needed)
        ]
    options = Options(dropout_p, causal, window, scale, softcap)
    scalars, dtype = needed[3] or needed[4], computed_in(q.dtype)
    rows = MultiMaxRows(ranges, ts, affine_scale, affine_shift, sinks, q.shape[1], dtype, scalars)
    problem = Problem(q, k, v, mask, bias, seed, options, whole_heads=False, regular=rows.regular)
    grads = run_backward(problem, rows, grad_out, bias if needed[6] else None, mask if needed[5] else None)
    found = (
        grads.q, grads.k, grads.v, rows.grad_ranges, rows.grad_ts, grads.mask, grads.bias,
        rows.grad_scale, rows.grad_shift, rows.grad_sinks,
    )  # fmt: skip
    return [fitted(*pair) if wanted else q.new_empty(0) for *pair, wanted in zip(found, inputs, needed)]


def _fake_backward(grad_out, q, k, v, ranges, ts, mask, bias, affine_scale, affine_shift, sinks, *rest):
    inputs = (q, k, v, ranges, ts, mask, bias, affine_scale, affine_shift, sinks)
    return fake_gradients(inputs, rest[-1])


def _save(ctx, inputs, output) -> None:
    tensors, ctx.options = inputs[: DIFFERENTIABLE + 1], inputs[DIFFERENTIABLE + 1 :]
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad_out: Tensor):
    refuse_second_derivative("tiled")
    needed = list(ctx.needs_input_grad[:DIFFERENTIABLE])
    grads = _backward_op(grad_out, *ctx.saved_tensors, *ctx.options, needed)
    absent = [None] * (1 + len(ctx.options))
    return *(grad if wanted else None for grad, wanted in zip(grads, needed)), *absent


_forward_op = define_operator("tiled_attention", _attention_forward, _fake_forward, "CompositeExplicitAutograd")
_backward_op = define_operator(
    "tiled_attention_backward", _attention_backward, _fake_backward, "CompositeExplicitAutograd"
)
torch.library.register_autograd("hf_multimax::tiled_attention", _differentiate, setup_context=_save, lib=LIBRARY)


class _RowwiseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, options, seed, q, k, v, mask, bias, *parameters):
        ctx.function, ctx.options = function, options
        ctx.save_for_backward(seed, q, k, v, mask, bias, *parameters)
        problem = Problem(q, k, v, mask, bias, seed, options, whole_heads=True)
        return run_forward(problem, AutogradRows(function, parameters), _empty_output(q, v))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        seed, q, k, v, mask, bias, *parameters = ctx.saved_tensors
        _, _, _, *_qkv, need_mask, need_bias = ctx.needs_input_grad[:8]
        problem = Problem(q, k, v, mask, bias, seed, ctx.options, whole_heads=True)
        rows = AutogradRows(ctx.function, parameters, ctx.needs_input_grad[8:])
        grads = run_backward(problem, rows, grad_out, bias if need_bias else None, mask if need_mask else None)
        found = (grads.q, grads.k, grads.v, grads.mask, grads.bias, *rows.grads)
        inputs = (q, k, v, mask, bias, *parameters)
        return None, None, None, *(None if g is None else g.to(x.dtype) for g, x in zip(found, inputs))
