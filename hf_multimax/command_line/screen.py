"""What commands write: tables and JSON on standard output, progress and errors on standard error."""

import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers.utils import logging

from hf_multimax.command_line.words import one_line

__all__ = ["fail", "number", "progress", "raise_errors", "say", "show_json", "show_table", "tells_errors", "working"]

T = TypeVar("T")
#: Set by ``--traceback``: errors are raised as they are.
_raw = False


def raise_errors(raw: bool) -> None:
    """Whether errors come with their traceback from now on."""
    global _raw
    _raw = raw


def tells_errors(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose errors are one line on standard error and exit code 1, without a traceback."""

    @functools.wraps(command)
    def told(*args: Any, **kwargs: Any) -> None:
        try:
            with _quiet():
                command(*args, **kwargs)
        except (OSError, ValueError, TypeError, RuntimeError, ImportError, NotImplementedError) as error:
            if _raw or isinstance(error, typer.Exit):
                raise
            fail(one_line(error))

    return told


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Transformers' advice does not belong into a table, nor its bars into a file."""
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def fail(text: str) -> None:
    """One line on standard error; exits with 1."""
    typer.echo(f"error: {text}", err=True)
    raise typer.Exit(1)


def say(text: str) -> None:
    """A line on standard output."""
    typer.echo(text)


def show_json(values: Any) -> None:
    """JSON on standard output, and nothing else; what is NaN or infinite is null."""
    typer.echo(json.dumps(_finite(values), indent=1))


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> None:
    """A table; the columns after the first ``left`` are aligned to the right. Nothing is cut where it is not shown."""
    console = Console(soft_wrap=False, highlight=False)
    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(escape(column), justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    if not console.is_terminal:  # a pipe or a file has no width
        console = Console(width=200, soft_wrap=False, highlight=False)
    console.print(table)


def number(value: float | None, digits: int = 3) -> str:
    """A figure for a table; a dash where it is not defined."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def progress(what: str, items: Iterable[T], total: int | None) -> Iterator[T]:
    """The items, with a bar on standard error while they are taken."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield from bar.track(items, total=total, description=what)


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner on standard error while the block runs."""
    with Console(stderr=True).status(what):
        yield


def _finite(values: Any) -> Any:
    if isinstance(values, dict):
        return {str(key): _finite(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values
