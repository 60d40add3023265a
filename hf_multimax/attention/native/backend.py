"""MultiMax attention on CPUs in C++: compiled at first use, cached, and faster than PyTorch's own SoftMax attention.

``native.cpp`` is plain C++ with OpenMP behind a C interface, so that compiling it takes seconds and needs a compiler
only. Its threads are those of PyTorch's OpenMP runtime.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_multimax.attention.arguments import LARGEST_WINDOW, Affine, check_arguments, dropout_seed
from hf_multimax.attention.context import refuse_second_derivative
from hf_multimax.attention.native.call import TYPES, Call, dense_rows
from hf_multimax.attention.operators import DIFFERENTIABLE, LIBRARY, define_operator, fake_gradients, fitted
from hf_multimax.extension.library import load

__all__ = ["attention", "available", "reason", "unsupported"]

MAX_ORDER = 16
#: query rows of a forward block, each of which packs the keys anew, and the step that fills register tiles
ROW_BLOCK, SMALLEST_ROW_BLOCK, ROW_STEP = 240, 16, 24
#: keys below which splitting them over threads costs more than it gains
SMALLEST_SPLIT = 256


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
    """MultiMax attention on a CPU; arguments and result as for :func:`hf_multimax.attention.tiled.backend.attention`.

    Computes in float32 for float32, bfloat16 and float16 storage. Scores exist in blocks only.

    Raises:
        ValueError, TypeError: as ``tiled.attention``; ValueError for a feature that :func:`unsupported` names.
        RuntimeError: if the extension could not be built; the text says why.
    """
    check_arguments(q, k, v, ranges, ts, mask, bias, affine, dropout_p, causal, window, softcap, sinks)
    missing = unsupported(q, k, v, ranges, ts, mask=mask, bias=bias)
    if missing:
        raise ValueError(f"the native backend does not support {missing}; use backend('tiled') or backend('auto')")
    affine_scale, affine_shift = affine or (None, None)
    tensors = (q, k, v, ranges, ts, mask, bias, affine_scale, affine_shift, sinks)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    window, softcap = -1 if window is None else min(window, LARGEST_WINDOW), 0.0 if softcap is None else softcap
    seed = dropout_seed(dropout_p)
    arguments = (*tensors, seed, dropout_p, causal, window, scale, softcap)
    unseen = _unseen(q, k, v)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return _Attention.apply(*arguments) if unseen else _training_op(*arguments)[0]
    return _inference(*arguments) if unseen else _inference_op(*arguments)


def _unseen(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether nothing traces, transforms or intercepts operators, so that dispatching them would be time lost.

    Dispatching also writes out tensors that are kept as their negatives.
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or type(q) not in (Tensor, torch.nn.Parameter)
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or q.is_neg()
        or k.is_neg()
        or v.is_neg()
    )


def unsupported(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    ts: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    **features: object,
) -> str | None:
    """The first feature of this call that the backend lacks, None where it has them all."""
    if not q.is_cpu:
        return f"tensors on {q.device.type}"
    if q.dtype not in TYPES:
        return f"{q.dtype} inputs"
    if ranges.shape[-1] > 2 * MAX_ORDER:
        return f"orders above {MAX_ORDER}"
    if mask is not None and mask.dtype not in TYPES:
        return f"a mask of type {mask.dtype}"
    if bias is not None and bias.dtype not in TYPES:
        return f"a bias of type {bias.dtype}"
    # asked without gradients too: a forward pass under no_grad may be a checkpointed one, whose choice must not change
    if mask is not None and mask.requires_grad:
        return "a gradient for the mask"
    if bias is not None and bias.requires_grad and bias.shape[-1:] != k.shape[2:3]:
        return "a gradient for a bias that is broadcast over the keys"
    return None


def available() -> bool:
    """Whether the extension is built and loaded; builds it at the first call."""
    return load()[0] is not None


def reason() -> str:
    """Why :func:`available` is False; empty where it is True."""
    return load()[1]


def _forward_split(batch: int, heads: int, rows: int, keys: int, threads: int) -> tuple[int, int]:
    """(rows of a block, key splits) that give every thread work: smaller blocks first, then splits of the keys."""
    blocks = max(1, -(-rows // ROW_BLOCK))
    while threads > 1 and batch * heads * blocks < 2 * threads and -(-rows // blocks) > 2 * SMALLEST_ROW_BLOCK:
        blocks *= 2
    items = batch * heads * blocks
    splits = 1
    if items < threads:
        splits = max(1, min(-(-threads // items), keys // SMALLEST_SPLIT))
    row_block = -(-rows // blocks)
    return row_block + -row_block % ROW_STEP if row_block > ROW_STEP else max(row_block, 1), splits


def _merge_splits(partial: Tensor, stats: Tensor) -> tuple[Tensor, Tensor]:
    """Join the outputs ``[splits, ..., Dv]`` of disjoint keys by their statistics ``[3, splits, ...]``."""
    tops, totals, peaks = stats
    top, best = tops.max(0, keepdim=True)
    weights = totals * (tops - top).exp().masked_fill_(totals == 0, 0.0)
    total = weights.sum(0)
    shares = (weights / total).masked_fill_(total == 0, 0.0)
    return (partial * shares.unsqueeze(-1)).sum(0), torch.stack((top[0], total, peaks.gather(0, best)[0]))


def _inference(
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
    out = v.new_empty((*q.shape[:3], v.shape[3]))
    call = Call(q, k, v, ranges, ts)
    call.features(mask, bias, affine_scale, affine_shift, sinks, seed, dropout_p, causal, window, scale, softcap)
    _run_forward(call, out, None, None)
    return out


def _training(
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
) -> tuple[Tensor, Tensor, Tensor]:
    out, out32, stats = _outputs(q, v)
    call = Call(q, k, v, ranges, ts)
    call.features(mask, bias, affine_scale, affine_shift, sinks, seed, dropout_p, causal, window, scale, softcap)
    _run_forward(call, out, out32 if out32.numel() else None, stats)
    return out, out32, stats


def _run_forward(call: Call, out: Tensor, out32: Tensor | None, stats: Tensor | None) -> None:
    """Compute the result and, where given, its float32 copy and the rows' statistics."""
    if not out.numel():
        return
    row_block, splits = _forward_split(call.batch, call.heads, call.rows, call.keys, call.threads)
    call.set(row_block=row_block, splits=splits)
    call.views(out=out)
    if splits > 1:
        partial = out.new_empty((splits, *out.shape), dtype=torch.float32)
        partial_stats = out.new_empty((3, splits, *out.shape[:3]), dtype=torch.float32)
        call.pointers(out32=partial)
        call.statistics(partial_stats)
        if stats is None:
            call.set(peak=0)
        call.run("forward")
        merged, merged_stats = _merge_splits(partial, partial_stats)
        out.copy_(merged)
        if out32 is not None:
            out32.copy_(merged)
        if stats is not None:
            stats.copy_(merged_stats)
        return
    if stats is not None:
        call.statistics(stats)
    if out32 is not None:
        call.pointers(out32=out32)
    call.run("forward")


