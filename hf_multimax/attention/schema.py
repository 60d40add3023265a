"""Custom operators whose arguments are the fields of a class: one schema, one order."""

from collections.abc import Callable
from typing import get_type_hints

import torch
from torch import Tensor

__all__ = ["LIBRARY", "arguments_of", "define"]

#: the fragment that the operators live in, as long as the process does
LIBRARY = torch.library.Library("hf_multimax", "FRAGMENT")
_TYPES = {Tensor: "Tensor", float: "float", bool: "bool", int: "SymInt", torch.dtype: "ScalarType"}
_TYPES |= {kind | None: f"{name}?" for kind, name in _TYPES.items()}


def arguments_of(cls: type) -> str:
    """A class's annotated fields as an operator's arguments."""
    return ", ".join(f"{_TYPES[kind]} {name}" for name, kind in get_type_hints(cls).items())


def define(schema: str, function: Callable, fake: Callable, key: str = "CompositeExplicitAutograd") -> Callable:
    """A functional operator of ``hf_multimax`` (a third of the overhead of ``torch.library.custom_op``)."""
    name = schema[: schema.index("(")]
    LIBRARY.define(schema)
    LIBRARY.impl(name, function, key)
    torch.library.register_fake(f"hf_multimax::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.hf_multimax, name).default
