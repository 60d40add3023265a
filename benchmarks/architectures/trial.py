"""One model on its way through the checks: everything that the stock model and the patched one are asked to do."""

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.architectures.compare import difference, floats
from benchmarks.architectures.inputs import special_tokens
from hf_multimax import multimax_parameters

__all__ = ["NotApplicable", "Trial"]

NEW_TOKENS = 4


class NotApplicable(Exception):
    """The stock model cannot do what a check is about; the text says what."""


@dataclass
class Trial:
    """A model, its inputs, and what is known about it.

    Attributes:
        model_type: what it stands for.
        model: the model, stock or patched.
        batch: keywords of its forward.
        labels: whether the tokens can be the labels of a loss.
        stock: what the stock model computed.
        row: what is found out.
    """

    model_type: str
    model: PreTrainedModel
    batch: dict[str, Any]
    labels: bool = False
    stock: dict[str, Any] = field(default_factory=dict)
    row: dict[str, Any] = field(default_factory=dict)

    def run(self, **more: Any) -> list[Tensor]:
        """Every floating tensor of the outputs, with the same random numbers each time."""
        torch.manual_seed(3)
        with torch.no_grad():
            return self._meant(self.model(**{**self.batch, **more}))

    def _meant(self, outputs: Any) -> list[Tensor]:
        """Floating outputs without those at padding: a row that attends to nothing is uniform in stock's eager only."""
        mask = self.batch.get("attention_mask")
        tensors = floats(outputs)
        return [t[mask.bool()] if mask is not None and t.shape[:2] == mask.shape else t for t in tensors]

    def loss(self, labels: bool = True) -> Tensor:
        """The loss on the tokens, or a random projection of all outputs where there is none or ``labels`` is False."""
        torch.manual_seed(3)
        if self.labels and labels:
            return self.model(**self.batch, **self._labels()).loss
        outputs = [tensor.float() for tensor in self._meant(self.model(**self.batch)) if tensor.requires_grad]
        outputs = [tensor[tensor.isfinite()] for tensor in outputs]
        if not outputs:
            raise NotApplicable("no output has a gradient")
        generator = torch.Generator().manual_seed(7)
        return sum((t * torch.randn(t.shape, generator=generator)).mean() for t in outputs if t.numel())

    def find_labels(self) -> None:
        """Set ``labels`` by trying."""
        try:
            self.labels = True
            self.labels = "input_ids" in self.batch and bool(self.loss().isfinite()) and self.loss().requires_grad
        except Exception:  # whatever a model says to labels that it cannot use
            self.labels = False

    def _labels(self) -> dict[str, Tensor]:
        labels = self.batch.get("decoder_input_ids", self.batch["input_ids"])
        mask = self.batch.get("attention_mask")
        if mask is not None and mask.shape == labels.shape:  # what padding attends to is nobody's concern
            labels = labels.masked_fill(mask == 0, -100)
        return {"labels": labels}

    def training_step(self, dtype: torch.dtype | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The loss and the gradients of the stock parameters, in training mode, checkpointed and without a cache.

        ``dtype`` is autocast's.
        """
        model = self.model
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]  # of batch norms and codebooks
        no_cache = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
        step = Trial(self.model_type, model, {**self.batch, **no_cache}, self.labels)
        model.train()
        if model.supports_gradient_checkpointing:
            model.gradient_checkpointing_enable()
        try:
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                loss = step.loss()
            loss.backward()
            found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            return {"loss": loss.detach()}, {n: g for n, g in found.items() if n not in multimax_parameters(model)}
        finally:
            model.zero_grad()
            if model.supports_gradient_checkpointing:
                model.gradient_checkpointing_disable()
            model.eval()
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)

    def leak(self) -> float:
        """How much the last token of the first text changes outputs at earlier ones.

        Raises:
            NotApplicable: where outputs do not follow tokens.
        """
        name = "decoder_input_ids" if "decoder_input_ids" in self.batch else "input_ids"
        ids = self.batch.get(name)
        if ids is None or ids.ndim != 2:
            raise NotApplicable("no tokens")
        other = ids.clone()
        other[0, -1] = (other[0, -1] - 4) % 80 + 5
        pair = []
        for tokens in (ids, other):
            torch.manual_seed(3)
            with torch.no_grad():
                outputs = self.model(**{**self.batch, name: tokens})
            found = getattr(outputs, "logits", getattr(outputs, "last_hidden_state", None))
            if not isinstance(found, Tensor) or found.shape[:2] != ids.shape:
                raise NotApplicable("outputs do not follow the tokens")
            pair.append(found[0, :-1])
        return difference([pair[1]], [pair[0]])

    def last_logits(self) -> float:
        """How far the last two logits alone are from those among all logits; raises NotApplicable where none are."""
        name = "decoder_input_ids" if "decoder_input_ids" in self.batch else "input_ids"
        if "logits_to_keep" not in inspect.signature(self.model.forward).parameters or name not in self.batch:
            raise NotApplicable("it gives all logits")
        whole = {**self.batch, "attention_mask": torch.ones_like(self.batch["input_ids"])}
        pair = []
        for keep in (0, 2):
            torch.manual_seed(3)
            with torch.no_grad():
                pair.append(self.model(**whole, logits_to_keep=keep).logits[:, -2:])
        return difference([pair[1]], [pair[0]])

    def generate(self, use_cache: bool, **options: Any) -> Tensor:
        """A few tokens, greedily; raises NotApplicable where the model does not generate."""
        model = self.model
        if not model.can_generate():
            raise NotApplicable("it does not generate")
        batch = {
            name: value.clone() if isinstance(value, Tensor) else value  # BLIP writes into them
            for name, value in self.batch.items()
            if name not in ("decoder_input_ids", "use_cache")
        }
        if "attention_mask" in batch:  # generation continues texts at their ends
            batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
        torch.manual_seed(3)
        out = model.generate(
            **batch,
            use_cache=use_cache,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            num_beams=1,
            **options,
            suppress_tokens=special_tokens(model.config, of="image|video|audio|vision") or None,
        )
        if options.get("output_logits"):
            return torch.stack(out.logits)
        return out if isinstance(out, Tensor) else next(iter(floats(out) or [out.sequences]))

    def logits_of_generation(self, **options: Any) -> Tensor:
        """The logits of every step of :meth:`generate` with a cache."""
        return self.generate(use_cache=True, return_dict_in_generate=True, output_logits=True, **options)

    def change(self, parameters: list[Tensor]) -> float:
        """How much other values of these parameters, which are put back, change the outputs."""
        before = self.run()
        values = [parameter.detach().clone() for parameter in parameters]
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(torch.randn_like(parameter))
            found = difference(self.run(), before)
            for parameter, value in zip(parameters, values):
                parameter.copy_(value)
        return found

    @property
    def noise(self) -> float:
        """How far two runs of the stock model are apart."""
        return self.stock["noise"]

    def layers(self) -> set[str]:
        """The names of the modules that have a normalizer."""
        return {name.rpartition(".multimax.")[0] for name in multimax_parameters(self.model)}
