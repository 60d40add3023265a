"""Real data for the recipes: what is on every machine, Debian's data packages, local files, and the Hub.

Debian packages are downloaded and unpacked, not installed, into the package's cache folder. Whatever cannot be read
raises :class:`DataError`, whose text is one sentence that names the culprit.
"""

import gzip
import html
import importlib
import logging
import re
import shutil
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_multimax.cache import cache_folder

__all__ = [
    "BUILT_IN_TEXTS",
    "DataError",
    "FASHION_MNIST_CLASSES",
    "Images",
    "debian_package",
    "describe",
    "describe_text",
    "encode",
    "fashion_mnist",
    "help_sentences",
    "load_text",
    "pydoc_text",
    "train_tokenizer",
    "web_text",
]

logger = logging.getLogger(__name__)

TEXT_SUFFIXES = (".txt", ".md", ".rst")
END_OF_TEXT = "<|endoftext|>"
FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


class DataError(ValueError):
    """Data that cannot be had or used; the message is one sentence for the user."""


class Images(NamedTuple):
    """Grey images ``[n, height, width]`` and their class numbers ``[n]``, both uint8."""

    images: np.ndarray
    labels: np.ndarray


# -- text --------------------------------------------------------------------------------------------------------------


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
        text = _read_file(path)
    elif path.is_absolute() or source.startswith((".", "~")) or path.suffix in TEXT_SUFFIXES:
        raise DataError(f"there is no file or folder {source}")
    else:
        text = _read_hub(source, max_characters)
    if not text.strip():
        raise DataError(f"there is no text in {source}")
    return text


def describe_text(source: str) -> dict[str, Any]:
    """The ``data`` entry of results.json for what :func:`load_text` reads."""
    if source in BUILT_IN_TEXTS:
        return {"name": source, "dataset": None, **_ABOUT[source]}
    local = Path(source).expanduser().exists()
    name = Path(source).name if local else source
    return {"name": name, "dataset": None if local else re.split("[:@]", source)[0], "description": name}


#: What a model card says of the built-in data.
_ABOUT: dict[str, dict[str, Any]] = {
    "pydoc": {
        "description": "the Python language reference (pydoc_data.topics of the standard library)",
        "language": ["en"],
        "licence": "PSF-2.0",
    },
    "web": {
        "description": "the World English Bible (Debian package sword-text-web)",
        "language": ["en"],
        "licence": "public domain",
    },
    "fashion-mnist": {
        "description": "Fashion-MNIST, 28x28 grey images of clothes in ten classes (Debian dataset-fashion-mnist)",
        "licence": "MIT",
    },
    "help-en-de": {
        "description": "sentences of LibreOffice's help, English to German (Debian libreoffice-help-en-us and -de)",
        "language": ["en", "de"],
        "licence": "MPL-2.0",
    },
}


def describe(name: str) -> dict[str, Any]:
    """The ``data`` entry of results.json for a built-in data set of images or sentences."""
    return {"name": name, "dataset": None, **_ABOUT[name]}


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
    return _osis_to_text(_read_ztext(_find(debian_package("sword-text-web"), "usr/share/sword/modules/texts/ztext/*")))


#: What :func:`load_text` knows by name.
BUILT_IN_TEXTS: dict[str, Callable[[], str]] = {"pydoc": pydoc_text, "web": web_text}


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _read_folder(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.suffix in TEXT_SUFFIXES and path.is_file())
    if not files:
        raise DataError(f"there is no {', '.join(TEXT_SUFFIXES)} file in {folder}")
    return "\n".join(map(_read_file, files))


def _read_hub(source: str, max_characters: int) -> str:
    where = f"{source} is no built-in text ({', '.join(BUILT_IN_TEXTS)}), no file, no folder"
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(f"{where}, and data sets of the Hub need `pip install datasets`") from error
    address, _, split = source.partition("@")
    name, _, configuration = address.partition(":")
    try:
        rows = load_dataset(name, configuration or None, split=split or "train", streaming=True)
        column = _text_column(rows.features, source)
        return _join(rows, column, max_characters)
    except DataError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{where}, and cannot be read from the Hub: {_first_line(error)}") from error


