"""Debian's data packages: downloaded and unpacked into the package's cache folder, not installed."""

import shutil
import subprocess
from pathlib import Path

from hf_multimax.cache import cache_folder
from recipes.shared.checks import DataError
from recipes.shared.kept import kept_folder


def debian_package(name: str) -> Path:
    """The folder that holds the files of a Debian package (``usr/...``), fetched at the first call.

    No root rights are needed and nothing is installed. The folder appears whole or not at all.

    Raises:
        DataError: if the package cannot be fetched, with the reason and the way out.
    """
    return kept_folder("debian", name, lambda folder: _download(name, folder))


def debian_folder(package: str, pattern: str) -> Path:
    """The first folder of a Debian package that matches ``pattern``."""
    content = debian_package(package)
    found = sorted(path for path in content.glob(pattern) if path.is_dir())
    if not found:
        raise DataError(f"the Debian package in {content} has no {pattern}: delete that folder to fetch it again")
    return found[0]


def _download(name: str, folder: Path) -> Path:
    """Download and unpack below ``folder``; returns the unpacked content."""
    _run("apt-get", "download", "-q", "-o", "Acquire::Retries=1", name, package=name, folder=folder)
    archives = sorted(folder.glob("*.deb"))
    if not archives:
        raise _unavailable(name, "apt-get wrote no archive")
    _run("dpkg-deb", "-x", str(archives[0]), "content", package=name, folder=folder)
    return folder / "content"


def _run(*command: str, package: str, folder: Path) -> None:
    if shutil.which(command[0]) is None:
        raise _unavailable(package, f"there is no {command[0]} here")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"{command[0]} ended with {done.returncode}"]
        errors = [line.removeprefix("E: ") for line in lines if line.startswith("E: ")]
        raise _unavailable(package, (errors or lines)[0])


def _unavailable(package: str, reason: str) -> DataError:
    return DataError(
        f"the Debian package {package} cannot be fetched ({reason}): on Debian or Ubuntu run `apt-get update` with a "
        f"network, elsewhere unpack the package into {cache_folder() / 'debian' / package}"
    )
