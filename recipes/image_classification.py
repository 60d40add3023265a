"""Image classification: pre-train from scratch or fine-tune a checkpoint, with any normalizer.

    python -m recipes.image_classification recipes/configs/image_fashion_small.yaml
    python -m recipes.image_classification recipes/configs/image_fashion_small.yaml --normalizer softmax --output_dir o
    python -m recipes.image_classification recipes/configs/vit_base_finetune.yaml --data my_images

A folder has the layout ``train/<class>/<image>`` and ``validation/<class>/<image>``. The default architecture is the
authors': no class token, mean pooling, which is SigLIP's vision classifier. The image processor that is saved with the
model does what the evaluation here does, so that a pipeline gives the same logits (for models of three channels:
pipelines make every image RGB).
"""

import logging
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    ViTImageProcessorPil,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from hf_multimax.training import MultiMaxTrainingArguments
from recipes.shared.augmentation import AugmentationArguments
from recipes.shared.checks import DataError, explained
from recipes.shared.data.image_batches import MODES, ImageBatches, only
from recipes.shared.data.images import (
    BUILT_IN,
    ArrayImages,
    ImageArguments,
    LabelledImages,
    check_readable,
    load_images,
)
from recipes.shared.data.sources import describe
from recipes.shared.metrics import compute
from recipes.shared.models import ModelArguments, build_model
from recipes.shared.run import Job, main

logger = logging.getLogger(__name__)

VISION_MODEL = "siglip_vision_model"
DEFAULT_CONFIG = {
    "model_type": VISION_MODEL,
    "image_size": 28,
    "patch_size": 4,
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 192,
}


def make_job(
    options: ModelArguments,
    arguments: ImageArguments,
    augmentation: AugmentationArguments,
    training: MultiMaxTrainingArguments,
) -> Job:
    """Finds the images, makes or loads model and image processor."""
    with training.main_process_first(desc="reading the data"):
        train, held_out = load_images(arguments)
        chosen = choose(train, arguments.max_train_images), choose(held_out, arguments.max_eval_images)
        if arguments.check_images and training.local_process_index == 0 and not isinstance(train, ArrayImages):
            for images, indices in zip((train, held_out), chosen):
                check_readable(images, indices, quiet=training.disable_tqdm)
    model = build_model(options, lambda: stock_model(options, train.classes), training.seed)
    size, channels = image_shape(model.config)
    processor = load_processor(options, arguments, train, size, channels)
    add_stochastic_depth(model, arguments.stochastic_depth)
    smoothing = training.label_smoothing_factor
    shape = {"processor": processor, "size": size, "channels": channels}
    return Job(
        task="image-classification",
        model=model,
        processing_class=processor,
        train_dataset=ImageBatches(
            train, chosen[0], **shape, augmentation=augmentation, smoothing=smoothing, seed=training.seed
        ),
        eval_dataset=ImageBatches(held_out, chosen[1], **shape),
        collator=only,
        evaluate=evaluate,
        data={
            **describe(arguments.data, (BUILT_IN,)),
            "training_examples": len(chosen[0]),
            "evaluation_examples": len(chosen[1]),
            "classes": len(train.classes),
            "image_size": size,
            "augmentation": augmentation.chosen(),
            "label_smoothing": smoothing,
            "stochastic_depth": arguments.stochastic_depth,
        },
        headline=("accuracy", "top5_accuracy", "loss"),
        metrics=("topk_accuracy",),
        # The models' own losses take no probabilities as labels.
        trainer_options={"compute_loss_func": image_loss, "compute_metrics": compute_metrics},
    )


def choose(images: LabelledImages, most: int | None) -> np.ndarray:
    """The same random choice for every seed, in the order of the images."""
    if most is None or most >= len(images):
        return np.arange(len(images))
    return np.sort(np.random.default_rng(0).permutation(len(images))[:most])


# -- the model and its image processor ---------------------------------------------------------------------------------


