"""Recipes: scripts over the public API of hf_multimax, run as ``python -m recipes.<name>``."""
