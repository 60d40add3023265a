"""What every benchmark shares: paired timing, peak extra memory, the machine's description, tables and JSON.

Two computations are compared by running them in turn, many times, in one process: a busy neighbour then slows both. On
a CPU the default is one thread and its CPU time, which a busy neighbour hardly touches at all; with more threads, which
wait for each other at the end of every operation, it is the time on the wall, and the machine has to be quiet.
"""

import argparse
import ctypes
import functools
import gc
import json
import os
import platform
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import median

import torch

__all__ = [
    "add_thread_option",
    "Timing",
    "environment",
    "load",
    "paired_timing",
    "peak_extra_bytes",
    "results_path",
    "write_results",
]

ROOT = Path(__file__).resolve().parent.parent
#: of the GPU's clock, about 2 ms: more than the host takes to launch an attention call and its backward pass
HEAD_START_CYCLES = 4_000_000
VERSIONED = ("torch", "transformers", "triton", "entmax", "adasplash", "numpy")


def add_thread_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--threads``, which sets PyTorch's number of threads as soon as it is parsed; one is the default."""
    torch.set_num_threads(1)
    parser.add_argument(
        "--threads",
        type=lambda text: torch.set_num_threads(int(text)),
        help="threads on a CPU (default 1, timed by CPU time; with more, keep the machine quiet)",
    )


@dataclass(frozen=True)
class Timing:
    """Seconds of one candidate in every round, in the order of the rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median round in seconds."""
        return median(self.seconds)

    def ratio(self, reference: "Timing") -> float:
        """The median over rounds of this candidate's time divided by the reference's time in the same round."""
        return median(own / other for own, other in zip(self.seconds, reference.seconds, strict=True))


def paired_timing(
    candidates: Mapping[str, Callable[[], object]],
    *,
    device: str | torch.device = "cpu",
    budget_s: float = 3.0,
    min_rounds: int = 5,
    max_rounds: int = 200,
    warmup: int = 2,
    head_start: bool = False,
) -> dict[str, Timing]:
    """Time several computations against each other in one process.

    Args:
        candidates: name -> function without arguments.
        device: what the functions run on; CUDA work is timed with events, one thread on a CPU by its CPU time.
        budget_s: seconds to spend on the rounds of all candidates together (warm-up not counted); with 0 there is one
            round and no warm-up, for trying things out.
        min_rounds, max_rounds: bounds on the number of rounds whatever the budget.
        warmup: calls of every candidate before the first round.
        head_start: on CUDA, let the host run ahead while the GPU waits, so that what the host takes to launch the work
            does not count as long as it is below :data:`HEAD_START_CYCLES`.

    Returns:
        name -> :class:`Timing`; every candidate has as many rounds as the others. The starting candidate rotates, so
        that none always runs on the caches another one leaves behind.
    """
    if budget_s <= 0:
        min_rounds, warmup = 1, 0
    names = list(candidates)
    timed = functools.partial(_timed_cuda, head_start) if torch.device(device).type == "cuda" else _timed_cpu
    for _ in range(warmup):
        for name in names:
            candidates[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for round_ in range(max_rounds):
        if round_ >= min_rounds and time.perf_counter() - start > budget_s:
            break
        shift = round_ % len(names)
        for name in names[shift:] + names[:shift]:
            seconds[name].append(timed(candidates[name]))
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def _timed_cpu(function: Callable[[], object]) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    function()
    return clock() - start


def _timed_cuda(head_start: bool, function: Callable[[], object]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    if head_start:
        torch.cuda._sleep(HEAD_START_CYCLES)
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def peak_extra_bytes(function: Callable[[], object], *, device: str | torch.device = "cpu") -> int:
    """Most memory in use during ``function()`` beyond what was in use before it, in bytes.

    On CUDA the allocator's own count. On a CPU the resident set of the process, so run ``function`` on a small input
    first (code pages and thread stacks are then loaded) and keep its results alive inside it if they are to count.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    _trim_heap()
    if _reset_peak_resident():
        before = _status_bytes("VmRSS")
        function()
        return max(0, _status_bytes("VmHWM") - before)
    return _sampled_peak(function)


def _trim_heap() -> None:
    """Give freed heap pages back, so that memory reused from an earlier call is counted again."""
    if platform.system() == "Linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _reset_peak_resident() -> bool:
    """Set the kernel's high-water mark of the resident set to its present value; False where that is not possible."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return _status_bytes("VmHWM") - _status_bytes("VmRSS") < 1 << 20


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def _sampled_peak(function: Callable[[], object]) -> int:
    """The resident set sampled from a thread, where the kernel keeps no high-water mark."""
    done, peak = threading.Event(), [_resident_bytes()]
    before = peak[0]

    def sample() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], _resident_bytes())
            time.sleep(2e-4)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        function()
        peak[0] = max(peak[0], _resident_bytes())
    finally:
        done.set()
        sampler.join()
    return peak[0] - before


def _resident_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    except OSError as error:
        raise RuntimeError("peak memory on a CPU is measured through /proc, which this system lacks") from error


def environment(device: str | torch.device = "cpu") -> dict[str, object]:
    """The machine, the versions and the commit that a result belongs to (nothing that identifies the host).

    ``commit`` and ``modified`` are None where git cannot tell.
    """
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    described: dict[str, object] = {
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version for name in VERSIONED if (version := _version(name))},
        "commit": _git("rev-parse", "HEAD"),
        "modified": None if changes is None else bool(changes),
    }
    if torch.device(device).type == "cuda":
        described["gpu"] = torch.cuda.get_device_name()
        described["cuda"] = torch.version.cuda
    return described


def load() -> float | None:
    """The machine's load average of the last minute: well above its cores, ratios are noisy. None where unknown."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """What git prints; None where it cannot tell, as in a copy without a repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def results_path(name: str, device: str) -> Path:
    """benchmarks/results/<name>-<device>.json"""
    return ROOT / "benchmarks" / "results" / f"{name}-{device}.json"


def write_results(name: str, rows: Sequence[Mapping[str, object]], *, device: str = "cpu", **more: object) -> Path:
    """Write ``rows`` with the environment (and whatever else is given) as JSON; returns the file."""
    path = results_path(name, torch.device(device).type)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"benchmark": name, "environment": environment(device), **more, "rows": list(rows)}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path
