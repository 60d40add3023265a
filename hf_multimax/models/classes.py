"""The classes that patched models get: one made from any stock class, with its name, known to every Auto class.

A patched model is an instance of a class ``(MultiMaxMixin, <stock class>)`` that goes by the stock class's name (see
:mod:`hf_multimax.models.configs` for why); ``is_patched`` and ``repr`` tell them apart.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import CONFIG_MAPPING, AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from hf_multimax.attention.interface import CONTINUOUS_BATCHING_REFUSED, IMPLEMENTATION, attention_forward
from hf_multimax.config import MultiMaxConfig
from hf_multimax.models.attachment import attach
from hf_multimax.models.changes import Changes
from hf_multimax.models.checkpoint import (
    MODEL_TYPE,
    PREFIX,
    check_finite,
    check_implementation,
    check_loaded,
    check_safetensors,
    is_multimax_key,
    loading_info,
    naming_damaged_weights,
    native_form,
    stored_config,
    weights_path,
)
from hf_multimax.models.checkpointing import kept
from hf_multimax.models.configs import MultiMaxConfigMixin, config_class, stock_copy
from hf_multimax.models.divergence import watch
from hf_multimax.models.generated import make_class, register
from hf_multimax.models.loader_file import write_loader
from hf_multimax.models.masks import attention_mask
from hf_multimax.models.output import modulated_forward
from hf_multimax.models.replacement import check_replacement
from hf_multimax.normalizers import build_normalizer
from hf_multimax.normalizers.base import LAYER, OUTPUT, Normalizer, NormalizerSwitch, named_places

__all__ = [
    "MultiMaxAutoConfig",
    "MultiMaxMixin",
    "check_values_to_save",
    "register_extension_points",
    "registered_config_class",
    "registered_model_class",
]

_PUSH_ARGUMENTS = (
    "repo_id",
    "commit_message",
    "commit_description",
    "private",
    "revision",
    "create_pr",
    "tags",
    "license",
)


class MultiMaxMixin:
    """What a generated model class adds to the stock one: construction, guards, loading and saving."""

    stock_class: ClassVar[type[PreTrainedModel]]
    model_tags = ["multimax"]
    _is_multimax_model = True
    _keep_in_fp32_modules_strict: ClassVar[set[str]]
    #: Compute the loss of an output-modulated model, in training, without its logits; set it to False to have them.
    fused_output_loss = True
    _output_loss_checked = False
    _output_is_fusible: bool | None = None

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        if "multimax" not in getattr(config, "__dict__", {}):
            raise ValueError(f"{self._shown_name} needs a config with a 'multimax' entry: call patch_model instead")
        multimax = MultiMaxConfig.from_dict(config.multimax)
        with torch.device("meta"):  # raises for what attach would, before the stock model is built
            build_normalizer(multimax, None)
        if multimax.attention:
            check_implementation(config._attn_implementation)
        # The stock model is built from a stock config, as if nothing were replaced, and then patched like any other.
        config = stock_copy(config)
        if type(config) is PreTrainedConfig:
            config.__class__ = self.stock_class.config_class
        # Composite models check their config's class.
        object.__setattr__(self, "config_class", self.stock_class.config_class)
        try:
            super().__init__(config, *args, **kwargs)
        finally:
            del self.__dict__["config_class"]
        saved_as = getattr(config, "architectures", None) or [type(self).__name__]
        with Changes() as changes:
            attach(self, multimax, type(self), changes, strict=type(self).__name__ in saved_as)
        watch(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        watch(self)  # a copy

    def __setattr__(self, name: str, value: Any) -> None:
        """Raises ValueError for a ``forward`` that would leave out the output modulator."""
        if name == "forward" and OUTPUT in self.__dict__.get("_modules", {}):
            check_replacement(value, type(self).forward)
        super().__setattr__(name, value)

    @property
    def _shown_name(self) -> str:
        return PREFIX + type(self).__name__

    def __repr__(self) -> str:
        return PREFIX + super().__repr__()

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """Raises ValueError: any other implementation would drop MultiMax. See :func:`hf_multimax.unpatch_model`."""
        if self.config.multimax["attention"]:
            check_implementation(attn_implementation)
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, **kwargs: Any
    ) -> None:
        super()._set_gradient_checkpointing(enable, kept(gradient_checkpointing_func), **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Raises ValueError: its masks are made for Transformers' own implementations only."""
        raise ValueError(CONTINUOUS_BATCHING_REFUSED)

    def initialize_weights(self) -> None:
        # Before the stock initialisation, which would take the modulators for what it knows.
        for module in self.modules():
            if isinstance(module, Normalizer) and not getattr(module, "_is_hf_initialized", False):
                if not all(getattr(parameter, "_is_hf_initialized", False) for parameter in module.parameters()):
                    module.reset_parameters()
                module._is_hf_initialized = True
        super().initialize_weights()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        config: Any = None,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As every ``from_pretrained``, from safetensors only, and strict about the MultiMax parameters.

        Raises:
            ValueError: if the checkpoint's config has ``multimax`` and a parameter of it is missing, unexpected or of
                another shape (the text names it), if another attention implementation or pickled weights are asked
                for, or if config.json says something impossible.
            OSError: if there are no safetensors, or one of the files is damaged (the text names it).
        """
        if kwargs.get("use_safetensors") is None:
            kwargs["use_safetensors"] = True
        if kwargs["use_safetensors"] is not True:
            raise ValueError("MultiMax checkpoints are read from safetensors only: leave use_safetensors at True")
        weights = weights_path(pretrained_model_name_or_path, kwargs)
        stored = stored_config(cls, weights, kwargs)
        implementation = kwargs.get("attn_implementation")
        if implementation is not None:
            check_implementation(implementation)
        check_safetensors(weights, stored, kwargs)
        if isinstance(config, PreTrainedConfig) and not isinstance(config, MultiMaxConfigMixin):
            config = _with_entry(cls, config, stored)
        with naming_damaged_weights(weights, kwargs), loading_info(cls) as info:
            model = super().from_pretrained(
                pretrained_model_name_or_path,
                *args,
                config=config,
                ignore_mismatched_sizes=True,  # reported below, with the keys' names
                **kwargs,
            )
        check_loaded(model, info, stored, ignore_mismatched_sizes)
        return (model, info) if output_loading_info else model

    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """As every ``save_pretrained``, and the loader file. With ``push_to_hub`` what it wrote is published."""
        if "multimax" not in vars(self.config):
            raise ValueError("this MultiMax model's config was replaced by one without a 'multimax' entry: put it back")
        check_values_to_save(self, state_dict, save_directory)
        if _saved_as_adapter(self):
            super().save_pretrained(save_directory, is_main_process, state_dict, push_to_hub, **kwargs)
            return
        hub = {name: kwargs.pop(name) for name in _PUSH_ARGUMENTS if push_to_hub and name in kwargs}
        folder = Path(save_directory)
        before = self._get_files_timestamps(folder) if folder.is_dir() else {}
        super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
        if not is_main_process:
            return
        write_loader(folder)
        if push_to_hub:
            import hf_multimax.publishing.hub  # it builds on this module

            after = self._get_files_timestamps(folder)
            written = [name for name in after if after[name] != before.get(name) and (folder / name).is_file()]
            hub = {"repo_id": folder.name, "token": kwargs.get("token"), **hub}
            hf_multimax.publishing.hub.publish(self, folder, sorted(written), **hub)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """As every ``push_to_hub``, in one commit with the card and the loader file: see :func:`hf_multimax.push`."""
        import hf_multimax.publishing.hub  # it builds on this module

        return hf_multimax.publishing.hub.push(self, repo_id, **kwargs)


def _saved_as_adapter(model: PreTrainedModel) -> bool:
    """Whether Transformers saves of a model just the active adapter, as it does with those of ``add_adapter``.

    Raises:
        ValueError: if scalars would be lost, or adapters and the model's own be mixed up.
    """
    places = [module for _, module in named_places(model)]
    added = getattr(model, "_hf_peft_config_loaded", False)
    if added and not all(isinstance(module, NormalizerSwitch) and module.underneath() is None for module in places):
        raise ValueError(
            "this MultiMax model has adapters of add_adapter, beside which Transformers would not save its own "
            "parameters: call delete_adapter first, or use peft.get_peft_model with modules_to_save=['multimax']"
        )
    if not added and any(isinstance(module, NormalizerSwitch) for module in places):
        raise ValueError(
            "this model holds MultiMax adapters: save the PeftModel around it, which writes them, or what its "
            "merge_and_unload() or unload() gives"
        )
    return added


def _with_entry(cls: type[Any], config: PreTrainedConfig, stored: dict[str, Any]) -> PreTrainedConfig:
    """A config of a stock class, given for a checkpoint that is MultiMax's, as what the class takes."""
    entry = vars(config).get("multimax", stored.get("multimax"))
    if entry is None:
        return config
    values = config.to_dict()
    for name in ("base_model_type", "auto_map", "attn_implementation"):  # a stock class keeps what it does not know
        values.pop(name, None)
    return cls.config_class.from_dict({**values, "model_type": cls.config_class.model_type, "multimax": entry})


