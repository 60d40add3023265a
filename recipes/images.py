"""Labelled images for the recipe: the built-in set, local folders, the Hub; and the batches that are made of them."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import ViTImageProcessorPil

from recipes.augmentation import (
    AugmentationArguments,
    erase,
    flip,
    mix,
    one_hot,
    pad_and_crop,
    rand_augment,
    resized_crop,
)
from recipes.data import FASHION_MNIST_CLASSES, DataError, describe, fashion_mnist

__all__ = [
    "MODES",
    "ArrayImages",
    "FolderImages",
    "HubImages",
    "ImageBatches",
    "LabelledImages",
    "check_readable",
    "describe_augmentation",
    "describe_images",
    "load_images",
    "only",
]

logger = logging.getLogger(__name__)

BUILT_IN = "fashion-mnist"
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp")
VALIDATION_SPLITS = ("validation", "val", "valid", "test")
MODES = {1: "L", 3: "RGB"}


# -- where images come from --------------------------------------------------------------------------------------------


class LabelledImages(ABC):
    """Images that are read one by one.

    Attributes:
        name: for messages.
        classes: the names of the classes.
        labels: ``[n]``, int64, numbers into ``classes``.

    Raises:
        DataError: for a label outside the classes.
    """

    def __init__(self, name: str, classes: Sequence[str], labels: np.ndarray) -> None:
        self.name, self.classes, self.labels = name, list(classes), np.asarray(labels, dtype=np.int64)
        outside = np.flatnonzero((self.labels < 0) | (self.labels >= len(self.classes)))
        if len(outside):
            raise DataError(
                f"image {outside[0]} of {name} has the label {self.labels[outside[0]]}, outside its "
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


class ArrayImages(LabelledImages):
    """Images ``[n, height, width]`` (grey) or ``[n, height, width, 3]``, uint8, in memory."""

    def __init__(self, name: str, classes: Sequence[str], images: np.ndarray, labels: np.ndarray) -> None:
        super().__init__(name, classes, labels)
        self.images = images

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index])

    def arrays(self, indices: Sequence[int]) -> np.ndarray:
        chosen = self.images[np.asarray(indices)]
        return chosen[..., None] if chosen.ndim == 3 else chosen


class FolderImages(LabelledImages):
    """Image files ``folder/<class>/...``.

    Args:
        classes: the classes there may be; default: those of the folder.
    """

    def __init__(self, folder: Path, classes: Sequence[str] | None = None) -> None:
        if not folder.is_dir():
            raise DataError(f"there is no folder {folder}")
        self.paths: list[Path] = []
        found, labels = [], []
        for place in sorted(path for path in folder.iterdir() if path.is_dir()):
            files = sorted(path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES)
            if not files:
                raise DataError(f"there is no image ({', '.join(SUFFIXES)}) in {place}")
            if classes is not None and place.name not in classes:
                raise DataError(f"{place} is a class that the training images do not have: {_some(classes)}")
            found.append(place.name)
            labels += [len(found) - 1 if classes is None else list(classes).index(place.name)] * len(files)
            self.paths += files
        if not found:
            raise DataError(f"{folder} has no folder of images for each class: <class>/<image>{SUFFIXES[0]}")
        super().__init__(str(folder), found if classes is None else classes, np.array(labels))

    def read(self, index: int) -> Image.Image:
        try:
            with Image.open(self.paths[index]) as image:
                return _upright(image, str(self.paths[index]))
        except DataError:
            raise
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"the image {self.paths[index]} cannot be read: {error}") from error


class HubImages(LabelledImages):
    """One split of a data set of the Hub, as ``datasets`` gives it.

    Args:
        columns: names of the image and the label column.
        classes: the classes there may be; default: those of this split.
    """

    def __init__(self, name: str, rows: Any, columns: tuple[str, str], classes: Sequence[str] | None = None) -> None:
        self.rows, self.image_column = rows.with_format(None).select_columns(columns[0]), columns[0]
        feature, values = rows.features[columns[1]], list(rows.with_format(None)[columns[1]])
        if hasattr(feature, "names"):
            own, labels = feature.names, [-1 if value is None else value for value in values]
        else:
            own = sorted(set(values)) if classes is None else list(classes)
            places = {str(value): place for place, value in enumerate(own)}
            labels = [places.get(str(value), -1) for value in values]
        super().__init__(name, [str(value) for value in own], np.array(labels))
        if classes is not None and self.classes != list(classes):
            raise DataError(f"the classes of {name} are not those of the training images: {_some(classes)}")

    def read(self, index: int) -> Image.Image:
        try:
            image = self.rows[int(index)][self.image_column]
            if image is None:
                raise DataError(f"image {index} of {self.name} is missing")
            return _upright(image, f"image {index} of {self.name}")
        except DataError:
            raise
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"image {index} of {self.name} cannot be read: {error}") from error


def _upright(image: Image.Image, name: str) -> Image.Image:
    """An image as it is meant to be seen, and as a pipeline reads it: photos are stored turned, with a note of that."""
    if image.mode.startswith(("I", "F")):  # converting cuts what is above 255
        raise DataError(f"{name} has more than 8 bits a channel (mode {image.mode}): convert it to 8 bits first")
    return ImageOps.exif_transpose(image)


def load_images(
    source: str,
    train_split: str = "train",
    validation_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> tuple[LabelledImages, LabelledImages]:
    """Training and held-out images with the same classes.

    Args:
        source: ``"fashion-mnist"``, a folder with a folder for each split, or a data set of the Hub as ``name`` or
            ``name:configuration``.
        train_split, validation_split: their names; default of the second: the first there is of validation, val,
            valid and test.
        image_column, label_column: of a data set of the Hub; default: its only image and class label column.

    Raises:
        DataError: if there is no such thing, or no images in it.
    """
    path = Path(source).expanduser()
    if source == BUILT_IN:
        splits = {
            name: ArrayImages(f"{source} ({name})", FASHION_MNIST_CLASSES, part.images, part.labels)
            for name, part in fashion_mnist().items()
        }
        train_name, held_out_name = _choose_splits(source, list(splits), train_split, validation_split)
        return splits[train_name], splits[held_out_name]
    if path.is_dir():
        names = sorted(folder.name for folder in path.iterdir() if folder.is_dir())
        train_name, held_out_name = _choose_splits(source, names, train_split, validation_split)
        train = FolderImages(path / train_name)
        return train, FolderImages(path / held_out_name, train.classes)
    if path.exists() or path.is_absolute() or source.startswith((".", "~")):
        raise DataError(f"there is no folder {source}")
    return _load_hub(source, train_split, validation_split, image_column, label_column)


def describe_images(source: str) -> dict[str, Any]:
    """The ``data`` entry of results.json for what :func:`load_images` reads."""
    if source == BUILT_IN:
        return describe(source)
    local = Path(source).expanduser().is_dir()
    name = Path(source).expanduser().resolve().name if local else source
    return {"name": name, "dataset": None if local else source.partition(":")[0], "description": name}


def check_readable(images: LabelledImages, indices: Sequence[int], quiet: bool) -> None:
    """Decode every image once; DataError for the first, in their order, that cannot be."""
    with ThreadPoolExecutor() as pool:
        results = pool.map(images.read, map(int, indices))
        for _ in tqdm(results, f"checking {images.name}", total=len(indices), disable=quiet, leave=False):
            pass


def _load_hub(
    source: str, train_split: str, validation_split: str | None, image_column: str | None, label_column: str | None
) -> tuple[LabelledImages, LabelledImages]:
    where = f"{source} is neither {BUILT_IN} nor a folder"
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(f"{where}, and data sets of the Hub need `pip install datasets`") from error
    name, _, configuration = source.partition(":")
    try:
        splits = load_dataset(name, configuration or None)
    except (OSError, ValueError, RuntimeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DataError(f"{where}, and cannot be read from the Hub: {reason}") from error
    train_name, held_out_name = _choose_splits(source, list(splits), train_split, validation_split)
    features = splits[train_name].features
    columns = (
        _choose_column(source, features, "image", image_column, "Image"),
        _choose_column(source, features, "label", label_column, "ClassLabel"),
    )
    train = HubImages(f"{source} ({train_name})", splits[train_name], columns)
    return train, HubImages(f"{source} ({held_out_name})", splits[held_out_name], columns, train.classes)


def _choose_column(source: str, features: dict[str, Any], what: str, asked: str | None, kind: str) -> str:
    """The column that is asked for, or the only one of that kind of feature, or the one named ``what``."""
    if asked is not None and asked not in features:
        raise DataError(f"{source} has no column {asked}, only {', '.join(features)}: give --{what}_column")
    fitting = [name for name, feature in features.items() if type(feature).__name__ == kind]
    candidates = [asked] if asked else fitting if len(fitting) == 1 else [name for name in (what,) if name in features]
    if not candidates:
        raise DataError(f"{source} has no one {what} column among {', '.join(features)}: give --{what}_column")
    return candidates[0]


def _choose_splits(source: str, names: list[str], train: str, validation: str | None) -> tuple[str, str]:
    held_out = validation or next((name for name in VALIDATION_SPLITS if name in names), VALIDATION_SPLITS[0])
    for name, option in ((train, "train_split"), (held_out, "validation_split")):
        if name not in names:
            raise DataError(
                f"{source} has no split {name!r} (it has {', '.join(names) or 'none'}): give --{option} the right name"
            )
    return train, held_out


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(list(names)[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# -- batches -----------------------------------------------------------------------------------------------------------


class ImageBatches(Dataset):
    """Whole batches of pixels and labels, for a data loader that collates with :func:`only`.

    An augmented batch depends on the seed and on which images it holds, in their order, and on nothing else: neither
    on the process or worker that makes it, nor on what was made before. So a resumed training sees what it would have
    seen, and all arms of a comparison see the same.

    Args:
        images: what to read.
        indices: which of them, ``[n]``.
        processor: how an image becomes pixels, in evaluation and in use.
        size, channels: height = width of the pixels and 1 or 3 channels, as the model takes them.
        augmentation: for training; None in evaluation.
        smoothing: of labels, for training.
        seed: of the augmentation.
    """

    def __init__(
        self,
        images: LabelledImages,
        indices: np.ndarray,
        processor: ViTImageProcessorPil,
        size: int,
        channels: int,
        augmentation: AugmentationArguments | None = None,
        smoothing: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.images, self.indices, self.processor = images, indices, processor
        self.size, self.channels, self.mode = size, channels, MODES[channels]
        self.augmentation, self.smoothing, self.seed = augmentation, smoothing, seed
        mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
        self.mean, self.std = np.float32(np.broadcast_to(mean, channels)), np.float32(np.broadcast_to(std, channels))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """A batch of one, without its first dimension."""
        return {name: value[0] for name, value in self.__getitems__([index])[0].items()}

    def __getitems__(self, places: list[int]) -> list[dict[str, Tensor]]:
        """One batch: ``pixel_values`` ``[n, channels, size, size]`` and ``labels``.

        Labels are ``[n]``, int64, or ``[n, classes]``, float32, where training mixes images or smooths labels.
        """
        indices = self.indices[np.asarray(places)]
        labels = self.images.labels[indices]
        if self.augmentation is None:
            pixels = self._plain(indices)
        else:
            rng = np.random.default_rng([self.seed, *indices.tolist()])
            pixels, labels = self._augmented(indices, labels, rng)
        return [{"pixel_values": torch.from_numpy(pixels), "labels": torch.from_numpy(labels)}]

    def _plain(self, indices: np.ndarray) -> np.ndarray:
        arrays = self._ready(indices)
        if arrays is not None:
            return self._normalised(arrays)
        return self.processor([self._read(index) for index in indices], return_tensors="np")["pixel_values"]

    def _augmented(
        self, indices: np.ndarray, labels: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        options = self.augmentation
        arrays = self._ready(indices) if options.crop != "resized" else None
        if arrays is None:
            arrays = np.stack([self._fitted(self._read(index), rng) for index in indices])
        if options.crop == "pad":
            arrays = pad_and_crop(arrays, options.crop_padding, rng)
        if options.flip:
            arrays = flip(arrays, rng)
        if options.randaugment_ops:
            arrays = np.stack([self._rand_augmented(array, rng) for array in arrays])
        pixels = erase(self._normalised(arrays), options.random_erasing, rng)
        if not (self.smoothing or options.mixup or options.cutmix):
            return pixels, labels
        targets = one_hot(labels, len(self.images.classes), self.smoothing)
        return mix(pixels, targets, options.mixup, options.cutmix, rng)

    def _ready(self, indices: np.ndarray) -> np.ndarray | None:
        """The images as they are, if they have the right size already."""
        arrays = self.images.arrays(indices)
        fits = arrays is not None and arrays.shape[1:3] == (self.size, self.size)
        return arrays if fits and arrays.shape[3] in (1, self.channels) else None

    def _read(self, index: int) -> Image.Image:
        return self.images.read(int(index)).convert(self.mode)

    def _fitted(self, image: Image.Image, rng: np.random.Generator) -> np.ndarray:
        resample = Image.Resampling(self.processor.resample)
        if self.augmentation.crop == "resized":
            image = resized_crop(image, self.size, self.augmentation.crop_min_area, rng, resample)
        else:
            image = image.resize((self.size, self.size), resample)
        return np.asarray(image).reshape(self.size, self.size, -1)

    def _rand_augmented(self, array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        options = self.augmentation
        image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
        fill = tuple(round(255 * float(mean)) for mean in self.mean[: array.shape[-1]])
        image = rand_augment(
            image, options.randaugment_ops, options.randaugment_magnitude, options.randaugment_std, rng, fill
        )
        return np.asarray(image).reshape(array.shape)

    def _normalised(self, arrays: np.ndarray) -> np.ndarray:
        """``[n, size, size, 1 or channels]`` uint8 to ``[n, channels, size, size]`` float32; grey fills all."""
        pixels = (arrays * np.float32(1 / 255) - self.mean) / self.std
        return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def only(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The batch that :class:`ImageBatches` has made already."""
    (batch,) = batches
    return batch


def describe_augmentation(options: AugmentationArguments) -> dict[str, Any]:
    """The options that are not at their defaults."""
    default = asdict(AugmentationArguments())
    return {name: value for name, value in asdict(options).items() if value != default[name]}
