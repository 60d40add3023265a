"""Attention against SoftMax attention: ``python -m benchmarks.attention [--full] [--device cuda]``.

Every backend of MultiMax attention, the authors' formula in plain PyTorch, ``torch.compile`` of it and FlexAttention
(forward only: it cannot train the scalars) are timed against ``scaled_dot_product_attention`` with SoftMax, in turn in
one process; on CUDA 1.5-entmax (adasplash) as well where it is installed. Peak extra memory is measured for one forward
and backward pass, on a CPU in a process of its own for each. Writes benchmarks/results/attention-<device>.json.
"""

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import ROOT, paired_timing, peak_extra_bytes, table, write_results

REFERENCE = "sdpa"
BACKENDS = {"cpu": ("native", "tiled"), "cuda": ("triton", "tiled")}
MODULES = {"native": "native", "tiled": "tiled", "triton": "triton_attention"}
#: the plain formula holds several [queries, keys] matrices: not beyond this many scores
PLAIN_SCORES = {"cpu": 1 << 25, "cuda": 1 << 30}


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
    compilers: bool = False  # also torch.compile and FlexAttention, which take a minute per row to compile

    def __str__(self) -> str:
        length = str(self.keys) if self.queries == self.keys else f"{self.queries} of {self.keys}"
        return f"{self.batch}x{self.heads}x{length}, D {self.dim}{', causal' if self.causal else ''}, {self.dtype}"

    def tensors(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """Random q, k and v that require gradients."""
        dtype = getattr(torch, self.dtype)
        shapes = ((self.batch, self.heads, n, self.dim) for n in (self.queries, self.keys, self.keys))
        q, k, v = (torch.randn(shape, device=device, dtype=dtype).requires_grad_() for shape in shapes)
        return q, k, v


def shapes(device: str, full: bool) -> list[Shape]:
    """The default table, or with ``full`` lengths to 16k and head dimension 128."""
    if device == "cuda":
        lengths = (64, 512, 2048, 4096, 16384) if full else (512, 2048, 8192)
        square = [
            Shape(max(1, 16384 // n), 16, n, n, dim, causal, "bfloat16", compilers=n == 2048)
            for dim in (64, 128)
            for n in lengths
            for causal in (False, True)
        ]
        return [*square, *(Shape(16, 16, 1, n, 128, False, "bfloat16", False) for n in (2048, 32768))]
    found = [
        *(Shape(2, 8, 1024, 1024, causal=causal, compilers=True) for causal in (False, True)),
        *(Shape(2, 8, 2048, 2048, causal=causal) for causal in (False, True)),
        *(Shape(2, 8, 1024, 1024, causal=causal, dtype="bfloat16") for causal in (False, True)),
        Shape(4, 12, 197, 197),
        Shape(4, 8, 64, 64),
        Shape(1, 1, 2048, 2048),
        *(Shape(1, 8, 1, n, training=False) for n in (2048, 32768)),
    ]
    if full:
        found += [Shape(1, 8, n, n, 64, causal) for n in (256, 4096, 16384) for causal in (False, True)]
        found += [Shape(2, 8, n, n, 128, causal) for n in (1024, 4096) for causal in (False, True)]
    return found


def memory_shapes(device: str, full: bool) -> list[Shape]:
    """What peak extra memory is measured at."""
    dtype = "bfloat16" if device == "cuda" else "float32"
    return [Shape(1, 8, n, n, dtype=dtype) for n in ((1024, 2048, 4096, 8192) if full else (2048, 4096))]


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


def candidates(shape: Shape, device: str, training: bool) -> dict[str, Callable[..., Tensor]]:
    """name -> function of (q, k, v, ranges, ts) for everything that can run this shape."""
    found: dict[str, Callable[..., Tensor]] = {REFERENCE: _sdpa(shape)}
    for name in BACKENDS[device]:
        found[name] = _backend(name, shape)
    if shape.batch * shape.heads * shape.queries * shape.keys <= PLAIN_SCORES[device]:
        found["plain"] = lambda *x: plain(*x, causal=shape.causal)
        if shape.compilers:
            compiled = torch.compile(plain)
            found["compile"] = lambda *x: compiled(*x, causal=shape.causal)
    if shape.compilers and not training:
        found["flex"] = _flex(shape, device)
    if device == "cuda" and importlib.util.find_spec("adasplash") and shape.queries == shape.keys:
        adasplash = importlib.import_module("adasplash").adasplash
        found["entmax15"] = lambda q, k, v, ranges, ts: adasplash(q, k, v, alpha=1.5, is_causal=shape.causal)
    return found


def _sdpa(shape: Shape) -> Callable[..., Tensor]:
    return lambda q, k, v, ranges, ts: F.scaled_dot_product_attention(q, k, v, is_causal=shape.causal)


def _backend(name: str, shape: Shape) -> Callable[..., Tensor]:
    attention = importlib.import_module(f"hf_multimax.kernels.{MODULES[name]}").attention
    return lambda *x: attention(*x, causal=shape.causal)


def _flex(shape: Shape, device: str) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = None
    if shape.causal:
        mask = create_block_mask(lambda b, h, i, j: j <= i, None, None, shape.queries, shape.keys, device=device)
    compiled = torch.compile(flex_attention)

    def attention(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, ts: Tensor) -> Tensor:
        ranges, ts = ranges.detach(), ts.detach()
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


def measure(shape: Shape, device: str, budget_s: float) -> dict[str, object]:
    """One row: SDPA's milliseconds, and everything's time relative to it, forward and forward + backward."""
    tensors = (*shape.tensors(device), *scalars(device))
    row: dict[str, object] = {"shape": str(shape), **asdict(shape)}
    notes: dict[str, str] = {}
    for phase in ("forward", "training") if shape.training else ("forward",):
        torch.compiler.reset()
        made = candidates(shape, device, phase == "training")
        make = _training_step if phase == "training" else _inference
        functions = runnable({name: make(function, tensors) for name, function in made.items()}, notes)
        times = paired_timing(functions, device=device, budget_s=budget_s)
        row[f"{phase} {REFERENCE} ms"] = times[REFERENCE].median * 1e3
        for name in functions:
            if name != REFERENCE:
                row[f"{phase} {name}"] = times[name].ratio(times[REFERENCE])
    return {**row, "not run": notes}


def _inference(function: Callable[..., Tensor], tensors: Iterable[Tensor]) -> Callable[[], object]:
    def call() -> None:
        with torch.no_grad():
            function(*tensors)

    return call


def _training_step(function: Callable[..., Tensor], tensors: Iterable[Tensor]) -> Callable[[], object]:
    grad = torch.randn_like(next(iter(tensors)))

    def call() -> None:
        function(*tensors).backward(grad)
        for x in tensors:
            x.grad = None

    return call


def peak_memory(shape: Shape, device: str, name: str) -> dict[str, float]:
    """MB beyond the inputs that ``name`` takes at most, for the forward and for forward + backward."""
    small = Shape(1, 1, 64, 64, dtype=shape.dtype)
    function = plain_or_backend(name, shape)
    found = {}
    for phase, make in (("forward", _inference), ("training", _training_step)):
        for own in (small, shape):
            tensors = (*own.tensors(device), *scalars(device))
            extra = peak_extra_bytes(make(function, tensors), device=device)
        found[phase] = extra / 2**20
    return found


def plain_or_backend(name: str, shape: Shape) -> Callable[..., Tensor]:
    """A candidate by name that needs no compiler."""
    if name == REFERENCE:
        return _sdpa(shape)
    return (lambda *x: plain(*x, causal=shape.causal)) if name == "plain" else _backend(name, shape)


def measure_memory(shape: Shape, device: str) -> dict[str, object]:
    """One row of the memory table."""
    row: dict[str, object] = {"shape": str(shape)}
    for name in (REFERENCE, *BACKENDS[device], "plain"):
        if device == "cpu":
            arguments = json.dumps({"shape": asdict(shape), "name": name})
            command = [sys.executable, "-m", "benchmarks.attention", "--memory-of", arguments]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=dict(os.environ))
            found = json.loads(done.stdout)
        else:
            found = peak_memory(shape, device, name)
        row.update({f"{phase} {name} MB": extra for phase, extra in found.items()})
    return row


def main() -> None:
    """Measure, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="more lengths and head dimensions")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--budget", type=float, default=4.0, help="seconds of rounds per table cell group")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        wanted = json.loads(arguments.memory_of)
        print(json.dumps(peak_memory(Shape(**wanted["shape"]), "cpu", wanted["name"])))
        return
    device, rows = arguments.device, []
    for shape in shapes(device, arguments.full):
        rows.append(measure(shape, device, arguments.budget))
        print(f"measured {shape}", file=sys.stderr, flush=True)
    memory = [measure_memory(shape, device) for shape in memory_shapes(device, arguments.full)]
    columns = ["shape", *dict.fromkeys(name for row in rows for name in row if name.startswith(("forward", "train")))]
    print(f"Time relative to {REFERENCE} with SoftMax (median of paired ratios)\n\n{table(rows, columns)}\n")
    print(f"Peak extra memory\n\n{table(memory)}\n")
    print("written to", write_results("attention", rows, device=device, memory=memory).relative_to(ROOT))


if __name__ == "__main__":
    main()
