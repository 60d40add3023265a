"""MultiMax in plain PyTorch: the reference that every other backend is tested against.

MultiMax (Zhou, Fritz, Keuper, ICML 2024) is SoftMax of modulated scores. The modulator of order N bends the scores
below a learned threshold ``b_n`` and above a learned threshold ``d_n``::

    sigma(x) = x + sum_{n=1..N} ( t_bn * max(b_n - x, 0)**n + t_dn * max(x - d_n, 0)**n )

    ranges = [b_1, d_1, b_2, d_2, ...]      ts = [t_b1, t_d1, t_b2, t_d2, ...]

With all ``ts`` zero sigma is the identity and MultiMax is SoftMax.
"""

import torch
from torch import Tensor
from torch.nn.functional import relu

from hf_multimax.rows.choose import compiled_multimax

__all__ = ["check_scores", "compute_dtype", "masked_softmax", "modulate", "multimax"]

Affine = tuple[Tensor, Tensor]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that scores of type ``dtype`` are computed in: float64 stays, everything else becomes float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def modulate(x: Tensor, ranges: Tensor, ts: Tensor, affine: Affine | None = None) -> Tensor:
    """The modulator sigma of MultiMax (paper, section 4), elementwise.

    Args:
        x: scores of any shape and floating type; float16 and bfloat16 are computed in float32.
        ranges: thresholds ``[b_1, d_1, ..., b_N, d_N]``, shape ``[2N]``, or ``[heads, 2N]`` for one modulator per head,
            where heads are the third dimension of ``x`` from the right (``[..., heads, queries, keys]``).
        ts: slopes ``[t_b1, t_d1, ...]``, shaped like ``ranges``.
        affine: ``(scale, shift)``, each a scalar or ``[heads]``: ``x`` is replaced by ``scale * x + shift`` first.

    Returns:
        sigma(x), shaped and typed like ``x``. Minus infinity, the score of a masked entry, stays minus infinity and
        passes no gradient.

    Raises:
        ValueError: if the shapes of ``ranges`` and ``ts`` differ or fit neither ``[2N]`` nor ``[heads, 2N]``.
        TypeError: if ``x`` is not floating point.

    Examples:
        >>> import torch
        >>> from hf_multimax import modulate
        >>> ranges, ts = torch.tensor([0.0, 1.0]), torch.tensor([-1.0, 0.5])  # below 0 twice as far, above 1 half again
        >>> modulate(torch.tensor([-1.0, 0.5, 2.0]), ranges, ts).tolist()
        [-2.0, 0.5, 2.5]
    """
    out = _modulate(x.to(compute_dtype(_checked(x, ranges, ts, affine))), ranges, ts, affine)
    return out.to(x.dtype)


def multimax(
    x: Tensor,
    ranges: Tensor,
    ts: Tensor,
    dim: int = -1,
    mask: Tensor | None = None,
    affine: Affine | None = None,
) -> Tensor:
    """``softmax(sigma(x))`` along ``dim`` (paper, equation 5).

    Args:
        x, ranges, ts, affine: as for :func:`modulate`.
        dim: the dimension that sums to one.
        mask: boolean, broadcastable to ``x``, True = keep. It acts after the modulation, as does minus infinity in
            ``x``: such an entry gets exactly 0 and no gradient.

    Returns:
        Probabilities shaped and typed like ``x``; all zeros where a row keeps nothing.

    Raises:
        ValueError, TypeError: as :func:`modulate`; for a mask that is not boolean or does not fit.

    Examples:
        >>> import torch
        >>> from hf_multimax import multimax
        >>> ranges, ts = torch.tensor([0.0, 1.0]), torch.tensor([-1.0, 0.5])
        >>> p = multimax(torch.tensor([2.0, 1.0, 0.5]), ranges, ts, mask=torch.tensor([True, True, False]))
        >>> [round(value, 3) for value in p.tolist()]
        [0.818, 0.182, 0.0]
    """
    dtype = compute_dtype(_checked(x, ranges, ts, affine))
    check_scores(x, mask)
    p = compiled_multimax(x, ranges, ts, dim, mask, affine)
    if p is not None:
        return p
    return masked_softmax(_modulate(x.to(dtype), ranges, ts, affine), dim, mask).to(x.dtype)