def _outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(result, its float32 copy or nothing, ``[3, B, H, Nq]`` statistics of every row).

    The copy is there because a rounded result would spoil the gradients of the scalars.
    """
    shape = (*q.shape[:3], v.shape[3])
    copy = shape if v.dtype != torch.float32 else (0,)
    return (
        torch.empty(shape, dtype=v.dtype, device=v.device),
        torch.empty(copy, dtype=torch.float32, device=v.device),
        torch.empty((3, *q.shape[:3]), dtype=torch.float32, device=v.device),
    )


def _fake_inference(q, k, v, *rest):
    return v.new_empty((*q.shape[:3], v.shape[3]))


def _fake_training(q, k, v, *rest):
    return _outputs(q, v)


def _compute_gradients(
    grad_out: Tensor,
    out32: Tensor,
    stats: Tensor,
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
) -> list[Tensor | None]:
    """The gradients of the operators' differentiable arguments, None for those that need none."""
    inputs = (q, k, v, ranges, ts, mask, bias, affine_scale, affine_shift, sinks)
    if not grad_out.numel() or not k.numel():
        return [torch.zeros_like(x) if wanted and x is not None else None for x, wanted in zip(inputs, needed)]
    call = Call(q, k, v, ranges, ts)
    call.features(mask, bias, affine_scale, affine_shift, sinks, seed, dropout_p, causal, window, scale, softcap)
    splits = _backward_splits(q, k, bias if needed[6] else None, call.threads)
    call.set(splits=splits)
    grad_q = q.new_zeros(q.shape if splits == 1 else (splits, *q.shape), dtype=torch.float32)
    grad_k, grad_v = k.new_empty(k.shape), v.new_empty(v.shape)
    delta = q.new_empty(q.shape[:3], dtype=torch.float32)
    call.views(grad_out=dense_rows(grad_out), grad_k=grad_k, grad_v=grad_v)
    call.pointers(out32=out32, delta=delta, grad_q=grad_q)
    call.statistics(stats)
    grad_ranges = grad_ts = grad_affine = grad_bias = None
    if needed[3] or needed[4] or needed[7] or needed[8]:
        grad_ranges, grad_ts, grad_affine = call.scalar_gradients()
    if needed[6] and bias is not None:
        grad_bias = bias.new_zeros(bias.shape, dtype=torch.float32)
        call.grad_bias(grad_bias)
    call.run("backward")
    # apart, as what an operator returns must not share memory
    grad_scale, grad_shift = (None, None) if grad_affine is None else (x.clone() for x in grad_affine.unbind(-1))
    found = (
        grad_q if splits == 1 else grad_q.sum(0), grad_k, grad_v, grad_ranges, grad_ts, None, grad_bias, grad_scale,
        grad_shift, _sink_gradient(sinks, stats, delta),
    )  # fmt: skip
    return [fitted(grad, x) if wanted and x is not None else None for grad, x, wanted in zip(found, inputs, needed)]


