"""How the compiled library of a process comes about: compilers of every kind, damaged and untrusted caches, races.

Every load happens in a forked process, which may die of it. Compilers are shell scripts that copy a library.
"""

import ctypes
import errno
import logging
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch

from hf_multimax.attention.native import backend as native
from hf_multimax.extension import build as native_build
from hf_multimax.extension import library as native_library
from hf_multimax.extension import store as native_store
from tests.attention_cases import through

pytestmark = [
    pytest.mark.skipif(not native.available(), reason=f"no native backend here: {native.reason()}"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]

OTHERS = pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can give files away")


def in_child(function):
    """What ``function`` returns in a forked process; fails if that process dies."""
    source, sink = os.pipe()
    process = os.fork()
    if not process:
        code = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(60)
            with open(sink, "wb") as file:
                pickle.dump(function(), file)
            code = 0
        finally:
            if code:
                sys.excepthook(*sys.exc_info())
            os._exit(code)
    os.close(sink)
    with open(source, "rb") as file:
        found = file.read()
    assert os.waitpid(process, 0)[1] == 0, "the process died"
    return pickle.loads(found)


class Logged(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


class Loaded:
    """The outcome of a first load in this process."""

    def __init__(self):
        native_library._loaded = None
        handler = Logged()
        native_library.logger.addHandler(handler)
        library, self.reason = native_library.load()
        native_library.load()
        native_library.logger.removeHandler(handler)
        self.available, self.warnings = library is not None, handler.texts
        self.file = Path(library._name) if library else None


class Machine:
    """A cache, a folder for temporary files and compilers, all of them apart from the real ones."""

    def __init__(self, path, monkeypatch):
        self.path, self.patch = path, monkeypatch
        self.cache, self.temporary, self.bin = path / "cache" / "native", path / "tmp", path / "bin"
        self.log, self.library = path / "calls", path / "library"
        shutil.copy(native_library.load()[0]._name, self.library)
        self.temporary.mkdir(), self.bin.mkdir()
        monkeypatch.setenv("HF_MULTIMAX_CACHE", str(path / "cache"))
        monkeypatch.setenv("PATH", str(self.bin))
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setattr(tempfile, "tempdir", str(self.temporary))

    def compiler(self, name="g++", write='/bin/cp "$LIBRARY" "$out"', library=None):
        """A script that notes its arguments and does ``write`` at every call."""
        text = (
            f'#!/bin/sh\nLIBRARY="{library or self.library}"\nall="$*"\necho "$all" >> "{self.log}"\n'
            f'while [ $# -gt 0 ]; do [ "$1" = -o ] && out=$2; shift; done\n{write}\n'
        )
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    @property
    def calls(self):
        return self.log.read_text().splitlines() if self.log.exists() else []

    def load(self):
        return in_child(Loaded)

    def kept(self):
        return sorted(self.cache.glob("*.so"))


@pytest.fixture
def machine(tmp_path, monkeypatch):
    return Machine(tmp_path, monkeypatch)


def test_a_library_is_compiled_once_and_serves_without_a_compiler(machine):
    machine.compiler()
    first = machine.load()
    assert first.available and not first.warnings and first.file.parent == machine.cache
    assert len(machine.calls) == 2  # compiled and linked
    assert machine.load().file == first.file
    (machine.bin / "g++").unlink()
    assert machine.load().file == first.file and len(machine.calls) == 2
    assert not list(machine.temporary.iterdir()) and {x.name for x in machine.cache.iterdir()} == {
        "lock",
        first.file.name,
    }


def test_what_decides_whether_a_library_fits(monkeypatch):
    runtime, key = Path("libgomp.so.1"), native_build.build_key(Path("libgomp.so.1"))
    assert native_build.build_key(Path("/elsewhere/libgomp.so.1")) == key
    others = [native_build.build_key(Path("libiomp5.so")), native_build.build_key(runtime, ("-O2",))]
    for name, value in (("_processor", lambda: "another"), ("LINK_FLAGS", ("-s",)), ("SOURCE", Path(__file__))):
        with monkeypatch.context() as changed:
            changed.setattr(native_build, name, value)
            others.append(native_build.build_key(runtime))
    assert len({key, *others}) == 6


def test_a_library_for_another_processor_is_not_loaded(machine, monkeypatch):
    machine.compiler()
    assert machine.load().available
    (machine.bin / "g++").unlink()
    monkeypatch.setattr(native_build, "_processor", lambda: "another")
    found = machine.load()
    assert not found.available and "no C++ compiler was found" in found.reason and len(found.warnings) == 1


def _flipped(content, seed):
    place = random.Random(seed).randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << seed % 8]) + content[place + 1 :]


