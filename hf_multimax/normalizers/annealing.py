"""Annealing over training: the sparsity of r-softmax, and any function from SoftMax on."""

import abc
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_multimax.normalizers.registry import FunctionNormalizer

__all__ = ["NormalizerAnnealing", "SparsityAnnealing", "set_share", "set_sparsity"]


class _Annealing(TrainerCallback, abc.ABC):
    """Moves a number linearly from ``start`` to ``end`` over the first ``steps`` updates."""

    def __init__(self, start: float, end: float, steps: int) -> None:
        name = type(self).__name__
        for which, value in (("start", start), ("end", end)):
            if not 0 <= value <= 1:
                raise ValueError(f"{which} of {name} must be in [0, 1], got {value}")
        if steps < 1:
            raise ValueError(f"steps of {name} must be >= 1, got {steps}")
        self.start, self.end, self.steps = float(start), float(end), steps

    def value(self, step: int) -> float:
        """The number after ``step`` updates."""
        share = min(step / self.steps, 1.0)
        return (1 - share) * self.start + share * self.end

    @abc.abstractmethod
    def set(self, model: nn.Module, value: float) -> None:
        """Put the number into the model."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        self.set(model, self.value(state.global_step))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        self.set(model, self.value(state.global_step))


class NormalizerAnnealing(_Annealing):
    """Take a model that was trained with SoftMax to any other function over the first ``steps`` updates.

    Attention weights are ``(1 - share) * SoftMax + share * function``, and the share moves linearly from ``start`` to
    ``end``; with 0 the model computes what the stock model does. The present share is a part of the model's config
    (``config.multimax["normalizer_kwargs"]["share"]``, which ``patch_model`` takes too), so that every checkpoint holds
    it. Zeros of the function are zeros once the share is 1. Functions that contain SoftMax may better start there, with
    ``normalizer_kwargs={"init": "identity"}``; MultiMax does so by itself.

    Args:
        steps: optimizer updates, >= 1; the share stays at ``end`` after them.
        start, end: shares in [0, 1].

    Raises:
        ValueError: for impossible arguments, and at the start of training if the model has no layer to anneal.
    """

    def __init__(self, steps: int, start: float = 0.0, end: float = 1.0) -> None:
        super().__init__(start, end, steps)

    def set(self, model: nn.Module, value: float) -> None:
        set_share(model, value)


class SparsityAnnealing(_Annealing):
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

    def set(self, model: nn.Module, value: float) -> None:
        set_sparsity(model, value)

    def sparsity(self, step: int) -> float:
        """The sparsity after ``step`` updates."""
        return self.value(step)


def set_share(model: nn.Module, share: float) -> None:
    """Set how much of the weights is the function's in every layer of a patched model (or of what wraps one).

    Raises:
        ValueError: if no layer has a function that can be mixed with SoftMax.
    """
    layers = [m for m in model.modules() if isinstance(m, FunctionNormalizer)]
    if not layers:
        raise ValueError(
            f"this {type(model).__name__} has no layer to anneal: call patch_model with a normalizer other than "
            "multimax and softmax, which start as SoftMax by themselves"
        )
    for layer in layers:
        layer.share = share
    _set_in_configs(model, {layer.name for layer in layers}, "share", share)


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
    _set_in_configs(model, {"rsoftmax"}, "sparsity", sparsity)


def _set_in_configs(model: nn.Module, normalizers: set[str], option: str, value: float) -> None:
    for module in model.modules():
        config = getattr(module, "config", None)
        values = getattr(config, "multimax", None)  # only the outermost model's config has the entry
        if isinstance(values, dict) and values["normalizer"] in normalizers:
            config.multimax = {**values, "normalizer_kwargs": {**values["normalizer_kwargs"], option: value}}
