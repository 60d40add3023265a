"""``supported``, ``backends`` and ``env``: what works, and what works here."""

import importlib.metadata
import importlib.resources
import json
import platform
import sys
from collections import Counter
from typing import Annotated, Any

import torch
import typer

from hf_multimax.attention.call import make_call
from hf_multimax.attention.choose import NAMES
from hf_multimax.attention.native import backend as native
from hf_multimax.attention.triton import backend as triton_attention
from hf_multimax.cache import cache_folder
from hf_multimax.command_line import screen
from hf_multimax.command_line.options import Json
from hf_multimax.version import __version__

__all__ = ["backends", "env", "supported"]

_MEANING = {
    "passed": "passes every check",
    "failed": "runs patched and fails a check",
    "refused": "is refused",
    "not run": "was not tried: the stock model does not run where the sweep ran",
}
_PACKAGES = ("torch", "transformers", "accelerate", "peft", "entmax", "triton", "safetensors", "huggingface_hub")
_PACKAGES = (*_PACKAGES, "datasets", "matplotlib", "typer", "rich", "numpy")


def _sweep() -> dict[str, Any]:
    """What the sweep over model types found, as it comes with the package."""
    text = importlib.resources.files("hf_multimax.command_line").joinpath("architectures.json").read_text("utf-8")
    return json.loads(text)


def _complete_type(incomplete: str) -> list[str]:
    return [name for name in _sweep()["types"] if name.startswith(incomplete)]


def supported(
    model_type: Annotated[
        list[str] | None,
        typer.Argument(help="Model types, as config.json has them; none: a count.", autocompletion=_complete_type),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what trying every model type of Transformers found; exits with 1 if one of those asked for does not work."""
    sweep = _sweep()
    types, versions = sweep["types"], sweep["versions"]
    for name in model_type or ():
        if name not in types:
            close = [known for known in types if known.startswith(name[:3])][:6]
            hint = f"; there are {', '.join(close)}" if close else ""
            screen.fail(f"no model type {name!r} in Transformers {versions['transformers']}{hint}")
    chosen = {name: types[name] for name in model_type} if model_type else types
    if as_json:
        screen.show_json({"versions": versions, "types": chosen})
    elif model_type:
        for name, row in chosen.items():
            screen.say(f"{name} ({row['class'] or 'no class'}): {_MEANING[row['status']]}")
            if row["why"]:
                screen.say(f"  {row['why']}")
            if row["not_applicable"]:
                screen.say(f"  not applicable: {', '.join(row['not_applicable'])}")
    else:
        counts = Counter(row["status"] for row in types.values())
        rows = [(meaning, str(counts[status])) for status, meaning in _MEANING.items()]
        title = f"{len(types)} model types of Transformers {versions['transformers']}, torch {versions['torch']}"
        screen.show_table(title, ("a model type that", "number"), rows)
    if model_type and any(row["status"] != "passed" for row in chosen.values()):
        raise typer.Exit(1)


def backends(as_json: Json = False) -> None:
    """List the implementations of attention, which of them work here, and why the others do not."""
    with screen.working("looking for a compiler"):
        found = _backends()
    if as_json:
        screen.show_json(found)
        return
    rows = [(name, "yes" if not why else "no", why or note) for name, (why, note) in _described(found)]
    screen.show_table("Backends of attention", ("backend", "works here", ""), rows, left=3)


def _described(found: dict[str, dict[str, Any]]) -> list[tuple[str, tuple[str, str]]]:
    return [(name, (entry["why_not"], entry["what"])) for name, entry in found.items()]


def _backends() -> dict[str, dict[str, Any]]:
    """For each backend what it is, whether it works here, and why not."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    q = torch.zeros(1, 1, 1, 8, device=device)
    scalars = torch.zeros(2, device=device)
    why = {
        "native": "" if native.available() else native.reason(),
        "triton": triton_attention.unsupported(make_call(q, q, q, scalars, scalars)) or "",
    }
    if why["triton"] and device.type == "cpu":
        why["triton"] = "no CUDA device, and Triton's interpreter (TRITON_INTERPRET=1) is off"
    what = {
        "auto": "the fastest of these that supports a call",
        "eager": "plain PyTorch, the whole score matrix",
        "tiled": "PyTorch in tiles, memory linear in the length",
        "native": "C++ on CPUs, compiled at first use",
        "triton": "kernels for CUDA",
    }
    return {name: {"works": not why.get(name), "why_not": why.get(name, ""), "what": what[name]} for name in NAMES}


def env(as_json: Json = False) -> None:
    """Describe this machine and its packages, for a bug report. Nothing secret is in it."""
    found: dict[str, Any] = {"hf-multimax": __version__, "python": sys.version.split()[0]}
    found["platform"] = platform.platform()
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["cpu"] = f"{platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    found["threads"] = torch.get_num_threads()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found["cuda"] = ", ".join(torch.cuda.get_device_name(i) for i in range(count)) or None
    with screen.working("looking for a compiler"):
        found["backends"] = ", ".join(name for name, entry in _backends().items() if entry["works"])
    found["cache"] = str(cache_folder())
    if as_json:
        screen.show_json(found)
    else:
        for name, value in found.items():
            screen.say(f"- {name}: {'not installed' if value is None and name != 'cuda' else value or 'none'}")
