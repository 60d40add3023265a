"""What is printed last: how each step ended, its figures, and which goals were met. Needs nothing but Python."""

from collections.abc import Callable, Iterable, Sequence
from statistics import mean, stdev
from typing import Any

from benchmarks.gpu.results import StepResults
from benchmarks.tables import table

__all__ = ["summary"]

Row = dict[str, Any]
_FAILURES, _NAMES = 30, 8
#: of forward and backward from this length on, against the faster of SDPA's flash and cuDNN kernels
_LONG = 2048
_PHASES = {"f": "forward", "fb": "training"}
_ATTENTION = (
    "f: forward, fb: with backward; x: relative to the faster of SDPA's flash and cuDNN kernels; roof: share of what\n"
    "the counted instructions allow; called: decoding with the host's time, relative to what SDPA chooses itself"
)


def summary(found: Sequence[StepResults], seconds: float, tiny: bool = False) -> str:
    """The summary of a run of ``seconds``, as text; with ``tiny``, whose figures mean nothing, without goals."""
    lines = [f"\n== {_where(found)}, {seconds:.0f} s"]
    for results in found:
        lines.append(_counts(results))
        if results.error:
            lines.append(f"  could not run: {results.error}")
        failed, skipped = results.with_status("failed"), results.with_status("skipped")
        lines += [f"  FAILED {row['case']}: {row['error']}" for row in failed[:_FAILURES]]
        if len(failed) > _FAILURES:
            lines.append(f"  ... and {len(failed) - _FAILURES} more")
        for reason in dict.fromkeys(row["error"] for row in skipped):
            names = [row["case"] for row in skipped if row["error"] == reason]
            more = [f"and {len(names) - _NAMES} more"] if len(names) > _NAMES else []
            lines.append(f"  skipped: {'; '.join([*names[:_NAMES], *more])}: {reason}")
    by_step = {results.step: [row["measured"] for row in results.with_status("passed")] for results in found}
    for step, show in TABLES.items():
        if by_step.get(step):
            lines += ["", *show(by_step[step])]
    if not tiny:
        lines += ["", "goals:", *goals(found)]
    if any(results.error or results.with_status("failed") for results in found):
        lines += ["", "some cases failed; run again, they are tried again and what passed is kept"]
    return "\n".join(lines)


def _where(found: Sequence[StepResults]) -> str:
    environment = found[-1].environment if found else {}
    versions = ", ".join(f"{name} {version}" for name, version in environment.get("versions", {}).items())
    return f"{environment.get('gpu', 'CPU')}, {versions}, commit {environment.get('commit')}"


def _counts(results: StepResults) -> str:
    counts = {status: len(results.with_status(status)) for status in ("passed", "failed", "skipped")}
    counts["not reached"] = len(results.cases) - sum(counts.values())
    here = results.environment.get("commit")
    counts["measured at another commit"] = sum(row.get("commit") != here for row in results.in_order())
    return f"{results.step}: " + (", ".join(f"{n} {what}" for what, n in counts.items() if n) or "nothing")


def _environment(rows: Sequence[Row]) -> list[str]:
    merged = {key: value for row in rows for key, value in row.items()}
    return [f"{key}: {value}" for key, value in merged.items()]


def _attention(rows: Sequence[Row]) -> list[str]:
    times = [row for row in rows if row["table"] == "rows"]
    lines = ["attention:", _ATTENTION, table([_speed(row) for row in times])] if times else []
    peers = ("plain", "compile", "flex", "entmax15")
    names = [f"{phase} {peer}" for phase in _PHASES.values() for peer in peers]
    others = [{"call": row["shape"], **{n: row[n] for n in names if n in row}} for row in times]
    others = [row for row in others if len(row) > 1]
    if others:
        lines += ["others, relative to SDPA:", table(others)]
    not_run = [f"  {row['shape']}: {name}: {why}" for row in times for name, why in row["not run"].items()]
    if not_run:
        lines += ["not run:", *not_run]
    memory = [
        {name: value for name, value in row.items() if name != "table"} for row in rows if row["table"] == "memory"
    ]
    if memory:
        lines += ["peak extra memory, MB:", table(memory)]
    return lines


def _speed(row: Row) -> Row:
    """One line of the table of times."""
    line = {"call": row["shape"].removesuffix(", bfloat16")}
    for head, phase in _PHASES.items():
        line |= {
            f"{head} ms": row.get(f"{phase} triton ms"),
            f"{head} x": row.get(f"{phase} triton"),
            f"{head} TF/s": row.get(f"{phase} TFLOP/s"),
            f"{head} roof": row.get(f"{phase} share of roof"),
        }
    references = [row.get(f"{phase} reference") for phase in _PHASES.values()]
    return {**line, "x of": "/".join(filter(None, references)), "called": row.get("called triton")}


def _tiles(rows: Sequence[Row]) -> list[str]:
    """Of each kernel and width the fastest tile, and what would have to be changed."""
    lines = ["tiles (time relative to the present one's; a line to change where one is 2 % faster):"]
    for kernel, width in dict.fromkeys((row["kernel"], row["width"]) for row in rows):
        tried = [row for row in rows if (row["kernel"], row["width"]) == (kernel, width) and "ratio" in row]
        if not tried:
            continue
        best = min(tried, key=lambda row: row["ratio"])
        lines.append(f"  {kernel} {width}: present {best['present']}, best {best['tile']} at {best['ratio']:.3f}")
        if best["ratio"] < 0.98:
            m, n, warps, stages = best["tile"]
            lines.append(f'    triton/launch.py: _LEAN["{kernel}"][{width}] = Tile({m}, {n}, {warps}, {stages})')
    unfit = [f"{row['kernel']} {row['width']} {row['tile']}: {row['unfit']}" for row in rows if "unfit" in row]
    return [*lines, *(f"  did not run: {line}" for line in unfit)]


