"""A run of a recipe: arguments from a YAML file and the command line, training, results.json.

A recipe gives :func:`main` its dataclasses of arguments and a function that makes a :class:`Job` of them. All that can
be wrong with the input raises :class:`~recipes.shared.checks.DataError` or ValueError while the job is made.
"""

import dataclasses
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser, PreTrainedModel, Trainer, TrainerState, TrainingArguments, set_seed

from hf_multimax import is_patched
from hf_multimax.training import MultiMaxTrainer
from recipes.shared import record
from recipes.shared.adapters import trained_part
from recipes.shared.checks import DataError, check_numbers
from recipes.shared.metrics import load_metric
from recipes.shared.models import ModelArguments
from recipes.shared.record import RESULTS, read_yaml, recorded_config, write_json

logger = logging.getLogger(__name__)

TRAINER_STATE = "trainer_state.json"
OPTIONS = "options.json"


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
        metrics: the modules of ``recipes/metrics`` that are computed; they are loaded before anything is trained.
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
    metrics: tuple[str, ...]
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
        argument_classes: dataclasses, the first one ModelArguments, the last TrainingArguments with MultiMax's fields.
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
        for metric in job.metrics:
            load_metric(metric)
        trainer = build_trainer(job, parsed[0], training)
        check_options(folder, parsed, training)
    except Exception as error:
        if os.environ.get("HF_MULTIMAX_TRACEBACK"):
            raise
        if folder is not None and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()  # the Trainer makes it early
        kind = "" if isinstance(error, DataError | ValueError | OSError) else f"{type(error).__name__}: "
        sys.exit(f"error: {kind}{' '.join(str(error).split())}")
    if trainer.is_world_process_zero():
        write_json(folder / OPTIONS, chosen_options(parsed, training))
    command = shlex.join(["python", "-m", f"recipes.{recipe}", *arguments])
    config = recorded_config(Path(arguments[0])) if _names_config(arguments) else {}
    return run(job, trainer, training, parsed[0].model, {"command": command, "config": config})


def parse(recipe: str, argument_classes: tuple[type, ...], arguments: list[str]) -> tuple[Any, ...]:
    """Instances of the dataclasses, from the defaults, the YAML file named first, and the options, in this order."""
    parser = HfArgumentParser(argument_classes, prog=f"python -m recipes.{recipe}", allow_abbrev=False)
    parser.usage = f"python -m recipes.{recipe} [config.yaml] [--option value ...]"
    values: dict[str, Any] = {}
    if _names_config(arguments):
        known = (f.name for cls in argument_classes for f in dataclasses.fields(cls) if f.init)
        values = read_yaml(Path(arguments[0]), known)
        parser.set_defaults(**values)
        arguments = arguments[1:]
    if "output_dir" not in values and not any(word.split("=")[0] == "--output_dir" for word in arguments):
        raise DataError("--output_dir is missing: the folder to write the model and results.json to")
    return parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)


def _names_config(arguments: list[str]) -> bool:
    return bool(arguments) and not arguments[0].startswith("-")


def check_output(training: TrainingArguments) -> None:
    """Nothing is overwritten, and an interrupted run is resumed only if asked; ``last`` becomes the checkpoint's path.

    ``--resume_from_checkpoint last`` starts from the beginning where there is no checkpoint yet, so that one command
    can be repeated until it is done.
    """
    check_numbers(training, "[1, inf)", "per_device_train_batch_size", "per_device_eval_batch_size")
    check_numbers(training, "[1, inf)", "gradient_accumulation_steps")
    check_numbers(training, "[0, 1)", "label_smoothing_factor")
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


def chosen_options(parsed: list[Any], training: TrainingArguments) -> dict[str, Any]:
    """The options that decide what is trained, as JSON has them; a resumed run must have the same."""
    values = {name: value for options in parsed for name, value in vars(options).items()}
    values |= {
        name: value for name, value in vars(training).items() if name in _DECISIVE or name.startswith("multimax_")
    }
    return json.loads(json.dumps(values, default=str))


_DECISIVE = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "optim",
    "max_grad_norm",
    "label_smoothing_factor",
    "seed",
    "data_seed",
)


def check_options(folder: Path, parsed: list[Any], training: TrainingArguments) -> None:
    """Raise DataError if a run is resumed with other options than it began with, as two arms in one would be."""
    path = folder / OPTIONS
    if training.resume_from_checkpoint is None or not path.exists():
        return
    began, now = json.loads(path.read_text(encoding="utf-8")), chosen_options(parsed, training)
    other = [f"{name} was {began[name]!r}, is {now.get(name)!r}" for name in began if began[name] != now.get(name)]
    if other:
        raise DataError(f"the run in {folder} began with other options ({'; '.join(other)}): choose another folder")


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


# -- training ----------------------------------------------------------------------------------------------------------


def build_trainer(job: Job, options: ModelArguments, training: TrainingArguments) -> Trainer:
    for dataset, purpose in ((job.train_dataset, "train"), (job.eval_dataset, "evaluate")):
        if not len(dataset):
            raise DataError(f"there is nothing to {purpose} on in {job.data['name']}")
    return job.trainer_class(
        model=trained_part(job.model, job.task, options),
        args=training,
        train_dataset=job.train_dataset,
        eval_dataset=job.eval_dataset,
        data_collator=job.collator,
        processing_class=job.processing_class,
        **job.trainer_options,
    )


def run(
    job: Job, trainer: Trainer, training: TrainingArguments, source: str | None, origin: dict[str, Any]
) -> dict[str, Any] | None:
    """Train, evaluate, save the model and then results.json, print the summary."""
    costs = record.Costs(training.device)
    trainer.add_callback(costs)
    begin = time.perf_counter()
    diverged = not train(trainer, training)
    trained = time.perf_counter()
    training.dataloader_drop_last = False  # what is held out counts whole
    metrics = job.evaluate(trainer)
    seconds = {"training_seconds": trained - begin, "evaluation_seconds": time.perf_counter() - trained}
    layers = record.layer_figures(trainer)
    if not diverged:  # there would be nothing but NaN in it
        trainer.save_model()
    if not trainer.is_world_process_zero():
        return None
    results = record.finite(
        {
            "kind": "run",
            "schema": 1,
            "task": job.task,
            **origin,
            "seed": training.seed,
            "model": record.model_entry(job.model, source),
            "multimax": dict(job.model.config.multimax) if is_patched(job.model) else None,
            "data": job.data,
            "training": record.training_entry(trainer, training),
            "metrics": metrics,
            "curve": record.curve(trainer.state.log_history),
            "time": {**seconds, **costs.step_seconds()},
            "memory": costs.memory or record.peak_memory(training.device),
            "layers": layers,
            **record.environment(training.device),
        }
    )
    write_json(Path(training.output_dir) / RESULTS, results)
    record.print_summary(results, job.headline, training.output_dir)
    return results


def train(trainer: Trainer, training: TrainingArguments) -> bool:
    """Train, or load what a run that was interrupted after its last step has left; False if the scalars diverged."""
    checkpoint = training.resume_from_checkpoint
    state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE)) if checkpoint else None
    if state is not None and 0 < training.max_steps <= state.global_step:  # the Trainer would do one step more
        trainer._load_from_checkpoint(checkpoint)
        trainer.state = state
    else:
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except FloatingPointError as error:  # a result like others in a comparison
            logger.warning(f"the run has diverged, and its model is not saved: {error}")
            return False
    return True
