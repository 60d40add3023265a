"""Attention against SoftMax attention on a CPU: ``python -m benchmarks.attention [--full]``.

Every backend of MultiMax attention, the authors' formula in plain PyTorch, ``torch.compile`` of it and FlexAttention
(forward only: it cannot train the scalars) are timed against ``scaled_dot_product_attention`` with SoftMax, in turn in
one process. The slow ones, which would flush the caches and use up the time of the others, have rounds of their own and
only some rows. Peak extra memory is measured for one forward and backward pass, in a process of its own for each.
Writes benchmarks/results/attention-cpu.json after every row. The default takes some minutes; ``--full`` adds the
compilers, lengths to 16k and head dimension 128, and writes attention_full-cpu.json.

``python -m benchmarks.gpu`` measures on a GPU with the functions of this module, against the faster of SDPA's flash and
cuDNN kernels; there 1.5-entmax (adasplash) takes part as well where it is installed.
"""

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common import (
    ROOT,
    Timing,
    add_thread_option,
    load,
    paired_timing,
    peak_extra_bytes,
    write_results,
)
from benchmarks.tables import table
from hf_multimax.attention.call import make_call

SDPA = "sdpa"
#: by device: what is compared with the fastest of them
REFERENCES = {"cpu": (SDPA,), "cuda": ("flash", "cudnn")}
SDPA_KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
BACKENDS = {"cpu": ("native", "tiled"), "cuda": ("triton",)}
#: the plain formula holds several [queries, keys] matrices: on CUDA not beyond this many scores
PLAIN_SCORES = 1 << 30


