"""Options that several commands have, as dataclasses; :func:`spread` makes Typer's parameters of them."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

import hf_multimax
from hf_multimax import MultiMaxConfig
from hf_multimax.command_line.data import KINDS

__all__ = [
    "DataOptions",
    "Device",
    "Force",
    "Json",
    "Length",
    "MapOptions",
    "ModelPath",
    "Replacement",
    "Revision",
    "spread",
]

ModelPath = Annotated[str, typer.Argument(metavar="PATH", help="A model or an adapter: a folder, or an id on the Hub.")]
Device = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1, mps.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens of an input at most.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]
Json = Annotated[bool, typer.Option("--json", help="Write JSON instead of a table.")]
Force = Annotated[bool, typer.Option("--force", help="Write into a folder that holds files.")]

_HELP = {name: field.metadata["help"] for name, field in MultiMaxConfig.__dataclass_fields__.items()}


def _complete_normalizer(incomplete: str) -> list[str]:
    return [name for name in hf_multimax.registered_normalizers() if name.startswith(incomplete)]


@dataclass
class DataOptions:
    """What a model is measured on."""

    data: Annotated[str | None, typer.Option(help=f"{KINDS[0].upper()}{KINDS[1:]}. Default: a short English text.")] = (
        None
    )
    batch_size: Annotated[int, typer.Option(min=1, help="Inputs in a batch.")] = 4
    batches: Annotated[int, typer.Option(min=1, help="How many batches to take at most.")] = 8
    length: Length = 256


@dataclass
class MapOptions:
    """Whose attention maps are drawn, and of what."""

    text: Annotated[str | None, typer.Option(help="A sentence whose attention maps are drawn.")] = None
    image: Annotated[Path | None, typer.Option(help="An image whose attention map is drawn.")] = None
    beside: Annotated[str | None, typer.Option(help="Another model, whose maps are drawn beside.")] = None
    layer: Annotated[str | None, typer.Option(help="The layer of the maps; default: the last.")] = None


@dataclass
class Replacement:
    """What stands in SoftMax's place: the fields of MultiMaxConfig."""

    normalizer: Annotated[str, typer.Option(help=_HELP["normalizer"], autocompletion=_complete_normalizer)] = "multimax"
    option: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE, an option of the normalizer; may be given again.")
    ] = None
    order: Annotated[int | None, typer.Option(help=_HELP["order"])] = None
    affine: Annotated[bool, typer.Option("--affine", help=_HELP["affine"])] = False
    per_head: Annotated[bool, typer.Option("--per-head", help=_HELP["per_head"])] = False
    output: Annotated[bool, typer.Option("--output", help=_HELP["output"])] = False
    attention: Annotated[bool, typer.Option(help=_HELP["attention"])] = True
    init: Annotated[str, typer.Option(help=_HELP["init"])] = "identity"
    init_std: Annotated[float, typer.Option(help=_HELP["init_std"])] = 0.02
    include: Annotated[list[str] | None, typer.Option(help=_HELP["include"])] = None
    exclude: Annotated[list[str] | None, typer.Option(help=_HELP["exclude"])] = None


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the fields of its parameters that are dataclasses as parameters of its own."""
    parameters, groups = [], {}
    for name, parameter in inspect.signature(command).parameters.items():
        if is_dataclass(parameter.annotation):
            groups[name] = parameter.annotation
            parameters += map(_parameter, fields(parameter.annotation))
        else:
            parameters.append(parameter.replace(kind=parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def gathered(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    gathered.__signature__ = inspect.Signature(parameters)
    gathered.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return gathered


def _parameter(field: Any) -> inspect.Parameter:
    default = inspect.Parameter.empty if field.default is MISSING else field.default
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=field.type)
