"""What the Triton kernels of functions of rows take. The tuple ends with a constant: within loops, Triton 3.6 forgets a
tuple's constants that are deeper than all constants after them.
"""

from typing import Any, NamedTuple

__all__ = ["KINDS", "STATS", "Rows", "count_sums", "exponent_of"]

#: the functions that there are
KINDS = (
    "multimax", "softmax", "scalable_softmax", "adaptive_temperature", "sparsemax", "entmax15", "entmax", "rsoftmax",
    "tsoftmax", "evsoftmax", "topk_softmax", "softmax1", "sigmoid", "asentmax",
)  # fmt: skip
#: numbers that ``find`` gives for every row
STATS = 6
_SUMS = {
    "scalable_softmax": (1, 3), "adaptive_temperature": (4, 4), "rsoftmax": (4, 4), "tsoftmax": (4, 4),
    "sparsemax": (2, 2), "entmax15": (2, 2), "entmax": (2, 9), "asentmax": (2, 11),
}  # fmt: skip


def count_sums(kind: str, options: bool) -> int:
    """How many sums of a row the backward pass takes; ``options``: whether the options' gradients are wanted."""
    return _SUMS.get(kind, (1, 1))[options]


def exponent_of(kind: str, alpha: float | None) -> int:
    """``1 / (alpha - 1)`` for a constant alpha where that is whole and at most 8, else 0: powers that are products."""
    if kind not in ("entmax", "asentmax") or alpha is None:
        return 0
    return next((k for k in range(1, 9) if (alpha - 1) * k == 1), 0)


class Rows(NamedTuple):
    """Rows of scores, the function of them, and its options.

    Attributes:
        x: the first score; the others follow at ``row * s_row + column``.
        mask: bytes, 0 where an entry is masked, or None; ``s_mask`` are its strides by the three numbers of a row, of
            which ``mask_sizes`` holds the sizes of the last two, and by column.
        value, beta, gamma: float32 of every row, or None: ``a`` and 0 then.
        ranges, ts, affine_scale, affine_shift: MultiMax's by head, ``s_head`` from one head to the next; ``heads``
            follow each other after ``head_rows`` rows.
        n_rows, n: how many rows and columns there are.
        a, b: the function's options that are numbers.
    """

    x: Any
    mask: Any
    value: Any
    beta: Any
    gamma: Any
    ranges: Any
    ts: Any
    affine_scale: Any
    affine_shift: Any
    s_row: Any
    s_mask: Any
    mask_sizes: Any
    s_head: Any
    heads: Any
    head_rows: Any
    n_rows: Any
    n: Any
    a: Any
    b: Any
    KIND: Any
    SUMS: Any
    OPTIONS: Any
    EXPONENT: Any
    ORDER: Any
    NEAR: Any
    HELD: Any
