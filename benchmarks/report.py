"""Write the documents' tables of speed, and of what adapters learn, from what the benchmarks measured.

    python -m benchmarks.report
    python -m benchmarks.report --check

Every table between ``<!-- speed: <name> -->`` and ``<!-- /speed -->`` in the pages of ``docs/`` is made from the files
of that name in ``benchmarks/results``. What was measured on a GPU has a table of its own, with the GPU's name, once
``benchmarks/gpu.sh`` has written its files; until then the tables of the CPU say "not yet measured". ``--check`` writes
nothing and exits with 1 if a page is out of date.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, results_path
from benchmarks.gpu import results as gpu_results
from benchmarks.scalar_summary import summary

__all__ = ["main"]

Row = dict[str, Any]
UNMEASURED = "not yet measured"
_BLOCK = re.compile(r"(<!-- speed: (\w+) -->\n).*?(<!-- /speed -->)", flags=re.DOTALL)


def main(arguments: list[str] | None = None) -> None:
    """Write the pages, or check them; exits with a sentence where that is not possible."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 if a page is out of date")
    parser.add_argument("--pages", type=Path, default=ROOT / "docs", help="the folder of the pages to write")
    options = parser.parse_args(arguments)
    pages = {path: path.read_text(encoding="utf-8") for path in sorted(options.pages.glob("*.md"))}
    try:
        new = render(pages)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    stale = [path for path in pages if new[path] != pages[path]]
    if options.check and stale:
        names = ", ".join(path.name for path in stale)
        sys.exit(f"not what benchmarks/results says: {names}. Run `python -m benchmarks.report`")
    for path in stale:
        path.write_text(new[path], encoding="utf-8")


def render(pages: Mapping[Path, str]) -> dict[Path, str]:
    """The texts of ``pages`` with every marked table made anew.

    Raises:
        ValueError: if a table is missing, unknown or there twice.
    """
    names = [match[2] for text in pages.values() for match in _BLOCK.finditer(text)]
    if sorted(names) != sorted(TABLES):
        raise ValueError(
            f"there must be one table `<!-- speed: NAME --> ... <!-- /speed -->` for each of {', '.join(TABLES)}, "
            f"got {', '.join(names) or 'none'}"
        )
    made = {name: TABLES[name]() for name in names}
    return {path: _BLOCK.sub(lambda m: f"{m[1]}{made[m[2]]}{m[3]}", text) for path, text in pages.items()}


def attention() -> str:
    """Ratios to SDPA by shape; on a GPU with the kernels of others."""
    columns = {
        "`native`": "native",
        "`tiled`": "tiled",
        "the formula in plain PyTorch": "plain",
        "`torch.compile` of it": "compile",
        "FlexAttention (forward)": "flex",
    }
    rest = {
        "`triton`": "triton",
        "`triton`, TFLOP/s": "TFLOP/s",
        "plain": "plain",
        "`torch.compile`": "compile",
        "FlexAttention": "flex",
        "1.5-entmax (adasplash)": "entmax15",
    }
    return _by_device("attention", lambda row: [attention_call(row)], ["call"], columns, rest, _both_passes)


def attention_call(row: Row) -> str:
    """batch x heads x length and what is special about the call."""
    if row["queries"] == 1:
        size = f"one query, cache of {row['keys']:,}"
    else:
        size = f"{row['batch']}x{row['heads']}x{row['queries']}"
    special = [row["dtype"], "causal" if row["causal"] else "", f"D = {row['dim']}" if row["dim"] != 64 else ""]
    special.append(f"{row['group']} heads to a key head" if row.get("group", 1) > 1 else "")
    return ", ".join([size, *filter(None, special)])


def attention_memory() -> str:
    """Peak extra memory of forward + backward, in MB."""
    return _by_device(
        "attention",
        lambda row: [row["shape"]],
        ["call"],
        {"SDPA": "sdpa", "`native`": "native", "`tiled`": "tiled", "plain": "plain"},
        {"SDPA": "sdpa", "`triton`": "triton", "plain": "plain"},
        lambda row, name: f"{row[f'training {name} MB']:,.0f}" if f"training {name} MB" in row else "-",
        key="memory",
    )


