"""Augmentation: what each operation keeps, that the generator alone decides, and labels that match the pixels."""

import numpy as np
import pytest
from PIL import Image

from recipes.shared import augmentation
from recipes.shared.augmentation import OPERATIONS, AugmentationArguments
from recipes.shared.checks import DataError


def rng(seed=0):
    return np.random.default_rng(seed)


def picture(mode="RGB", size=(20, 16), seed=0):
    """Noise over a ramp, so that no operation leaves it alone."""
    width, height = size
    ramp = np.linspace(20, 200, width)[None, :, None] + 40 * rng(seed).random((height, width, 3))
    return Image.fromarray(ramp.astype(np.uint8)).convert(mode)


def numbered(count=6, height=5, width=7, channels=1):
    """Every pixel has a value of its own, none is black."""
    values = np.arange(1, count * height * width * channels + 1, dtype=np.int64)
    return values.reshape(count, height, width, channels)


# -- crops and flips ---------------------------------------------------------------------------------------------------


def test_pad_and_crop_shifts_each_image_and_fills_with_black():
    images = numbered()
    shifted = augmentation.pad_and_crop(images, 2, rng())
    assert shifted.shape == images.shape and shifted.dtype == images.dtype
    seen = set()
    for image, result in zip(images, shifted):
        fits = []
        for down in range(-2, 3):
            for right in range(-2, 3):
                moved = np.zeros_like(image)
                moved[max(0, down) : 5 + min(0, down), max(0, right) : 7 + min(0, right)] = image[
                    max(0, -down) : 5 - max(0, down), max(0, -right) : 7 - max(0, right)
                ]
                if np.array_equal(moved, result):
                    fits.append((down, right))
        assert len(fits) == 1
        seen.add(fits[0])
    assert len(seen) > 2
    np.testing.assert_array_equal(augmentation.pad_and_crop(images, 0, rng()), images)


def test_flip_mirrors_about_half_of_the_images():
    images = numbered(count=400, height=2, width=3)
    flipped = augmentation.flip(images, rng())
    mirrored = (flipped == images[:, :, ::-1]).all((1, 2, 3))
    same = (flipped == images).all((1, 2, 3))
    assert (mirrored ^ same).all()
    assert 150 < mirrored.sum() < 250


def test_resized_crop_covers_the_area_it_may():
    # Left is 0, right is 255: the mean of a crop tells where it was; with min_area 1 only whole squares remain.
    image = Image.fromarray(np.tile(np.linspace(0, 255, 40, dtype=np.uint8), (40, 1)))
    generator = rng()
    small = [augmentation.resized_crop(image, 8, 0.08, generator, Image.Resampling.BILINEAR) for _ in range(200)]
    spans = [np.ptp(np.asarray(crop).astype(float)) / 255 for crop in small]
    assert {crop.size for crop in small} == {(8, 8)}
    assert 0.1 < min(spans) < 0.35 and max(spans) > 0.8
    whole = augmentation.resized_crop(image, 8, 1.0, generator, Image.Resampling.BILINEAR)
    assert np.ptp(np.asarray(whole).astype(float)) > 200
    thin = augmentation.resized_crop(Image.new("L", (100, 1), 7), 8, 0.9, generator, Image.Resampling.BILINEAR)
    assert thin.size == (8, 8) and set(np.unique(thin)) == {7}


# -- RandAugment -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_keeps_mode_and_size_and_changes_something(name, mode):
    image = picture(mode)
    fill = (3,) * len(image.getbands())
    for strength in (0.0, 0.5, 1.0):
        for sign in (-1.0, 1.0):
            result = OPERATIONS[name](image, augmentation._Draw(strength, sign, fill))
            assert (result.mode, result.size) == (image.mode, image.size)
    changed = not np.array_equal(np.asarray(result), np.asarray(image))
    assert changed or (name, mode) == ("color", "L")  # a grey image has no colours to change


@pytest.mark.parametrize(
    "name", ["rotate", "shear_x", "translate_y", "solarize_add", "color", "contrast", "brightness", "sharpness"]
)
def test_no_strength_is_no_change(name):
    image = picture()
    result = OPERATIONS[name](image, augmentation._Draw(0.0, 1.0, (0, 0, 0)))
    np.testing.assert_array_equal(np.asarray(result), np.asarray(image))


def test_geometric_operations_uncover_the_fill_colour():
    image = Image.new("RGB", (20, 20), (200, 200, 200))
    for name in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y"):
        result = np.asarray(OPERATIONS[name](image, augmentation._Draw(1.0, 1.0, (1, 2, 3))))
        uncovered = (result == (1, 2, 3)).all(-1).mean()
        assert 0.02 < uncovered < 0.6, name
    shifted = np.asarray(OPERATIONS["translate_x"](image, augmentation._Draw(1.0, 1.0, (1, 2, 3))))
    assert (shifted == (1, 2, 3)).all(-1).mean() == pytest.approx(0.45)


