"""What the recipes share: arguments from a YAML file and the command line, the normalizer, training, results.json.

A recipe gives :func:`main` its dataclasses of arguments and a function that makes a :class:`Job` of them. All that can
be wrong with the input raises :class:`~recipes.data.DataError` or ValueError while the job is made, before training.
"""

import dataclasses
import json
import logging
import math
import os
import platform
import resource
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers import (
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

import hf_multimax
from hf_multimax import MultiMaxConfig, is_patched, multimax_parameters, patch_model, registered_normalizers
from hf_multimax.cards import layer_modulators
from hf_multimax.diagnostics import attention_statistics
from hf_multimax.training import MultiMaxTrainer
from recipes.data import DataError

__all__ = ["Job", "ModelArguments", "RESULTS", "build_model", "exp", "main", "normalizer_config", "write_json"]

logger = logging.getLogger(__name__)

RESULTS = "results.json"
TRAINER_STATE = "trainer_state.json"
SOFTMAX = "softmax"


@dataclass
class ModelArguments:
    """The model, and what stands in SoftMax's place. The two JSON options are dicts once they are parsed."""

    model: str | None = field(
        default=None, metadata={"help": "checkpoint to fine-tune, a folder or a Hub id; none: pre-train from scratch"}
    )
    model_config: str = field(
        default="{}",
        metadata={"help": "the fields of the architecture's config when pre-training, JSON; the recipe has defaults"},
    )
    normalizer: str | None = field(
        default=None,
        metadata={
            "help": "any registered function; softmax is the stock model. Default: multimax, or what the checkpoint has"
        },
    )
    normalizer_kwargs: str = field(default="{}", metadata={"help": "options of the normalizer, JSON"})
    attention: bool = field(default=True, metadata={"help": "replace the SoftMax of attention"})
    output: bool = field(default=False, metadata={"help": "modulate the output logits (multimax only)"})
    order: int | None = field(default=None, metadata={"help": "number of terms of the modulator (2, 1 with affine)"})
    affine: bool = field(default=False, metadata={"help": "the affine variant"})
    per_head: bool = field(default=False, metadata={"help": "scalars per head instead of per layer"})
    init: str | None = field(
        default=None, metadata={"help": "identity or paper; default: paper when pre-training, else identity"}
    )
    include: str | None = field(default=None, metadata={"help": "regular expression: only these attention layers"})
    exclude: str | None = field(default=None, metadata={"help": "regular expression: not these attention layers"})

    def __post_init__(self) -> None:
        for name in ("model_config", "normalizer_kwargs"):
            setattr(self, name, _mapping(getattr(self, name), name))


def _mapping(value: dict | str, name: str) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise DataError(f"--{name} is no JSON ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"--{name} must be a JSON object, got {value!r}")
    return value


@dataclass
class Job:
    """One training, ready to start.

    Attributes:
        task: the Hub's name of the task: text-generation, image-classification, translation.
        model, processing_class: what is trained, and the tokenizer or image processor that is saved with it.
        train_dataset, eval_dataset, collator: as the Trainer takes them.
        evaluate: measures the trained model: ``evaluate(trainer) -> {name: number}``, called on every process.
        data: the ``data`` entry of results.json.
        trainer_class: a class made with MultiMaxTrainerMixin.
        trainer_options: more keyword arguments of it.
        headline: the metrics of the summary table, in their order.
    """

    task: str
    model: PreTrainedModel
    processing_class: Any
    train_dataset: Any
    eval_dataset: Any
    collator: Any
    evaluate: Callable[[Trainer], dict[str, Any]]
    data: dict[str, Any]
    headline: tuple[str, ...]
    source: str | None = None
    trainer_class: type[Trainer] = MultiMaxTrainer
    trainer_options: dict[str, Any] = field(default_factory=dict)


# -- arguments ---------------------------------------------------------------------------------------------------------


def main(
    recipe: str,
    argument_classes: tuple[type, ...],
    make_job: Callable[..., Job],
    arguments: list[str] | None = None,
) -> dict[str, Any] | None:
    """Parse, make the job, train, write; the command line of a recipe.

    Args:
        recipe: name of the module.
        argument_classes: dataclasses, the last one TrainingArguments with MultiMax's fields.
        make_job: called with an instance of each of them.
        arguments: default ``sys.argv``: perhaps a YAML file, then options that override it.

    Returns:
        What results.json holds, on the main process; None on the others.
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger("recipes").setLevel(logging.INFO)
    arguments = sys.argv[1:] if arguments is None else arguments
    folder = None
    try:
        *parsed, training = parse(recipe, argument_classes, arguments)
        check_output(training)
        folder = Path(training.output_dir)
        set_seed(training.seed)
        job = make_job(*parsed, training)
        trainer = build_trainer(job, training)
    except (DataError, ValueError, OSError) as error:
        if os.environ.get("HF_MULTIMAX_TRACEBACK"):
            raise
        if folder is not None and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()  # the Trainer makes it early
        sys.exit(f"error: {' '.join(str(error).split())}")
    command = shlex.join(["python", "-m", f"recipes.{recipe}", *arguments])
    config = recorded_config(Path(arguments[0])) if _names_config(arguments) else {}
    return run(job, trainer, training, {"command": command, "config": config})


def parse(recipe: str, argument_classes: tuple[type, ...], arguments: list[str]) -> tuple[Any, ...]:
    """Instances of the dataclasses, from the defaults, the YAML file named first, and the options, in this order."""
    parser = HfArgumentParser(argument_classes, prog=f"python -m recipes.{recipe}", allow_abbrev=False)
    parser.usage = f"python -m recipes.{recipe} [config.yaml] [--option value ...]"
    if _names_config(arguments):
        values = read_yaml(Path(arguments[0]))
        known = {f.name for cls in argument_classes for f in dataclasses.fields(cls) if f.init}
        unknown = sorted(values.keys() - known)
        if unknown:
            raise DataError(f"{arguments[0]} has unknown options: {', '.join(unknown)}")
        parser.set_defaults(**values)
        arguments = arguments[1:]
    return parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)


def _names_config(arguments: list[str]) -> bool:
    return bool(arguments) and not arguments[0].startswith("-")


def recorded_config(path: Path) -> dict[str, Any]:
    """A YAML file's values as results.json holds them."""
    return json.loads(json.dumps(read_yaml(path), default=str))


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"the config {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"the config {path} is no YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise DataError(f"the config {path} must hold `option: value` lines")
    return values


def check_output(training: TrainingArguments) -> None:
    """Nothing is overwritten, and an interrupted run is resumed only if asked; ``last`` becomes the checkpoint's path.

    ``--resume_from_checkpoint last`` starts from the beginning where there is no checkpoint yet, so that one command
    can be repeated until it is done.
    """
    if not training.output_dir:
        raise DataError("--output_dir is missing: the folder to write the model and results.json to")
    folder = Path(training.output_dir)
    if folder.exists() and not folder.is_dir():
        raise DataError(f"--output_dir {folder} is a file")
    last = last_checkpoint(folder)
    if training.resume_from_checkpoint == "last":
        training.resume_from_checkpoint = last
    elif training.resume_from_checkpoint:
        if not Path(training.resume_from_checkpoint).is_dir():
            raise DataError(f"--resume_from_checkpoint {training.resume_from_checkpoint}: there is no such folder")
    elif last or (folder / RESULTS).exists():
        raise DataError(
            f"--output_dir {folder} holds an earlier run: choose another folder, or go on with it by "
            "--resume_from_checkpoint last"
        )


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint in a folder: what the Trainer writes last is there."""
    whole = [path for path in folder.glob("checkpoint-*") if _is_whole(path)]
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return checkpoint.name.rpartition("-")[2].isdigit()


# -- the model ---------------------------------------------------------------------------------------------------------


def normalizer_config(options: ModelArguments, pretraining: bool) -> MultiMaxConfig | None:
    """What to patch with; None for the stock model with SoftMax.

    Raises:
        DataError: for an unknown name, or options that do not go together.
    """
    name = options.normalizer or "multimax"
    if name not in registered_normalizers():
        raise DataError(f"--normalizer {name} is unknown: choose one of {', '.join(sorted(registered_normalizers()))}")
    if name == SOFTMAX and not options.normalizer_kwargs:
        if options.output:
            raise DataError("--output modulates by MultiMax: it does not go with --normalizer softmax")
        return None
    try:
        return MultiMaxConfig(
            normalizer=name,
            normalizer_kwargs=options.normalizer_kwargs,
            order=options.order,
            affine=options.affine,
            attention=options.attention,
            output=options.output,
            per_head=options.per_head,
            init=options.init or ("paper" if pretraining else "identity"),
            include=options.include,
            exclude=options.exclude,
        )
    except (TypeError, ValueError) as error:
        raise DataError(str(error)) from error


def build_model(options: ModelArguments, make_stock: Callable[[], PreTrainedModel], seed: int) -> PreTrainedModel:
    """The model to train: what ``make_stock`` makes or loads, patched as the options say.

    For one seed all arms of a comparison start from the same weights, and see the same random numbers afterwards.

    Raises:
        DataError: if the checkpoint is patched already, with something else than is asked for.
    """
    set_seed(seed)
    model = make_stock()
    config = normalizer_config(options, pretraining=options.model is None)
    if is_patched(model):
        asked = options.normalizer or options.output or not options.attention or options.order or options.per_head
        if asked and not _same(config, model.config.multimax):
            has = {key: model.config.multimax[key] for key in _COMPARED}
            raise DataError(
                f"the checkpoint {options.model} is patched already, with {has}: leave out --normalizer and its "
                "options, or start from the stock checkpoint"
            )
    elif config is not None:
        patch_model(model, config)
    set_seed(seed + 1)
    return model


_COMPARED = ("normalizer", "normalizer_kwargs", "order", "affine", "attention", "output", "per_head")


def _same(config: MultiMaxConfig | None, stored: dict[str, Any]) -> bool:
    return config is not None and all(config.to_dict()[key] == stored[key] for key in _COMPARED)


# -- training ----------------------------------------------------------------------------------------------------------


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

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._begin = (time.perf_counter(), time.process_time())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.wall.append(time.perf_counter() - self._begin[0])
        self.cpu.append(time.process_time() - self._begin[1])
        if not self._evaluated:
            self.memory = {**peak_memory(self.device), "phase": "training"}

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._evaluated = True


def build_trainer(job: Job, training: TrainingArguments) -> Trainer:
    if not len(job.train_dataset):
        raise DataError(f"there is nothing to train on in {job.data['name']}")
    if not len(job.eval_dataset):
        raise DataError(f"there is nothing to evaluate on in {job.data['name']}")
    return job.trainer_class(
        model=job.model,
        args=training,
        train_dataset=job.train_dataset,
        eval_dataset=job.eval_dataset,
        data_collator=job.collator,
        processing_class=job.processing_class,
        **job.trainer_options,
    )


def run(job: Job, trainer: Trainer, training: TrainingArguments, origin: dict[str, Any]) -> dict[str, Any] | None:
    """Train, evaluate, save the model and then results.json, print the summary."""
    costs = Costs(training.device)
    trainer.add_callback(costs)
    begin = time.perf_counter()
    train(trainer, training)
    trained = time.perf_counter()
    metrics = job.evaluate(trainer)
    evaluated = time.perf_counter()
    layers = layer_figures(trainer)
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return None
    results = {
        "kind": "run",
        "schema": 1,
        "task": job.task,
        **origin,
        "seed": training.seed,
        "model": _model_entry(job),
        "multimax": dict(job.model.config.multimax) if is_patched(job.model) else None,
        "data": job.data,
        "training": _training_entry(trainer, training),
        "metrics": metrics,
        "curve": [_curve_point(entry) for entry in trainer.state.log_history if _curve_point(entry)],
        "time": {
            "training_seconds": trained - begin,
            "evaluation_seconds": evaluated - trained,
            "seconds_per_step": _typical(costs.wall),
            "cpu_seconds_per_step": _typical(costs.cpu),
        },
        "memory": costs.memory or peak_memory(training.device),
        "layers": layers,
        **environment(training.device),
    }
    results = _finite(results)
    write_json(Path(training.output_dir) / RESULTS, results)
    print_summary(results, job.headline, training.output_dir)
    return results


def train(trainer: Trainer, training: TrainingArguments) -> None:
    """Train, or load what a run that was interrupted after its last step has left."""
    checkpoint = training.resume_from_checkpoint
    state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE)) if checkpoint else None
    if state is not None and 0 < training.max_steps <= state.global_step:  # the Trainer would do one step more
        trainer._load_from_checkpoint(checkpoint)
        trainer.state = state
    else:
        trainer.train(resume_from_checkpoint=checkpoint)


def _model_entry(job: Job) -> dict[str, Any]:
    model = job.model
    stock = type(model).stock_class if is_patched(model) else type(model)
    return {
        "class": stock.__name__,
        "type": model.config.model_type,
        "source": job.source,
        "parameters": sum(p.numel() for p in model.parameters()),
        "multimax_parameters": sum(p.numel() for p in multimax_parameters(model).values()),
    }


def _training_entry(trainer: Trainer, training: TrainingArguments) -> dict[str, Any]:
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


def _curve_point(entry: dict[str, Any]) -> dict[str, Any]:
    """The losses of an entry of the Trainer's log; empty for others."""
    names = [name for name in ("loss", "eval_loss", "grad_norm") if name in entry]
    if not {"loss", "eval_loss"} & set(names):
        return {}
    return {"step": entry["step"]} | {name: float(entry[name]) for name in names}


def _finite(value: Any) -> Any:
    """The same with None for what is NaN or infinite, which JSON does not have: a model may diverge."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _typical(seconds: list[float]) -> float | None:
    """The median, without the first steps, which build kernels and fill caches."""
    return statistics.median(seconds[min(5, len(seconds) // 2) :]) if seconds else None


def layer_figures(trainer: Trainer, batches: int = 2) -> dict[str, dict[str, Any]]:
    """The measures and scalars of every attention layer, on the first evaluation batches of this process."""
    loader = iter(trainer.get_eval_dataloader())
    chosen = [batch for batch, _ in zip(loader, range(batches))]
    model = trainer.model
    figures: dict[str, dict[str, Any]] = {}
    try:
        statistics_ = attention_statistics(model, chosen)
    except ValueError as error:  # MultiMax in the output only, or a stock model beyond the attention interface
        logger.info(f"no measures of attention: {error}")
        statistics_ = {}
    for layer, measures in statistics_.items():
        figures[layer] = {name: measure.value for name, measure in measures.items()}
    for layer, scalars in layer_modulators(model).items():
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


# -- results -----------------------------------------------------------------------------------------------------------


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a file that is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(values, file, indent=2, allow_nan=False)
            file.write("\n")
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def print_summary(results: dict[str, Any], headline: tuple[str, ...], folder: str) -> None:
    """One table: the metrics, the cost, and what each layer's attention looks like."""
    time_, multimax = results["time"], results["multimax"]
    rows = [("normalizer", multimax["normalizer"] if multimax else SOFTMAX)]
    rows += [(name, _shown(results["metrics"][name])) for name in headline]
    rows += [
        ("steps", f"{results['training']['steps']:,}"),
        ("processes", f"{results['training']['world_size']}"),
        ("step, s", "-" if time_["seconds_per_step"] is None else f"{time_['seconds_per_step']:.3f}"),
        ("training, s", f"{time_['training_seconds']:.1f}"),
        ("peak memory, MB", f"{results['memory']['peak_bytes'] / 1e6:,.0f}"),
        ("parameters", f"{results['model']['parameters']:,} ({results['model']['multimax_parameters']} of MultiMax)"),
    ]
    for layer, figures in results["layers"].items():
        measures = [f"{name} {figures[name]:.3f}" for name in _PRINTED if figures.get(name) is not None]
        if measures:
            rows.append((layer, ", ".join(measures)))
    width = max(len(name) for name, _ in rows)
    print("\n" + "\n".join(f"{name:<{width}}  {value}" for name, value in rows))
    print(f"\nModel and {RESULTS} are in {folder}.", flush=True)


def exp(loss: float) -> float:
    """A perplexity; infinite where a model has diverged."""
    return math.exp(loss) if loss < 700 else math.inf


def _shown(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


_PRINTED = ("sparsity", "multi_modality", "entropy")
