"""Telling whoever replaces the forward of a model from whoever wraps it.

A fused head that somebody puts in the place of ``forward`` (TRL's, Liger's) computes its loss from the weights of the
output layer: an output modulator would not be in it, and the model would train on other logits than it is used with.
"""

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

__all__ = ["check_class_forward", "check_replacement"]

_ADVICE = (
    "train it with transformers' Trainer or hf_multimax.MultiMaxTrainer, whose loss it computes itself without holding "
    "the logits, or without an output modulator: patch_model(model, output=False)"
)
#: An arm's length for what a wrapper holds of what it wraps.
_MOST_STEPS = 200


def check_replacement(replacement: Any, own: Callable[..., Any]) -> None:
    """Raise ValueError unless ``replacement`` passes every call on to ``own``, an output-modulated model's forward.

    It must hold ``own``, as decorators do, and take its arguments as they come (``*args, **kwargs``): what names
    ``labels`` computes a loss of its own.
    """
    if _takes_anything(replacement) and _leads_to(replacement, own):
        return
    name = getattr(replacement, "__qualname__", None) or type(replacement).__qualname__
    plain = getattr(replacement, "__func__", replacement)
    where = getattr(getattr(plain, "__code__", None), "co_filename", getattr(replacement, "__module__", "?"))
    raise ValueError(
        f"{name} ({where}) is to replace the forward of a model with an output modulator, which it would leave out: "
        f"{_ADVICE}. A wrapper must take (*args, **kwargs) and pass them on to the forward that it wraps"
    )


def check_class_forward(stock_class: type[nn.Module]) -> None:
    """Raise ValueError if somebody has replaced the forward of a class for the whole process."""
    holder = next(cls for cls in stock_class.__mro__ if "forward" in vars(cls))
    module = getattr(inspect.unwrap(vars(holder)["forward"]), "__module__", holder.__module__)
    if module.partition(".")[0] != holder.__module__.partition(".")[0]:
        raise ValueError(
            f"output=True does not support {stock_class.__name__} with the forward that {module} has given it: leave "
            f"the model's own (Liger: fused_linear_cross_entropy=False), {_ADVICE}"
        )


def _takes_anything(function: Any) -> bool:
    """Whether the arguments of a call go through a function as they come, but for those bound in advance."""
    while isinstance(function, functools.partial):
        function, bound = function.func, len(function.args)
        own = _parameters(function)[bound:]
        return bool(own) and all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in own)
    own = _parameters(function)
    if own and own[0].name == "self" and own[0].kind in (own[0].POSITIONAL_ONLY, own[0].POSITIONAL_OR_KEYWORD):
        own = own[1:]
    return bool(own) and all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in own)


def _parameters(function: Any) -> list[inspect.Parameter]:
    if not isinstance(function, MethodType) and not hasattr(function, "__code__"):
        function = type(function).__call__.__get__(function)  # an object that is called
    try:
        return list(inspect.signature(function, follow_wrapped=False).parameters.values())
    except (TypeError, ValueError):
        return []


def _leads_to(function: Any, own: Callable[..., Any]) -> bool:
    """Whether a function, or something that it holds, is ``own``."""
    found, waiting = set(), [function]
    while waiting and len(found) < _MOST_STEPS:
        part = waiting.pop()
        if id(part) in found or isinstance(part, nn.Module):
            continue
        found.add(id(part))
        if getattr(part, "__func__", part) is own:
            return True
        if isinstance(part, functools.partial):
            waiting += [part.func, *part.args, *part.keywords.values()]
        for cell in getattr(part, "__closure__", None) or ():
            if callable(getattr(cell, "cell_contents", None)):
                waiting.append(cell.cell_contents)
        waiting += [value for value in getattr(part, "__dict__", {}).values() if callable(value)]
        waiting += [value for name in ("__func__", "__self__") if callable(value := getattr(part, name, None))]
    return False
