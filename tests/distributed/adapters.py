"""MultiMax adapters in two processes: the scalars get the gradients of one process, and nothing else gets any."""

import copy
import functools
from pathlib import Path

import torch
import torch.distributed as dist
from models import make
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from distributed.common import ADAM, errors, gradients, mean, own, stirred, weights, whole, whole_batch
from distributed.fully_sharded import HALF, WHOLE, mesh
from distributed.prepared import fsdp2_accelerator
from hf_multimax import Normalizer, backend, multimax_parameters
from hf_multimax.distributed import shard_modulators
from hf_multimax.peft import MultiMaxAdapterConfig


def adapted(dtype: torch.dtype = torch.float32, lora: bool = False) -> PeftModel:
    """A GPT-2 with an adapter, the same in every process, with scalars away from zero."""
    if lora:
        torch.manual_seed(1)
        config = LoraConfig(target_modules=["c_attn"], init_lora_weights=False, modules_to_save=["multimax"])
        return get_peft_model(stirred(dtype=dtype), config).train()
    model = get_peft_model(make("GPT2LMHeadModel").to(dtype), MultiMaxAdapterConfig()).train()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in multimax_parameters(model).values():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model


def sharded(model: PeftModel, half: bool) -> PeftModel:
    options = {"mesh": mesh(), **({"mp_policy": HALF} if half else {})}
    shard_modulators(model, options["mesh"])
    for block in model.get_base_model().transformer.h:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def measured(single: PeftModel, model: nn.Module) -> dict:
    """Two backward passes and a step against the same with the whole batch in one process."""
    with backend("tiled"):
        for step in range(2):
            batch = whole_batch(single.get_base_model(), step)
            single.zero_grad()
            model.zero_grad()
            expected, loss = single(**batch).loss, model(**own(batch)).loss
            expected.backward()
            loss.backward()
    found = errors(gradients(model), gradients(single))
    others = [name for name, p in model.named_parameters() if p.grad is not None and not p.requires_grad]
    for trained in (single, model):
        torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], **ADAM, foreach=False).step()
    return {
        "wrapper": type(model).__mro__[0 if isinstance(model, DistributedDataParallel) else 1].__name__,
        "trained": sum(p.requires_grad for p in model.parameters()),
        "reached": sum(p.grad is not None and p.requires_grad for p in model.parameters()),
        "others": others,
        "loss": abs(mean(loss) - expected.item()),
        "gradients": found,
        "weights": errors(weights(model), weights(single)),
        "scalars": sorted({str(p.dtype) for m in model.modules() if isinstance(m, Normalizer) for p in m.parameters()}),
    }


def ddp(options: dict, _) -> dict:
    return measured(adapted(**options), DistributedDataParallel(adapted(**options)))


def fsdp(half: bool, options: dict, folder: Path) -> dict:
    single = adapted(**({**options, "dtype": torch.bfloat16} if half else options))
    model = sharded(adapted(**options), half)
    result = measured(single, model)
    state = get_model_state_dict(model, options=WHOLE)
    target = folder / f"adapter {half} {options}"
    if dist.get_rank() == 0:
        model.save_pretrained(target, state_dict=dict(state))
    dist.barrier()
    loaded = adapted(**options).unload() if not options else copy.deepcopy(stirred())
    loaded = PeftModel.from_pretrained(loaded, target)
    values = {name: p for name, p in loaded.named_parameters() if "default" in name}
    result["saved"] = len(values)
    result["different"] = [n for n, v in values.items() if dist.get_rank() == 0 and not torch.equal(v, state[n])]
    return result


def prepared(precision: str, changes: dict, _) -> dict:
    """As Accelerate makes it: modulators are units of their own, perhaps inside wrappers for checkpointing."""
    single = adapted(torch.bfloat16 if precision == "bf16" else torch.float32)
    accelerator, model = fsdp2_accelerator(precision, **changes), adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **ADAM)
    model, optimizer = accelerator.prepare(model, optimizer)
    with backend("tiled"):
        batch = whole_batch(single.get_base_model())
        single(**batch).loss.backward()
        accelerator.backward(model(**own(batch)).loss)
    named = [(name.replace("_checkpoint_wrapped_module.", ""), p) for name, p in model.named_parameters()]
    grads = {name: whole(p.grad) for name, p in named if p.grad is not None}
    return {
        "wrapper": type(model).__mro__[1].__name__,
        "trained": sum(p.requires_grad for _, p in named),
        "reached": len(grads),
        "gradients": errors(grads, {name: p.grad for name, p in single.named_parameters() if p.grad is not None}),
        "scalars": sorted({str(p.dtype) for name, p in named if name in grads}),
    }


CASES = {"scalars": {}, "lora and scalars": {"lora": True}}
CHECKS = {f"adapter ddp {name}": functools.partial(ddp, options) for name, options in CASES.items()}
CHECKS |= {f"adapter fsdp {name}": functools.partial(fsdp, False, options) for name, options in CASES.items()}
CHECKS["adapter fsdp bfloat16"] = functools.partial(fsdp, True, {})
CHECKS["adapter prepared"] = functools.partial(prepared, "no", {})
CHECKS["adapter prepared checkpointing"] = functools.partial(prepared, "no", {"activation_checkpointing": True})
CHECKS["adapter prepared bf16"] = functools.partial(prepared, "bf16", {})
