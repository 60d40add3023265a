"""Text: Python's documentation, a Bible of Debian's, files and folders, and data sets of the Hub."""

import html
import importlib
import re
import struct
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import datasets

from recipes.shared.checks import DataError, explained
from recipes.shared.data.debian import debian_folder
from recipes.shared.data.sources import is_path, read_file, reading_with_datasets

SUFFIXES = (".txt", ".md", ".rst")


def load_text(source: str, max_characters: int = 20_000_000) -> str:
    """The text that ``source`` names, not empty.

    Args:
        source: ``"pydoc"``, ``"web"``, a text file (UTF-8), a folder (all its .txt, .md and .rst files, in the order of
            their names), or a data set of the Hub as ``name`` or ``name:configuration``, of which the train split's
            text column is read.
        max_characters: a data set of the Hub is read up to here.

    Raises:
        DataError: if there is no such thing, or no text in it.
    """
    path = Path(source).expanduser()
    if source in BUILT_IN_TEXTS:
        text = BUILT_IN_TEXTS[source]()
    elif path.is_dir():
        text = _read_folder(path)
    elif path.exists():
        text = read_file(path)
    elif is_path(source) or path.suffix in SUFFIXES:
        raise DataError(f"there is no file or folder {source}")
    else:
        text = _read_hub(source, max_characters)
    if not text.strip():
        raise DataError(f"there is no text in {source}")
    return text


def pydoc_text() -> str:
    """The Python language reference of this interpreter's ``pydoc_data.topics``, about 465,000 characters."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise DataError(f"this Python comes without its documentation ({error}): give another text") from error
    return "\n".join(topics.values())


def web_text() -> str:
    """The World English Bible, modern English in the public domain, of Debian's sword-text-web: 4.9 million characters.

    A line is a paragraph, a line of verse or a heading; footnotes and markup are left out.
    """
    return _osis_to_text(_read_ztext(debian_folder("sword-text-web", "usr/share/sword/modules/texts/ztext/*")))


#: What :func:`load_text` knows by name.
BUILT_IN_TEXTS: dict[str, Callable[[], str]] = {"pydoc": pydoc_text, "web": web_text}


def _read_folder(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    if not files:
        raise DataError(f"there is no {', '.join(SUFFIXES)} file in {folder}")
    return "\n".join(map(read_file, files))


def _read_hub(source: str, max_characters: int) -> str:
    built_in = ", ".join(BUILT_IN_TEXTS)
    problem = f"{source} is no built-in text ({built_in}), no file, no folder, and cannot be read from the Hub"
    address, _, split = source.partition("@")
    name, _, configuration = address.partition(":")
    with reading_with_datasets(problem):
        rows = datasets.load_dataset(name, configuration or None, split=split or "train", streaming=True)
        column = _text_column(rows.features, source)
        return _join((row[column] for row in rows), max_characters)


def _text_column(features: dict | None, source: str) -> str:
    strings = [name for name, feature in (features or {}).items() if getattr(feature, "dtype", None) == "string"]
    if "text" in strings or not features:
        return "text"
    if len(strings) != 1:
        raise DataError(f"the data set {source} has no column 'text', only {', '.join(features)}")
    return strings[0]


def _join(parts: Iterable[str], max_characters: int) -> str:
    chosen, size = [], 0
    for part in parts:
        chosen.append(part)
        size += len(part) + 1
        if size >= max_characters:
            break
    return "\n".join(chosen)[:max_characters]


# -- the format of SWORD -----------------------------------------------------------------------------------------------


def _read_ztext(folder: Path) -> str:
    """The OSIS markup of a SWORD module compressed by book: both testaments, verse after verse.

    ``.bzs`` lists the compressed blocks of ``.bzz`` as (offset, compressed size, size), ``.bzv`` the verses as
    (block, offset in it, length); all little-endian.
    """
    verses = []
    broken = (OSError, ValueError, IndexError, struct.error, zlib.error)
    with explained(f"{folder} is no SWORD module in zText format", *broken):
        for testament in ("ot", "nt"):
            compressed = (folder / f"{testament}.bzz").read_bytes()
            blocks = [
                zlib.decompress(compressed[start : start + size])
                for start, size, _ in struct.iter_unpack("<3I", (folder / f"{testament}.bzs").read_bytes())
            ]
            for block, start, size in struct.iter_unpack("<2IH", (folder / f"{testament}.bzv").read_bytes()):
                if size:
                    verses.append(blocks[block][start : start + size].decode("utf-8"))
    return "".join(verses)


_OSIS_LINE = re.compile(r"</?(?:div|chapter|title|lg?|lb|item|list|speaker)\b[^>]*>")


def _osis_to_text(osis: str) -> str:
    # A footnote may be all that stands between two words, or stand before a comma.
    osis = re.sub(r"<note\b.*?</note>", " ", osis.replace("\n", " "))
    text = html.unescape(re.sub(r"<[^>]+>", "", _OSIS_LINE.sub("\n", osis)))
    lines = (" ".join(line.split()) for line in text.split("\n"))
    return re.sub(r" (?=[,.;:!?”’])", "", "\n".join(line for line in lines if line))
