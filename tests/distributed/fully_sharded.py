"""FSDP2 by hand (``fully_shard``) against the unsharded model with the whole batch."""

import functools
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_

from distributed.common import ADAM, dtypes, errors, gradients, mean, own, stirred, weights, whole_batch
from hf_multimax import Normalizer, backend, multimax_parameters
from hf_multimax.attention.tiled import backend as tiled
from hf_multimax.distributed import shard_modulators

HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def mesh():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def sharded(model, units: str, policy: MixedPrecisionPolicy | None = None):
    """``model`` with its blocks as units; ``units`` says what becomes of the modulators."""
    options = {"mesh": mesh(), **({} if policy is None else {"mp_policy": policy})}
    if units == "one":
        shard_modulators(model, options["mesh"])
    elif units == "each":
        for module in [m for m in model.modules() if isinstance(m, Normalizer)]:
            fully_shard(module, **options)
    blocks = model._no_split_modules
    for module in [m for m in model.modules() if type(m).__name__ in blocks]:
        if not isinstance(module, Normalizer | FSDPModule):
            fully_shard(module, **options)
    return fully_shard(model, **options)


CASES = {
    "in its block": ("block", {}),
    "in its block, output": ("block", {"output": True}),
    "each": ("each", {"output": True}),
    "one": ("one", {"output": True}),
    "one, uneven": ("one", {"per_head": True, "settings": {"n_embd": 30, "n_head": 3}}),
    "one, fewer rows than processes": ("one", {"per_head": True, "affine": True, "settings": {"n_head": 1}}),
    "one, t5": ("one", {"name": "T5ForConditionalGeneration"}),
    "one, marian": ("one", {"name": "MarianMTModel"}),
    "one, vit": ("one", {"name": "ViTForImageClassification", "order": 1}),
    "one, entmax": ("one", {"normalizer": "entmax", "normalizer_kwargs": {"learn": True}, "per_head": True}),
    "each, entmax": ("each", {"normalizer": "entmax", "normalizer_kwargs": {"learn": True}, "per_head": True}),
}


def fsdp(units: str, options: dict, _) -> dict:
    """Two passes, so that the second gathers what the first has sharded again."""
    single, model = stirred(**options), sharded(stirred(**options), units)
    with backend("tiled"):
        for step in range(2):
            batch = whole_batch(single, step)
            single.zero_grad()
            model.zero_grad()
            expected, loss = single(**batch).loss, model(**own(batch)).loss
            expected.backward()
            loss.backward()
    return {
        "wrapper": type(model).__mro__[1].__name__,
        "sharded": all(isinstance(p.grad, DTensor) for p in model.parameters() if p.requires_grad),
        "units": sum(isinstance(m, FSDPModule) for m in model.modules() if isinstance(m, Normalizer)),
        "loss": abs(mean(loss) - expected.item()),
        "gradients": errors(gradients(model), gradients(single)),
    }


def fsdp_training(folder: Path) -> dict:
    """Accumulation, checkpointing, evaluation between steps, a clip group, AdamW; then one file, and reading it."""
    models = [stirred(output=True), stirred(output=True)]
    models[1].gradient_checkpointing_enable({"use_reentrant": False})
    sharded(models[1], "one")
    norms = []
    for model in models:
        scalars = list(multimax_parameters(model).values())
        base = [p for n, p in model.named_parameters() if "multimax" not in n]
        optimizer = torch.optim.AdamW([{"params": base}, {"params": scalars, "weight_decay": 0.0}], **ADAM)
        for step in range(4):
            batch = whole_batch(model, step)
            mine = batch if model is models[0] else own(batch)
            last = step % 2 == 1
            if model is models[1]:
                model.set_requires_gradient_sync(last)
            (model(**mine).loss / 2).backward()
            if last:
                found = [clip_grad_norm_(group, 0.01) for group in (base, scalars)]
                norms.append([n.full_tensor().item() if isinstance(n, DTensor) else n.item() for n in found])
                optimizer.step()
                optimizer.zero_grad()
            with torch.no_grad():
                logits = model.eval()(**mine).logits
            model.train()
    single, model = models
    start = multimax_parameters(stirred(output=True))
    state = get_model_state_dict(model, options=WHOLE)
    result = {
        "wrapper": type(model).__mro__[1].__name__,
        "norms": max(abs(a / b - 1) for a, b in zip(sum(norms[2:], []), sum(norms[:2], []))),
        "clipped": min(sum(norms, [])) > 0.01,
        "weights": errors(weights(model), weights(single)),
        "moved": min((p - start[n]).abs().max().item() for n, p in multimax_parameters(single).items()),
    }
    target = folder / "fsdp"
    if dist.get_rank() == 0:
        model.save_pretrained(target, state_dict=dict(state))
    dist.barrier()
    loaded = type(single).from_pretrained(target)
    result["files"] = sorted(path.name for path in target.glob("*.safetensors"))
    result["different"] = different(state, loaded.state_dict())
    batch = own(whole_batch(single, 3))
    result["logits"] = (loaded.eval()(**batch).logits - logits).abs().max().item()
    # and the other way round: a whole checkpoint into a sharded model
    other = sharded(stirred(output=True), "one")
    set_model_state_dict(other, loaded.state_dict(), options=StateDictOptions(full_state_dict=True))
    result["read"] = errors(weights(other), weights(loaded))
    return result


