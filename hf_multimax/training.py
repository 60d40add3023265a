"""Training with the Trainer: a learning rate and a clip of their own for the scalars, and a log of what they do.

The stock Trainer trains patched models as they are (no decay of the scalars, one learning rate, one global clip).
A scalar's gradient is a sum over a whole score matrix or vocabulary, so that in a global clip it can drown the others':
the authors advise a clip of its own, or a norm scaled by 1/sqrt(n). That is what the classes here add.
"""

import itertools
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_multimax.diagnostics import LayerMeasures, measure_model
from hf_multimax.models.loader_file import write_loader
from hf_multimax.normalizers.base import OUTPUT, MultiMax, is_patched, multimax_parameters, named_normalizers, whole
from hf_multimax.publishing.card import layer_modulators, model_card
from hf_multimax.reporting import draw_training, show_in_trackers

__all__ = [
    "MultiMaxArgumentsMixin",
    "MultiMaxCallback",
    "MultiMaxSeq2SeqTrainer",
    "MultiMaxSeq2SeqTrainingArguments",
    "MultiMaxTrainer",
    "MultiMaxTrainerMixin",
    "MultiMaxTrainingArguments",
    "parameter_groups",
]

logger = logging.getLogger(__name__)

CLIPS = ("group", "scale", "global")
#: How far from a threshold the scores of pretrained attention reach: a slope of order n acts on the n-th power of that,
#: and what it is trained by are steps of one size (Adam), whatever its gradient.
REACH = 30.0


