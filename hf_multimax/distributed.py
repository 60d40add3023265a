"""Training in many processes: what becomes of a modulator's few float32 scalars in each scheme.

DistributedDataParallel
    replicates them as it does everything. It makes buckets by type, so that a bfloat16 model needs nothing special, and
    every scalar takes part in every forward pass: ``find_unused_parameters`` is not needed for them.

FSDP2 (``fully_shard``)
    casts what a block holds to the block's type, and wants one type per block. Modulators are therefore units of
    their own: sharded like everything, so that optimizers, gradient clipping and checkpoints see one kind of
    tensor, but all-gathered, reduced and kept in float32. :func:`shard_modulators` puts all modulators of a model
    into one unit. Accelerate makes a unit of each, as the model's ``_no_split_modules`` say; name ``MultiMax``
    beside the block's class where you set ``fsdp_transformer_layer_cls_to_wrap``. Attention reads the scalars
    without calling the module; it all-gathers them itself, at their first use in a step, and FSDP2 reduces their
    gradients and shards them again at the end of the backward pass. A modulator left to its block works in a
    float32 model without mixed precision; with mixed precision it is refused, by attention where only the
    computation is in lower precision, and by FSDP2 itself ("uniform original parameter dtype") where the model is.
    FSDP2 takes no parameters without a dimension: the affine variant needs ``per_head=True``.

DeepSpeed ZeRO-3
    keeps tensors of up to ``stage3_param_persistence_threshold`` elements whole on every process. Attention relies on
    that: leave it above the size of a tensor of a modulator (4 elements, times the number of heads with ``per_head``).
    A slow test compares it, and ZeRO-2, with one process; recipes/accelerate/zero3.yaml says more.
"""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from hf_multimax.normalizers.base import Normalizer

__all__ = ["shard_modulators"]


def shard_modulators(
    model: nn.Module, mesh: DeviceMesh | None = None, offload_policy: OffloadPolicy | None = None
) -> nn.Module:
    """Make one FSDP2 unit, in float32, of all modulators of ``model``. Call it before ``fully_shard`` on anything else.

    Args:
        model: a patched model, in place.
        mesh, offload_policy: as ``fully_shard`` takes them, and the same as for the rest of the model.

    Returns:
        The same model.

    Raises:
        ValueError: if the model has no MultiMax parameters, is sharded already, or has parameters without a dimension,
            which FSDP2 cannot shard.
    """
    modulators = [m for m in model.modules() if isinstance(m, Normalizer) and list(m.parameters())]
    if not modulators:
        raise ValueError(f"this {type(model).__name__} has no MultiMax parameters: call patch_model first")
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise ValueError("the model is sharded already: call shard_modulators before fully_shard")
    for name, parameter in model.named_parameters():
        if parameter.ndim == 0 and any(parameter is own for m in modulators for own in m.parameters()):
            raise ValueError(
                f"FSDP2 cannot shard {name}, which has no dimension: patch the model with per_head=True, "
                "or train it with DistributedDataParallel"
            )
    options = {} if offload_policy is None else {"offload_policy": offload_policy}
    fully_shard(modulators, mesh=mesh, mp_policy=MixedPrecisionPolicy(), **options)
    return model
