"""Linear layer, output modulation and cross-entropy in one operator that never holds ``[tokens, vocab]``.

``loss = CE(sigma(softcap(hidden @ weight.T + bias)), labels)`` is computed in chunks of tokens. Where the reduction is
a sum, every gradient is known up to one factor as soon as a chunk's probabilities are: the forward pass computes them
all and the backward pass only multiplies by that factor. With ``reduction="none"`` the factors differ by row, so the
backward pass computes the chunks again.

Operators: ``hf_multimax::linear_cross_entropy`` (sum), ``..._rows`` and ``..._rows_backward`` (one loss per token).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from torch import Tensor

from .modulation import TileModulation, sigma_slopes

__all__ = ["multimax_linear_cross_entropy"]

#: bytes of the largest buffer, one chunk of logits; a quarter of the tokens is the other bound
WORKSPACE_BYTES = 128 * 2**20
#: elements of a tile, the part of a chunk whose modulation stays in the cache of a CPU; larger elsewhere
CPU_TILE, DEVICE_TILE = 2**17, 2**22

Affine = tuple[Tensor, Tensor]

#: inputs that can have a gradient, and their place among the operators' arguments
SOURCES = {"hidden": 0, "weight": 1, "ranges": 3, "ts": 4, "bias": 5, "scale": 6, "shift": 7}


def multimax_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ranges: Tensor | None,
    ts: Tensor | None,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    num_items_in_batch: int | Tensor | None = None,
    affine: Affine | None = None,
    softcap: float | None = None,
    chunk_size: int | None = None,
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
        TypeError: for arguments of the wrong type.
    """
    _check_tensors(hidden, weight, labels, bias)
    _check_modulator(ranges, ts, affine)
    _check_options(ignore_index, label_smoothing, reduction, num_items_in_batch, softcap, chunk_size)
    inputs = (hidden, weight, labels, ranges, ts, bias, *(affine or (None, None)))
    options = (ignore_index, float(label_smoothing), softcap, chunk_size, _matmul_dtype(hidden, weight))
    if reduction == "none":
        losses = linear_cross_entropy_rows(*inputs, *options)
        return losses if num_items_in_batch is None else losses / _on(losses.device, num_items_in_batch)
    recorded = torch.is_grad_enabled()
    wanted = [recorded and inputs[i] is not None and inputs[i].requires_grad for i in SOURCES.values()]
    total = linear_cross_entropy(*inputs, *options, wanted)[0]
    if num_items_in_batch is not None:
        return total / _on(total.device, num_items_in_batch)
    if reduction == "sum":
        return total
    count = (labels != ignore_index).sum()
    # where, not 0 / 0: the gradients are zero then, as torch's are
    return torch.where(count > 0, total / count.clamp_min(1), float("nan"))


# -- checks ------------------------------------------------------------------------------------------------------------


def _check_tensors(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    for name, tensor, ndim, shape in (
        ("hidden", hidden, 2, "[tokens, d]"),
        ("weight", weight, 2, "[vocab, d]"),
        ("labels", labels, 1, "[tokens]"),
        ("bias", bias, 1, "[vocab]"),
    ):
        if tensor is None and name == "bias":
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor {shape}, got {type(tensor).__name__}")
        if tensor.ndim != ndim:
            raise ValueError(
                f"{name} must be {shape}, got shape {list(tensor.shape)}; flatten leading dimensions first"
            )
        if name == "labels" and tensor.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"labels must be int64 or int32 class numbers, got {tensor.dtype}")
        if name != "labels" and tensor.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, hidden on {hidden.device}; move them to one device")
    if weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"weight must be [vocab, {hidden.shape[1]}] to fit hidden {list(hidden.shape)}, got {list(weight.shape)}"
        )
    if weight.shape[0] == 0:
        raise ValueError("weight must have at least one row (class), got 0")
    if labels.shape[0] != hidden.shape[0]:
        raise ValueError(f"labels must have one entry per token: {hidden.shape[0]} tokens, {labels.shape[0]} labels")
    if bias is not None and bias.shape[0] != weight.shape[0]:
        raise ValueError(f"bias must have one entry per row of weight ({weight.shape[0]}), got {bias.shape[0]}")


