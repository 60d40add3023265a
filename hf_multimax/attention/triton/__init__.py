"""Attention on GPUs in Triton: flash attention with sigma between the scores and the softmax.

``backend.py`` is the backend, ``launch.py`` picks tiles and launches, the kernels are in ``forward.py``,
``backward.py`` and ``bias.py``. They share ``arguments.py`` (what they take), ``bounds.py`` (which tiles they visit),
``memory.py`` (loading and storing), ``modulator.py`` (sigma, its slope and sums) and ``scores.py`` (from products to
probabilities and gradients). They run in Triton's interpreter, too.

What a call becomes, for B = 2, H = 8, Hkv = 2, Nq = Nk = 1000, D = Dv = 64 in bfloat16, order 2, causal::

    forward_kernel   8 * 2 * 8 programs   each 128 queries of one head, over tiles of 128 keys
    dq_kernel        8 * 2 * 8 programs   each 128 queries of one head, over tiles of 64 keys: dq and delta
    dkdv_kernel      8 * 2 * 2 programs   each 128 keys of one key head, over its 4 query heads: dk, dv, scalars
    bias_kernel      only for a bias that needs a gradient

A call with at most 16 queries per head (decoding) runs ``decode_kernel`` instead, 2 * 2 key heads times as many shares
of the keys as fill the processors, then ``combine_kernel``, one program per query.

The kernels' arguments: those of ``Inputs``, which all take as ``call``, of ``Rows``, which all but ``decode_kernel``
take as ``by_row`` (o, residual, do, peaks, totals, delta, sinks), and each one's own. Pointers are None where the call
does not have them, which compiles their code away; tensors are read through their strides.

=====================  ===============================  ================================================================
q, k, v                [B, H, Nq, D], [B, Hkv, Nk, D],  inputs, in the type of storage
                       [B, Hkv, Nk, Dv]
o, residual            [B, H, Nq, Dv]                   the output, and what rounding cut off it (half precision)
do, dq, dk, dv         like o, q, k, v                  gradients
peaks, totals          [B, H, Nq] float32               what a row was divided by, see ``load_norm``; peaks in float32
                                                        calls only
delta                  [B, H, Nq]                       rowsum(o * do), corrected by ``dq_kernel``
partial                [B, H, blocks, 4N (+ 2)]         each program's share of the scalars' gradients (dkdv);
                       [B, H, Nq, splits, Dv]           unnormalised outputs (decode)
split_peaks, _totals   [B, H, Nq, splits] float32       running maxima and sums of ``decode_kernel``
ranges, ts             [2N] or [H, 2N]                  the modulator, contiguous
affine_scale, _shift   [] or [H]                        the affine variant
sinks                  [H]                              logits that join the denominator only
mask, bias             [B, H, Nq, Nk]                   expanded, mostly by strides of 0; a boolean mask as bytes
seed                   [1] int64                        of dropout
s_q, s_k, ...          4 each (s_row: 3)                strides of the tensor of that name; s_head: from head to head of
                                                        (ranges and ts, affine scale, affine shift), 0 where shared
heads, group           H, H / Hkv
n_rows, n_cols         Nq, Nk
blocks, splits         tiles of a head; shares of the keys
threshold              dropout keeps where 32 random bits are not below it
keep_scale             1 / (1 - dropout_p)
scale, softcap         of the scores; softcap None without
window                 None without; see :func:`hf_multimax.attention.call.make_call`
ORDER                  N
EXACT                  whether rows have two norms: float32
NEAR                   whether a row's constant may be lost: half precision, no sinks
MASK_MIN               None for a boolean mask, else the value at or below which an entry masks
MASK_BY_ROW, BIAS_..   whether they differ from query to query
D, DV, BLOCK_D, ...    widths, and these padded to a power of two of at least 16
BLOCK_M, BLOCK_N       queries and keys of a tile
UPCAST                 the interpreter's products of bfloat16
=====================  ===============================  ================================================================
"""
