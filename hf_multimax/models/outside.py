"""Attention that does not go through Transformers' AttentionInterface: its softmax is answered by the normalizer.

While the ``forward`` of such a layer runs, a ``TorchFunctionMode`` answers ``softmax(x, -1)`` of floating scores, and
``scaled_dot_product_attention``, by what the layer holds; everything else goes on as it was. Scores that a mask has
made very small are masked. A layer that runs without such a call raises: it would stay at SoftMax in silence.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hf_multimax.attention.context import autocast_dtype
from hf_multimax.attention.interface import scaled_dot_product_multimax
from hf_multimax.functional import compute_dtype
from hf_multimax.models.exceptions import MAY_REST
from hf_multimax.models.generated import make_class
from hf_multimax.normalizers.base import Normalizer, normalizer_of_all_rows, on_its_device

__all__ = ["MASKED", "OutsideMixin", "outside_class"]

#: A score at or below this is a masked entry: masks of -10,000 are in use, scores are in the tens.
MASKED = -9e3
_SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax)


class OutsideMixin:
    """What marks the class of a layer whose softmax is answered."""


@functools.cache
def outside_class(stock: type[nn.Module]) -> type[nn.Module]:
    """The class of ``stock`` layers whose softmax their ``multimax`` answers."""

    @functools.wraps(stock.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        where = f"{stock.__name__}, whose attention is outside Transformers' AttentionInterface"
        normalizer = normalizer_of_all_rows(self.multimax, where)
        if normalizer is None:
            return stock.forward(self, *args, **kwargs)
        level = _LEVELS[stock.__name__](*args, **kwargs) if stock.__name__ in _LEVELS else None
        with on_its_device(normalizer), _Answers(normalizer, level) as answers:
            result = stock.forward(self, *args, **kwargs)
        if not answers.given and (answers.seen or stock.__name__ not in MAY_REST):
            raise ValueError(
                f"this {stock.__name__} computed its attention without softmax(x, -1) or scaled_dot_product_attention"
                f"{answers.seen}, so that it cannot be replaced: leave it at SoftMax with exclude= when patching"
            )
        return result

    return make_class(OutsideMixin, stock, outside_class, {"forward": forward})


#: What was added to all scores ``[B, H, Nq, Nk]`` of a row: a function of the scores, ``[H, Nq, 1]``.
Level = Callable[[Tensor], Tensor]


def _level_of_mpt(
    hidden_states: Tensor, position_bias: Tensor, past_key_values: Any = None, *rest: Any, **options: Any
) -> Level:
    """MPT's position bias at a query's own key. It is zero at the last key, and so depends on how many there are."""
    seen = 0 if past_key_values is None else past_key_values.get_seq_length()
    own = torch.arange(hidden_states.shape[1], device=position_bias.device).view(-1, 1) + seen
    slope = position_bias[:, :1, -1:] - position_bias[:, :1, -2:-1]
    return lambda scores: slope * (own - (scores.shape[-1] - 1))


#: Of layers that add a number to all scores of a row, which SoftMax does not see: a function of forward's arguments.
_LEVELS: dict[str, Callable[..., Level]] = {"MptAttention": _level_of_mpt}


class _Answers(TorchFunctionMode):
    """Answers softmax by a normalizer.

    Args:
        level: what the modulator is not to see of the scores.

    Attributes:
        given: how many calls were answered.
        seen: what softmax calls were left alone, for the error message.
    """

    def __init__(self, normalizer: Normalizer, level: Level | None) -> None:
        super().__init__()
        self.normalizer, self.level, self.given, self.seen = normalizer, level, 0, ""

    def __torch_function__(
        self, function: Callable[..., Any], kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _SOFTMAX:
            return self._softmax(function, *args, **kwargs)
        if function is F.scaled_dot_product_attention:
            self.given += 1
            return self._attention(*args, **kwargs)
        if function is F.multi_head_attention_forward:
            with self:  # what it calls is answered
                return _unchecked_multi_head_attention(*args, **kwargs)
        return function(*args, **kwargs)

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **options: Any
    ) -> Tensor:
        bias = None
        if attn_mask is not None and attn_mask.dtype != torch.bool:  # where it is no mask, it is part of the scores
            keep = attn_mask > MASKED
            attn_mask, bias = keep, attn_mask.masked_fill(~keep, 0.0)
        return scaled_dot_product_multimax(self.normalizer, query, key, value, attn_mask, *rest, bias=bias, **options)

    def _softmax(
        self,
        function: Callable[..., Tensor],
        input: Tensor,
        dim: int | None = None,
        *rest: Any,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> Tensor:
        if not input.is_floating_point() or dim not in (-1, input.ndim - 1):
            self.seen = f" (but with softmax over dimension {dim} of {input.ndim})"
            return function(input, dim, *rest, dtype=dtype, **options)
        self.given += 1
        scores = input.to(compute_dtype(dtype or input.dtype))
        keep = scores > MASKED
        # replaced before the modulator, in which so large a number would make gradients NaN
        scores = scores.masked_fill(~keep, 0.0)
        if self.level is None:
            scores = self.normalizer.modulate(scores)
        else:  # added to the scores as they are, which an identity is not to round
            levelled = scores - self.level(scores)
            scores = scores + (self.normalizer.modulate(levelled) - levelled)
        return self.normalizer.normalize(scores, -1, keep).to(dtype or _type_of_softmax(input))


def _type_of_softmax(x: Tensor) -> torch.dtype:
    """The type of ``x.softmax(-1)``, which autocast computes in float32."""
    return x.dtype if autocast_dtype(x.device) is None else compute_dtype(x.dtype)


#: The same function without its question whether somebody overrides it, which would lead back here.
_unchecked_multi_head_attention = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**F.multi_head_attention_forward.__globals__, "has_torch_function": lambda *tensors: False},
    "multi_head_attention_forward",
    F.multi_head_attention_forward.__defaults__,
)
_unchecked_multi_head_attention.__kwdefaults__ = F.multi_head_attention_forward.__kwdefaults__
