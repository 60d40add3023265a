"""What every Triton kernel of MultiMax attention takes; the package's docstring says what each entry is.

Both tuples end with a constant: within loops, Triton 3.6 forgets a tuple's constants, such as strides of 1, that are
deeper than all constants after them.
"""

from typing import Any, NamedTuple


class Inputs(NamedTuple):
    """The call."""

    q: Any
    k: Any
    v: Any
    ranges: Any
    ts: Any
    affine_scale: Any
    affine_shift: Any
    mask: Any
    bias: Any
    seed: Any
    s_q: Any
    s_k: Any
    s_v: Any
    s_mask: Any
    s_bias: Any
    s_head: Any
    heads: Any
    group: Any
    n_rows: Any
    n_cols: Any
    threshold: Any
    keep_scale: Any
    scale: Any
    softcap: Any
    window: Any
    ORDER: Any
    NEAR: Any
    MASK_MIN: Any
    MASK_BY_ROW: Any
    BIAS_BY_ROW: Any
    CAUSAL: Any
    D: Any
    DV: Any
    BLOCK_D: Any
    BLOCK_DV: Any
    UPCAST: Any


class Rows(NamedTuple):
    """What the query rows have beside q: results of the forward pass, and in the backward pass gradients."""

    o: Any
    residual: Any
    do: Any
    peaks: Any
    totals: Any
    delta: Any
    sinks: Any
    s_o: Any
    s_do: Any
    s_row: Any
    EXACT: Any
