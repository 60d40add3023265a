"""The model of a recipe: what replaces SoftMax in it, and that all arms of a comparison start alike."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, fields

from transformers import PreTrainedModel, set_seed
from transformers.hf_argparser import HfArg

from hf_multimax import MultiMaxConfig, is_patched, patch_model, registered_normalizers
from recipes.shared.checks import DataError

logger = logging.getLogger(__name__)

ADAPTERS = ("multimax", "lora", "lora+multimax")


@dataclass
class ModelArguments:
    """The model, and what stands in SoftMax's place. The two JSON options are dicts once they are parsed."""

    model: str | None = HfArg(
        default=None, help="checkpoint to fine-tune, a folder or a Hub id; none: pre-train from scratch"
    )
    model_config: str = HfArg(
        default="{}", help="the fields of the architecture's config when pre-training, JSON; the recipe has defaults"
    )
    normalizer: str | None = HfArg(
        default=None,
        help="any registered function; softmax is the stock model. Default: multimax, or what the checkpoint has",
    )
    normalizer_kwargs: str = HfArg(default="{}", help="options of the normalizer, JSON")
    attention: bool = HfArg(default=True, help="replace the SoftMax of attention")
    output: bool = HfArg(default=False, help="modulate the output logits (multimax only)")
    order: int | None = HfArg(default=None, help="number of terms of the modulator (2; 1 with affine or adapter)")
    affine: bool = HfArg(default=False, help="the affine variant")
    per_head: bool | None = HfArg(
        default=None, help="scalars per head instead of per layer; default: with --adapter multimax"
    )
    init: str | None = HfArg(default=None, help="identity or paper; default: paper when pre-training, else identity")
    include: str | None = HfArg(default=None, help="regular expression: only these attention layers")
    exclude: str | None = HfArg(default=None, help="regular expression: not these attention layers")
    adapter: str | None = HfArg(
        default=None, help="train and save only that of a checkpoint: multimax (the scalars), lora or lora+multimax"
    )

    def __post_init__(self) -> None:
        for name in ("model_config", "normalizer_kwargs"):
            value = getattr(self, name)
            try:
                value = json.loads(value) if isinstance(value, str) else value
            except json.JSONDecodeError as error:
                raise DataError(f"--{name} is no JSON ({error})") from error
            if not isinstance(value, dict):
                raise DataError(f"--{name} must be a JSON object, got {value!r}")
            setattr(self, name, value)


#: The options that are fields of MultiMaxConfig: what replaces SoftMax.
_REPLACEMENT = [
    field.name for field in fields(ModelArguments) if field.name not in ("model", "model_config", "adapter")
]


def normalizer_config(options: ModelArguments, pretraining: bool) -> MultiMaxConfig | None:
    """What to patch with; None for the stock model with SoftMax.

    Raises:
        DataError: for an unknown name, or options that do not go together.
    """
    name = options.normalizer or "multimax"
    if name not in registered_normalizers():
        raise DataError(f"--normalizer {name} is unknown: choose one of {', '.join(sorted(registered_normalizers()))}")
    if name == "softmax" and not options.normalizer_kwargs:
        if options.output:
            raise DataError("--output modulates by MultiMax: it does not go with --normalizer softmax")
        return None
    values = {name: getattr(options, name) for name in _REPLACEMENT}
    values |= {"normalizer": name, "init": options.init or ("paper" if pretraining else "identity")}
    values["per_head"] = bool(options.per_head)
    try:
        return MultiMaxConfig(**values)
    except (TypeError, ValueError) as error:
        raise DataError(str(error)) from error


def build_model(options: ModelArguments, make_stock: Callable[[], PreTrainedModel], seed: int) -> PreTrainedModel:
    """The model to train: what ``make_stock`` makes or loads, patched as the options say.

    For one seed all arms of a comparison start from the same weights, and see the same random numbers afterwards.

    Raises:
        DataError: if the checkpoint is patched already, with something else than is asked for.
    """
    if options.model is not None and options.model_config:
        logger.info(f"--model_config is for models made from scratch: {options.model} keeps its own")
    set_seed(seed)
    model = make_stock()
    config = normalizer_config(options, pretraining=options.model is None)
    if is_patched(model):
        asked = any(getattr(options, name) != getattr(ModelArguments(), name) for name in _REPLACEMENT)
        compared = [name for name in _REPLACEMENT if name != "init" or options.init]
        stored = MultiMaxConfig.from_dict(model.config.multimax).to_dict()
        if asked and (config is None or any(config.to_dict()[name] != stored[name] for name in compared)):
            has = {name: stored[name] for name in compared}
            raise DataError(
                f"the checkpoint {options.model} is patched already, with {has}: leave out --normalizer and its "
                "options, or start from the stock checkpoint"
            )
    elif config is not None and options.adapter in (None, "lora+multimax"):  # others are for the stock model
        open_order = options.adapter and options.order is None and config.normalizer == "multimax"
        patch_model(
            model, config.replace(order=1) if open_order else config
        )  # the order of an adapter of scalars alone
    set_seed(seed + 1)
    return model