def row_attention() -> str:
    """Attention through every normalizer over SoftMax's, and its memory."""
    rows = _rows("row_attention", "cpu")
    if not rows:
        raise ValueError(f"{results_path('row_attention', 'cpu')} is missing: run `python -m benchmarks.row_attention`")
    cases = [name.removesuffix(" forward") for name in rows[0] if name.endswith(" forward")]

    def both(row: Row, case: str) -> str:
        found = [row.get(f"{case} {phase}") for phase in ("forward", "training")]
        return "-" if None in found else " / ".join(map(_ratio, found))

    lines = [[row["normalizer"], *(both(row, case) for case in cases), f"{row['training MB']:,.0f}"] for row in rows]
    return _table(["", *cases, "MB, 1x8x4096"], lines)


def trained_attention() -> str:
    """Attention through sparse functions on the scores of a trained model."""
    rows = _rows("trained_attention", "cpu")
    cases = [name.removesuffix(" zeros %") for name in rows[0] if name.endswith(" zeros %")]
    lines = []
    for row in rows:
        cells = [
            (f"{row[f'{case} zeros %']:.1f} %", f"{_ratio(row[f'{case} forward'])} / {_ratio(row[f'{case} training'])}")
            for case in cases
        ]
        lines.append([row["normalizer"], *(cell for pair in cells for cell in pair)])
    return _table(["", *(head for case in cases for head in (f"zeros, {case}", f"{case} / SDPA"))], lines)


def training_step() -> str:
    """Patched over stock, by model."""
    columns = {"patched / stock": "patched / stock"}
    return _by_device(
        "training_step",
        lambda row: [row["model"], str(row["batch"])],
        ["model", "batch"],
        columns,
        {**columns, "in plain PyTorch / stock": "eager / stock"},
        lambda row, name: _ratio(row.get(name)),
    )


def recipe_step() -> str:
    """Steps of the recipes through other functions over SoftMax's."""
    rows = _rows("recipe_step", "cpu")
    arms = [name for name in rows[0] if name.endswith(" / softmax")]
    return _table(["recipe", *arms], [[row["recipe"], *(_ratio(row[arm]) for arm in arms)] for row in rows])


def cross_entropy() -> str:
    """The fused output loss against the unfused ones."""
    columns = {
        "time / unfused SoftMax": "time / unfused SoftMax",
        "time / unfused MultiMax": "time / unfused",
        "memory / unfused SoftMax": "peak / unfused SoftMax",
        "memory / unfused MultiMax": "peak / unfused",
    }
    return _by_device(
        "cross_entropy",
        lambda row: [f"{row['tokens']:,}", f"{row['vocabulary']:,}"],
        ["tokens", "vocabulary"],
        columns,
        columns,
        lambda row, name: _ratio(row[name]),
        keep=lambda row: row["computation"] == "fused MultiMax",
    )


def normalizers() -> str:
    """Multiples of ``torch.softmax``, and exact zeros."""
    rows = _rows("normalizers", "cpu")
    lengths = [name.removesuffix(" fwd") for name in rows[0] if name.endswith(" fwd")]
    shown = next(name.split()[0] for name in rows[0] if name.endswith(" plain"))

    def both(row: Row, n: str, which: str = "") -> str:
        cells = [row.get(f"{n} {suffix}{which}") for suffix in ("fwd", "fwd+bwd")]
        return "-" if None in cells else " / ".join(f"{cell:.1f}" if cell < 10 else f"{cell:.0f}" for cell in cells)

    others = {"plain PyTorch": " plain", "`entmax` package": " package"}
    lines = [
        [
            row["normalizer"],
            *(both(row, n) for n in lengths),
            *(both(row, shown, which) for which in others.values()),
            f"{row['zeros %']:.0f}",
        ]
        for row in rows
    ]
    titles = [*(f"N = {int(n):,}" for n in lengths), *(f"{name}, N = {int(shown):,}" for name in others), "zeros, %"]
    return _table(["", *titles], lines)


def scalar_start() -> str:
    """Adapters of a real checkpoint after their first steps, for each text."""
    text = ""
    for path in sorted(results_path("scalar_start", "cpu").parent.glob("scalar_start*-cpu.json"), key=_name_length):
        found = json.loads(path.read_text(encoding="utf-8"))
        lines = [
            [
                row["arm"],
                f"{row['trained']:,}",
                f"{row['file bytes'] / 1e3:,.1f}",
                f"{row['rate']:g}",
                f"{row['gain']:+.4f}",
                _interval(row),
                ", ".join(f"{gain:+.4f}" for gain in row["gains"].values()),
                f"{row['worst']:+.4f}",
                f"{row['step s']:.2f}",
            ]
            for row in summary(found["rows"])
        ]
        head = ["arm", "trained", "file, kB", "rate", "gain", "loss − one temperature per layer's, 95 % interval"]
        text += f"{'' if not text else chr(10)}Text `{found['data']}`:\n\n"
        text += _table([*head, "gain at 0.001, 0.005, 0.02", "least of any run", "CPU seconds a step"], lines)
    return text


