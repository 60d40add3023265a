"""Attention and output loss on the device, values and every gradient, against float64 in plain PyTorch there.

Most of it are the checks of the tests, which run small in Triton's interpreter; here larger ones join them.
"""

import functools
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.gpu.cases import Case, Settings
from benchmarks.gpu.steps import correctness_models, correctness_runtime
from hf_multimax.kernels.triton_attention import attention
from tests import attention_cases, cross_entropy_cases, triton_checks
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


def cases(settings: Settings) -> list[Case]:
    """Attention in float32 and bfloat16, models and the output loss, then attention in float16."""
    found = _tiny_attention() if settings.tiny else _attention(torch.float32) | _attention(torch.bfloat16) | CHECKS
    found |= correctness_runtime.checks(settings) | correctness_models.checks(settings)
    losses = cross_entropy_cases.KERNEL_CHECKS if settings.tiny else cross_entropy_cases.DEVICE_CHECKS
    found |= {f"loss: {name}": _loss(check, settings) for name, check in losses.items()}
    found |= {} if settings.tiny else _attention(torch.float16)
    return [Case(name, _on_device(check, settings)) for name, check in found.items()]


def _attention(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Every call in a type; those in which rounding decides are held against eager attention in half precision."""
    single = dtype == torch.float32
    ordinary = [call for call in attention_cases.CASES if single or (call.spread == 1 and call.slope <= 1)]
    calls = [*ordinary, *WIDE, *DECODE, *([] if single else LONG)]
    name = str(dtype).removeprefix("torch.")
    found = {f"{name}: {call.name}": _check(call, dtype) for call in calls}
    if not single:
        no_worse = triton_checks.half_precision_is_no_worse_than_eager
        found |= {f"{name}, peaked: {call.name}": functools.partial(no_worse, call, dtype) for call in PEAKED}
    return found


def _tiny_attention() -> dict[str, Callable[[], object]]:
    found = {name: CHECKS[name] for name in _TINY}
    call = Call("boolean", (1, 2, 1, 17, 20), mask="boolean")
    return found | {f"float16: {call.name}": _check(call, torch.float16)}


def _check(call: Call, dtype: torch.dtype) -> Callable[[], object]:
    if dtype == torch.float32:
        return functools.partial(attention_cases.check, attention, call)
    return functools.partial(attention_cases.check_half, attention, call, dtype)


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
