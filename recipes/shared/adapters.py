"""Training a part of a checkpoint only: the scalars of its attention, low-rank updates (LoRA), or both, by PEFT."""

from torch import nn
from transformers import PreTrainedModel

from recipes.shared.checks import DataError
from recipes.shared.models import ADAPTERS, ModelArguments, normalizer_config

__all__ = ["trained_part"]

#: What a rank-8 update is scaled by is this over the rank, as in PEFT's examples.
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
#: A classifier for new classes is trained whole.
HEADS = {"image-classification": ["classifier"]}


def trained_part(model: PreTrainedModel, task: str, options: ModelArguments) -> nn.Module:
    """What the Trainer trains and saves: the model without ``--adapter``, else an adapter that is put into it.

    Args:
        task: the Hub's name of it.

    Raises:
        DataError: for an unknown adapter, one of a model made from scratch, or one of nothing.
    """
    if options.adapter is None:
        return model
    from peft import LoraConfig, get_peft_model  # slow to import

    from hf_multimax.peft import MultiMaxAdapterConfig

    if options.adapter not in ADAPTERS:
        raise DataError(f"--adapter must be one of {', '.join(ADAPTERS)}, got {options.adapter!r}")
    if options.model is None:
        raise DataError("--adapter trains a part of a checkpoint, the rest of which stays as it is: give --model")
    config = normalizer_config(options, pretraining=False)
    if config is None and "multimax" in options.adapter:
        raise DataError(f"--adapter {options.adapter} trains what replaces SoftMax: leave out --normalizer softmax")
    heads = HEADS.get(task, [])
    if options.adapter == "multimax":
        # What is left open is the adapter's to choose.
        values = {**config.to_dict(), "order": options.order, "per_head": options.per_head}
        adapter = MultiMaxAdapterConfig(**values, modules_to_save=heads or None)
    else:
        scalars = [f"multimax{part}" for part in ("", *(["_output"] if options.output else []))]
        adapter = LoraConfig(**LORA, modules_to_save=heads + (scalars if "multimax" in options.adapter else []) or None)
    trained = get_peft_model(model, adapter)
    trained.print_trainable_parameters()
    return trained
