"""MultiMax attention on GPUs, in Triton: flash attention with the modulator between the scores and the softmax.

Memory is linear in the sequence length, nothing is accumulated atomically, so results are bitwise reproducible. Masks
and biases are read through their strides and never expanded. Triton itself is imported at the first call.

``TRITON_INTERPRET=1``, set before the import, runs everything on CPU tensors in Triton's interpreter (slowly).
"""

import importlib.util
import os

import torch
from torch import Tensor

from hf_multimax.attention.arguments import Affine, check_arguments
from hf_multimax.attention.context import refuse_second_derivative

__all__ = ["attention", "unsupported", "varlen_attention"]

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_HEAD_DIM = 256


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
    """MultiMax attention (paper, section 4): ``dropout(softmax(sigma(softcap(q k^T scale) + bias), mask)) v``.

    Args:
        q: ``[B, H, Nq, D]``, float32, bfloat16 or float16, any strides; D and Dv at most 256.
        k, v: ``[B, Hkv, Nk, D]`` and ``[B, Hkv, Nk, Dv]``, of q's type; H is a multiple of Hkv.
        ranges, ts: the modulator, ``[2N]`` or ``[H, 2N]``.
        mask: boolean (True = keep) or additive, broadcastable to ``[B, H, Nq, Nk]``; it acts after sigma.
        bias: floating, broadcastable to ``[B, H, Nq, Nk]``; added before sigma, differentiable.
        affine: ``(scale, shift)``, each a scalar or ``[H]``: sigma acts on ``scale * score + shift``.
        dropout_p: probability of dropping an attention weight; the mask is drawn again, not stored, in backward.
        causal: query i sees keys up to ``i + Nk - Nq``.
        window: with ``causal`` a query sees its last ``window`` keys, without it keys nearer than ``window``.
        scale: factor of ``q k^T``, by default ``D ** -0.5``.
        softcap: ``c * tanh(score / c)`` before the bias.
        sinks: ``[H]`` extra logits, not modulated, that join the softmax's denominator only.

    Returns:
        ``[B, H, Nq, Dv]`` in v's type; zeros in rows that attend to nothing. In half precision without a bias, a row
        with a score that is infinite, as q or k must then be, is NaN.

    Raises:
        ValueError: for shapes that do not fit, ``causal`` or ``window`` with Nq > Nk, or what :func:`unsupported`
            names.
        TypeError: for types that do not fit.
    """
    _refuse(unsupported(q, k, v, ranges, ts, mask=mask))
    check_arguments(q, k, v, ranges, ts, mask, bias, affine, dropout_p, causal, window, softcap, sinks)
    return _call(q, k, v, ranges, ts, mask, bias, affine, dropout_p, causal, window, scale, softcap, sinks)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    ts: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    affine: Affine | None = None,
    dropout_p: float = 0.0,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """:func:`attention` within each of several sequences packed along one dimension, without padding.

    Args:
        q: ``[Tq, H, D]``; k, v: ``[Tk, Hkv, D]`` and ``[Tk, Hkv, Dv]``: the tokens of all sequences, one after another.
        cu_seqlens_q, cu_seqlens_k: ``[sequences + 1]`` int32 or int64, where each sequence starts, and the end.
        max_seqlen_q, max_seqlen_k: at least the length of the longest sequence. What is longer is not noticed, as this
            would wait for the device, and gets wrong outputs and gradients.
        others: as for :func:`attention`. A causal sequence with more queries than keys gives its first rows nothing.

    Returns:
        ``[Tq, H, Dv]`` in v's type; zeros for tokens past the last sequence.

    Raises:
        ValueError: for shapes that do not fit, or what :func:`unsupported` names.
    """
    if any(t.ndim != 3 for t in (q, k, v)):
        raise ValueError(
            f"packed q, k, v must be [tokens, heads, dim], got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if cu_seqlens_q.ndim != 1 or cu_seqlens_q.shape != cu_seqlens_k.shape or cu_seqlens_q.numel() < 1:
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must both be [sequences + 1], "
            f"got {list(cu_seqlens_q.shape)} and {list(cu_seqlens_k.shape)}"
        )
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
    _refuse(unsupported(q, k, v, ranges, ts))
    check_arguments(q, k, v, ranges, ts, None, None, affine, dropout_p, softcap=softcap, sinks=sinks)
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    packing = (cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), max_seqlen_q, max_seqlen_k)
    out = _call(
        q, k, v, ranges, ts, None, None, affine, dropout_p, causal, window, scale, softcap, sinks, packing=packing
    )
    return out.squeeze(0).transpose(0, 1)


def unsupported(
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
) -> str | None:
    """The first feature of a call of :func:`attention` that this backend cannot do, as a short phrase; else None."""
    device = q.device.type
    if device == "cpu" and not _INTERPRETED:
        return "CPU tensors"
    if device not in ("cpu", "cuda", "meta"):
        return f"{device} tensors"
    if device != "meta" and not _HAS_TRITON:
        return "no Triton installation"
    if q.dtype not in _DTYPES:
        return f"{str(q.dtype).removeprefix('torch.')} tensors"
    if k.dtype != q.dtype or v.dtype != q.dtype:
        return "q, k and v of different types"
    if max(q.shape[-1], v.shape[-1]) > _MAX_HEAD_DIM:
        return f"head dimensions above {_MAX_HEAD_DIM}"
    # asked without gradients too: a forward pass under no_grad may be a checkpointed one, whose choice must not change
    if mask is not None and mask.requires_grad:
        return "a gradient for the mask"
    return None