def _check_modulator(ranges: Tensor | None, ts: Tensor | None, affine: Affine | None) -> None:
    if (ranges is None) != (ts is None):
        missing, given = ("ranges", "ts") if ranges is None else ("ts", "ranges")
        raise ValueError(f"{given} given without {missing}: give both, or neither for SoftMax")
    if affine is not None and (not isinstance(affine, tuple | list) or len(affine) != 2):
        raise TypeError("affine must be a pair (scale, shift) of scalar tensors")
    if affine is not None and ranges is None:
        raise ValueError("affine acts in front of the modulator: give ranges and ts too")
    named = {"ranges": ranges, "ts": ts, **dict(zip(("affine scale", "affine shift"), affine or ()))}
    for name, tensor in named.items():
        if tensor is not None and (not isinstance(tensor, Tensor) or not tensor.is_floating_point()):
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a floating tensor, got {kind}")
        if name.startswith("affine") and tensor.numel() != 1:
            raise ValueError(f"{name} must be a scalar, got shape {list(tensor.shape)}")
    if ranges is not None and (
        ranges.shape != ts.shape or ranges.ndim != 1 or not ranges.numel() or ranges.numel() % 2
    ):
        raise ValueError(f"ranges and ts must both be [2N], N >= 1, got {list(ranges.shape)} and {list(ts.shape)}")


