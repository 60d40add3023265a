"""The results of a sweep as a file, and what got worse since another one."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, environment

__all__ = ["RESULTS", "failures", "merged", "read", "worse", "write"]

RESULTS = ROOT / "benchmarks" / "results" / "architectures.json"

Row = Mapping[str, Any]


def read(path: Path = RESULTS) -> dict[str, Any]:
    """The file's content; raises OSError if it is not there and ValueError if it is none of ours."""
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or "rows" not in found:
        raise ValueError(f"{path} holds no results of benchmarks.architectures")
    return found


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write ``rows``, one a line in the order of their types, with the environment they belong to."""
    lines = ",\n  ".join(json.dumps(row) for row in sorted(rows, key=lambda row: row["type"]))
    head = json.dumps({"benchmark": "architectures", "environment": environment()}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head[:-2]},\n "rows": [\n  {lines}\n ]\n}}\n', encoding="utf-8")


def merged(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """The rows of both, the new one where a type has two."""
    return list({row["type"]: row for row in (*old, *new)}.values())


def failures(row: Row) -> dict[str, str]:
    """The checks that a type does not pass, with what was seen."""
    return {
        name: result for name, result in row["checks"].items() if result != "passed" and not result.startswith("- ")
    }


def worse(before: Iterable[Row], after: Iterable[Row]) -> list[str]:
    """What worked and stopped working, a line a type: of the types that both have.

    A type gets worse if it passed, was refused or ran and does not any more, or fails a check that it did not fail.
    """
    known = {row["type"]: row for row in before}
    lines = []
    for row in after:
        old = known.get(row["type"])
        if old is None:
            continue
        new = {name: result for name, result in failures(row).items() if name not in failures(old)}
        if new and old["status"] != "not run":
            lines.append(f"{row['type']}: {'; '.join(f'{name}: {result}' for name, result in new.items())}")
        elif _ORDER[row["status"]] < _ORDER[old["status"]] and not new:
            why = row.get("sentence") or row.get("reason", "")
            lines.append(f"{row['type']}: {old['status']} before, now {row['status']}: {why}")
    return lines


_ORDER = {"not run": 0, "failed": 1, "refused": 1, "passed": 2}
