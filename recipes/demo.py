"""The whole way on real text, in minutes on two cores: a SoftMax checkpoint, the same patched, both trained on.

    python -m recipes.demo                          # a small GPT-2, made here, on Python's own documentation
    python -m recipes.demo --data web               # on a book; or a file, a folder, a data set of the Hub
    python -m recipes.demo --model gpt2             # from a checkpoint, with its own tokenizer

It shows that ``patch_model`` changes no output, trains SoftMax and MultiMax from the same checkpoint with the same data
and budget, prints one table, saves the MultiMax model and loads it in a new process. All figures are in ``demo.json``
beside the model.
"""

import argparse
import copy
import json
import logging
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_cosine_schedule_with_warmup,
    set_seed,
)

import hf_multimax
from hf_multimax import is_patched, multimax_parameters, patch_model
from hf_multimax.diagnostics import Measure, attention_statistics
from recipes.data import BUILT_IN_TEXTS, DataError, encode, load_text, train_tokenizer

RESULTS = "demo.json"
PROMPT_TOKENS = 16

#: Run by a new process: all that someone else needs to use the saved model.
RELOAD = """
import sys, torch, hf_multimax
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
folder, exchange = sys.argv[1:]
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
tokens = load_file(exchange)["tokens"]
with torch.no_grad():
    logits = model(tokens).logits
set_seed(0)
prompt = tokens[:1, :{prompt}]
generated = model.generate(
    prompt, attention_mask=torch.ones_like(prompt), max_new_tokens={new}, do_sample=True, top_k=20,
    pad_token_id=tokenizer.eos_token_id,
)
save_file({{"logits": logits, "generated": generated}}, exchange)
print(repr(model).partition("(")[0])
"""


@dataclass
class Data:
    """Windows of tokens: training text as one stream ``[tokens]``, held-out text cut into ``[windows, context]``."""

    train: Tensor
    held_out: Tensor

    def batches(self, steps: int, batch_size: int, seed: int) -> Tensor:
        """``[steps, batch_size, context]``, windows drawn at random places: the same for the same seed."""
        context = self.held_out.shape[1]
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(self.train) - context, (steps, batch_size, 1), generator=generator)
        return self.train[starts + torch.arange(context)]