def _check_options(
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    num_items_in_batch: int | Tensor | None,
    softcap: float | None,
    chunk_size: int | None,
) -> None:
    if not _is_integer(ignore_index):
        raise TypeError(f"ignore_index must be an integer, got {ignore_index!r}")
    if not _is_number(label_smoothing):
        raise TypeError(f"label_smoothing must be a number, got {label_smoothing!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    if isinstance(num_items_in_batch, Tensor):
        if num_items_in_batch.numel() != 1:
            raise ValueError(f"num_items_in_batch must be a scalar, got shape {list(num_items_in_batch.shape)}")
    elif num_items_in_batch is not None and not _is_number(num_items_in_batch):
        raise TypeError(f"num_items_in_batch must be a number or a scalar tensor, got {num_items_in_batch!r}")
    if softcap is not None and not _is_number(softcap):
        raise TypeError(f"softcap must be a number or None, got {softcap!r}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}")
    if chunk_size is not None and not _is_integer(chunk_size):
        raise TypeError(f"chunk_size must be an integer or None, got {chunk_size!r}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_integer(value) or isinstance(value, float)


def _matmul_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The type of the matrix products: autocast's where it acts, else that of ``hidden`` and ``weight``."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(kind)
    if hidden.dtype != weight.dtype:
        raise TypeError(f"weight must have hidden's dtype {hidden.dtype}, got {weight.dtype}; cast one or use autocast")
    return hidden.dtype


def _on(device: torch.device, count: int | Tensor) -> int | Tensor:
    return count.detach().to(device).reshape(()) if isinstance(count, Tensor) else count


# -- the computation ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Problem:
    """The tensors and options of one call, in the order of the operators' arguments."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    ranges: Tensor | None
    ts: Tensor | None
    bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    ignore_index: int
    label_smoothing: float
    softcap: float | None
    chunk_size: int | None
    dtype: torch.dtype  # that hidden and weight are rounded to

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def factor_dtype(self) -> torch.dtype:
        """The type that matrix products get their factors in.

        Few CPUs multiply 16-bit numbers faster than float32 (on others the one against W can take 100 times longer),
        and only CUDA keeps such a product in float32.
        """
        return self.dtype if self.hidden.is_cuda else self.compute_dtype

    @property
    def vocab(self) -> int:
        return self.weight.shape[0]

    def prepared(self) -> "_Problem":
        """With every tensor but ``hidden``, which is converted by chunk, in the type that it is computed in."""
        small = {name: getattr(self, name) for name in ("ranges", "ts", "bias", "scale", "shift")}
        small = {name: None if x is None else x.to(self.compute_dtype).contiguous() for name, x in small.items()}
        return replace(self, weight=self.as_factor(self.weight), labels=self.labels.long(), **small)

    def as_factor(self, x: Tensor) -> Tensor:
        """``x`` rounded to ``dtype``, in the type for matrix products."""
        return x.to(self.dtype).to(self.factor_dtype)

    def chunk_rows(self) -> int:
        """Tokens per chunk: chunks of nearly equal size within the workspace and a quarter of the tokens."""
        if self.chunk_size is not None:
            return self.chunk_size
        tokens = max(1, self.hidden.shape[0])
        row_bytes = self.vocab * self.compute_dtype.itemsize
        most = max(1, min(WORKSPACE_BYTES // row_bytes, tokens // 4))
        return _ceil_div(tokens, _ceil_div(tokens, most))

    def tile_rows(self) -> int:
        """Rows per tile, such that the buffers of the modulator together stay below a quarter of all logits."""
        elements = CPU_TILE if self.hidden.device.type == "cpu" else DEVICE_TILE
        buffers = 1 if self.ts is None else 2 * self.ts.numel() + 1
        return max(1, min(self.chunk_rows(), elements // self.vocab, self.hidden.shape[0] // (4 * buffers)))


class _Gradients:
    """The gradients that are wanted of SOURCES, summed over the chunks."""

    def __init__(self, problem: _Problem, wanted: Sequence[bool]) -> None:
        self.wanted = dict(zip(SOURCES, wanted))
        self.any = any(wanted)
        self.modulator = any(self.wanted[name] for name in ("ranges", "ts"))
        self.affine = any(self.wanted[name] for name in ("scale", "shift"))
        self.logits = any(self.wanted[name] for name in ("hidden", "weight", "bias"))
        self._sums = {
            name: torch.zeros_like(getattr(problem, name), dtype=_kept_dtype(problem, name))
            for name in SOURCES
            if self.wanted[name]
        }

    def add(self, name: str, value: Tensor) -> None:
        """Add to one of them if it is wanted."""
        if self.wanted[name]:
            self._sums[name] += value.reshape(self._sums[name].shape)

    def add_chunk(self, rows: Tensor, hidden: Tensor, weight: Tensor, grad: Tensor) -> None:
        """Take ``grad``, that of a chunk's products hidden @ weight.T [rows, vocab], to hidden, weight and bias."""
        factor = grad.to(hidden.dtype)
        if self.wanted["hidden"]:
            self._sums["hidden"][rows] = torch.mm(factor, weight).to(self._sums["hidden"].dtype)
        if self.wanted["weight"]:
            _add_product(self._sums["weight"], factor.t(), hidden)
        if self.wanted["bias"]:
            self._sums["bias"] += grad.sum(0)

    def result(self, problem: _Problem) -> tuple[Tensor, ...]:
        """In the order of SOURCES; an empty tensor for one that is not wanted."""
        return tuple(self._sums[name] if self.wanted[name] else problem.hidden.new_empty(0) for name in SOURCES)


def _kept_dtype(problem: _Problem, name: str) -> torch.dtype:
    """The type that a gradient is summed in: every token has its own row of hidden's, all others are long sums."""
    if name == "hidden":
        return problem.hidden.dtype
    return problem.compute_dtype if name in ("weight", "bias") else torch.float64


def _solve(problem: _Problem, wanted: Sequence[bool], row_weights: Tensor | None = None) -> tuple[Tensor, ...]:
    """Loss of every token, then the gradients (in the order of SOURCES) of their sum, weighted by ``row_weights``."""
    gradients = _Gradients(problem, wanted)
    losses = problem.hidden.new_zeros(problem.hidden.shape[0], dtype=problem.compute_dtype)
    problem = problem.prepared()
    with torch.autocast(problem.hidden.device.type, enabled=False):
        _solve_rows(problem, gradients, losses, row_weights)
    return losses, *gradients.result(problem)


def _solve_rows(problem: _Problem, gradients: _Gradients, losses: Tensor, row_weights: Tensor | None) -> None:
    """The loop over chunks of the tokens that count, and over tiles in each."""
    kernel = _row_kernel(problem)
    rows = _counted_rows(problem) if kernel is None else _asserted_rows(problem)
    if not rows.numel():
        return
    tile = problem.tile_rows() if kernel is None else problem.chunk_rows()
    loss = _TileLoss(problem, gradients, tile) if kernel is None else _KernelLoss(problem, gradients, kernel)
    buffer = None
    for chunk in rows.split(problem.chunk_rows()):
        hidden = problem.as_factor(problem.hidden.index_select(0, chunk))
        if buffer is None:
            buffer = losses.new_empty(chunk.numel(), problem.vocab)
        logits = _product(hidden, problem.weight.t(), buffer[: chunk.numel()])
        for part, own in zip(logits.split(tile), chunk.split(tile)):
            weights = None if row_weights is None else row_weights.index_select(0, own).to(losses.dtype)
            losses.index_copy_(0, own, loss(part, problem.labels.index_select(0, own), weights))
        if gradients.logits:
            gradients.add_chunk(chunk, hidden, problem.weight, logits)
    loss.finish()


class _TileLoss:
    """The row part: a tile of products hidden @ weight.T becomes its losses and, in place, its gradient."""

    def __init__(self, problem: _Problem, gradients: _Gradients, rows: int) -> None:
        self.problem, self.gradients = problem, gradients
        self.modulation = None
        if problem.ts is not None:
            size = rows * problem.vocab
            self.modulation = TileModulation(problem.ranges, problem.ts, capacity=size, derivatives=gradients.any)

    def __call__(self, x: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        """Losses [rows] of the tile ``x`` [rows, vocab], which holds the gradient of their weighted sum afterwards."""
        if self.problem.bias is not None:
            x.add_(self.problem.bias)
        masked = _masked(x)
        if masked is not None:
            x.masked_fill_(masked, 0.0)
        cap_slope = self._cap(x)
        score = self._transform(x)
        if self.modulation is not None:
            self.modulation.forward(x)
        if masked is not None:
            x.masked_fill_(masked, float("-inf"))
        losses = self._probabilities(x, labels[:, None], masked)
        if self.gradients.any:
            if weights is not None:
                x.mul_(weights[:, None])
            self._backward(x, masked, cap_slope, score)
        return losses

    def finish(self) -> None:
        """Hand over the modulator's gradients, after the last tile."""
        if self.modulation is not None and self.gradients.modulator:
            ranges, ts = self.modulation.parameter_gradients()
            self.gradients.add("ranges", ranges)
            self.gradients.add("ts", ts)

    def _cap(self, x: Tensor) -> Tensor | None:
        """Soft-cap ``x`` in place; its derivative, if needed."""
        cap = self.problem.softcap
        if cap is None:
            return None
        x.div_(cap).tanh_()
        slope = 1.0 - x * x if self.gradients.logits else None
        x.mul_(cap)
        return slope

    def _transform(self, x: Tensor) -> Tensor | None:
        """``scale * x + shift`` in place; a copy of ``x`` before it, if needed."""
        if self.problem.scale is None:
            return None
        score = x.clone() if self.gradients.affine else None
        x.mul_(self.problem.scale).add_(self.problem.shift)
        return score

    def _probabilities(self, y: Tensor, labels: Tensor, masked: Tensor | None) -> Tensor:
        """Losses of modulated logits ``y``, which become probabilities less targets."""
        smoothing = self.problem.label_smoothing
        classes = y.shape[1] if masked is None else (~masked).sum(1, keepdim=True).clamp_min_(1).to(y.dtype)
        expected = y.gather(1, labels)
        if smoothing:
            mean = (y if masked is None else y.masked_fill(masked, 0.0)).sum(1, keepdim=True) / classes
            expected = (1.0 - smoothing) * expected + smoothing * mean
        # a row without any class has a maximum of -inf and a sum of 0: keep both finite, p = 0 follows
        peak = y.amax(1, keepdim=True).clamp_min_(torch.finfo(y.dtype).min)
        total = y.sub_(peak).exp_().sum(1, keepdim=True).clamp_min_(torch.finfo(y.dtype).tiny)
        if self.gradients.any:
            y.div_(total)
            if smoothing:
                y.sub_(smoothing / classes)
            y.scatter_add_(1, labels, y.new_full(labels.shape, smoothing - 1.0))
        return (peak + total.log() - expected).squeeze(1)

    def _backward(self, grad: Tensor, masked: Tensor | None, cap_slope: Tensor | None, score: Tensor | None) -> None:
        """Take ``grad``, that of the modulated logits, in place to the products hidden @ weight.T."""
        if masked is not None:
            grad.masked_fill_(masked, 0.0)
        if self.modulation is not None:
            self.modulation.backward(grad, parameters=self.gradients.modulator)
        if self.problem.scale is not None:
            if self.gradients.affine:
                self.gradients.add("scale", torch.dot(grad.view(-1), score.view(-1)))
                self.gradients.add("shift", grad.sum())
            grad.mul_(self.problem.scale)
        if cap_slope is not None:
            grad.mul_(cap_slope)


class _KernelLoss:
    """What :class:`_TileLoss` does, for rows of any label, by the Triton kernel."""

    def __init__(self, problem: _Problem, gradients: _Gradients, kernel: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self.problem, self.gradients, self.kernel = problem, gradients, kernel
        self.sums = problem.labels.new_zeros(2 * _terms(problem) + 2, dtype=torch.float64)

    def __call__(self, x: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        """As :meth:`_TileLoss.__call__`."""
        problem = self.problem
        losses, sums = self.kernel(
            x,
            labels,
            *(problem.ranges, problem.ts, problem.bias, problem.scale, problem.shift, weights),
            ignore_index=problem.ignore_index,
            label_smoothing=problem.label_smoothing,
            softcap=problem.softcap,
            gradient=self.gradients.any,
        )
        self.sums += sums.sum(0, dtype=torch.float64)
        return losses

    def finish(self) -> None:
        """As :meth:`_TileLoss.finish`."""
        values, derivatives, affine = self.sums.split((_terms(self.problem), _terms(self.problem), 2))
        if self.gradients.modulator:
            self.gradients.add("ranges", -sigma_slopes(self.problem.ts) * derivatives)
            self.gradients.add("ts", values)
        if self.gradients.affine:
            self.gradients.add("scale", affine[0])
            self.gradients.add("shift", affine[1])


def _terms(problem: _Problem) -> int:
    return 0 if problem.ts is None else problem.ts.numel()


def _row_kernel(problem: _Problem) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The Triton kernel for the row part where it can run."""
    if not problem.hidden.is_cuda or problem.compute_dtype != torch.float32 or find_spec("triton") is None:
        return None
    from .triton_cross_entropy import row_losses

    return row_losses


def _asserted_rows(problem: _Problem) -> Tensor:
    """Numbers of all tokens; labels are checked on the device, as torch's own loss does, without waiting for it."""
    labels = problem.labels
    valid = (labels == problem.ignore_index) | ((labels >= 0) & (labels < problem.vocab))
    torch._assert_async(valid.all(), f"labels must be in [0, {problem.vocab}) or ignore_index = {problem.ignore_index}")
    return torch.arange(labels.numel(), device=labels.device)


def _counted_rows(problem: _Problem) -> Tensor:
    """Numbers of the tokens whose label is not ignored, after a check that those labels are classes."""
    rows = (problem.labels != problem.ignore_index).nonzero().squeeze(1)
    labels = problem.labels.index_select(0, rows)
    wrong = labels[(labels < 0) | (labels >= problem.vocab)]
    if wrong.numel():
        raise ValueError(
            f"labels must be in [0, {problem.vocab}) or ignore_index = {problem.ignore_index}, got {wrong[0].item()}"
        )
    return rows


def _masked(x: Tensor) -> Tensor | None:
    """Where logits are minus infinity (or so low that they can only mean it); None if it is known that none is."""
    limit = torch.finfo(x.dtype).min / 2
    # reading the minimum back is cheap on a CPU only; a NaN makes the comparison false, hence "not"
    if x.device.type == "cpu" and x.amin() > limit:
        return None
    return x <= limit


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a @ b into ``out``, which may be wider than the factors."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b; ``total`` may be wider than the factors."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(torch.mm(a, b, out_dtype=total.dtype))


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


# -- operators ---------------------------------------------------------------------------------------------------------


@torch.library.custom_op("hf_multimax::linear_cross_entropy", mutates_args=())
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ranges: Tensor | None,
    ts: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    chunk_size: int | None,
    dtype: torch.dtype,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The sum of the losses, and its gradients in the order of SOURCES (empty where not wanted)."""
    problem = _Problem(
        hidden,
        weight,
        labels,
        ranges,
        ts,
        bias,
        scale,
        shift,
        ignore_index,
        label_smoothing,
        softcap,
        chunk_size,
        dtype,
    )
    losses, *gradients = _solve(problem, wanted)
    return losses.sum(dtype=torch.float64).to(losses.dtype), *gradients


@linear_cross_entropy.register_fake
def _(*arguments):
    problem = _Problem(*arguments[:-1])
    total = problem.hidden.new_empty((), dtype=problem.compute_dtype)
    return total, *_fake_gradients(problem, arguments[-1])


@torch.library.custom_op("hf_multimax::linear_cross_entropy_rows", mutates_args=())
def linear_cross_entropy_rows(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ranges: Tensor | None,
    ts: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    chunk_size: int | None,
    dtype: torch.dtype,
) -> Tensor:
    """The loss of every token, [tokens]."""
    problem = _Problem(
        hidden,
        weight,
        labels,
        ranges,
        ts,
        bias,
        scale,
        shift,
        ignore_index,
        label_smoothing,
        softcap,
        chunk_size,
        dtype,
    )
    return _solve(problem, [False] * len(SOURCES))[0]


@linear_cross_entropy_rows.register_fake
def _(*arguments):
    problem = _Problem(*arguments)
    return problem.hidden.new_empty(problem.hidden.shape[0], dtype=problem.compute_dtype)


@torch.library.custom_op("hf_multimax::linear_cross_entropy_rows_backward", mutates_args=())
def linear_cross_entropy_rows_backward(
    row_weights: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ranges: Tensor | None,
    ts: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    chunk_size: int | None,
    dtype: torch.dtype,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of ``row_weights @ losses`` in the order of SOURCES (empty where not wanted)."""
    problem = _Problem(
        hidden,
        weight,
        labels,
        ranges,
        ts,
        bias,
        scale,
        shift,
        ignore_index,
        label_smoothing,
        softcap,
        chunk_size,
        dtype,
    )
    return _solve(problem, wanted, row_weights)[1:]


@linear_cross_entropy_rows_backward.register_fake
def _(row_weights, *arguments):
    return _fake_gradients(_Problem(*arguments[:-1]), arguments[-1])


def _fake_gradients(problem: _Problem, wanted: Sequence[bool]) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_like(getattr(problem, name), dtype=_kept_dtype(problem, name))
        if flag
        else problem.hidden.new_empty(0)
        for name, flag in zip(SOURCES, wanted)
    )


def _sum_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.dtypes = [None if inputs[i] is None else inputs[i].dtype for i in SOURCES.values()]
    ctx.wanted = inputs[-1]


def _sum_backward(ctx, grad: Tensor | None, *_):
    _refuse_double_backward()
    result: list[Tensor | None] = [None] * 14
    if grad is not None:
        for i, gradient, dtype, flag in zip(SOURCES.values(), ctx.saved_tensors, ctx.dtypes, ctx.wanted):
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
    wanted = [ctx.needs_input_grad[i] for i in SOURCES.values()]
    gradients = linear_cross_entropy_rows_backward(grad, *inputs, *ctx.options, wanted)
    result: list[Tensor | None] = [None] * 13
    for i, gradient, flag in zip(SOURCES.values(), gradients, wanted):
        if flag:
            result[i] = gradient.to(inputs[i].dtype)
    return tuple(result)


def _refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "multimax_linear_cross_entropy has no second derivative: call backward without create_graph=True, "
            "or compute cross_entropy(modulate(hidden @ weight.T), labels) unfused"
        )


linear_cross_entropy.register_autograd(_sum_backward, setup_context=_sum_setup)
linear_cross_entropy_rows.register_autograd(_rows_backward, setup_context=_rows_setup)
