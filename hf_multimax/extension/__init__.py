"""The C++ extension: compiled at first use by whatever compiler there is, kept in the cache, checked when loaded."""