def check_values_to_save(model: nn.Module, state_dict: dict[str, Any] | None, where: Any) -> None:
    """Raise ValueError before NaN is saved, perhaps over something better.

    A given state dict is what counts: the model's own parameters may be spread over processes that do not all save.
    """
    if state_dict is None:
        check_finite(model, f"are not saved to {str(where)!r}")
        return
    ours = {name: value for name, value in state_dict.items() if is_multimax_key(name)}
    broken = [name for name, value in ours.items() if torch.is_tensor(value) and not value.isfinite().all()]
    if broken:
        raise ValueError(f"MultiMax parameters that are NaN or infinite are not saved to {str(where)!r}: {broken[:8]}")


# -- making them -------------------------------------------------------------------------------------------------------


@functools.cache
def model_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The generated model class of a stock one."""

    @functools.wraps(stock.__init__)
    def __init__(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        MultiMaxMixin.__init__(self, *args, **kwargs)

    @functools.wraps(stock.forward)
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if OUTPUT not in self._modules:
            return stock.forward(self, *args, **kwargs)
        return modulated_forward(self, stock, *args, **kwargs)

    namespace = {
        "__init__": __init__,
        "forward": forward,
        "_keep_in_fp32_modules_strict": {*(stock._keep_in_fp32_modules_strict or ()), LAYER, OUTPUT},
    }
    if stock.config_class is not None:
        namespace["config_class"] = config_class(stock.config_class)
    return make_class(MultiMaxMixin, stock, model_class, namespace)


def registered_model_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """:func:`model_class`, with every Auto class told what to make of its config."""
    if stock.config_class is not None:
        registered_config_class(stock.config_class)
    return model_class(stock)


def registered_config_class(stock: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The generated config class of a stock one, with every Auto class told what to make of it."""
    generated = config_class(stock)
    _register_models(stock, generated)
    return generated


