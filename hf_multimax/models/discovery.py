"""Finding the attention layers of a model, and refusing those that cannot be replaced faithfully."""

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import CodeType, FunctionType

from torch import nn
from transformers import PreTrainedModel

from hf_multimax.config import MultiMaxConfig
from hf_multimax.models.exceptions import (
    ATTENTION_BY_NAME,
    HANDLED_KEYWORDS,
    HEAD_COUNT_ATTRIBUTES,
    IRRELEVANT_KEYWORDS,
    QUERY_WIDTH_ATTRIBUTES,
    UNSERVED_ATTENTION,
    UNUSED_ATTENTION,
)
from hf_multimax.models.generated import stock_of

__all__ = ["Layers", "attention_layers", "code_names", "find_layers", "head_count", "methods", "select_layers"]

_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
#: What attention is computed by outside the interface.
_SOFTMAX = {"softmax", "Softmax", "scaled_dot_product_attention", "multi_head_attention_forward"}
_NAME = re.compile(r"att(entio)?n", re.IGNORECASE)


@dataclass(frozen=True)
class Layers:
    """The attention layers of a model by name.

    Attributes:
        interface: those that call Transformers' AttentionInterface.
        outside: those that compute a softmax over keys by themselves, which can be answered.
        unserved: those that nothing can be put into, and why.
    """

    interface: dict[str, nn.Module] = field(default_factory=dict)
    outside: dict[str, nn.Module] = field(default_factory=dict)
    unserved: dict[str, str] = field(default_factory=dict)


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of ``model`` that calls Transformers' AttentionInterface, by name."""
    return {name: module for name, module in model.named_modules() if _uses_interface(stock_of(type(module)))}