@dataclass(frozen=True)
class Shape:
    """One row of the table."""

    batch: int
    heads: int
    queries: int
    keys: int
    dim: int = 64
    causal: bool = False
    dtype: str = "float32"
    training: bool = True
    unfused: bool = False  # also the plain formula, which takes 10 to 30 times as long as the others on a CPU
    compilers: bool = False  # also torch.compile and FlexAttention, which take up to a minute per row to compile
    group: int = 1  # query heads that share a key head

    def __str__(self) -> str:
        length = str(self.keys) if self.queries == self.keys else f"{self.queries} of {self.keys}"
        special = [f"GQA {self.group}:1" if self.group > 1 else "", "causal" if self.causal else "", self.dtype]
        return ", ".join([f"{self.batch}x{self.heads}x{length}", f"D {self.dim}", *filter(None, special)])

    def tensors(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """Random q, k and v that require gradients."""
        dtype = getattr(torch, self.dtype)
        sizes = ((self.heads, self.queries), *((self.heads // self.group, self.keys),) * 2)
        shapes = ((self.batch, *size, self.dim) for size in sizes)
        q, k, v = (torch.randn(shape, device=device, dtype=dtype).requires_grad_() for shape in shapes)
        return q, k, v


def shapes(full: bool) -> list[Shape]:
    """The default table, or with ``full`` lengths to 16k and head dimension 128."""
    found = [
        *(Shape(2, 8, 1024, 1024, causal=causal, unfused=True, compilers=full) for causal in (False, True)),
        *(Shape(2, 8, 2048, 2048, causal=causal) for causal in (False, True)),
        *(Shape(2, 8, 1024, 1024, causal=causal, dtype="bfloat16") for causal in (False, True)),
        Shape(4, 12, 197, 197, unfused=True),
        Shape(4, 8, 64, 64, unfused=True),
        Shape(1, 1, 2048, 2048),
        *(Shape(1, 8, 1, n, training=False) for n in (2048, 32768)),
    ]
    if full:
        found += [Shape(1, 8, n, n, 64, causal) for n in (256, 4096, 16384) for causal in (False, True)]
        found += [Shape(2, 8, n, n, 128, causal) for n in (1024, 4096) for causal in (False, True)]
    return found


def memory_shapes(full: bool) -> list[Shape]:
    """What peak extra memory is measured at."""
    lengths = (1024, 2048, 4096, 8192) if full else (2048, 4096)
    # the plain formula at 8,192 would want 28 GB
    return [Shape(1, 8, n, n, unfused=n == 2048 or (full and n <= 4096)) for n in lengths]


def scalars(device: str) -> tuple[Tensor, Tensor]:
    """Parameters of order 2 with every term in use."""
    ranges = torch.tensor([0.0, 0.5, -0.5, 1.0], device=device, requires_grad=True)
    ts = torch.tensor([0.1, 0.1, 0.05, -0.05], device=device, requires_grad=True)
    return ranges, ts


def modulated(x: Tensor, ranges: Tensor, ts: Tensor) -> Tensor:
    """The modulator of order 2 as one would write it down."""
    low, high = (ranges[0] - x).clamp_min(0), (x - ranges[1]).clamp_min(0)
    low2, high2 = (ranges[2] - x).clamp_min(0), (x - ranges[3]).clamp_min(0)
    return x + ts[0] * low + ts[1] * high + ts[2] * low2**2 + ts[3] * high2**2


def plain(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, ts: Tensor, causal: bool) -> Tensor:
    """The authors' formula in plain PyTorch, with the whole score matrix in memory."""
    x = modulated((q @ k.mT).float() * q.shape[-1] ** -0.5, ranges, ts)
    if causal:
        keep = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).tril(x.shape[-1] - x.shape[-2])
        x = x.masked_fill(~keep, float("-inf"))
    return x.softmax(-1).to(v.dtype) @ v


def fused(shape: Shape, device: str, backends: Sequence[str]) -> dict[str, Callable[..., Tensor]]:
    """name -> function of (q, k, v, ranges, ts): SoftMax, our backends, and other people's kernels."""
    found: dict[str, Callable[..., Tensor]] = {name: softmax(shape, name) for name in REFERENCES[device]}
    for name in backends:
        found[name] = _backend(name, shape)
    if device == "cuda" and importlib.util.find_spec("adasplash") and shape.queries == shape.keys:
        adasplash = importlib.import_module("adasplash").adasplash
        found["entmax15"] = lambda q, k, v, ranges, ts: adasplash(q, k, v, alpha=1.5, is_causal=shape.causal)
    return found


def unfused(shape: Shape, device: str, training: bool, compiler: str) -> dict[str, Callable[..., Tensor]]:
    """name -> function for what MultiMax costs without this package; empty where the shape asks for none."""
    found: dict[str, Callable[..., Tensor]] = {}
    if shape.unfused and (device == "cpu" or shape.batch * shape.heads * shape.queries * shape.keys <= PLAIN_SCORES):
        found["plain"] = lambda *x: plain(*x, causal=shape.causal)
        if shape.compilers:
            compiled = torch.compile(plain, backend=compiler)
            found["compile"] = lambda *x: compiled(*x, causal=shape.causal)
    if shape.compilers and not training:
        found["flex"] = _flex(shape, device, compiler)
    return {**{name: softmax(shape, name) for name in REFERENCES[device]}, **found} if found else {}


def softmax(shape: Shape, name: str) -> Callable[..., Tensor]:
    """SDPA: ``"sdpa"`` as it chooses its kernel, ``"flash"`` or ``"cudnn"`` by that one."""

    def attention(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, ts: Tensor) -> Tensor:
        with sdpa_kernel(SDPA_KERNELS[name]) if name in SDPA_KERNELS else contextlib.nullcontext():
            return F.scaled_dot_product_attention(q, k, v, is_causal=shape.causal, enable_gqa=shape.group > 1)

    return attention


def _backend(name: str, shape: Shape) -> Callable[..., Tensor]:
    attention = importlib.import_module(f"hf_multimax.attention.{name}.backend").attention
    return lambda *x: attention(make_call(*x, causal=shape.causal))


def _flex(shape: Shape, device: str, compiler: str) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = None
    if shape.causal:
        mask = create_block_mask(lambda b, h, i, j: j <= i, None, None, shape.queries, shape.keys, device=device)
    compiled = torch.compile(flex_attention, backend=compiler)

    def attention(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, ts: Tensor) -> Tensor:
        q, k, v, ranges, ts = (x.detach() for x in (q, k, v, ranges, ts))
        return compiled(q, k, v, score_mod=lambda x, *where: modulated(x, ranges, ts), block_mask=mask)

    return attention


def runnable(functions: dict[str, Callable[[], object]], notes: dict[str, str]) -> dict[str, Callable[[], object]]:
    """Those that run once without an error; the error of the others goes into ``notes``."""
    found = {}
    for name, function in functions.items():
        try:
            function()
        except Exception as error:  # noqa: BLE001 - whatever a compiler raises, the table says that it did
            notes[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120] if str(error) else ''}"
        else:
            found[name] = function
    return found


def measure(
    shape: Shape, device: str, budget_s: float, *, backends: Sequence[str] | None = None, compiler: str = "inductor"
) -> dict[str, object]:
    """One row: milliseconds of SoftMax, and everything's time relative to the faster SoftMax, for each phase.

    Args:
        device: "cpu" or "cuda". On CUDA the time of the GPU alone counts.
        budget_s: seconds of rounds for each phase and group of candidates.
        backends: ours; by default those of the device.
        compiler: the backend of ``torch.compile``.

    Returns:
        For the phases "forward" and, unless the shape is without, "training" (forward and backward):
        ``"<phase> <name> ms"``, ``"<phase> reference"``, the faster SoftMax, and ``"<phase> <name>"``, the ratio of the
        others to it. ``"not run"`` holds the errors of those that did not run.
    """
    backends = BACKENDS[device] if backends is None else backends
    tensors = (*shape.tensors(device), *scalars(device))
    row: dict[str, object] = {"shape": str(shape), **asdict(shape)}
    notes: dict[str, str] = {}
    for phase in ("forward", "training") if shape.training else ("forward",):
        torch.compiler.reset()
        make = both_passes if phase == "training" else forward_pass
        for slow in (False, True):
            training = phase == "training"
            made = unfused(shape, device, training, compiler) if slow else fused(shape, device, backends)
            functions = runnable({name: make(function, tensors) for name, function in made.items()}, notes)
            if not functions:
                continue
            rounds = {"min_rounds": 2, "max_rounds": 9, "warmup": 0} if slow else {"min_rounds": 3, "warmup": 1}
            times = paired_timing(functions, device=device, budget_s=budget_s, head_start=True, **rounds)
            _enter(row, phase, times, device, first=not slow)
    return {**row, "load": load(), "not run": notes}


def _enter(row: dict[str, object], phase: str, times: dict[str, Timing], device: str, first: bool) -> None:
    """Write the milliseconds of SoftMax (once) and the others' ratios to the faster SoftMax into the row."""
    references = [name for name in REFERENCES[device] if name in times]
    if not references:
        raise RuntimeError(f"none of SDPA's kernels ran: {', '.join(REFERENCES[device])}")
    fastest = min(references, key=lambda name: times[name].median)
    if first:
        row.update({f"{phase} {name} ms": times[name].median * 1e3 for name in references})
        row[f"{phase} reference"] = fastest
    for name, timing in times.items():
        if name not in references:
            row[f"{phase} {name}"] = timing.ratio(times[fastest])
            row[f"{phase} {name} ms"] = timing.median * 1e3


def forward_pass(function: Callable[..., Tensor], tensors: Iterable[Tensor]) -> Callable[[], object]:
    """A call without gradients."""

    def call() -> None:
        with torch.no_grad():
            function(*tensors)

    return call


def both_passes(function: Callable[..., Tensor], tensors: Iterable[Tensor]) -> Callable[[], object]:
    """A call and its backward pass."""
    grad = torch.randn_like(next(iter(tensors)))

    def call() -> None:
        function(*tensors).backward(grad)
        for x in tensors:
            x.grad = None

    return call


def peak_memory(shape: Shape, device: str, name: str) -> dict[str, float]:
    """MB beyond the inputs that ``name`` takes at most, for the forward and for forward + backward."""
    small = Shape(1, 1, 20, 20, dtype=shape.dtype)
    function = plain_or_backend(name, shape)
    found = {}
    for phase, make in (("forward", forward_pass), ("training", both_passes)):
        for own in (small, shape):
            tensors = (*own.tensors(device), *scalars(device))
            extra = peak_extra_bytes(make(function, tensors), device=device)
        found[phase] = extra / 2**20
    return found


def plain_or_backend(name: str, shape: Shape) -> Callable[..., Tensor]:
    """A candidate by name that needs no compiler."""
    if name == SDPA or name in SDPA_KERNELS:
        return softmax(shape, name)
    return (lambda *x: plain(*x, causal=shape.causal)) if name == "plain" else _backend(name, shape)


def measure_memory(shape: Shape) -> dict[str, object]:
    """One row of the memory table of a CPU, each figure from a process of its own."""
    row: dict[str, object] = {"shape": str(shape)}
    for name in (SDPA, *BACKENDS["cpu"], *(("plain",) if shape.unfused else ())):
        arguments = json.dumps({"shape": asdict(shape), "name": name})
        command = [sys.executable, "-m", "benchmarks.attention", "--threads", str(torch.get_num_threads())]
        command += ["--memory-of", arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=dict(os.environ))
        row.update({f"{phase} {name} MB": extra for phase, extra in json.loads(done.stdout).items()})
    return row


def main() -> None:
    """Measure, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="more lengths and head dimensions")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds of rounds per group of cells")
    add_thread_option(parser)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        wanted = json.loads(arguments.memory_of)
        print(json.dumps(peak_memory(Shape(**wanted["shape"]), "cpu", wanted["name"])))
        return
    rows, memory = [], []
    name = "attention_full" if arguments.full else "attention"
    for shape in shapes(arguments.full):
        rows.append(measure(shape, "cpu", arguments.budget))
        # written after every row: an interrupted run keeps what it has measured
        write_results(name, rows, memory=memory)
        print(f"measured {shape}", file=sys.stderr, flush=True)
    for shape in memory_shapes(arguments.full):
        memory.append(measure_memory(shape))
    path = write_results(name, rows, memory=memory)
    shown = [name for row in rows for name in row if name.startswith(("forward", "train"))]
    print(f"Time relative to {SDPA} with SoftMax (median of paired ratios)\n")
    print(table(rows, ["shape", *dict.fromkeys(shown), "load"]))
    print(f"\nPeak extra memory\n\n{table(memory)}\n")
    print("written to", path.relative_to(ROOT))


if __name__ == "__main__":
    main()
