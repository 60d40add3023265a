"""``bash benchmarks/gpu.sh``: run the steps, keep what they measured, print one summary."""

import argparse
import importlib.util
import os
import signal
import sys
import time
from pathlib import Path

from benchmarks.gpu.plan import STEPS, Step
from benchmarks.gpu.pool import Pool, StepFailed, worker_command
from benchmarks.gpu.results import COMMITTED, StepResults, slug
from benchmarks.gpu.summary import summary

ROOT = Path(__file__).resolve().parents[2]
TRIED_OUT = ROOT / "runs" / "gpu-tiny"
#: limits are for a GPU's machine; a CPU that interprets kernels, with others on it, gets more
_CPU_PATIENCE = 4


def main(arguments: list[str] | None = None) -> int:
    """Run what is asked for; 0 if nothing failed."""
    options = _parse(arguments)
    if importlib.util.find_spec("torch") is None:
        sys.exit(f"error: {sys.executable} has no torch: name another Python by PYTHON=...")
    signal.signal(signal.SIGTERM, _stop)
    _set_up_workers(options.device)
    begun = time.monotonic()
    found: list[StepResults] = []
    try:
        for step in (step for step in STEPS if step.name in options.steps):
            _run_step(step, options, begun, found)
    finally:  # what a signal cut off is summed up, too
        print(summary(found, time.monotonic() - begun, tiny=options.tiny), flush=True)
    return int(any(results.error or results.with_status("failed") for results in found))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bash benchmarks/gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [step.name for step in STEPS]
    parser.add_argument("--steps", nargs="+", choices=names, default=names, help="default: all, in order of worth")
    parser.add_argument(
        "--again", nargs="*", choices=names, help="run again what ended well before, too: of all steps, or of these"
    )
    parser.add_argument("--minutes", type=float, default=11.0, help="end after so many (default 11)")
    parser.add_argument(
        "--results",
        type=Path,
        help=f"write to <folder>/<GPU>/<step>.json, going on with what {_shown(COMMITTED)} has "
        f"(default: there; with --tiny {_shown(TRIED_OUT)})",
    )
    parser.add_argument("--workers", type=int, help="processes at once where nothing is timed (default: CPUs - 2)")
    parser.add_argument("--commit", help="the commit of this tree, where git cannot tell it")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes of a few rows: try this script out")
    options = parser.parse_args(arguments)
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu goes with --tiny: Triton's interpreter is for trying this script out")
    if options.workers is None:
        options.workers = max(1, len(os.sched_getaffinity(0)) - 2)
    return options


def _shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _stop(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _set_up_workers(device: str) -> None:
    """The environment that worker processes inherit."""
    for name, value in {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # no processes of its own: there are enough
    }.items():
        os.environ.setdefault(name, value)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.environ.pop("TRITON_INTERPRET", None)
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"


def _run_step(step: Step, options: argparse.Namespace, begun: float, found: list[StepResults]) -> None:
    """Run a step; what is known of it joins ``found`` as soon as it is known which GPU it is."""
    patience = _CPU_PATIENCE if options.device == "cpu" else 1
    now, end = time.monotonic(), begun + 60 * options.minutes
    command = worker_command(step.name, options.device, options.tiny)
    with Pool(command, patience * step.case_seconds, min(end, now + patience * step.seconds)) as pool:
        at_once = min(step.workers or options.workers, options.workers)
        results, folder = None, options.results or (TRIED_OUT if options.tiny else COMMITTED)
        try:
            announced = pool.start(options.workers if step.prepares and not options.tiny else at_once)
            if announced is None:  # there is no time left
                return
            environment = announced["environment"]
            environment["commit"] = environment["commit"] or options.commit
            gpu = slug(environment.get("gpu", "cpu"))
            results = StepResults(step.name, folder / gpu, None if options.tiny else COMMITTED / gpu)
            results.begin(announced["cases"], environment)
            results.write()
            found.append(results)
            again = options.again is not None and (not options.again or step.name in options.again)
            waiting = [case for case in announced["cases"] if again or not results.finished(case)]
            _tell(begun, f"{step.name}: {len(waiting)} of {len(announced['cases'])} cases")
            if step.prepares:  # backwards: what takes the longest to compile comes last in a step
                ahead = waiting[:1] if options.tiny else waiting[::-1]
                pool.run(ahead, options.workers, lambda case, outcome: None, prepare_for=patience * step.seconds / 2)
                _tell(begun, f"{step.name}: prepared")

            def enter(case: str, outcome: dict[str, object]) -> None:
                results.enter(case, outcome)
                if outcome["status"] == "failed":
                    _tell(begun, f"{step.name}: {case} failed: {outcome['error']}")

            pool.run(waiting, at_once, enter)
        except StepFailed as error:
            if results is None:
                found.append(StepResults(step.name, folder / "unknown"))
                found[-1].error = str(error)
            else:
                results.fail(str(error))


def _tell(begun: float, text: str) -> None:
    print(f"[{time.monotonic() - begun:4.0f} s] {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
