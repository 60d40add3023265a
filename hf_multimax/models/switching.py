"""Modules that replace their attention layer while the model runs: the normalizer goes along.

BigBird and BigBirdPegasus do, by ``set_attention_type``, where a text is too short for sparse attention; without this
the layer that takes over would compute SoftMax in silence.
"""

import functools
from collections.abc import Iterable
from typing import Any

from torch import nn

from hf_multimax.models.generated import make_class, stock_of
from hf_multimax.models.outside import outside_class

__all__ = ["SwitchingMixin", "switching_class", "switching_modules"]

_SWITCH = "set_attention_type"


class SwitchingMixin:
    """What marks the class of a module that hands its attention layer's normalizer on."""


def switching_modules(model: nn.Module, layers: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules of ``model`` that may replace one of ``layers``, which they hold."""
    known = {id(layer) for layer in layers}
    holders = (module for module in model.modules() if hasattr(stock_of(type(module)), _SWITCH))
    return [module for module in holders if any(id(child) in known for child in module.children())]


@functools.cache
def switching_class(stock: type[nn.Module]) -> type[nn.Module]:
    """The class of ``stock`` modules that put the normalizer of a layer that they replace into the new one."""

    @functools.wraps(getattr(stock, _SWITCH))
    def set_attention_type(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        before = dict(self.named_children())
        result = getattr(stock, _SWITCH)(self, *args, **kwargs)
        for name, new in self.named_children():
            old = before.get(name, new)
            if new is not old and hasattr(old, "multimax"):
                new.multimax = old.multimax
                new.__class__ = outside_class(type(new))
        return result

    return make_class(SwitchingMixin, stock, switching_class, {_SWITCH: set_attention_type})
