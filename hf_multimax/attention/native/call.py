"""A call of the compiled extension: its arguments, packed as ``native.cpp`` reads them."""

import struct

import torch
from torch import Tensor

from hf_multimax.extension.library import load

__all__ = ["Call"]

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.bool: 3}

# ``Arguments`` of native.cpp, every field of which is made of 64-bit words. A struct packed at once costs a tenth of
# a ctypes.Structure filled field by field, which decoding one token would notice.
VIEWS = ("q", "k", "v", "out", "grad_out", "bias", "mask", "grad_k", "grad_v")
VIEW_WORDS = 6  # data, four strides, type
POINTERS = (
    "out32", "top", "total", "peak", "delta", "grad_q", "grad_bias", "grad_ranges", "grad_ts", "grad_affine", "sums",
    "ranges", "ts", "affine", "sinks",
)  # fmt: skip
STRIDES = "grad_bias_stride"
INTEGERS = (
    "batch", "heads", "kv_heads", "rows", "keys", "dim", "value_dim", "order", "parameter_stride", "splits", "threads",
    "row_block", "affine_stride", "causal", "window", "seed",
)  # fmt: skip
REALS = ("scale", "softcap", "dropout")


def _offsets() -> tuple[dict[str, int], int]:
    """The first word of every field, and the number of words."""
    sizes = [(name, VIEW_WORDS) for name in VIEWS]
    sizes += [(name, 1) for name in POINTERS] + [(STRIDES, 4)] + [(name, 1) for name in (*INTEGERS, *REALS)]
    offsets, word = {}, 0
    for name, size in sizes:
        offsets[name], word = word, word + size
    return offsets, word


OFFSETS, WORDS = _offsets()
INPUTS = slice(OFFSETS["q"], OFFSETS["out"])
SHAPE = slice(OFFSETS["batch"], OFFSETS["row_block"])
STATISTICS = slice(OFFSETS["top"], OFFSETS["delta"])
PACKED = struct.Struct(f"={WORDS - len(REALS)}q{len(REALS)}d")


class Call:
    """The arguments of one C call, and the tensors that its pointers need alive."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, ts: Tensor) -> None:
        self.batch, self.heads, self.rows, dim = q.shape
        _, self.kv_heads, self.keys, value_dim = v.shape
        self._parameters, self._affine = ranges.shape, None
        size = ranges.shape[-1]
        self.order, self.threads = size // 2, torch.get_num_threads()
        self._kept: list[Tensor] = [dense_rows(q), dense_rows(k), dense_rows(v)]
        self._words: list[int | float] = [0] * WORDS
        self._words[INPUTS] = [word for x in self._kept for word in _view(x)]
        self._words[SHAPE] = (
            self.batch, self.heads, self.kv_heads, self.rows, self.keys, dim, value_dim, self.order,
            size if ranges.ndim == 2 else 0, 1, self.threads,
        )  # fmt: skip
        self.pointers(ranges=_parameter(ranges), ts=_parameter(ts))

    def set(self, **values: int | float) -> None:
        """Set numbers."""
        for name, value in values.items():
            self._words[OFFSETS[name]] = value

    def views(self, **tensors: Tensor) -> None:
        """Set ``[batch, heads, rows, columns]`` views."""
        for name, x in tensors.items():
            self._kept.append(x)
            start = OFFSETS[name]
            self._words[start : start + VIEW_WORDS] = _view(x)

    def pointers(self, **tensors: Tensor) -> None:
        """Set pointers to contiguous tensors."""
        for name, x in tensors.items():
            self._kept.append(x)
            self._words[OFFSETS[name]] = x.data_ptr()

    def statistics(self, stats: Tensor) -> None:
        """Set a row's largest modulated score, its sum of exponentials relative to that, and that score before sigma.

        They are the contiguous thirds of ``stats``, whose views would cost more than their addresses.
        """
        self._kept.append(stats)
        first, size = stats.data_ptr(), stats.nbytes // 3
        self._words[STATISTICS] = first, first + size, first + 2 * size

    def scalar_gradients(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Ask for the gradients of ranges, ts and the affine pair, in float32 and in the shapes that were given."""
        shapes = {"ranges": self._parameters, "ts": self._parameters, "affine": self._affine}
        shapes = {f"grad_{name}": shape for name, shape in shapes.items() if shape is not None}
        # the device is named because a default device would put them where no C++ can write
        grads = {name: torch.empty(shape, dtype=torch.float32, device="cpu") for name, shape in shapes.items()}
        self.pointers(**grads)
        return grads["grad_ranges"], grads["grad_ts"], grads.get("grad_affine")

    def features(
        self, mask: Tensor | None, bias: Tensor | None, affine_scale: Tensor | None, affine_shift: Tensor | None,
        sinks: Tensor | None, seed: Tensor | None, dropout_p: float, causal: bool, window: int, scale: float,
        softcap: float,
    ) -> None:  # fmt: skip
        """Set everything that a call may do without."""
        self.set(causal=causal, window=window, scale=scale, softcap=softcap)
        shape = (self.batch, self.heads, self.rows, self.keys)
        for name, tensor in (("mask", mask), ("bias", bias)):
            if tensor is not None:
                self.views(**{name: tensor.expand(shape)})
        if affine_scale is not None and affine_shift is not None:
            pair = torch.stack(torch.broadcast_tensors(_parameter(affine_scale), _parameter(affine_shift)), -1)
            self._affine = pair.shape
            self.set(affine_stride=2 if pair.ndim == 2 else 0)
            self.pointers(affine=pair)
        if sinks is not None:
            self.pointers(sinks=_parameter(sinks))
        if seed is not None:
            self.set(seed=int(seed), dropout=dropout_p)

    def grad_bias(self, grad: Tensor) -> None:
        """Set the contiguous accumulator for the bias's gradient."""
        start = OFFSETS[STRIDES]
        self._words[start : start + 4] = grad.expand(self.batch, self.heads, self.rows, self.keys).stride()
        self.pointers(grad_bias=grad)

    def run(self, name: str) -> None:
        """Call ``multimax_<name>`` of the extension."""
        library, why = load()
        if library is None:
            raise RuntimeError(f"native CPU attention is not available: {why}; use backend('tiled')")
        getattr(library, f"multimax_{name}")(PACKED.pack(*self._words))


def dense_rows(x: Tensor) -> Tensor:
    """``x`` with unit stride within its rows."""
    _, _, row, column = x.stride()
    size = x.shape[3]
    return x if (column == 1 and row >= size) or (size == 1 and row >= 1) else x.contiguous()


def _view(x: Tensor) -> tuple[int, ...]:
    return x.data_ptr(), *x.stride(), TYPES[x.dtype]


def _parameter(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float32 and x.is_contiguous() else x.to(torch.float32).contiguous()
