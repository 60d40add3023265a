"""A call of the compiled extension: its arguments, packed as ``attention_call.h`` declares them."""

import struct

import torch
from torch import Tensor

from hf_multimax.attention.call import Call
from hf_multimax.extension.library import load

__all__ = ["TYPES", "Packed", "dense_rows", "parameter"]

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.bool: 3}

# ``Arguments`` of attention_call.h, every field of which is made of 64-bit words. A struct packed at once costs a tenth
# of a ctypes.Structure filled field by field, which decoding one token would notice.
VIEWS = ("q", "k", "v", "out", "grad_out", "bias", "mask", "grad_k", "grad_v")
VIEW_WORDS = 6  # data, four strides, type
POINTERS = (
    "out32", "top", "total", "peak", "delta", "grad_q", "grad_bias", "grad_ranges", "grad_ts", "grad_affine", "sums",
    "ranges", "ts", "affine", "sinks", "value", "beta", "gamma", "stats", "grad_value", "grad_beta", "grad_gamma",
)  # fmt: skip
STRIDES = "grad_bias_stride"
INTEGERS = (
    "batch", "heads", "kv_heads", "rows", "keys", "dim", "value_dim", "order", "parameter_stride", "splits", "threads",
    "row_block", "affine_stride", "causal", "window", "seed", "kind",
)  # fmt: skip
REALS = ("scale", "softcap", "dropout", "a", "b")


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
BAND = slice(OFFSETS["causal"], OFFSETS["seed"])
SCORES = slice(OFFSETS["scale"], OFFSETS["dropout"])
STATISTICS = slice(OFFSETS["top"], OFFSETS["delta"])
PACKED = struct.Struct(f"={WORDS - len(REALS)}q{len(REALS)}d")


class Packed:
    """The arguments of one C call, and the tensors that its pointers need alive."""

    def __init__(self, call: Call) -> None:
        q, v, ranges = call.q, call.v, call.ranges
        self.batch, self.heads, self.rows, dim = q.shape
        _, self.kv_heads, self.keys, value_dim = v.shape
        self._parameters = torch.Size((0,)) if ranges is None else ranges.shape
        self._affine, size = None, self._parameters[-1]
        self.threads = torch.get_num_threads()
        self._kept: list[Tensor] = [dense_rows(q), dense_rows(call.k), dense_rows(v)]
        self._words: list[int | float] = [0] * WORDS
        self._words[INPUTS] = [word for x in self._kept for word in _view(x)]
        self._words[SHAPE] = (
            self.batch, self.heads, self.kv_heads, self.rows, self.keys, dim, value_dim, size // 2,
            size if len(self._parameters) == 2 else 0, 1, self.threads,
        )  # fmt: skip
        self._words[BAND] = call.causal, call.window
        self._words[SCORES] = call.scale, call.softcap
        if ranges is not None:
            self.pointers(ranges=parameter(ranges), ts=parameter(call.ts))
        shape = (self.batch, self.heads, self.rows, self.keys)
        if call.mask is not None:
            self.views(mask=call.mask.expand(shape))
        if call.bias is not None:
            self.views(bias=call.bias.expand(shape))
        if call.affine_scale is not None and call.affine_shift is not None:
            pair = (parameter(call.affine_scale), parameter(call.affine_shift))
            affine = torch.stack(torch.broadcast_tensors(*pair), -1)
            self._affine = affine.shape
            self.set(affine_stride=2 if affine.ndim == 2 else 0)
            self.pointers(affine=affine)
        if call.sinks is not None:
            self.pointers(sinks=parameter(call.sinks))
        if call.seed is not None:
            self.set(seed=int(call.seed), dropout=call.dropout_p)

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


def parameter(x: Tensor) -> Tensor:
    """``x`` as the extension reads parameters: contiguous float32."""
    return x if x.dtype == torch.float32 and x.is_contiguous() else x.to(torch.float32).contiguous()
