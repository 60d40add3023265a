"""Functions whose weights need not sum to one: SoftMax with a sink, softpick, and the sigmoid."""

import torch
from torch import Tensor
from torch.nn.functional import relu

from hf_multimax.normalizers.options import non_negative, of_numbers
from hf_multimax.normalizers.registry import Option, register_normalizer, rowwise
from hf_multimax.numbers import is_finite
from hf_multimax.rows.function import RowFunction

__all__: list[str] = []


@rowwise(compiled=lambda: RowFunction("softmax1"))
def _softmax1(x: Tensor, keep: Tensor) -> Tensor:
    return torch.cat([x, torch.zeros_like(x[..., :1])], -1).softmax(-1)[..., :-1]


@rowwise(compiled=lambda eps=1e-8: of_numbers("softpick", eps))
def _softpick(x: Tensor, keep: Tensor, eps: float = 1e-8) -> Tensor:
    # over e^m with m = max(x, 0): where no score is above 0 all weights are 0, whatever the scale
    m = relu(x.detach().amax(-1, keepdim=True))
    near = x.abs() < 1  # where e^x - 1 would lose digits
    excess = torch.where(near, torch.where(near, x, 0.0).expm1() * (-m).exp(), (x - m).exp() - (-m).exp())
    total = torch.where(keep, excess.abs(), 0.0).sum(-1, keepdim=True) + eps
    return relu(excess) / torch.where(total > 0, total, 1.0)


@rowwise(compiled=lambda b=None: of_numbers("sigmoid", *((0.0, 0.0) if b is None else (b, 1.0))))
def _sigmoid(x: Tensor, keep: Tensor, b: float | None = None) -> Tensor:
    shift = -keep.sum(-1, keepdim=True).to(x.dtype).log() if b is None else b
    return (x + shift).sigmoid()


register_normalizer(
    "softmax1",
    _softmax1,
    citation="Miller. Attention Is Off By One. 2023. Xiao, Tian, Chen, Han, Lewis. Efficient Streaming Language Models "
    "with Attention Sinks. ICLR 2024. arXiv:2309.17453.",
)
register_normalizer(
    "softpick",
    _softpick,
    citation="Zuhri, Fuadi, Aji. Softpick: No Attention Sink, No Massive Activations with Rectified Softmax. 2025. "
    "arXiv:2504.20966.",
    options={"eps": non_negative(1e-8, "keeps the denominator off zero")},
)
register_normalizer(
    "sigmoid",
    _sigmoid,
    citation="Ramapuram, Danieli, Dhekane, et al. Theory, Analysis, and Best Practices for Sigmoid Self-Attention. "
    "ICLR 2025. arXiv:2409.04431.",
    options={
        "b": Option(
            None,
            "added to the scores; null is -log(unmasked entries)",
            "a number, or null",
            lambda value: value is None or is_finite(value),
        )
    },
)
