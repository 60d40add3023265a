"""Attention maps of one batch, and attention rollout over them. They hold whole matrices: give short inputs."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_multimax.attention.choose import backend
from hf_multimax.diagnostics.models import call, evaluating, patched_for_a_while, replaced
from hf_multimax.models.patching import OUTPUT
from hf_multimax.normalizers.base import named_normalizers

__all__ = ["attention_maps", "attention_rollout"]


@torch.no_grad()
def attention_maps(model: nn.Module, batch: Mapping[str, Any] | Tensor) -> dict[str, Tensor]:
    """The attention weights of every layer that holds a normalizer, for one batch.

    Args:
        model, batch: as for :func:`measure_model`.

    Returns:
        ``[batch, heads, queries, keys]`` for each layer, by name; of layers outside Transformers' AttentionInterface
        the shape in which they hold their scores. Of a layer that runs more than once the last.

    Raises:
        ValueError: if no layer was run; as ``patch_model`` for a stock model whose attention cannot be reached.
    """
    maps: dict[str, Tensor] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(patched_for_a_while(model))
        stack.enter_context(evaluating(model))
        stack.enter_context(backend("eager"))
        for name, normalizer in named_normalizers(model):
            if name.endswith(OUTPUT):
                continue

            stack.enter_context(replaced(normalizer, normalize=_keeping(maps, name, normalizer.normalize)))
        call(model, batch, next((parameter.device for parameter in model.parameters()), None))
    if not maps:
        raise ValueError("no attention layer of the model was run")
    return maps


def _keeping(maps: dict[str, Tensor], name: str, normalize: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``normalize``, whose last result is kept."""

    def keeping(*args: Any, **kwargs: Any) -> Tensor:
        maps[name] = normalize(*args, **kwargs)
        return maps[name]

    return keeping


def attention_rollout(maps: Sequence[Tensor], residual: float = 0.5) -> Tensor:
    """Attention rollout (Abnar & Zuidema 2020, arXiv:2005.00928): how much of each input reaches each position.

    The product over layers, from the first to the last, of ``residual * I + (1 - residual) * mean over heads``.

    Args:
        maps: ``[batch, heads, length, length]`` of each self-attention layer, from the first to the last.
        residual: the share of the residual connection, in [0, 1].

    Returns:
        ``[batch, length, length]``; each row sums to one where the rows of all maps do. Rows of a map that sum to less
        (they attend to nothing, or to a sink) are filled up by the position itself.

    Raises:
        ValueError: for no map, maps that are not square or differ in shape, or ``residual`` outside [0, 1].
    """
    if not 0.0 <= residual <= 1.0:
        raise ValueError(f"residual must be in [0, 1], got {residual}")
    if not maps:
        raise ValueError("rollout needs the map of one layer at least")
    shape = maps[0].shape
    for index, weights in enumerate(maps):
        if weights.ndim != 4 or weights.shape[-1] != weights.shape[-2] or weights.shape[-1] != shape[-1]:
            raise ValueError(
                f"rollout needs self-attention maps [batch, heads, length, length] of one length; number {index} is "
                f"{list(weights.shape)}"
            )
    identity = torch.eye(shape[-1], dtype=maps[0].dtype, device=maps[0].device)
    total = identity.expand(shape[0], -1, -1)
    for weights in maps:
        mean = weights.mean(1)
        mean = mean + torch.diag_embed(1.0 - mean.sum(-1))
        total = (residual * identity + (1.0 - residual) * mean) @ total
    return total
