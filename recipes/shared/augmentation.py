"""Augmentation of images with Pillow and NumPy alone: crop, flip, RandAugment, random erasing, mixup, cutmix.

All randomness comes from a ``numpy.random.Generator`` that the caller gives, so that a batch which is made again, in
another process or after an interruption, is the same batch.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageEnhance, ImageOps
from transformers.hf_argparser import HfArg

from recipes.shared.checks import DataError, check_numbers

CROPS = ("none", "pad", "resized")
MAX_MAGNITUDE = 10


@dataclass
class AugmentationArguments:
    """What training images go through; evaluation sees none of it."""

    crop: str = HfArg(
        default="none",
        help="none: the whole image; pad: a random crop of the padded image; resized: a crop of random area and aspect "
        "ratio, resized",
        metadata={"choices": list(CROPS)},
    )
    crop_padding: int = HfArg(default=2, help="black pixels on each side for crop=pad")
    crop_min_area: float = HfArg(default=0.08, help="least share of the area for crop=resized")
    flip: bool = HfArg(default=False, help="mirror every second image, left to right")
    randaugment_ops: int = HfArg(default=0, help="RandAugment: operations for each image")
    randaugment_magnitude: float = HfArg(default=9.0, help=f"their mean strength, 0 to {MAX_MAGNITUDE}")
    randaugment_std: float = HfArg(default=0.5, help="standard deviation of their strength")
    random_erasing: float = HfArg(default=0.0, help="probability that a box of an image becomes noise")
    mixup: float = HfArg(default=0.0, help="alpha of mixup's Beta distribution; 0: no mixup")
    cutmix: float = HfArg(
        default=0.0, help="alpha of cutmix's Beta distribution; 0: no cutmix; with both, either at random"
    )

    def __post_init__(self) -> None:
        if self.crop not in CROPS:
            raise DataError(f"--crop must be one of {', '.join(CROPS)}, got {self.crop}")
        check_numbers(self, "[0, inf)", "crop_padding", "randaugment_ops", "randaugment_std", "mixup", "cutmix")
        check_numbers(self, f"[0, {MAX_MAGNITUDE}]", "randaugment_magnitude")
        check_numbers(self, "(0, 1]", "crop_min_area")
        check_numbers(self, "[0, 1]", "random_erasing")

    def chosen(self) -> dict[str, Any]:
        """The options that are not at their defaults."""
        default = asdict(AugmentationArguments())
        return {name: value for name, value in asdict(self).items() if value != default[name]}


# -- crops and flips ---------------------------------------------------------------------------------------------------


def pad_and_crop(images: np.ndarray, padding: int, rng: np.random.Generator) -> np.ndarray:
    """Shift each image of ``[n, height, width, channels]`` by up to ``padding`` pixels; black comes in."""
    count, height, width, _ = images.shape
    padded = np.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    top, left = rng.integers(0, 2 * padding + 1, size=(2, count))
    rows = top[:, None] + np.arange(height)
    columns = left[:, None] + np.arange(width)
    return padded[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


def flip(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirror about half of the images of ``[n, height, width, channels]``, left to right."""
    return np.where(rng.random(len(images))[:, None, None, None] < 0.5, images[:, :, ::-1], images)


def resized_crop(
    image: Image.Image, size: int, min_area: float, rng: np.random.Generator, resample: Image.Resampling
) -> Image.Image:
    """A random part of an image as ``size`` x ``size``: ``min_area`` to 1 of its area, aspect ratio 3/4 to 4/3."""
    width, height = image.size
    for w, h in _draw_sides(width * height, (min_area, 1.0), (3 / 4, 4 / 3), rng):
        if 0 < w <= width and 0 < h <= height:
            break
    else:  # a very long or thin image: the largest square
        w = h = min(width, height)
    left, top = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
    return image.resize((size, size), resample, box=(left, top, left + w, top + h))


def _draw_sides(
    area: int, shares: tuple[float, float], aspects: tuple[float, float], rng: np.random.Generator
) -> Iterator[tuple[int, int]]:
    """Ten random boxes by their sides: an even share of the area, and an aspect ratio that is even in its logarithm."""
    for _ in range(10):
        drawn = area * rng.uniform(*shares)
        aspect = np.exp(rng.uniform(*np.log(aspects)))
        yield round(np.sqrt(drawn * aspect)), round(np.sqrt(drawn / aspect))


# -- RandAugment -------------------------------------------------------------------------------------------------------


def rand_augment(
    image: Image.Image, options: AugmentationArguments, rng: np.random.Generator, fill: tuple[int, ...]
) -> Image.Image:
    """RandAugment (Cubuk et al., 2020) in the form DeiT trains with: strength grows with magnitude in every operation.

    Args:
        image: of mode L or RGB; stays as it is in mode and size.
        options: how many operations are drawn, with replacement, of which each is then applied with probability 1/2;
            and the normal distribution from which the strength of each is drawn, cut to [0, 10].
        fill: the colour of what a rotation or shift uncovers, a number for each channel.
    """
    for name in rng.choice(list(OPERATIONS), size=options.randaugment_ops):
        if rng.random() < 0.5:
            magnitude = np.clip(rng.normal(options.randaugment_magnitude, options.randaugment_std), 0, MAX_MAGNITUDE)
            image = OPERATIONS[name](image, _Draw(magnitude / MAX_MAGNITUDE, rng.choice((-1.0, 1.0)), fill))
    return image


class _Draw(NamedTuple):
    """Strength in [0, 1], direction -1 or 1, and colour of the background."""

    strength: float
    sign: float
    fill: tuple[int, ...]

    @property
    def uncovered(self) -> dict[str, Any]:
        """How Pillow fills what it uncovers."""
        return {"resample": Image.Resampling.BILINEAR, "fillcolor": self.fill if len(self.fill) > 1 else self.fill[0]}


