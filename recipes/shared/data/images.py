"""Labelled images: Fashion-MNIST, folders of images, and data sets of the Hub."""

import gzip
import os
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image, ImageOps
from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg

from recipes.shared.checks import DataError, check_numbers, explained
from recipes.shared.data.debian import debian_folder
from recipes.shared.data.sources import is_path, reading_with_datasets

BUILT_IN = "fashion-mnist"
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
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp")
VALIDATION_SPLITS = ("validation", "val", "valid", "test")


@dataclass
class ImageArguments:
    """The images, and how the model sees them."""

    data: str = HfArg(
        default=BUILT_IN, help=f"{BUILT_IN}, a folder <split>/<class>/<image>, or a Hub set as name[:configuration]"
    )
    train_split: str = HfArg(default="train", help="name of the split to train on")
    validation_split: str | None = HfArg(
        default=None, help="of the held-out split; default: validation, val, valid or test"
    )
    image_column: str | None = HfArg(default=None, help="of a Hub set; default: its image column")
    label_column: str | None = HfArg(default=None, help="of a Hub set; default: its class label column")
    max_train_images: int | None = HfArg(default=None, help="train on a random choice of that many")
    max_eval_images: int | None = HfArg(default=None, help="evaluate on a random choice of that many")
    check_images: bool = HfArg(
        default=True, help="decode every image once before training, to find those that cannot be read"
    )
    eval_crop: float = HfArg(
        default=1.0, help="pre-training: the share of a side that evaluation's centre crop keeps; 1: the whole image"
    )
    stochastic_depth: float = HfArg(
        default=0.0, help="probability to drop a residual branch of the last block; it grows linearly from 0"
    )

    def __post_init__(self) -> None:
        check_numbers(self, "(0, 1]", "eval_crop")
        check_numbers(self, "[0, 1)", "stochastic_depth")
        check_numbers(self, "(0, inf)", "max_train_images", "max_eval_images")


@dataclass(eq=False)
class LabelledImages(ABC):
    """Images that are read one by one.

    Attributes:
        name: for messages.
        classes: the names of the classes.
        labels: ``[n]``, int64, numbers into ``classes``.

    Raises:
        DataError: for a label outside the classes.
    """

    name: str
    classes: Sequence[str]
    labels: Sequence[int] | np.ndarray

    def __post_init__(self) -> None:
        self.classes, self.labels = list(self.classes), np.asarray(self.labels, dtype=np.int64)
        outside = np.flatnonzero((self.labels < 0) | (self.labels >= len(self.classes)))
        if len(outside):
            raise DataError(
                f"image {outside[0]} of {self.name} has the label {self.labels[outside[0]]}, outside its "
                f"{len(self.classes)} classes (and {len(outside) - 1} more)"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def read(self, index: int) -> Image.Image:
        """One image, decoded; DataError, naming it, if it cannot be."""

    def arrays(self, indices: Sequence[int]) -> np.ndarray | None:
        """Some images at once, ``[n, height, width, channels]``, uint8, where all lie in memory in one size."""
        return None


@dataclass(eq=False)
class ArrayImages(LabelledImages):
    """Images ``[n, height, width]`` (grey) or ``[n, height, width, 3]``, uint8, in memory."""

    images: np.ndarray

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index])

    def arrays(self, indices: Sequence[int]) -> np.ndarray:
        chosen = self.images[np.asarray(indices)]
        return chosen[..., None] if chosen.ndim == 3 else chosen


@dataclass(eq=False)
class StoredImages(LabelledImages):
    """Images that are decoded when they are read.

    Attributes:
        entries: what ``datasets`` holds of each image, ``{"path": ..., "bytes": ...}``, or None.
    """

    entries: Sequence[dict[str, Any] | None]

    def read(self, index: int) -> Image.Image:
        entry = self.entries[int(index)]
        path = entry and entry["path"]
        name = path if path and os.path.isabs(path) else f"image {index} of {self.name}"
        if entry is None:
            raise DataError(f"{name} is missing")
        with explained(f"{name} cannot be read", OSError, SyntaxError, ValueError):
            # Photos are stored turned, with a note of that; a pipeline turns them, too.
            image = ImageOps.exif_transpose(datasets.Image().decode_example(entry))
        if image.mode.startswith(("I", "F")):  # converting cuts what is above 255
            raise DataError(f"{name} has more than 8 bits a channel (mode {image.mode}): convert it to 8 bits first")
        return image


def load_images(options: ImageArguments) -> tuple[LabelledImages, LabelledImages]:
    """Training and held-out images with the same classes.

    Raises:
        DataError: if there is no such thing, or no images in it.
    """
    path = Path(options.data).expanduser()
    if options.data == BUILT_IN:
        splits = fashion_mnist()
        train, held_out = _choose_splits(options, splits)
        return splits[train], splits[held_out]
    if path.is_dir():
        train, held_out = _choose_splits(options, sorted(place.name for place in path.iterdir() if place.is_dir()))
        images = read_folder(path / train)
        return images, read_folder(path / held_out, images.classes)
    if path.exists() or is_path(options.data):
        raise DataError(f"there is no folder {options.data}")
    name, _, configuration = options.data.partition(":")
    with reading_with_datasets(f"{options.data} is neither {BUILT_IN} nor a folder, and cannot be read from the Hub"):
        splits = datasets.load_dataset(name, configuration or None)
    train, held_out = _choose_splits(options, splits)
    images = _read_hub(options, splits, train)
    return images, _read_hub(options, splits, held_out, images.classes)


