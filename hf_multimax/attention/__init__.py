"""Attention with the SoftMax replaced: one function of all patched models, and the backends that compute it.

``interface.py`` is what models and users call, ``choose.py`` picks one of ``eager.py``, ``tiled/``, ``native/`` and
``triton/`` for each call, and ``arguments.py`` is what a call consists of.
"""
