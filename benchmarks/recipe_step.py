"""Training steps of the recipes through other functions, against SoftMax's: ``python -m benchmarks.recipe_step``.

The models, batches and lengths are those of ``recipes/configs/lm_web_small.yaml`` and ``image_fashion_small.yaml``,
the inputs are random. A step is forward, backward and AdamW; the arms are copies of one stock model with SDPA and take
turns in one process, so that their ratios are what an arm of ``recipes.compare`` costs. Writes
``benchmarks/results/recipe_step-cpu.json``.
"""

import argparse
import copy
from collections.abc import Callable

import torch
import yaml
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, SiglipConfig, SiglipForImageClassification

from benchmarks.common import ROOT, add_thread_option, load, paired_timing, write_results
from benchmarks.tables import table
from benchmarks.training_step import training_step
from hf_multimax import patch_model

STOCK = "softmax"
ARMS = ("multimax", "entmax15", "sparsemax")

Task = tuple[PreTrainedModel, dict[str, Tensor]]


def language_modeling(recipe: dict) -> Task:
    """The model of the recipe and a batch of it."""
    end = {"bos_token_id": 0, "eos_token_id": 0}
    length, vocabulary = recipe["context"], recipe["vocab_size"]
    config = AutoConfig.for_model(**recipe["model_config"], vocab_size=vocabulary, n_positions=length, **end)
    ids = torch.randint(vocabulary, (recipe["per_device_train_batch_size"], length))
    return AutoModelForCausalLM.from_config(config), {"input_ids": ids, "labels": ids}


def images(recipe: dict) -> Task:
    """The same of grey images in ten classes."""
    vision = {**recipe["model_config"], "num_channels": 1}
    side, batch = vision["image_size"], recipe["per_device_train_batch_size"]
    model = SiglipForImageClassification(SiglipConfig(vision_config=vision, num_labels=10))
    return model, {"pixel_values": torch.randn(batch, 1, side, side), "labels": torch.randint(10, (batch,))}


TASKS: dict[str, tuple[str, Callable[[dict], Task]]] = {
    "language modelling, 128 tokens, heads of 32": ("lm_web_small.yaml", language_modeling),
    "images, 49 tokens, heads of 16": ("image_fashion_small.yaml", images),
}


def measure(name: str, budget_s: float) -> dict[str, object]:
    """A row: seconds of a stock step, and the medians of the arms' paired ratios to it."""
    torch.manual_seed(0)
    file, build = TASKS[name]
    stock, inputs = build(yaml.safe_load((ROOT / "recipes" / "configs" / file).read_text(encoding="utf-8")))
    stock.train().set_attn_implementation("sdpa")
    models = {STOCK: stock, **{arm: patch_model(copy.deepcopy(stock), normalizer=arm, init="paper") for arm in ARMS}}
    steps = {arm: training_step(model, inputs, "cpu") for arm, model in models.items()}
    times = paired_timing(steps, budget_s=budget_s, min_rounds=4)
    row: dict[str, object] = {"recipe": name, "softmax s": times[STOCK].median}
    row |= {f"{arm} / softmax": times[arm].ratio(times[STOCK]) for arm in ARMS}
    return {**row, "rounds": len(times[STOCK].seconds), "load": load()}


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_thread_option(parser)
    parser.add_argument("--budget", type=float, default=40.0, help="seconds of steps per recipe")
    rows = [measure(name, parser.parse_args().budget) for name in TASKS]
    print(table(rows))
    print("written to", write_results("recipe_step", rows).relative_to(ROOT))


if __name__ == "__main__":
    main()
