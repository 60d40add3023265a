"""What the registered functions share: the values that options allow, how an unbounded parameter stands for one, and
scores that no factor makes infinite.
"""

import math
from typing import Any

import torch
from torch import Tensor

from hf_multimax.normalizers.registry import Option
from hf_multimax.numbers import is_finite
from hf_multimax.rows.function import RowFunction

__all__ = [
    "below_peak",
    "flag",
    "init",
    "logit",
    "non_negative",
    "of_numbers",
    "of_value",
    "one_plus_sigmoid",
    "one_plus_share",
    "start_at_zero",
    "positive",
    "same",
]


def positive(default: Any, help: str) -> Option:
    return Option(default, help, "a number > 0", lambda value: is_finite(value) and value > 0)


def non_negative(default: Any, help: str) -> Option:
    return Option(default, help, "a number >= 0", lambda value: is_finite(value) and value >= 0)


def flag(help: str) -> Option:
    return Option(False, help, "true or false", lambda value: isinstance(value, bool))


def init() -> Option:
    return Option(
        "default",
        "identity starts a patched model as SoftMax, and learns",
        "'default' or 'identity'",
        lambda value: value in ("default", "identity"),
    )


def start_at_zero(value: Any) -> float:
    """What a learned parameter starts at whatever its option says."""
    return 0.0


def same(value: Tensor) -> Tensor:
    return value


def one_plus_sigmoid(a: Tensor) -> Tensor:
    return 1 + a.sigmoid()


def one_plus_share(a: Tensor) -> Tensor:
    """``1 + a`` with a in [0, 1], where a gradient passes beyond the borders, too, so that a can return."""
    return 1 + a + (a.clamp(0.0, 1.0) - a).detach()


def logit(name: str, value: float, least: float) -> float:
    """The parameter a with ``value = least + sigmoid(a)``."""
    share = value - least
    if not 0 < share < 1:
        raise ValueError(f"{name} must be strictly between {least:g} and {least + 1:g} to be learned, got {value}")
    return math.log(share / (1 - share))


def below_peak(x: Tensor) -> Tensor:
    """Scores less the row's largest, finite: what SoftMax does not see, and what no factor takes to plus infinity."""
    return (x - x.detach().amax(-1, keepdim=True)).clamp(min=torch.finfo(x.dtype).min)


def of_numbers(kind: str, *options: Any) -> RowFunction | None:
    """The compiled function with these options; None where one of them is a tensor."""
    return RowFunction(kind, *options) if all(isinstance(option, int | float) for option in options) else None


def of_value(kind: str, option: Any, *others: Any) -> RowFunction | None:
    """The compiled function with an option that may be a tensor, and others that must not."""
    if not isinstance(option, Tensor):
        return of_numbers(kind, option, *others)
    numbers = of_numbers(kind, 0.0, *others)
    return None if numbers is None else numbers._replace(value=option)
