"""MultiMax attention on CPUs in C++: compiled at first use, cached, and faster than PyTorch's own SoftMax attention.

``native.cpp`` is plain C++ with OpenMP behind a C interface, so that compiling it takes seconds and needs a compiler
only. Its threads are those of PyTorch's OpenMP runtime.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_multimax.attention.call import Call, seeded
from hf_multimax.attention.native.conditions import unseen, unsupported_tensors
from hf_multimax.attention.native.packed import Packed, dense_rows
from hf_multimax.attention.native.rows import rowwise_attention, rowwise_unsupported
from hf_multimax.attention.operators import define_backward, define_forward, fitted, gradients, keep, register_gradient
from hf_multimax.extension.library import load

__all__ = ["attention", "available", "reason", "rowwise_attention", "rowwise_unsupported", "unsupported"]

MAX_ORDER = 16
#: query rows of a forward block, each of which packs the keys anew, and the step that fills register tiles
ROW_BLOCK, SMALLEST_ROW_BLOCK, ROW_STEP = 1024, 16, 24
#: keys below which splitting them over threads costs more than it gains
SMALLEST_SPLIT = 256


def attention(call: Call) -> Tensor:
    """The call, computed in float32 for float32, bfloat16 and float16 storage; scores exist in blocks only.

    Raises:
        RuntimeError: if the extension could not be built; the text says why.
    """
    call = seeded(call)
    direct = unseen(call.q, call.k, call.v)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in call.differentiable):
        return _Attention.apply(*call) if direct else _training_op(*call)[0]
    return _inference(*call) if direct else _inference_op(*call)


def unsupported(call: Call) -> str | None:
    """The first feature of this call that the backend lacks, None where it has them all."""
    missing = unsupported_tensors(call)
    return f"orders above {MAX_ORDER}" if missing is None and call.ranges.shape[-1] > 2 * MAX_ORDER else missing


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


def _inference(*arguments: Any) -> Tensor:
    call = Call(*arguments)
    out = _output(call)
    _run_forward(Packed(call), out, None, None)
    return out


def _training(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = Call(*arguments)
    out, out32, stats = _outputs(call)
    _run_forward(Packed(call), out, out32 if out32.numel() else None, stats)
    return out, out32, stats


def _run_forward(packed: Packed, out: Tensor, out32: Tensor | None, stats: Tensor | None) -> None:
    """Compute the result and, where given, its float32 copy and the rows' statistics."""
    if not out.numel():
        return
    row_block, splits = _forward_split(packed.batch, packed.heads, packed.rows, packed.keys, packed.threads)
    packed.set(row_block=row_block, splits=splits)
    packed.views(out=out)
    if splits > 1:
        partial = out.new_empty((splits, *out.shape), dtype=torch.float32)
        partial_stats = out.new_empty((3, splits, *out.shape[:3]), dtype=torch.float32)
        packed.pointers(out32=partial)
        packed.statistics(partial_stats)
        if stats is None:
            packed.set(peak=0)
        packed.run("forward")
        merged, merged_stats = _merge_splits(partial, partial_stats)
        out.copy_(merged)
        if out32 is not None:
            out32.copy_(merged)
        if stats is not None:
            stats.copy_(merged_stats)
        return
    if stats is not None:
        packed.statistics(stats)
    if out32 is not None:
        packed.pointers(out32=out32)
    packed.run("forward")


def _output(call: Call) -> Tensor:
    return call.v.new_empty((*call.q.shape[:3], call.v.shape[3]))


def _outputs(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """(result, its float32 copy or nothing, ``[3, B, H, Nq]`` statistics of every row).

    The copy is there because a rounded result would spoil the gradients of the scalars.
    """
    out = _output(call)
    copy = out.shape if out.dtype != torch.float32 else (0,)
    stats = (3, *out.shape[:3])
    return out, *(torch.empty(shape, dtype=torch.float32, device=out.device) for shape in (copy, stats))


def _compute_gradients(
    grad_out: Tensor, out32: Tensor, stats: Tensor, call: Call, needed: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of a call's differentiable tensors, None for those that need none."""
    q, k, v, bias = call.q, call.k, call.v, call.bias
    if not grad_out.numel() or not k.numel():
        return fitted([x if x is None else torch.zeros_like(x) for x in call.differentiable], call, needed)
    wanted = dict(zip(Call._fields, needed))
    packed = Packed(call)
    splits = _backward_splits(q, k, bias if wanted["bias"] else None, packed.threads)
    packed.set(splits=splits)
    # what is not wanted, as in the first layer of a frozen model, costs no product
    shape = q.shape if splits == 1 else (splits, *q.shape)
    grad_q = q.new_zeros(shape, dtype=torch.float32) if wanted["q"] else None
    grad_k, grad_v = (x.new_empty(x.shape) if wanted[name] else None for name, x in (("k", k), ("v", v)))
    delta = q.new_empty(q.shape[:3], dtype=torch.float32)
    packed.views(grad_out=dense_rows(grad_out))
    packed.views(**{name: x for name, x in (("grad_k", grad_k), ("grad_v", grad_v)) if x is not None})
    packed.pointers(out32=out32, delta=delta)
    if grad_q is not None:
        packed.pointers(grad_q=grad_q)
    packed.statistics(stats)
    grad_ranges = grad_ts = grad_affine = grad_bias = None
    if wanted["ranges"] or wanted["ts"] or wanted["affine_scale"] or wanted["affine_shift"]:
        grad_ranges, grad_ts, grad_affine = packed.scalar_gradients()
    if wanted["bias"] and bias is not None:
        grad_bias = bias.new_zeros(bias.shape, dtype=torch.float32)
        packed.grad_bias(grad_bias)
    packed.run("backward")
    grad_scale, grad_shift = (None, None) if grad_affine is None else grad_affine.unbind(-1)
    found = (
        grad_q, grad_k, grad_v, grad_ranges, grad_ts, None, grad_bias, grad_scale,
        grad_shift, _sink_gradient(call.sinks, stats, delta),
    )  # fmt: skip
    return fitted(found, call, needed)


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


def _saved(output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    out, out32, stats = output
    return out32 if out32.numel() else out, stats


class _Attention(torch.autograd.Function):
    """The training operator without the dispatcher, whose share of a short call is as large as the work itself."""

    @staticmethod
    def forward(ctx, *call):
        output = _training(*call)
        keep(ctx, Call(*call), _saved(output))
        return output[0]

    @staticmethod
    def backward(ctx, grad_out):
        return gradients(ctx, "native", grad_out, _compute_gradients)


_inference_op = define_forward("native_attention", "Tensor", _inference, lambda *call: _output(Call(*call)), "CPU")
_training_op = define_forward(
    "native_attention_training", "(Tensor, Tensor, Tensor)", _training, lambda *call: _outputs(Call(*call)), "CPU"
)
_backward_op = define_backward("native_attention_backward", ["grad_out", "out32", "stats"], _compute_gradients, "CPU")
register_gradient("native_attention_training", "native", lambda call, output: _saved(output), _backward_op)