def _text_column(features: dict | None, source: str) -> str:
    strings = [name for name, feature in (features or {}).items() if getattr(feature, "dtype", None) == "string"]
    if "text" in strings or not features:
        return "text"
    if len(strings) != 1:
        raise DataError(f"the data set {source} has no column 'text', only {', '.join(features)}")
    return strings[0]


def _join(rows: Iterable[dict], column: str, max_characters: int) -> str:
    parts, size = [], 0
    for row in rows:
        parts.append(row[column])
        size += len(row[column]) + 1
        if size >= max_characters:
            break
    return "\n".join(parts)[:max_characters]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


# -- images and translations -------------------------------------------------------------------------------------------


def fashion_mnist() -> dict[str, Images]:
    """Fashion-MNIST of Debian's dataset-fashion-mnist: ``train`` with 60,000 and ``test`` with 10,000 28x28 images.

    Labels are numbers into ``FASHION_MNIST_CLASSES``.
    """
    folder = _find(debian_package("dataset-fashion-mnist"), "usr/share/datasets/fashion-mnist")
    return {
        split: Images(
            _read_idx(folder / f"{prefix}-images-idx3-ubyte.gz"), _read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
        )
        for split, prefix in (("train", "train"), ("test", "t10k"))
    }


def help_sentences(min_words: int = 3, max_words: int = 40) -> list[tuple[str, str]]:
    """English and German sentences of LibreOffice's help (Debian's libreoffice-help-en-us and -de, mainly MPL-2.0).

    They are the paragraphs with the same id on the same page that end as a sentence and have ``min_words`` to
    ``max_words`` words in both languages and differ. Each English text comes once, so that no split of the list has it
    on both sides. The order is that of the pages' names.
    """
    pages = "usr/*/libreoffice/help/*/text"
    english = _read_help(_find(debian_package("libreoffice-help-en-us"), pages))
    german = _read_help(_find(debian_package("libreoffice-help-de"), pages))
    pairs: dict[str, str] = {}
    for key, source in english.items():
        target = german.get(key, "")
        sentences = source[-1:] in _SENTENCE_ENDS and target[-1:] in _SENTENCE_ENDS
        fits = all(min_words <= len(text.split()) <= max_words for text in (source, target))
        if sentences and fits and source != target:
            pairs.setdefault(source, target)
    return list(pairs.items())


_SENTENCE_ENDS = (".", "!", "?")


# -- formats -----------------------------------------------------------------------------------------------------------


def _read_idx(path: Path) -> np.ndarray:
    """An array of unsigned bytes from a gzipped IDX file."""
    try:
        data = gzip.decompress(path.read_bytes())
        zeros, kind, dimensions = struct.unpack_from(">HBB", data)
        shape = struct.unpack_from(f">{dimensions}I", data, 4)
        if zeros or kind != 0x08:
            raise ValueError(f"it starts with {data[:4].hex()}")
        return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise DataError(f"{path} is no IDX file of bytes: {_first_line(error)}") from error


def _read_ztext(folder: Path) -> str:
    """The OSIS markup of a SWORD module compressed by book: both testaments, verse after verse.

    ``.bzs`` lists the compressed blocks of ``.bzz`` as (offset, compressed size, size), ``.bzv`` the verses as
    (block, offset in it, length); all little-endian.
    """
    verses = []
    try:
        for testament in ("ot", "nt"):
            compressed = (folder / f"{testament}.bzz").read_bytes()
            blocks = [
                zlib.decompress(compressed[start : start + size])
                for start, size, _ in struct.iter_unpack("<3I", (folder / f"{testament}.bzs").read_bytes())
            ]
            for block, start, size in struct.iter_unpack("<2IH", (folder / f"{testament}.bzv").read_bytes()):
                if size:
                    verses.append(blocks[block][start : start + size].decode("utf-8"))
    except (OSError, ValueError, IndexError, struct.error, zlib.error) as error:
        raise DataError(f"{folder} is no SWORD module in zText format: {_first_line(error)}") from error
    return "".join(verses)


_OSIS_LINE = re.compile(r"</?(?:div|chapter|title|lg?|lb|item|list|speaker)\b[^>]*>")


