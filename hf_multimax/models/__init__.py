"""Patching Transformers models: what is found in them, what is put in, and how it is saved and loaded."""
