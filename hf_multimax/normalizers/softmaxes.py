"""SoftMax, MultiMax, and what leaves SoftMax with something left out or sharpened.

In a patched model ``rsoftmax`` learns its sparsity with ``normalizer_kwargs={"learn": True}``, and ``scalable_softmax``
always learns its ``s``. The parameter has the option's name and is unconstrained; see
:class:`hf_multimax.normalizers.registry.FunctionNormalizer`.
"""

import functools
import math

import torch
from torch import Tensor
from torch.nn.functional import relu

from hf_multimax.config import MultiMaxConfig
from hf_multimax.functional import Affine, masked_softmax, multimax
from hf_multimax.normalizers.base import MultiMax, Normalizer
from hf_multimax.normalizers.options import (
    below_peak,
    flag,
    init,
    logit,
    non_negative,
    of_numbers,
    of_value,
    positive,
    same,
    start_at_zero,
)
from hf_multimax.normalizers.registry import REQUIRED, Learned, Option, get_normalizer, register_normalizer, rowwise
from hf_multimax.numbers import is_finite, is_integer
from hf_multimax.rows.choose import compiled_rows
from hf_multimax.rows.function import RowFunction

__all__ = ["SoftMax"]

#: What the others keep in ev-softmax's training mode, so that the logarithm stays finite.
_EV_TRAINING_FACTOR = 1e-6

#: What r-softmax lowers its threshold by, so that the largest score stays above it.
_THRESHOLD_SHIFT = 1e-8

#: Inverse temperature of adaptive temperature as a polynomial in the entropy, highest power first.
_ADAPTIVE_POLYNOMIAL = (-0.037, 0.481, -2.3, 4.917, -1.791)