def main(arguments: list[str] | None = None) -> None:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("recipes").setLevel(logging.INFO)
    try:
        run(parse(arguments))
    except DataError as error:
        sys.exit(f"error: {error}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(BUILT_IN_TEXTS)
    parser.add_argument("--data", default="pydoc", help=f"{names}, a text file, a folder of them, or a Hub data set")
    parser.add_argument("--model", help="start from this checkpoint (path or Hub id) instead of making a small GPT-2")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder to write (default: %(default)s)")
    parser.add_argument("--pretraining-steps", type=int, default=400, help="of the small GPT-2 (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=250, help="of each of the two trainings (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=7.0, help="steps are cut to fit this (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="windows a step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, help="default: 5e-5 with --model, else 3e-3, then 1e-3")
    parser.add_argument("--held-out-windows", type=int, help="evaluated, at most; default: 256, 32 with --model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few steps of a tiny model, to see that all works")
    options = parser.parse_args(arguments)
    for name in ("pretraining_steps", "steps", "batch_size", "minutes", "held_out_windows", "learning_rate"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive")
    if options.held_out_windows is None:
        options.held_out_windows = 32 if options.model else 256
    if options.quick:
        options.pretraining_steps, options.steps, options.batch_size, options.held_out_windows = 4, 4, 4, 16
    return options


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All of it; returns what is written to demo.json."""
    start = time.perf_counter()
    check_output(options.output)
    text = load_text(options.data)
    model, tokenizer = load_checkpoint(options.model) if options.model else new_checkpoint(text, options)
    data = split(encode(tokenizer, text), model, options)
    say(
        f"Text {options.data}: {len(text):,} characters, {len(data.train):,} tokens to train on, "
        f"{data.held_out.numel():,} held out. Model: {model.num_parameters():,} parameters."
    )
    results: dict[str, Any] = {"data": options.data, "model": options.model, "seed": options.seed}
    rate, step = options.learning_rate or (5e-5 if options.model else 3e-3), step_seconds(model, data, options)
    if not options.model:
        steps = affordable(options.pretraining_steps, step, 0.4 * 60 * options.minutes, "pre-training")
        batches = data.batches(steps, options.batch_size, options.seed)
        step = train({"SoftMax": model}, batches, rate, options.seed, "pre-training")["SoftMax"]
        results["pretraining_steps"], rate = steps, rate / 3

    arms = {"SoftMax": copy.deepcopy(model), "MultiMax": model}
    before = perplexity(model, data)
    patch(model, options)
    results["perplexity"] = {"checkpoint": before, "patched": perplexity(model, data)}
    say(
        "Held-out perplexity: checkpoint {checkpoint:.6f}, after patch_model {patched:.6f}.".format(
            **results["perplexity"]
        )
    )

    # Three evaluations are to come, a forward pass is a third of a step, and one arm may be slower than the other.
    left = 60 * options.minutes - (time.perf_counter() - start) - len(data.held_out) / options.batch_size * step
    results["steps"] = affordable(options.steps, step, left / 2.2, "each training")
    batches = data.batches(results["steps"], options.batch_size, options.seed + 1)
    results["arms"] = compare(arms, data, batches, rate, options.seed)
    print_table(results)
    results |= environment()
    save_and_reload(model, tokenizer, data, options.output, results, start)
    return results


def compare(
    arms: dict[str, PreTrainedModel], data: Data, batches: Tensor, rate: float, seed: int
) -> dict[str, dict[str, Any]]:
    """Train all arms on; the figures of each."""
    seconds = train(arms, batches, rate, seed, " and ".join(arms))
    return {
        name: {
            "step_seconds": seconds[name],
            "perplexity": perplexity(arm, data),
            "extra_parameters": sum(parameter.numel() for parameter in multimax_parameters(arm).values()),
            "layers": layer_figures(arm, data),
        }
        for name, arm in arms.items()
    }


# -- the checkpoint and its data ---------------------------------------------------------------------------------------


def new_checkpoint(text: str, options: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A small GPT-2 with random weights and a tokenizer made for the text."""
    width, layers, context, vocabulary = (32, 2, 32, 300) if options.quick else (128, 4, 128, 1024)
    tokenizer = train_tokenizer(text, vocabulary, context)
    set_seed(options.seed)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=context,
        n_embd=width,
        n_layer=layers,
        n_head=4,
        attn_pdrop=0.0,  # so that SoftMax runs on its fused kernel, the fast one
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return GPT2LMHeadModel(config), tokenizer


def load_checkpoint(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A stock causal language model and its own tokenizer, from a folder or the Hub."""
    try:
        tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"--model {name} is no causal language model that can be loaded: {reason}") from error
    if is_patched(model):
        raise DataError(f"--model {name} is a MultiMax model already: give the SoftMax checkpoint it was made from")
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise DataError(f"--model {name} has a tokenizer with more tokens than the model has embeddings")
    return model.float(), tokenizer


def patch(model: PreTrainedModel, options: argparse.Namespace) -> None:
    try:
        patch_model(model)
    except ValueError as error:
        raise DataError(f"--model {options.model} cannot be patched: {error}") from error


def split(tokens: Tensor, model: PreTrainedModel, options: argparse.Namespace) -> Data:
    """The last tenth of the text is held out, in whole windows; the first of them are what is evaluated."""
    context = min(128, getattr(model.config, "max_position_embeddings", None) or 128)
    windows = len(tokens) // (10 * context)
    if windows < 1:
        raise DataError(
            f"the text {options.data} is too short: it has {len(tokens)} tokens and needs at least {10 * context}"
        )
    held_out = tokens[-windows * context :].view(windows, context)
    return Data(tokens[: -windows * context], held_out[: options.held_out_windows])


def check_output(folder: Path) -> None:
    """Only an earlier demo may be overwritten."""
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or (folder / RESULTS).exists())):
        raise DataError(f"--output {folder} exists and is not from an earlier demo: choose another folder")


def step_seconds(model: PreTrainedModel, data: Data, options: argparse.Namespace) -> float:
    """Seconds of a training step, by trial: the fastest of three."""
    seconds = []
    for batch in data.batches(3, options.batch_size, options.seed):
        begin = time.perf_counter()
        model(batch, labels=batch).loss.backward()
        seconds.append(time.perf_counter() - begin)
    model.zero_grad()
    return min(seconds)


def affordable(wanted: int, step: float, seconds: float, what: str) -> int:
    """The wanted number of training steps, or as many as fit into so many seconds, at least 3."""
    steps = min(wanted, max(int(seconds / step), 3))
    if steps < wanted:
        say(f"At {step:.2f} s a step, {steps} instead of {wanted} steps of {what} fit into --minutes.")
    return steps


# -- training and measuring --------------------------------------------------------------------------------------------


def train(arms: dict[str, PreTrainedModel], batches: Tensor, rate: float, seed: int, title: str) -> dict[str, float]:
    """Train all arms on the batches in their order, with the same dropout; the median seconds of a step of each.

    The arms take turns, so that another program's load slows both. The first steps are not timed.
    """
    optimizers = {
        name: torch.optim.AdamW(parameter_groups(arm), lr=rate, betas=(0.9, 0.95)) for name, arm in arms.items()
    }
    schedules = [get_cosine_schedule_with_warmup(o, len(batches) // 20, len(batches)) for o in optimizers.values()]
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    progress = tqdm(batches, desc=title, unit="step", mininterval=1.0)
    for number, batch in enumerate(progress):
        losses = {}
        for name, arm in arms.items():
            torch.manual_seed(seed + number)
            begin = time.perf_counter()
            losses[name] = training_step(arm.train(), optimizers[name], batch)
            seconds[name].append(time.perf_counter() - begin)
        for schedule in schedules:
            schedule.step()
        progress.set_postfix({name: f"{loss:.3f}" for name, loss in losses.items()}, refresh=False)
    return {name: statistics.median(s[min(5, len(s) // 2) :]) for name, s in seconds.items()}


def training_step(model: PreTrainedModel, optimizer: torch.optim.Optimizer, batch: Tensor) -> float:
    loss = model(batch, labels=batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def parameter_groups(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Weight decay for matrices only; MultiMax's scalars get none, whatever their shape."""
    scalars = {id(parameter) for parameter in multimax_parameters(model).values()}
    decayed = [p for p in model.parameters() if p.ndim > 1 and id(p) not in scalars]
    others = [p for p in model.parameters() if p.ndim <= 1 or id(p) in scalars]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


@torch.no_grad()
def perplexity(model: PreTrainedModel, data: Data) -> float:
    """exp of the mean loss per held-out token; the first token of a window is not predicted."""
    model.eval()
    losses = [model(batch, labels=batch).loss.double() * len(batch) for batch in data.held_out.split(16)]
    return math.exp(sum(losses).item() / len(data.held_out))


def layer_figures(model: PreTrainedModel, data: Data) -> dict[str, dict[str, Any]]:
    """The measures of every attention layer on the first held-out windows."""
    statistics = attention_statistics(model, data.held_out[:16].split(4))
    return {layer: {name: figure(m) for name, m in measures.items()} for layer, measures in statistics.items()}


def figure(measure: Measure) -> dict[str, Any]:
    """A measure as JSON, which has no NaN."""
    return measure._asdict() | {"value": None if math.isnan(measure.value) else measure.value}


# -- results -----------------------------------------------------------------------------------------------------------


def print_table(results: dict[str, Any]) -> None:
    arms = results["arms"]
    rows = [
        ("held-out perplexity", [f"{arm['perplexity']:.3f}" for arm in arms.values()]),
        ("step time, ms", [f"{1000 * arm['step_seconds']:.1f}" for arm in arms.values()]),
        ("extra parameters", [f"{arm['extra_parameters']:,}" for arm in arms.values()]),
    ]
    for measure in ("sparsity", "multi_modality", "entropy", "topk_mass"):
        for layer in arms["MultiMax"]["layers"]:
            values = [arm["layers"][layer][measure]["value"] for arm in arms.values()]
            name = f"{measure.replace('_', '-')}, {layer}"
            rows.append((name, ["undefined" if value is None else f"{value:.4f}" for value in values]))
    width = max(len(name) for name, _ in rows)
    steps = results["steps"]
    say(f"\nAfter {steps} more steps of each, same data in the same order:\n")
    say(f"{'':<{width}}" + "".join(f"{name:>12}" for name in arms))
    for name, values in rows:
        say(f"{name:<{width}}" + "".join(f"{value:>12}" for value in values))
    say(
        "\nStep time: median over the training steps, the arms in turn; SoftMax runs on Transformers' own attention."
        "\nSparsity and multi-modality: relevance threshold and reference probability 1/n, n the keys a query sees;"
        "\nentropy in nats; topk-mass of the 8 most probable keys; means over queries, heads and held-out windows.\n"
    )


def environment() -> dict[str, Any]:
    versions = {m.__name__: m.__version__ for m in (torch, transformers, hf_multimax)}
    return {"versions": versions | {"python": platform.python_version()}, "threads": torch.get_num_threads()}


def save_and_reload(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    folder: Path,
    results: dict[str, Any],
    start: float,
) -> None:
    """Save, load in a new process, compare; the folder appears when all of it is there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as partial:
        staging = Path(partial) / "model"
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        tokens = data.held_out[:2]
        loaded = in_new_process(staging, Path(partial) / "exchange", tokens)
        with torch.no_grad():
            logits = model(tokens).logits
        results["reload"] = {
            "class": loaded["class"],
            "equal_logits": torch.equal(logits, loaded["logits"]),
            "largest_difference": (logits - loaded["logits"]).abs().max().item(),
            "prompt": tokenizer.decode(tokens[0, :PROMPT_TOKENS]),
            "generated": tokenizer.decode(loaded["generated"][0, PROMPT_TOKENS:]),
        }
        results["seconds"] = time.perf_counter() - start
        (staging / RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        staging.rename(folder)
    print_reload(results, folder)


def in_new_process(folder: Path, exchange: Path, tokens: Tensor) -> dict[str, Any]:
    """What the saved model computes in a process that has only imported hf_multimax."""
    save_file({"tokens": tokens.contiguous()}, exchange)
    script = RELOAD.format(prompt=PROMPT_TOKENS, new=tokens.shape[1] - PROMPT_TOKENS)
    command = [sys.executable, "-c", script, str(folder), str(exchange)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the saved model does not load in a new process:\n{done.stderr}")
    return {"class": done.stdout.split()[-1], **load_file(exchange)}


def print_reload(results: dict[str, Any], folder: Path) -> None:
    reload = results["reload"]
    equal = "equal" if reload["equal_logits"] else f"up to {reload['largest_difference']:.2g} different"
    say(f"Loaded in a new process by AutoModelForCausalLM: a {reload['class']}, logits {equal}. It continues")
    say(f"    {reload['prompt']!r}\nwith\n    {reload['generated']!r}")
    say(f"\nModel, tokenizer and {RESULTS} are in {folder}. {results['seconds']:.0f} s in all.")


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the new process is no fork of a busy tokenizer
    main()
