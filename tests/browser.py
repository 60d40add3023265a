"""A headless Chromium for tests: the machine's own, else Debian's, unpacked with the libraries that are not here."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from recipes.shared.checks import DataError
from recipes.shared.kept import kept_folder

_PACKAGE = "chromium-headless-shell"
#: What runs without a display, a sandbox or a graphics card, and calls nobody.
_ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """Playwright's browser; skips the test, with the reason, where none can be had."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright")
    path, environment = _program()
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=list(_ARGUMENTS), env=environment)
        try:
            yield browser
        finally:
            browser.close()


def _program() -> tuple[str, dict[str, str]]:
    """The program, and the environment that it runs in."""
    own = next(filter(None, map(shutil.which, ("chromium", "chromium-headless-shell", "google-chrome"))), None)
    if own is not None:
        return own, dict(os.environ)
    try:
        content = kept_folder("debian", _PACKAGE, fetch)
    except DataError as error:
        pytest.skip(str(error))
    return unpacked(content)


def unpacked(content: Path) -> tuple[str, dict[str, str]]:
    """The program in a folder that :func:`fetch` filled, and its environment."""
    found = next(content.glob("usr/lib/chromium/chromium-headless-shell"), None)
    if found is None:
        pytest.skip(f"the package {_PACKAGE} in {content} has no program: delete that folder to fetch it again")
    libraries = {str(path.parent) for path in content.rglob("lib*.so*") if "chromium" not in path.parts}
    search = os.pathsep.join([*sorted(libraries), os.environ.get("LD_LIBRARY_PATH", "")]).strip(os.pathsep)
    return str(found), {**os.environ, "LD_LIBRARY_PATH": search, "XDG_DATA_DIRS": f"{content}/usr/share:/usr/share"}


def fetch(folder: Path, *options: str) -> Path:
    """Download the package and those that it needs and the machine lacks, and unpack all; no root rights are needed."""
    plan = ("-s", "-o", "Debug::NoLocking=1", "--no-install-recommends", "install", _PACKAGE, "fonts-dejavu-core")
    lines = _run(folder, "apt-get", *options, *plan).splitlines()
    names = [line.split()[1] for line in lines if line.startswith("Inst ")]
    _run(folder, "apt-get", "download", "-q", "-o", "Acquire::Retries=1", *{*names, "chromium-common", _PACKAGE})
    for archive in folder.glob("*.deb"):
        _run(folder, "dpkg-deb", "-x", archive.name, "content")
    return folder / "content"


def _run(folder: Path, *command: str) -> str:
    if shutil.which(command[0]) is None:
        raise DataError(f"there is no Chromium here, and no {command[0]} to fetch it with: install one")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=_english())
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if line.startswith("E: ")), done.stderr.strip()[-200:])
        raise DataError(f"there is no Chromium here, and Debian's cannot be fetched ({reason}): install one")
    return done.stdout


def _english() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C"}
