"""Models, batches and measures that the checks share. A process trains on two rows of a batch of two per process."""

import torch
import torch.distributed as dist
from models import inputs_for, make
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_multimax import multimax_parameters, patch_model

#: Adam divides by the gradient's size: with this, one that is zero but for rounding makes no step.
ADAM = {"lr": 1e-2, "eps": 1e-3}


def stirred(name: str = "GPT2LMHeadModel", dtype: torch.dtype = torch.float32, settings: dict | None = None, **options):
    """A patched model in training mode, the same in every process, with scalars away from zero."""
    model = patch_model(make(name, **(settings or {})), **options).to(dtype).train()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in multimax_parameters(model).values():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model


def whole_batch(model: nn.Module, step: int = 0) -> dict[str, Tensor]:
    """The batch of all processes; the same number of tokens in every row."""
    parts = [inputs_for(model, padded=False, seed=1 + step * dist.get_world_size() + r) for r in range(_world())]
    batch = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    if "decoder_input_ids" not in batch and "labels" in batch:
        batch["labels"] = batch["labels"].masked_fill(batch["labels"] == -100, 3)
    return batch


def own(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """This process's rows."""
    return {key: value[2 * dist.get_rank() :][:2] for key, value in batch.items()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Whole gradients by the name that the parameter has without wrappers; missing ones are zero."""
    return {
        name.removeprefix("module."): whole(torch.zeros_like(p) if p.grad is None else p.grad)
        for name, p in model.named_parameters()
    }


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): whole(p) for name, p in model.named_parameters()}


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def errors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """The largest error among the scalars and among the rest, relative to each tensor's largest entry."""
    if actual.keys() != expected.keys():
        raise ValueError(f"other parameters: {sorted(actual.keys() ^ expected.keys())}")
    found = {"scalars": 0.0, "rest": 0.0}
    for name, value in expected.items():
        kind = "scalars" if "multimax" in name else "rest"
        nothing = 1e-4 if kind == "scalars" else 1e-3  # the bias of keys, for one, has a gradient of rounding errors
        error = (actual[name].double() - value.double()).abs().max() / value.double().abs().max().clamp_min(nothing)
        found[kind] = max(found[kind], float("inf") if error.isnan() else error.item())
    return found


def dtypes(tensors: dict[str, Tensor]) -> list[str]:
    """The types of the scalars among ``tensors``."""
    return sorted({str(tensor.dtype) for name, tensor in tensors.items() if "multimax" in name})


def mean(value: Tensor) -> float:
    total = value.detach().double().clone()
    dist.all_reduce(total)
    return total.item() / _world()


def _world() -> int:
    return dist.get_world_size()
