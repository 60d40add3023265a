"""Hooks of mkdocs: pages that lie outside docs/ join the site, links lead where the pages went, formulas are MathML."""

import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
#: Pages of the repository that GitHub shows where they lie.
OUTSIDE = ("[A-Z]*.md", "benchmarks/README.md", "recipes/README.md", "model_cards/*.md")
_LINK = re.compile(r"(\]\()([^)\s:#]+)")
_FORMULA = re.compile(r"^\$\$(.+?)\$\$$", flags=re.MULTILINE | re.DOTALL)
_FETCHED = re.compile(r"""(?:\bsrc=|<link\b[^>]*\bhref=)["']?(?:https?:)?//[^"'\s>]+""")
_CODE = re.compile(r"(```.*?```|`[^`\n]*`)", flags=re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages outside docs/, by their path in the repository."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            if name != "model_cards/template.md":
                files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links between pages, which hold in the repository, as they hold in the site; formulas as MathML."""
    here = page.file.src_uri
    outside = page.file.generated_by is not None
    folder = posixpath.dirname(here if outside else f"docs/{here}")

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[2])).removeprefix("docs/")
        return match[1] + posixpath.relpath(target, posixpath.dirname(here) or ".")

    markdown = _FORMULA.sub(lambda match: convert(match[1], display="block"), markdown)
    parts = _CODE.split(markdown)
    return "".join(part if part.startswith("`") else _LINK.sub(moved, part) for part in parts)


def on_post_page(output: str, page: Any, config: Any) -> None:
    """Raises PluginError for a page whose browser would fetch something from elsewhere."""
    if found := _FETCHED.search(output):
        raise PluginError(f"{page.file.src_uri} fetches {found[0]}: the site has to hold all that it shows")
