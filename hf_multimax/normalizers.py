"""The functions of the literature that take SoftMax's place, each registered under its name.

All act along one dimension and return probabilities: masked entries are removed before anything is computed and get
exactly 0, a row that keeps nothing is all 0, float64 stays float64 and other types are computed in float32. Gradients
are exact. ``normalize(name, x, ...)`` calls them; ``patch_model(model, normalizer=name)`` puts them into a model.

Under ``torch.compile`` the entmax family, fusedmax and oscarmax break the graph: they search until every row is solved,
or come from the ``entmax`` package.

In a patched model, ``entmax`` and ``rsoftmax`` learn their option with ``normalizer_kwargs={"learn": True}``, and
``scalable_softmax`` always does. The parameter has the option's name and is unconstrained; see
:class:`hf_multimax.registry.FunctionNormalizer`.
"""

import functools
import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import relu

from hf_multimax.config import MultiMaxConfig
from hf_multimax.functional import multimax
from hf_multimax.modulator import MultiMax, Normalizer
from hf_multimax.registry import (
    REQUIRED,
    FunctionNormalizer,
    Learned,
    NormalizerSpec,
    Option,
    build_normalizer,
    get_normalizer,
    normalize,
    register_normalizer,
    registered_normalizers,
    rowwise,
)
from hf_multimax.structured import prox_oscar, prox_tv

__all__ = [
    "FunctionNormalizer",
    "Learned",
    "NormalizerSpec",
    "Option",
    "SoftMax",
    "build_normalizer",
    "get_normalizer",
    "normalize",
    "register_normalizer",
    "registered_normalizers",
    "rowwise",
]

#: What the others keep in ev-softmax's training mode, so that the logarithm stays finite.
_EV_TRAINING_FACTOR = 1e-6

#: What r-softmax lowers its threshold by, so that the largest score stays above it.
_THRESHOLD_SHIFT = 1e-8

#: Inverse temperature of adaptive temperature as a polynomial in the entropy, highest power first.
_ADAPTIVE_POLYNOMIAL = (-0.037, 0.481, -2.3, 4.917, -1.791)


# -- SoftMax and MultiMax ----------------------------------------------------------------------------------------------


class SoftMax(Normalizer):
    """SoftMax with a fixed temperature."""

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0, got {temperature}")
        self.temperature = temperature

    def modulate(self, x: Tensor) -> Tensor:
        return x if self.temperature == 1.0 else x / self.temperature

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"


@rowwise
def _softmax(x: Tensor, keep: Tensor, temperature: float = 1.0) -> Tensor:
    return (x if temperature == 1.0 else _below_peak(x) / temperature).softmax(-1)


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


# -- the entmax family -------------------------------------------------------------------------------------------------


def _entmax_package(normalizer: str) -> ModuleType:
    """The entmax package, which only some normalizers need: imported when one of them first runs."""
    try:
        import entmax
    except ImportError as error:
        raise ImportError(f"normalizer {normalizer!r} needs the entmax package: pip install entmax") from error
    return entmax


@rowwise
def _sparsemax(x: Tensor, keep: Tensor) -> Tensor:
    return _entmax_package("sparsemax").sparsemax(x, dim=-1)


@rowwise
def _entmax15(x: Tensor, keep: Tensor) -> Tensor:
    return _entmax_package("entmax15").entmax15(x, dim=-1)


@rowwise
def _entmax(x: Tensor, keep: Tensor, alpha: float | Tensor = 1.5) -> Tensor:
    alpha = torch.as_tensor(alpha, dtype=x.dtype, device=x.device)
    return _Entmax.apply(x, alpha.expand(*x.shape[:-1], 1))


