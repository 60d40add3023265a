"""Fused backends of MultiMax attention and of the output loss; they import nothing else of this package.

Every attention backend is one function with the arguments of ``tiled.attention``.
"""
