"""Scalars on a frozen real checkpoint against their rivals: ``python -m benchmarks.scalar_start [--data web]``.

SmolLM2-135M-Instruct (fetched by pip, see ``recipes.shared.checkpoints``) in bfloat16, windows of a built-in text,
AdamW with linear decay to zero. Every arm is an adapter of one model and has the same search: three learning rates with
the first seed, of which the best on some held-out windows runs with two more, on the windows that every arm sees, in
the same order; other held-out windows judge. ``--all-rates`` runs every rate with every seed. Low-rank updates, whose
rates are smaller, search at a tenth of the scalars' rates. Writes ``benchmarks/results/scalar_start-cpu.json`` (for
other texts ``scalar_start_<text>-cpu.json``) after every run and goes on with what is there.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.common import ROOT, add_thread_option, peak_extra_bytes, results_path, write_results
from benchmarks.scalar_summary import REFERENCE, UNTUNED, chosen_rate, summary
from benchmarks.tables import table
from hf_multimax import is_patched, parameter_groups, patch_model, unpatch_model
from hf_multimax.peft import MultiMaxAdapterConfig
from recipes.shared.checkpoints import checkpoint_folder
from recipes.shared.data.text import BUILT_IN_TEXTS, load_text
from recipes.shared.tokens import encode

RATES, SEEDS, STEPS = (1e-3, 5e-3, 2e-2), (0, 1, 2), 25
#: Windows of a step and their tokens; windows held out to choose by, and as many again to judge by.
BATCH, LENGTH, HELD_OUT = 2, 256, 12
LOW_RANK_RATE = 0.1
LOW_RANK = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}


@dataclass(frozen=True)
class Arm:
    """An adapter, and whether its scalars learn as ``parameter_groups`` says or all at one rate."""

    adapt: Callable[[PreTrainedModel], PeftModel]
    grouped: bool = True


def scalars(per_head: bool = False, **options: object) -> Callable[[PreTrainedModel], PeftModel]:
    return lambda model: get_peft_model(model, MultiMaxAdapterConfig(per_head=per_head, **options))


def temperature(**options: object) -> Callable[[PreTrainedModel], PeftModel]:
    """Of the affine variant only the scale."""

    def adapt(model: PreTrainedModel) -> PeftModel:
        adapted = scalars(affine=True, **options)(model)
        for name, parameter in adapted.named_parameters():
            parameter.requires_grad_(name.endswith(".scale"))
        return adapted

    return adapt


def low_rank(model: PreTrainedModel) -> PeftModel:
    return get_peft_model(model, LoraConfig(**LOW_RANK))


def low_rank_and_scalars(model: PreTrainedModel) -> PeftModel:
    patched = patch_model(model, order=1, per_head=True)
    return get_peft_model(patched, LoraConfig(**LOW_RANK, modules_to_save=["multimax"]))


ARMS = {
    REFERENCE: Arm(temperature()),
    "MultiMax, order 1": Arm(scalars(order=1)),
    "MultiMax, order 2, one rate": Arm(scalars(order=2), grouped=False),
    "MultiMax, order 2": Arm(scalars(order=2)),
    "one temperature per head": Arm(temperature(per_head=True)),
    "MultiMax, order 1, per head": Arm(scalars(order=1, per_head=True)),
    "LoRA, rank 8": Arm(low_rank),
    "LoRA + MultiMax, order 1, per head": Arm(low_rank_and_scalars),
}


class Experiment:
    """One frozen checkpoint, and windows of one text for all arms."""

    def __init__(self, data: str) -> None:
        folder = checkpoint_folder("smollm2")
        tokens = encode(AutoTokenizer.from_pretrained(folder), load_text(data)[:2_000_000])
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).requires_grad_(False)
        windows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
        # The last tenth of the text is held out, and windows all over it.
        last = len(windows) // 10
        self.train, held_out = windows[:-last], windows[-last:][order[order < last][: 2 * HELD_OUT]]
        self.held_out = {"validation": held_out[:HELD_OUT], "test": held_out[HELD_OUT:]}

    def evaluate(self, model: torch.nn.Module) -> dict[str, float]:
        """Mean loss on the held-out windows."""
        model.eval()
        with torch.no_grad():
            return {
                name: statistics.fmean(model(input_ids=part, labels=part).loss.item() for part in windows.split(BATCH))
                for name, windows in self.held_out.items()
            }

    def batches(self, seed: int) -> Tensor:
        """``[steps, batch, length]``, the same for every arm."""
        drawn = torch.randint(len(self.train), (STEPS, BATCH), generator=torch.Generator().manual_seed(seed))
        return self.train[drawn]

    def run(self, name: str, rate: float, seed: int) -> dict[str, object]:
        """Train one arm, evaluate it, and take it off the model again."""
        torch.manual_seed(seed)
        adapted = ARMS[name].adapt(self.model)
        trained = [p for p in adapted.parameters() if p.requires_grad]
        groups = parameter_groups(adapted, multimax_learning_rate=rate) if ARMS[name].grouped else [{"params": trained}]
        optimizer = torch.optim.AdamW(groups, lr=rate * LOW_RANK_RATE if ARMS[name].grouped else rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
        adapted.train()
        seconds = []

        def step(batch: Tensor) -> None:
            begin = time.process_time()
            adapted(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            seconds.append(time.process_time() - begin)

        first, *rest = self.batches(seed)
        peak = peak_extra_bytes(lambda: step(first))
        for batch in rest:
            step(batch)
        row = {
            "arm": name,
            "rate": rate,
            "seed": seed,
            **self.evaluate(adapted),
            "step s": statistics.median(seconds),
            "step MB": peak / 1e6,
            "trained": sum(p.numel() for p in trained),
            "file bytes": file_size(adapted),
        }
        adapted.unload()
        if is_patched(self.model):
            unpatch_model(self.model)
        self.model.requires_grad_(False)
        return row


def file_size(adapted: PeftModel) -> int:
    """What a saved adapter's weights take on disk."""
    with tempfile.TemporaryDirectory() as folder:
        adapted.save_pretrained(folder)
        return (Path(folder) / "adapter_model.safetensors").stat().st_size


def main() -> None:
    """Make the runs that are missing, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=tuple(BUILT_IN_TEXTS), default="pydoc")
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=tuple(ARMS))
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=SEEDS, help="the first chooses the rate (default: 0 1 2)"
    )
    parser.add_argument("--all-rates", action="store_true", help="every rate with every seed, not the best one only")
    add_thread_option(parser)
    options = parser.parse_args()
    name = "scalar_start" if options.data == "pydoc" else f"scalar_start_{options.data}"
    path = results_path(name, "cpu")
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    about = {"data": options.data, "steps": STEPS, "batch": BATCH, "length": LENGTH, "held-out windows": HELD_OUT}
    experiment = Experiment(options.data)
    if not rows:
        rows.append({"arm": UNTUNED, "rate": None, "seed": None, **experiment.evaluate(experiment.model)})

    def run(arm: str, rate: float, seed: int) -> None:
        if not any((row["arm"], row["rate"], row["seed"]) == (arm, rate, seed) for row in rows):
            rows.append(experiment.run(arm, rate, seed))
            write_results(name, rows, **about)

    for arm in options.arms:
        for rate in RATES:
            run(arm, rate, options.seeds[0])
    for seed in options.seeds[1:]:
        for arm in options.arms:
            for rate in RATES if options.all_rates else [chosen_rate(rows, arm)]:
                run(arm, rate, seed)
    print(table(summary(rows)))
    print("in", path.relative_to(ROOT))


if __name__ == "__main__":
    main()
