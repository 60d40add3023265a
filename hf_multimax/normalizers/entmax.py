"""The entmax family: sparsemax, 1.5-entmax, and alpha-entmax with an alpha that can be learned.

Under ``torch.compile`` they break the graph: they search until every row is solved, or come from the ``entmax``
package.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from hf_multimax.config import MultiMaxConfig
from hf_multimax.normalizers.options import (
    below_peak,
    flag,
    init,
    logit,
    of_value,
    one_plus_share,
    one_plus_sigmoid,
    same,
    start_at_zero,
)
from hf_multimax.normalizers.query_scaled import IDENTITY_DELTA, QueryScaledEntmax
from hf_multimax.normalizers.registry import (
    FunctionNormalizer,
    Learned,
    Option,
    build_from_function,
    get_normalizer,
    register_normalizer,
    rowwise,
)
from hf_multimax.numbers import is_finite
from hf_multimax.rows.function import RowFunction

__all__ = ["entmax_package"]


def entmax_package(normalizer: str) -> ModuleType:
    """The entmax package, which only some normalizers need: imported when one of them first runs."""
    try:
        import entmax
    except ImportError as error:
        raise ImportError(f"normalizer {normalizer!r} needs the entmax package: pip install entmax") from error
    return entmax


@rowwise(compiled=lambda: RowFunction("sparsemax"))
def _sparsemax(x: Tensor, keep: Tensor) -> Tensor:
    return entmax_package("sparsemax").sparsemax(x, dim=-1)


@rowwise(compiled=lambda: RowFunction("entmax15"))
def _entmax15(x: Tensor, keep: Tensor) -> Tensor:
    return entmax_package("entmax15").entmax15(x, dim=-1)


@rowwise(compiled=lambda alpha=1.5: of_value("entmax", alpha))
def _entmax(x: Tensor, keep: Tensor, alpha: float | Tensor = 1.5) -> Tensor:
    alpha = torch.as_tensor(alpha, dtype=x.dtype, device=x.device)
    return _Entmax.apply(x, alpha.expand(*x.shape[:-1], 1))


def _compiled_asentmax(
    alpha: float | Tensor = 1.5,
    beta: float | Tensor | None = None,
    gamma: float | Tensor | None = None,
    delta: float = 1.0,
    scaling: str = "learn",
) -> RowFunction | None:
    if scaling == "adapt":
        raise ValueError(
            "scaling='adapt' reads the queries of attention, which scores alone do not tell: it is for patch_model; "
            "give normalize('asentmax', ...) beta and gamma"
        )
    chosen = of_value("asentmax", alpha, delta)
    if chosen is None:
        return None
    return chosen._replace(beta=_MEAN_BETA if beta is None else beta, gamma=0.0 if gamma is None else gamma)


@rowwise(compiled=_compiled_asentmax)
def _asentmax(
    x: Tensor,
    keep: Tensor,
    alpha: float | Tensor = 1.5,
    beta: float | Tensor | None = None,
    gamma: float | Tensor | None = None,
    delta: float = 1.0,
    scaling: str = "learn",
) -> Tensor:
    beta, gamma = _MEAN_BETA if beta is None else beta, 0.0 if gamma is None else gamma
    # n + 1 is the authors' "position + 2" under a causal mask, whose logarithm is no less than log 2
    length = (keep.sum(-1, keepdim=True) + 1).to(x.dtype).log()
    return _entmax(torch.where(keep, (delta + beta * length**gamma) * below_peak(x), -math.inf), alpha=alpha)


#: of what beta is drawn from
_MEAN_BETA = 0.55


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


_LEARNED_ALPHA = Learned(one_plus_sigmoid, functools.partial(logit, "alpha", least=1.0))
_IDENTITY_ALPHA = Learned(one_plus_share, start_at_zero)


def _asentmax_module(
    config: MultiMaxConfig, num_heads: int | None, head_dim: int | Callable[[], int] | None = None
) -> FunctionNormalizer:
    spec, given = get_normalizer("asentmax"), dict(config.normalizer_kwargs)
    if given.get("scaling") != "adapt":
        return build_from_function(FunctionNormalizer, spec, given, num_heads=num_heads)
    del given["scaling"]
    drawn = [name for name in ("beta", "gamma") if given.pop(name, None) is not None]
    if drawn:
        raise ValueError(
            f"MultiMaxConfig.normalizer_kwargs: {' and '.join(drawn)} of 'asentmax' come from the queries with "
            "scaling='adapt': leave them out"
        )
    options = {name: option for name, option in spec.options.items() if name not in ("beta", "gamma", "scaling")}
    learned, identity = {"alpha": _LEARNED_ALPHA}, {"alpha": _IDENTITY_ALPHA}
    starts = {"delta": IDENTITY_DELTA}
    spec = dataclasses.replace(spec, options=options, learned=learned, identity=identity, identity_options=starts)
    width = head_dim() if callable(head_dim) else head_dim
    return build_from_function(QueryScaledEntmax, spec, given, num_heads=num_heads, head_dim=width)


def _drawn(help: str, how: str) -> Option:
    return Option(
        None,
        f"{help}; null is drawn for each head, {how}",
        "a number, or null",
        lambda value: value is None or is_finite(value),
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
            1.5, "1 is SoftMax, 2 is sparsemax", "a number >= 1", lambda value: is_finite(value) and value >= 1
        ),
        "learn": flag("learn alpha = 1 + sigmoid(a), starting where alpha says"),
        "init": init(),
    },
    learned={"alpha": _LEARNED_ALPHA},
    identity={"alpha": _IDENTITY_ALPHA},
)
register_normalizer(
    "asentmax",
    _asentmax,
    _asentmax_module,
    citation="Vasylenko, Pitorro, Martins, Treviso. Long-Context Generalization with Sparse Attention. ICLR 2026. "
    "arXiv:2506.16640.",
    options={
        "alpha": Option(1.5, "of the entmax", "a number >= 1", lambda value: is_finite(value) and value >= 1),
        "beta": _drawn(
            "scores are multiplied by delta + beta log(unmasked entries + 1) ** gamma",
            "evenly in 0.1 .. 1, and 0.55 in normalize",
        ),
        "gamma": _drawn("see beta", "normally with a deviation of 0.1, and 0 in normalize"),
        "delta": Option(1.0, "see beta", "a number", is_finite),
        "scaling": Option(
            "learn",
            "adapt takes beta = softplus(w q) and gamma = 2 tanh(w' q) from each query, w and w' learned for each head",
            "'learn' or 'adapt'",
            lambda value: value in ("learn", "adapt"),
        ),
        "learn": flag("learn alpha, too, as entmax does"),
        "init": init(),
    },
    learned={
        "beta": Learned(same, float, always=True, draw=functools.partial(nn.init.uniform_, a=0.1, b=1.0)),
        "gamma": Learned(same, float, always=True, draw=functools.partial(nn.init.normal_, std=0.1)),
        "alpha": _LEARNED_ALPHA,
    },
    per_head=True,
    identity={
        "beta": Learned(same, start_at_zero),
        "gamma": Learned(same, start_at_zero),
        "alpha": _IDENTITY_ALPHA,
    },
)
