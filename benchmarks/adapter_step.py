"""A training step of scalars alone against full fine-tuning and LoRA: ``python -m benchmarks.adapter_step``.

GPT-2 small and a Llama of 135M parameters (the shape of SmolLM2) with random weights, 512 tokens, float32 on a CPU. A
step is forward, backward and AdamW; the arms are copies of one stock model, and take turns in one process. Memory is
what the first step takes beyond the weights: activations, gradients and the optimizer's state. Writes
``benchmarks/results/adapter_step-cpu.json``.
"""

import argparse
import copy
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from benchmarks.common import ROOT, add_thread_option, load, paired_timing, peak_extra_bytes, write_results
from benchmarks.tables import table
from benchmarks.training_step import gpt2, llama, tokens, training_step
from hf_multimax.peft import MultiMaxAdapterConfig

LENGTH = 512
FULL = "full fine-tuning"
MODELS: dict[str, tuple[Callable[[str], PreTrainedModel], list[str]]] = {
    "GPT-2 small": (gpt2, ["c_attn"]),
    "SmolLM2-135M": (llama, ["q_proj", "k_proj", "v_proj", "o_proj"]),
}


def arms(stock: PreTrainedModel, low_rank: list[str]) -> dict[str, Callable[[], nn.Module]]:
    """Makers of the models to train, each of a copy."""
    configs = {
        "LoRA, rank 8": LoraConfig(r=8, target_modules=low_rank),
        "scalars": MultiMaxAdapterConfig(),
        "scalars, order 2, per layer": MultiMaxAdapterConfig(order=2, per_head=False),
    }
    adapted = {name: lambda c=config: get_peft_model(copy.deepcopy(stock), c) for name, config in configs.items()}
    return {FULL: lambda: copy.deepcopy(stock), **adapted}


def measure(name: str, size: str, budget_s: float) -> list[dict[str, object]]:
    """A row for each arm: seconds and memory of a step, and both over full fine-tuning's.

    Args:
        size: "full", or "tiny" to try the code out.
    """
    torch.manual_seed(0)
    build, low_rank = MODELS[name]
    stock = build(size).train()
    stock.set_attn_implementation("sdpa")
    ids = tokens(1, LENGTH, size)
    steps, rows = {}, {}
    for arm, make in arms(stock, low_rank).items():
        model = make()
        steps[arm] = training_step(model, {"input_ids": ids, "labels": ids}, "cpu")
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        rows[arm] = {"model": name, "arm": arm, "trained": trained, "MB": peak_extra_bytes(steps[arm]) / 1e6}
    times = paired_timing(steps, budget_s=budget_s, min_rounds=2, max_rounds=10, warmup=0)
    for arm, row in rows.items():
        row |= {"step s": times[arm].median, "time / full": times[arm].ratio(times[FULL])}
        row |= {"memory / full": row["MB"] / rows[FULL]["MB"], "rounds": len(times[arm].seconds), "load": load()}
    return list(rows.values())


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_thread_option(parser)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of steps per model")
    parser.add_argument("--size", choices=("tiny", "full"), default="full")
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    for name in MODELS:
        rows += measure(name, options.size, options.budget)
    print(table(rows))
    if options.size == "full":
        print("written to", write_results("adapter_step", rows).relative_to(ROOT))


if __name__ == "__main__":
    main()
