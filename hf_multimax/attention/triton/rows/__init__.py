"""Attention on GPUs through any function of rows, in Triton: not only weights that an exponential makes.

``backend.py`` says what is supported and is what autograd sees, ``launch.py`` picks tiles and launches, the kernels are
in ``forward.py``, ``backward.py`` and ``bias.py``, and ``tiles.py`` is what these share. The functions are those of
:mod:`hf_multimax.rows.triton`; of attention they take what the kernels of MultiMax take.

A function of rows has to see a whole row before it gives a weight. So a program computes the scores of a block of
queries into a scratch of its own, which stays in the L2 cache, walks over them until it has the few numbers that the
weights depend on (a threshold, a sum), and weighs them tile by tile. Tiles of keys to which no query of the block gives
weight cost nothing more: their values are neither read nor multiplied. Programs are as many as keep the processors busy
and take one block after the other, which bounds the scratch.

The numbers of every row are kept, so that the backward pass weighs recomputed tiles without walking::

    rows_forward_kernel  some programs        each a block of queries after the other: o, and the rows' numbers
    rows_dq_kernel       B * H * blocks       each a block of queries: their sums, dq, the options' gradients
    rows_dkdv_kernel     B * Hkv * blocks     each a block of keys, over the queries of its heads: dk, dv
    rows_bias_kernel     only for a bias that needs a gradient

The kernels' arguments: ``call`` is an :class:`~hf_multimax.attention.triton.arguments.Inputs` without a modulator,
``function`` a :class:`~hf_multimax.rows.triton.arguments.Rows`, which is the function, its options by head, and where
the scratch is.

=====================  ===========================  ====================================================================
o, do, dq, dk, dv      as in the package above      the output and gradients
stats                  [STATS, B, H, Nq] float32    what the function has to know of a row
sums                   [SUMS, B, H, Nq] float32     the rows' sums of the backward pass
d_options              three of [B, H, Nq] float32  the options' gradients, row by row; None where not wanted
plane                  B * H * Nq
blocks, items          blocks of a head's queries or keys; of all heads
CHUNK                  scores of a row that one step of a walk reads
FROM_ZERO              whether a row's columns are counted from the first key, not from the first that it may see
SPARSE                 whether the function gives weights of zero
=====================  ===========================  ====================================================================
"""
