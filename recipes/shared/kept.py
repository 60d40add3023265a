"""What is fetched once and kept in the package's cache folder."""

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

from hf_multimax.cache import cache_folder
from recipes.shared.checks import DataError

__all__ = ["kept_folder"]

logger = logging.getLogger(__name__)


def kept_folder(kind: str, name: str, make: Callable[[Path], Path]) -> Path:
    """The folder ``<cache>/<kind>/<name>``, made at the first call; it appears whole or not at all.

    Args:
        make: writes into the empty folder that it is given, and returns what is to be kept: that folder or one in it.

    Raises:
        DataError: if the cache cannot be written; and whatever ``make`` raises.
    """
    try:
        folder = cache_folder() / kind / name
    except OSError as error:
        raise DataError(str(error)) from error
    if folder.is_dir():
        return folder
    logger.info(f"fetching {name} into {folder}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as partial:
            made = Path(partial) / "made"
            made.mkdir()
            make(made).replace(folder)
    except OSError as error:
        if not folder.is_dir():  # else another process was faster
            raise DataError(f"the cache {folder.parent} cannot be written ({error}): set HF_MULTIMAX_CACHE") from error
    return folder
