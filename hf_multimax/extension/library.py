"""The compiled extension of this process: found among the kept ones, or compiled at first use."""

import ctypes
import logging
import os
import platform
import struct
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

from hf_multimax.extension.build import (
    MOST_SECONDS,
    BuildError,
    build_key,
    compile_library,
    compilers,
    compilers_key,
    openmp_runtime,
)
from hf_multimax.extension.store import Store

__all__ = ["load", "open_library"]

logger = logging.getLogger(__name__)

_loaded: tuple[ctypes.CDLL | None, str] | None = None
_lock = threading.Lock()


def load() -> tuple[ctypes.CDLL | None, str]:
    """The loaded extension and an empty text, or None and the reason; the first call in a process may compile.

    What keeps it from compiling or from being kept is logged, once in a process.
    """
    global _loaded
    if _loaded is None:
        with _lock:
            if _loaded is None:
                _loaded = _load()
    return _loaded


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()  # a thread that held it is not in this process


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def _load() -> tuple[ctypes.CDLL | None, str]:
    try:
        if platform.system() != "Linux" or struct.calcsize("P") != 8:
            raise BuildError(f"it is built on 64-bit Linux only, this is {platform.system()} {platform.machine()}")
        store, runtime = Store(), openmp_runtime()
        library = _find_or_build(store, build_key(runtime), runtime)
    except (BuildError, OSError) as error:
        text = str(error).strip() or type(error).__name__
        logger.warning("native CPU attention is not available, slower kernels are used: %s", text)
        return None, text
    if store.warning:
        logger.warning("%s", store.warning)
    return library, ""


def _find_or_build(store: Store, key: str, runtime: Path) -> ctypes.CDLL:
    library = _find(store, key)
    if library is not None:
        return library
    commands = compilers()
    attempt = compilers_key(commands)
    with store.one_at_a_time(most_seconds=2 * MOST_SECONDS):
        library = _find(store, key)  # another process may have been faster
        if library is not None:
            return library
        if failure := store.failure(key, attempt):
            raise BuildError(failure)
        try:
            return _build(store, key, runtime, commands)
        except BuildError as error:
            store.remember_failure(key, attempt, str(error))
            raise


def _find(store: Store, key: str) -> ctypes.CDLL | None:
    for path in store.libraries(key):
        try:
            return open_library(path)
        except (BuildError, OSError) as error:  # compiled elsewhere, with a newer C library
            logger.debug("%s is not loaded: %s", path, error)
    return None


def _build(store: Store, key: str, runtime: Path, commands: Sequence[Sequence[str]]) -> ctypes.CDLL:
    """The library by the first compiler that makes one.

    Raises:
        BuildError: if none does. OSError: if none could be asked.
    """
    problems: dict[str, BuildError | OSError] = {}
    for command in commands:
        name = " ".join(command)
        logger.info("compiling native CPU attention with %s", name)
        try:
            return _keep_and_open(store, key, compile_library(command, runtime))
        except (BuildError, OSError) as error:
            problems[name] = error
    text = "; ".join(f"{name}: {error}" for name, error in problems.items())
    raise (BuildError if any(isinstance(x, BuildError) for x in problems.values()) else OSError)(text)


def _keep_and_open(store: Store, key: str, content: bytes) -> ctypes.CDLL:
    for folder in store.folders:
        try:
            path = store.keep(folder, key, content)
        except OSError as error:  # read-only, or full
            logger.debug("nothing is kept in %s: %s", folder, error)
            continue
        try:
            return open_library(path)
        except OSError as error:  # as on file systems from which nothing may run
            logger.debug("%s is not loaded: %s", path, error)
            path.unlink(missing_ok=True)
        except BuildError:
            path.unlink(missing_ok=True)
            raise
    with tempfile.TemporaryDirectory(prefix="hf_multimax_") as own:  # for this process alone
        path = Path(own) / "native.so"
        path.write_bytes(content)
        try:
            return open_library(path)
        except OSError as error:
            raise BuildError(f"what it made cannot be loaded: {error}") from error


def open_library(path: Path) -> ctypes.CDLL:
    """Load a library and declare its functions.

    Raises:
        OSError: if it cannot be loaded. BuildError: if it is another one.
    """
    library = ctypes.CDLL(str(path))
    try:
        kinds = ("", "rows_", "row_attention_")
        names = [f"{kind}{name}" for kind in kinds for name in ("forward", "backward")]
        for function in (getattr(library, f"multimax_{name}") for name in names):
            function.argtypes, function.restype = [ctypes.c_char_p], None
    except AttributeError as error:
        raise BuildError(f"the library lacks a function: {error}") from error
    return library