def fsdp_half(units: str, dtype: torch.dtype, folder: Path) -> dict:
    """Mixed precision, and a model that is bfloat16 itself: the scalars are float32 everywhere."""
    policy = HALF if dtype == torch.float32 else None
    model, single = sharded(stirred(dtype=dtype), units, policy), stirred(dtype=torch.bfloat16)
    seen = set()
    with backend("tiled"), spied(seen):
        batch = whole_batch(single)
        model(**own(batch)).loss.backward()
    single(**batch).loss.backward()
    found = gradients(model)
    torch.optim.AdamW(model.parameters(), **ADAM, foreach=False).step()
    state = get_model_state_dict(model, options=WHOLE)
    target = folder / f"half {units} {dtype}"
    if dist.get_rank() == 0:
        model.save_pretrained(target, state_dict=dict(state))
    dist.barrier()
    loaded = type(single).from_pretrained(target, dtype=torch.bfloat16)
    return {
        "wrapper": type(model).__mro__[1].__name__,
        "computed": sorted(seen),
        "scalars": [dtypes(found), dtypes(dict(model.named_parameters())), dtypes(dict(loaded.named_parameters()))],
        "rest": str(loaded.transformer.h[0].ln_1.weight.dtype),
        "different": different(state, multimax_parameters(loaded)),
        "gradients": errors(found, gradients(single)),
    }


def different(gathered: dict, loaded: dict) -> list[str]:
    """Names whose gathered value, which process 0 holds, is not the loaded one."""
    return [n for n, value in loaded.items() if dist.get_rank() == 0 and not torch.equal(value, gathered[n])]


class spied:
    """Collect the types of queries and scalars that attention computes with."""

    def __init__(self, seen: set) -> None:
        self.seen = seen

    def __enter__(self) -> None:
        self.original = tiled.attention

        def attention(call):
            self.seen.update(f"{name} {getattr(call, name).dtype}" for name in ("q", "ranges", "ts"))
            return self.original(call)

        tiled.attention = attention

    def __exit__(self, *_) -> None:
        tiled.attention = self.original


def refusals(_) -> dict:
    """What cannot work says so, in every process."""
    batch = whole_batch(stirred())

    def message(act) -> str:
        try:
            act()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    return {
        "rounded": message(lambda: sharded(stirred(), "block", HALF)(**own(batch))),
        "mixed": message(lambda: sharded(stirred(dtype=torch.bfloat16), "block")(**own(batch))),
        "no dimension": message(lambda: shard_modulators(stirred(affine=True), mesh())),
        "late": message(lambda: shard_modulators(sharded(stirred(), "block"), mesh())),
        "unpatched": message(lambda: shard_modulators(torch.nn.Linear(2, 2), mesh())),
    }


CHECKS = {f"fsdp {name}": functools.partial(fsdp, *case) for name, case in CASES.items()}
CHECKS["fsdp training"] = fsdp_training
for units in ("one", "each"):
    CHECKS[f"fsdp bfloat16 compute, {units}"] = functools.partial(fsdp_half, units, torch.float32)
CHECKS["fsdp bfloat16 model, one"] = functools.partial(fsdp_half, "one", torch.bfloat16)
CHECKS["fsdp refusals"] = refusals
