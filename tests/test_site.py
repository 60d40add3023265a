"""`make docs`: the site builds, holds all that it shows, and does not build with a broken link."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HERE = all(importlib.util.find_spec(name) for name in ("mkdocs", "mkdocstrings", "material", "latex2mathml"))
pytestmark = pytest.mark.skipif(not HERE, reason="needs pip install 'hf-multimax[docs]'")


@pytest.fixture
def clone(tmp_path):
    """A copy of what the site is made from."""
    for name in ("docs", "hf_multimax", "model_cards"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), ROOT / "mkdocs.yml"]:
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(path, target)
    return tmp_path


def build(folder):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)


def test_the_site_holds_every_page_and_what_it_shows(clone):
    done = build(clone)
    assert done.returncode == 0, done.stderr
    pages = {path.name: path.read_text() for path in (clone / "site").rglob("*.html")}
    assert {"index.html", "quickstart.html", "api.html", "CONTRIBUTING.html", "SUPPORTED_MODELS.html"} <= pages.keys()
    for path in (clone / "site").rglob("*.html"):
        for source in re.findall(r'<(?:img|script|link)\b[^>]*?\b(?:src|href)="([^"#?]+)"', path.read_text()):
            # the page of errors is served at any address: its links are absolute
            assert path.name == "404.html" or (path.parent / source).exists(), (path.name, source)
    assert "<math" in (clone / "site" / "index.html").read_text()
    api = pages["api.html"]
    assert "hf_multimax.patch_model" in api and "two more scalars per modulator" in api
    assert not re.search(r":(?:class|func):", api)


@pytest.mark.parametrize(
    ("page", "text", "message"),
    [
        ("README.md", "[no page](docs/no-such-page.md)", "no-such-page"),
        ("docs/training.md", "[no heading](quickstart.md#no-such-heading)", "no-such-heading"),
        ("docs/api.md", "::: hf_multimax.no_such_name", "no_such_name"),
        ("docs/limitations.md", '<script src="https://example.org/x.js"></script>', "fetches"),
    ],
)
def test_a_mistake_stops_the_build(page, text, message, clone):
    with (clone / page).open("a") as file:
        file.write(f"\n{text}\n")
    done = build(clone)
    assert done.returncode != 0 and message in done.stderr
