"""Saving and loading adapters of MultiMax models: on a stock base, too, one comes with the scalars it was trained with.

PEFT ignores entries of ``modules_to_save`` that a base does not have. So saving an adapter of a patched model also
writes ``multimax_config.json`` beside it, and loading one first looks at what it carries: a stock base is patched as
the adapter's was, and what cannot be right is refused. A MultiMax adapter patches its base itself; it is checked for
being whole, and gets a record where it is not all that its base had.
"""

import functools
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_multimax.models.checkpoint import is_multimax_key
from hf_multimax.models.classes import check_values_to_save
from hf_multimax.peft.base import check_modules_to_save, prepare_base, put_scalars, write_record
from hf_multimax.peft.card import add_to_card
from hf_multimax.peft.files import HUB_ARGUMENTS

__all__ = ["wrap_peft", "wrap_transformers"]


def wrap_transformers() -> None:
    """Wrap ``load_adapter`` of Transformers' own PEFT integration."""
    stock = PreTrainedModel.load_adapter
    if hasattr(stock, "_multimax_door"):
        return

    @functools.wraps(stock)
    def load_adapter(self: PreTrainedModel, peft_model_id: Any = None, *args: Any, **kwargs: Any) -> Any:
        hub = {**(kwargs.get("adapter_kwargs") or {}), **{k: kwargs[k] for k in HUB_ARGUMENTS if kwargs.get(k)}}
        scalars = prepare_base(self, peft_model_id, hub, kwargs.get("adapter_state_dict"), kwargs.get("peft_config"))
        result = stock(self, peft_model_id, *args, **kwargs)
        put_scalars(self, scalars, (args[0] if args else kwargs.get("adapter_name")) or "default")
        return result

    load_adapter._multimax_door = True
    PreTrainedModel.load_adapter = load_adapter


def wrap_peft(peft: ModuleType) -> None:
    """Wrap the methods of PeftModel that save and load adapters."""
    model_class = peft.PeftModel
    load, from_pretrained, save = model_class.load_adapter, model_class.from_pretrained, model_class.save_pretrained
    tuner_class = peft.tuners.tuners_utils.BaseTuner
    inject, set_state = tuner_class.inject_adapter, peft.set_peft_model_state_dict

    @functools.wraps(load)
    def load_adapter(self: Any, model_id: Any, *args: Any, **kwargs: Any) -> Any:
        scalars = prepare_base(self.get_base_model(), model_id, kwargs)
        result = load(self, model_id, *args, **kwargs)
        put_scalars(self.get_base_model(), scalars, args[0] if args else kwargs["adapter_name"])
        return result

    @functools.wraps(from_pretrained.__func__)
    def wrapped_from_pretrained(cls: type, model: nn.Module, model_id: Any, *args: Any, **kwargs: Any) -> Any:
        prepare_base(model, model_id, kwargs, config=args[2] if len(args) > 2 else kwargs.get("config"))
        return from_pretrained.__func__(cls, model, model_id, *args, **kwargs)

    @functools.wraps(save)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        base = self.get_base_model()
        state_dict = kwargs.get("state_dict")
        check_values_to_save(base, state_dict, save_directory)
        save(self, save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            names = list(kwargs.get("selected_adapters") or self.peft_config)
            add_to_card(base, Path(save_directory, "README.md"), names)
            for name in names:
                folder = Path(save_directory, *([name] if name != "default" else []))
                write_record(base, folder, name, state_dict)

    @functools.wraps(inject)
    def inject_adapter(self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        check_modules_to_save(model, self.peft_config[adapter_name])
        inject(self, model, adapter_name, *args, **kwargs)

    @functools.wraps(set_state)
    def set_peft_model_state_dict(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = set_state(model, *args, **kwargs)
        _check_all_used(result)
        return result

    model_class.load_adapter = load_adapter
    model_class.from_pretrained = classmethod(wrapped_from_pretrained)
    model_class.save_pretrained = save_pretrained
    tuner_class.inject_adapter = inject_adapter
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "peft" and vars(module).get("set_peft_model_state_dict") is set_state:
            module.set_peft_model_state_dict = set_peft_model_state_dict


def _check_all_used(result: Any) -> None:
    """Raise ValueError if scalars of an adapter were not put into the model."""
    unused = sorted(key for key in getattr(result, "unexpected_keys", None) or () if is_multimax_key(key))
    if unused:
        raise ValueError(
            f"the adapter carries MultiMax scalars that the model has no place for ({', '.join(unused[:4])}): load it "
            "with PeftModel.from_pretrained or load_adapter, which patch a stock base, or call patch_model first"
        )