def test_rand_augment_depends_on_the_generator_alone():
    options = AugmentationArguments(randaugment_ops=2)

    def results(seed):
        generator = rng(seed)
        return [
            np.asarray(augmentation.rand_augment(picture(seed=i), options, generator, (1, 2, 3))) for i in range(12)
        ]

    for a, b in zip(results(1), results(1)):
        np.testing.assert_array_equal(a, b)
    assert sum(not np.array_equal(a, b) for a, b in zip(results(1), results(2))) > 6
    image = picture()
    assert augmentation.rand_augment(image, AugmentationArguments(), rng(), (0, 0, 0)) is image


# -- erasing and mixing ------------------------------------------------------------------------------------------------


def test_erasing_replaces_one_box_of_two_to_thirtythree_percent():
    pixels = np.full((400, 3, 32, 32), 99.0, dtype=np.float32)
    erased = augmentation.erase(pixels.copy(), 0.25, rng())
    changed = (erased != 99.0).all(1)
    np.testing.assert_array_equal(changed, (erased != 99.0).any(1))  # the same box in every channel
    touched = changed.any((1, 2))
    assert 70 < touched.sum() < 130
    areas = changed[touched].mean((1, 2))
    assert areas.min() > 0.015 and areas.max() < 0.35  # rounded to pixels
    for mask in changed[touched]:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    noise = erased[erased != 99.0]
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    np.testing.assert_array_equal(augmentation.erase(pixels.copy(), 0.0, rng()), pixels)


def test_smoothed_labels_are_those_of_cross_entropy():
    import torch
    from torch.nn.functional import cross_entropy

    logits, labels = torch.randn(5, 4), np.array([0, 3, 1, 1, 2])
    targets = augmentation.one_hot(labels, 4, 0.1)
    assert targets.dtype == np.float32
    np.testing.assert_allclose(targets.sum(1), 1, rtol=1e-6)
    expected = cross_entropy(logits, torch.from_numpy(labels), label_smoothing=0.1)
    torch.testing.assert_close(cross_entropy(logits, torch.from_numpy(targets)), expected)


def test_mixup_mixes_pixels_and_labels_with_one_share():
    # Image i is the constant i, so that the pixels tell the expected label.
    labels = np.arange(8)
    pixels = np.broadcast_to(labels[:, None, None, None], (8, 1, 4, 4)).astype(np.float32)
    mixed, targets = augmentation.mixup(pixels, augmentation.one_hot(labels, 8), 0.3, rng())
    np.testing.assert_allclose(targets.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(targets @ labels, mixed[:, 0, 0, 0], rtol=1e-5)
    assert mixed.dtype == np.float32 and targets.dtype == np.float32
    assert np.isclose(targets, 0.3).any()


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.97, 1.0])
def test_cutmix_labels_are_the_areas(share):
    labels = np.arange(8)
    pixels = np.broadcast_to(labels[:, None, None, None], (8, 2, 9, 11)).astype(np.float32)
    for seed in range(10):
        mixed, targets = augmentation.cutmix(pixels, augmentation.one_hot(labels, 8), share, rng(seed))
        areas = np.stack([(mixed[:, 0] == label).mean((1, 2)) for label in labels], axis=1)
        np.testing.assert_allclose(targets, areas, atol=1e-6)
        own = areas[np.arange(8), labels]
        assert (own >= share - 0.08).all()  # the box is cut off at the border, never larger, up to rounding
    if share == 1.0:
        np.testing.assert_array_equal(mixed, pixels)


def test_mix_takes_either_or_none():
    labels = np.arange(16)
    pixels = np.broadcast_to(labels[:, None, None, None], (16, 1, 8, 8)).astype(np.float32)
    targets = augmentation.one_hot(labels, 16)
    same = augmentation.mix(pixels, targets, AugmentationArguments(mixup=0.0, cutmix=0.0), rng())
    assert same[0] is pixels and same[1] is targets

    def is_cutmix(mixed):
        return np.isin(mixed, labels).all()

    kinds = [
        is_cutmix(augmentation.mix(pixels, targets, AugmentationArguments(mixup=0.8, cutmix=1.0), rng(seed))[0])
        for seed in range(40)
    ]
    assert 10 < sum(kinds) < 30
    assert all(
        is_cutmix(augmentation.mix(pixels, targets, AugmentationArguments(mixup=0.0, cutmix=1.0), rng(seed))[0])
        for seed in range(5)
    )
    assert not any(
        is_cutmix(augmentation.mix(pixels, targets, AugmentationArguments(mixup=0.8, cutmix=0.0), rng(seed))[0])
        for seed in range(5)
    )


@pytest.mark.parametrize(
    "values",
    [
        {"crop": "centre"},
        {"crop_padding": -1},
        {"crop_min_area": 0.0},
        {"randaugment_magnitude": 11},
        {"random_erasing": 1.5},
        {"mixup": -0.1},
        {"cutmix": float("nan")},
    ],
    ids=str,
)
def test_impossible_options_are_named(values):
    with pytest.raises(DataError, match=f"--{next(iter(values))} must be"):
        AugmentationArguments(**values)