def _training_step(rows: Sequence[Row]) -> list[str]:
    return ["training steps:", table([{k: v for k, v in row.items() if k != "load"} for row in rows])]


def _cross_entropy(rows: Sequence[Row]) -> list[str]:
    flat = [row for case in rows for row in case["rows"]]
    return ["output loss:", table([{k: v for k, v in row.items() if k != "load"} for row in flat])]


def _rows(rows: Sequence[Row]) -> list[str]:
    columns = {"f32": "f32 {} triton", "bf16": "bf16 {} triton", "plain": "f32 {} plain", "compile": "f32 {} compile"}
    lines = []
    for row in rows:
        line = {"function": row["function"], "shape": row["shape"]}
        for name, key in columns.items():
            figures = [row[key.format(phase)] for phase in _PHASES.values() if key.format(phase) in row]
            line[name] = " / ".join(f"{figure:.3g}" for figure in figures)
        lines.append(line)
    return ["functions of rows, relative to torch.softmax, f / fb (plain, compile: float32):", table(lines)]


def _row_attention(rows: Sequence[Row]) -> list[str]:
    times = [row for row in rows if "shape" in row]
    lines: dict[str, list[str]] = {}
    for row in times:
        found = [row["shape"].split(",")[0]]
        for name, shown in (("triton", ""), ("tiled", "tiled "), ("adasplash", "adasplash ")):
            figures = [f"{row[f'{phase} {name}']:.3g}" for phase in _PHASES.values() if f"{phase} {name}" in row]
            error = f", error {row[f'{name} error']:.1e}" if f"{name} error" in row else ""
            found += [f"{shown}{'/'.join(figures)}{error}"] if figures else []
        lines.setdefault(row["normalizer"], []).append(" ".join(found))
    notes = dict.fromkeys(f"  {name}: {why}" for row in times for name, why in row["not run"].items())
    about = "attention through functions of rows (causal, D 64, bfloat16), relative to SDPA with SoftMax, f/fb:"
    return [about, *(f"  {name}: {'; '.join(found)}" for name, found in lines.items()), *notes] if times else []


def _evidence(rows: Sequence[Row]) -> list[str]:
    lines = [f"evidence, held-out bits per byte, {len(rows)} seeds:"]
    for arm in rows[0]["bits per byte"]:
        values = [row["bits per byte"][arm] for row in rows]
        differences = [row["bits per byte"][arm] - row["bits per byte"]["softmax"] for row in rows]
        error = f" +- {stdev(differences) / len(rows) ** 0.5:.4f} (standard error)" if len(rows) > 1 else ""
        lines.append(f"  {arm}: {mean(values):.4f}, minus softmax {mean(differences):+.4f}{error}")
    return lines


TABLES: dict[str, Callable[[Sequence[Row]], list[str]]] = {
    "environment": _environment,
    "attention": _attention,
    "tiles": _tiles,
    "training_step": _training_step,
    "cross_entropy": _cross_entropy,
    "rows": _rows,
    "row_attention": _row_attention,
    "evidence": _evidence,
}


def goals(found: Sequence[StepResults]) -> list[str]:
    """A line for each goal: met, missed with the worst figure, or not measured."""
    rows = {results.step: [row["measured"] for row in results.with_status("passed")] for results in found}
    times = [row for row in rows.get("attention", []) if row["table"] == "rows"]
    long = [row for row in times if row["keys"] >= _LONG and row["queries"] > 1]
    steps = rows.get("training_step", [])
    lines = [
        _goal(f"attention at D = {dim}, forward + backward", limit, _named(long, "shape", "training triton", dim=dim))
        for dim, limit in ((128, 1.25), (64, 1.5))
    ]
    decode = [row for row in times if row["queries"] == 1]
    lines.append(_goal("decoding", 1.05, _named(decode, "shape", "forward triton")))
    for model in ("DeiT-small", "GPT-2 small"):
        of_model = [row for row in steps if row["model"].startswith(model)]
        lines.append(_goal(f"training step of {model}", 1.05, _named(of_model, "model", "patched / stock")))
    correctness = next((results for results in found if results.step == "correctness"), None)
    if correctness is None or len(correctness.rows) < len(correctness.cases):
        lines.append("  wrong results, at most 0: not measured to the end")
    else:
        wrong = len(correctness.with_status("failed"))
        lines.append(f"  wrong results, at most 0: {wrong}, {'missed' if wrong else 'met'}")
    return lines


def _named(rows: Iterable[Row], name: str, figure: str, **wanted: object) -> dict[str, float]:
    chosen = (row for row in rows if all(row.get(key) == value for key, value in wanted.items()))
    return {row[name]: row[figure] for row in chosen if row.get(figure) is not None}


def _goal(what: str, limit: float, figures: dict[str, float]) -> str:
    if not figures:
        return f"  {what}, at most {limit}: not measured"
    worst = max(figures, key=figures.get)
    missed = sum(figure > limit for figure in figures.values())
    verdict = f"missed in {missed} of {len(figures)}" if missed else "met"
    return f"  {what}, at most {limit}: {verdict}, worst {figures[worst]:.3f} ({worst})"
