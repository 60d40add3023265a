"""The commands of ``hf-multimax`` and what all of them share."""

from collections.abc import Callable
from typing import Annotated

import typer

from hf_multimax.command_line import checkpoints, demo, drawing, exploring, looking, machine, screen
from hf_multimax.command_line.options import spread
from hf_multimax.version import __version__

__all__ = ["app"]

app = typer.Typer(
    name="hf-multimax",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="MultiMax, a learnable SoftMax, for models of Transformers: patch them, and look at what they learned. "
    "A model is a folder or an id on the Hub; adapters are loaded with their base.",
    epilog="Examples:\n\nhf-multimax patch gpt2 gpt2-multimax\n\nhf-multimax inspect gpt2-multimax\n\n"
    "hf-multimax measure gpt2-multimax --data wiki.txt --json > measures.json",
)


def _version(wanted: bool) -> None:
    if wanted:
        screen.say(__version__)
        raise typer.Exit


@app.callback()
def _all_commands(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error comes from.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    screen.raise_errors(traceback)


def _add(function: Callable[..., None], name: str, panel: str, *examples: str) -> None:
    """A command, whose help ends with examples."""
    told = screen.tells_errors(spread(function))
    lines = "\n\n".join(f"hf-multimax {example}" for example in examples)
    app.command(name, rich_help_panel=panel, epilog=f"Examples:\n\n{lines}")(told)


_LOOK, _MODELS, _HERE = "Look", "Models", "This machine"
_add(looking.inspect, "inspect", _LOOK, "inspect gpt2-multimax", "inspect you/gpt2-multimax --data wiki.txt --json")
_add(
    looking.measure,
    "measure",
    _LOOK,
    "measure gpt2-multimax --data wiki.txt",
    "measure gpt2 --data wiki.txt --batches 100 --heads",
    "measure vit-multimax --data images/ --json > measures.json",
)
_add(
    looking.compare,
    "compare",
    _LOOK,
    "compare gpt2 gpt2-multimax --data wiki.txt",
    "compare softmax-run multimax-run --data wiki.txt --out figures/",
)
_add(
    drawing.plot,
    "plot",
    _LOOK,
    "plot gpt2-multimax --out figures/",
    "plot gpt2-multimax --out figures/ --text 'the cat sat on the mat' --format svg",
    "plot vit-multimax --out figures/ --data images/ --image cat.png",
)
_add(
    exploring.explore,
    "explore",
    _LOOK,
    "explore gpt2-multimax",
    "explore gpt2 --text 'the cat sat on the mat' --open",
    "explore vit-multimax --image cat.png --port 8000",
)
_add(
    checkpoints.patch,
    "patch",
    _MODELS,
    "patch gpt2 gpt2-multimax",
    "patch gpt2 gpt2-multimax --order 1 --per-head --include 'h.[0-5].'",
    "patch gpt2 gpt2-r --normalizer rsoftmax --option sparsity=0.3",
)
_add(checkpoints.push, "push", _MODELS, "push gpt2-multimax you/gpt2-multimax", "push my-run you/my-run --private")
_add(
    checkpoints.convert,
    "convert",
    _MODELS,
    "convert checkpoint.pth vit-multimax --layout timm-vit --option num_heads=6",
    "convert vit-multimax weights.safetensors --layout timm-vit --to-authors",
)
_add(machine.supported, "supported", _MODELS, "supported", "supported gpt2", "supported bert llama --json")
_add(machine.backends, "backends", _HERE, "backends", "backends --json")
_add(machine.env, "env", _HERE, "env", "env --json")
_add(demo.demo, "demo", _HERE, "demo", "demo --steps 300 --out demo")