class _Entmax(Function):
    """alpha-entmax for any alpha >= 1, with gradients for the scores and for alpha (Correia et al. 2019, section 3.2).

    Written as ``p_i = (1 + d (z_i - s))_+ ** (1/d)`` with ``d = alpha - 1`` and ``z = x - max x``, so that alpha -> 1
    is SoftMax, ``s = logsumexp(z)``, without the cancellation that the usual threshold and gradient suffer from there.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor) -> Tensor:
        z, d = x - x.amax(-1, keepdim=True), _positive(alpha - 1)
        steep = d > 1
        if steep.all():
            p = _solve_steep_entmax(z, d)
        else:
            p = _solve_entmax(z, d.clamp(max=1.0))
            if steep.any():
                p = torch.where(steep, _solve_steep_entmax(z, d.clamp(min=1.0)), p)
        ctx.save_for_backward(p, alpha)
        return p

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        p, alpha = ctx.saved_tensors
        d = _positive(alpha - 1)
        log_p = torch.where(p > 0, p, 1.0).log()
        grad_x = grad_alpha = None
        # p ** (1 - d) may overflow for steep alphas: here over its largest, and below only up to a bound
        steepness = torch.where(p > 0, (1 - d) * log_p, -math.inf)
        most, steepest = steepness.max(-1, keepdim=True)
        weight = torch.exp(steepness - most)
        weight_sum = weight.sum(-1, keepdim=True)
        if ctx.needs_input_grad[0]:
            relative = grad - grad.gather(-1, steepest)
            mean = (weight * relative).sum(-1, keepdim=True) / weight_sum
            bounded = steepness.clamp(max=math.log(torch.finfo(p.dtype).max) / 2).exp()
            # the steepest entry's is minus the sum of the others', of which its own formula would leave no digits
            grad_x = (bounded * (relative - mean)).scatter(-1, steepest, 0.0)
            grad_x = grad_x.scatter(-1, steepest, -grad_x.sum(-1, keepdim=True))
        if ctx.needs_input_grad[1]:
            by_alpha = _entmax_by_alpha(p, log_p, d)
            if (d > 1).any():
                by_alpha = torch.where(d > 1, _steep_entmax_by_alpha(p, log_p, weight / weight_sum, d), by_alpha)
            grad_alpha = (grad * by_alpha).sum(-1, keepdim=True)
        return grad_x, grad_alpha


def _positive(d: Tensor) -> Tensor:
    """alpha - 1, kept off zero by so little that only the division by zero changes."""
    return d.clamp(min=1e-12)


def _solve_entmax(z: Tensor, d: Tensor, most_steps: int = 100) -> Tensor:
    """The p of :class:`_Entmax` for d <= 1: Newton's method on ``|| (1 + d (z - s))_+ ||_{1/d}``, convex: few steps."""
    s, low, high = torch.zeros_like(d), torch.zeros_like(d), -torch.expm1(-d * math.log(z.shape[-1])) / d
    tolerance = 4.0 * torch.finfo(z.dtype).eps
    for _ in range(most_steps):
        base = (d * (z - s)).clamp(min=-1.0)
        p = torch.exp(torch.log1p(base) / d)
        total = p.sum(-1, keepdim=True)
        slope = torch.where(p > 0, p / (1 + base), 0.0).sum(-1, keepdim=True)
        step = torch.expm1(d * total.log()) / d * total ** (1 - d) / slope
        low, high = torch.where(total >= 1, s, low), torch.where(total >= 1, high, s)
        moved = s + step
        moved = torch.where((moved >= low) & (moved <= high), moved, (low + high) / 2)
        if ((moved - s).abs() <= tolerance * (1 + s.abs())).all():
            break
        s = moved
    return p / total


