"""SUPPORTED_MODELS.md and the counts in docs/supported-models.md, made from the results of a sweep."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.architectures.results import failures
from benchmarks.common import ROOT

__all__ = ["DOCUMENT", "PAGE", "SHIPPED", "counts", "document", "render", "shipped"]

PAGE = ROOT / "SUPPORTED_MODELS.md"
DOCUMENT = ROOT / "docs" / "supported-models.md"
#: What `hf-multimax supported` reads, also where only the package is installed.
SHIPPED = ROOT / "hf_multimax" / "command_line" / "architectures.json"

Row = Mapping[str, Any]
_BLOCK = re.compile(r"(<!-- architectures -->\n).*?(<!-- /architectures -->)", flags=re.DOTALL)


def render(results: Mapping[str, Any]) -> str:
    """The page for ``results``, as :func:`benchmarks.architectures.results.read` returns them."""
    rows = results["rows"]
    versions = results["environment"]["versions"]
    found = counts(rows)
    sections = [
        _section("They pass every check", found["passed"], ("type", "class", "layers", "not applicable"), _passed),
        _section("They run patched, and fail a check", found["failed"], ("type", "class", "what is seen"), _failed),
        _section(
            "Refused: their attention is not replaced",
            found["refused"],
            ("type", "class", "outside the AttentionInterface"),
            _refused,
        ),
        _section("Refused: they have no attention", found["without attention"], ("type", "class"), _plain),
        _section("Not tried: the stock model does not run here", found["not run"], ("type", "why"), _reason),
    ]
    return f"""# Supported models

Made by `python -m benchmarks.architectures`, which tries every model type of Transformers that has an Auto class; do
not edit it. This page: Transformers {versions["transformers"]}, torch {versions["torch"]}, {len(rows)} model types.

{summary(rows)}

Each type is a tiny random model, with inputs for every tower that its forward runs. The checks: every module that
computes attention is found; at identity the patched model's outputs are the stock model's, bit for bit in float32 under
eager, to rounding in the default backend, and so is what it generates; a training step in bfloat16 autocast (in
float16, too, where it generates) with gradient checkpointing and without a cache errs no more than the stock model's;
random scalars change the outputs; the backends agree; no output sees a later token where the stock model's does not;
every scalar that matters gets a gradient; saved, loaded by its Auto class and saved again, files and outputs are the
same; a head's checkpoint loads as the base and the other way round; generation gives the same tokens with a dynamic
cache, a static one and none, and the last logits alone are those among all; unpatched, the stock model is back. A check
does not apply where the stock model cannot do the same.

{"".join(sections)}"""


def shipped(results: Mapping[str, Any]) -> str:
    """The part of the results that comes with the package, a model type a line."""
    lines = []
    for row in results["rows"]:
        why = row.get("sentence") or row.get("reason") or "; ".join(f"{k}: {v}" for k, v in failures(row).items())
        skipped = [name for name, result in row["checks"].items() if result.startswith("- ")]
        values = {"class": row.get("class"), "status": row["status"], "why": why, "not_applicable": skipped}
        lines.append(f" {json.dumps(row['type'])}: {json.dumps(values)}")
    versions = json.dumps({name: results["environment"]["versions"][name] for name in ("transformers", "torch")})
    return f'{{"versions": {versions}, "types": {{\n' + ",\n".join(lines) + "\n}}\n"


def counts(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows by what became of them."""
    groups: dict[str, list[Row]] = {
        name: [] for name in ("passed", "failed", "refused", "without attention", "not run")
    }
    for row in rows:
        bare = row["status"] == "refused" and not row.get("attention")
        groups["without attention" if bare else row["status"]].append(row)
    return groups


def summary(rows: Sequence[Row]) -> str:
    """The counts as a table."""
    found = counts(rows)
    generate = sum(row["checks"].get("generate") == "passed" for row in found["passed"])
    named = sum(bool(row.get("names the place")) for row in found["refused"])
    lines = [
        (f"pass every check ({generate} of them generate)", len(found["passed"])),
        ("run patched and fail a check", len(found["failed"])),
        (f"are refused for attention that is not replaced ({named} with its place)", len(found["refused"])),
        ("are refused for having no attention", len(found["without attention"])),
        ("were not tried, since the stock model does not run here", len(found["not run"])),
    ]
    return "| model types that | |\n| --- | --- |\n" + "\n".join(f"| {name} | {number} |" for name, number in lines)


def document(text: str, results: Mapping[str, Any]) -> str:
    """``text`` with the counts between its marks; raises ValueError unless they are there once."""
    if len(_BLOCK.findall(text)) != 1:
        raise ValueError("there must be one block `<!-- architectures --> ... <!-- /architectures -->`")
    version = results["environment"]["versions"]["transformers"]
    found = counts(results["rows"])
    line = (
        f"Of the {len(results['rows'])} model types of Transformers {version} that have an Auto class, "
        f"{len(found['passed'])} pass every check of `python -m benchmarks.architectures`; "
        f"{len(found['refused']) + len(found['without attention'])} are refused in a sentence, "
        f"{len(found['without attention'])} of them for having no attention. "
        "[SUPPORTED_MODELS.md](../SUPPORTED_MODELS.md) lists them.\n"
    )
    return _BLOCK.sub(lambda match: f"{match[1]}{line}{match[2]}", text)


def _section(title: str, rows: Sequence[Row], head: tuple[str, ...], cells: Callable[[Row], Iterable[str]]) -> str:
    if not rows:
        return ""
    lines = [head, ("---",) * len(head), *(tuple(cells(row)) for row in rows)]
    table = "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)
    return f"## {title} ({len(rows)})\n\n{table}\n\n"


def _passed(row: Row) -> tuple[str, ...]:
    left_out = [name for name, result in row["checks"].items() if result.startswith("- ")]
    left_out += [f"not reached: `{name}`" for name in row["not reached"]]
    return f"`{row['type']}`", f"`{row['class']}`", str(row["layers"]), ", ".join(left_out)


def _failed(row: Row) -> tuple[str, ...]:
    seen = "; ".join(f"{name}: {result[:160]}" for name, result in failures(row).items())
    return f"`{row['type']}`", f"`{row.get('class', '')}`", seen


def _refused(row: Row) -> tuple[str, ...]:
    why = row["sentence"].partition(") has attention that cannot be replaced and would stay SoftMax (")[2]
    why = why.partition("). ")[0] or row["sentence"].partition("has no attention layer: ")[2]
    return f"`{row['type']}`", f"`{row['class']}`", why


def _plain(row: Row) -> tuple[str, ...]:
    return f"`{row['type']}`", f"`{row['class']}`"


def _reason(row: Row) -> tuple[str, ...]:
    return f"`{row['type']}`", row.get("reason", "")[:200]


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")