def adapter_step() -> str:
    """Steps of adapters over those of full fine-tuning."""
    lines = [
        [row["model"], row["arm"], f"{row['trained']:,}", _ratio(row["time / full"]), _ratio(row["memory / full"])]
        for row in _rows("adapter_step", "cpu")
    ]
    return _table(["model", "what is trained", "parameters", "time", "memory"], lines)


TABLES: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (
        normalizers, attention, attention_memory, row_attention, trained_attention, training_step, recipe_step,
        cross_entropy, scalar_start, adapter_step,
    )
}  # fmt: skip


def _by_device(
    name: str,
    label: Callable[[Row], list[str]],
    labels: Sequence[str],
    cpu: dict[str, str],
    gpu: dict[str, str],
    cell: Callable[[Row, str], str],
    key: str = "rows",
    keep: Callable[[Row], bool] = lambda row: True,
) -> str:
    """The table of a benchmark on a CPU, and on every GPU it ran on; ``cpu`` and ``gpu`` name the columns to show.

    Of rows with one label, the first is shown, filled up by the others: a benchmark's default table goes before its
    longer ones.
    """
    here = _merged(filter(keep, _rows(name, "cpu", key)), label)
    if not here:
        raise ValueError(f"{results_path(name, 'cpu')} is missing: run `python -m benchmarks.{name}`")
    gpus = {title: _merged(filter(keep, rows), label) for title, rows in _gpu_rows(name, key).items()}
    gpus = {title: rows for title, rows in gpus.items() if rows}
    missing = [] if gpus else [UNMEASURED]
    head = [*labels, *cpu, *(["on a GPU"] if missing else [])]
    text = _table(
        head, [[*labelled, *(cell(row, c) for c in cpu.values()), *missing] for labelled, row in here.items()]
    )
    for title, rows in gpus.items():
        lines = [[*labelled, *(cell(row, c) for c in gpu.values())] for labelled, row in rows.items()]
        text += f"\nOn one {title}:\n\n" + _table([*labels, *gpu], lines)
    return text


def _merged(rows: Iterable[Row], label: Callable[[Row], list[str]]) -> dict[tuple[str, ...], Row]:
    """The rows by label, in the order of the last of each."""
    found: dict[tuple[str, ...], Row] = {}
    for row in reversed(list(rows)):
        found[tuple(label(row))] = {**found.get(tuple(label(row)), {}), **row}
    return dict(reversed(found.items()))


def _rows(name: str, device: str, key: str = "rows") -> list[Row]:
    """What ``<name>`` and ``<name>_<anything>`` measured on a device; nothing where it never ran."""
    first = results_path(name, device)
    paths = [first, *sorted(first.parent.glob(f"{name}_*-{device}.json"))]
    return [row for path in paths if path.exists() for row in json.loads(path.read_text(encoding="utf-8"))[key]]


def _gpu_rows(name: str, key: str) -> dict[str, list[Row]]:
    """GPU -> what the step ``name`` of benchmarks/gpu.sh measured on it, where it is a row for the table of ``key``."""
    found = {}
    for path in sorted(gpu_results.COMMITTED.glob(f"*/{name}.json")):
        results = gpu_results.StepResults(name, path.parent)
        measured = [row["measured"] for row in results.with_status("passed")]
        rows = [row for case in measured for row in case.get("rows", [case])]
        title = results.environment.get("gpu", path.parent.name)
        found[title] = [row for row in rows if row.get("table", "rows") == key]
    return found


def _both_passes(row: Row, name: str) -> str:
    """forward / forward + backward."""
    found = [_ratio(row[f"{phase} {name}"]) for phase in ("forward", "training") if row.get(f"{phase} {name}")]
    return " / ".join(found) or "-"


def _ratio(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.{1 if value >= 10 else 2 if value >= 0.1 else 3}f}"


def _interval(row: Row) -> str:
    if row.get("against") is None:
        return "-"
    return f"{row['against']:+.4f}" + (f" [{row['low']:+.4f}, {row['high']:+.4f}]" if row["low"] is not None else "")


def _name_length(path: Path) -> int:
    return len(path.name)


def _table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    rows = [list(head), *map(list, lines)]
    rows.insert(1, ["---"] * len(rows[0]))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    main()
