"""Try every model type of Transformers with MultiMax, and say what works.

    python -m benchmarks.architectures                      # all of them: writes the results and SUPPORTED_MODELS.md
    python -m benchmarks.architectures --types gpt2 llama   # these: prints what is seen
    python -m benchmarks.architectures --again              # those that did not pass the last time: writes as well
    python -m benchmarks.architectures --check              # all of them: exits with 1 if a type got worse
    python -m benchmarks.architectures --page               # writes SUPPORTED_MODELS.md from the results that are there

It needs no network: the models are tiny and random, made from the configs of the installed Transformers. All of them
take about 20 minutes on two cores.
"""

import argparse
import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.architectures import page, results

__all__ = ["main"]

#: What one model type may take.
SECONDS, GIGABYTES = 300, 12

Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; exits with 1 and the list where ``--check`` finds a type that got worse."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.architectures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--types", nargs="+", metavar="TYPE", help="only these model types")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, each on one thread (default 2)")
    parser.add_argument("--out", type=Path, help="write the results here, and no page")
    parser.add_argument("--again", action="store_true", help="only the types that did not pass in the results")
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 if a type got worse")
    parser.add_argument("--page", action="store_true", help="run nothing, write the page and the counts in docs/")
    options = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before Transformers is imported
    try:
        old = results.read()["rows"] if options.again or options.check else []
        if not options.page:
            rows = _run(_chosen(options.types, old if options.again else []), options.jobs)
            if options.check:
                _exit_if_worse(results.worse(old, rows))
            everything = results.merged(old if options.again else [], rows)
            if options.out is not None:
                results.write(options.out, everything)
            elif not options.check and not options.types:
                results.write(results.RESULTS, everything)
        if options.page or not (options.out or options.check or options.types):
            _write_pages()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def _chosen(types: Sequence[str] | None, old: Sequence[Row]) -> list[str]:
    """The model types to try; raises ValueError for one that no auto class knows."""
    from benchmarks.architectures.models import model_types  # slow: it imports Transformers

    known = model_types()
    unknown = sorted(set(types or ()) - set(known))
    if unknown:
        raise ValueError(f"no auto class of the installed Transformers knows {', '.join(unknown)}")
    passed = {row["type"] for row in old if row["status"] == "passed"}
    return [name for name in types or known if name not in passed]


def _run(types: Sequence[str], jobs: int) -> list[Row]:
    """Try these types, with a line for each as it is done."""
    import transformers
    import transformers.generation.utils
    import transformers.loss.loss_utils
    import transformers.vision_utils  # noqa: F401  (each worker would import them again)

    from benchmarks.architectures.attempt import try_type
    from benchmarks.architectures.workers import run_all

    start, rows = time.perf_counter(), []
    with _quiet():
        for row in run_all(try_type, types, jobs, SECONDS, GIGABYTES):
            seconds = row.pop("seconds")
            seen = results.failures(row) or row.get("sentence") or row.get("reason") or ""
            print(f"{len(rows) + 1}/{len(types)} {row['type']}: {row['status']} in {seconds:.1f} s {seen}", flush=True)
            rows.append(row)
    print(f"\n{page.summary(rows)}\n\n{time.perf_counter() - start:.0f} s")
    return rows


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No logs, progress bars or warnings of the models that are tried, in the processes that are forked meanwhile."""
    from transformers.utils import logging as their_logging

    disabled, bars = logging.root.manager.disable, their_logging.is_progress_bar_enabled()
    logging.disable(logging.WARNING)
    their_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        if bars:
            their_logging.enable_progress_bar()


def _exit_if_worse(lines: Sequence[str]) -> None:
    if lines:
        print(f"\nworse than {results.RESULTS.name}:\n" + "\n".join(lines))
        sys.exit(1)


def _write_pages() -> None:
    found = results.read()
    page.PAGE.write_text(page.render(found), encoding="utf-8")
    page.SHIPPED.write_text(page.shipped(found), encoding="utf-8")
    text = page.document(page.DOCUMENT.read_text(encoding="utf-8"), found)
    page.DOCUMENT.write_text(text, encoding="utf-8")