@functools.cache
def _register_models(stock: type[PreTrainedConfig], generated: type[PreTrainedConfig]) -> None:
    """Tell every Auto class that knows the stock config what to make of the generated one."""
    for name in vars(modeling_auto):
        mapping = getattr(getattr(modeling_auto, name), "_model_mapping", None)
        if mapping is not None and stock in mapping:
            value = mapping[stock]
            models = tuple(map(model_class, value)) if isinstance(value, tuple | list) else model_class(value)
            register(mapping, generated, models)


class MultiMaxAutoConfig(PreTrainedConfig):
    """What ``model_type: multimax`` means to AutoConfig: it makes the config of the architecture underneath."""

    model_type = MODEL_TYPE

    def __new__(cls, **values: Any) -> Any:
        """The config of ``values``, as config.json has them; AutoConfig.for_model calls the class."""
        return cls.from_dict({**values, "model_type": MODEL_TYPE})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> PreTrainedConfig:
        """A config of the architecture underneath; ValueError, naming the field, for something impossible."""
        base_type = config_dict.get("base_model_type")
        if not isinstance(base_type, str) or base_type not in CONFIG_MAPPING or base_type == MODEL_TYPE:
            raise ValueError(f"config.json: base_model_type must be a model type of Transformers, got {base_type!r}")
        if "multimax" not in config_dict:
            raise ValueError("config.json of a MultiMax checkpoint must have the field 'multimax'; it is missing")
        return registered_config_class(CONFIG_MAPPING[base_type]).from_dict(native_form(config_dict), **kwargs)

    @classmethod
    def from_json_file(cls, json_file: Any) -> PreTrainedConfig:
        return cls.from_dict(cls._dict_from_json_file(json_file))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> PreTrainedConfig:
        values, kwargs = cls.get_config_dict(pretrained_model_name_or_path, **kwargs)
        return cls.from_dict(values, **kwargs)


def register_extension_points() -> None:
    """Register the attention function, its mask and the model type with Transformers."""
    AttentionInterface.register(IMPLEMENTATION, attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, attention_mask)
    CONFIG_MAPPING.register(MODEL_TYPE, MultiMaxAutoConfig, exist_ok=True)
