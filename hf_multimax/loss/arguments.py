"""The checks of the output loss's arguments."""

from typing import Any, TypedDict

import torch
from torch import Tensor

from hf_multimax.attention.call import check_number
from hf_multimax.attention.context import autocast_dtype

__all__ = ["Affine", "LossOptions", "check_modulator", "check_tensors", "checked_options", "matmul_dtype"]

Affine = tuple[Tensor, Tensor]


def check_tensors(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    for name, tensor, ndim, shape in (
        ("hidden", hidden, 2, "[tokens, d]"),
        ("weight", weight, 2, "[vocab, d]"),
        ("labels", labels, 1, "[tokens]"),
        ("bias", bias, 1, "[vocab]"),
    ):
        if tensor is None and name == "bias":
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor {shape}, got {type(tensor).__name__}")
        if tensor.ndim != ndim:
            raise ValueError(
                f"{name} must be {shape}, got shape {list(tensor.shape)}; flatten leading dimensions first"
            )
        if name == "labels" and tensor.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"labels must be int64 or int32 class numbers, got {tensor.dtype}")
        if name != "labels" and tensor.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, hidden on {hidden.device}; move them to one device")
    if weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"weight must be [vocab, {hidden.shape[1]}] to fit hidden {list(hidden.shape)}, got {list(weight.shape)}"
        )
    if weight.shape[0] == 0:
        raise ValueError("weight must have at least one row (class), got 0")
    if labels.shape[0] != hidden.shape[0]:
        raise ValueError(f"labels must have one entry per token: {hidden.shape[0]} tokens, {labels.shape[0]} labels")
    if bias is not None and bias.shape[0] != weight.shape[0]:
        raise ValueError(f"bias must have one entry per row of weight ({weight.shape[0]}), got {bias.shape[0]}")


def check_modulator(ranges: Tensor | None, ts: Tensor | None, affine: Affine | None) -> None:
    if (ranges is None) != (ts is None):
        missing, given = ("ranges", "ts") if ranges is None else ("ts", "ranges")
        raise ValueError(f"{given} given without {missing}: give both, or neither for SoftMax")
    if affine is not None and (not isinstance(affine, tuple | list) or len(affine) != 2):
        raise TypeError("affine must be a pair (scale, shift) of scalar tensors")
    if affine is not None and ranges is None:
        raise ValueError("affine acts in front of the modulator: give ranges and ts too")
    named = {"ranges": ranges, "ts": ts, **dict(zip(("affine scale", "affine shift"), affine or ()))}
    for name, tensor in named.items():
        if tensor is not None and (not isinstance(tensor, Tensor) or not tensor.is_floating_point()):
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a floating tensor, got {kind}")
        if name.startswith("affine") and tensor.numel() != 1:
            raise ValueError(f"{name} must be a scalar, got shape {list(tensor.shape)}")
    if ranges is not None and (
        ranges.shape != ts.shape or ranges.ndim != 1 or not ranges.numel() or ranges.numel() % 2
    ):
        raise ValueError(f"ranges and ts must both be [2N], N >= 1, got {list(ranges.shape)} and {list(ts.shape)}")


class LossOptions(TypedDict, total=False):
    """What a call may do without."""

    bias: Tensor | None
    ignore_index: int
    label_smoothing: float
    reduction: str
    num_items_in_batch: int | Tensor | None
    affine: Affine | None
    softcap: float | None
    chunk_size: int | None


def checked_options(given: dict[str, Any]) -> dict[str, Any]:
    """All options, those that are not given, or None, at their defaults.

    Raises:
        TypeError, ValueError: for an unknown one, or one that is impossible whatever the tensors.
    """
    unknown = given.keys() - LossOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"the loss has no option {min(unknown)!r}; there are {', '.join(LossOptions.__annotations__)}")
    options = {**dict.fromkeys(LossOptions.__annotations__), **_DEFAULTS}
    options |= {name: value for name, value in given.items() if value is not None}
    for name in ("label_smoothing", "softcap"):
        check_number(name, options[name])
    for name in ("ignore_index", "chunk_size"):
        check_number(name, options[name], integer=True)
    label_smoothing, reduction, count = (options[n] for n in ("label_smoothing", "reduction", "num_items_in_batch"))
    softcap, chunk_size = options["softcap"], options["chunk_size"]
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    if isinstance(count, Tensor) and count.numel() != 1:
        raise ValueError(f"num_items_in_batch must be a scalar, got shape {list(count.shape)}")
    check_number("num_items_in_batch", count)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    return options


_DEFAULTS = {"ignore_index": -100, "label_smoothing": 0.0, "reduction": "mean"}


def matmul_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The type of the matrix products: autocast's where it acts, else that of ``hidden`` and ``weight``."""
    autocast = autocast_dtype(hidden.device)
    if autocast is not None and torch.float64 not in (hidden.dtype, weight.dtype):
        return autocast
    if hidden.dtype != weight.dtype:
        raise TypeError(f"weight must have hidden's dtype {hidden.dtype}, got {weight.dtype}; cast one or use autocast")
    return hidden.dtype
