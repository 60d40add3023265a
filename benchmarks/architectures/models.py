"""The classes that stand for a model type, and a tiny random model of one."""

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto import modeling_auto

from benchmarks.architectures.tiny import tiny_config

__all__ = ["EAGER_IS_BROKEN", "Classes", "build", "classes", "model_types", "without_dropout"]

#: Heads in the order in which one is taken: those with a loss on tokens first, the rest by their names.
_PREFERRED = (
    *("AutoModelForTextToWaveform", "AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq"),
    *("AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForMaskedLM", "AutoModelForCausalLM"),
    *("AutoModelForCTC", "AutoModelForImageClassification", "AutoModelForVideoClassification"),
    *("AutoModelForAudioClassification", "AutoModelForTokenClassification", "AutoModelForSequenceClassification"),
    "AutoModel",
)

#: Model types that take eager's additive masks for boolean ones, and give NaN.
EAGER_IS_BROKEN = frozenset({"nemotron_asr_streaming", "nemotron_asr_streaming_encoder", "nemotron3_5_asr"})


@dataclass(frozen=True)
class Classes:
    """What the auto classes make of a model type: a class with a head where there is one, and the base."""

    auto: type
    head: type[PreTrainedModel]
    base: type[PreTrainedModel] | None


def auto_classes() -> dict[str, type]:
    """Every auto class of the installed Transformers that has models, by name, in the order of preference."""
    named = {name: value for name, value in vars(modeling_auto).items() if name.startswith("Auto")}
    named = {name: value for name, value in named.items() if getattr(value, "_model_mapping", None) is not None}
    first = [name for name in _PREFERRED if name in named]
    return {name: named[name] for name in (*first, *sorted(set(named) - set(first)))}


def model_types() -> list[str]:
    """Every model type that an auto class knows."""
    return sorted({kind for auto in auto_classes().values() for kind in auto._model_mapping._model_mapping})


def classes(model_type: str) -> Classes:
    """The classes of a model type; raises ImportError where they need a library that is not installed."""
    config_class = CONFIG_MAPPING[model_type]
    auto = next(auto for auto in auto_classes().values() if model_type in auto._model_mapping._model_mapping)
    known = model_type in transformers.AutoModel._model_mapping._model_mapping
    head, base = _one(auto, config_class), _one(transformers.AutoModel, config_class) if known else None
    return Classes(auto, head, None if base is head else base)


def _one(auto: type, config_class: type) -> type[PreTrainedModel]:
    found = auto._model_mapping[config_class]
    return found[0] if isinstance(found, tuple | list) else found


def build(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A tiny random model under eager attention (SDPA where that gives NaN), in evaluation mode, unequal scores."""
    torch.manual_seed(seed)
    implementation = "sdpa" if model_type in EAGER_IS_BROKEN else "eager"
    model = classes(model_type).head._from_config(tiny_config(model_type), attn_implementation=implementation).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    without_dropout(model)
    return model


def without_dropout(model: nn.Module) -> None:
    """Set every probability of dropping something to zero, so that training is what evaluation is."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and _drops(name, module):
                setattr(module, name, 0.0)
        for config in (value for value in vars(module).values() if isinstance(value, transformers.PreTrainedConfig)):
            _config_without_dropout(config)


def _config_without_dropout(config: transformers.PreTrainedConfig) -> None:
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PreTrainedConfig):
            _config_without_dropout(value)
        elif isinstance(value, float) and _drops(name, config):
            setattr(config, name, 0.0)


def _drops(name: str, owner: Any) -> bool:
    in_dropout = isinstance(owner, nn.Module) and "drop" in type(owner).__name__.lower() and name in ("p", "drop_prob")
    return in_dropout or "drop" in name or name in ("mask_time_prob", "mask_feature_prob")