def _refuse(feature: str | None) -> None:
    if feature is not None:
        raise ValueError(
            f'the triton backend does not support {feature}; use backend("auto") or backend("tiled") for this call'
        )


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    ts: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    affine: Affine | None,
    dropout_p: float,
    causal: bool,
    window: int | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    packing: tuple[Tensor | None, Tensor | None, int, int] | None = None,
) -> Tensor:
    """Draw a seed, fill in defaults and run the operator."""
    affine_scale, affine_shift = affine or (None, None)
    # A tensor, so that compiled graphs draw a new one each time and nothing waits for the device.
    seed = torch.randint(2**62, (1,), dtype=torch.int64, device=q.device) if dropout_p > 0.0 else None
    cu_q, cu_k, max_q, max_k = packing or (None, None, q.shape[2], k.shape[2])
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    differentiable = (q, k, v, ranges, ts, affine_scale, affine_shift, sinks, bias)
    train = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable)
    out, *_ = _forward(
        q,
        k,
        v,
        ranges.contiguous(),
        ts.contiguous(),
        affine_scale,
        affine_shift,
        None if sinks is None else sinks.contiguous(),
        mask,
        bias,
        seed,
        cu_q,
        cu_k,
        max_q,
        max_k,
        dropout_p,
        causal,
        window,
        scale,
        softcap,
        train,
    )
    return out


# --- operators ---------------------------------------------------------------------------------------------------


def _outputs(q: Tensor, v: Tensor, train: bool, zeros: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Buffers for the output, the rows' norms (two numbers per row in float32, else one) and what rounding cut off.

    The output is laid out as ``[B, Nq, H, Dv]``, so that merging the heads is a view. The backward pass wants the
    output in twice half precision: :func:`~hf_multimax.attention.triton.backward.dq_kernel` says why.
    """
    batch, heads, n_rows, _ = q.shape
    single = q.dtype == torch.float32
    make = torch.zeros if zeros else torch.empty
    o = make(batch, n_rows, heads, v.shape[-1], dtype=v.dtype, device=v.device).transpose(1, 2)
    norms = make(2 if single else 1, batch, heads, n_rows, dtype=torch.float32, device=q.device)
    return o, norms, o.new_empty(0) if single or not train else torch.zeros_like(o) if zeros else torch.empty_like(o)


def _problem(*arguments):
    """The launch module, imported at the first call because it needs Triton, and the call as it sees it."""
    from hf_multimax.attention.triton import launch as triton_launch

    return triton_launch, triton_launch.Problem(*arguments)


@torch.library.custom_op("hf_multimax::triton_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    ts: Tensor,
    affine_scale: Tensor | None,
    affine_shift: Tensor | None,
    sinks: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    causal: bool,
    window: int | None,
    scale: float,
    softcap: float | None,
    train: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, norms and what rounding the output cut off; the last is empty in float32 and unless ``train``."""
    launch, problem = _problem(
        q, k, v, ranges, ts, affine_scale, affine_shift, sinks, mask, bias, seed, cu_q, cu_k, max_q, max_k, dropout_p,
        causal, window, scale, softcap,
    )  # fmt: skip
    o, norms, residual = _outputs(q, v, train, zeros=cu_q is not None)
    launch.forward(problem, o, residual if residual.numel() else None, norms)
    return o, norms, residual


@_forward.register_fake
def _(q, k, v, *others):
    return _outputs(q, v, train=others[-1])


@torch.library.custom_op("hf_multimax::triton_attention_backward", mutates_args=())
def _backward(
    do: Tensor,
    o: Tensor,
    norms: Tensor,
    residual: Tensor,
    needs: list[bool],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    ts: Tensor,
    affine_scale: Tensor | None,
    affine_shift: Tensor | None,
    sinks: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    causal: bool,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> list[Tensor]:
    """Gradients of q, k, v, ranges, ts, affine_scale, affine_shift, sinks and bias; empty where not needed."""
    launch, problem = _problem(
        q, k, v, ranges, ts, affine_scale, affine_shift, sinks, mask, bias, seed, cu_q, cu_k, max_q, max_k, dropout_p,
        causal, window, scale, softcap,
    )  # fmt: skip
    return launch.backward(problem, do, o, residual if residual.numel() else None, norms, needs)


@_backward.register_fake
def _(do, o, norms, residual, needs, q, k, v, ranges, ts, affine_scale, affine_shift, sinks, mask, bias, *others):
    inputs = (q, k, v, ranges, ts, affine_scale, affine_shift, sinks, bias)
    return [_gradient_buffer(x) if need else q.new_empty(0) for x, need in zip(inputs, needs)]


def _gradient_buffer(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


#: number of leading tensor arguments of the operator, and which of them are differentiable
_TENSORS = 13
_DIFFERENTIABLE = (0, 1, 2, 3, 4, 5, 6, 7, 9)


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *inputs[:_TENSORS])
    ctx.options = inputs[_TENSORS:-1]


def _differentiate(ctx, do: Tensor | None, *_: Tensor | None):
    refuse_second_derivative("triton")
    o, norms, residual, *tensors = ctx.saved_tensors
    nothing = [None] * (_TENSORS + len(ctx.options) + 1)
    needs = [ctx.needs_input_grad[i] for i in _DIFFERENTIABLE]
    if do is None or not any(needs):
        return tuple(nothing)
    found = _backward(do, o, norms, residual, needs, *tensors, *ctx.options)
    for i, need, gradient in zip(_DIFFERENTIABLE, needs, found):
        nothing[i] = gradient if need else None
    return tuple(nothing)


_forward.register_autograd(_differentiate, setup_context=_save)
