"""The configs of patched models: a class made from any stock config class, and its form on disk.

A generated class has its stock class's name, so that whatever looks a config up by name finds what it finds for the
stock one. In memory ``model_type`` is the native one, too: PEFT, generation and weight conversion rely on it. On disk
it is ``"multimax"``, so that Transformers without this plugin refuses the checkpoint instead of running SoftMax. Every
way from a dict or a file to a config takes either form.
"""

import copy
import functools
import json
from collections.abc import Iterator
from typing import Any, ClassVar

from transformers import PreTrainedConfig
from transformers.models.auto import (
    feature_extraction_auto,
    image_processing_auto,
    processing_auto,
    tokenization_auto,
)

from hf_multimax.attention.interface import IMPLEMENTATION
from hf_multimax.config import MultiMaxConfig
from hf_multimax.models.checkpoint import (
    MODEL_TYPE,
    check_implementation,
    check_values,
    disk_form,
    implementation_refused,
    native_form,
)
from hf_multimax.models.generated import make_class, register, stock_of

__all__ = [
    "MultiMaxConfigMixin",
    "config_class",
    "is_multimax_config",
    "parts_of",
    "stock_copy",
]


class MultiMaxConfigMixin:
    """What a generated config class adds to the native one: the ``multimax`` entry, its form on disk, and guards."""

    stock_class: ClassVar[type[PreTrainedConfig]]
    #: Which masks the layers of the model take, see :func:`hf_multimax.models.masks.attention_mask`; None for SDPA's.
    _multimax_masks: ClassVar[str | None] = None

    def __setattr__(self, key: str, value: Any) -> None:
        if key == "_attn_implementation_internal" and self.__dict__.get(key) == IMPLEMENTATION != value:
            raise ValueError(implementation_refused(value))
        if key == "multimax":
            value = MultiMaxConfig.from_dict(value).to_dict()
        super().__setattr__(key, value)

    @property
    def output_attentions(self) -> bool:
        """As for eager attention: MultiMax attention returns its weights."""
        return self._output_attentions

    @output_attentions.setter
    def output_attentions(self, value: bool) -> None:
        self._output_attentions = value

    def validate_output_attentions(self) -> None:
        """Nothing to refuse: MultiMax attention returns its weights."""

    def to_dict(self) -> dict[str, Any]:
        """The native form, with the ``multimax`` entry."""
        values = super().to_dict()
        values.pop("_multimax_masks", None)
        return values

    def to_json_string(self, use_diff: bool = True) -> str:
        """The form on disk: model_type "multimax", the native one under ``base_model_type``."""
        values = json.loads(super().to_json_string(use_diff))
        if "multimax" in values:
            values = disk_form(self, values)
        return json.dumps(values, indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        if "multimax" not in self.__dict__ and self._attn_implementation == IMPLEMENTATION:
            raise ValueError(
                "this is a part of a MultiMax model and does not know the whole: save the whole model, "
                "or call hf_multimax.unpatch_model on it first"
            )
        super().save_pretrained(*args, **kwargs)

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        values, rest = super().get_config_dict(*args, **kwargs)
        return (native_form(values) if values.get("model_type") == MODEL_TYPE else values), rest

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> PreTrainedConfig:
        config_dict = cls._native(config_dict)
        if "multimax" in config_dict:
            check_values(config_dict)
            if MultiMaxConfig.from_dict(config_dict["multimax"]).attention:
                check_implementation(kwargs.get("attn_implementation") or config_dict.get("attn_implementation"))
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def _native(cls, values: dict[str, Any]) -> dict[str, Any]:
        """``values`` in their native form, whichever they have."""
        if values.get("model_type") != MODEL_TYPE:
            return values
        check_values(values)
        values = native_form(values)
        if values["model_type"] != cls.model_type:
            raise ValueError(
                f"this is the config of a MultiMax {values['model_type']!r}, not of a {cls.model_type!r}: load it with "
                "AutoConfig"
            )
        return values


def is_multimax_config(config: Any) -> bool:
    """Whether a config is one of a MultiMax model, by its class or, where that was lost, by its entry."""
    return isinstance(config, MultiMaxConfigMixin) or "multimax" in getattr(config, "__dict__", {})


def parts_of(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A config and every config inside it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from parts_of(value)


def stock_copy(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of a config from which a stock model can be built: all its parts of stock classes; entries are kept."""
    config = copy.deepcopy(config)
    for part in parts_of(config):
        part.__class__ = stock_of(type(part))
        part.__dict__.pop("_multimax_masks", None)
        if part._attn_implementation == IMPLEMENTATION:
            part._attn_implementation_internal = None
    return config


def config_class(stock: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The generated config class of a stock one, known to the Auto classes of tokenizers and processors."""
    generated = _make_config_class(stock)
    _register_processors(stock, generated)
    return generated


@functools.cache
def _register_processors(stock: type[PreTrainedConfig], generated: type[PreTrainedConfig]) -> None:
    for mapping in (
        tokenization_auto.TOKENIZER_MAPPING,
        image_processing_auto.IMAGE_PROCESSOR_MAPPING,
        feature_extraction_auto.FEATURE_EXTRACTOR_MAPPING,
        processing_auto.PROCESSOR_MAPPING,
    ):
        if stock in mapping:
            register(mapping, generated, mapping[stock])


@functools.cache
def _make_config_class(stock: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    @functools.wraps(stock.__init__)
    def __init__(self: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        stock.__init__(self, *args, **self._native(kwargs))
        if "multimax" in self.__dict__ and self.multimax["attention"]:
            check_implementation(self._attn_implementation)
            for part in parts_of(self):  # a stock model built from it must not run
                part.__dict__["_attn_implementation_internal"] = IMPLEMENTATION

    return make_class(MultiMaxConfigMixin, stock, config_class, {"__init__": __init__})
