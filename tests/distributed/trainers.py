"""The stock Trainer: the same run in several processes and, with the whole batch, in one."""

import functools
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from models import VOCAB
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from distributed.common import ADAM, dtypes, stirred
from hf_multimax import multimax_parameters

#: A dictionary per run: of the model, and of its arguments.
RUNS = {
    "plain": ({}, {}),
    "output": (
        {"output": True},
        {"gradient_accumulation_steps": 2, "gradient_checkpointing": True, "max_grad_norm": 0.1},
    ),
    "bfloat16 model": ({"dtype": torch.bfloat16}, {"optim": "sgd", "learning_rate": 0.1}),
}


def rows() -> list[dict[str, torch.Tensor]]:
    """Texts with very different numbers of labels, so that a mean of the processes' means is not the mean."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, VOCAB, (24, 11), generator=generator)
    labels = tokens.clone()
    for row in range(24):
        labels[row, : row % 9] = -100
    return [{"input_ids": t, "labels": y} for t, y in zip(tokens, labels)]


def train(folder: Path, name: str, processes: int, start: Path | None = None, **more: Any) -> dict:
    """Three steps on batches of four; ``processes`` share each batch. The model is saved to ``folder``.

    It is loaded from ``start``, or made here. ``more`` goes to TrainingArguments.
    """
    options, arguments = RUNS[name]
    AcceleratorState._reset_state(reset_partial_state=True)
    arguments = TrainingArguments(
        str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        max_steps=3,
        logging_steps=1,
        per_device_train_batch_size=4 // processes,
        **{"learning_rate": ADAM["lr"], "adam_epsilon": ADAM["eps"], **arguments, **more},
    )
    # after the arguments, which tell Transformers of ZeRO-3
    model = stirred(**options) if start is None else AutoModelForCausalLM.from_pretrained(start)
    trainer = Trainer(model, arguments, train_dataset=rows())
    trainer.train()
    trainer.save_model(folder)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "wrapper": type(trainer.model_wrapped).__name__,
        "processes": trainer.args.world_size,
        "distributed_type": trainer.accelerator.distributed_type.value,
        "losses": [entry["loss"] for entry in history],
        "norms": [entry["grad_norm"] for entry in history],
        "scalars": dtypes(multimax_parameters(trainer.model)),
    }


def trained(name: str, folder: Path) -> dict:
    return train(folder / f"trainer {name}", name, processes=2)


CHECKS = {f"trainer {name}": functools.partial(trained, name) for name in RUNS}