def _affine(matrix: Callable[[Image.Image, float], tuple[float, ...]]) -> Callable[[Image.Image, _Draw], Image.Image]:
    """An operation by the affine matrix for an image and a signed strength."""
    return lambda image, draw: image.transform(
        image.size, Image.Transform.AFFINE, matrix(image, draw.strength * draw.sign), **draw.uncovered
    )


def _solarize_add(image: Image.Image, draw: _Draw) -> Image.Image:
    added = int(110 * draw.strength)
    table = [min(255, value + added) if value < 128 else value for value in range(256)]
    return image.point(table * len(image.getbands()))


def _enhance(kind: type) -> Callable[[Image.Image, _Draw], Image.Image]:
    return lambda image, draw: kind(image).enhance(1 + 0.9 * draw.strength * draw.sign)


#: Every operation of RandAugment by name.
OPERATIONS: dict[str, Callable[[Image.Image, _Draw], Image.Image]] = {
    "auto_contrast": lambda image, draw: ImageOps.autocontrast(image),
    "equalize": lambda image, draw: ImageOps.equalize(image),
    "invert": lambda image, draw: ImageChops.invert(image),
    "rotate": lambda image, draw: image.rotate(30 * draw.strength * draw.sign, **draw.uncovered),
    "posterize": lambda image, draw: ImageOps.posterize(image, max(1, 4 - int(4 * draw.strength))),
    "solarize": lambda image, draw: ImageOps.solarize(image, 256 - int(256 * draw.strength)),
    "solarize_add": _solarize_add,
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": _affine(lambda image, strength: (1, 0.3 * strength, 0, 0, 1, 0)),
    "shear_y": _affine(lambda image, strength: (1, 0, 0, 0.3 * strength, 1, 0)),
    "translate_x": _affine(lambda image, strength: (1, 0, 0.45 * strength * image.width, 0, 1, 0)),
    "translate_y": _affine(lambda image, strength: (1, 0, 0, 0, 1, 0.45 * strength * image.height)),
}


# -- random erasing, mixup, cutmix -------------------------------------------------------------------------------------


def erase(pixels: np.ndarray, probability: float, rng: np.random.Generator) -> np.ndarray:
    """Random erasing (Zhong et al., 2020): with ``probability``, a box of an image becomes normal noise.

    Args:
        pixels: ``[n, channels, height, width]``, normalised, floating; changed in place and returned. A box has 2 % to
            a third of the image's area and an aspect ratio of 0.3 to 3.3.
    """
    _, channels, height, width = pixels.shape
    for image in np.flatnonzero(rng.random(len(pixels)) < probability):
        for h, w in _draw_sides(height * width, (0.02, 1 / 3), (0.3, 3.3), rng):
            if 0 < h < height and 0 < w < width:
                top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
                pixels[image, :, top : top + h, left : left + w] = rng.standard_normal((channels, h, w))
                break
    return pixels


def one_hot(labels: np.ndarray, classes: int, smoothing: float = 0.0) -> np.ndarray:
    """Probabilities ``[n, classes]``, float32: of every label ``1 - smoothing``, and ``smoothing`` spread over all."""
    return np.eye(classes, dtype=np.float32)[labels] * np.float32(1 - smoothing) + np.float32(smoothing / classes)


def mix(
    pixels: np.ndarray, targets: np.ndarray, options: AugmentationArguments, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Mixup or cutmix of a whole batch; if both have an alpha, either with probability 1/2.

    Args:
        pixels: ``[n, channels, height, width]``, floating.
        targets: ``[n, classes]``, probabilities.

    Returns:
        Both, mixed; those given, if neither has an alpha.
    """
    if options.cutmix and (not options.mixup or rng.random() < 0.5):
        return cutmix(pixels, targets, rng.beta(options.cutmix, options.cutmix), rng)
    if options.mixup:
        return mixup(pixels, targets, rng.beta(options.mixup, options.mixup), rng)
    return pixels, targets


def mixup(
    pixels: np.ndarray, targets: np.ndarray, share: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """``share`` of each image and the rest of another one of the batch (Zhang et al., 2018); targets alike."""
    other, share = rng.permutation(len(pixels)), np.float32(share)
    return _blend(pixels, pixels[other], share), _blend(targets, targets[other], share)


def cutmix(
    pixels: np.ndarray, targets: np.ndarray, share: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A box of another image of the batch, at most ``1 - share`` of the area (Yun et al., 2019); targets by area."""
    other = rng.permutation(len(pixels))
    height, width = pixels.shape[-2:]
    rows, columns = random_box(height, width, share, rng)
    mixed = pixels.copy()
    mixed[..., rows, columns] = pixels[other][..., rows, columns]
    area = (rows.stop - rows.start) * (columns.stop - columns.start)
    return mixed, _blend(targets, targets[other], np.float32(1 - area / (height * width)))


def random_box(height: int, width: int, share: float, rng: np.random.Generator) -> tuple[slice, slice]:
    """Rows and columns of a box with ``1 - share`` of the area around a random pixel, cut off at the border."""
    sides = (round(height * np.sqrt(1 - share)), round(width * np.sqrt(1 - share)))
    centres = (rng.integers(height), rng.integers(width))
    begins = [max(0, centre - side // 2) for centre, side in zip(centres, sides)]
    ends = [min(n, centre - side // 2 + side) for n, centre, side in zip((height, width), centres, sides)]
    return slice(begins[0], ends[0]), slice(begins[1], ends[1])


def _blend(one: np.ndarray, other: np.ndarray, share: np.float32) -> np.ndarray:
    return share * one + (1 - share) * other
