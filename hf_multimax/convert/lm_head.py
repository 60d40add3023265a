"""Any causal language model of Transformers with the authors' scalars in it."""

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from hf_multimax.convert.layouts import OUTPUT, Weights, build, join, patch, take_modulators
from hf_multimax.models.discovery import attention_layers

_SCALARS = ("multimax_ranges", "multimax_ts")


def _causal_class(config_class: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    classes = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if config_class not in classes:
        raise ValueError(f"Transformers has no causal language model for a {config_class.__name__}")
    return classes[config_class]


def _head_name(model: PreTrainedModel) -> str:
    return next(name for name, module in model.named_modules() if module is model.get_output_embeddings())


def read_lm_head(weights: Weights, *, config: PreTrainedConfig) -> PreTrainedModel:
    scalars = {key: value for key, value in weights.items() if key.rpartition(".")[2] in _SCALARS}
    model = build(_causal_class(type(config)), config, {key: weights[key] for key in weights.keys() - scalars.keys()})
    layers, head = attention_layers(model), _head_name(model)
    pairs: dict[str, tuple[str, str]] = {}
    for key in scalars:
        owner = key.rpartition(".")[0]
        ours = f"{owner}.multimax" if owner in layers else OUTPUT
        if ours == OUTPUT and owner.removeprefix("model.") not in ("", head):
            raise ValueError(
                f"{key!r}: {owner!r} is neither the output layer of {type(model).__name__}, {head!r}, nor one of its "
                f"attention layers, such as {next(iter(layers), None)!r}"
            )
        pair = (join(owner, _SCALARS[0]), join(owner, _SCALARS[1]))
        if pairs.setdefault(ours, pair) != pair:
            raise ValueError(f"both {pairs[ours][0]!r} and {pair[0]!r} are modulators of the output")
    return patch(model, take_modulators(scalars, pairs or {OUTPUT: (f"{head}.{_SCALARS[0]}", "")}))


def write_lm_head(model: PreTrainedModel, ours: Weights) -> Weights:
    if type(model).stock_class is not _causal_class(type(model.config).stock_class):
        raise ValueError(
            f"the layout 'lm-head' is that of causal language models, not of {type(model).stock_class.__name__}"
        )
    head = _head_name(model)

    def name(key: str) -> str:
        owner, _, scalar = key.rpartition(".")
        if owner == OUTPUT:
            return f"{head}.multimax_{scalar}"
        return f"{owner.removesuffix('.multimax')}.multimax_{scalar}" if owner.endswith(".multimax") else key

    return {name(key): value for key, value in ours.items()}
