"""Attention on GPUs in Triton; the kernels themselves run in Triton's interpreter, too."""