@dataclass
class MultiMaxArgumentsMixin:
    """What MultiMax adds to TrainingArguments. Raises ValueError, naming the field, for impossible values."""

    multimax_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "learning rate of MultiMax's scalars (slopes of order 2 and more that began at zero have less, see "
            "parameter_groups); None: that of the other parameters"
        },
    )
    multimax_clip: str = field(
        default="group",
        metadata={
            "help": "how max_grad_norm treats the scalars: 'group' clips them apart from the other parameters, 'scale' "
            "puts their gradients into the one global norm divided by sqrt(n), 'global' as any parameter",
            "choices": list(CLIPS),
        },
    )
    multimax_max_grad_norm: float | None = field(
        default=None, metadata={"help": "the limit of multimax_clip='group' for the scalars; None: max_grad_norm"}
    )
    multimax_clip_keys: int | None = field(
        default=None,
        metadata={"help": "n of multimax_clip='scale' for attention layers: the number of keys a query usually sees"},
    )
    multimax_logging: bool = field(
        default=True, metadata={"help": "log ranges, ts, sparsity, multi-modality and entropy at every evaluation"}
    )
    multimax_figures: bool = field(
        default=True,
        metadata={"help": "with multimax_logging, draw figures into multimax_figures/ of the output folder at the end"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.multimax_clip not in CLIPS:
            raise ValueError(f"multimax_clip must be one of {', '.join(CLIPS)}, got {self.multimax_clip!r}")
        for name in ("multimax_learning_rate", "multimax_max_grad_norm", "multimax_clip_keys"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.multimax_max_grad_norm is not None and (self.multimax_clip != "group" or self.max_grad_norm <= 0):
            raise ValueError("multimax_max_grad_norm acts with multimax_clip='group' and a positive max_grad_norm only")
        if self.multimax_clip_keys is not None and self.multimax_clip != "scale":
            raise ValueError("multimax_clip_keys acts with multimax_clip='scale' only")


@dataclass
class MultiMaxTrainingArguments(MultiMaxArgumentsMixin, TrainingArguments):
    """TrainingArguments for :class:`MultiMaxTrainer`."""


@dataclass
class MultiMaxSeq2SeqTrainingArguments(MultiMaxArgumentsMixin, Seq2SeqTrainingArguments):
    """Seq2SeqTrainingArguments for :class:`MultiMaxSeq2SeqTrainer`."""


class MultiMaxTrainerMixin:
    """Put before a Trainer class: the scalars get their own learning rate and clip, and are logged.

    Needs arguments with the fields of :class:`MultiMaxArgumentsMixin`. A model without MultiMax parameters trains as
    with the Trainer alone, so that both arms of a comparison can use it.
    """

    args: MultiMaxTrainingArguments

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, MultiMaxArgumentsMixin):
            raise TypeError(
                f"{type(self).__name__} needs MultiMaxTrainingArguments (or the Seq2Seq ones), "
                f"got {type(self.args).__name__}"
            )
        if self.optimizer is not None and self.args.multimax_learning_rate is not None:
            raise ValueError(
                "multimax_learning_rate does not act on an optimizer of your own: make it of "
                "hf_multimax.training.parameter_groups(model, multimax_learning_rate=...)"
            )
        self._check_clip()
        if self.args.multimax_logging and multimax_parameters(self.model):
            # In front of the trackers, which close when training ends.
            self.callback_handler.callbacks.insert(0, MultiMaxCallback(self, figures=self.args.multimax_figures))
        if self.args.push_to_hub and self.is_world_process_zero() and is_patched(self.model):
            write_loader(self.args.output_dir)  # pushes in the midst of training take what lies there

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer's card, with MultiMax's part in it."""
        super().create_model_card(*args, **kwargs)
        model = self.accelerator.unwrap_model(self.model)
        path = Path(self.args.output_dir) / "README.md"
        if self.is_world_process_zero() and is_patched(model) and path.exists():
            card = model_card(
                model, repo_id=self.hub_model_id, existing=ModelCard.load(path), tokenizer=self.processing_class
            )
            card.save(path)

    def _check_clip(self) -> None:
        if self.args.max_grad_norm <= 0 or self.args.multimax_clip == "global" or not multimax_parameters(self.model):
            return
        from accelerate.utils import DistributedType  # the Trainer, which names it if it is missing, needs it first

        deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        fsdp1 = self.accelerator.distributed_type == DistributedType.FSDP and not self.accelerator.is_fsdp2
        if deepspeed or fsdp1:
            raise ValueError(
                f"{'DeepSpeed' if deepspeed else 'FSDP 1'} clips all parameters by one norm, so that "
                f"multimax_clip={self.args.multimax_clip!r} cannot act: set multimax_clip='global'"
                + ("" if deepspeed else ", or use FSDP 2")
            )
        if self.args.multimax_clip == "scale":
            for name in multimax_parameters(self.model):
                self._summed_over(name)

    def _summed_over(self, name: str) -> int:
        """n of the clip for a scalar: how many scores of a row its gradient sums over."""
        if OUTPUT in name:
            head = self.model.get_output_embeddings()
            return self.model.config.num_labels if head is None else head.weight.shape[0]
        if self.args.multimax_clip_keys is None:
            raise ValueError(
                "multimax_clip='scale' needs multimax_clip_keys, the number of keys that a query usually sees"
            )
        return self.args.multimax_clip_keys

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        had_one = self.optimizer is not None
        optimizer = super().create_optimizer(*args, **kwargs)
        if not had_one:
            model = args[0] if args else kwargs.get("model") or self.model
            _separate(optimizer, model, self.args.multimax_learning_rate)
        return optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip as ``multimax_clip`` says; returns the norm that is logged, that of the other parameters if any."""
        scalars = {name: p for name, p in multimax_parameters(model).items() if p.grad is not None}
        if self.args.multimax_clip == "global" or not scalars:
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        ours = {id(parameter) for parameter in scalars.values()}
        others = [p for p in model.parameters() if p.grad is not None and id(p) not in ours]
        if self.args.multimax_clip == "scale":
            return self._clip_scaled(scalars, others)
        norm = clip_grad_norm_(scalars.values(), self.args.multimax_max_grad_norm or self.args.max_grad_norm)
        return clip_grad_norm_(others, self.args.max_grad_norm) if others else norm

    def _clip_scaled(self, scalars: dict[str, nn.Parameter], others: list[nn.Parameter]) -> Tensor:
        """One global norm, to which each scalar gives its gradient's size over sqrt(n); it limits all alike."""
        norms = [whole(get_total_norm([p.grad for p in others]))] if others else []
        norms += [whole(get_total_norm([p.grad])) / math.sqrt(self._summed_over(name)) for name, p in scalars.items()]
        norm = torch.linalg.vector_norm(torch.stack([n.float().to(norms[0].device) for n in norms]))
        for parameters in (others, scalars.values()):
            clip_grads_with_norm_([*parameters], self.args.max_grad_norm, norm)
        return norm


class MultiMaxTrainer(MultiMaxTrainerMixin, Trainer):
    """Trainer that gives MultiMax's scalars a learning rate and a clip of their own, and logs them."""


class MultiMaxSeq2SeqTrainer(MultiMaxTrainerMixin, Seq2SeqTrainer):
    """Seq2SeqTrainer that gives MultiMax's scalars a learning rate and a clip of their own, and logs them."""


class MultiMaxCallback(TrainerCallback):
    """Logs, at every evaluation and at the end, the scalars and the measures of each attention layer.

    The names are ``multimax/<layer>/ts_b1``, ``ranges_d2``, ..., ``sparsity``, ``multi_modality``, ``entropy``; the
    measures are those of :func:`hf_multimax.diagnostics.measure_model` on the first evaluation batches. They go
    to every tracker that the Trainer reports to and into ``state.log_history``, but not to the console. For a stock
    Trainer: ``trainer.add_callback(MultiMaxCallback(trainer))``.

    Args:
        trainer: the Trainer.
        batches: how many evaluation batches are measured; 0 for none.
        figures: whether to draw the scalars' curves and, of the trained model, modulators over scores and measures, at
            the end, into ``multimax_figures/`` of the output folder. Trackers that take images get them, too.
    """

    def __init__(self, trainer: Trainer, batches: int = 1, figures: bool = True) -> None:
        self.trainer, self.batches, self.figures = trainer, batches, figures
        self._logged_at: int | None = None
        self._layers: dict[str, LayerMeasures] = {}

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._log(args, state, control, kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._log(args, state, control, kwargs["model"])
        if self.figures and state.is_world_process_zero:
            layers = {name: layer.to_dict() for name, layer in self._layers.items()}
            files = draw_training(Path(args.output_dir) / "multimax_figures", state.log_history, layers)
            show_in_trackers(self.trainer.callback_handler.callbacks, files, state.global_step)

    def _log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module) -> None:
        if self._logged_at == state.global_step:
            return
        self._logged_at = state.global_step
        logs = {f"multimax/{name}": value for name, value in (*_named(model), *self._measured(model))}
        state.log_history.append({**logs, "epoch": state.epoch, "step": state.global_step})
        for callback in self.trainer.callback_handler.callbacks:
            if callback is not self and not isinstance(callback, (ProgressCallback, PrinterCallback)):
                callback.on_log(args, state, control, model=model, logs=dict(logs))

    def _measured(self, model: nn.Module) -> Iterator[tuple[str, float]]:
        if not self.batches or self.trainer.eval_dataset is None or not _has_attention(model):
            return
        loader = self.trainer.get_eval_dataloader(_one_of(self.trainer.eval_dataset))
        # A data loader draws a seed: training must see the random numbers that it sees without this log.
        with self.trainer.compute_loss_context_manager(), torch.random.fork_rng(devices=[]):
            try:
                self._layers = measure_model(model, itertools.islice(loader, self.batches))
            except ValueError as error:  # a log must not end a training
                logger.warning(f"no measures of attention: {error}")
                self._layers = {}
        for layer, found in self._layers.items():
            for name in ("sparsity", "multi_modality", "entropy"):
                if not math.isnan(found.measures[name].value):
                    yield f"{layer}/{name}", found.measures[name].value


def parameter_groups(
    model: nn.Module, weight_decay: float = 0.0, multimax_learning_rate: float | None = None
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer in a training loop of one's own; never put the scalars into Muon.

    Args:
        model: a patched model, or one that holds it.
        weight_decay: of matrices; biases, norms and MultiMax's scalars get none.
        multimax_learning_rate: of the scalars; None for the optimizer's. The slopes ``ts`` of a modulator of order
            N >= 2 that began as SoftMax (``init="identity"``) get it divided by ``30 ** (N - 1)``: scores of pretrained
            attention reach tens away from zero, and one rate for all makes the first steps undo what was learned.

    Returns:
        Groups of trainable parameters: decayed, not decayed, MultiMax's, its slow slopes; empty ones are left out.

    Examples:
        >>> import torch
        >>> from transformers import AutoModelForCausalLM
        >>> from hf_multimax import parameter_groups, patch_model
        >>> model = patch_model(AutoModelForCausalLM.from_pretrained("gpt2"), order=1)
        >>> groups = parameter_groups(model, weight_decay=0.1, multimax_learning_rate=1e-2)
        >>> optimizer = torch.optim.AdamW(groups, lr=1e-4)
        >>> [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
        [(0.0001, 0.1), (0.0001, 0.0), (0.01, 0.0)]
    """
    scalars = {id(p) for p in multimax_parameters(model).values()}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if id(p) not in scalars and p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) not in scalars and p.ndim <= 1], "weight_decay": 0.0},
    ]
    ours = [p for p in trained if id(p) in scalars]
    if multimax_learning_rate is None:
        groups.append({"params": ours, "weight_decay": 0.0})
    else:
        for rate, parameters in _by_rate(model, ours, multimax_learning_rate).items():
            groups.append({"params": parameters, "weight_decay": 0.0, "lr": rate})
    return [group for group in groups if group["params"]]


def _named(model: nn.Module) -> Iterator[tuple[str, float]]:
    for layer, parameters in layer_modulators(model).items():
        for entry, value in parameters.items():
            flat = torch.tensor(value)
            bend = entry in ("ranges", "ts")  # the last dimension is b_1, d_1, b_2, ...; in front of it are heads
            names = [f"{'bd'[i % 2]}{i // 2 + 1}" for i in range(flat.shape[-1])] if bend else [""]
            rows = flat.reshape(-1, len(names))
            for head, row in enumerate(rows.tolist()):
                for suffix, number in zip(names, row):
                    parts = [entry, suffix, f"head{head}" if len(rows) > 1 else ""]
                    yield f"{layer}/{'_'.join(filter(None, parts))}", number


def _separate(optimizer: torch.optim.Optimizer, model: nn.Module, rate: float | None) -> None:
    """Move the scalars of an optimizer without state into groups of their own."""
    ours = {id(parameter) for parameter in multimax_parameters(model).values()}
    if ours and "muon" in type(optimizer).__name__.lower():
        raise ValueError("Muon orthogonalises matrices, which MultiMax's scalars are not: train them with AdamW")
    for group in list(optimizer.param_groups):
        scalars = [p for p in group["params"] if id(p) in ours]
        common = group.get("lr") if rate is None else rate
        if common is None:  # an optimizer that finds its own
            continue
        for own_rate, moved in _by_rate(model, scalars, float(common)).items():
            if own_rate != group.get("lr"):
                gone = {id(p) for p in moved}
                group["params"] = [p for p in group["params"] if id(p) not in gone]
                optimizer.add_param_group({**group, "params": moved, "lr": own_rate})


def _by_rate(model: nn.Module, scalars: list[nn.Parameter], rate: float) -> dict[float, list[nn.Parameter]]:
    """Scalars by their learning rate: ``rate``, and less for slopes that act on powers of large scores."""
    started_at_zero = [m for m in model.modules() if isinstance(m, MultiMax) and m.init == "identity"]
    slopes = {id(m.ts): rate / REACH ** (m.order - 1) for m in started_at_zero}
    rates: dict[float, list[nn.Parameter]] = {}
    for parameter in scalars:
        rates.setdefault(slopes.get(id(parameter), rate), []).append(parameter)
    return rates


def _has_attention(model: nn.Module) -> bool:
    return any(not name.endswith(OUTPUT) for name, _ in named_normalizers(model))


def _one_of(dataset: Any) -> Any:
    return next(iter(dataset.values())) if isinstance(dataset, dict) else dataset
