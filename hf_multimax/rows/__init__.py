"""Functions of rows of scores on CPUs in C++: ``choose.py`` says where they run, ``operators.py`` what autograd and
``torch.compile`` see of them, ``function.py`` is one with its options, and ``call.py`` packs a call for
``hf_multimax/extension/row_calls.h``.
"""
