"""Write up what comparisons measured: a model card and figures for each, and the README's table of evidence.

    python -m recipes.report
    python -m recipes.report --check

Every ``recipes/results/<name>.json`` of kind "comparison" (a copy of what ``recipes.compare`` wrote) becomes
``model_cards/<name>.md`` with ``docs/<name>.png``, its learning curves, and ``docs/<name>-modulators.png``. With
``recipes/results/measures/<name>.json``, what ``hf-multimax measure RUN --json`` wrote of one of its runs, the
modulators are drawn over the histograms of that run's scores, beside ``docs/<name>-measures.png``. The lines between
``<!-- evidence -->`` and ``<!-- /evidence -->`` in README.md are replaced. No figure comes from anywhere else.
``--check`` writes nothing and exits with 1, naming the files, if one of them is not what it would be.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from hf_multimax.plots import plot_measures, plot_modulators, plot_modulators_on_scores
from hf_multimax.publishing.card import model_card
from hf_multimax.publishing.results import Results, one_line
from recipes.shared.checks import explained
from recipes.shared.curves import draw_curves
from recipes.shared.table import comparison_rows, markdown

ROOT = Path(__file__).parents[1]
#: Of the cards in this repository; weights made from the built-in data carry the licence of the code.
LICENSE = "apache-2.0"
TASKS = {
    "text-generation": "language modelling",
    "image-classification": "image classification",
    "translation": "translation",
}
#: Path of a figure, digest of what it shows, and what draws it to a path with metadata.
Drawing = tuple[Path, str, Callable[[Path, Mapping[str, str]], None]]
_EVIDENCE = re.compile(r"(<!-- evidence -->\n).*?(<!-- /evidence -->)", flags=re.DOTALL)


def main(arguments: list[str] | None = None) -> None:
    """Write everything, or check it; exits with a sentence where that is not possible."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 if a file is out of date")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository's root")
    options = parser.parse_args(arguments)
    try:
        comparisons = find_comparisons(options.root)
        texts = render(options.root, comparisons)
        drawings = [
            drawing for name, results in comparisons.items() for drawing in figures(options.root, name, results)
        ]
        act = check if options.check else write
        act(options.root, drawings, texts)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def find_comparisons(root: Path) -> dict[str, Results]:
    """The comparisons in ``recipes/results``, by name; other JSON files there are passed over.

    Raises:
        ValueError: if there is none, or one cannot be read.
    """
    found = {}
    for path in sorted((root / "recipes" / "results").glob("*.json")):
        with explained(f"{path} is no JSON", ValueError):
            values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or values.get("kind") != "comparison":
            continue
        if path.stem == "template":
            raise ValueError(f"{path}: its card would replace model_cards/template.md: give it another name")
        found[path.stem] = Results(path)
    if not found:
        raise ValueError(
            f"there is no comparison in {root / 'recipes' / 'results'}: run recipes.compare, and copy its "
            "comparison.json there as <name>.json"
        )
    return found


def render(root: Path, comparisons: Mapping[str, Results]) -> dict[Path, str]:
    """What every text file should hold: the cards and the README."""
    texts = {}
    for name, results in comparisons.items():
        links = {path.name: f"../docs/{path.name}" for path, *_ in figures(root, name, results)}
        card = model_card(
            None,
            results,
            name=name,
            license=LICENSE,
            curves=links[f"{name}.png"],
            modulator_figure=links.get(f"{name}-modulators.png"),
            measure_figure=links.get(f"{name}-measures.png"),
        )
        texts[root / "model_cards" / f"{name}.md"] = str(card)
    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8")
    if len(_EVIDENCE.findall(text)) != 1:
        raise ValueError(f"{readme} must have the lines `<!-- evidence -->` and `<!-- /evidence -->` once")
    texts[readme] = _EVIDENCE.sub(lambda match: f"{match[1]}{evidence(comparisons)}{match[2]}", text)
    return texts


def write(root: Path, drawings: Iterable[Drawing], texts: Mapping[Path, str]) -> None:
    """Draw the figures, then write the texts that show them."""
    for folder in ("docs", "model_cards"):
        (root / folder).mkdir(exist_ok=True)
    for path, digest, draw in drawings:
        draw(path, {"Description": digest})
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    print(f"wrote {', '.join(str(path.relative_to(root)) for path in texts)} and their figures")


