"""Finding the attention layers of a model, and refusing those that cannot be replaced faithfully."""

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Iterator
from types import CodeType

from torch import nn
from transformers import PreTrainedModel

from hf_multimax.config import MultiMaxConfig
from hf_multimax.models.exceptions import HANDLED_KEYWORDS, HEAD_COUNT_ATTRIBUTES, IRRELEVANT_KEYWORDS, UNUSED_ATTENTION

__all__ = ["attention_layers", "code_names", "head_count", "select_layers"]

_INTERFACE = "ALL_ATTENTION_FUNCTIONS"


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of ``model`` that calls Transformers' AttentionInterface, by name."""
    return {name: module for name, module in model.named_modules() if _uses_interface(type(module))}


def select_layers(model: PreTrainedModel, config: MultiMaxConfig, strict: bool = True) -> dict[str, nn.Module]:
    """The attention layers of ``model`` that ``config`` replaces, by name.

    Args:
        strict: raise for a pattern of ``config`` that matches no layer; False when a checkpoint is loaded into a class
            that has only some of the layers it was patched with.

    Raises:
        ValueError: if there is no attention layer, none is selected, a pattern matches none, or a selected layer does
            something that the attention function does not; the text names model type and layers.
    """
    where = f"{type(model).__name__} (model type {model.config.model_type!r})"
    layers, outside = attention_layers(model), _attention_outside_interface(model)
    if not layers:
        found = f"; its attention is in {_listing(outside)}, outside that interface" if outside else ""
        raise ValueError(f"no attention layer of {where} goes through Transformers' AttentionInterface{found}")
    short = {name: name.removeprefix(f"{model.base_model_prefix}.") for name in (*layers, *outside)}
    if strict:
        for option in ("include", "exclude"):
            for pattern in config.patterns(option):
                if not any(re.search(pattern, name) for name in short.values()):
                    raise ValueError(
                        f"MultiMaxConfig.{option}: {pattern!r} matches no attention layer of {where}; "
                        f"they are {_listing(short.values())}"
                    )
    selected = {name: module for name, module in layers.items() if config.matches(short[name])}
    if not selected:
        raise ValueError(
            f"include and exclude of MultiMaxConfig leave no attention layer of {where}; "
            f"they are {_listing(short.values())}"
        )
    left_behind = [short[name] for name in outside if config.matches(short[name])]
    if left_behind:
        raise ValueError(
            f"{where} has attention outside Transformers' AttentionInterface, which stays SoftMax: "
            f"{_listing(left_behind)}. If that is what you want, say so with exclude="
            f"{sorted({re.escape(name) for name in left_behind})[:4]}"
        )
    for name, module in selected.items():
        unknown = _call_keywords(type(module)) - HANDLED_KEYWORDS - IRRELEVANT_KEYWORDS
        if unknown:
            raise ValueError(
                f"{name} of {where} passes {', '.join(sorted(unknown))} to its attention, which MultiMax attention "
                "does not support; exclude the layer to leave SoftMax there"
            )
    return selected


def head_count(name: str, module: nn.Module) -> int:
    """The number of query heads of an attention layer; ValueError, naming the layer, if it does not tell."""
    for holder in (module, getattr(module, "config", None)):
        for attribute in HEAD_COUNT_ATTRIBUTES:
            value = getattr(holder, attribute, None)
            if isinstance(value, int):
                return value
    raise ValueError(f"{name} ({type(module).__name__}) does not tell its number of heads: patch with per_head=False")


def code_names(cls: type) -> frozenset[str]:
    """Every global, attribute and variable name in the class's own ``forward``, decorators removed."""
    code = getattr(inspect.unwrap(cls.forward), "__code__", None)
    return frozenset() if code is None else frozenset(_names(code))


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    yield from code.co_varnames
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


@functools.cache
def _uses_interface(cls: type) -> bool:
    return _INTERFACE in code_names(cls)


def _attention_outside_interface(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that compute a softmax attention by themselves, and whose result ``model`` uses."""
    unused = UNUSED_ATTENTION.get(getattr(type(model), "stock_class", type(model)).__name__, frozenset())

    def computes_softmax(module: nn.Module) -> bool:
        cls = type(module)
        if isinstance(module, nn.MultiheadAttention):
            return True
        softmax = {"softmax", "scaled_dot_product_attention"}
        return "attention" in cls.__name__.lower() and not _uses_interface(cls) and bool(softmax & code_names(cls))

    return {name: module for name, module in model.named_modules() if name not in unused and computes_softmax(module)}


@functools.cache
def _call_keywords(cls: type) -> frozenset[str]:
    """The keywords that the class's ``forward`` writes out when it calls the attention interface."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(cls.forward))))
    except (OSError, TypeError, SyntaxError):
        return frozenset()  # no source: defined interactively
    functions = {
        ast.unparse(target)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value and _INTERFACE in ast.unparse(node.value)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    }
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) in functions)
    return frozenset(keyword.arg for call in calls for keyword in call.keywords if keyword.arg)


def _listing(names: object, most: int = 6) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