DAMAGE = {
    "empty": lambda content: b"",
    "64 bytes": lambda content: content[:64],
    "half": lambda content: content[: len(content) // 2],
    "a byte less": lambda content: content[:-1],
    "a byte more": lambda content: content + b"\0",
    "text": lambda content: b"damaged",
    "zeros": lambda content: bytes(len(content)),
    **{f"bit {seed}": lambda content, seed=seed: _flipped(content, seed) for seed in range(5)},
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_library_is_not_loaded(machine, damage):
    machine.compiler()
    path = machine.load().file
    whole = path.read_bytes()
    path.write_bytes(DAMAGE[damage](whole))
    (machine.bin / "g++").rename(machine.path / "away")
    assert not machine.load().available
    (machine.path / "away").rename(machine.bin / "g++")
    found = machine.load()
    assert found.available and not found.warnings and found.file == path
    assert path.read_bytes() == whole and len(machine.calls) == 4


RUNTIME = native_build.openmp_runtime() if native.available() else Path()
#: What a compiler may do instead of writing a library, and what is said of it.
BROKEN = {
    "fails": ("echo no such header >&2; exit 1", "no such header"),
    "fails silently": ("exit 3", "it ended with 3 and said nothing"),
    "fails in no encoding": (r"printf 'caf\351 \377\376' >&2; exit 1", "caf\N{REPLACEMENT CHARACTER} "),
    "is killed": ("kill -9 $$", "it ended with -9"),
    "writes nothing": ("exit 0", "it wrote no library"),
    "writes an empty file": (': > "$out"', "no 64-bit library"),
    "writes text": ('echo text > "$out"', "no 64-bit library"),
    "writes a header": ('/usr/bin/head -c 700 "$LIBRARY" > "$out"', "only a part of one"),
    "writes half": ('/usr/bin/head -c 260000 "$LIBRARY" > "$out"', "only a part of one"),
    "writes another library": (f'/bin/cp "{RUNTIME}" "$out"', "lacks a function: "),
    "hangs": ("/bin/sleep 1000", "it took longer than 0.5 s"),
    "hangs by a child": ("/bin/sleep 1000 & wait", "it took longer than 0.5 s"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_compiler_that_fails_is_asked_once(machine, monkeypatch, kind):
    body, phrase = BROKEN[kind]
    monkeypatch.setattr(native_build, "MOST_SECONDS", 0.5)
    machine.compiler(write=body)
    found = machine.load()
    assert not found.available and phrase in found.reason
    assert len(found.warnings) == 1 and found.reason in found.warnings[0]
    calls = len(machine.calls)
    again = machine.load()
    assert not again.available and phrase in again.reason and "tried again after a day" in again.reason
    assert len(again.warnings) == 1 and len(machine.calls) == calls
    assert not machine.kept() and not list(machine.temporary.iterdir())


@pytest.mark.parametrize("change", ["compiler", "options", "time", "clock", "file", "source"])
def test_what_has_a_failed_compiler_asked_again(machine, monkeypatch, change):
    machine.compiler(write="exit 1")
    assert not machine.load().available
    assert len(machine.calls) == 1
    (failure,) = machine.cache.glob("*.failed")
    if change == "compiler":
        machine.compiler(write="exit 2")
    elif change == "options":
        monkeypatch.setenv("CXX", "g++ -m64")
    elif change == "time":
        os.utime(failure, (0, time.time() - native_store.FAILURE_SECONDS - 1))
    elif change == "clock":
        os.utime(failure, (0, time.time() + 2 * native_store.FAILURE_SECONDS))
    elif change == "file":
        failure.unlink()
    else:
        source = machine.path / "other.cpp"
        source.write_text("// another one")
        monkeypatch.setattr(native_build, "SOURCE", source)
    assert not machine.load().available
    assert len(machine.calls) == (3 if change == "options" else 2)


def test_a_compiler_that_hangs_leaves_no_process(machine, monkeypatch):
    monkeypatch.setattr(native_build, "MOST_SECONDS", 0.5)
    machine.compiler(write=f"/bin/sleep 1000 & echo $! > {machine.path}/child; wait")
    assert not machine.load().available
    assert not _runs(int((machine.path / "child").read_text()))


def test_an_interrupt_ends_the_compiler_and_is_no_failure(machine):
    machine.compiler(write=f"/bin/sleep 1000 & echo $! > {machine.path}/child; wait")

    def interrupted():
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.4)
        native_library._loaded = None
        try:
            native_library.load()
        except KeyboardInterrupt:
            return True

    assert in_child(interrupted)
    assert not _runs(int((machine.path / "child").read_text()))
    machine.compiler()
    assert machine.load().available


def _runs(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("chosen", ["clang++", "{bin}/clang++", "clang++ -m64 '-D X'", "no-such-compiler", "'", " "])
def test_after_the_chosen_compiler_the_usual_ones_are_tried(machine, monkeypatch, chosen):
    machine.compiler("clang++", write="exit 1")
    machine.compiler("c++")
    monkeypatch.setenv("CXX", chosen.format(bin=machine.bin))
    found = machine.load()
    assert found.available and not found.warnings
    first = machine.calls[0]
    assert first.startswith("-m64 -D X -O3" if "-m64" in chosen else "-O3")
    assert len(machine.calls) == (3 if "clang++" in chosen else 2)


def test_a_compiler_that_speaks_in_no_encoding_may_succeed(machine):
    machine.compiler(write=r"""printf 'caf\351 \377\376' >&2; /bin/cp "$LIBRARY" "$out" """)
    assert machine.load().available


def test_what_cannot_be_run_at_all_is_no_failure_to_remember(machine):
    (machine.bin / "g++").write_bytes(b"\x7fELF of another machine")
    (machine.bin / "g++").chmod(0o755)
    found = machine.load()
    assert not found.available and "Exec format error" in found.reason
    assert not list(machine.cache.glob("*.failed"))


TINY = """
#include <vector>
#include <omp.h>
extern "C" int multimax_forward(const void*) {
  std::vector<int> seen(omp_get_max_threads());
#pragma omp parallel for
  for (int i = 0; i < int(seen.size()); ++i) seen[i] = 1;
  return int(seen.size());
}
extern "C" void multimax_backward(const void*) {}
extern "C" void multimax_rows_forward(const void*) {}
extern "C" void multimax_row_attention_forward(const void*) {}
extern "C" void multimax_rows_backward(const void*) {}
extern "C" void multimax_row_attention_backward(const void*) {}
"""


@pytest.mark.parametrize("chosen", ["gcc", "g++", "c++", "gcc -O1"])
def test_real_compilers_of_c_and_cpp(tmp_path, monkeypatch, chosen):
    if not shutil.which(chosen.split()[0]):
        pytest.skip(f"no {chosen} here")
    (tmp_path / "tiny.cpp").write_text(TINY)
    monkeypatch.setattr(native_build, "SOURCE", tmp_path / "tiny.cpp")
    monkeypatch.setenv("CXX", chosen)
    monkeypatch.setenv("HF_MULTIMAX_CACHE", str(tmp_path))

    def load():
        other = tmp_path / "libgomp-0.so.1"  # as other packages bring theirs
        shutil.copy(native_build.openmp_runtime(), other)
        ctypes.CDLL(str(other))
        runtime = native_build.openmp_runtime()
        library = native_build.compile_library(native_build.compilers()[0], runtime)
        (tmp_path / "tiny.so").write_bytes(library)
        opened = native_library.open_library(tmp_path / "tiny.so")
        information = native_build._SymbolInfo()
        function = ctypes.cast(opened.omp_get_max_threads, ctypes.c_void_p)
        ctypes.CDLL(None).dladdr(function, ctypes.byref(information))
        return runtime, Path(os.fsdecode(information.file))

    runtime, linked = in_child(load)
    assert runtime == linked and Path(torch.__file__).parent.parent in runtime.parents


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("everywhere", [False, True])
def test_where_nothing_can_be_written_a_library_serves_all_the_same(machine, monkeypatch, number, everywhere):
    """In the folder for temporary files, or this process alone; one that was kept before is found."""
    machine.compiler()
    sync = os.fsync

    def fail(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if everywhere or path.startswith(str(machine.cache)):
            raise OSError(number, os.strerror(number), path)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    for compiled in (1, 2):
        found = machine.load()
        assert found.available and not found.warnings and machine.cache not in found.file.parents
        assert len(machine.calls) == 2 * (compiled if everywhere else 1)
        assert not machine.kept() and not list(machine.path.rglob("*.part"))
    monkeypatch.setattr(os, "fsync", sync)
    shutil.rmtree(machine.temporary)
    machine.temporary.mkdir()
    assert machine.cache in machine.load().file.parents
    monkeypatch.setattr(os, "fsync", fail)
    (machine.bin / "g++").unlink()
    assert machine.cache in machine.load().file.parents


def test_a_file_system_that_runs_nothing(machine, monkeypatch):
    machine.compiler()
    load = ctypes.CDLL

    def refuse(path, *more):
        if str(path).startswith(str(machine.cache)):
            raise OSError(f"{path}: failed to map segment from shared object")
        return load(path, *more)

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    for _ in range(2):
        found = machine.load()
        assert found.available and machine.temporary in found.file.parents
        assert len(machine.calls) == 2


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757])
def test_a_folder_that_others_can_write_to_is_not_used(machine, mode):
    machine.compiler()
    machine.load()
    machine.cache.chmod(mode)
    found = machine.load()
    assert found.available and machine.cache not in found.file.parents and len(machine.calls) == 4
    assert len(found.warnings) == 1 and f"{machine.cache} is not loaded, as others can write" in found.warnings[0]
    machine.cache.chmod(0o755)
    assert machine.cache in machine.load().file.parents


@pytest.mark.parametrize("mode", [0o666, 0o664])
def test_a_file_that_others_can_write_to_is_not_loaded(machine, mode):
    machine.compiler()
    path = machine.load().file
    path.chmod(mode)
    (machine.bin / "g++").unlink()
    assert not machine.load().available
    path.chmod(0o644)
    assert machine.load().available


@OTHERS
@pytest.mark.parametrize("what", ["folder", "file", "temporary folder"])
def test_what_belongs_to_another_user_is_not_loaded(machine, monkeypatch, what):
    machine.compiler()
    path = machine.load().file
    if what == "temporary folder":
        monkeypatch.setenv("HF_MULTIMAX_CACHE", "/proc/nothing")
        path = machine.load().file
        assert path.parent == machine.temporary / f"hf_multimax-{os.geteuid()}"
    os.chown(path if what == "file" else path.parent, 12345, -1)
    calls = len(machine.calls)
    found = machine.load()
    assert found.available and len(machine.calls) == calls + 2
    if what != "file":
        assert found.file.parent != path.parent
    assert [text for text in found.warnings if "belongs to another user" in text] == found.warnings
    assert len(found.warnings) == (what == "folder")


def test_others_may_read_what_is_kept_but_not_write_it(machine):
    machine.compiler()

    def load():
        os.umask(0)
        return Loaded()

    path = in_child(load).file
    assert path.stat().st_mode & 0o777 == 0o644 and machine.cache.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("chosen", ["~nobody-of-this-name/x", "/proc/nothing"])
def test_a_cache_that_cannot_be_is_replaced(machine, monkeypatch, chosen):
    monkeypatch.setenv("HF_MULTIMAX_CACHE", chosen)
    machine.compiler()
    for _ in range(2):
        found = machine.load()
        assert found.available and machine.temporary in found.file.parents
        assert len(found.warnings) == chosen.startswith("~") and len(machine.calls) == 2


def test_libraries_of_several_systems_lie_side_by_side(machine):
    """As those of containers that share a home folder: one of them may need a newer C library than is here."""
    machine.compiler()
    path = machine.load().file
    content = b"\x7fELF of another system"
    key = path.name.partition("-")[0]
    other = machine.cache / native_store._name(key, content)
    other.write_bytes(content)
    for name in (other, path):
        assert name.exists()
    assert machine.load().file == path and len(machine.calls) == 2 and other.exists()


def test_processes_that_come_at_once_compile_once(machine):
    machine.compiler(write='/bin/sleep 0.2; /bin/cp "$LIBRARY" "$out"')
    threads, found = [], []
    for _ in range(4):
        threads.append(threading.Thread(target=lambda: found.append(machine.load().file)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(found)) == 1 and found[0].parent == machine.cache
    assert len(machine.calls) == 2


def test_processes_compile_each_where_files_cannot_be_locked(machine, monkeypatch):
    import fcntl

    def unlocked(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unlocked)
    machine.compiler()
    assert machine.load().available


def test_threads_that_come_at_once_compile_once(machine):
    machine.compiler(write='/bin/sleep 0.1; /bin/cp "$LIBRARY" "$out"')

    def load():
        native_library._loaded, found = None, []
        threads = [threading.Thread(target=lambda: found.append(native_library.load()[0])) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return len(set(map(id, found))), found[0] is not None

    assert in_child(load) == (1, True)
    assert len(machine.calls) == 2


def test_a_process_forked_while_another_thread_compiles(machine):
    machine.compiler(write='/bin/sleep 0.3; /bin/cp "$LIBRARY" "$out"')

    def load():
        native_library._loaded = None
        thread = threading.Thread(target=native_library.load)
        thread.start()
        time.sleep(0.1)
        available = in_child(lambda: native_library.load()[0] is not None)
        thread.join()
        return available, native_library.load()[0] is not None

    assert in_child(load) == (True, True)
    assert len(machine.calls) == 2


def test_a_forked_process_computes_with_the_library_of_its_parent():
    q, ranges, ts = torch.randn(1, 2, 40, 16), torch.randn(4), torch.randn(4)
    expected = through(native)(q, q, q, ranges, ts)
    assert in_child(lambda: torch.equal(through(native)(q, q, q, ranges, ts), expected))


def test_on_other_systems_one_sentence_says_so(machine, monkeypatch):
    monkeypatch.setattr(native_library.platform, "system", lambda: "Windows")
    found = machine.load()
    assert not found.available and "built on 64-bit Linux only, this is Windows" in found.reason
    assert len(found.warnings) == 1


@pytest.mark.slow
def test_a_process_of_its_own_compiles_and_a_second_one_finds_it(tmp_path):
    script = (
        "import torch\nfrom hf_multimax.attention.call import make_call\n"
        "from hf_multimax.attention.native import backend as native\nq = torch.ones(1, 1, 4, 8)\n"
        "print(native.attention(make_call(q, q, q, torch.zeros(4), torch.zeros(4))).sum().item())"
    )
    for path in (os.environ["PATH"], str(tmp_path)):
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "HF_MULTIMAX_CACHE": str(tmp_path), "PATH": path, "CXX": "gcc"},
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.stdout.split() == ["32.0"], done.stderr
    assert len(list(tmp_path.glob("native/*.so"))) == 1
