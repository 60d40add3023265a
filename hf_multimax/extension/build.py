"""Compiles ``native.cpp``: which compilers there are, what they are told, and whether what they wrote is a library."""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import signal
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

__all__ = ["BuildError", "build_key", "compile_library", "compilers", "compilers_key", "openmp_runtime"]

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
NATIVE_FLAG = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
#: The runtime is named instead of -fopenmp, which would add the compiler's own; compilers of C leave libstdc++ out.
LINK_FLAGS = ("-shared", "-lstdc++", "-lm")
#: Compiling takes 20 to 30 seconds of one core, of which a busy machine may give a fifth.
MOST_SECONDS = 300.0
#: Of a 64-bit ELF file: where its segments are listed, an entry's size, their number; an entry's type, place, length.
_HEADER, _SEGMENT, _LOADED = struct.Struct("=32xQ14xHH"), struct.Struct("=I4xQ16xQ16x"), 1


class BuildError(RuntimeError):
    """The extension cannot be built or loaded here."""


def compilers() -> list[tuple[str, ...]]:
    """The commands to try in turn: what CXX says (with its options, if any), ``g++``, ``c++``.

    Raises:
        BuildError: if there is none.
    """
    found: list[tuple[str, ...]] = []
    for text in (os.environ.get("CXX", ""), "g++", "c++"):
        try:
            name, *options = shlex.split(text)
        except ValueError:  # nothing, or a quote that is not closed
            continue
        command = (shutil.which(name) or "", *options)
        if command[0] and command not in found:
            found.append(command)
    if not found:
        raise BuildError("no C++ compiler was found; install g++ or set CXX")
    return found


def compilers_key(commands: Sequence[Sequence[str]]) -> str:
    """A name for these commands that changes with the files that they run."""
    parts = []
    for command in commands:
        status = os.stat(command[0])
        parts.append(f"{command} {os.path.realpath(command[0])} {status.st_size} {status.st_mtime_ns}")
    return _digest(parts)


def build_key(runtime: Path, flags: Sequence[str] = (*COMPILE_FLAGS, NATIVE_FLAG)) -> str:
    """A name for everything that decides whether a compiled library fits here.

    That is the sources, the flags, the OpenMP runtime's name and the processor, but no compiler: a library outlives it.
    """
    sources = (SOURCE, *sorted(SOURCE.parent.glob("*.h")))
    return _digest(
        (*(source.read_text(encoding="utf-8") for source in sources), *flags, *LINK_FLAGS, runtime.name, _processor())
    )


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _processor() -> str:
    """The processor's model and instruction sets, without what changes from moment to moment."""
    wanted = ("model name", "flags", "CPU implementer", "CPU part", "Features")
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
    return platform.machine() + "".join(line for line in lines if line.startswith(wanted))


class _SymbolInfo(ctypes.Structure):
    """``Dl_info`` of dlfcn.h."""

    _fields_ = [
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    ]


def openmp_runtime() -> Path:
    """PyTorch's own OpenMP library, whatever others the process has: a second one would bring a second pool of threads.

    Raises:
        BuildError: if there is none.
    """
    info = _SymbolInfo()
    try:
        function = ctypes.CDLL(torch._C.__file__).omp_get_max_threads  # looked up in what PyTorch is linked with
        found = ctypes.CDLL(None).dladdr(ctypes.cast(function, ctypes.c_void_p), ctypes.byref(info))
    except AttributeError:
        found = 0
    if not found or not info.file:
        raise BuildError("PyTorch was built without OpenMP")
    return Path(os.fsdecode(info.file))


def compile_library(
    command: Sequence[str], runtime: Path, flags: Sequence[str] = (*COMPILE_FLAGS, NATIVE_FLAG)
) -> bytes:
    """The content of the compiled and linked library.

    Raises:
        BuildError: if the compiler fails, takes too long, or writes something else. OSError: if it cannot be run, or
            the folder for temporary files cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="hf_multimax_") as folder:
        compiled, linked = Path(folder) / "native.o", Path(folder) / "native.so"
        _run([*command, *flags, "-c", str(SOURCE), "-o", str(compiled)])
        _run([*command, str(compiled), str(runtime), *LINK_FLAGS, "-o", str(linked)])
        try:
            library = linked.read_bytes()
        except FileNotFoundError as error:
            raise BuildError("it wrote no library") from error
    if not _is_whole(library):
        raise BuildError("what it wrote is no 64-bit library, or only a part of one")
    return library


def _run(command: Sequence[str]) -> None:
    with tempfile.TemporaryFile() as output:
        # a session of its own, as what hangs may be a child of the compiler, whose end a pipe would wait for
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(MOST_SECONDS)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise BuildError(f"it took longer than {MOST_SECONDS:g} s") from error
            raise
        if code:
            output.seek(0)
            text = output.read().decode(errors="replace").strip()
            raise BuildError(text[-500:] or f"it ended with {code} and said nothing")


def _is_whole(library: bytes) -> bool:
    """Whether the segments of an ELF file lie within it: the loader would read beyond the end and kill the process."""
    if len(library) < _HEADER.size or not library.startswith(b"\x7fELF\x02"):
        return False
    table, size, count = _HEADER.unpack_from(library)
    segments = library[table : table + size * count]
    if size != _SEGMENT.size or not count or len(segments) < size * count:
        return False
    ends = (offset + length for kind, offset, length in _SEGMENT.iter_unpack(segments) if kind == _LOADED)
    return all(end <= len(library) for end in ends)