def _solve_steep_entmax(z: Tensor, d: Tensor, most_steps: int = 100) -> Tensor:
    """The p of :class:`_Entmax` for d >= 1, where scores that hardly differ may have very different p.

    Written as ``p_i = (r^d + d (z_i - z_k)) ** (1/d)`` from the smallest score z_k of the support on, with ``r = p_k``,
    so that nothing cancels; their sum is convex in r, and Newton's method finds where it is 1 from r = 1 down.
    """
    ordered = z.sort(-1, descending=True).values
    inside, outside = torch.zeros_like(d, dtype=torch.long), torch.full_like(d, z.shape[-1], dtype=torch.long)
    for _ in range(z.shape[-1].bit_length()):  # of z_0 = 0, which is in the support, and the first score that is not
        middle = ((inside + outside) // 2).clamp(max=z.shape[-1] - 1)
        least = ordered.gather(-1, middle)
        room = torch.where(z > least, (d * (z - least)) ** (1 / d), 0.0).sum(-1, keepdim=True) < 1
        inside, outside = torch.where(room, middle, inside), torch.where(room, outside, middle)
    least = ordered.gather(-1, inside)
    kept = z >= least
    log_gap = torch.where(kept, d * (z - least), 0.0).log()
    r = torch.ones_like(d)
    for _ in range(most_steps):
        log_p = torch.where(kept, torch.logaddexp(d * r.log(), log_gap) / d, -math.inf)
        p = log_p.exp()
        slope = torch.where(kept, torch.exp((d - 1) * (r.log() - log_p)), 0.0).sum(-1, keepdim=True)
        moved = (r - (p.sum(-1, keepdim=True) - 1) / slope).clamp(min=torch.finfo(z.dtype).tiny)
        if (r - moved <= 4.0 * torch.finfo(z.dtype).eps * r).all():
            break
        r = torch.minimum(moved, r)
    return p / p.sum(-1, keepdim=True)


def _entmax_by_alpha(p: Tensor, log_p: Tensor, d: Tensor) -> Tensor:
    """dp/dalpha. The terms in 1/d and 1/d^2 of the published form cancel and are taken out here."""
    u = -d * log_p
    first = -log_p * _expm1_over(u)  # expm1(u) / d
    second = log_p.square() * _expm1_minus_u_over(u)  # (expm1(u) - u) / d^2
    mean_first, mean_second, mean_log = ((p * part).sum(-1, keepdim=True) for part in (first, second, log_p))
    return p / (1 + d * mean_first) * (mean_second - second - mean_first * log_p + first * mean_log)


def _steep_entmax_by_alpha(p: Tensor, log_p: Tensor, weight: Tensor, d: Tensor) -> Tensor:
    """dp/dalpha for d > 1 in its published form; ``weight`` is ``p ** (1 - d)`` over its sum."""
    entropy = (p * log_p).sum(-1, keepdim=True)
    return (p - weight) / d**2 - (p * log_p - weight * entropy) / d


def _expm1_over(u: Tensor) -> Tensor:
    small = u.abs() < 1e-4
    return torch.where(small, 1 + u / 2, torch.expm1(u) / torch.where(small, 1.0, u))


def _expm1_minus_u_over(u: Tensor) -> Tensor:
    """``(expm1(u) - u) / u^2``"""
    small = u.abs() < 0.3
    series = torch.zeros_like(u)
    for k in range(13, 1, -1):
        series = series * u + 1 / math.factorial(k)
    return torch.where(small, series, (torch.expm1(u) - u) / torch.where(small, 1.0, u).square())


# -- structured sparsity -----------------------------------------------------------------------------------------------


# What these fuse shares one gradient: scores that lie within reach of lam (or beta) of each other from the start get no
# gradient that could part them. Under a mask with holes, or in a cache, what counts is the order of what is kept.


@rowwise
def _fusedmax(x: Tensor, keep: Tensor, lam: float = 1.0) -> Tensor:
    x = _below_peak(x)
    # Scores that far down stay apart from the support, whatever they are; they would take the digits of the others.
    x = x.clamp(min=-4 * lam - 2)
    if bool(keep.all()):
        return _entmax_package("fusedmax").sparsemax(prox_tv(x, lam), dim=-1)
    # The kept entries move together: what a mask removes does not stand between neighbours.
    order = (~keep).to(torch.uint8).argsort(dim=-1, stable=True)
    there = keep.gather(-1, order)
    scores = x.gather(-1, order).masked_fill(~there, 0.0)
    scores = prox_tv(scores, lam, there.sum(-1, keepdim=True)).masked_fill(~there, -math.inf)
    return torch.zeros_like(x).scatter(-1, order, _entmax_package("fusedmax").sparsemax(scores, dim=-1))


@rowwise
def _oscarmax(x: Tensor, keep: Tensor, alpha: float = 0.0, beta: float | None = None) -> Tensor:
    # As in fusedmax; here signs and ranks of magnitudes count, so that the bound is further away.
    count = keep.sum(-1, keepdim=True).to(x.dtype)
    strength = alpha + (2.0 if beta is None else beta * count)
    x = x.maximum(-2 * x.detach().amax(-1, keepdim=True).abs() - 4 * strength - 2)
    scores = prox_oscar(x.masked_fill(~keep, 0.0), keep, alpha, beta)
    return _entmax_package("oscarmax").sparsemax(scores.masked_fill(~keep, -math.inf), dim=-1)


# -- SoftMax with something left out -----------------------------------------------------------------------------------


@rowwise
def _rsoftmax(x: Tensor, keep: Tensor, sparsity: float | Tensor = 0.5) -> Tensor:
    z = x.detach() - x.detach().amax(-1, keepdim=True)
    return _weighted_softmax(x, _sparsity_threshold(z, keep, sparsity))


@rowwise
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


@rowwise
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


@rowwise
def _evsoftmax(x: Tensor, keep: Tensor, training: bool = False) -> Tensor:
    z = (x - x.amax(-1, keepdim=True)).detach()
    mean = torch.where(keep, z, 0.0).sum(-1, keepdim=True) / keep.sum(-1, keepdim=True)
    likely = (z >= mean) | (z == 0)
    return torch.where(likely, x, x + math.log(_EV_TRAINING_FACTOR) if training else -math.inf).softmax(-1)


@rowwise
def _topk_softmax(x: Tensor, keep: Tensor, k: int) -> Tensor:
    if k >= x.shape[-1]:
        return x.softmax(-1)
    least = x.detach().topk(k, dim=-1).values[..., -1:]
    above, equal = x > least, x == least
    room = k - above.sum(-1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(-1) <= room))
    return torch.where(chosen, x, -math.inf).softmax(-1)


@rowwise
def _scalable_softmax(x: Tensor, keep: Tensor, s: float | Tensor = 0.43) -> Tensor:
    return _scaled_softmax(x, keep, s * keep.sum(-1, keepdim=True).to(x.dtype).log())


def _scaled_softmax(x: Tensor, keep: Tensor, scale: Tensor) -> Tensor:
    """SoftMax of ``scale * x``, where the scale of a row may be 0 or carry a gradient."""
    return torch.where(keep, scale * _below_peak(x), -math.inf).softmax(-1)


