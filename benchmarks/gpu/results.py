"""The files of results: one for each step and GPU, written anew, atomically, after every case."""

import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["COMMITTED", "StepResults", "slug"]

ROOT = Path(__file__).resolve().parents[2]
#: what was measured on GPUs and is part of this repository: a folder for each
COMMITTED = ROOT / "benchmarks" / "results" / "gpu"

Row = dict[str, Any]


def slug(gpu: str) -> str:
    """The folder of a GPU, e.g. ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


class StepResults:
    """What one step has measured on one GPU.

    Args:
        step: its name.
        folder: where ``<step>.json`` is written.
        seed: a folder whose file is gone on with where ``folder`` has none.

    Raises:
        ValueError: for a file that is not what this class writes; the text names it.
    """

    def __init__(self, step: str, folder: Path, seed: Path | None = None) -> None:
        self.step, self.path = step, folder / f"{step}.json"
        self.environment: dict[str, Any] = {}
        self.error: str | None = None
        self.rows: dict[str, Row] = {}
        self.cases: list[str] = []
        found = next((p for p in (self.path, *([seed / self.path.name] if seed else [])) if p.exists()), None)
        if found is not None:
            self._read(found)

    def _read(self, path: Path) -> None:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            self.environment = content["environment"]
            self.rows = {row["case"]: row for row in content["rows"]}
            self.cases = list(self.rows)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a file of results: remove it ({error!r})") from error

    def begin(self, cases: Sequence[str], environment: dict[str, Any]) -> None:
        """Take in what the cases are now, and where they run; the rows of others are dropped."""
        self.cases, self.environment, self.error = list(cases), environment, None

    def finished(self, case: str) -> bool:
        """Whether a case ended well before."""
        return self.rows.get(case, {}).get("status") == "passed"

    def enter(self, case: str, outcome: Row) -> None:
        """Take in a case's outcome and write the file."""
        texts = {key: _without_paths(outcome[key]) for key in ("error", "traceback") if key in outcome}
        commit = {"commit": self.environment.get("commit"), "modified": self.environment.get("modified")}
        self.rows[case] = {"case": case, **outcome, **texts, **commit}
        self.write()

    def fail(self, error: str) -> None:
        """Take in that the step as a whole could not run, and write the file."""
        self.error = _without_paths(error)
        self.write()

    def in_order(self) -> list[Row]:
        """The rows in the order of the cases."""
        return [self.rows[case] for case in self.cases if case in self.rows]

    def with_status(self, status: str) -> list[Row]:
        """The rows of that status."""
        return [row for row in self.in_order() if row["status"] == status]

    def write(self) -> None:
        """Write the file; a reader, and a run that is cut off, see either the old one or the new one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {"step": self.step, "environment": self.environment, "error": self.error}
        content["rows"] = self.in_order()
        new = self.path.with_name(f".{self.path.name}.new")
        new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(new, self.path)


def _without_paths(text: str) -> str:
    """``text`` without what says where this repository and Python lie."""
    for path, short in ((ROOT, ""), (Path(sys.prefix), "<python>/"), (Path(sys.base_prefix), "<python>/")):
        text = text.replace(f"{path}/", short)
    return text.replace(str(Path.home()), "~")
