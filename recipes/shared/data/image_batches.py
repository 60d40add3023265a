"""Batches of pixels and labels: images as the model takes them, augmented in training."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from transformers import ViTImageProcessorPil

from recipes.shared.augmentation import (
    AugmentationArguments,
    erase,
    flip,
    mix,
    one_hot,
    pad_and_crop,
    rand_augment,
    resized_crop,
)
from recipes.shared.data.images import LabelledImages

#: Pillow's modes by the number of channels.
MODES = {1: "L", 3: "RGB"}


@dataclass(eq=False)
class ImageBatches(Dataset):
    """Whole batches of pixels and labels, for a data loader that collates with :func:`only`.

    An augmented batch depends on the seed and on which images it holds, in their order, and on nothing else: neither
    on the process or worker that makes it, nor on what was made before. So a resumed training sees what it would have
    seen, and all arms of a comparison see the same.

    Attributes:
        images: what to read.
        indices: which of them, ``[n]``.
        processor: how an image becomes pixels, in evaluation and in use.
        size, channels: height = width of the pixels and 1 or 3 channels, as the model takes them.
        augmentation: for training; None in evaluation.
        smoothing: of labels, for training.
        seed: of the augmentation.
    """

    images: LabelledImages
    indices: np.ndarray
    processor: ViTImageProcessorPil
    size: int
    channels: int
    augmentation: AugmentationArguments | None = None
    smoothing: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        normalize = self.processor.do_normalize
        mean, std = (self.processor.image_mean, self.processor.image_std) if normalize else (0.0, 1.0)
        self.mean, self.std = (np.float32(np.broadcast_to(value, self.channels)) for value in (mean, std))

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
        return mix(pixels, targets, options, rng)

    def _ready(self, indices: np.ndarray) -> np.ndarray | None:
        """The images as they are, if they have the right size already."""
        arrays = self.images.arrays(indices)
        fits = arrays is not None and arrays.shape[1:3] == (self.size, self.size)
        return arrays if fits and arrays.shape[3] in (1, self.channels) else None

    def _read(self, index: int) -> Image.Image:
        return self.images.read(int(index)).convert(MODES[self.channels])

    def _fitted(self, image: Image.Image, rng: np.random.Generator) -> np.ndarray:
        resample = Image.Resampling(self.processor.resample)
        if self.augmentation.crop == "resized":
            image = resized_crop(image, self.size, self.augmentation.crop_min_area, rng, resample)
        else:
            image = image.resize((self.size, self.size), resample)
        return np.asarray(image).reshape(self.size, self.size, -1)

    def _rand_augmented(self, array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
        fill = tuple(round(255 * float(mean)) for mean in self.mean[: array.shape[-1]])
        return np.asarray(rand_augment(image, self.augmentation, rng, fill)).reshape(array.shape)

    def _normalised(self, arrays: np.ndarray) -> np.ndarray:
        """``[n, size, size, 1 or channels]`` uint8 to ``[n, channels, size, size]`` float32; grey fills all."""
        pixels = (arrays * np.float32(1 / 255) - self.mean) / self.std
        return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def only(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The batch that :class:`ImageBatches` has made already."""
    (batch,) = batches
    return batch