def find_layers(model: nn.Module) -> Layers:
    """Every attention layer of ``model``; those whose result the class computes but does not use are left out."""
    unused = UNUSED_ATTENTION.get(type(model).__name__, frozenset())
    found = Layers(attention_layers(model))
    modules = dict(model.named_modules())
    for name, module in modules.items():
        cls = stock_of(type(module))
        if name in unused or not (isinstance(module, nn.MultiheadAttention) or _computes_attention(cls)):
            continue
        parent = modules.get(name.rpartition(".")[0])
        reason = next((why for part, why in UNSERVED_ATTENTION.items() if part in cls.__name__.lower()), None)
        if isinstance(parent, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            reason = f"a {type(parent).__name__} of PyTorch, which does not call it in evaluation"
        if reason is None:
            found.outside[name] = module
        else:
            found.unserved[name] = reason
    return found


def select_layers(model: PreTrainedModel, config: MultiMaxConfig, strict: bool = True) -> Layers:
    """The attention layers of ``model`` that ``config`` replaces.

    Args:
        strict: raise for a pattern of ``config`` that matches no layer; False when a checkpoint is loaded into a class
            that has only some of the layers it was patched with.

    Raises:
        ValueError: if there is no attention layer, none is selected, a pattern matches none, or a selected layer does
            something that cannot be replaced; the text names model type and layers.
    """
    where = f"{type(model).__name__} (model type {model.config.model_type!r})"
    found = find_layers(model)
    names = [*found.interface, *found.outside, *found.unserved]
    if not names:
        raise ValueError(f"{where} has no attention layer: {_what_else(model)}")
    short = {name: name.removeprefix(f"{model.base_model_prefix}.") for name in names}
    if strict:
        for option in ("include", "exclude"):
            for pattern in config.patterns(option):
                if not any(re.search(pattern, name) for name in short.values()):
                    raise ValueError(
                        f"MultiMaxConfig.{option}: {pattern!r} matches no attention layer of {where}; "
                        f"they are {_listing(short.values())}"
                    )
    chosen = {name for name in names if config.matches(short[name])}
    refused = {short[name]: why for name, why in found.unserved.items() if name in chosen}
    if config.outside == "refuse":
        why = "outside Transformers' AttentionInterface"
        refused = {**{short[name]: why for name in found.outside if name in chosen}, **refused}
    if refused:
        reasons = "; ".join(f"{_listing([n for n in refused if refused[n] == why])}: {why}" for why in _unique(refused))
        rest = len(chosen) > len(refused)
        raise ValueError(
            f"{where} has attention that cannot be replaced and would stay SoftMax ({reasons}). "
            + (f"If that is what you want, say so with exclude={_patterns(refused)}" if rest else "It has no other")
        )
    selected = Layers(
        {name: module for name, module in found.interface.items() if name in chosen},
        {name: module for name, module in found.outside.items() if name in chosen},
    )
    if not chosen:
        raise ValueError(
            f"include and exclude of MultiMaxConfig leave no attention layer of {where}; "
            f"they are {_listing(short.values())}"
        )
    for name, module in selected.interface.items():
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


def query_width(name: str, module: nn.Module) -> int:
    """The width of a query of an attention layer; ValueError, naming the layer, if it does not hand queries over."""
    if not _uses_interface(stock_of(type(module))):
        raise ValueError(
            f"{name} ({type(module).__name__}) computes its attention outside Transformers' AttentionInterface, so "
            "that its queries are not seen: leave it at SoftMax with exclude="
        )
    for attribute in QUERY_WIDTH_ATTRIBUTES:
        value = getattr(module, attribute, None)
        if isinstance(value, int):
            return value
    raise ValueError(f"{name} ({type(module).__name__}) does not tell the width of its queries: leave it out, exclude=")


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


@functools.cache
def _computes_attention(cls: type) -> bool:
    """Whether a class is called attention and computes a softmax, in a method or a function beside it."""
    return _is_called_attention(cls) and not _uses_interface(cls) and _computes_softmax(cls)


def _is_called_attention(cls: type) -> bool:
    return cls.__name__ in ATTENTION_BY_NAME or bool(_NAME.search(cls.__name__))


@functools.cache
def _computes_softmax(cls: type) -> bool:
    if not cls.__module__.startswith("torch."):
        for function in methods(cls):
            names = set(_names(function.__code__))
            if names & _SOFTMAX:
                return True
            beside = (function.__globals__.get(name) for name in names if name != "eager_attention_forward")
            codes = (inspect.unwrap(f).__code__ for f in beside if isinstance(f, FunctionType))
            if any(_SOFTMAX & set(code.co_names) for code in codes):
                return True
    return False


def methods(cls: type) -> Iterator[FunctionType]:
    """The functions of a class and of those it is derived from, what all modules and models share not included."""
    for base in cls.__mro__:
        shared = base.__module__.startswith("transformers.") and not base.__module__.startswith("transformers.models.")
        if not (shared or base.__module__.startswith("torch.") or base is object):
            for value in vars(base).values():
                function = inspect.unwrap(value) if callable(value) else None
                if isinstance(function, FunctionType):
                    yield function


def _what_else(model: nn.Module) -> str:
    """Of a model in which no attention was found: what is called so or computes a softmax, or what it is made of."""
    called = {name: type(m).__name__ for name, m in model.named_modules() if _is_called_attention(stock_of(type(m)))}
    if called:
        return f"{_listing(called)} ({_listing(_unique(called))}) compute no softmax over keys that could be replaced"
    softmax = [name or type(model).__name__ for name, m in model.named_modules() if _computes_softmax(type(m))]
    if softmax:
        return f"a softmax is computed in {_listing(softmax)}, which is none by its name"
    return f"none of its modules computes a softmax ({_listing(sorted({type(m).__name__ for m in model.modules()}))})"


def _unique(values: Mapping[str, str]) -> list[str]:
    return list(dict.fromkeys(values.values()))


def _patterns(names: Iterable[str]) -> list[str]:
    """Regular expressions for layers by name, those of a repeated block in one."""
    escaped = (re.sub(r"(?<=\.)\d+(?=\.|$)", "<n>", name) for name in names)
    found = list(dict.fromkeys(re.escape(name).replace("<n>", r"\d+") for name in escaped))
    return found if len(found) <= 4 else sorted({name.rpartition(".")[2] for name in names})


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
