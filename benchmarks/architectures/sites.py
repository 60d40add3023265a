"""Where a model computes attention, found by running it: what a patched model has to have replaced."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

__all__ = ["attention_sites"]

_FUSED = {"scaled_dot_product_attention", "multi_head_attention_forward"}
_PRODUCTS = {"matmul", "__matmul__", "bmm", "baddbmm", "einsum", "mm"}
#: What may happen to attention weights before they meet the values.
_PASSES = {
    *("dropout", "to", "type_as", "type", "float", "half", "bfloat16", "view", "reshape", "transpose", "permute"),
    *("contiguous", "clone", "flatten", "unflatten", "unsqueeze", "squeeze", "expand", "repeat", "__getitem__", "pad"),
    *("masked_fill", "mul", "__mul__", "nan_to_num", "where", "cat", "swapaxes", "view_as", "div", "__truediv__"),
    *("relu", "sub", "__sub__", "clamp", "movedim", "T", "mT", "narrow", "as_strided", "add", "__add__"),
}


class _Recorder(TorchFunctionMode):
    """Follows what softmax returns until it is multiplied with something."""

    def __init__(self, current: Callable[[], nn.Module | None]) -> None:
        super().__init__()
        self.current = current
        self.found: dict[int, nn.Module] = {}
        self.weights: dict[int, tuple[Tensor, nn.Module | None]] = {}  # the tensors too: else an id comes again

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in _FUSED:
            self._record(self.current())
        elif name == "softmax" and isinstance(out, Tensor):
            self.weights[id(out)] = (out, self.current())
        elif name in _PRODUCTS or name in _PASSES:
            hit = next((self.weights[id(value)] for value in _tensors(args) if id(value) in self.weights), None)
            if hit is not None and name in _PRODUCTS:
                self._record(hit[1])
            elif hit is not None and isinstance(out, Tensor):
                self.weights[id(out)] = (out, hit[1])
        return out

    def _record(self, module: nn.Module | None) -> None:
        if module is not None:
            self.found[id(module)] = module


def attention_sites(model: nn.Module, run: Callable[[], Any]) -> dict[str, type]:
    """The modules of ``model`` in which ``run`` multiplied the result of a softmax with something, by name."""
    with torch.no_grad(), _modules_entered() as entered:
        recorder = _Recorder(lambda: next((m for m in reversed(entered) if not _is_a_function(m)), None))
        with recorder:
            run()
    names = {id(module): name for name, module in model.named_modules()}
    return {names[key]: type(module) for key, module in recorder.found.items() if key in names}


@contextmanager
def _modules_entered() -> Iterator[list[nn.Module]]:
    """The modules whose forward is running, innermost last."""
    entered: list[nn.Module] = []

    def enter(module: nn.Module, *rest: Any) -> None:
        entered.append(module)

    def leave(module: nn.Module, *rest: Any) -> None:
        while entered and entered.pop() is not module:
            pass

    hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        yield entered
    finally:
        for hook in hooks:
            hook.remove()


def _is_a_function(module: nn.Module) -> bool:
    """Whether a module is a mere function such as nn.Softmax or nn.Dropout."""
    return type(module).__module__.startswith("torch.nn.") and not list(module.children())


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
