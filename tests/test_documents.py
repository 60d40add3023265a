"""README, CONTRIBUTING and docs/: every Python block runs, word for word and in order, and what they name exists."""

import dataclasses
import doctest
import importlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hub_server import TOKEN, HubServer
from models import make

from hf_multimax import MultiMaxConfig
from hf_multimax.normalizers import registry
from hf_multimax.normalizers.registry import get_normalizer, registered_normalizers
from recipes.shared.tokens import train_tokenizer

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
#: Pages that the site shows as well.
LINKED = [
    *PAGES,
    ROOT / "CHANGELOG.md",
    ROOT / "SUPPORTED_MODELS.md",
    ROOT / "benchmarks" / "README.md",
    ROOT / "recipes" / "README.md",
]

#: Runs each page in a process of its own, forked from one that has imported what all of them import.
RUNNER = """
import os, sys
import torch, transformers, hf_multimax

failed = []
for page in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        os.chdir(page)
        name = os.path.join(page, "page.py")
        exec(compile(open(name).read(), name, "exec"), {"__name__": "__main__"})
        sys.stdout.flush()
        os._exit(0)
    failed += [page] * (os.waitpid(child, 0)[1] != 0)
sys.exit(f"these pages do not run: {failed}" if failed else 0)
"""


def python_of(page: Path) -> str:
    """The Python blocks of a page, each on the lines that it has there; not those whose package is not installed."""
    lines = [""] * len(page.read_text().splitlines())
    for block in re.finditer(r"(?:<!-- needs: (\w+) -->\n)?```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        if block[1] is None or importlib.util.find_spec(block[1]):
            first = page.read_text()[: block.start(2)].count("\n")
            body = block[2].splitlines()
            lines[first : first + len(body)] = body
    return "\n".join(lines)


def test_every_python_block_runs(tmp_path):
    """In a folder where "gpt2" is a tiny model, in a process for each page, and with a Hub of its own."""
    model = make("GPT2LMHeadModel", n_layer=6, vocab_size=300)
    tokenizer = train_tokenizer("MultiMax is a SoftMax that can keep several peaks.\n", 300, 64)
    folders = {page.name: tmp_path / page.stem for page in PAGES if python_of(page).strip()}
    assert {"README.md", "CONTRIBUTING.md", "quickstart.md", "training.md", "publishing.md"} <= folders.keys()
    for page in PAGES:
        if page.name in folders:
            model.save_pretrained(folders[page.name] / "gpt2")
            tokenizer.save_pretrained(folders[page.name] / "gpt2")
            (folders[page.name] / "page.py").write_text(python_of(page))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with HubServer() as hub:
        hub.users[TOKEN] = "your-name"
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(RUNNER), *map(str, folders.values())],
            cwd=tmp_path,
            env=environment | hub.environment(tmp_path / "hf"),
            capture_output=True,
            text=True,
            timeout=500,
            stdin=subprocess.DEVNULL,
        )
    assert done.returncode == 0, done.stderr
    assert "transformer.h.0.attn.multimax.ranges" in done.stdout
    assert "multimax params: " in done.stdout
    assert (tmp_path / "README" / "gpt2-multimax" / "model.safetensors").exists()


#: Public names whose use is on the pages: it needs a Hub, several processes, a Trainer, or a folder of results.
NO_EXAMPLE = {"Option", "Learned", "Normalizer", "NormalizerAnnealing", "SparsityAnnealing", "push", "shard_modulators"}


def public_objects() -> dict[str, object]:
    names = re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(), flags=re.MULTILINE)
    found = {}
    for name in names:
        module, _, attribute = name.rpartition(".")
        found[name] = getattr(importlib.import_module(module), attribute) if attribute[0] != "_" else None
    return found


