"""The config of a MultiMax adapter: what of a model it replaces, in PEFT's terms and in ours."""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig, PeftType
from transformers import PreTrainedModel

from hf_multimax.config import MultiMaxConfig
from hf_multimax.models.discovery import find_layers, head_count, select_layers
from hf_multimax.models.generated import stock_of
from hf_multimax.models.output import check_output_supported
from hf_multimax.normalizers import build_normalizer
from hf_multimax.normalizers.base import is_patched
from hf_multimax.peft.names import TYPE

__all__ = ["MultiMaxAdapterConfig", "patch_config"]


@dataclass
class MultiMaxAdapterConfig(MultiMaxConfig, PeftConfig):
    """An adapter that is nothing but the scalars of a model's attention, for ``peft.get_peft_model``.

    Its fields are those of :class:`hf_multimax.MultiMaxConfig` and of ``peft.PeftConfig``, and two of PEFT's own. On a
    stock model ``init`` says how the scalars start; on a patched one, whose normalizer, order and so on must be the
    same, they start from the scalars that it has. ``order`` and ``per_head`` are, unless they are given, those of a
    patched model; for a stock one order 1, of each head. (In pretrained attention each head has scores of its own size,
    and a slope of order n acts on the n-th power of scores that reach tens away from zero: with order 2 and one
    learning rate for all the first steps undo what was learned.)

    Raises:
        ValueError: for an impossible value; TypeError for an unknown field.
    """

    order: int | None = field(
        default=None,
        metadata={"help": "order N of the modulator (default: that of a patched model, else 1)"},
    )
    per_head: bool | None = field(
        default=None,
        metadata={
            "help": "one set of parameters per attention head instead of one per layer (default: as a patched model "
            "has it, else true where all layers tell how many heads they have)"
        },
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "attention layers to replace, of those that include and exclude leave: a regular expression that "
            "the whole name matches, or ends of names. None: all of them"
        },
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "other modules that are trained and saved whole, such as a new classifier"}
    )

    def __post_init__(self) -> None:
        self._open = [name for name in ("order", "per_head") if getattr(self, name) is None]
        self._set_open(self._for_stock_models())
        MultiMaxConfig.__post_init__(self)
        PeftConfig.__post_init__(self)
        self.peft_type = PeftType(TYPE)
        if isinstance(self.target_modules, str):
            try:
                re.compile(self.target_modules)
            except re.error as error:
                raise ValueError(
                    f"target_modules={self.target_modules!r} is no regular expression ({error})"
                ) from error
        with torch.device("meta"):
            learned = list(build_normalizer(self, None).parameters())
        if not learned:
            raise ValueError(
                f"normalizer={self.normalizer!r} with normalizer_kwargs={self.normalizer_kwargs!r} learns nothing, so "
                "that an adapter of it would be empty: take one that learns, or call patch_model"
            )

    def to_dict(self) -> dict[str, Any]:
        """Every field, as adapter_config.json has it."""
        return PeftConfig.to_dict(self)

    def multimax(self, **overrides: Any) -> MultiMaxConfig:
        """The part of it that a patched model is made with."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(MultiMaxConfig)}
        return MultiMaxConfig(**{**values, **overrides})

    def settle(self, model: PreTrainedModel) -> None:
        """Choose for ``model`` what was left open: what it has if it is patched, else what all its layers can have."""
        if is_patched(model):
            self._set_open(model.config.multimax)
        else:
            self._set_open(self._for_stock_models())
            if "per_head" in self._open and self.per_head:
                self.per_head = _tell_heads(model, self.layers(model))

    def layers(self, model: PreTrainedModel) -> list[str]:
        """The names of the attention layers of ``model`` that it replaces.

        Raises:
            ValueError: if there is none, or something else stands in the way of what it asks for; the text says what.
        """
        if self.output:
            check_output_supported(model, stock_of(type(model)))
        if not self.attention:
            return []
        selected = select_layers(model, self)
        names = [*selected.interface, *selected.outside]
        chosen = [name for name in names if self._targets(name)]
        if not chosen:
            raise ValueError(
                f"target_modules={self.target_modules!r} matches no attention layer of this "
                f"{type(model).__name__}; they are {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}"
            )
        return chosen

    def _for_stock_models(self) -> dict[str, Any]:
        multimax = self.normalizer == "multimax"
        return {"order": 1 if multimax or self.affine is True else 2, "per_head": multimax and self.attention is True}

    def _set_open(self, values: dict[str, Any]) -> None:
        for name in self._open:
            setattr(self, name, values[name])

    def _targets(self, name: str) -> bool:
        """As PEFT's methods match names."""
        if self.target_modules is None:
            return True
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, name) is not None
        return any(name == end or name.endswith(f".{end}") for end in self.target_modules)


def _tell_heads(model: PreTrainedModel, names: list[str]) -> bool:
    """Whether layers go through Transformers' interface, where scores have heads, and say how many."""
    layers = find_layers(model).interface
    try:
        return all(name in layers and head_count(name, layers[name]) > 0 for name in names)
    except ValueError:  # of a layer that does not say
        return False


def patch_config(
    model: PreTrainedModel, config: MultiMaxAdapterConfig, layers: list[str], output: bool
) -> MultiMaxConfig:
    """What ``model`` is patched with so that just these layers, and perhaps its output, have normalizers."""
    if config.output == output and config.target_modules is None and set(config.layers(model)) == set(layers):
        return config.multimax()
    found = find_layers(model)
    every = set(layers) == {*found.interface, *found.outside, *found.unserved}
    short = [name.removeprefix(f"{model.base_model_prefix}.") for name in layers]
    include = None if every or not layers else [f"^{re.escape(name)}$" for name in short]
    return config.multimax(attention=bool(layers), output=output, include=include, exclude=None)
