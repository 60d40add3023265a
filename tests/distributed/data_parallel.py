"""Plain DistributedDataParallel against one process with the whole batch."""

import functools
from contextlib import nullcontext

import torch
from torch.nn.parallel import DistributedDataParallel

from distributed.common import dtypes, errors, gradients, mean, own, stirred, weights, whole_batch

CASES = {
    "gpt2": {},
    "gpt2 output": {"output": True},
    "gpt2 bfloat16": {"dtype": torch.bfloat16},
    "t5": {"name": "T5ForConditionalGeneration", "per_head": True},
    "vit": {"name": "ViTForImageClassification", "affine": True},
}


def ddp(options: dict, _) -> dict:
    """One backward pass; DDP without ``find_unused_parameters`` fails in the second if a scalar was not used."""
    single, model = stirred(**options), DistributedDataParallel(stirred(**options))
    for step in range(2):
        batch = whole_batch(single, step)
        single.zero_grad()
        model.zero_grad()
        expected, loss = single(**batch).loss, model(**own(batch)).loss
        expected.backward()
        loss.backward()
    return {
        "wrapper": type(model).__name__,
        "loss": abs(mean(loss) - expected.item()),
        "gradients": errors(gradients(model), gradients(single)),
        "scalars": dtypes(gradients(model)),
    }


def ddp_accumulation(_) -> dict:
    """Two micro-batches, gradient checkpointing, the fused output loss, and a step."""
    single, model = stirred(output=True), stirred(output=True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model = DistributedDataParallel(model)
    for step in range(2):
        batch = whole_batch(single, step)
        (single(**batch).loss / 2).backward()
        with model.no_sync() if step == 0 else nullcontext():
            (model(**own(batch)).loss / 2).backward()
    found = errors(gradients(model), gradients(single))
    for trained in (single, model):
        torch.optim.SGD(trained.parameters(), lr=0.1).step()
    return {
        "wrapper": type(model).__name__,
        "gradients": found,
        "weights": errors(weights(model), weights(single)),
    }


CHECKS = {f"ddp {name}": functools.partial(ddp, options) for name, options in CASES.items()}
CHECKS["ddp accumulation"] = ddp_accumulation
