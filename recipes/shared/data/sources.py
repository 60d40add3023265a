"""Where data comes from: files, data sets of the Hub, and what results.json and model cards say of each source."""

import re
from collections.abc import Container
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import datasets

from recipes.shared.checks import DataError, explained

#: What a model card says of the built-in data.
ABOUT: dict[str, dict[str, Any]] = {
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


def describe(source: str, built_in: Container[str]) -> dict[str, Any]:
    """The ``data`` entry of results.json for a source: built-in data, a file or folder, or a data set of the Hub."""
    if source in built_in:
        return {"name": source, "dataset": None, **ABOUT[source]}
    path = Path(source).expanduser()
    name, dataset = (path.absolute().name, None) if path.exists() else (source, re.split("[:@]", source)[0])
    return {"name": name, "dataset": dataset, "description": name}


def is_path(source: str) -> bool:
    """Whether a source that does not exist must have been meant as a path, not as a name on the Hub."""
    return Path(source).is_absolute() or source.startswith((".", "~"))


def read_file(path: Path) -> str:
    """A text file in UTF-8; DataError, naming it, if it is none."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def reading_with_datasets(problem: str) -> AbstractContextManager[None]:
    """What the library ``datasets`` raises becomes a DataError of one line that begins with ``problem``."""
    kinds = (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError)
    return explained(problem, *kinds, by_cause=True)
