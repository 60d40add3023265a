"""Outputs and gradients of two models against each other, and exceptions in one line."""

import re
import tempfile
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["describe", "difference", "floats", "plain", "relative_rms"]

#: A reference below it is taken as it were this large: it is a sum that cancels.
NOTHING = 1e-4


def floats(outputs: Any) -> list[Tensor]:
    """The floating tensors of a model's outputs, in order; caches are left out.

    Attention weights are, too: eager returns them unasked where the model asks by itself, other backends do not.
    """
    if isinstance(outputs, Tensor):
        return [outputs] if outputs.is_floating_point() else []
    if isinstance(outputs, dict):
        outputs = [value for name, value in outputs.items() if "attentions" not in name]
    return [tensor for value in outputs for tensor in floats(value)] if isinstance(outputs, list | tuple) else []


def difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference relative to the largest entry of its tensor.

    Infinite where shapes differ, or where one has NaN and the other has not.
    """
    if [tensor.shape for tensor in actual] != [tensor.shape for tensor in expected]:
        return float("inf")
    return max((_difference(a.double(), e.double()) for a, e in zip(actual, expected) if a.numel()), default=0.0)


def _difference(actual: Tensor, expected: Tensor) -> float:
    if not torch.equal(actual.isnan(), expected.isnan()):
        return float("inf")
    found = (actual - expected).abs().nan_to_num(nan=0.0).max()  # equal infinities give NaN
    largest = expected[expected.isfinite()].abs().max().item() if expected.isfinite().any() else 0.0
    return found.item() / max(largest, NOTHING)


def relative_rms(found: Mapping[str, Tensor], exact: Mapping[str, Tensor], keys: Iterable[str]) -> float:
    """Root mean square over tensors of their largest error relative to their largest entry."""
    keys = [key for key in keys if exact[key].numel()]
    largest = {key: exact[key].abs().max().item() for key in keys}
    least = 1e-3 * max(largest.values(), default=0.0) + 1e-12  # of a tensor that is all but zero
    errors = [(found[key] - exact[key]).double().abs().max().item() / max(largest[key], least) for key in keys]
    return (sum(error**2 for error in errors) / max(len(errors), 1)) ** 0.5


def describe(error: BaseException) -> str:
    """An exception in one line, with the innermost line of a model or of this project that it came from."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _tells(frame.filename)]
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return plain(f"{type(error).__name__}: {error}")[:400] + where


def plain(text: str) -> str:
    """``text`` in one line, without the folders of this machine."""
    text = re.sub(re.escape(tempfile.gettempdir()) + r"/\w+", "FOLDER", text)
    return " ".join(re.sub(r"/\S*site-packages/", "", text).split())


def _tells(filename: str) -> bool:
    return any(part in filename for part in ("transformers/models", "hf_multimax", "architectures"))
