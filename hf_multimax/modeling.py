"""The classes that patched models get: ``MultiMax<Arch>`` and its config, made on demand for any architecture.

A patched model is an instance of ``MultiMax<Arch>(MultiMaxMixin, <Arch>)``, its config of a class made the same way.
In memory the config keeps the native ``model_type``, which PEFT, generation and weight conversion rely on. On disk it
is ``"multimax"``, so that Transformers without this plugin refuses the checkpoint instead of running SoftMax.
"""

import contextlib
import copy
import functools
import json
import logging
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import sdpa_mask
from transformers.models.auto import (
    feature_extraction_auto,
    image_processing_auto,
    modeling_auto,
    processing_auto,
    tokenization_auto,
)

from hf_multimax.attention import CONTINUOUS_BATCHING_REFUSED, IMPLEMENTATION, attention_forward
from hf_multimax.checkpoint import (
    MODEL_TYPE,
    check_implementation,
    check_loaded,
    check_safetensors,
    check_values,
    disk_form,
    implementation_refused,
    naming_damaged_weights,
    native_form,
    stored_config,
)
from hf_multimax.config import MultiMaxConfig
from hf_multimax.discovery import attention_layers, head_count, select_layers
from hf_multimax.modulator import Normalizer
from hf_multimax.normalizers import build_normalizer, get_normalizer
from hf_multimax.output import check_output_supported, modulated_forward
from hf_multimax.remote import write_loader

__all__ = ["MultiMaxAutoConfig", "MultiMaxConfigMixin", "MultiMaxMixin", "attach", "detach", "is_patched"]

logger = logging.getLogger(__name__)

_PREFIX = "MultiMax"
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


def is_patched(model: nn.Module) -> bool:
    """Whether ``model`` is a MultiMax model: patched by ``patch_model``, or loaded from a MultiMax checkpoint."""
    return isinstance(model, MultiMaxMixin)


