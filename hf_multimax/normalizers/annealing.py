"""Annealing the sparsity of r-softmax over training."""

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_multimax.normalizers.registry import FunctionNormalizer

__all__ = ["SparsityAnnealing", "set_sparsity"]


class SparsityAnnealing(TrainerCallback):
    """Move the sparsity rate of ``rsoftmax`` linearly from ``start`` to ``end`` over the first ``steps`` updates.

    The present value is a part of the model's config (``config.multimax["normalizer_kwargs"]["sparsity"]``), so that
    every checkpoint holds it, and what is loaded computes with it. Trainer's resumption goes on where it stopped.

    Args:
        start, end: fractions of the unmasked entries that become zero, in [0, 1].
        steps: optimizer updates, >= 1; the sparsity stays at ``end`` after them.

    Raises:
        ValueError: for impossible arguments, and at the start of training if the model has no ``rsoftmax`` layer, or
            learns the sparsity.
    """

    def __init__(self, start: float, end: float, steps: int) -> None:
        for name, value in (("start", start), ("end", end)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} of SparsityAnnealing must be in [0, 1], got {value}")
        if steps < 1:
            raise ValueError(f"steps of SparsityAnnealing must be >= 1, got {steps}")
        self.start, self.end, self.steps = float(start), float(end), steps

    def sparsity(self, step: int) -> float:
        """The sparsity after ``step`` updates."""
        share = min(step / self.steps, 1.0)
        return (1 - share) * self.start + share * self.end

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        set_sparsity(model, self.sparsity(state.global_step))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        set_sparsity(model, self.sparsity(state.global_step))


def set_sparsity(model: nn.Module, sparsity: float) -> None:
    """Set the sparsity rate of every ``rsoftmax`` layer of a patched model (or of what wraps one) and of its config.

    Raises:
        ValueError: if there is no such layer, or the sparsity is learned.
    """
    layers = [m for m in model.modules() if isinstance(m, FunctionNormalizer) and m.name == "rsoftmax"]
    if not layers:
        raise ValueError(
            f"this {type(model).__name__} has no r-softmax layer to anneal: "
            'call patch_model(model, normalizer="rsoftmax") first'
        )
    if any("sparsity" in layer.learned for layer in layers):
        raise ValueError("the sparsity of this model is learned: leave out SparsityAnnealing, or learn=True")
    for layer in layers:
        layer.options["sparsity"] = sparsity
    for module in model.modules():
        config = getattr(module, "config", None)
        values = getattr(config, "multimax", None)  # only the outermost model's config has the entry
        if isinstance(values, dict) and values["normalizer"] == "rsoftmax":
            config.multimax = {**values, "normalizer_kwargs": {**values["normalizer_kwargs"], "sparsity": sparsity}}
