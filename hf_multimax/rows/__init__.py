"""Functions of rows in C++ on CPUs and in Triton on GPUs: ``choose.py`` says where they run, ``operators.py`` what
autograd and ``torch.compile`` see of them, ``function.py`` is one with its options, ``call.py`` packs a call for
``hf_multimax/extension/row_calls.h``, and ``triton/`` are the kernels.
"""