def _below_peak(x: Tensor) -> Tensor:
    """Scores less the row's largest, finite: what SoftMax does not see, and what no factor takes to plus infinity."""
    return (x - x.detach().amax(-1, keepdim=True)).clamp(min=torch.finfo(x.dtype).min)


# -- the registry ------------------------------------------------------------------------------------------------------


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _positive_number(default: Any, help: str) -> Option:
    return Option(default, help, "a number > 0", lambda value: _is_number(value) and value > 0)


def _non_negative(default: Any, help: str) -> Option:
    return Option(default, help, "a number >= 0", lambda value: _is_number(value) and value >= 0)


def _flag(help: str) -> Option:
    return Option(False, help, "true or false", lambda value: isinstance(value, bool))


def _same(value: Tensor) -> Tensor:
    return value


def _one_plus_sigmoid(a: Tensor) -> Tensor:
    return 1 + a.sigmoid()


def _logit(name: str, value: float, least: float) -> float:
    """The parameter a with ``value = least + sigmoid(a)``."""
    share = value - least
    if not 0 < share < 1:
        raise ValueError(f"{name} must be strictly between {least:g} and {least + 1:g} to be learned, got {value}")
    return math.log(share / (1 - share))


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
    options={"temperature": _positive_number(1.0, "scores are divided by it")},
)
register_normalizer(
    "sparsemax",
    _sparsemax,
    citation="Martins, Astudillo. From Softmax to Sparsemax. ICML 2016. arXiv:1602.02068.",
)
register_normalizer(
    "entmax15",
    _entmax15,
    citation="Peters, Niculae, Martins. Sparse Sequence-to-Sequence Models. ACL 2019. arXiv:1905.05702.",
)
register_normalizer(
    "entmax",
    _entmax,
    citation="Peters, Niculae, Martins, ACL 2019; learned alpha: Correia, Niculae, Martins. Adaptively Sparse "
    "Transformers. EMNLP 2019. arXiv:1909.00015.",
    options={
        "alpha": Option(
            1.5, "1 is SoftMax, 2 is sparsemax", "a number >= 1", lambda value: _is_number(value) and value >= 1
        ),
        "learn": _flag("learn alpha = 1 + sigmoid(a), starting where alpha says"),
    },
    learned={"alpha": Learned(_one_plus_sigmoid, functools.partial(_logit, "alpha", least=1.0))},
)
register_normalizer(
    "fusedmax",
    _fusedmax,
    citation="Niculae, Blondel. A Regularized Framework for Sparse and Structured Neural Attention. NeurIPS 2017. "
    "arXiv:1705.07704.",
    options={"lam": _non_negative(1.0, "strength of the fusing of neighbours; 0 is sparsemax")},
)
register_normalizer(
    "oscarmax",
    _oscarmax,
    citation="Niculae, Blondel. A Regularized Framework for Sparse and Structured Neural Attention. NeurIPS 2017. "
    "arXiv:1705.07704.",
    options={
        "alpha": _non_negative(0.0, "strength of the pull to zero"),
        "beta": Option(
            None,
            "strength of the grouping of entries of any place; null is 1 / (unmasked entries - 1)",
            "a number >= 0, or null",
            lambda value: value is None or (_is_number(value) and value >= 0),
        ),
    },
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
            lambda value: _is_number(value) and 0 <= value <= 1,
        ),
        "learn": _flag("learn sparsity = sigmoid(a), starting where sparsity says"),
    },
    learned={"sparsity": Learned(torch.sigmoid, functools.partial(_logit, "sparsity", least=0.0))},
)
register_normalizer(
    "tsoftmax",
    _tsoftmax,
    citation="Bałazy, Struski, Śmieja, Tabor. r-softmax: Generalized Softmax with Controllable Sparsity Rate. "
    "ICCS 2023. arXiv:2304.05243.",
    options={"t": _positive_number(REQUIRED, "scores more than t below the largest become zero")},
)
register_normalizer(
    "adaptive_temperature",
    _adaptive_temperature,
    citation="Veličković, Perivolaropoulos, Barbero, Pascanu. softmax is not enough (for sharp size generalisation). "
    "2024. arXiv:2410.01104.",
    options={"apply_in_training": _flag("sharpen in training mode too, which is plain SoftMax otherwise")},
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
            lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 1,
        )
    },
)
register_normalizer(
    "scalable_softmax",
    _scalable_softmax,
    citation="Nakanishi. Scalable-Softmax Is Superior for Attention. 2025. arXiv:2501.19399.",
    options={"s": _positive_number(0.43, "scores are multiplied by s log(unmasked entries); where s starts")},
    learned={"s": Learned(_same, float, always=True)},
    per_head=True,
)
