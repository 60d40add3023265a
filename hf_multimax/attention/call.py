"""One call of attention: what it consists of, in the order of every operator's arguments, and what is refused."""

from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

__all__ = ["DIFFERENTIABLE", "Affine", "Call", "Features", "check_number", "make_call", "seeded"]

Affine = tuple[Tensor, Tensor]

#: no sequence is as long; sums with a position stay within 32 bits
LARGEST_WINDOW = 1 << 30


class Call(NamedTuple):
    """What every backend computes with, complete and checked: see :func:`make_call`.

    ``window`` of -1 and ``softcap`` of 0 mean none. ``ranges`` and ``ts`` are None for normalizers other than MultiMax,
    ``seed`` is None without dropout and until a backend has drawn it (:func:`seeded`).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    ranges: Tensor | None
    ts: Tensor | None
    mask: Tensor | None
    bias: Tensor | None
    affine_scale: Tensor | None
    affine_shift: Tensor | None
    sinks: Tensor | None
    seed: Tensor | None
    dropout_p: float
    causal: bool
    window: int
    scale: float
    softcap: float

    @property
    def banded(self) -> bool:
        """Whether causality or a window hides keys by their place alone."""
        return self.causal or self.window >= 0

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """What gradients are defined for."""
        return self[:DIFFERENTIABLE]


#: how many of a call's tensors gradients are defined for: all but the seed
DIFFERENTIABLE = Call._fields.index("seed")


class Features(TypedDict, total=False):
    """What a call may do without."""

    mask: Tensor | None
    bias: Tensor | None
    affine: Affine | None
    dropout_p: float
    causal: bool
    window: int | None
    scale: float | None
    softcap: float | None
    sinks: Tensor | None


_FEATURES = frozenset(Features.__annotations__)


def make_call(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor | None, ts: Tensor | None, **features: object) -> Call:
    """``dropout(softmax(mask(sigma(softcap(q k^T * scale) + bias)))) v`` (paper, section 4), as a checked call.

    Args:
        q: ``[B, H, Nq, D]``; float32, float64, bfloat16 or float16, any strides.
        k: ``[B, Hkv, Nk, D]``, H a multiple of Hkv (query head h reads head ``h // (H // Hkv)``).
        v: ``[B, Hkv, Nk, Dv]``.
        ranges, ts: the modulator, ``[2N]`` or ``[H, 2N]``; None for other normalizers.
        features: those of :class:`Features`:

            - mask: boolean (True = keep) or additive, broadcastable to ``[B, H, Nq, Nk]``. An additive entry at or
              below half of its type's lowest value masks, any other is added after the modulation.
            - bias: added to the scores before the modulation, broadcastable to ``[B, H, Nq, Nk]``.
            - affine: ``(scale, shift)``, each a scalar or ``[H]``, applied to the scores before the modulation.
            - dropout_p: probability that a weight is dropped.
            - causal: query i sees keys up to ``i + Nk - Nq``; combines with ``mask``.
            - window: with ``causal`` the last ``window`` keys, itself included; without it keys at a distance below it.
            - scale: factor of the scores, ``D ** -0.5`` if None.
            - softcap: c in ``c * tanh(score / c)``, applied before the bias.
            - sinks: ``[H]`` or ``[B, H, Nq, 1]``, extra unmodulated logits that join the denominator only.

    Returns:
        The call. Computed, it is ``[B, H, Nq, Dv]`` in v's type; a row that sees nothing is zero.

    Raises:
        ValueError: for shapes that do not fit, and causal or window with more queries than keys; the text names the
            argument. TypeError: for types that do not fit, or an unknown feature.
    """
    if not features.keys() <= _FEATURES:
        unknown = features.keys() - _FEATURES
        raise TypeError(f"attention has no argument {min(unknown)!r}; there are {', '.join(Features.__annotations__)}")
    get = features.get
    affine, scale, window, softcap = get("affine"), get("scale"), get("window"), get("softcap")
    if affine is not None:
        _check_affine(affine, q)
    for name in ("dropout_p", "scale", "softcap"):
        check_number(name, get(name))
    check_number("window", window, integer=True)
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive (None for no cap), got {softcap}")
    call = Call(
        q, k, v, ranges, ts, get("mask"), get("bias"), *(affine or (None, None)), get("sinks"), None,
        get("dropout_p", 0.0), get("causal", False), -1 if window is None else min(window, LARGEST_WINDOW),
        0.0 if scale is None else scale, 0.0 if softcap is None else softcap,
    )  # fmt: skip
    _check(call)
    return call if scale is not None else call._replace(scale=q.shape[-1] ** -0.5)


def seeded(call: Call, device: torch.device | str = "cpu") -> Call:
    """The call with a seed for its dropout, drawn by the default generator of a device. A tensor, so that compiled
    graphs draw a new one each time and nothing waits for the device.
    """
    if not call.dropout_p:
        return call
    return call._replace(seed=torch.randint(1 << 62, (1,), dtype=torch.int64, device=device))


def _check(call: Call) -> None:
    q, k, v = call.q, call.k, call.v
    if not q.ndim == k.ndim == v.ndim == 4:
        name, tensor = next((name, x) for name, x in (("q", q), ("k", k), ("v", v)) if x.ndim != 4)
        raise ValueError(f"{name} must be [batch, heads, length, dim], got {list(tensor.shape)}")
    if not (q.dtype.is_floating_point and q.dtype == k.dtype == v.dtype):
        raise TypeError(f"q, k and v must share one floating type, got {q.dtype}, {k.dtype} and {v.dtype}")
    device = q.device
    for name, tensor in zip(Call._fields, call.differentiable):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"q is on {device}, but {name} is on {tensor.device}: move it there")
    batch, heads, rows, dim = q.shape
    k_batch, kv_heads, keys, k_dim = k.shape
    if not dim:
        raise ValueError(f"the head dimension must be at least 1, got q {list(q.shape)}")
    if k_batch != batch or v.shape[:3] != k.shape[:3] or k_dim != dim or (heads % kv_heads if kv_heads else heads):
        raise ValueError(
            "q [B, H, Nq, D], k [B, Hkv, Nk, D] and v [B, Hkv, Nk, Dv] with H a multiple of Hkv do not fit "
            f"{list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    if call.ranges is not None and call.ts is not None:
        _check_modulator(call.ranges.shape, call.ts.shape, heads)
    if call.sinks is not None and call.sinks.shape not in ((heads,), (batch, heads, rows, 1)):
        raise ValueError(f"sinks must be [{heads}], got {list(call.sinks.shape)}")
    for name, tensor in (("mask", call.mask), ("bias", call.bias)):
        if tensor is None:
            continue
        if tensor.ndim > 4 or any(a not in (1, b) for a, b in zip(reversed(tensor.shape), (keys, rows, heads, batch))):
            raise ValueError(f"{name} of shape {list(tensor.shape)} does not broadcast to {[batch, heads, rows, keys]}")
        if not tensor.is_floating_point() and (name == "bias" or tensor.dtype != torch.bool):
            kinds = "boolean (True = keep) or floating point (additive)" if name == "mask" else "floating point"
            raise TypeError(f"{name} must be {kinds}, got {tensor.dtype}")
    if not 0.0 <= call.dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {call.dropout_p}")
    if call.banded and rows > keys:
        raise ValueError(f"causal and window need as many keys as queries at least, got {rows} queries, {keys} keys")


def _check_modulator(ranges: torch.Size, ts: torch.Size, heads: int) -> None:
    if ranges != ts or len(ranges) not in (1, 2) or ranges[-1] < 2 or ranges[-1] % 2:
        raise ValueError(
            f"ranges and ts must both be [2N] or [heads, 2N] with N >= 1, got {list(ranges)} and {list(ts)}"
        )
    if len(ranges) == 2 and ranges[0] != heads:
        raise ValueError(f"ranges and ts have {ranges[0]} heads, but q has {heads}")


def check_number(name: str, value: object, integer: bool = False) -> None:
    """Raise TypeError unless ``value`` is None or a number."""
    if value is None or type(value) is float and not integer or type(value) is int:
        return
    # NumPy's numbers too, and tensors of one: some models scale by a parameter of theirs
    symbolic = (torch.SymInt,) if integer else (torch.SymInt, torch.SymFloat)
    number = isinstance(value, symbolic) or hasattr(value, "__index__" if integer else "__float__")
    if isinstance(value, bool) or not number:
        raise TypeError(f"{name} must be {'an integer' if integer else 'a number'} or None, got {value!r}")


def _check_affine(affine: Affine, q: Tensor) -> None:
    heads = q.shape[1] if q.ndim == 4 else None
    if not isinstance(affine, tuple | list) or len(affine) != 2:
        raise TypeError(f"affine must be a pair of tensors (scale, shift), got {type(affine).__name__}")
    for name, tensor in zip(("affine scale", "affine shift"), affine):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, a scalar or [{heads}], got {type(tensor).__name__}")
        if tensor.device != q.device:
            raise ValueError(f"q is on {q.device}, but {name} is on {tensor.device}: move it there")
        if tensor.shape not in ((), (heads,)):
            raise ValueError(f"{name} must be a scalar or [{heads}], got {list(tensor.shape)}")
