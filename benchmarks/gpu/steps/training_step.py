"""Whole training steps in bfloat16, patched against stock with SDPA."""

from benchmarks.gpu.cases import Case, Settings
from benchmarks.training_step import CASES, PATCHED, measure

__all__ = ["cases"]

_BUDGET = 5.0
#: with goals first; eager is what plain PyTorch costs, in the paper 40 % more than stock on DeiT-small
_ORDER = ("deit", "gpt2", "llama", "t5", "marian")
_EAGER = ("deit",)


def cases(settings: Settings) -> list[Case]:
    """One for each model."""
    on_gpu = settings.device == "cuda"
    return [Case(CASES[name].described, lambda name=name: _measure(name, settings), on_gpu) for name in _ORDER]


def _measure(name: str, settings: Settings) -> dict[str, object]:
    backends = {PATCHED: settings.backend} | ({"eager": "eager"} if name in _EAGER else {})
    size = "tiny" if settings.tiny else "full"
    # kernels do not depend on the batch, and many processes share the memory while they prepare
    batch = 2 if settings.preparing else None
    return measure(CASES[name], size, settings.device, settings.seconds(_BUDGET), backends=backends, batch=batch)