def check(root: Path, drawings: Iterable[Drawing], texts: Mapping[Path, str]) -> None:
    """Exit with 1 if a file is missing or not up to date. A figure carries the digest of its results."""
    stale = [path for path, text in texts.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    stale += [path for path, digest, _ in drawings if not path.exists() or digest.encode() not in path.read_bytes()]
    if stale:
        names = ", ".join(str(path.relative_to(root)) for path in stale)
        sys.exit(f"not up to date: {names}. Run `python -m recipes.report`")


# -- the README --------------------------------------------------------------------------------------------------------


def evidence(comparisons: Mapping[str, Results]) -> str:
    """The README's section: one table over all comparisons, and where each came from."""
    p_values = any(results.has_p_values for results in comparisons.values())
    rows: list[list[str]] = []
    for name, results in comparisons.items():
        header, *arms = comparison_rows(results, p_values)
        rows = rows or [["task and data", *header]]
        titles = [_title(name, results)] + [""] * len(arms)
        rows += [[title, f"`{one_line(arm)}`", *cells] for title, (arm, *cells) in zip(titles, arms)]
    lines = [markdown(rows)]
    lines += [
        "",
        "Mean and standard deviation over seeds. The difference is arm minus reference, seed by seed; the reference is",
        "the arm without one, and step time and peak memory are multiples of its own, over the seeds that both have.",
        "Intervals are not corrected for the number of arms. All figures are in `recipes/results/`, and",
        "`python -m recipes.report` writes them up. They came from:",
        "",
    ]
    for name, results in comparisons.items():
        missing = f" Not complete: {' '.join(results.unfinished)}" if results.unfinished else ""
        command = " ".join(results.values["command"].split())
        lines.append(f"- {name}: `{command}`, memory {results.memory_scope}.{missing}")
    return "\n".join(lines) + "\n"


def _title(name: str, results: Results) -> str:
    task, data = results.values["task"], one_line(results.values["data"]["name"])
    budget = ", equal time" if results.values.get("budget") == "time" else ""
    return f"[{TASKS.get(task, task)}, {data}{budget}](model_cards/{name}.md)"


# -- figures -----------------------------------------------------------------------------------------------------------


def figures(root: Path, name: str, results: Results) -> Iterator[Drawing]:
    """Every figure of a comparison."""
    measured = measured_of(root, name)
    values = results.values if measured is None else [results.values, measured]
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    yield root / "docs" / f"{name}.png", digest, partial(draw_curves, results.values)
    arm, run = next(
        ((arm.name, run) for arm in results.arms.values() for run in arm.runs if _has_modulators(run)), (None, None)
    )
    if measured:
        layers, title = measured["layers"], one_line(measured["path"])
        yield root / "docs" / f"{name}-modulators.png", digest, partial(_draw_scores, layers, title)
        yield root / "docs" / f"{name}-measures.png", digest, partial(_draw_measures, layers, title)
    elif run:
        title = f"{arm}, seed {run['seed']}"
        yield root / "docs" / f"{name}-modulators.png", digest, partial(_draw_modulators, run["layers"], title)


def _has_modulators(run: Mapping[str, Any]) -> bool:
    return any(values.get("ranges") for values in run.get("layers", {}).values())


def measured_of(root: Path, name: str) -> dict[str, Any] | None:
    """What was measured of a run of the comparison; None if nothing was. Raises ValueError for another file."""
    path = root / "recipes" / "results" / "measures" / f"{name}.json"
    if not path.exists():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict) or not {"path", "layers"} <= values.keys():
        raise ValueError(f"{path} is not what `hf-multimax measure RUN --json` writes")
    return values


def _draw_modulators(layers: Mapping[str, Any], title: str, path: Path, metadata: Mapping[str, str]) -> None:
    figure = plot_modulators(layers)
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=80, metadata=metadata)


def _draw_scores(layers: Mapping[str, Any], title: str, path: Path, metadata: Mapping[str, str]) -> None:
    figure = plot_modulators_on_scores(layers)
    figure.supxlabel(f"score x, {title}", fontsize="medium")
    figure.savefig(path, dpi=80, metadata=metadata)


def _draw_measures(layers: Mapping[str, Any], title: str, path: Path, metadata: Mapping[str, str]) -> None:
    plot_measures({title: layers}).savefig(path, dpi=80, metadata=metadata)


if __name__ == "__main__":
    main()