def check_readable(images: LabelledImages, indices: Sequence[int], quiet: bool) -> None:
    """Decode every image once; DataError for the first, in their order, that cannot be."""
    with ThreadPoolExecutor() as pool:
        results = pool.map(images.read, map(int, indices))
        for _ in tqdm(results, f"checking {images.name}", total=len(indices), disable=quiet, leave=False):
            pass


def _choose_splits(options: ImageArguments, names: Iterable[str]) -> tuple[str, str]:
    """The names of the splits to train on and to evaluate on."""
    default = next((name for name in VALIDATION_SPLITS if name in names), VALIDATION_SPLITS[0])
    chosen = {"train_split": options.train_split, "validation_split": options.validation_split or default}
    for option, name in chosen.items():
        if name not in names:
            has = ", ".join(names) or "none"
            raise DataError(f"{options.data} has no split {name!r} (it has {has}): give --{option} the right name")
    return chosen["train_split"], chosen["validation_split"]


# -- Fashion-MNIST -----------------------------------------------------------------------------------------------------


def fashion_mnist() -> dict[str, ArrayImages]:
    """Fashion-MNIST of Debian's dataset-fashion-mnist: ``train`` with 60,000 and ``test`` with 10,000 28x28 images."""
    folder = debian_folder("dataset-fashion-mnist", "usr/share/datasets/fashion-mnist")
    return {
        split: ArrayImages(
            f"{BUILT_IN} ({split})",
            FASHION_MNIST_CLASSES,
            *(_read_idx(folder / f"{prefix}-{kind}-ubyte.gz") for kind in ("labels-idx1", "images-idx3")),
        )
        for split, prefix in (("train", "train"), ("test", "t10k"))
    }


def _read_idx(path: Path) -> np.ndarray:
    """An array of unsigned bytes from a gzipped IDX file."""
    with explained(f"{path} is no IDX file of bytes", OSError, EOFError, ValueError, struct.error, zlib.error):
        data = gzip.decompress(path.read_bytes())
        zeros, kind, dimensions = struct.unpack_from(">HBB", data)
        shape = struct.unpack_from(f">{dimensions}I", data, 4)
        if zeros or kind != 0x08:
            raise ValueError(f"it starts with {data[:4].hex()}")
        return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


# -- folders and the Hub -----------------------------------------------------------------------------------------------


def read_folder(folder: Path, classes: Sequence[str] | None = None) -> StoredImages:
    """Image files ``folder/<class>/...``.

    Not by ``imagefolder`` of ``datasets``: it knows some names of splits only, gives all splits the classes of any, and
    passes over a class without images.

    Args:
        classes: the classes there may be; default: those of the folder.
    """
    paths, labels, found = [], [], []
    for place in sorted(path for path in folder.absolute().iterdir() if path.is_dir()):
        files = sorted(path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES)
        if not files:
            raise DataError(f"there is no image ({', '.join(SUFFIXES)}) in {place}")
        if classes is not None and place.name not in classes:
            raise DataError(f"{place} is a class that the training images do not have: {_some(classes)}")
        found.append(place.name)
        labels += [(classes or found).index(place.name)] * len(files)
        paths += map(str, files)
    if not found:
        raise DataError(f"{folder} has no folder of images for each class: <class>/<image>{SUFFIXES[0]}")
    return StoredImages(
        str(folder), classes or found, labels, _undecoded(datasets.Dataset.from_dict({"i": paths}), "i")
    )


def _read_hub(
    options: ImageArguments, splits: datasets.DatasetDict, split: str, classes: Sequence[str] | None = None
) -> StoredImages:
    """One split; labels are class labels, or any values of which each is a class."""
    name, rows = f"{options.data} ({split})", splits[split]
    image = _choose_column(options, rows.features, "image", datasets.Image)
    label = _choose_column(options, rows.features, "label", datasets.ClassLabel)
    own, values = getattr(rows.features[label], "names", None), rows.with_format(None)[label][:]
    if own is None:
        own = classes or [str(value) for value in sorted({value for value in values if value is not None})]
        places = {value: place for place, value in enumerate(own)}
        values = [places.get(str(value)) for value in values]
    elif classes is not None and own != list(classes):
        raise DataError(f"the classes of {name} are not those of the training images: {_some(classes)}")
    return StoredImages(name, own, [-1 if value is None else value for value in values], _undecoded(rows, image))


def _undecoded(rows: datasets.Dataset, column: str) -> Sequence[dict[str, Any] | None]:
    """A column of images as :class:`StoredImages` takes it; it stays in Arrow's memory, which processes share."""
    rows = rows.with_format(None).select_columns(column)
    return rows.cast_column(column, datasets.Image(decode=False))[column]


def _choose_column(options: ImageArguments, features: dict[str, Any], what: str, kind: type) -> str:
    """The column that is asked for, or the only one of that kind of feature, or the one named ``what``."""
    asked, has = getattr(options, f"{what}_column"), ", ".join(features)
    if asked is not None and asked not in features:
        raise DataError(f"{options.data} has no column {asked}, only {has}: give --{what}_column")
    fitting = [name for name, feature in features.items() if isinstance(feature, kind)]
    candidates = [asked] if asked else fitting if len(fitting) == 1 else [name for name in (what,) if name in features]
    if not candidates:
        raise DataError(f"{options.data} has no one {what} column among {has}: give --{what}_column")
    return candidates[0]


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(list(names)[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
