"""What PyTorch does around a call: autocast, ``torch.func``, a recorded backward pass."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch._C import _functorch


def differentiated_by_functions() -> bool:
    """Whether ``torch.func`` differentiates here, which custom operators have no derivative for (``vmap`` needs none).

    Compiled code answers no: what is traced there is differentiated as usual.
    """
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return False
    return any(level.key() != _functorch.TransformType.Vmap for level in _functorch.get_interpreter_stack() or ())


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The type that autocast computes in on that device; None where it is off."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if _has_autocast(kind) and torch.is_autocast_enabled(kind) else None


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off on that device: it would round what is computed in float32. A backward pass may run in it, too."""
    return torch.autocast(device.type, enabled=False) if _has_autocast(device.type) else nullcontext()


#: Known beforehand, for PyTorch 2.11 cannot ask in compiled code.
_WITH_AUTOCAST = frozenset(
    kind for kind in ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "xla") if torch.amp.is_autocast_available(kind)
)


def _has_autocast(kind: str) -> bool:
    return kind in _WITH_AUTOCAST or not torch.compiler.is_compiling() and torch.amp.is_autocast_available(kind)


def refuse_second_derivative(backend: str) -> None:
    """Raise RuntimeError in a backward pass that is itself recorded: its result would be cut off from the graph."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{backend} attention has no second derivative: call backward without create_graph=True, "
            "or compute under hf_multimax.backend('eager')"
        )
