"""Tests of other packages, from the source distribution of the version that is installed."""

import subprocess
import sys
import tarfile
import tempfile
from importlib import metadata
from pathlib import Path

import pytest
from hf_multimax.cache import cache_folder

__all__ = ["source_distribution"]


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