def _osis_to_text(osis: str) -> str:
    # A footnote may be all that stands between two words, or stand before a comma.
    osis = re.sub(r"<note\b.*?</note>", " ", osis.replace("\n", " "))
    text = html.unescape(re.sub(r"<[^>]+>", "", _OSIS_LINE.sub("\n", osis)))
    lines = (" ".join(line.split()) for line in text.split("\n"))
    return re.sub(r" (?=[,.;:!?”’])", "", "\n".join(line for line in lines if line))


_HELP_PARAGRAPH = re.compile(r'<(p|h\d)\b[^>]*?\bid="((?:par|hd)_id[^"]+)"[^>]*>(.*?)</\1>', re.DOTALL)


def _read_help(folder: Path) -> dict[tuple[str, str], str]:
    """The paragraphs of LibreOffice's help pages in ``folder``, by page and paragraph id."""
    paragraphs = {}
    for page in sorted(folder.rglob("*.html")):
        name = page.relative_to(folder).as_posix()
        for _, identifier, content in _HELP_PARAGRAPH.findall(_read_file(page)):
            plain = re.sub(r"<[^>]+>", "", re.sub(r"<br\b[^>]*>", " ", content))
            paragraphs[name, identifier] = " ".join(html.unescape(plain).split())
    return paragraphs


# -- Debian packages ---------------------------------------------------------------------------------------------------


def debian_package(name: str) -> Path:
    """The folder that holds the files of a Debian package (``usr/...``), fetched at the first call.

    No root rights are needed and nothing is installed. The folder appears whole or not at all.

    Raises:
        DataError: if the package cannot be fetched, with the reason and the way out.
    """
    try:
        folder = cache_folder() / "debian" / name
    except OSError as error:
        raise DataError(str(error)) from error
    if folder.is_dir():
        return folder
    logger.info(f"fetching the Debian package {name} into {folder}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as partial:
            content = _download(name, Path(partial))
            _move_into_place(content, folder)
    except OSError as error:
        raise DataError(f"the cache {folder.parent} cannot be written ({error}): set HF_MULTIMAX_CACHE") from error
    return folder


def _download(name: str, folder: Path) -> Path:
    """Download and unpack below ``folder``; returns the unpacked content."""
    content = folder / "content"
    _run("apt-get", "download", "-q", "-o", "Acquire::Retries=1", name, package=name, folder=folder)
    archives = sorted(folder.glob("*.deb"))
    if not archives:
        raise _unavailable(name, "apt-get wrote no archive")
    _run("dpkg-deb", "-x", str(archives[0]), str(content), package=name, folder=folder)
    return content


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


def _move_into_place(content: Path, folder: Path) -> None:
    try:
        content.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster
            raise


def _find(package: Path, pattern: str) -> Path:
    """The first folder of an unpacked package that matches ``pattern``."""
    found = sorted(path for path in package.glob(pattern) if path.is_dir())
    if not found:
        raise DataError(f"the Debian package in {package} has no {pattern}: delete that folder to fetch it again")
    return found[0]


# -- tokens ------------------------------------------------------------------------------------------------------------


def train_tokenizer(text: str, vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, as GPT-2's, trained on ``text``; every text can be encoded and comes back unchanged.

    Args:
        vocab_size: at most; at least 257 (the bytes and the end of text).
        max_length: ``model_max_length`` of the tokenizer.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size must be at least 257, got {vocab_size}")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        text.splitlines(keepends=True), vocab_size, special_tokens=[END_OF_TEXT], show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(bpe.to_str()),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """The tokens of a long text without special tokens, ``[tokens]``, int64."""
    tokens: list[int] = []
    for piece in _pieces(text):
        tokens += tokenizer(piece, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return torch.tensor(tokens, dtype=torch.long)


def _pieces(text: str, size: int = 1_000_000) -> Iterator[str]:
    """The text in pieces that end with a line where they can: tokenizers are slow on very long strings."""
    begin = 0
    while begin < len(text):
        end = text.find("\n", begin + size) + 1
        yield text[begin : end or None]
        begin = end or len(text)
