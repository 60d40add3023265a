"""Noticing that the scalars of a model in training have become NaN, at the optimizer step that does it.

Trainer filters NaN losses out of its log and saves what there is: without a word the run would end well, with nothing
but NaN in its last checkpoints. Every optimizer of PyTorch calls :func:`_after_step`, so that this works with any loop.
On a CUDA device the numbers of one step are read at the next one, when they have arrived: nothing waits for them.
"""

import logging
import math
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from hf_multimax.normalizers.base import Normalizer

__all__ = ["watch"]

logger = logging.getLogger(__name__)

#: A slope beyond this multiplies every score by it: no training that goes well has one.
RUNAWAY = 1000.0


@dataclass
class _Watched:
    """What is looked at after the steps of one optimizer.

    Attributes:
        models: how many models there were when the scalars were looked up.
        scalars: the parameters by name.
        reported: the names of slopes that were reported.
        steps: how many steps there were.
        pending: what was asked of the device at the last step: its number, the names, their largest magnitudes and the
            event after which these are there.
    """

    models: int = 0
    scalars: dict[str, tuple[Normalizer, str]] = field(default_factory=dict)
    reported: set[str] = field(default_factory=set)
    steps: int = 0
    pending: tuple[int, list[str], Tensor, Any] | None = None


_models: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
_optimizers: "weakref.WeakKeyDictionary[Optimizer, _Watched]" = weakref.WeakKeyDictionary()


def watch(model: nn.Module) -> None:
    """Look at the normalizers' parameters of ``model`` after every optimizer step that changes them.

    A step after which one is NaN or infinite raises FloatingPointError, which names it and the step; a slope beyond
    1,000 is reported once.
    """
    if not _models:
        _install()
    _models.add(model)


_handle: Any = None


def _install() -> None:
    global _handle
    if _handle is None:
        _handle = register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: Optimizer, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    if torch.compiler.is_compiling():
        return
    watched = _optimizers.get(optimizer)
    if watched is None:
        watched = _optimizers[optimizer] = _Watched()
    if watched.models != len(_models):
        watched.models, watched.scalars = len(_models), _scalars_of(optimizer)
    if not watched.scalars:
        return
    watched.steps += 1
    if watched.pending is not None:
        step, names, magnitudes, arrived = watched.pending
        watched.pending = None
        arrived.synchronize()
        _judge(watched, step, dict(zip(names, magnitudes.tolist())))
    values = {name: _local(normalizer.get_parameter(entry)) for name, (normalizer, entry) in watched.scalars.items()}
    here = {name: value for name, value in values.items() if value.numel() and not value.is_meta}
    step = _step_of(optimizer, watched)
    device = next(iter(here.values())).device if here else None
    if device is None or device.type == "cpu":
        _judge(watched, step, {name: _largest(value.flatten().tolist()) for name, value in here.items()})
    elif device.type == "cuda":
        magnitudes = torch.stack([value.abs().amax().to(device) for value in here.values()])
        there = torch.empty_like(magnitudes, device="cpu", pin_memory=True).copy_(magnitudes, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(device))
        watched.pending = (step, list(here), there, arrived)
    else:
        _judge(watched, step, {name: value.abs().amax().item() for name, value in here.items()})


def _judge(watched: _Watched, step: int, magnitudes: dict[str, float]) -> None:
    """Raise or report what the parameters' largest magnitudes after a step show."""
    broken = [name for name, value in magnitudes.items() if not math.isfinite(value)]
    if broken:
        raise FloatingPointError(
            f"optimizer step {step} made MultiMax parameters NaN or infinite: {', '.join(broken[:6])}"
            f"{f' and {len(broken) - 6} more' if len(broken) > 6 else ''}. Nothing has been saved since. Go back to "
            "the last checkpoint, lower the learning rate (of the scalars: multimax_learning_rate), or clip gradients"
        )
    for name, value in magnitudes.items():
        if value > RUNAWAY and name.endswith(".ts") and name not in watched.reported:
            watched.reported.add(name)
            logger.warning(
                f"{name} has reached {value:.4g} at optimizer step {step}: its layer's slopes run away. Lower the "
                "learning rate of the scalars (multimax_learning_rate), or clip their gradients"
            )


def _largest(values: list[float]) -> float:
    """The largest magnitude; NaN if one is NaN."""
    return math.nan if any(math.isnan(value) for value in values) else max(map(abs, values))


def _scalars_of(optimizer: Optimizer) -> dict[str, tuple[Normalizer, str]]:
    """The normalizers' parameters that an optimizer trains."""
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    found = {}
    for model in list(_models):
        for place, module in model.named_modules():
            if isinstance(module, Normalizer):
                for name, parameter in module.named_parameters():
                    if id(parameter) in trained:
                        found[f"{place}.{name}"] = (module, name)
    return found


def _step_of(optimizer: Optimizer, watched: _Watched) -> int:
    """The number of the step: the optimizer's own count, which a resumed training goes on with, else ours."""
    for normalizer, entry in watched.scalars.values():
        step = optimizer.state.get(normalizer.get_parameter(entry), {}).get("step")
        if isinstance(step, int) or (isinstance(step, Tensor) and step.device.type == "cpu"):
            return int(step)
        break
    return watched.steps


def _local(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter."""
    value = parameter.detach()
    return value.to_local() if isinstance(value, DTensor) else value