def stock_model(options: ModelArguments, classes: list[str]) -> PreTrainedModel:
    """The classifier with a head for ``classes``, new or from a checkpoint."""
    names = {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
    if options.model is None:
        config = new_config({**DEFAULT_CONFIG, **options.model_config}, names)
        if config.num_labels != len(classes):
            raise DataError(f"model_config has num_labels {config.num_labels}, but the data has {len(classes)} classes")
        image_shape(config)
        return AutoModelForImageClassification.from_config(config)
    config = AutoConfig.from_pretrained(options.model)
    if config.num_labels != len(classes):
        logger.info(
            f"the head of {options.model} has {config.num_labels} classes and the data {len(classes)}: "
            "a new head is trained"
        )
    image_shape(config)
    return AutoModelForImageClassification.from_pretrained(
        options.model, ignore_mismatched_sizes=True, dtype=torch.float32, **names
    )


def new_config(values: dict[str, Any], names: dict[str, Any]) -> PreTrainedConfig:
    """The config of an architecture; that of SigLIP's vision encoder becomes its classifier's."""
    values = dict(values)
    kind = values.pop("model_type")
    if kind != VISION_MODEL:
        return AutoConfig.for_model(kind, **{**names, **values})
    asked = {"num_labels": values.pop("num_labels")} if "num_labels" in values else names
    vision = {"vision_use_head": False, **values}  # the classifier pools by the mean, the head would be dead weight
    text = {"bos_token_id": None, "eos_token_id": None}  # the classifier has no text model: only its config is there
    return AutoConfig.for_model("siglip", vision_config=vision, text_config=text, **asked)


def image_shape(config: PreTrainedConfig) -> tuple[int, int]:
    """Height = width and the number of channels of a model's images.

    Raises:
        DataError: for images that are not square, do not fit the patches, or cannot be had with so many channels.
    """
    vision = getattr(config, "vision_config", config)
    size, patch = (getattr(vision, name, None) for name in ("image_size", "patch_size"))
    size, patch = (
        value[0] if isinstance(value, list | tuple) and len(set(value)) == 1 else value for value in (size, patch)
    )
    if not isinstance(size, int):
        raise DataError(f"the model must take square images, but its image_size is {size}")
    if isinstance(patch, int) and size % patch:
        raise DataError(
            f"images of {size}x{size} do not fit patches of {patch}x{patch}: choose a multiple as image_size"
        )
    channels = getattr(vision, "num_channels", 3)
    if channels not in MODES:
        raise DataError(f"the model wants {channels} channels, but images are read in 1 (grey) or 3 (colour)")
    return size, channels


def load_processor(
    options: ModelArguments, arguments: ImageArguments, train: LabelledImages, size: int, channels: int
) -> ViTImageProcessorPil:
    """The checkpoint's image processor if it has one, else one for the size, with mean and spread of the data."""
    if options.model is not None:
        try:
            processor = ViTImageProcessorPil.from_pretrained(options.model, do_convert_rgb=channels == 3)
        except OSError:
            logger.info(f"{options.model} has no image processor: a new one is saved with the model")
        else:
            check_processor(processor, options.model, size, channels)
            return processor
    mean, std = pixel_statistics(train, channels)
    crop = {"size": {"height": size, "width": size}}
    if arguments.eval_crop < 1:
        edge = {"shortest_edge": round(size / arguments.eval_crop)}
        crop = {"size": edge, "do_center_crop": True, "crop_size": {"height": size, "width": size}}
    return ViTImageProcessorPil(
        **crop,
        resample=PILImageResampling.BICUBIC,
        do_convert_rgb=channels == 3,
        image_mean=mean,
        image_std=std,
    )


def check_processor(processor: ViTImageProcessorPil, name: str, size: int, channels: int) -> None:
    """DataError if the processor makes something else of an image than the model takes."""
    blank = Image.new(MODES[channels], (size + 1, size))
    with explained(f"the image processor of {name} cannot make {channels} channels", ValueError):
        shape = processor(blank, return_tensors="np")["pixel_values"].shape[1:]
    if shape != (channels, size, size):
        raise DataError(
            f"the image processor of {name} makes {shape[1]}x{shape[2]} pixels, but the model takes {size}x{size}"
        )


def pixel_statistics(images: LabelledImages, channels: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, in [0, 1]: of images in memory, for others those of ImageNet."""
    if isinstance(images, ArrayImages) and images.images.ndim == 3:
        values = images.images[:: max(1, len(images) // 10_000)]
        return [round(float(values.mean() / 255), 4)] * channels, [round(float(values.std() / 255), 4)] * channels
    if channels == 1:
        return [float(np.mean(IMAGENET_DEFAULT_MEAN))], [float(np.mean(IMAGENET_DEFAULT_STD))]
    return list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)


# -- stochastic depth --------------------------------------------------------------------------------------------------


def add_stochastic_depth(model: PreTrainedModel, last_rate: float) -> None:
    """Drop residual branches at random in training (Huang et al., 2016), sample by sample, by hooks; nothing is saved.

    The branches are the attention and the MLP of each block. The rate grows linearly over the blocks, from 0 in the
    first to ``last_rate`` in the last; what stays is scaled so that the expectation does.

    Raises:
        DataError: if a block has no MLP beside its attention that is added to the residual stream.
    """
    if not last_rate:
        return
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    branches = [
        [child for name, child in block.named_children() if name == "mlp"]
        + [child for child in block.children() if type(child).__name__.endswith("Attention")]
        for block in blocks or [model]
    ]
    for block, found in zip(blocks or [model], branches):
        if not (len(found) == 2 and found[0] is getattr(block, "mlp", None)):
            raise DataError(
                "--stochastic_depth knows blocks with an attention and an mlp (SigLIP, ViT, DeiT), but that of "
                f"{type(model).__name__} is in a {type(block).__name__}"
            )
    for number, found in enumerate(branches[1:], 1):
        for branch in found:
            branch.register_forward_hook(_BranchDrop(last_rate * number / (len(branches) - 1)))


class _BranchDrop:
    """A forward hook that zeroes the output for a random share of the samples."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        if not module.training:
            return None
        if isinstance(output, tuple):
            return (self._drop(output[0]), *output[1:])
        return self._drop(output)

    def _drop(self, branch: Tensor) -> Tensor:
        kept = torch.rand(len(branch), *[1] * (branch.ndim - 1), device=branch.device) >= self.rate
        return branch * kept.to(branch.dtype) / (1 - self.rate)


# -- loss and metrics --------------------------------------------------------------------------------------------------


def image_loss(outputs: ModelOutput, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Cross-entropy of class numbers ``[n]`` or probabilities ``[n, classes]``.

    Args:
        num_items_in_batch: how many elements the labels of all parts of the batch have together, as Trainer counts.
    """
    logits = outputs.logits.float()
    if num_items_in_batch is None:
        return cross_entropy(logits, labels)
    elements = logits.shape[-1] if labels.is_floating_point() else 1
    return cross_entropy(logits, labels, reduction="sum") * elements / num_items_in_batch


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Top-1 and top-5 accuracy in [0, 1] and loss of logits ``[n, classes]``.

    The loss takes the place of Trainer's own, which counts twice what fills up the last batch of several processes.
    """
    logits, labels = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)
    best = logits.topk(min(5, logits.shape[-1])).indices
    loss = cross_entropy(logits.float(), labels).item()
    return {**compute("topk_accuracy", predictions=best, references=labels), "loss": loss}


def evaluate(trainer: Trainer) -> dict[str, Any]:
    """Accuracies and loss over all held-out images."""
    metrics = trainer.evaluate()
    return {name: metrics[f"eval_{name}"] for name in ("accuracy", "top5_accuracy", "loss")}


RECIPE = (
    "image_classification",
    (ModelArguments, ImageArguments, AugmentationArguments, MultiMaxTrainingArguments),
    make_job,
)

if __name__ == "__main__":
    main(*RECIPE)
