"""Attention in tiles of scores, in plain PyTorch: on any device, for any row-wise function, in linear memory."""