def test_examples_of_docstrings_run(tmp_path, monkeypatch):
    """In a folder where "gpt2" is a tiny model."""
    make("GPT2LMHeadModel", n_layer=6, vocab_size=300).save_pretrained(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    finder, without = doctest.DocTestFinder(recurse=False), set()
    for name, value in public_objects().items():
        if not (inspect.isfunction(value) or inspect.isclass(value)):
            continue
        tests = [test for test in finder.find(value, name, globs={}) if test.examples]
        if not tests and not any(part in name for part in ("training.", "diagnostics.", "plots.")):
            without.add(name.rpartition(".")[2])
        for test in tests:
            failed, _ = doctest.DocTestRunner(verbose=False).run(test)
            assert not failed, name
    assert without <= NO_EXAMPLE, without


def test_the_config_table_is_the_config():
    text = (DOCS / "quickstart.md").read_text()
    for field in dataclasses.fields(MultiMaxConfig):
        row = next(line for line in text.splitlines() if line.startswith(f"| `{field.name}` |"))
        assert field.metadata["help"].replace("'", '"') in row.replace("'", '"')
        assert repr(getattr(MultiMaxConfig(), field.name)).replace("'", '"') in row.replace("'", '"')


def test_every_normalizer_has_a_row():
    text = (DOCS / "normalizers.md").read_text()
    # other tests register some of their own, without a citation
    built_in = [name for name in registered_normalizers() if get_normalizer(name).citation]
    assert len(built_in) >= 13
    assert [name for name in built_in if f"| `{name}` |" not in text] == []


def anchors(page: Path) -> set[str]:
    """What a link into a page may name: its headings as GitHub and mkdocs spell them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_and_figure_exists(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if "://" not in path:
            target = page if not path else (page.parent / path).resolve()
            assert target.is_file(), link
            assert not anchor or anchor in anchors(target), link


def test_the_readme_is_short_and_leads_to_every_page():
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= 10_240
    missing = [page.name for page in sorted(DOCS.glob("*.md")) if f"(docs/{page.name}" not in text]
    assert missing == [] and "(CONTRIBUTING.md)" in text


def paths_named(text: str) -> list[str]:
    """The files and folders in backticks."""
    return re.findall(r"`((?:hf_multimax|recipes|benchmarks|tests|docs)/[\w./\-]*|[\w\-]+\.(?:toml|txt))`", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_named_exists(page):
    paths = paths_named(page.read_text())
    assert len(paths) >= 20 or page.name not in ("CONTRIBUTING.md", "how-it-works.md")
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_at_most_two_files_answer_each_question():
    rows = re.findall(r"^\| (.*\?) \| (.*) \|$", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)
    assert len(rows) >= 10
    for question, answer in rows:
        paths = paths_named(answer)
        assert 1 <= len(paths) <= 2 and all((ROOT / path).is_file() for path in paths), question


def test_every_name_of_the_api_page_exists():
    names = re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(), flags=re.MULTILINE)
    assert len(names) > 20
    for name in names:
        parts = name.split(".")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            assert hasattr(importlib.import_module(".".join(parts[:-1])), parts[-1]), name


def test_every_public_name_is_on_the_api_page():
    import hf_multimax

    text = (DOCS / "api.md").read_text()
    shown = {name.rsplit(".", 1)[-1] for name in re.findall(r"^::: (\S+)$", text, flags=re.MULTILINE)}
    assert set(hf_multimax.__all__) - {"__version__"} <= shown


def shape(text: str) -> list[list[str]]:
    """The words of an output, line by line, without its numbers."""
    lines = [re.sub(r"-?\d+(\.\d+)?%?", "", line).split() for line in text.splitlines()]
    return [words for words in lines if words and set("".join(words)) != {"─"}]


def test_the_commands_of_a_page_print_what_it_shows(tmp_path, monkeypatch):
    """In a row, as a reader would; the demo takes fewer steps, and numbers may differ."""
    import shlex

    from typer.testing import CliRunner

    from hf_multimax.command_line.app import app

    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```console\n(.*?)```", (DOCS / "look.md").read_text(), flags=re.DOTALL)
    assert len(blocks) >= 8
    for block in blocks:
        line, _, expected = block.partition("\n")
        program, *arguments = shlex.split(line.removeprefix("$ "))
        assert program == "hf-multimax"
        if arguments[0] == "demo":
            arguments += ["--steps", "2"]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == ("error: " in expected or "is refused" in expected), done.output
        if arguments[0] == "backends":  # what works depends on the machine
            assert [line[:1] for line in shape(done.output)] == [line[:1] for line in shape(expected)]
        else:
            shown = [words for words in shape(done.output) if "sigma" not in words[1:2]]  # falls, as they may come
            assert shown == shape(expected), line