def check_scores(x: Tensor, mask: Tensor | None = None) -> None:
    """Raise TypeError or ValueError for what are no scores, or no mask of them."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"scores must be a floating point tensor, got {_kind(x)}")
    if not x.ndim:
        raise ValueError("scores must have a dimension to sum to one along, got a single number")
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a boolean tensor (True = keep), got {_kind(mask)}")
    if mask.ndim > x.ndim or any(m not in (1, n) for m, n in zip(reversed(mask.shape), reversed(x.shape))):
        raise ValueError(f"mask {list(mask.shape)} does not broadcast to scores {list(x.shape)}")


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def masked_softmax(x: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
    """SoftMax over the entries that ``mask`` keeps and that are not minus infinity; zeros where a row keeps nothing."""
    check_scores(x, mask)
    keep = ~(x <= torch.finfo(x.dtype).min / 2)  # true for NaN, which is not to vanish
    if mask is not None:
        keep = keep & mask
    x = x.masked_fill(~keep, float("-inf"))
    # A row of minus infinities would give NaN: make it finite, then remove it again.
    x = x.masked_fill(~keep.any(dim, keepdim=True), 0.0)
    return x.softmax(dim).masked_fill(~keep, 0.0)


def _modulate(x: Tensor, ranges: Tensor, ts: Tensor, affine: Affine | None) -> Tensor:
    """sigma(x) in x's own type, without checks."""
    score, largest = x, torch.finfo(x.dtype).max
    # Infinity stays, as does finfo.min, which some models write into their logits: 0 * inf would be NaN.
    stays = ~((score > -largest / 2) & (score <= largest))
    out = x = score.masked_fill(stays, 0.0)
    if affine is not None:
        scale, shift = (_per_head(a.to(x.dtype), 0) for a in affine)
        out = scale * x + shift
        x = out.clamp(-largest, largest)  # where it overflows, slopes of 0 must still leave nothing
    ranges, ts = _per_head(ranges.to(x.dtype), 1), _per_head(ts.to(x.dtype), 1)
    for n, (b, d, t_b, t_d) in enumerate(zip(ranges[0::2], ranges[1::2], ts[0::2], ts[1::2]), start=1):
        out = out + (_term(t_b, b - x, n) + _term(t_d, x - d, n))
    return torch.where(stays, score.detach(), out)


def _term(t: Tensor, excess: Tensor, n: int) -> Tensor:
    """``t * max(excess, 0)**n``: 0 wherever t is, and without a gradient where the power all but overflows."""
    if n == 1:
        return t * relu(excess)  # not clamp: the gradient at the threshold is zero, as in the definition
    most = (torch.finfo(excess.dtype).max / 256) ** (1 / n)
    near = _times_power(t, excess.clamp(0.0, most), n)
    return torch.where(excess > most, _times_power(t.detach(), excess.detach(), n), near)


def _times_power(t: Tensor, x: Tensor, n: int) -> Tensor:
    """``t * x**n``, multiplied from t on, so that no 0 meets an infinite power, here or in the gradients."""
    for _ in range(n):
        t = t * x
    return t


def _per_head(parameter: Tensor, own_dims: int) -> Tensor:
    """Put a parameter's own dimension first and let its heads, if any, broadcast against [..., heads, q, k]."""
    if parameter.ndim == own_dims:
        return parameter
    return parameter.movedim(0, -1)[..., None, None]


def _checked(x: Tensor, ranges: Tensor, ts: Tensor, affine: Affine | None) -> torch.dtype:
    """x's dtype, after every check of shapes and types."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"scores must be a floating point tensor, got {_kind(x)}")
    if ranges.shape != ts.shape or ranges.ndim not in (1, 2) or ranges.shape[-1] < 2 or ranges.shape[-1] % 2:
        raise ValueError(
            f"ranges and ts must both be [2N] or [heads, 2N] with N >= 1, got {list(ranges.shape)} and {list(ts.shape)}"
        )
    for name, parameter, own_dims in (("ranges", ranges, 1), *zip(("scale", "shift"), affine or (), (0, 0))):
        if parameter.ndim not in (own_dims, own_dims + 1):
            raise ValueError(f"{name} must be a scalar or [heads], got {list(parameter.shape)}")
        if parameter.ndim > own_dims and (x.ndim < 3 or x.shape[-3] != parameter.shape[0]):
            raise ValueError(
                f"{name} has {parameter.shape[0]} heads, but scores of shape {list(x.shape)} "
                "do not have them as their third dimension from the right"
            )
    return x.dtype
