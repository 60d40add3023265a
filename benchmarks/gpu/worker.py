"""A process that runs cases of one step: ``python -m benchmarks.gpu.worker STEP``, started by :mod:`.pool`.

It first announces its cases, then takes one order a line, ``{"case": name, "prepare": bool}``, and answers each by one
line of JSON. It ends with its parent, at the end of its standard input.
"""

import argparse
import gc
import importlib
import json
import math
import os
import queue
import signal
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from benchmarks.gpu.cases import Case, Settings, Skipped, described, triton_fault

__all__ = ["main", "serve"]

#: the cases to run, those to prepare by, and the description of the machine
Loaded = tuple[list[Case], list[Case], dict[str, Any]]

ROOT = Path(__file__).resolve().parents[2]
_TRACEBACK = 2500


def main() -> None:
    """Serve the cases of a step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    serve(lambda: _load(arguments.step, Settings(arguments.device, arguments.tiny)))


def serve(load: Callable[[], Loaded]) -> None:
    """Announce cases, then run what is ordered.

    Args:
        load: gives the cases, to run and to prepare by, and the description of the machine; what it raises is
            answered, too.
    """
    # what libraries print must not come between the answers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    orders = _listen()
    try:
        cases, preparing, environment = load()
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent reports it
        _answer(answers, {"broken": described(error), "traceback": traceback.format_exc()[-_TRACEBACK:]})
        return
    by_name = {False: {case.name: case for case in cases}, True: {case.name: case for case in preparing}}
    _answer(answers, {"ready": {"cases": list(by_name[False]), "environment": environment}})
    while True:
        order = orders.get()
        done = _run(by_name[order["prepare"]][order["case"]])
        _answer(answers, {"case": order["case"], **done})
        if done.get("unusable"):
            return


def _load(step: str, settings: Settings) -> Loaded:
    _own_tests()
    import torch

    from benchmarks.common import environment

    if settings.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("PyTorch finds no CUDA device; --tiny --device cpu tries this script out without one")
    torch.set_num_threads(1)
    module = importlib.import_module(f"benchmarks.gpu.steps.{step}")
    return module.cases(settings), module.cases(replace(settings, preparing=True)), environment(settings.device)


def _listen() -> "queue.Queue[dict[str, Any]]":
    """The orders as they come in; when no more can come, the process and what it started end at once."""
    orders: queue.Queue[dict[str, Any]] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            orders.put(json.loads(line))
        if os.getpgrp() == os.getpid():
            os.killpg(os.getpid(), signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=read, daemon=True).start()
    return orders


def _own_tests() -> None:
    """Let ``tests`` be this repository's folder: a package of that name in site-packages would win over it."""
    package = types.ModuleType("tests")
    package.__path__ = [str(ROOT / "tests")]
    sys.modules["tests"] = package


def _run(case: Case) -> dict[str, Any]:
    """Run one case: status "passed", "failed" or "skipped", and what it measured or what was wrong."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(0)
    start = time.perf_counter()
    done: dict[str, Any]
    try:
        fault = triton_fault() if case.needs_triton else None
        if fault:
            raise Skipped(fault)
        measured = case.run() or {}
        _wait_for_device(torch)
        done = {"status": "passed", "measured": _plain(measured)}
    except Skipped as reason:
        done = {"status": "skipped", "error": str(reason)}
    except Exception as error:  # noqa: BLE001 - a case that fails stops no other
        done = {"status": "failed", "error": described(error), "traceback": traceback.format_exc()[-_TRACEBACK:]}
    done["seconds"] = round(time.perf_counter() - start, 2)
    gc.collect()
    try:
        _wait_for_device(torch)
    except Exception:  # noqa: BLE001 - after some errors nothing runs on the device in this process any more
        done["unusable"] = True
    return done


def _wait_for_device(torch: types.ModuleType | None) -> None:
    """Raise what the device has still to report, and let go of memory that is not in use."""
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _plain(value: Any) -> Any:
    """``value`` as JSON takes it: NaN and infinity by their names."""
    if isinstance(value, dict):
        return {str(key): _plain(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _answer(answers: IO[str], content: dict[str, Any]) -> None:
    answers.write(json.dumps(content, allow_nan=False) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
