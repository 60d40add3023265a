"""FSDP2 as accelerate prepares it, from the recipes' config, against the unsharded model with the whole batch."""

import functools
import os
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from distributed.common import ADAM, dtypes, errors, gradients, own, stirred, weights, whole, whole_batch
from distributed.fully_sharded import different, spied
from distributed.launching import launch
from hf_multimax import Normalizer, backend, multimax_parameters
from hf_multimax.training import MultiMaxTrainerMixin


def fsdp2_accelerator(mixed_precision: str, **changes) -> Accelerator:
    """What ``accelerate launch --config_file recipes/accelerate/fsdp2.yaml`` gives on GPUs; it has no CPU form."""
    environment = {key: value for key, value in launch("fsdp2")[2].items() if key.startswith("FSDP_")}
    with mock.patch.dict(os.environ, environment):
        plugin = FullyShardedDataParallelPlugin(**changes)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
    if mixed_precision != "no":
        plugin.set_mixed_precision(mixed_precision)
    PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    return accelerator


def prepared(mixed_precision: str, changes: dict, options: dict, folder: Path) -> dict:
    """Two steps of AdamW with clipping, then one file."""
    single = stirred(**options)
    accelerator = fsdp2_accelerator(mixed_precision, **changes)
    model = stirred(**options)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)
    model, optimizer = accelerator.prepare(model, optimizer)
    reference = torch.optim.AdamW(single.parameters(), **ADAM)
    seen = set()
    with backend("tiled"), spied(seen):
        for step in range(2):
            batch = whole_batch(single, step)
            accelerator.backward(model(**own(batch)).loss)
            norm = accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    with backend("tiled"):
        for step in range(2):
            single(**whole_batch(single, step)).loss.backward()
            expected = torch.nn.utils.clip_grad_norm_(single.parameters(), 0.1)
            reference.step()
            reference.zero_grad()
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    modulators = [m for m in model.modules() if isinstance(m, Normalizer)]
    result = {
        "wrapper": type(model).__mro__[1].__name__,
        "units": [sum(isinstance(m, FSDPModule) for m in modulators), len(modulators)],
        "computed": sorted(seen),
        "norm": abs((norm / expected).item() - 1),
        "weights": errors(
            {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in weights(model).items()},
            weights(single),
        ),
        "scalars": dtypes(dict(model.named_parameters())),
    }
    state = accelerator.get_state_dict(model)
    target = folder / "-".join(["prepared", mixed_precision, *changes, *options])
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(target, state_dict=dict(state))
    dist.barrier()
    loaded = type(single).from_pretrained(target, dtype="auto")
    result["different"] = different(state, loaded.state_dict())
    result["loaded"] = dtypes(multimax_parameters(loaded))
    result["files"] = sorted(path.name for path in target.glob("*.safetensors"))
    return result


def clipped(clip: str, _) -> dict:
    """The Trainer's two ways to clip the scalars apart from the other parameters."""
    accelerator = fsdp2_accelerator("no")
    single, model = stirred(output=True), stirred(output=True)
    model, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    batch = whole_batch(single)
    single(**batch).loss.backward()
    model(**own(batch)).loss.backward()
    limits = SimpleNamespace(multimax_clip=clip, max_grad_norm=0.1, multimax_max_grad_norm=0.05)
    trainer = SimpleNamespace(args=limits, accelerator=accelerator, _summed_over=lambda name: 11)
    trainer._clip_scaled = functools.partial(MultiMaxTrainerMixin._clip_scaled, trainer)
    norms = [whole(MultiMaxTrainerMixin._clip_grad_norm(trainer, clipped)).item() for clipped in (single, model)]
    return {"norms": norms, "gradients": errors(gradients(model), gradients(single))}


CASES = {
    "": ("no", {}, {"output": True}),
    # by its own list, ViT has a unit around its input embeddings, which accelerate wants to be another
    " named, vit": (
        "no",
        {"transformer_cls_names_to_wrap": ["ViTLayer", "MultiMax"]},
        {"name": "ViTForImageClassification", "per_head": True},
    ),
    " checkpointing": ("no", {"activation_checkpointing": True}, {"output": True}),
    " efficient loading": ("no", {"cpu_ram_efficient_loading": True}, {}),
    " bf16": ("bf16", {}, {"output": True}),
    " bfloat16 model": ("bf16", {}, {"dtype": torch.bfloat16}),
}
CHECKS = {f"prepared{name}": functools.partial(prepared, *case) for name, case in CASES.items()}
CHECKS |= {f"prepared clip {clip}": functools.partial(clipped, clip) for clip in ("group", "scale")}
