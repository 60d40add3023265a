"""The two doors of every Transformers model, ``from_pretrained`` and ``save_pretrained``, where stock classes pass.

TRL, PEFT and most scripts load by a stock class (``LlamaForCausalLM.from_pretrained(folder)``), and composite models
are put together from parts by stock code. None of that passes through a class of ours. So both methods of
``PreTrainedModel`` are wrapped once, at import: a stock class that is given a MultiMax checkpoint loads what it is, and
a stock class does not save a model whose MultiMax part would be lost. For everything else they do what they did.
"""

import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, cached_file

from hf_multimax.attention.interface import IMPLEMENTATION
from hf_multimax.models.checkpoint import MODEL_TYPE, is_multimax_key, tell_loading_info
from hf_multimax.models.classes import MultiMaxMixin, registered_model_class
from hf_multimax.models.configs import MultiMaxConfigMixin, is_multimax_config, parts_of
from hf_multimax.models.loader_file import write_loader
from hf_multimax.normalizers.base import Normalizer, is_patched

__all__ = ["open_doors", "patched_parts"]


def open_doors() -> None:
    """Wrap the two methods, once."""
    if not hasattr(PreTrainedModel, "_multimax_doors"):
        PreTrainedModel._multimax_doors = True
        PreTrainedModel.from_pretrained = classmethod(_loading(PreTrainedModel.from_pretrained.__func__))
        PreTrainedModel.save_pretrained = _saving(PreTrainedModel.save_pretrained)


def patched_parts(model: nn.Module) -> dict[str, PreTrainedModel]:
    """The MultiMax models inside a stock one, by name."""
    return {name: part for name, part in model.named_modules() if name and is_patched(part)}


# -- loading -----------------------------------------------------------------------------------------------------------


def _loading(stock: Any) -> Any:
    @functools.wraps(stock)
    def from_pretrained(
        cls: type[PreTrainedModel], pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        path = pretrained_model_name_or_path
        if issubclass(cls, MultiMaxMixin):
            model, info = stock(cls, path, *args, config=config, **{**kwargs, "output_loading_info": True})
            tell_loading_info(cls, info)
            return (model, info) if kwargs.get("output_loading_info") else model
        given = isinstance(config, PreTrainedConfig)
        if is_multimax_config(config) or (not given and _is_ours(config or path, kwargs)):
            return registered_model_class(cls).from_pretrained(path, *args, config=config, **kwargs)
        _check_request(path, config, kwargs)
        wanted = kwargs.pop("output_loading_info", False)
        model, info = stock(cls, path, *args, config=config, output_loading_info=True, **kwargs)
        if "multimax" in vars(model.config) and not is_patched(model):  # not in the cache when it was looked for
            if wanted:
                kwargs["output_loading_info"] = True
            return registered_model_class(cls).from_pretrained(path, *args, config=config, **kwargs)
        _check_parts_loaded(model, info)
        return (model, info) if wanted else model

    return from_pretrained


def _is_ours(path: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a folder, a config file or what the cache has of a repository is a MultiMax checkpoint."""
    if path is None or kwargs.get("gguf_file"):
        return False
    file = Path(path)
    if file.is_dir():
        file = file / (kwargs.get("subfolder") or "") / CONFIG_NAME
    elif not file.is_file():
        hub = {key: kwargs[key] for key in ("cache_dir", "revision", "subfolder") if kwargs.get(key)}
        try:
            found = cached_file(str(path), CONFIG_NAME, local_files_only=True, **hub)
        except (OSError, ValueError):
            return False
        file = Path(found or os.devnull)
    try:
        return json.loads(file.read_text(encoding="utf-8")).get("model_type") == MODEL_TYPE
    except (OSError, ValueError, AttributeError):
        return False


def _check_request(path: Any, config: Any, kwargs: dict[str, Any]) -> None:
    """Raise ValueError for a stock checkpoint that is to be run by MultiMax attention, which it has no scalars for."""
    requested = kwargs.get("attn_implementation", getattr(config, "_attn_implementation", None))
    if requested == IMPLEMENTATION:
        raise ValueError(
            f"attn_implementation={IMPLEMENTATION!r} runs patched models only, but {str(path)!r} is a stock "
            "checkpoint: load it without, and call hf_multimax.patch_model(model). If a trainer asks for a second copy "
            "of a model that was patched in memory (a reference model, say), give it one, as "
            "ref_model=copy.deepcopy(model), or save the patched model and start from that folder"
        )


def _check_parts_loaded(model: nn.Module, info: dict[str, Any]) -> None:
    """Raise ValueError if scalars of a MultiMax part of a stock model were not in the file."""
    missing = sorted(key for key in info["missing_keys"] if is_multimax_key(key))
    if missing and patched_parts(model):
        raise ValueError(f"the checkpoint has no values for MultiMax parameters of the model: {', '.join(missing[:8])}")


# -- saving ------------------------------------------------------------------------------------------------------------


def _saving(stock: Any) -> Any:
    @functools.wraps(stock)
    def save_pretrained(self: PreTrainedModel, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        if is_patched(self):
            return stock(self, save_directory, *args, **kwargs)
        _check_whole(self)
        stock(self, save_directory, *args, **kwargs)
        if is_multimax_config(self.config) and (args[0] if args else kwargs.get("is_main_process", True)):
            write_loader(save_directory)  # the inner model of a patched one
        return None

    return save_pretrained


def _check_whole(model: PreTrainedModel) -> None:
    """Raise ValueError for a stock model that would be saved as SoftMax's but is not, or the other way round."""
    name = type(model).__name__
    parts = patched_parts(model)
    if parts:
        raise ValueError(
            f"{', '.join(parts)} of this {name} is a MultiMax model inside a stock one, whose checkpoint would load as "
            "SoftMax: call hf_multimax.patch_model on the whole model first, which takes over the scalars"
        )
    if isinstance(model.config, MultiMaxConfigMixin):
        if "multimax" not in vars(model.config):
            model.config.save_pretrained(os.devnull)  # raises: a part does not know the whole
        if not _is_patched_inside(model):
            raise ValueError(
                f"this {name} is a stock model with the config of a MultiMax model, whose scalars it does not have: "
                "load the checkpoint with from_pretrained, or call hf_multimax.patch_model on a model with a stock one"
            )
        return
    entry = next((part for part in _configs(model) if is_multimax_config(part)), None)
    if entry is not None or any(isinstance(module, Normalizer) for module in model.modules()):
        raise ValueError(
            f"this {name} has a part with the config of a MultiMax model ({type(entry).__name__}), but is a stock "
            "model whose checkpoint would load as SoftMax: build it from stock parts, then call hf_multimax.patch_model"
        )


def _is_patched_inside(model: PreTrainedModel) -> bool:
    """Whether an inner model of a patched one has the normalizers that its config says."""
    return not model.config.multimax["attention"] or any(isinstance(module, Normalizer) for module in model.modules())


def _configs(model: PreTrainedModel) -> Iterator[PreTrainedConfig]:
    """Every config of a model: those that its modules hold, and those inside them."""
    seen: set[int] = set()
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, PreTrainedConfig):
                for part in parts_of(value):
                    if id(part) not in seen:
                        seen.add(id(part))
                        yield part
