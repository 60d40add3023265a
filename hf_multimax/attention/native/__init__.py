"""Attention on CPUs in C++, compiled at first use and kept in the user's cache."""
