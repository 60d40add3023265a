"""Attention through sparse functions on the scores of a trained model: ``python -m benchmarks.trained_attention``.

q, k and v are those of some layers of SmolLM2-135M, a causal model of 9 query and 3 key heads of 64, over 1,024 tokens
of Python's documentation; beside them random ones of the same shape. Functions with exact zeros leave out the keys that
no row of a block gives weight, so the sparser the rows, the less they take. Ratios are to
``scaled_dot_product_attention`` in turn in one process, the median of the layers. Writes
``benchmarks/results/trained_attention-cpu.json``.
"""

import argparse
import pydoc_data.topics
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.common import ROOT, add_thread_option, load, paired_timing, write_results
from benchmarks.row_attention import CANDIDATES, PHASES, normalizer_of
from benchmarks.tables import table
from hf_multimax import normalize
from hf_multimax.attention.interface import scaled_dot_product_multimax
from recipes.shared.checkpoints import checkpoint_folder

LENGTH = 1024
LAYERS = (1, 8, 15, 22, 29)
FUNCTIONS = ("softmax, temperature 2", "sparsemax", "entmax15", "entmax, alpha 1.25", "rsoftmax, 0.5")

Triple = tuple[Tensor, Tensor, Tensor]


def trained(layers: Sequence[int]) -> list[Triple]:
    """q, k and v of these layers, each ``[1, heads, LENGTH, 64]`` with as many heads as it has."""
    seen: dict[int, Triple] = {}

    def record(module, query, key, value, *args, **kwargs):
        seen[module.layer_idx] = (query, key, value)
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    AttentionInterface.register("recorded", record)
    folder = checkpoint_folder("smollm2")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="recorded").eval()
    text = "\n".join(pydoc_data.topics.topics.values())[: 8 * LENGTH]
    with torch.no_grad():
        model(AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[:, :LENGTH])
    return [seen[layer] for layer in layers]


def made_up(like: Triple) -> Triple:
    """Normal ones, whose scores have a standard deviation of 1."""
    q, k, v = (torch.randn_like(x) for x in like)
    return q, k, v


def zeros(label: str, qkv: Triple) -> float:
    """The share of exact zeros among the visible weights."""
    q, k, _ = qkv
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * q.shape[-1] ** -0.5
    keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    name, options = CANDIDATES[label]
    return (normalize(name, scores, mask=keep, **options)[..., keep] == 0).float().mean().item()


def ratios(label: str, qkv: Triple, phase: str, budget_s: float) -> float:
    """The time of attention through a function over SDPA's."""
    q, k, v = (x.detach().clone().requires_grad_() for x in qkv)
    module = normalizer_of(label, q.shape[1], q.shape[-1])
    grad, leaves = torch.randn_like(q), (q, k, v)

    def run(attend: Callable[[], Tensor]) -> None:
        with torch.set_grad_enabled(phase == "training"):
            out = attend()
            if phase == "training":
                torch.autograd.grad(out, leaves, grad)

    sdpa = torch.nn.functional.scaled_dot_product_attention
    candidates = {
        "own": lambda: run(lambda: scaled_dot_product_multimax(module, q, k, v, is_causal=True)),
        "sdpa": lambda: run(lambda: sdpa(q, k, v, is_causal=True, enable_gqa=True)),
    }
    times = paired_timing(candidates, budget_s=budget_s, min_rounds=3, warmup=1)
    return times["own"].ratio(times["sdpa"])


def measure(label: str, cases: dict[str, list[Triple]], budget_s: float) -> dict[str, object]:
    """One row: zeros in per cent and ratios, for each case the median of its triples."""
    row: dict[str, object] = {"normalizer": label}
    for case, triples in cases.items():
        row[f"{case} zeros %"] = 100 * median(zeros(label, qkv) for qkv in triples)
        for phase in PHASES:
            row[f"{case} {phase}"] = median(ratios(label, qkv, phase, budget_s) for qkv in triples)
    return {**row, "load": load()}


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_thread_option(parser)
    parser.add_argument("--budget", type=float, default=1.0, help="seconds per function, layer and phase")
    budget = parser.parse_args().budget
    torch.manual_seed(0)
    layers = trained(LAYERS)
    cases = {"SmolLM2": layers, "random": [made_up(layers[0])]}
    rows = [measure(label, cases, budget) for label in FUNCTIONS]
    print(table(rows))
    print("written to", write_results("trained_attention", rows).relative_to(ROOT))


if __name__ == "__main__":
    main()