def _backward(
    grad_out: Tensor,
    out32: Tensor,
    stats: Tensor,
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
    found = _compute_gradients(
        grad_out, out32, stats, q, k, v, ranges, ts, mask, bias, affine_scale, affine_shift, sinks, seed, dropout_p,
        causal, window, scale, softcap, needed,
    )  # fmt: skip
    return [q.new_empty(0) if grad is None else grad for grad in found]


def _backward_splits(q: Tensor, k: Tensor, bias: Tensor | None, threads: int) -> int:
    """Key splits that give every thread work where heads are few; each costs one more copy of q's gradient."""
    items = q.shape[0] * k.shape[1]
    if bias is not None:  # heads that share a bias entry go to one thread
        shape = (1,) * (4 - bias.ndim) + bias.shape
        items = (q.shape[0] if shape[0] > 1 else 1) * (k.shape[1] if shape[1] > 1 else 1)
    if threads == 1 or items >= 2 * threads:
        return 1
    return max(1, min(-(-2 * threads // items), k.shape[2] // 64))


def _sink_gradient(sinks: Tensor | None, stats: Tensor, delta: Tensor) -> Tensor | None:
    """A sink's share of every row, ``exp(sink - top) / total``, takes ``-delta``."""
    if sinks is None:
        return None
    top, total, _ = stats.double()
    share = ((sinks.double()[:, None] - top).exp() / total).masked_fill_(total == 0, 0.0)
    return -(share * delta).sum((0, 2))


def _fake_backward(grad_out, out32, stats, *rest):
    return fake_gradients(rest[:DIFFERENTIABLE], rest[-1])


def _save(ctx, inputs, output) -> None:
    tensors, ctx.options = inputs[: DIFFERENTIABLE + 1], inputs[DIFFERENTIABLE + 1 :]
    out, out32, stats = output
    ctx.save_for_backward(out32 if out32.numel() else out, stats, *tensors)


def _differentiate(ctx, grad_out: Tensor, _grad_out32: Tensor, _grad_stats: Tensor):
    refuse_second_derivative("native")
    return _gradients(ctx, grad_out, _backward_op)


def _gradients(ctx, grad_out: Tensor, backward: Callable[..., Sequence[Tensor | None]]) -> tuple[Tensor | None, ...]:
    needed = list(ctx.needs_input_grad[:DIFFERENTIABLE])
    grads = backward(grad_out, *ctx.saved_tensors, *ctx.options, needed)
    absent = [None] * (1 + len(ctx.options))
    return *(grad if wanted else None for grad, wanted in zip(grads, needed)), *absent


class _Attention(torch.autograd.Function):
    """The training operator without the dispatcher, whose share of a short call is as large as the work itself."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _training(*inputs)
        _save(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx, grad_out):
        refuse_second_derivative("native")
        return _gradients(ctx, grad_out, _compute_gradients)


_inference_op = define_operator("native_attention", _inference, _fake_inference, "CPU")
_training_op = define_operator("native_attention_training", _training, _fake_training, "CPU")
_backward_op = define_operator("native_attention_backward", _backward, _fake_backward, "CPU")
torch.library.register_autograd(
    "hf_multimax::native_attention_training", _differentiate, setup_context=_save, lib=LIBRARY
)
