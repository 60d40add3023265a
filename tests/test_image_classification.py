"""The image classification recipe: data of every kind, augmentation across resumption, metrics, refusals."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from models import make
from PIL import Image
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    ViTForImageClassification,
    ViTImageProcessorPil,
    pipeline,
)
from transformers.image_utils import load_image

import hf_multimax
from hf_multimax import patch_model
from recipes import image_classification
from recipes.image_classification import add_stochastic_depth, image_loss, image_shape
from recipes.shared import record
from recipes.shared.augmentation import AugmentationArguments
from recipes.shared.checks import DataError
from recipes.shared.data import images
from recipes.shared.data.image_batches import ImageBatches
from recipes.shared.data.images import ArrayImages, ImageArguments, load_images, read_folder
from recipes.shared.run import parse

ROOT = Path(__file__).resolve().parent.parent
SIZE, CLASSES = 8, ("ankle boot", "bag", "coat", "dress")
TINY = {
    "model_config": {
        "image_size": SIZE,
        "patch_size": 4,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    },
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "learning_rate": 0.01,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_steps": 2,
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
}
EVERYTHING = {
    "crop": "pad",
    "crop_padding": 1,
    "flip": True,
    "randaugment_ops": 2,
    "random_erasing": 0.5,
    "mixup": 0.8,
    "cutmix": 1.0,
    "label_smoothing_factor": 0.1,
    "stochastic_depth": 0.5,
}


def draw(label, seed, size=SIZE, mode="L"):
    """Tiles with a bright half, above, below, left or right, which is the class, in noise."""
    pixels = np.random.default_rng([label, seed]).integers(0, 100, (size, size))
    place = np.indices((size, size))[label // 2 % 2] % 4
    pixels[place // 2 == label % 2] += 150
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


def write_images(folder, counts, **options):
    """``counts``: images of each class for each split."""
    for number, (split, count) in enumerate(counts.items()):
        for label, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                draw(label, 100 * number + i, **options).save(folder / split / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), {"train": 4, "validation": 3})


def run(folder, *options, **values):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**TINY, **values}), encoding="utf-8")
    arguments = [str(path), "--output_dir", str(folder / "out"), *options]
    return image_classification.main(*image_classification.RECIPE, arguments)


def losses(results):
    return [(point["step"], point[key]) for point in results["curve"] for key in ("loss", "eval_loss") if key in point]


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "scalars"),
    [({"normalizer": "softmax"}, 0), ({"output": True}, 24), ({"model_config": {"model_type": "vit"}}, 16)],
    ids=["softmax", "attention+output", "vit"],
)
def test_a_run_from_scratch_writes_results_and_a_model_that_loads(tmp_path, data, options, scalars):
    options = {**options, "model_config": {**TINY["model_config"], **options.get("model_config", {})}}
    results = run(tmp_path, data=str(data), **EVERYTHING, **options)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(results))
    assert results["task"] == "image-classification"
    assert results["model"]["multimax_parameters"] == scalars
    assert results["data"]["training_examples"] == 16 and results["data"]["evaluation_examples"] == 12
    assert results["data"]["augmentation"]["mixup"] == 0.8 and results["data"]["label_smoothing"] == 0.1
    assert [step for step, _ in losses(results)] == [1, 2, 2, 3, 4, 4, 4]
    assert len([layer for layer in results["layers"] if "layer" in layer]) == 2
    check_metrics(tmp_path / "out", data, results["metrics"])


def check_metrics(folder, data, metrics):
    """The figures again, from the files with what was saved."""
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = ViTImageProcessorPil.from_pretrained(folder)
    logits, labels = [], []
    with torch.no_grad():
        for path in sorted(data.glob("validation/*/*.png")):
            logits.append(model(**processor(Image.open(path), return_tensors="pt")).logits[0])
            labels.append(model.config.label2id[path.parent.name])
    logits, labels = torch.stack(logits), torch.tensor(labels)
    assert list(model.config.id2label.values()) == list(CLASSES)
    assert metrics["loss"] == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-5)
    assert metrics["accuracy"] == pytest.approx((logits.argmax(-1) == labels).double().mean().item())
    assert metrics["top5_accuracy"] == 1.0  # of four classes


def test_a_pipeline_gives_the_same_logits(tmp_path, data):
    results = run(tmp_path, data=str(data), output=True, max_steps=1)
    processor = ViTImageProcessorPil.from_pretrained(tmp_path / "out")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    classify = pipeline("image-classification", model=model, image_processor=processor)
    files = sorted(data.glob("validation/*/*.png"))
    held_out = read_folder(data / "validation")
    batches = ImageBatches(held_out, np.arange(len(held_out)), processor, SIZE, 3)
    with torch.no_grad():
        logits = model.eval()(pixel_values=batches.__getitems__(list(range(len(files))))[0]["pixel_values"]).logits
    for path, row in zip(files, logits):
        scores = {p["label"]: p["score"] for p in classify(str(path), function_to_apply="none", top_k=4)}
        assert [scores[name] for name in CLASSES] == pytest.approx(row.tolist(), abs=1e-5)
    assert results["data"]["classes"] == 4


def test_it_learns(tmp_path):
    data = write_images(tmp_path / "data", {"train": 24, "test": 6})
    often = {"max_steps": 40, "per_device_train_batch_size": 16, "eval_strategy": "no", "save_strategy": "no"}
    assert run(tmp_path, data=str(data), **often)["metrics"]["accuracy"] > 0.9


def test_resumed_equals_uninterrupted_whatever_makes_the_batches(tmp_path, data, monkeypatch):
    """Two epochs and a half; interrupted in the second, resumed with workers."""
    values = {"data": str(data), "max_steps": 10, "save_steps": 6, "eval_strategy": "no", "output": True, **EVERYTHING}
    whole = run(tmp_path, **values)
    (tmp_path / "out").rename(tmp_path / "whole")

    class Interruption(record.Costs):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 7:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(record, "Costs", Interruption)
        run(tmp_path, **values)
    resumed = run(tmp_path, "--resume_from_checkpoint", "last", dataloader_num_workers=1, **values)
    assert losses(resumed) == losses(whole) and len(losses(whole)) == 11
    assert resumed["metrics"] == whole["metrics"]
    assert resumed["training"]["resumed"]


def test_two_processes_give_what_one_gives_with_the_double_batch(tmp_path, data):
    values = {"data": str(data), "label_smoothing_factor": 0.1, "max_eval_images": 11}
    one = run(tmp_path, **values)
    (tmp_path / "out").rename(tmp_path / "one")
    half = {**TINY, **values, "per_device_train_batch_size": 2, "ddp_backend": "gloo"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(half))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "recipes.image_classification", str(tmp_path / "config.yaml")]
    command += ["--output_dir", str(tmp_path / "out"), "--use_cpu", "true"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "out" / "results.json").read_text())
    assert two["training"]["world_size"] == 2 and two["training"]["wrapper"] == "DistributedDataParallel"
    train = [[p["loss"] for p in results["curve"] if "loss" in p] for results in (one, two)]
    assert train[0] == pytest.approx(train[1], rel=1e-4)
    for name, value in one["metrics"].items():
        assert two["metrics"][name] == pytest.approx(value, rel=1e-4), name


def test_accumulated_batches_with_soft_labels_give_what_whole_ones_give(tmp_path, data):
    values = {"data": str(data), "label_smoothing_factor": 0.2, "eval_strategy": "no"}
    whole = run(tmp_path, per_device_train_batch_size=8, **values)
    (tmp_path / "out").rename(tmp_path / "whole")
    parts = run(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2, **values)
    assert [loss for _, loss in losses(parts)] == pytest.approx([loss for _, loss in losses(whole)], rel=1e-4)


def test_evaluation_leaves_no_image_out(tmp_path, data):
    """11 images in batches of four, where training drops the incomplete last batch."""
    results = run(tmp_path, data=str(data), max_eval_images=11, dataloader_drop_last=True, eval_strategy="no")
    assert round(results["metrics"]["accuracy"] * 11) == pytest.approx(results["metrics"]["accuracy"] * 11, abs=1e-5)
    assert results["data"]["evaluation_examples"] == 11


@pytest.mark.slow
def test_the_small_config_learns_on_the_real_images(tmp_path):
    config = ROOT / "recipes" / "configs" / "image_fashion_small.yaml"
    options = ["--output_dir", str(tmp_path / "out"), "--max_steps", "40", "--max_eval_images", "500"]
    results = image_classification.main(*image_classification.RECIPE, [str(config), *options, "--use_cpu", "true"])
    assert results["metrics"]["accuracy"] > 0.4 and results["metrics"]["top5_accuracy"] > 0.8


# -- fine-tuning -------------------------------------------------------------------------------------------------------


def test_a_checkpoint_gets_a_new_head_for_other_classes_and_keeps_the_rest(tmp_path, data, caplog):
    stock = make("ViTForImageClassification", num_channels=3, image_size=SIZE)
    stock.save_pretrained(tmp_path / "checkpoint")
    ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}, image_mean=[0.1] * 3).save_pretrained(
        tmp_path / "checkpoint"
    )
    with caplog.at_level(logging.INFO, logger="recipes"):
        results = run(
            tmp_path, "--model", str(tmp_path / "checkpoint"), data=str(data), max_steps=1, learning_rate=1e-12
        )
    assert "has 3 classes and the data 4: a new head is trained" in caplog.text
    tuned = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert hf_multimax.is_patched(tuned) and tuned.config.multimax["init"] == "identity"
    weights = stock.state_dict()
    for name, value in tuned.state_dict().items():
        if "classifier" not in name and "multimax" not in name:
            torch.testing.assert_close(value, weights[name], atol=1e-6, rtol=0)
    assert tuned.classifier.weight.shape == (4, 32)
    assert list(ViTImageProcessorPil.from_pretrained(tmp_path / "out").image_mean) == [0.1] * 3
    check_metrics(tmp_path / "out", data, results["metrics"])


def test_a_processor_that_does_not_fit_the_model_is_refused(tmp_path, data):
    make("ViTForImageClassification", num_channels=1, image_size=SIZE).save_pretrained(tmp_path / "c")
    for options, message in (
        ({"image_mean": [0.5], "image_std": [0.5]}, "makes 16x16 pixels, but the model takes 8x8"),
        ({"image_mean": [0.5] * 3}, "cannot make 1 channels"),
    ):
        ViTImageProcessorPil(size={"height": 16, "width": 16}, **options).save_pretrained(tmp_path / "c")
        with pytest.raises(SystemExit, match=message):
            run(tmp_path, data=str(data), model=str(tmp_path / "c"))


def test_a_patched_checkpoint_is_trained_on(tmp_path, data):
    first = run(tmp_path, data=str(data), output=True, order=1)
    (tmp_path / "out").rename(tmp_path / "checkpoint")
    options = {"data": str(data), "model": str(tmp_path / "checkpoint"), "max_steps": 1, "learning_rate": 1e-12}
    again = run(tmp_path, **options)
    assert again["multimax"]["order"] == 1
    assert again["metrics"]["loss"] == pytest.approx(first["metrics"]["loss"], rel=1e-5)


# -- data --------------------------------------------------------------------------------------------------------------


def arrays(count=12, size=SIZE, classes=4):
    labels = np.arange(count) % classes
    return np.stack([np.asarray(draw(label, i, size)) for i, label in enumerate(labels)]), labels.astype(np.uint8)


def built_in(monkeypatch, **options):
    def parts():
        pixels, labels = arrays(**options)
        return {name: ArrayImages(name, images.FASHION_MNIST_CLASSES, labels, pixels) for name in ("train", "test")}

    monkeypatch.setattr(images, "fashion_mnist", parts)


def test_the_built_in_images_are_normalised_by_their_own_statistics(tmp_path, monkeypatch):
    built_in(monkeypatch)
    results = run(tmp_path, data="fashion-mnist", max_steps=1)
    pixels = arrays()[0] / 255
    processor = ViTImageProcessorPil.from_pretrained(tmp_path / "out")
    assert processor.image_mean == pytest.approx([pixels.mean()] * 3, abs=1e-4)
    assert processor.image_std == pytest.approx([pixels.std()] * 3, abs=1e-4)
    assert results["data"]["licence"] == "MIT" and results["data"]["classes"] == 10


@pytest.mark.parametrize("shape", [(12, SIZE, SIZE), (12, SIZE, SIZE, 3)], ids=["grey", "colour"])
def test_images_in_memory_become_the_pixels_that_the_processor_makes(shape):
    values = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    source = ArrayImages("numbers", CLASSES, np.zeros(12), values)
    options = {"image_mean": [0.2, 0.3, 0.4], "image_std": [0.5, 0.6, 0.7], "do_convert_rgb": True, "resample": 3}
    processor = ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}, **options)
    batch = ImageBatches(source, np.arange(12), processor, SIZE, 3).__getitems__([3, 1])[0]
    expected = processor([Image.fromarray(values[i]) for i in (3, 1)], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch["pixel_values"], expected)
    plain = ImageBatches(source, np.arange(12), processor, SIZE, 3, AugmentationArguments())
    torch.testing.assert_close(plain.__getitems__([3, 1])[0]["pixel_values"], expected)
    torch.testing.assert_close(plain[3]["pixel_values"], expected[0])


@pytest.mark.parametrize("crop", ["none", "pad", "resized"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_any_size_and_mode_fit_the_model(tmp_path, crop, channels):
    for i, mode in enumerate(("L", "RGB", "RGBA", "P", "1", "LA")):
        (tmp_path / "a").mkdir(exist_ok=True)
        draw(i % 4, 0, size=10 + 3 * i).convert(mode).save(tmp_path / "a" / f"{i}.png")
    source = read_folder(tmp_path)
    processor = ViTImageProcessorPil(
        size={"shortest_edge": 10},
        do_center_crop=True,
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * channels,
        image_std=[0.5] * channels,
        do_convert_rgb=channels == 3,
    )
    options = {**EVERYTHING, "crop": crop}
    augmentation = AugmentationArguments(
        **{k: v for k, v in options.items() if k not in ("label_smoothing_factor", "stochastic_depth")}
    )
    for chosen in (None, augmentation):
        batches = ImageBatches(source, np.arange(6), processor, SIZE, channels, chosen)
        batch = batches.__getitems__(list(range(6)))[0]
        assert batch["pixel_values"].shape == (6, channels, SIZE, SIZE)
        assert batch["pixel_values"].dtype == torch.float32 and torch.isfinite(batch["pixel_values"]).all()


def test_an_augmented_batch_depends_on_seed_and_images_only():
    pixels, labels = arrays()
    source = ArrayImages("digits", CLASSES, labels, pixels)
    processor = ViTImageProcessorPil(size={"height": SIZE, "width": SIZE})
    augmentation = AugmentationArguments(crop="pad", flip=True, randaugment_ops=2, mixup=0.8)

    def batch(places, seed=0, before=()):
        batches = ImageBatches(source, np.arange(12), processor, SIZE, 3, augmentation, seed=seed)
        for other in before:
            batches.__getitems__(other)
        return batches.__getitems__(places)[0]

    one = batch([0, 5, 7])
    same = batch([0, 5, 7], before=([1, 2], [3]))
    assert all(torch.equal(one[name], same[name]) for name in one)
    torch.testing.assert_close(one["labels"].sum(1), torch.ones(3))
    for other in (batch([0, 5, 7], seed=1), batch([5, 0, 7])):
        assert not torch.equal(one["pixel_values"], other["pixel_values"])


def hub_splits(names=CLASSES, labels=(0, 1, 2, 3), label="label", feature=None, image="image"):
    feature = feature or datasets.ClassLabel(names=list(names))
    features = datasets.Features({image: datasets.Image(), label: feature})

    def split(values):
        rows = {image: [draw(i % 4, i, mode="RGB") for i in range(len(values))], label: list(values)}
        return datasets.Dataset.from_dict(rows, features=features)

    return datasets.DatasetDict(train=split((0, 1, 2, 3) if feature.dtype == "int64" else "abcd"), test=split(labels))


def test_a_data_set_of_the_hub(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *name: asked.append(name) or hub_splits())
    results = run(tmp_path, data="someone/things:small", max_steps=1, eval_strategy="no")
    assert asked == [("someone/things", "small")]
    assert results["data"]["dataset"] == "someone/things" and results["data"]["evaluation_examples"] == 4

    train, held_out = load_images(ImageArguments("someone/things"))
    assert train.classes == list(CLASSES) and held_out.labels.tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(np.asarray(train.read(1)), np.asarray(draw(1, 1, mode="RGB")))

    text = hub_splits(labels="dcba", label="kind", feature=datasets.Value("string"), image="img")
    monkeypatch.setattr(datasets, "load_dataset", lambda *name: text)
    train, held_out = load_images(ImageArguments("someone/things", label_column="kind"))
    assert train.classes == list("abcd") and held_out.labels.tolist() == [3, 2, 1, 0]


def test_wrong_data_sets_of_the_hub_are_refused(monkeypatch):
    splits = hub_splits(labels=(0, 1, -1, -1))
    monkeypatch.setattr(datasets, "load_dataset", lambda *name: splits)
    with pytest.raises(DataError, match=r"image 2 of a/b \(test\) has the label -1, outside its 4 classes"):
        load_images(ImageArguments("a/b"))
    with pytest.raises(DataError, match="no split 'dev' .it has train, test.: give --validation_split"):
        load_images(ImageArguments("a/b", validation_split="dev"))
    with pytest.raises(DataError, match="no column kind"):
        load_images(ImageArguments("a/b", label_column="kind"))
    splits = hub_splits(label="kind", feature=datasets.Value("string"), labels="abcx")
    with pytest.raises(DataError, match="no one label column among image, kind: give --label_column"):
        load_images(ImageArguments("a/b"))
    with pytest.raises(DataError, match="outside its 4 classes"):
        load_images(ImageArguments("a/b", label_column="kind"))

    def unreachable(*name):
        raise ConnectionError("no route\nto anywhere")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match="cannot be read from the Hub: no route$"):
        load_images(ImageArguments("a/b"))


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_bad_input_is_one_sentence_before_anything_is_written(tmp_path, data, monkeypatch):
    (tmp_path / "empty" / "train" / "cats").mkdir(parents=True)
    (tmp_path / "empty" / "test").mkdir()
    one_split = write_images(tmp_path / "one", {"train": 1})
    no_classes = tmp_path / "flat"
    for split in ("train", "val"):
        (no_classes / split).mkdir(parents=True)
        draw(0, 0).save(no_classes / split / "0.png")
    strange = write_images(tmp_path / "strange", {"train": 1, "test": 1})
    (strange / "test" / "bag").rename(strange / "test" / "zebra")
    truncated = write_images(tmp_path / "truncated", {"train": 2, "test": 1}, size=64)
    file = truncated / "train" / "coat" / "1.png"
    file.write_bytes(file.read_bytes()[:1500])
    text = write_images(tmp_path / "text", {"train": 1, "test": 1})
    (text / "test" / "dress" / "0.png").write_text("no image")
    regression = tmp_path / "three_channels"
    make("ViTForImageClassification", num_channels=4).save_pretrained(regression)
    model_config = TINY["model_config"]
    cases = [
        ({"data": str(tmp_path / "nowhere")}, "there is no folder"),
        ({"data": str(one_split)}, "has no split 'validation'"),
        ({"data": str(data), "validation_split": "dev"}, "has no split 'dev' (it has train, validation)"),
        ({"data": str(tmp_path / "empty")}, "there is no image (.png"),
        ({"data": str(no_classes)}, "has no folder of images for each class"),
        ({"data": str(strange)}, "zebra is a class that the training images do not have"),
        ({"data": str(truncated)}, "coat/1.png cannot be read"),
        ({"data": str(text)}, "dress/0.png cannot be read"),
        ({"model_config": {**model_config, "patch_size": 3}}, "images of 8x8 do not fit patches of 3x3"),
        ({"model_config": {**model_config, "num_labels": 3}}, "num_labels 3, but the data has 4 classes"),
        ({"model_config": {**model_config, "num_channels": 2}}, "the model wants 2 channels"),
        ({"model": str(regression)}, "the model wants 4 channels"),
        ({"model_config": {**model_config, "image_size": [8, 4]}}, "must take square images"),
        ({"stochastic_depth": 1.0}, "--stochastic_depth must be"),
        ({"eval_crop": 0.0}, "--eval_crop must be"),
        ({"max_train_images": 0}, "--max_train_images must be positive"),
        ({"mixup": -1.0}, "--mixup must be at least 0"),
    ]
    for values, message in cases:
        with pytest.raises(SystemExit) as stop:
            run(tmp_path, **{"data": str(data), **values})
        said = str(stop.value)
        assert said.startswith("error: ") and "\n" not in said and message in said, (values, said)
        assert not (tmp_path / "out").exists()
    built_in(monkeypatch, classes=11)
    with pytest.raises(SystemExit, match="has the label 10, outside its 10 classes"):
        run(tmp_path)


def test_an_unchecked_broken_image_is_named_when_it_is_met(tmp_path):
    folder = write_images(tmp_path / "data", {"train": 1, "test": 1})
    (folder / "train" / "bag" / "0.png").write_bytes(b"")
    with pytest.raises(DataError, match="bag/0.png cannot be read"):
        run(tmp_path, data=str(folder), check_images=False)


def test_photos_are_turned_as_they_are_meant(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned by 90 degrees
    (tmp_path / "train" / "cats").mkdir(parents=True)
    path = tmp_path / "train" / "cats" / "0.jpg"
    Image.new("RGB", (30, 20)).save(path, exif=exif)
    assert read_folder(tmp_path / "train").read(0).size == load_image(str(path)).size == (20, 30)


def test_images_of_16_bits_are_refused(tmp_path):
    (tmp_path / "train" / "cats").mkdir(parents=True)
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(tmp_path / "train" / "cats" / "0.png")
    with pytest.raises(DataError, match=r"^\S*0.png has more than 8 bits a channel"):
        read_folder(tmp_path / "train").read(0)


# -- parts -------------------------------------------------------------------------------------------------------------


def test_the_model_is_the_authors_shape():
    config = image_classification.new_config(dict(image_classification.DEFAULT_CONFIG), {"num_labels": 10})
    model = AutoModelForImageClassification.from_config(config)
    names = [name for name, _ in model.named_parameters()]
    assert not any("cls" in name or "head" in name for name in names)
    assert model.vision_model.embeddings.position_embedding.weight.shape[0] == 49


@pytest.mark.parametrize("name", ["deit_small_imagenet", "deit_base_imagenet", "vit_base_finetune"])
def test_the_large_configs_are_understood(name, monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.training_args.TrainingArguments.__post_init__", lambda self: None)
    path = str(ROOT / "recipes" / "configs" / f"{name}.yaml")
    options, arguments, augmentation, training = parse("x", image_classification.RECIPE[1], [path])
    assert augmentation.crop == "resized" and training.output_dir
    if name.startswith("deit"):
        values = {**image_classification.DEFAULT_CONFIG, **options.model_config}
        with torch.device("meta"):
            config = image_classification.new_config(values, {"num_labels": 1000})
            model = AutoModelForImageClassification.from_config(config)
        assert image_shape(config) == (224, 3)
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        assert millions == pytest.approx({"deit_small_imagenet": 22, "deit_base_imagenet": 86}[name], abs=1)
        assert arguments.stochastic_depth == 0.1 and augmentation.cutmix == 1.0


@pytest.mark.parametrize("name", ["SiglipForImageClassification", "ViTForImageClassification"])
def test_stochastic_depth_drops_branches_of_samples_in_training_only(name):
    model = patch_model(make(name))
    pixels = torch.randn(1, 1, 16, 16).expand(64, -1, -1, -1)
    with torch.no_grad():
        before, keys = model(pixel_values=pixels).logits, model.state_dict().keys()
        add_stochastic_depth(model, 0.5)
        assert torch.equal(model(pixel_values=pixels).logits, before)
        assert model.state_dict().keys() == keys
        torch.manual_seed(0)
        rows = model.train()(pixel_values=pixels).logits
    # Only the second of two blocks drops: attention, MLP, both or none, for each image by itself.
    assert len({tuple(round(v, 4) for v in row.tolist()) for row in rows}) == 4


def test_stochastic_depth_keeps_the_expectation_and_grows_linearly():
    for rate in (0.1, 0.5):
        hook = image_classification._BranchDrop(rate)
        module = torch.nn.Identity().train()
        output, weights = hook(module, (), (torch.ones(20_000, 2, 3), "weights"))
        assert weights == "weights"
        assert (output == output[:, :1, :1]).all()  # whole samples
        assert (output == 0).float().mean().item() == pytest.approx(rate, abs=0.02)
        assert output.mean().item() == pytest.approx(1, abs=0.05)
        assert hook(module.eval(), (), output) is None

    model = make("ViTForImageClassification", num_hidden_layers=5)
    add_stochastic_depth(model, 0.2)
    hooks = [
        hook
        for module in model.modules()
        for hook in module._forward_hooks.values()
        if isinstance(hook, image_classification._BranchDrop)
    ]
    assert sorted(hook.rate for hook in hooks) == pytest.approx([0.05, 0.05, 0.1, 0.1, 0.15, 0.15, 0.2, 0.2])


def test_stochastic_depth_of_an_unknown_block_is_refused():
    model = make("MarianForCausalLM")
    with pytest.raises(DataError, match="MarianForCausalLM is in a MarianDecoderLayer"):
        add_stochastic_depth(model, 0.1)


def test_the_loss_takes_numbers_and_probabilities():
    logits = torch.randn(6, 4)
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    outputs = type("Outputs", (), {"logits": logits})
    expected = cross_entropy(logits, labels)
    soft = torch.eye(4)[labels]
    torch.testing.assert_close(image_loss(outputs, labels), expected)
    torch.testing.assert_close(image_loss(outputs, soft), expected)
    torch.testing.assert_close(image_loss(outputs, labels, torch.tensor(12)), expected / 2)
    torch.testing.assert_close(image_loss(outputs, soft, soft.ne(-100).sum() * 2), expected / 2)


def test_a_checkpoint_without_processor_gets_one(tmp_path, data):
    make("ViTForImageClassification", num_channels=3, image_size=SIZE, num_labels=4).save_pretrained(tmp_path / "c")
    run(tmp_path, data=str(data), model=str(tmp_path / "c"), max_steps=1, normalizer="softmax")
    assert ViTImageProcessorPil.from_pretrained(tmp_path / "out").size["height"] == SIZE
    assert type(AutoModelForImageClassification.from_pretrained(tmp_path / "out")) is ViTForImageClassification
    assert AutoConfig.from_pretrained(tmp_path / "out").id2label[0] == CLASSES[0]
