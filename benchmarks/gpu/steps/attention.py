"""Time and memory of attention against the faster of SDPA's flash and cuDNN kernels, and against what bounds it."""

import subprocess
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.attention import SDPA, Shape, both_passes, forward_pass, measure, peak_memory, scalars, softmax
from benchmarks.common import paired_timing
from benchmarks.gpu.cases import Case, Settings
from hf_multimax.attention.call import make_call
from hf_multimax.attention.triton.backend import attention

__all__ = ["cases", "roof"]

_TOKENS, _HEADS = 16384, 16
#: seconds of rounds for each phase of a row
_BUDGET = 0.6
#: arithmetic of both passes relative to the forward pass: five products of the same size instead of two
_BOTH_PASSES = 3.5
#: the kernels that a phase is made of
_KERNELS = {
    "forward": ("forward_kernel",),
    "training": ("forward_kernel", "dq_kernel", "dkdv_kernel"),
}
_LANES = 128


def cases(settings: Settings) -> list[Case]:
    """Long lengths first; then grouped heads, decoding, memory and the peers, which take long to compile."""
    shapes = _tiny_shapes() if settings.tiny else _shapes()
    memory = [Shape(1, 1, 20, 20, 16)] if settings.tiny else [_square(1, n, heads=8) for n in (1024, 4096, 16384)]
    unfused = [shape for shape in shapes if shape.compilers]
    timed = [Case(str(shape), lambda s=shape: _time(s, settings)) for shape in shapes if not shape.compilers]
    measured = [Case(f"memory of {shape}", lambda s=shape: _memory(s, settings)) for shape in memory]
    peers = [Case(f"peers at {shape}", lambda s=shape: _time(s, settings)) for shape in unfused]
    return [*timed, *measured, *peers]


def _square(batch: int, length: int, dim: int = 64, causal: bool = False, heads: int = _HEADS, **more: int) -> Shape:
    return Shape(batch, heads, length, length, dim, causal, "bfloat16", **more)


def _shapes() -> list[Shape]:
    lengths = (4096, 16384, 2048, 8192, 1024)
    found = [_square(_TOKENS // n, n, dim, causal) for n in lengths for dim in (128, 64) for causal in (True, False)]
    found += [_square(_TOKENS // 4096, 4096, dim, True, group=4) for dim in (128, 64)]
    found += [
        Shape(16, 16, 1, n, 128, False, "bfloat16", training=False, group=group)
        for n in (2048, 32768)
        for group in (1, 4)
    ]
    return found + [_square(1, 4096, dim, True, unfused=True, compilers=True) for dim in (64, 128)]


def _tiny_shapes() -> list[Shape]:
    return [
        Shape(1, 1, 40, 40, 16, True),
        Shape(1, 4, 1, 40, 16, training=False, group=4),
        Shape(1, 1, 20, 20, 16, True, unfused=True, compilers=True),
    ]


def _time(shape: Shape, settings: Settings) -> dict[str, object]:
    """A row as :func:`benchmarks.attention.measure` makes it, with rates and the share of the roof."""
    budget = settings.seconds(_BUDGET)
    row = measure(shape, settings.device, budget, backends=("triton",), compiler=settings.compiler)
    if settings.preparing:
        return {}
    for phase in ("forward", "training"):
        if f"{phase} triton ms" in row:
            seconds = row[f"{phase} triton ms"] / 1e3
            row[f"{phase} TFLOP/s"] = _operations(shape, phase) / seconds / 1e12
    if settings.device == "cuda" and shape.queries > 1:
        try:
            row |= roof(row, shape, settings)
        except (OSError, subprocess.SubprocessError) as error:  # without the disassembler the times are as good
            row["not run"]["roof"] = str(error)
    if shape.queries == 1:
        row["called triton"] = _as_called(shape, settings)
    return {"table": "rows", **row}


def _operations(shape: Shape, phase: str) -> float:
    """Floating-point operations of the products, as they are usually counted."""
    forward = 4 * scores(shape) * shape.dim
    return forward if phase == "forward" else _BOTH_PASSES * forward


def scores(shape: Shape) -> float:
    """How many scores a call has; a causal one half of them."""
    return shape.batch * shape.heads * shape.queries * shape.keys * (0.5 if shape.causal else 1.0)


def roof(row: dict[str, object], shape: Shape, settings: Settings) -> dict[str, object]:
    """How near each phase is to the time that its counted instructions take at the least.

    Of each kernel that the call launched, the cheapest loop over tiles counts, per score; a multiprocessor issues 128
    instructions per clock, at the clock that was found under load.
    """
    launched = _instructions(_call(shape, both_passes, settings))
    clock, processors = clock_hz(), torch.cuda.get_device_properties(0).multi_processor_count
    found: dict[str, object] = {"instructions per score": launched, "clock MHz": clock / 1e6}
    for phase, kernels in _KERNELS.items():
        if all(kernel in launched for kernel in kernels) and f"{phase} triton ms" in row:
            per_score = sum(launched[kernel] for kernel in kernels)
            least = scores(shape) * per_score / (_LANES * processors * clock)
            found[f"{phase} share of roof"] = least * 1e3 / row[f"{phase} triton ms"]
    return found


def _call(shape: Shape, make: Callable[..., Callable[[], object]], settings: Settings) -> Callable[[], object]:
    tensors = (*shape.tensors(settings.device), *scalars(settings.device))
    return make(lambda *x: attention(make_call(*x, causal=shape.causal)), tensors)


_counted: dict[str, float] = {}


def _instructions(call: Callable[[], object]) -> dict[str, float]:
    """Kernel -> instructions per score in its cheapest loop, of the kernels that ``call`` launches."""
    from benchmarks.instructions import recorded_launches

    with recorded_launches() as launches:
        call()
    found = {}
    for launch in launches:
        if launch.compiled.hash not in _counted:
            _counted[launch.compiled.hash] = min(launch.loops().per_score, default=0.0)
        found[launch.kernel] = _counted[launch.compiled.hash]
    return {kernel: count for kernel, count in found.items() if count}


def clock_hz(cycles: int = 20_000_000) -> float:
    """The multiprocessors' clock as it is now: what a kernel that waits for a number of cycles takes."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    torch.cuda._sleep(cycles)
    end.record()
    end.synchronize()
    return cycles / (begin.elapsed_time(end) / 1e3)


def _as_called(shape: Shape, settings: Settings) -> float:
    """The ratio with what the host takes to launch the work, to SDPA as it chooses its own kernel."""
    tensors = (*shape.tensors(settings.device), *scalars(settings.device))
    stock: Callable[..., Tensor] = softmax(shape, SDPA)
    calls = {
        SDPA: forward_pass(stock, tensors),
        "triton": _call(shape, forward_pass, settings),
    }
    times = paired_timing(calls, device=settings.device, budget_s=settings.seconds(0.3))
    return times["triton"].ratio(times[SDPA])


def _memory(shape: Shape, settings: Settings) -> dict[str, object]:
    row: dict[str, object] = {"table": "memory", "shape": str(shape)}
    names = (SDPA, "triton", "plain") if shape.keys <= 4096 else (SDPA, "triton")
    for name in names:
        for phase, extra in peak_memory(shape, settings.device, name).items():
            row[f"{phase} {name} MB"] = extra
    return row
