"""The loss of modulated logits that never exist as a whole: which models it fits, and how it reads their last layer."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear, pad
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss

from hf_multimax.loss.cross_entropy import multimax_linear_cross_entropy
from hf_multimax.models.discovery import code_names
from hf_multimax.normalizers.base import MultiMax, active_normalizer

__all__ = ["FusedLoss", "captured_input", "fused_loss"]


@dataclass(frozen=True)
class FusedLoss:
    """``softcap(head(hidden) + bias)``, modulated, under a cross-entropy, of one model.

    Attributes:
        model: holds the modulator.
        head: the linear layer that makes the logits.
        shifted: whether token i is predicted at position i - 1, as in the loss of a causal language model.
    """

    model: PreTrainedModel
    head: nn.Linear
    shifted: bool

    def __call__(self, hidden: Tensor, labels: Tensor, options: dict[str, Any]) -> Tensor:
        """The loss of ``hidden`` ``[..., tokens, d]`` and ``labels`` ``[..., tokens]``."""
        ignored = options.get("ignore_index", -100)
        if options.get("shift_labels") is not None:
            labels = options["shift_labels"]
        elif self.shifted:
            labels = pad(labels, (0, 1), value=ignored)[..., 1:]
        modulator = active_normalizer(self.model.multimax_output)
        return multimax_linear_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]),
            self.head.weight,
            labels.to(hidden.device).reshape(-1),
            modulator.ranges,
            modulator.ts,
            bias=self.bias,
            ignore_index=ignored,
            affine=modulator.affine,
            softcap=self.softcap,
            num_items_in_batch=options.get("num_items_in_batch"),
        )

    @property
    def bias(self) -> Tensor | None:
        """Everything that the model adds to its logits."""
        extra = getattr(self.model, "final_logits_bias", None)
        parts = [b for b in (self.head.bias, None if extra is None else extra.flatten()) if b is not None]
        return sum(parts[1:], parts[0]) if parts else None

    @property
    def softcap(self) -> float | None:
        return getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)

    @torch.no_grad()
    def makes(self, logits: Tensor, seen: list[Tensor]) -> bool:
        """Whether the one input that the head has seen explains these logits of the model, to rounding."""
        if len(seen) != 1 or seen[0].shape[:-1] != logits.shape[:-1]:
            return False
        own = linear(seen[0], self.head.weight, self.bias).float()
        own = own if self.softcap is None else self.softcap * torch.tanh(own / self.softcap)
        tolerance = 1e-4 if logits.dtype == torch.float32 else 2e-2
        return torch.allclose(own, logits.float(), rtol=tolerance, atol=tolerance * float(own.abs().amax()))


def fused_loss(model: PreTrainedModel, stock_class: type[PreTrainedModel]) -> FusedLoss | None:
    """The fused loss of ``model``, if its head and its loss are of a form that has one."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or not isinstance(active_normalizer(model.multimax_output), MultiMax):
        return None
    if isinstance(head.weight, DTensor) or hasattr(head.weight, "ds_id") or head.weight.is_meta:
        return None  # sharded: whole only inside the head's own forward
    if "loss_function" not in code_names(stock_class):
        return FusedLoss(model, head, shifted=False)
    if model.loss_function in (ForCausalLMLoss, ForMaskedLMLoss):
        return FusedLoss(model, head, shifted=model.loss_function is ForCausalLMLoss)
    return None


@contextlib.contextmanager
def captured_input(head: nn.Module, shorten: bool) -> Iterator[list[Tensor]]:
    """Collect what ``head`` is called with; with ``shorten`` it then computes the first position only."""
    seen: list[Tensor] = []

    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        seen.append(inputs[0])
        return (inputs[0][..., :1, :], *inputs[1:]) if shorten else None

    handle = head.register_forward_pre_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()
