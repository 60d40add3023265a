"""The output layer with its loss: fused (chunks, gradients in the forward pass) against unfused, time and peak memory.

``python -m benchmarks.cross_entropy [--full] [--cases TOKENSxVOCAB ...]``: one training pass (loss and the gradients of
hidden states, weight and modulator) of linear layer, modulation and cross-entropy on a CPU. "unfused" is the modulator
in plain PyTorch in front of ``cross_entropy``; the SoftMax rows leave the modulator out. The default takes some
minutes; ``--full`` adds 8192 tokens; with it or with cases of one's own, their names join the file's.
``python -m benchmarks.gpu`` measures on a GPU with the functions of this module, and there also Liger's fused SoftMax
loss where its package is installed.
"""

import argparse
import os
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch.nn.functional import cross_entropy

from benchmarks.common import ROOT, add_thread_option, load, paired_timing, peak_extra_bytes, write_results
from benchmarks.tables import table
from hf_multimax.functional import modulate
from hf_multimax.loss.cross_entropy import multimax_linear_cross_entropy

WIDTH = 768
CASES = ("512x32000", "512x50257", "512x128256")
MORE_CASES = ("1024x50257", "8192x50257")
UNFUSED, UNFUSED_SOFTMAX = "unfused MultiMax", "unfused SoftMax"
#: [tokens, vocab] float32 matrices that each unfused computation holds at its peak, rounded up: what to leave out
UNFUSED_MATRICES = {UNFUSED: 13, UNFUSED_SOFTMAX: 4}


def candidates(tokens: int, vocab: int, device: str, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Training passes by name, on one set of inputs."""
    g = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(tokens, WIDTH, generator=g, device=device).to(dtype).requires_grad_()
    weight = (WIDTH**-0.5 * torch.randn(vocab, WIDTH, generator=g, device=device)).to(dtype).requires_grad_()
    ranges = (0.02 * torch.randn(4, generator=g, device=device)).requires_grad_()
    ts = (0.02 * torch.randn(4, generator=g, device=device)).requires_grad_()
    labels = torch.randint(vocab, (tokens,), generator=g, device=device)

    def fused() -> object:
        loss = multimax_linear_cross_entropy(hidden, weight, labels, ranges, ts)
        return torch.autograd.grad(loss, (hidden, weight, ranges, ts))

    def fused_softmax() -> object:
        return torch.autograd.grad(multimax_linear_cross_entropy(hidden, weight, labels, None, None), (hidden, weight))

    def unfused() -> object:
        loss = cross_entropy(modulate((hidden @ weight.T).float(), ranges, ts), labels)
        return torch.autograd.grad(loss, (hidden, weight, ranges, ts))

    def unfused_softmax() -> object:
        return torch.autograd.grad(cross_entropy((hidden @ weight.T).float(), labels), (hidden, weight))

    found: dict[str, Callable[[], object]] = {
        "fused MultiMax": fused,
        "fused SoftMax": fused_softmax,
        UNFUSED: unfused,
        UNFUSED_SOFTMAX: unfused_softmax,
    }
    if device == "cuda" and find_spec("liger_kernel") is not None:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        found["Liger's fused SoftMax"] = lambda: torch.autograd.grad(liger(weight, hidden, labels), (hidden, weight))
    return found


def measure(
    tokens: int, vocab: int, device: str, dtype: torch.dtype, budget_s: float = 10.0
) -> list[dict[str, object]]:
    """One row per candidate; an unfused one that would not fit into memory is left out."""
    fitting = {
        name: function
        for name, function in candidates(tokens, vocab, device, dtype).items()
        if 4 * tokens * vocab * UNFUSED_MATRICES.get(name, 0) < 0.7 * available_bytes(device)
    }
    peaks = {name: peak_extra_bytes(function, device=device) for name, function in fitting.items()}
    few = device == "cpu"
    timings = paired_timing(
        fitting,
        device=device,
        budget_s=budget_s,
        min_rounds=2 if few else 10,
        max_rounds=5 if few else 50,
        warmup=0 if few else 2,
    )
    time, peak = ({base: x[base] for base in (UNFUSED, UNFUSED_SOFTMAX) if base in fitting} for x in (timings, peaks))
    return [
        {
            "tokens": tokens,
            "vocabulary": vocab,
            "computation": name,
            "seconds": timings[name].median,
            "time / unfused": timings[name].ratio(time[UNFUSED]) if UNFUSED in time else None,
            "time / unfused SoftMax": timings[name].ratio(time[UNFUSED_SOFTMAX]) if UNFUSED_SOFTMAX in time else None,
            "peak MB": peaks[name] / 2**20,
            "peak / unfused": peaks[name] / peak[UNFUSED] if UNFUSED in peak else None,
            "peak / unfused SoftMax": peaks[name] / peak[UNFUSED_SOFTMAX] if UNFUSED_SOFTMAX in peak else None,
            "load": load(),
        }
        for name in fitting
    ]


def available_bytes(device: str) -> int:
    """Free memory of the device."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_thread_option(parser)
    parser.add_argument("--full", action="store_true", help="more tokens")
    parser.add_argument("--cases", nargs="+", metavar="TOKENSxVOCAB", help="sizes (default: the table in docs/)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    default = CASES + (MORE_CASES if arguments.full else ())
    sizes = [tuple(map(int, case.split("x"))) for case in arguments.cases or default]
    name = "_".join(["cross_entropy", *(arguments.cases or (["full"] if arguments.full else []))])
    measure(64, 1000, "cpu", dtype)
    rows: list[dict[str, object]] = []
    for size in sizes:
        rows += measure(*size, "cpu", dtype)
        # written after every size: an interrupted run keeps what it has measured
        path = write_results(name, rows, width=WIDTH, dtype=arguments.dtype)
    print(table(rows))
    print("written to", path.relative_to(ROOT))


if __name__ == "__main__":
    main()
