"""Attention through every function of rows: right on the device, and its time beside SoftMax's and that of the tiles.

The checks are those of the tests, and larger calls of every function, against eager attention in float64. With the
optional package adasplash its 1.5-entmax is timed and compared, too.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.attention import SDPA, Shape, both_passes, forward_pass, runnable, softmax
from benchmarks.common import paired_timing
from benchmarks.fuzz_attention import eager
from benchmarks.gpu.cases import Case, Settings
from benchmarks.row_attention import CANDIDATES, LONG, normalizer_of
from hf_multimax import backend
from hf_multimax.attention.call import make_call
from hf_multimax.attention.interface import scaled_dot_product_multimax
from hf_multimax.normalizers.base import Normalizer
from tests import triton_row_attention_checks
from tests.tolerances import relative_error
from tests.triton_row_attention_checks import CHECKS, FUNCTIONS, Call

__all__ = ["cases"]

#: seconds of rounds for each phase of a row
_BUDGET = 0.5
#: standard deviation of the scores that are timed: of some peaks, as in trained models
_SPREAD = 4.0
#: several tiles of every kernel
_LARGE = {
    "causal, 300 x 513": Call((1, 4, 2, 300, 513), (64, 64), features={"causal": True}),
    "window, 200 x 260": Call((1, 2, 2, 200, 260), (128, 128), mask="boolean", features={"causal": True, "window": 70}),
}
_TINY = ("sparsemax, causal, grouped", "nothing and NaN, sparsemax", "no queries or no keys")


def cases(settings: Settings) -> list[Case]:
    """Every function's large calls, then the tests' checks, then times."""
    checks: dict[str, Callable[[], object]] = {name: CHECKS[name] for name in _TINY} if settings.tiny else _checks()
    found = [Case(name, functools.partial(_on_device, check, settings)) for name, check in checks.items()]
    labels = [label for label, (name, _) in CANDIDATES.items() if name in FUNCTIONS]
    if settings.tiny:
        timed = [("sparsemax", Shape(1, 1, 20, 20, 16, True)), ("entmax15", Shape(1, 1, 20, 20, 16, True))]
    else:
        timed = [(label, _square(4, 1024)) for label in labels]
        timed += [(label, _square(1, 8192)) for label in LONG]
    return found + [
        Case(f"{label}: {shape}", functools.partial(_time, label, shape, settings)) for label, shape in timed
    ]


def _square(batch: int, length: int) -> Shape:
    return Shape(batch, 16, length, length, 64, True, "bfloat16")


def _checks() -> dict[str, Callable[[], object]]:
    large = {
        f"{name}, {what}": functools.partial(triton_row_attention_checks.agrees_with_float64, name, call)
        for name in FUNCTIONS
        for what, call in _LARGE.items()
    }
    repeats = functools.partial(triton_row_attention_checks.repeats_bit_by_bit, 300, torch.bfloat16)
    return {**large, **CHECKS, "repeats bit by bit, 300 rows, bfloat16": repeats}


def _on_device(check: Callable[[], object], settings: Settings) -> None:
    with torch.device(settings.device):
        check()


def _time(label: str, shape: Shape, settings: Settings) -> dict[str, object]:
    """Milliseconds of SDPA with SoftMax, and the others' times relative to it."""
    module = normalizer_of(label, shape.heads, shape.dim).to(settings.device)
    q, k, v = shape.tensors(settings.device)
    q = (q.detach() * _SPREAD).requires_grad_()
    functions: dict[str, Callable[..., Tensor]] = {name: _by(name, module, shape) for name in ("triton", "tiled")}
    notes: dict[str, str] = {}
    adasplash = _adasplash(label, shape, settings, notes)
    if adasplash is not None:
        functions["adasplash"] = adasplash
    row: dict[str, object] = {"normalizer": label, "shape": str(shape), "not run": notes}
    for phase, make in (("forward", forward_pass), ("training", both_passes)):
        parts = {name: make(function, (q, k, v)) for name, function in functions.items()}
        parts[SDPA] = make(lambda *x: softmax(shape, SDPA)(*x, None, None), (q, k, v))
        runs = runnable(parts, notes)
        if settings.preparing:
            continue
        times = paired_timing(
            runs, device=settings.device, budget_s=settings.seconds(_BUDGET), min_rounds=3, warmup=1, head_start=True
        )
        row[f"{phase} {SDPA} ms"] = times[SDPA].median * 1e3
        row |= {f"{phase} {name}": timing.ratio(times[SDPA]) for name, timing in times.items() if name != SDPA}
    if "adasplash" in functions and "adasplash" not in notes:
        row |= _differences({name: functions[name] for name in ("triton", "adasplash")}, (q, k, v))
    return row


def _by(name: str, module: Normalizer, shape: Shape) -> Callable[..., Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with backend(name):
            return scaled_dot_product_multimax(module, q, k, v, is_causal=shape.causal)

    return attention


def _adasplash(
    label: str, shape: Shape, settings: Settings, notes: dict[str, str]
) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """The other package's attention where it computes the same; else None, and a note if it is not installed."""
    if label != "entmax15" or settings.device != "cuda":
        return None
    if importlib.util.find_spec("adasplash") is None:
        notes["adasplash"] = "not installed: pip install adasplash"
        return None
    attention = importlib.import_module("adasplash").adasplash
    return lambda q, k, v: attention(q, k, v, alpha=1.5, is_causal=shape.causal)


def _differences(functions: dict[str, Callable[..., Tensor]], tensors: tuple[Tensor, ...]) -> dict[str, object]:
    """How far the results are from float64, of a few heads, relative to the largest entry."""
    q, k, v = (x.detach()[:1, :2].contiguous() for x in tensors)
    exact = eager(make_call(q.double(), k.double(), v.double(), None, None, causal=True), "entmax15", {})
    return {f"{name} error": relative_error(function(q, k, v), exact) for name, function in functions.items()}
