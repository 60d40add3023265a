"""The C++ extension: compiled at first use by whatever compiler there is, kept in the user's cache, checked when loaded."""
