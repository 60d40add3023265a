"""The folder for what can be made again: compiled code, fetched data."""

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder() -> Path:
    """The absolute path of the cache, which need not be there yet.

    ``$HF_MULTIMAX_CACHE`` (a leading ``~`` is the home folder, a relative path starts from the current folder), else
    ``hf_multimax`` in ``$XDG_CACHE_HOME`` or ``~/.cache``. A variable that is empty counts as not set, as does a
    relative ``$XDG_CACHE_HOME``.

    Raises:
        OSError: if it is below a home folder that is not known.
    """
    try:
        if chosen := os.environ.get("HF_MULTIMAX_CACHE"):
            return Path(chosen).expanduser().absolute()
        base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        return (base if base.is_absolute() else Path.home() / ".cache") / "hf_multimax"
    except RuntimeError as error:  # a user without a home folder, or none of that name
        raise OSError(f"{error} Set HF_MULTIMAX_CACHE to the absolute path of a folder") from error
