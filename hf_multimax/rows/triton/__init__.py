"""Functions of rows on GPUs, in Triton: how a kernel makes probabilities of rows of scores in memory, and gradients.

``softmaxes.py``, ``entmax.py`` and ``select.py`` hold the functions, ``functions.py`` picks among them, ``memory.py``
reads scores, ``kernels.py`` and ``launch.py`` are the functions of rows by themselves. A program has a block of
BLOCK_M rows and walks over their scores in chunks of BLOCK_N columns. A kernel with scores of its own, at ``rows.x``
with ``rows.s_row`` from row to row, does this::

    at = place(rows, row, n, BLOCK_N)                # row [BLOCK_M] int64; n: the columns that there are
    options = load_options(rows, row)                # (value, beta, gamma), each [BLOCK_M] float32; or its own
    stats = find(rows, at, options, BLOCK_N)         # STATS float32 vectors [BLOCK_M]
    for n0 in range(0, at[2], BLOCK_N):
        x = chunk(rows, at, n0, BLOCK_N)             # [BLOCK_M, BLOCK_N] float32, -inf: masked or outside
        p = weigh(rows, x, n0, stats, options)

and with the gradients g of the p to those of the scores, dx, and of the options::

    sums = zero_row_sums(row, rows.SUMS)
    for n0 in ...:
        sums = add_sums(sums, row_sums(rows, x, p, g, stats, options), rows.SUMS)  # attention/triton/modulator.py's
    for n0 in ...:
        dx = differentiate(rows, x, p, g, stats, options, sums)
    d_value, d_beta, d_gamma = option_gradients(rows, stats, options, sums)

``rows`` is a :class:`~hf_multimax.rows.triton.arguments.Rows`; its last fields are constants: KIND, and with it
``SUMS = arguments.count_sums(kind, options)``, OPTIONS (whether the options' gradients are wanted), EXPONENT (of a
constant alpha, see ``arguments.exponent_of``) and HELD (whether one chunk holds a row: it is then read once). All other
fields that a function does not use may be None. A row that keeps nothing is 0, one that keeps NaN or infinity is NaN;
g counts for nothing where p is 0, and the backward pass takes a p that is NaN as 0. Options are float32; an alpha is in
[1, 2].
"""
