"""The output loss in chunks of the tokens that count: the loop that every operator of it runs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_multimax.attention.context import without_autocast
from hf_multimax.loss.problem import Gradients, Problem
from hf_multimax.loss.rows import KernelLoss, TileLoss, row_kernel

__all__ = ["solve"]


def solve(problem: Problem, wanted: Sequence[bool], row_weights: Tensor | None = None) -> tuple[Tensor, ...]:
    """Loss of every token, then the gradients (in the order of SOURCES) of their sum, weighted by ``row_weights``."""
    gradients = Gradients(problem, wanted)
    losses = problem.hidden.new_zeros(problem.hidden.shape[0], dtype=problem.compute_dtype)
    problem = problem.prepared()
    with without_autocast(problem.hidden.device):
        _solve_rows(problem, gradients, losses, row_weights)
    return losses, *gradients.result(problem)


def _solve_rows(problem: Problem, gradients: Gradients, losses: Tensor, row_weights: Tensor | None) -> None:
    """The loop over chunks of the tokens that count, and over tiles in each."""
    kernel = row_kernel(problem)
    rows = _counted_rows(problem) if kernel is None else _asserted_rows(problem)
    if not rows.numel():
        return
    tile = problem.tile_rows() if kernel is None else problem.chunk_rows()
    loss = TileLoss(problem, gradients, tile) if kernel is None else KernelLoss(problem, gradients, kernel)
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


def _asserted_rows(problem: Problem) -> Tensor:
    """Numbers of all tokens; labels are checked on the device, as torch's own loss does, without waiting for it."""
    labels = problem.labels
    valid = (labels == problem.ignore_index) | ((labels >= 0) & (labels < problem.vocab))
    torch._assert_async(valid.all(), f"labels must be in [0, {problem.vocab}) or ignore_index = {problem.ignore_index}")
    return torch.arange(labels.numel(), device=labels.device)


def _counted_rows(problem: Problem) -> Tensor:
    """Numbers of the tokens whose label is not ignored, after a check that those labels are classes."""
    rows = (problem.labels != problem.ignore_index).nonzero().squeeze(1)
    labels = problem.labels.index_select(0, rows)
    wrong = labels[(labels < 0) | (labels >= problem.vocab)]
    if wrong.numel():
        raise ValueError(
            f"labels must be in [0, {problem.vocab}) or ignore_index = {problem.ignore_index}, got {wrong[0].item()}"
        )
    return rows


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a @ b into ``out``, which may be wider than the factors."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)
