"""The output loss with all gradients, fused against unfused, and Liger's fused SoftMax where it is installed."""

import contextlib

import torch

from benchmarks.cross_entropy import measure
from benchmarks.gpu.cases import Case, Settings
from tests.cross_entropy_cases import kernel_on_cpu_tensors

__all__ = ["cases"]

_BUDGET = 5.0
_SIZES = ((8192, 50257), (8192, 128256))


def cases(settings: Settings) -> list[Case]:
    """One for each number of tokens and vocabulary."""
    sizes = ((6, 53),) if settings.tiny else _SIZES
    return [
        Case(f"{tokens} x {vocabulary}", lambda t=tokens, v=vocabulary: _measure(t, v, settings))
        for tokens, vocabulary in sizes
    ]


def _measure(tokens: int, vocabulary: int, settings: Settings) -> dict[str, object]:
    with kernel_on_cpu_tensors() if settings.device == "cpu" else contextlib.nullcontext():
        return {"rows": measure(tokens, vocabulary, settings.device, torch.bfloat16, settings.seconds(_BUDGET))}
