"""One call of the output loss: its tensors and options, and the sums that its gradients are."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["SOURCES", "Gradients", "Problem", "kept_dtype"]

#: bytes of the largest buffer, one chunk of logits; a quarter of the tokens is the other bound
WORKSPACE_BYTES = 128 * 2**20
#: elements of a tile, the part of a chunk whose modulation stays in the cache of a CPU; larger elsewhere
CPU_TILE, DEVICE_TILE = 2**17, 2**22

#: inputs that can have a gradient
SOURCES = ("hidden", "weight", "ranges", "ts", "bias", "scale", "shift")


class Problem(NamedTuple):
    """The tensors and options of one call, in the order of the operators' arguments."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    ranges: Tensor | None
    ts: Tensor | None
    bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    ignore_index: int
    label_smoothing: float
    softcap: float | None
    chunk_size: int | None
    dtype: torch.dtype  # that hidden and weight are rounded to

    @property
    def sources(self) -> tuple[Tensor | None, ...]:
        """Those of SOURCES."""
        return tuple(getattr(self, name) for name in SOURCES)

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def factor_dtype(self) -> torch.dtype:
        """The type that matrix products get their factors in.

        Few CPUs multiply 16-bit numbers faster than float32 (on others the one against W can take 100 times longer),
        and only CUDA keeps such a product in float32.
        """
        return self.dtype if self.hidden.is_cuda else self.compute_dtype

    @property
    def vocab(self) -> int:
        return self.weight.shape[0]

    def prepared(self) -> "Problem":
        """With every tensor but ``hidden``, which is converted by chunk, in the type that it is computed in."""
        small = {name: getattr(self, name) for name in ("ranges", "ts", "bias", "scale", "shift")}
        small = {name: None if x is None else x.to(self.compute_dtype).contiguous() for name, x in small.items()}
        return self._replace(weight=self.as_factor(self.weight), labels=self.labels.long(), **small)

    def as_factor(self, x: Tensor) -> Tensor:
        """``x`` rounded to ``dtype``, in the type for matrix products."""
        return x.to(self.dtype).to(self.factor_dtype)

    def chunk_rows(self) -> int:
        """Tokens per chunk: chunks of nearly equal size within the workspace and a quarter of the tokens."""
        if self.chunk_size is not None:
            return self.chunk_size
        tokens = max(1, self.hidden.shape[0])
        row_bytes = self.vocab * self.compute_dtype.itemsize
        most = max(1, min(WORKSPACE_BYTES // row_bytes, tokens // 4))
        return _ceil_div(tokens, _ceil_div(tokens, most))

    def tile_rows(self) -> int:
        """Rows per tile, such that the buffers of the modulator together stay below a quarter of all logits."""
        elements = CPU_TILE if self.hidden.device.type == "cpu" else DEVICE_TILE
        buffers = 1 if self.ts is None else 2 * self.ts.numel() + 1
        return max(1, min(self.chunk_rows(), elements // self.vocab, self.hidden.shape[0] // (4 * buffers)))


class Gradients:
    """The gradients that are wanted of SOURCES, summed over the chunks."""

    def __init__(self, problem: Problem, wanted: Sequence[bool]) -> None:
        self.wanted = dict(zip(SOURCES, wanted))
        self.any = any(wanted)
        self.modulator = any(self.wanted[name] for name in ("ranges", "ts"))
        self.affine = any(self.wanted[name] for name in ("scale", "shift"))
        self.logits = any(self.wanted[name] for name in ("hidden", "weight", "bias"))
        self._sums = {
            name: torch.zeros_like(getattr(problem, name), dtype=kept_dtype(problem, name))
            for name in SOURCES
            if self.wanted[name]
        }

    def add(self, name: str, value: Tensor) -> None:
        """Add to one of them if it is wanted."""
        if self.wanted[name]:
            self._sums[name] += value.reshape(self._sums[name].shape)

    def add_chunk(self, rows: Tensor, hidden: Tensor, weight: Tensor, grad: Tensor) -> None:
        """Take ``grad``, that of a chunk's products hidden @ weight.T [rows, vocab], to hidden, weight and bias."""
        factor = grad.to(hidden.dtype)
        if self.wanted["hidden"]:
            self._sums["hidden"][rows] = _product(factor, weight, self._sums["hidden"].dtype)
        if self.wanted["weight"]:
            _add_product(self._sums["weight"], factor.t(), hidden)
        if self.wanted["bias"]:
            self._sums["bias"] += grad.sum(0)

    def result(self, problem: Problem) -> tuple[Tensor, ...]:
        """In the order of SOURCES; an empty tensor for one that is not wanted."""
        return tuple(self._sums[name] if self.wanted[name] else problem.hidden.new_empty(0) for name in SOURCES)


def kept_dtype(problem: Problem, name: str) -> torch.dtype:
    """The type that a gradient is summed in: every token has its own row of hidden's, all others are long sums.

    Not in float16, which the gradient of a sum overflows where that of the mean does not.
    """
    if name == "hidden":
        return torch.float32 if problem.hidden.dtype == torch.float16 else problem.hidden.dtype
    return problem.compute_dtype if name in ("weight", "bias") else torch.float64


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b; ``total`` may be wider than the factors."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(_product(a, b, total.dtype))


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in ``dtype``, rounded once where that is wider than the factors."""
    wider = a.dtype != dtype and dtype == torch.float32
    return torch.mm(a, b, out_dtype=dtype) if wider else torch.mm(a, b).to(dtype)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
