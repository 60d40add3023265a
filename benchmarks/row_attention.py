"""Attention through every normalizer on a CPU, against SoftMax's: ``python -m benchmarks.row_attention``.

Each is timed against ``scaled_dot_product_attention``, in turn in one process, forward and forward + backward, at
2x8x1024x64 in float32: under a causal mask on random queries and keys, on queries of four times their size, whose
peaked rows leave more keys without weight, without a mask, and some at four times the length. Writes
benchmarks/results/row_attention-cpu.json after every row; ten minutes on a quiet machine.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.attention import Shape, softmax
from benchmarks.common import ROOT, add_thread_option, load, paired_timing, peak_extra_bytes, write_results
from benchmarks.tables import table
from hf_multimax import MultiMaxConfig, build_normalizer
from hf_multimax.attention.interface import scaled_dot_product_multimax
from hf_multimax.normalizers.base import Normalizer
from hf_multimax.normalizers.registry import get_normalizer

#: label -> name and options
CANDIDATES: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax, temperature 2": ("softmax", {"temperature": 2.0}),
    "scalable_softmax": ("scalable_softmax", {}),
    "adaptive_temperature": ("adaptive_temperature", {"apply_in_training": True}),
    "softmax1": ("softmax1", {}),
    "sigmoid": ("sigmoid", {}),
    "sparsemax": ("sparsemax", {}),
    "entmax15": ("entmax15", {}),
    "entmax, alpha 1.25": ("entmax", {"alpha": 1.25}),
    "entmax, alpha learned": ("entmax", {"alpha": 1.25, "learn": True}),
    "asentmax": ("asentmax", {"beta": 0.55, "gamma": 0.0}),
    "asentmax, adapt": ("asentmax", {"scaling": "adapt"}),
    "rsoftmax, 0.5": ("rsoftmax", {}),
    "tsoftmax, t 4": ("tsoftmax", {"t": 4.0}),
    "evsoftmax": ("evsoftmax", {}),
    "topk_softmax, k 32": ("topk_softmax", {"k": 32}),
    "fusedmax": ("fusedmax", {}),
    "oscarmax": ("oscarmax", {}),
    "softpick": ("softpick", {}),
}
#: what is timed at the long length, too
LONG = ("softmax, temperature 2", "scalable_softmax", "sparsemax", "entmax15", "rsoftmax, 0.5")


@dataclass(frozen=True)
class Case:
    """What attention is timed on: ``spread`` is the standard deviation of the scores."""

    shape: Shape
    spread: float = 1.0


CASES = {
    "causal": Case(Shape(2, 8, 1024, 1024, causal=True)),
    "causal, peaked": Case(Shape(2, 8, 1024, 1024, causal=True), 4.0),
    "full": Case(Shape(2, 8, 1024, 1024)),
    "4,096, causal": Case(Shape(2, 8, 4096, 4096, causal=True)),
}
PHASES = ("forward", "training")


def normalizer_of(label: str, heads: int, head_dim: int) -> Normalizer:
    """The module that a patched layer would hold."""
    name, options = CANDIDATES[label]
    config = MultiMaxConfig(normalizer=name, normalizer_kwargs=options)
    return build_normalizer(config, heads if get_normalizer(name).per_head else None, head_dim)


def call_of(label: str, case: Case, phase: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """The call through a normalizer, and SoftMax's."""
    q, k, v = case.shape.tensors("cpu")
    q = (q.detach() * case.spread).requires_grad_()
    module = normalizer_of(label, case.shape.heads, q.shape[-1])
    leaves, grad, attend = (q, k, v, *module.parameters()), torch.randn_like(q), softmax(case.shape, "sdpa")

    def run(function: Callable[[], Tensor]) -> None:
        with torch.set_grad_enabled(phase == "training"):
            out = function()
            if phase == "training":
                torch.autograd.grad(out, leaves, grad, allow_unused=True)

    own = lambda: scaled_dot_product_multimax(module, q, k, v, is_causal=case.shape.causal)  # noqa: E731
    return lambda: run(own), lambda: run(lambda: attend(q, k, v, None, None))


def measure(label: str, budget_s: float) -> dict[str, object]:
    """One row: the ratio to SDPA for each case and phase."""
    row: dict[str, object] = {"normalizer": label}
    for name, case in CASES.items():
        for phase in PHASES if case.shape.keys <= 1024 or label in LONG else ():
            torch.manual_seed(0)
            own, reference = call_of(label, case, phase)
            times = paired_timing({"own": own, "sdpa": reference}, budget_s=budget_s, min_rounds=3, warmup=1)
            row[f"{name} {phase}"] = times["own"].ratio(times["sdpa"])
            row[f"{name} {phase} ms"] = times["own"].median * 1e3
    return {**row, "load": load()}


def memory(label: str) -> float:
    """MB beyond the inputs of forward and backward at 1x8x4096, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.row_attention", "--memory-of", label]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=dict(os.environ))
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=1.0, help="seconds per normalizer, case and phase")
    add_thread_option(parser)
    parser.add_argument("--memory-of", choices=CANDIDATES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        for length in (20, 4096):
            own, _ = call_of(arguments.memory_of, Case(Shape(1, 8, length, length)), "training")
            extra = peak_extra_bytes(own)
        print(json.dumps(extra / 2**20))
        return
    rows = []
    for label in CANDIDATES:
        rows.append({**measure(label, arguments.budget), "training MB": memory(label)})
        write_results("row_attention", rows)
        print(table(rows[-1:]), flush=True)


if __name__ == "__main__":
    main()