class MultiMaxConfigMixin:
    """What a generated config class adds to the native one: the ``multimax`` entry, its form on disk, and guards."""

    stock_class: ClassVar[type[PreTrainedConfig]]
    #: Whether a layer does not say that it is causal, so that the mask must: never None for a causal layer.
    masks_in_full: ClassVar[bool] = False

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

    def to_json_string(self, use_diff: bool = True) -> str:
        """The form on disk: model_type "multimax", the native one under ``base_model_type``."""
        values = json.loads(super().to_json_string(use_diff))
        if "multimax" in values:
            values = disk_form(self, values)
        return json.dumps(values, indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        if "multimax" not in self.__dict__:
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
        attention = "multimax" in config_dict and MultiMaxConfig.from_dict(config_dict["multimax"]).attention
        if "multimax" in config_dict:
            check_values(config_dict)
        if attention:
            check_implementation(kwargs.get("attn_implementation") or config_dict.get("attn_implementation"))
        result = super().from_dict(config_dict, **kwargs)
        if attention:  # a stock model built from it must not run
            config = result[0] if isinstance(result, tuple) else result
            config._attn_implementation_internal = IMPLEMENTATION
        return result


class MultiMaxAutoConfig(PreTrainedConfig):
    """What ``model_type: multimax`` means to AutoConfig: it makes the config of the architecture underneath."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> PreTrainedConfig:
        """A ``MultiMax<Arch>Config``; raises ValueError, naming the field, if config.json says something impossible."""
        base_type = config_dict.get("base_model_type")
        if not isinstance(base_type, str) or base_type not in CONFIG_MAPPING or base_type == MODEL_TYPE:
            raise ValueError(f"config.json: base_model_type must be a model type of Transformers, got {base_type!r}")
        if "multimax" not in config_dict:
            raise ValueError("config.json of a MultiMax checkpoint must have the field 'multimax'; it is missing")
        return config_class(CONFIG_MAPPING[base_type]).from_dict(native_form(config_dict), **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> PreTrainedConfig:
        values, kwargs = cls.get_config_dict(pretrained_model_name_or_path, **kwargs)
        return cls.from_dict(values, **kwargs)


class MultiMaxMixin:
    """What a generated model class adds to the stock one: construction, guards, loading and saving."""

    stock_class: ClassVar[type[PreTrainedModel]]
    model_tags = ["multimax"]
    _keep_in_fp32_modules_strict: ClassVar[set[str]]
    #: Compute the loss of an output-modulated model, in training, without its logits; set it to False to have them.
    fused_output_loss = True
    _output_loss_checked = False
    _output_is_fusible: bool | None = None

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        if "multimax" not in getattr(config, "__dict__", {}):
            raise ValueError(f"{type(self).__name__} needs a config with a 'multimax' entry: call patch_model instead")
        multimax = MultiMaxConfig.from_dict(config.multimax)
        with torch.device("meta"):  # raises for what attach would, before the stock model is built
            build_normalizer(multimax, None)
        if multimax.attention:
            check_implementation(config._attn_implementation)
        config = copy.deepcopy(config)  # the caller's may belong to a model
        generated = type(config)
        # The stock model is built from a stock config, as if nothing were replaced, and then patched like any other.
        config.__class__ = self.stock_class.config_class if generated is PreTrainedConfig else _stock(generated)
        if multimax.attention:
            config._attn_implementation = None
        # Composite models check their config's class.
        object.__setattr__(self, "config_class", self.stock_class.config_class)
        try:
            super().__init__(config, *args, **kwargs)
        finally:
            config.__class__ = generated
            del self.__dict__["config_class"]
        saved_as = getattr(config, "architectures", None) or [type(self).__name__]
        attach(self, multimax, strict=type(self).__name__ in saved_as)

    def _get_name(self) -> str:
        # Trainer looks this name up to decide whether labels are to be shifted.
        return self.stock_class.__name__

    def __repr__(self) -> str:
        return _PREFIX + super().__repr__()

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """Raises ValueError: any other implementation would drop MultiMax. See :func:`hf_multimax.unpatch_model`."""
        if self.config.multimax["attention"]:
            check_implementation(attn_implementation)
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

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
    def is_custom_code(cls) -> bool:
        # Native weight conversion applies to the weights underneath.
        return cls.stock_class.is_custom_code() if hasattr(cls.stock_class, "is_custom_code") else False

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
        stored = stored_config(cls, pretrained_model_name_or_path, kwargs)
        implementation = kwargs.get("attn_implementation")
        if implementation is not None:
            check_implementation(implementation)
        check_safetensors(pretrained_model_name_or_path, stored, kwargs)
        with naming_damaged_weights(pretrained_model_name_or_path, kwargs):
            model, info = super().from_pretrained(
                pretrained_model_name_or_path,
                *args,
                config=config,
                ignore_mismatched_sizes=True,  # reported below, with the keys' names
                output_loading_info=True,
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
        if getattr(self, "_hf_peft_config_loaded", False):
            raise ValueError(
                "this MultiMax model has adapters of add_adapter, beside which Transformers would not save its own "
                "parameters: call delete_adapter first, or use peft.get_peft_model with modules_to_save=['multimax']"
            )
        hub = {name: kwargs.pop(name) for name in _PUSH_ARGUMENTS if push_to_hub and name in kwargs}
        folder = Path(save_directory)
        before = self._get_files_timestamps(folder) if folder.is_dir() else {}
        super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
        if not is_main_process:
            return
        write_loader(folder)
        if push_to_hub:
            import hf_multimax.hub  # it builds on this module

            after = self._get_files_timestamps(folder)
            written = [name for name in after if after[name] != before.get(name) and (folder / name).is_file()]
            hub = {"repo_id": folder.name, "token": kwargs.get("token"), **hub}
            hf_multimax.hub.publish(self, folder, sorted(written), **hub)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """As every ``push_to_hub``, in one commit with the card and the loader file: see :func:`hf_multimax.push`."""
        import hf_multimax.hub  # it builds on this module

        return hf_multimax.hub.push(self, repo_id, **kwargs)


# -- attaching to a model and detaching from it ------------------------------------------------------------------------


def attach(model: PreTrainedModel, config: MultiMaxConfig, strict: bool = True) -> None:
    """Put normalizers into ``model`` and switch its class and configs; whatever can raise comes before any change.

    Args:
        strict: False when ``config`` was made for another head class of the same architecture: patterns may then match
            nothing, and an output modulator that the class cannot have is dropped, with a line in the log.
    """
    stock_class = _stock(type(model))
    if config.output:
        try:
            check_output_supported(model, stock_class)
        except ValueError as error:
            if strict:
                raise
            if not config.attention:
                raise ValueError(
                    f"{error}. The checkpoint modulates the output only: load it by its own class"
                ) from error
            logger.warning(f"The checkpoint's output modulator is dropped: {error}")
            config = config.replace(output=False)
    selected = select_layers(model, config, strict) if config.attention else {}
    per_head = config.per_head or get_normalizer(config.normalizer).per_head
    normalizers = {
        name: _build(config, module, head_count(name, module) if per_head else None)
        for name, module in selected.items()
    }
    if config.per_head and not any(list(normalizer.parameters()) for normalizer in normalizers.values()):
        raise ValueError(f"per_head=True means nothing to normalizer={config.normalizer!r}, which learns nothing here")
    output = _output_modulator(model, config) if config.output else None

    layers = attention_layers(model) if config.attention else {}
    _own_configs(model)
    parts = [model.config, *(module.config for module in layers.values() if hasattr(module, "config"))]
    configs = list({id(part): part for part in parts}.values())
    model._stock_implementations = [(part, part._attn_implementation) for part in configs]
    for name, module in layers.items():
        module.multimax = normalizers.get(name)
    if output is not None:
        model.multimax_output = output
    silent = any(not hasattr(module, "is_causal") for module in layers.values())
    for part in configs:
        part.__dict__.pop("multimax", None)
        part.__class__ = config_class(_stock(type(part)))
        type(part).masks_in_full |= silent
        if config.attention:
            part._attn_implementation_internal = IMPLEMENTATION
    model.config.multimax = config.to_dict()
    model.__class__ = model_class(stock_class)
    model._keep_in_fp32_modules_strict = {*(model._keep_in_fp32_modules_strict or ()), "multimax", "multimax_output"}
    # What accelerate wraps for FSDP2: a modulator is a unit of its own, for its type is not the block's.
    own = {type(m).__name__ for m in model.modules() if isinstance(m, Normalizer) and list(m.parameters())}
    model._stock_no_split_modules = model._no_split_modules
    # Marian leaves out its positions, since it can compute them: those of a converted model are others.
    model._stock_ignored_on_save, model._keys_to_ignore_on_save = model._keys_to_ignore_on_save, set()
    model._no_split_modules = {*(model._no_split_modules or ()), *own}


def detach(model: PreTrainedModel) -> None:
    """The inverse of :func:`attach`."""
    for module in attention_layers(model).values():
        if hasattr(module, "multimax"):
            del module.multimax
    if hasattr(model, "multimax_output"):
        del model.multimax_output
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, MultiMaxConfigMixin):
                _restore_config(value)
    for config, implementation in model._stock_implementations:
        config._attn_implementation_internal = implementation
    del model._stock_implementations
    model._no_split_modules = model._stock_no_split_modules
    model._keys_to_ignore_on_save = model._stock_ignored_on_save
    del model._stock_no_split_modules, model._stock_ignored_on_save
    model._keep_in_fp32_modules_strict = model._keep_in_fp32_modules_strict - {"multimax", "multimax_output"}
    for name in ("fused_output_loss", "_output_loss_checked", "_output_is_fusible"):
        model.__dict__.pop(name, None)
    model.__class__ = model.stock_class


def _restore_config(config: PreTrainedConfig) -> None:
    config.__class__ = config.stock_class
    config.__dict__.pop("multimax", None)
    if config._attn_implementation == IMPLEMENTATION:
        config._attn_implementation_internal = None
    if config.architectures:
        config.architectures = [name.removeprefix(_PREFIX) for name in config.architectures]


def _own_configs(model: PreTrainedModel) -> None:
    """Give ``model`` configs that no other model holds: two stock models may share one object."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, PreTrainedConfig):
                setattr(module, name, copy.deepcopy(value, memo))


def _build(config: MultiMaxConfig, beside: nn.Module, num_heads: int | None) -> Normalizer:
    """The normalizer of ``config``, on the device and in the mode of the module that it is to stand in."""
    parameter = next(beside.parameters(), None)
    with contextlib.nullcontext() if parameter is None else parameter.device:
        return build_normalizer(config, num_heads).train(beside.training)


def _output_modulator(model: PreTrainedModel, config: MultiMaxConfig) -> Normalizer:
    if not get_normalizer(config.normalizer).modulates_output:
        raise ValueError(
            f"output=True is not possible with the normalizer {config.normalizer!r}: it has no output loss"
        )
    return _build(config, model.get_output_embeddings() or model, None)


# -- generated classes -------------------------------------------------------------------------------------------------


def config_class(stock: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The generated config class of a stock one, with the Auto classes told about it."""
    generated = _make_config_class(stock)
    _register(stock, generated)
    return generated


@functools.cache
def _make_config_class(stock: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    def __init__(self: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        stock.__init__(self, *args, **kwargs)  # else the dataclass machinery would write another one

    namespace = {"__init__": __init__, "__module__": __name__, "stock_class": stock}
    namespace["__doc__"] = f"{stock.__name__} of a MultiMax model."
    return type(_PREFIX + stock.__name__, (MultiMaxConfigMixin, stock), namespace)


@functools.cache
def model_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The generated model class of a stock one."""

    @functools.wraps(stock.forward)
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if "multimax_output" not in self._modules:
            return stock.forward(self, *args, **kwargs)
        return modulated_forward(self, stock, *args, **kwargs)

    namespace = {
        "__module__": __name__,
        "__doc__": f"{stock.__name__} with MultiMax in the place of SoftMax.",
        "forward": forward,
        "stock_class": stock,
        "_keep_in_fp32_modules_strict": {*(stock._keep_in_fp32_modules_strict or ()), "multimax", "multimax_output"},
    }
    if stock.config_class is not None:
        namespace["config_class"] = _make_config_class(stock.config_class)
    return type(_PREFIX + stock.__name__, (MultiMaxMixin, stock), namespace)


def _stock(cls: type) -> Any:
    return getattr(cls, "stock_class", cls)


@functools.cache
def _register(stock: type[PreTrainedConfig], generated: type[PreTrainedConfig]) -> None:
    """Tell every Auto class that knows the stock config what to make of the generated one."""
    for name in vars(modeling_auto):
        mapping = getattr(getattr(modeling_auto, name), "_model_mapping", None)
        if mapping is not None and stock in mapping:
            value = mapping[stock]
            models = tuple(map(model_class, value)) if isinstance(value, tuple | list) else model_class(value)
            mapping.register(generated, models, exist_ok=True)
    for mapping in (
        tokenization_auto.TOKENIZER_MAPPING,
        image_processing_auto.IMAGE_PROCESSOR_MAPPING,
        feature_extraction_auto.FEATURE_EXTRACTOR_MAPPING,
        processing_auto.PROCESSOR_MAPPING,
    ):
        if stock in mapping:
            mapping.register(generated, mapping[stock], exist_ok=True)


def __getattr__(name: str) -> Any:
    """``MultiMax<Arch>`` for any class of Transformers, so that generated classes can be imported and unpickled."""
    stock = getattr(transformers, name.removeprefix(_PREFIX), None) if name.startswith(_PREFIX) else None
    if isinstance(stock, type) and issubclass(stock, PreTrainedConfig):
        return config_class(stock)
    if isinstance(stock, type) and issubclass(stock, PreTrainedModel):
        return model_class(stock)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def attention_mask(*args: Any, **kwargs: Any) -> Any:
    """SDPA's boolean masks, None where the layer knows that it is causal."""
    if getattr(kwargs.get("config"), "masks_in_full", False):
        kwargs["allow_is_causal_skip"] = False
    return sdpa_mask(*args, **kwargs)


def register_extension_points() -> None:
    """Register the attention function, its mask and the model type with Transformers."""
    AttentionInterface.register(IMPLEMENTATION, attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, attention_mask)
    CONFIG_MAPPING.register(MODEL_TYPE, MultiMaxAutoConfig, exist_ok=True)
