"""Gradient checkpointing of a model that is frozen but for its scalars.

PyTorch's reentrant checkpoint gives no gradients to the parameters of a block none of whose inputs needs one: with the
embeddings frozen, the scalars of that block would not be trained, with no more than a warning.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["keep_gradients", "kept"]


def keep_gradients(model: nn.Module) -> None:
    """See to it that blocks that are checkpointed already train their parameters whatever their inputs."""
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False) and hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = kept(module._gradient_checkpointing_func)


def kept(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """A checkpoint function, if it is a reentrant one, that trains a block's parameters whatever its inputs."""
    options = checkpoint.keywords if isinstance(checkpoint, functools.partial) else {}
    return functools.partial(_checkpointed, checkpoint) if options.get("use_reentrant") else checkpoint


def _checkpointed(checkpoint: Callable[..., Any], block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    needed = torch.is_grad_enabled() and not any(isinstance(x, Tensor) and x.requires_grad for x in args)
    if needed and _is_trained(block):
        first = next((i for i, x in enumerate(args) if isinstance(x, Tensor) and x.is_floating_point()), None)
        if first is not None:
            args = (*args[:first], args[first].detach().requires_grad_(), *args[first + 1 :])
    return checkpoint(block, *args, **kwargs)


def _is_trained(block: Callable[..., Any]) -> bool:
    """Whether a block, which Transformers gives as a method or a function of the module, has trainable parameters."""
    function = getattr(block, "func", block)
    holders = (*getattr(block, "args", ()), getattr(function, "__self__", None), function)
    modules = [holder for holder in holders if isinstance(holder, nn.Module)]
    return not modules or any(p.requires_grad for module in modules for p in module.parameters())