class SoftMax(Normalizer):
    """SoftMax with a fixed temperature."""

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0, got {temperature}")
        self.temperature = temperature

    def modulator(self, device: torch.device) -> tuple[Tensor, Tensor, Affine | None]:
        zeros = torch.zeros(2, device=device)  # slopes that leave the scores as they are
        if self.temperature == 1.0:
            return zeros, zeros, None
        return zeros, zeros, (torch.full((), 1 / self.temperature, device=device), torch.zeros((), device=device))

    def modulate(self, x: Tensor) -> Tensor:
        return x if self.temperature == 1.0 else x / self.temperature

    def normalize(self, x: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
        boolean = mask is None or mask.dtype == torch.bool
        p = compiled_rows(RowFunction("softmax", 1.0), x, dim, mask) if boolean else None
        return masked_softmax(x, dim, mask) if p is None else p

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"


@rowwise(compiled=lambda temperature=1.0: of_numbers("softmax", temperature))
def _softmax(x: Tensor, keep: Tensor, temperature: float = 1.0) -> Tensor:
    return (x if temperature == 1.0 else below_peak(x) / temperature).softmax(-1)


def _softmax_module(config: MultiMaxConfig, num_heads: int | None) -> SoftMax:
    try:
        return SoftMax(**get_normalizer("softmax").complete(config.normalizer_kwargs))
    except (TypeError, ValueError) as error:
        raise ValueError(f"MultiMaxConfig.normalizer_kwargs: {error}") from error


def _multimax(
    x: Tensor,
    dim: int = -1,
    mask: Tensor | None = None,
    ranges: Tensor | None = None,
    ts: Tensor | None = None,
    affine: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    if (ranges is None) != (ts is None):
        raise ValueError("ranges and ts must be given together")
    if ranges is None or ts is None:
        ranges = ts = torch.zeros(2, device=x.device)
    return multimax(x, ranges, ts, dim, mask, affine)


def _multimax_module(config: MultiMaxConfig, num_heads: int | None) -> MultiMax:
    if config.normalizer_kwargs:
        raise ValueError(
            "MultiMaxConfig.normalizer_kwargs must be empty for 'multimax', whose options are the config's own fields, "
            f"got {config.normalizer_kwargs!r}"
        )
    if config.order is None:
        raise ValueError("MultiMaxConfig.order must be an integer >= 1, got None")
    return MultiMax(config.order, num_heads, config.init, config.init_std, config.affine)


@rowwise(compiled=lambda sparsity=0.5: of_value("rsoftmax", sparsity))
def _rsoftmax(x: Tensor, keep: Tensor, sparsity: float | Tensor = 0.5) -> Tensor:
    z = x.detach() - x.detach().amax(-1, keepdim=True)
    return _weighted_softmax(x, _sparsity_threshold(z, keep, sparsity))


@rowwise(compiled=lambda t: of_value("tsoftmax", t))
def _tsoftmax(x: Tensor, keep: Tensor, t: float | Tensor) -> Tensor:
    return _weighted_softmax(x, t)


def _weighted_softmax(x: Tensor, t: float | Tensor) -> Tensor:
    """``w exp(z) / sum(w exp(z))`` with ``z = x - max x`` and ``w = max(z + t, 0)``; as SoftMax of ``z + log w``, whose
    gradient stays exact where a single entry is left and w is tiny.
    """
    z = x - x.amax(-1, keepdim=True)
    largest = z == 0
    # the z of a single largest entry is constant, of which differences of large gradients would leave no digits
    weight = relu(torch.where(largest & (largest.sum(-1, keepdim=True) == 1), 0.0, z) + t)
    if isinstance(t, Tensor):  # where all entries stand at the threshold the shift is their weight, and no slope
        weight = torch.where(t.detach() <= 2 * _THRESHOLD_SHIFT, weight.detach(), weight)
    inside = weight > 0
    z = x - x.detach().amax(-1, keepdim=True)
    return torch.where(inside, z + torch.where(inside, weight, 1.0).log(), -math.inf).softmax(-1)


def _sparsity_threshold(z: Tensor, keep: Tensor, sparsity: float | Tensor) -> Tensor:
    """The t that makes a fraction ``sparsity`` of the kept entries zero (r-softmax, section 3), linear in between.

    Entries whose exponential underflows are zero already and stand at 0 in the order, as in the authors' code.
    """
    count = keep.sum(-1, keepdim=True)
    underflow = keep & (z.exp() == 0)
    already = underflow.sum(-1, keepdim=True).to(z.dtype) / count
    q = ((sparsity - already) / (1 - already)).clamp(0.0, 1.0)
    ordered = torch.where(keep, torch.where(underflow, 0.0, z), math.inf).sort(-1).values
    position = q * (count - 1)
    index = position.detach().floor().long()
    below, above = ordered.gather(-1, index), ordered.gather(-1, (index + 1).minimum(count - 1))
    # times one: ONNX optimisers leave out the addition of a constant that is almost zero
    return -(below + (position - index) * (above - below)) + _THRESHOLD_SHIFT * (count / count)


def _compiled_adaptive_temperature(apply_in_training: bool = False, training: bool = False) -> RowFunction:
    return RowFunction("adaptive_temperature", b=float(training and not apply_in_training))


@rowwise(compiled=_compiled_adaptive_temperature)
def _adaptive_temperature(x: Tensor, keep: Tensor, apply_in_training: bool = False, training: bool = False) -> Tensor:
    p = x.softmax(-1)
    if training and not apply_in_training:
        return p
    entropy = -(p * p.clamp(min=1e-9).log()).sum(-1, keepdim=True)
    beta = torch.zeros_like(entropy)
    for coefficient in _ADAPTIVE_POLYNOMIAL:
        beta = beta * entropy + coefficient
    beta = torch.where(entropy > 0.5, beta.clamp(min=1.0), 1.0)
    return _scaled_softmax(x, keep, beta)


@rowwise(compiled=lambda training=False: RowFunction("evsoftmax", b=float(training)))
def _evsoftmax(x: Tensor, keep: Tensor, training: bool = False) -> Tensor:
    z = (x - x.amax(-1, keepdim=True)).detach()
    mean = torch.where(keep, z, 0.0).sum(-1, keepdim=True) / keep.sum(-1, keepdim=True)
    likely = (z >= mean) | (z == 0)
    return torch.where(likely, x, x + math.log(_EV_TRAINING_FACTOR) if training else -math.inf).softmax(-1)


@rowwise(compiled=lambda k: of_numbers("topk_softmax", k))
def _topk_softmax(x: Tensor, keep: Tensor, k: int) -> Tensor:
    if k >= x.shape[-1]:
        return x.softmax(-1)
    least = x.detach().topk(k, dim=-1).values[..., -1:]
    above, equal = x > least, x == least
    room = k - above.sum(-1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(-1) <= room))
    return torch.where(chosen, x, -math.inf).softmax(-1)


def _compiled_scalable_softmax(s: float | Tensor = 0.43, base: float = 0.0) -> RowFunction | None:
    return of_value("scalable_softmax", s, base)


@rowwise(compiled=_compiled_scalable_softmax)
def _scalable_softmax(x: Tensor, keep: Tensor, s: float | Tensor = 0.43, base: float = 0.0) -> Tensor:
    return _scaled_softmax(x, keep, base + s * keep.sum(-1, keepdim=True).to(x.dtype).log())


def _scaled_softmax(x: Tensor, keep: Tensor, scale: Tensor) -> Tensor:
    """SoftMax of ``scale * x``, where the scale of a row may be 0 or carry a gradient."""
    return torch.where(keep, scale * below_peak(x), -math.inf).softmax(-1)


_TENSOR = Option(None, "of the modulator; see hf_multimax.multimax")

register_normalizer(
    "multimax",
    _multimax,
    _multimax_module,
    "Zhou, Fritz, Keuper. MultiMax: Sparse and Multi-Modal Attention Learning. ICML 2024. arXiv:2406.01189.",
    modulates_output=True,
    options={"ranges": _TENSOR, "ts": _TENSOR, "affine": _TENSOR},
)
register_normalizer(
    "softmax",
    _softmax,
    _softmax_module,
    "Bridle. Training Stochastic Model Recognition Algorithms as Networks. NeurIPS 1989.",
    options={"temperature": positive(1.0, "scores are divided by it")},
)
register_normalizer(
    "rsoftmax",
    _rsoftmax,
    citation="Bałazy, Struski, Śmieja, Tabor. r-softmax: Generalized Softmax with Controllable Sparsity Rate. "
    "ICCS 2023. arXiv:2304.05243.",
    options={
        "sparsity": Option(
            0.5,
            "fraction of the entries that become zero",
            "a number in [0, 1]",
            lambda value: is_finite(value) and 0 <= value <= 1,
        ),
        "learn": flag("learn sparsity = sigmoid(a), starting where sparsity says"),
    },
    learned={"sparsity": Learned(torch.sigmoid, functools.partial(logit, "sparsity", least=0.0))},
)
register_normalizer(
    "tsoftmax",
    _tsoftmax,
    citation="Bałazy, Struski, Śmieja, Tabor. r-softmax: Generalized Softmax with Controllable Sparsity Rate. "
    "ICCS 2023. arXiv:2304.05243.",
    options={"t": positive(REQUIRED, "scores more than t below the largest become zero")},
)
register_normalizer(
    "adaptive_temperature",
    _adaptive_temperature,
    citation="Veličković, Perivolaropoulos, Barbero, Pascanu. softmax is not enough (for sharp size generalisation). "
    "2024. arXiv:2410.01104.",
    options={"apply_in_training": flag("sharpen in training mode too, which is plain SoftMax otherwise")},
)
register_normalizer(
    "evsoftmax",
    _evsoftmax,
    citation="Chen, Itkina, Senanayake, Kochenderfer. Evidential Softmax for Sparse Multimodal Distributions in Deep "
    "Generative Models. NeurIPS 2021. arXiv:2110.14182.",
)
register_normalizer(
    "topk_softmax",
    _topk_softmax,
    citation="Gupta, Dar, Goodman, Ciprut, Berant. Memory-efficient Transformers via Top-k Attention. 2021. "
    "arXiv:2106.06899.",
    options={
        "k": Option(
            REQUIRED,
            "how many of the largest scores are kept",
            "an integer >= 1",
            lambda value: is_integer(value, 1),
        )
    },
)
register_normalizer(
    "scalable_softmax",
    _scalable_softmax,
    citation="Nakanishi. Scalable-Softmax Is Superior for Attention. 2025. arXiv:2501.19399.",
    options={
        "s": positive(0.43, "scores are multiplied by base + s log(unmasked entries); where s starts"),
        "base": non_negative(0.0, "see s; 1 with init='identity'"),
        "init": init(),
    },
    learned={"s": Learned(same, float, always=True)},
    per_head=True,
    identity={"s": Learned(same, start_at_zero)},
    identity_options={"base": 1.0},
)
