"""What a run is recorded by: its costs, its entries of results.json, and the summary that is printed."""

import itertools
import json
import logging
import math
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

import hf_multimax
from hf_multimax import is_patched, multimax_parameters
from hf_multimax.diagnostics import attention_statistics
from hf_multimax.publishing.card import layer_modulators
from hf_multimax.publishing.results import Figure
from recipes.shared.checks import DataError
from recipes.shared.table import columns

logger = logging.getLogger(__name__)

RESULTS = "results.json"


class Costs(TrainerCallback):
    """What the optimizer steps of this process cost: wall-clock and processor seconds each, and their peak memory.

    A process's resident peak never falls again, so that memory is read until the first evaluation only.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.memory: dict[str, Any] | None = None
        self._begin = (0.0, 0.0)
        self._evaluated = False

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._begin = (time.perf_counter(), time.process_time())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.wall.append(time.perf_counter() - self._begin[0])
        self.cpu.append(time.process_time() - self._begin[1])
        if not self._evaluated:
            self.memory = {**peak_memory(self.device), "phase": "training"}

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        self._evaluated = True

    def step_seconds(self) -> dict[str, float | None]:
        """Of a typical step, None if there was none."""
        return {"seconds_per_step": typical(self.wall), "cpu_seconds_per_step": typical(self.cpu)}


def model_entry(model: PreTrainedModel, source: str | None) -> dict[str, Any]:
    stock = type(model).stock_class if is_patched(model) else type(model)
    return {
        "class": stock.__name__,
        "type": model.config.model_type,
        "source": source,
        "parameters": sum(p.numel() for p in model.parameters()),
        "multimax_parameters": sum(p.numel() for p in multimax_parameters(model).values()),
    }


def training_entry(trainer: Trainer, training: TrainingArguments) -> dict[str, Any]:
    precision = "bfloat16" if training.bf16 else "float16" if training.fp16 else str(trainer.model.dtype)
    return {
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "batch_size": training.train_batch_size * training.gradient_accumulation_steps * training.world_size,
        "learning_rate": training.learning_rate,
        "schedule": str(getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type)),
        "weight_decay": training.weight_decay,
        "world_size": training.world_size,
        "wrapper": type(trainer.model_wrapped).__name__,
        "precision": precision.removeprefix("torch."),
        "resumed": training.resume_from_checkpoint is not None,
    }


def curve(log_history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The losses in the Trainer's log."""
    return [
        {"step": entry["step"]} | {name: float(entry[name]) for name in _LOSSES + ("grad_norm",) if name in entry}
        for entry in log_history
        if any(name in entry for name in _LOSSES)
    ]


_LOSSES = ("loss", "eval_loss")


def finite(value: Any) -> Any:
    """The same with None for what is NaN or infinite, which JSON does not have: a model may diverge."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def typical(seconds: list[float]) -> float | None:
    """The median, without the first steps, which build kernels and fill caches."""
    return statistics.median(seconds[min(5, len(seconds) // 2) :]) if seconds else None


def over_seeds(values: Sequence[float]) -> Figure:
    """A figure by its values; one seed has no deviation."""
    return Figure(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def layer_figures(trainer: Trainer, batches: int = 2) -> dict[str, dict[str, Any]]:
    """The measures and scalars of every attention layer, on the first evaluation batches of this process."""
    figures: dict[str, dict[str, Any]] = {}
    try:
        chosen = itertools.islice(trainer.get_eval_dataloader(), batches)
        for layer, measures in attention_statistics(trainer.model, chosen).items():
            figures[layer] = {name: measure.value for name, measure in measures.items()}
    except ValueError as error:  # MultiMax in the output only, or a stock model beyond the attention interface
        logger.info(f"no measures of attention: {error}")
    for layer, scalars in layer_modulators(trainer.model).items():
        figures.setdefault(layer, {}).update(scalars)
    return figures


def peak_memory(device: torch.device) -> dict[str, Any]:
    """The most memory that this process has held so far, in bytes: on a GPU that is used, else resident."""
    if device.type == "cuda":
        return {"peak_bytes": torch.cuda.max_memory_allocated(device), "kind": "cuda"}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "kind": "resident"}


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and machine."""
    versions = {m.__name__: m.__version__ for m in (torch, transformers, hf_multimax)}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "versions": {"python": platform.python_version(), **versions},
        "machine": {"processor": _processor(), "threads": torch.get_num_threads(), "device": name},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def recorded_config(path: Path) -> dict[str, Any]:
    """A YAML file's values as results.json holds them."""
    return json.loads(json.dumps(read_yaml(path), default=str))


def read_yaml(path: Path, known: Iterable[str] | None = None) -> dict[str, Any]:
    """The options of a YAML file; DataError if it cannot be read or has one that is not among the ``known``."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"the config {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"the config {path} is no YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise DataError(f"the config {path} must hold `option: value` lines")
    unknown = [] if known is None else sorted(values.keys() - set(known))
    if unknown:
        raise DataError(f"{path} has unknown options: {', '.join(unknown)}")
    return values


def write_json(path: Path, values: Any) -> None:
    """Write a file that is there as a whole or not at all; ValueError for NaN, which JSON does not have."""
    text = json.dumps(values, indent=2, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}-{os.getpid()}")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)


def print_summary(results: dict[str, Any], headline: tuple[str, ...], folder: str) -> None:
    """One table: the metrics, the cost, and what each layer's attention looks like."""
    multimax, model, seconds = results["multimax"], results["model"], results["time"]
    step = seconds["seconds_per_step"]
    rows = [("normalizer", multimax["normalizer"] if multimax else "softmax")]
    rows += [(name, shown(results["metrics"][name], "not finite")) for name in headline]
    rows += [
        ("steps", f"{results['training']['steps']:,}"),
        ("processes", f"{results['training']['world_size']}"),
        ("step, s", "-" if step is None else f"{step:.3f}"),
        ("training, s", f"{seconds['training_seconds']:.1f}"),
        ("peak memory, MB", f"{results['memory']['peak_bytes'] / 1e6:,.0f}"),
        ("parameters", f"{model['parameters']:,} ({model['multimax_parameters']} of MultiMax)"),
    ]
    for layer, figures in results["layers"].items():
        measures = [f"{name} {figures[name]:.3f}" for name in _PRINTED if figures.get(name) is not None]
        rows += [(layer, ", ".join(measures))] if measures else []
    print(f"\n{columns(rows)}\n\nModel and {RESULTS} are in {folder}.", flush=True)


def shown(value: float | None, undefined: str) -> str:
    """A number with four decimals, or a word where there is none."""
    return undefined if value is None else f"{value:.4f}"


_PRINTED = ("sparsity", "multi_modality", "entropy")
