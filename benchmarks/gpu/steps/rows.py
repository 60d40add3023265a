"""Functions of rows, forward and backward, against torch.softmax, plain PyTorch and torch.compile of that."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import paired_timing
from benchmarks.fuzz_rows import definition
from benchmarks.gpu.cases import Case, Settings
from hf_multimax import backend, normalize

__all__ = ["cases"]

#: seconds of rounds for each type and phase of a case
_BUDGET = 0.3
_SHAPES = ((4096, 1024), (1024, 32768))
#: where torch.compile is tried, too, which takes long to compile
_COMPILED = 1024
_TYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
_OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "multimax": ("multimax", {"ranges": (-1.0, 1.0, -1.0, 1.0), "ts": (0.1, 0.2, 0.01, 0.02)}),
    **{name: (name, {}) for name in ("softmax", "sparsemax", "entmax15")},
    "entmax, alpha 1.25": ("entmax", {"alpha": 1.25}),
    "entmax, alpha learned": ("entmax", {"alpha": 1.3}),
    "topk_softmax, k 32": ("topk_softmax", {"k": 32}),
    "tsoftmax, t 4": ("tsoftmax", {"t": 4.0}),
    **{name: (name, {}) for name in ("rsoftmax", "evsoftmax", "adaptive_temperature", "scalable_softmax")},
    **{name: (name, {}) for name in ("softmax1", "sigmoid")},
    "asentmax, learned": ("asentmax", {"alpha": 1.5, "beta": 0.5, "gamma": 0.1}),
}


def cases(settings: Settings) -> list[Case]:
    """One for each function and shape."""
    shapes = ((3, 40),) if settings.tiny else _SHAPES
    return [
        Case(f"{name}, {rows} x {n}", lambda f=name, r=rows, n=n: _measure(f, r, n, settings))
        for rows, n in shapes
        for name in _OPTIONS
    ]


def _measure(name: str, rows: int, n: int, settings: Settings) -> dict[str, object]:
    found: dict[str, object] = {"function": name, "shape": f"{rows} x {n}"}
    kind, options = _OPTIONS[name]
    options = {option: _tensor(name, value, settings.device) for option, value in options.items()}
    for short, dtype in _TYPES.items():
        x = torch.randn(rows, n, device=settings.device, dtype=dtype, requires_grad=True)
        functions = _functions(kind, options, settings, dtype == torch.float32, n)
        leaves = [x, *(t for t in options.values() if isinstance(t, Tensor))]
        grad = torch.randn_like(x)
        for phase, wrap in (("forward", _forward), ("training", _training)):
            candidates = {which: wrap(f, leaves, grad) for which, f in functions.items()}
            timing = paired_timing(
                candidates, device=settings.device, budget_s=settings.seconds(_BUDGET), head_start=True
            )
            found[f"{short} {phase} ms"] = timing["triton"].median * 1e3
            found |= {
                f"{short} {phase} {which}": own.ratio(timing["torch.softmax"])
                for which, own in timing.items()
                if which != "torch.softmax"
            }
    return found


def _tensor(name: str, value: Any, device: str) -> Any:
    """An option as it is given: a tensor that learns for what is learned."""
    learned = isinstance(value, tuple) or "learned" in name
    return torch.tensor(value, device=device, requires_grad=True) if learned else value


def _functions(
    kind: str, options: dict[str, Any], settings: Settings, peers: bool, n: int
) -> dict[str, Callable[[Tensor], Tensor]]:
    def under(chosen: str, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            with backend(chosen):
                return function(x)

        return run

    plain_kind, plain_options = definition(kind, options)

    def plain(x: Tensor) -> Tensor:
        return normalize(plain_kind, x, **plain_options)

    found = {
        "triton": under(settings.backend, lambda x: normalize(kind, x, **options)),
        "torch.softmax": lambda x: x.softmax(-1),
    }
    if peers:
        found["plain"] = under("eager", plain)
    if peers and (n == _COMPILED or settings.tiny):
        found["compile"] = under("eager", torch.compile(plain, backend=settings.compiler, dynamic=False))
    return found


def _forward(function: Callable[[Tensor], Tensor], leaves: list[Tensor], grad: Tensor) -> Callable[[], object]:
    def run() -> None:
        with torch.no_grad():
            function(leaves[0])

    return run


def _training(function: Callable[[Tensor], Tensor], leaves: list[Tensor], grad: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(function(leaves[0]), leaves, grad, allow_unused=True)
