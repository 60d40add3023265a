"""The row part of the output loss: a tile of logits becomes its losses and its gradient."""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from hf_multimax.attention.tiled.modulation import TileModulation, sigma_slopes
from hf_multimax.loss.problem import Gradients, Problem

__all__ = ["KernelLoss", "TileLoss", "row_kernel"]


class TileLoss:
    """The row part: a tile of products hidden @ weight.T becomes its losses and, in place, its gradient."""

    def __init__(self, problem: Problem, gradients: Gradients, rows: int) -> None:
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


class KernelLoss:
    """What :class:`TileLoss` does, for rows of any label, by the Triton kernel."""

    def __init__(self, problem: Problem, gradients: Gradients, kernel: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self.problem, self.gradients, self.kernel = problem, gradients, kernel
        self.sums = problem.labels.new_zeros(2 * _terms(problem) + 2, dtype=torch.float64)

    def __call__(self, x: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        """As :meth:`TileLoss.__call__`."""
        losses, sums = self.kernel(self.problem, x, labels, weights, self.gradients.any)
        self.sums += sums.sum(0, dtype=torch.float64)
        return losses

    def finish(self) -> None:
        """As :meth:`TileLoss.finish`."""
        values, derivatives, affine = self.sums.split((_terms(self.problem), _terms(self.problem), 2))
        if self.gradients.modulator:
            self.gradients.add("ranges", -sigma_slopes(self.problem.ts) * derivatives)
            self.gradients.add("ts", values)
        if self.gradients.affine:
            self.gradients.add("scale", affine[0])
            self.gradients.add("shift", affine[1])


def _terms(problem: Problem) -> int:
    return 0 if problem.ts is None else problem.ts.numel()


def row_kernel(problem: Problem) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The Triton kernel for the row part where it can run."""
    if not problem.hidden.is_cuda or problem.compute_dtype != torch.float32 or find_spec("triton") is None:
        return None
    from hf_multimax.loss.triton_rows import row_losses

    return row_losses


def _masked(x: Tensor) -> Tensor | None:
    """Where logits are minus infinity (or so low that they can only mean it); None if it is known that none is."""
    limit = torch.finfo(x.dtype).min / 2
    # reading the minimum back is cheap on a CPU only; a NaN makes the comparison false, hence "not"
    if x.device.type == "cpu" and x.amin() > limit:
        return None
    return x <= limit
