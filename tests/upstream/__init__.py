"""Other people's tests, fetched from their source distributions when they are run, on patched models."""
