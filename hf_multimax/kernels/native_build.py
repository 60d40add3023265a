"""Compiles ``native.cpp`` at first use and keeps the result per source, flags, compiler, processor and PyTorch."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

__all__ = ["load"]

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("native.cpp")
COMPILE_FLAGS = (
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
)


class BuildError(RuntimeError):
    """The extension cannot be built or loaded here."""


@functools.lru_cache(maxsize=1)
def load() -> tuple[ctypes.CDLL | None, str]:
    """The loaded extension and an empty text, or None and the reason; logs the reason once."""
    try:
        return _build_and_open(), ""
    except (BuildError, OSError) as error:
        text = str(error).strip() or type(error).__name__
        logger.warning("native CPU attention is not available, slower kernels are used: %s", text)
        return None, text


def _build_and_open() -> ctypes.CDLL:
    if platform.system() != "Linux":
        raise BuildError(f"it is built on Linux only, this is {platform.system()}")
    compiler = _compiler()
    runtime = _openmp_runtime()
    flags = (*COMPILE_FLAGS, "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native")
    library = _cache_directory() / f"native-{_fingerprint(compiler, flags, runtime)}.so"
    if not library.exists():
        _compile(compiler, flags, runtime, library)
    try:
        return _open(library)
    except OSError:
        # a file that another system or a full disk left behind
        _compile(compiler, flags, runtime, library)
        return _open(library)


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "c++"):
        if name and (found := shutil.which(name)):
            return found
    raise BuildError("no C++ compiler was found; install g++ or set CXX")


def _openmp_runtime() -> Path:
    """PyTorch's own OpenMP library: a second one in the process would bring a second pool of threads."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    loaded = {Path(line.split(maxsplit=5)[5]) for line in maps if line.count("/")}
    found = sorted(path for path in loaded if path.name.startswith(("libgomp", "libiomp5")))
    if not found:
        raise BuildError("PyTorch was built without a GNU or Intel OpenMP runtime")
    own = Path(torch.__file__).resolve().parent.parent
    return next((path for path in found if own in path.parents), found[0])


def _cache_directory() -> Path:
    """HF_MULTIMAX_CACHE, else hf_multimax below the user's cache folder; a temporary folder where it is read-only."""
    base = os.environ.get("HF_MULTIMAX_CACHE")
    try:
        if base:
            directory = Path(base)
        else:
            directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_multimax"
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(directory, os.W_OK):
            return directory
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home folder
        logger.debug("no cache folder can be used: %s", error)
    return Path(tempfile.mkdtemp(prefix="hf_multimax_"))


def _fingerprint(compiler: str, flags: Sequence[str], runtime: Path) -> str:
    """A name for everything that the compiled file depends on."""
    version = _run([compiler, "--version"])
    parts = (SOURCE.read_text(), version, " ".join(flags), str(runtime), torch.__version__, _cpu_description())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _cpu_description() -> str:
    """The processor's model and instruction sets, without what changes from moment to moment."""
    wanted = ("model name", "flags", "CPU part", "Features")
    lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    return platform.machine() + "".join(line for line in lines if line.startswith(wanted))


def _compile(compiler: str, flags: Sequence[str], runtime: Path, library: Path) -> None:
    """Compile beside the cache's file and move it there in one step, as other processes may be doing the same."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        compiled, linked = Path(folder) / "native.o", Path(folder) / "native.so"
        _run([compiler, *flags, "-c", str(SOURCE), "-o", str(compiled)])
        # linked without -fopenmp, which would add the compiler's own OpenMP runtime
        _run([compiler, "-shared", str(compiled), str(runtime), "-o", str(linked)])
        os.replace(linked, library)


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    except subprocess.CalledProcessError as error:
        raise BuildError(f"{Path(command[0]).name} failed: {error.stderr.strip()[-500:]}") from error
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{Path(command[0]).name} took longer than {error.timeout:.0f} s") from error
    return done.stdout


def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for function in (library.multimax_forward, library.multimax_backward):
        function.argtypes, function.restype = [ctypes.c_char_p], None
    return library
