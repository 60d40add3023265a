"""Keeps compiled libraries, and failures to compile, between processes, in folders that nobody else can write to.

A library's name holds its key and the digest of its content, so that a file that was cut short or changed is not taken
for the one that was kept, and libraries of the same key from different systems lie side by side.
"""

import contextlib
import hashlib
import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from hf_multimax.cache import cache_folder

__all__ = ["Store"]

#: A failure is believed for a day: what a compiler needs may have been installed since.
FAILURE_SECONDS = 86400.0


class Store:
    """The folder ``native`` of the cache, and one among the temporary files for where that cannot be used.

    Attributes:
        folders: those that can be trusted; they need not exist yet.
        warning: why the cache cannot, empty if it can.
    """

    def __init__(self) -> None:
        self.folders: list[Path] = []
        self.warning = ""
        try:
            cache = cache_folder() / "native"
            self.warning = _distrust(cache)
            if not self.warning:
                self.folders.append(cache)
        except OSError as error:
            self.warning = f"compiled code is not kept: {error}"
        with contextlib.suppress(OSError):
            temporary = Path(tempfile.gettempdir()) / f"hf_multimax-{os.geteuid()}"
            if not _distrust(temporary):
                self.folders.append(temporary)

    def libraries(self, key: str) -> Iterator[Path]:
        """What was kept under ``key`` and is as it was."""
        for folder in self.folders:
            with contextlib.suppress(OSError):
                for path in sorted(folder.glob(f"{key}-*.so")):
                    if not _distrust(path) and path.name == _name(key, path.read_bytes()):
                        yield path

    def keep(self, folder: Path, key: str, library: bytes) -> Path:
        """Write a library, whole or not at all.

        Raises:
            OSError: if it cannot be written.
        """
        path = folder / _name(key, library)
        _write(path, library)
        return path

    def failure(self, key: str, compilers: str) -> str:
        """How an attempt failed that would fail again; empty if none is known."""
        for folder in self.folders:
            path = folder / f"{key}-{compilers}.failed"
            with contextlib.suppress(OSError):
                age = time.time() - path.stat().st_mtime
                if not _distrust(path) and abs(age) < FAILURE_SECONDS:
                    text = path.read_text(encoding="utf-8", errors="replace")
                    return f"{text} (found {age / 3600:.1f} h ago; tried again after a day, or once {path} is deleted)"
        return ""

    def remember_failure(self, key: str, compilers: str, text: str) -> None:
        """Have :meth:`failure` return ``text``, where that can be written."""
        for folder in self.folders:
            with contextlib.suppress(OSError):
                _write(folder / f"{key}-{compilers}.failed", text.encode(errors="replace"))
                return

    @contextlib.contextmanager
    def one_at_a_time(self, most_seconds: float) -> Iterator[None]:
        """Wait for other processes that are in such a block, but not for ever, and not where files cannot be locked."""
        import fcntl  # only where there is something to compile, which is Linux

        descriptor, end = self._lock_file(), time.monotonic() + most_seconds
        try:
            while descriptor is not None and time.monotonic() < end:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.05)
                except OSError:  # a file system without locks
                    break
            yield
        finally:
            if descriptor is not None:
                with contextlib.suppress(OSError):
                    fcntl.flock(descriptor, fcntl.LOCK_UN)  # a process forked meanwhile has the descriptor, too
                os.close(descriptor)

    def _lock_file(self) -> int | None:
        for folder in self.folders:
            with contextlib.suppress(OSError):
                _make(folder)
                return os.open(folder / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
        return None


def _name(key: str, library: bytes) -> str:
    return f"{key}-{hashlib.sha256(library).hexdigest()}.so"


def _make(folder: Path) -> None:
    """Make a folder that others may read.

    Raises:
        OSError: if it cannot be made, or somebody else was faster.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(exist_ok=True, mode=0o755)
    if problem := _distrust(folder):
        raise PermissionError(problem)


def _write(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    _make(path.parent)
    partial = path.with_name(f"{secrets.token_hex(8)}.part")
    try:
        with open(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _distrust(path: Path) -> str:
    """Why code at ``path`` must not be loaded; empty if it may, or if nothing is there.

    Raises:
        OSError: if that cannot be found out.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        return ""
    if status.st_uid not in (0, os.geteuid()):
        return f"compiled code in {path} is not loaded, as it belongs to another user: set HF_MULTIMAX_CACHE"
    if status.st_mode & 0o022:
        return f"compiled code in {path} is not loaded, as others can write to it: chmod go-w it"
    return ""
