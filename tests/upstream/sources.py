"""Tests of other packages, from the source distribution of the version that is installed."""

import os
import re
import subprocess
import sys
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import pytest

from hf_multimax.cache import cache_folder

__all__ = ["copy_tests", "lost", "source_distribution"]

ROOT = Path(__file__).parents[2]


def source_distribution(name: str) -> Path:
    """The unpacked source distribution of an installed package, fetched once into the cache; skips if it cannot be."""
    version = metadata.version(name)
    folder = cache_folder() / "sources" / f"{name}-{version}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", name, "-d", temporary]
        done = subprocess.run([*command, f"{name}=={version}"], capture_output=True, text=True)
        archives = list(Path(temporary).glob("*.tar.gz"))
        if done.returncode or not archives:
            pytest.skip(f"the source distribution of {name} {version} cannot be fetched: {done.stderr[-300:]}")
        with tarfile.open(archives[0]) as archive:
            archive.extractall(temporary, filter="data")
        (Path(temporary) / f"{name}-{version}").rename(folder)
    return folder


def copy_tests(name: str, folder: Path) -> None:
    """The modules of a package's tests, as the package ``tests`` of ``folder``."""
    for path in (source_distribution(name) / "tests").glob("*.py"):
        (folder / "tests").mkdir(parents=True, exist_ok=True)
        (folder / "tests" / path.name).write_bytes(path.read_bytes())
    (folder / "tests" / "__init__.py").touch()


def outcomes(folder: Path, module: str, *arguments: str, **environment: str) -> dict[str, str]:
    """Every test's outcome, in a process of its own that starts in ``folder``."""
    command = [sys.executable, "-m", "pytest", module, "-rA", "-q", "--tb=no", "-p", "no:cacheprovider", "-W", "ignore"]
    variables = {
        **os.environ, "PYTHONPATH": os.pathsep.join((str(folder), str(ROOT))), "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1", **environment,
    }  # fmt: skip
    done = subprocess.run(
        [*command, *arguments], cwd=folder, env=variables, capture_output=True, text=True, timeout=3600
    )
    found = re.findall(rf"^(PASSED|FAILED|ERROR) {re.escape(module)}::(\S+)", done.stdout, flags=re.MULTILINE)
    assert found, done.stdout[-3000:] + done.stderr[-3000:]
    return {name: outcome for outcome, name in found}


def lost(stock: Path, patched: Path, module: str, *arguments: str, **environment: str) -> tuple[set[str], list[str]]:
    """What passes in the first folder, and what of that does not pass in the second with these variables."""
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(outcomes, stock, module, *arguments)
        second = pool.submit(outcomes, patched, module, *arguments, **environment)
        passed = {name for name, outcome in first.result().items() if outcome == "PASSED"}
        return passed, sorted(name for name in passed if second.result().get(name) != "PASSED")
