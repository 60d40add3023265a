"""Attention, output loss and functions of rows on the device, values and gradients, against float64 in plain PyTorch.

Most of it are the checks of the tests, which run small in Triton's interpreter; here larger ones join them.
"""

import functools
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.gpu.cases import Case, Settings
from benchmarks.gpu.steps import correctness_models, correctness_runtime
from hf_multimax.attention.triton import backend
from tests import attention_cases, cross_entropy_cases, triton_checks, triton_row_checks
from tests.attention_cases import Case as Call
from tests.triton_checks import CHECKS

__all__ = ["cases"]

CAUSAL = {"causal": True}
#: several tiles of every kernel, at each padded width, and widths between them
WIDE = [
    *(Call(f"D {d}", (2, 4, 2, 300, 300), (d, d), options=CAUSAL) for d in (16, 32, 64, 96, 128, 256)),
    *(Call(f"D {d}, full", (1, 2, 2, 257, 300), (d, d)) for d in (64, 128)),
    Call("D 65 and 33", (1, 4, 2, 130, 261), (65, 33), options=CAUSAL),
]
#: lengths as in training
LONG = [Call(f"4096, D {d}", (1, 2, 1, 4096, 4096), (d, d), options=CAUSAL) for d in (64, 128)]
DECODE = [
    Call("decode 4096", (2, 8, 2, 1, 4096), (128, 128)),
    Call("decode 4096, 3 queries, padding", (2, 8, 2, 3, 4096), (64, 64), mask="padding", options=CAUSAL),
]
#: one weight of a row nearly 1, over several tiles
PEAKED = [
    replace(case, name=f"{case.name}, {n} x {d}", shape=(1, 2, 1, n, n), dims=(d, d))
    for case in triton_checks.HALF_CASES
    if case.shape[3] > 16
    for n, d in ((129, 64), (300, 128))
]
#: checks that are small for the interpreter, over several tiles
LARGE: dict[str, Callable[[], object]] = {
    "dropout is the same in backward, 300 x 250": functools.partial(
        triton_checks.dropout_is_the_same_in_backward, (1, 2, 1, 300, 250)
    ),
    **{
        f"repeats bit by bit, 300 rows, {dtype}": functools.partial(triton_checks.repeats_bit_by_bit, 300, dtype)
        for dtype in (torch.float32, torch.bfloat16)
    },
}
#: of the interpreter's checks, those that try this script out
_TINY = (
    "float32 agrees with float64, gqa causal per head",
    "float32 agrees with float64, decode 129",
    "float32 agrees with float64, additive half",
    "thresholds beyond any score cost no digits, always, sinks, decode, float16",
    "dropout is the same in backward, decode",
    "any strides",
    "operators",
)
_TINY_ROWS = ("random calls, sparsemax", "rows of every sort, entmax15", "options of heads", "where they run")


def cases(settings: Settings) -> list[Case]:
    """Attention in float32 and bfloat16, models, the output loss and functions of rows, then attention in float16."""
    if settings.tiny:
        found = _tiny_attention()
    else:
        found = _attention(torch.float32) | _attention(torch.bfloat16) | LARGE | CHECKS
    found |= correctness_runtime.checks(settings) | correctness_models.checks(settings)
    losses = cross_entropy_cases.KERNEL_CHECKS if settings.tiny else cross_entropy_cases.DEVICE_CHECKS
    found |= {f"loss: {name}": _loss(check, settings) for name, check in losses.items()}
    rows = {name: triton_row_checks.CHECKS[name] for name in _TINY_ROWS} if settings.tiny else triton_row_checks.LARGE
    rows |= {} if settings.tiny else triton_row_checks.CHECKS
    found |= {f"rows: {name}": check for name, check in rows.items()}
    found |= {} if settings.tiny else _attention(torch.float16)
    return [Case(name, _on_device(check, settings)) for name, check in found.items()]


def _attention(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Every call in a type; those in which rounding decides are held against eager attention in half precision."""
    single = dtype == torch.float32
    ordinary = [call for call in attention_cases.CASES if single or (call.spread == 1 and call.slope <= 1)]
    name = str(dtype).removeprefix("torch.")
    found = {f"{name}: {call.name}": _check(dtype, call, *_larger(call)) for call in ordinary}
    found |= {f"{name}: {call.name}": _check(dtype, call) for call in (*WIDE, *DECODE, *([] if single else LONG))}
    if not single:
        no_worse = triton_checks.half_precision_is_no_worse_than_eager
        found |= {f"{name}, peaked: {call.name}": functools.partial(no_worse, call, dtype) for call in PEAKED}
    return found


def _tiny_attention() -> dict[str, Callable[[], object]]:
    found = {name: CHECKS[name] for name in _TINY}
    call = Call("boolean", (1, 2, 1, 17, 20), mask="boolean")
    return found | {f"float16: {call.name}": _check(torch.float16, call)}


def _larger(call: Call) -> list[Call]:
    """The same call over several tiles; none where it has them already."""
    batch, heads, kv_heads, rows, keys = call.shape
    if rows == 1 or max(rows, keys) > 200:
        return []
    more = 4 * max(rows, keys)
    bias = call.bias
    if bias is not None:
        sizes = (*((1,) * (4 - len(bias))), *bias)
        bias = (*sizes[:2], *(size if size == 1 else size + more for size in sizes[2:]))[-len(call.bias) :]
    return [replace(call, shape=(batch, heads, kv_heads, rows + more, keys + more), bias=bias)]


def _check(dtype: torch.dtype, *calls: Call) -> Callable[[], None]:
    def check() -> None:
        for call in calls:
            if dtype == torch.float32:
                attention_cases.check(attention_cases.through(backend), call)
            else:
                attention_cases.check_half(attention_cases.through(backend), call, dtype)

    return check


def _loss(check: Callable[[], object], settings: Settings) -> Callable[[], object]:
    """A check of the output loss, with the Triton kernel also where the interpreter runs it."""
    if settings.device == "cuda":
        return check

    def interpreted() -> None:
        with cross_entropy_cases.kernel_on_cpu_tensors():
            check()

    return interpreted


def _on_device(check: Callable[[], object], settings: Settings) -> Callable[[], None]:
    """Run a check with what it makes on the device."""

    def run() -> None:
        with torch.device(settings.device):
            check()

    return run
