"""``benchmarks/gpu.sh`` with one step of made-up cases, which need no PyTorch: each is called after what it does."""

import os
import signal
import sys
import time

from benchmarks.gpu import __main__ as script
from benchmarks.gpu.cases import Case, Skipped
from benchmarks.gpu.plan import Step
from benchmarks.gpu.worker import serve


def raises() -> None:
    raise ValueError("this one\nis wrong")


def skips() -> None:
    raise Skipped("no such thing here")


def hangs() -> None:
    time.sleep(1000)


def dies() -> None:
    print("the last words", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def starts_others() -> dict[str, object]:
    """A process that outlives its parent unless it is ended."""
    child = os.fork()
    if child == 0:
        time.sleep(1000)
    return {"child": child}


def is_noisy() -> dict[str, object]:
    print("not an answer")
    os.write(1, b"nor this\n")
    return {"value": float("nan"), "values": (1.0, float("inf"))}


def fails_once() -> None:
    marker = os.environ["MADE_UP_MARKER"]
    if not os.path.exists(marker):
        open(marker, "w").close()
        raise RuntimeError("for the first time")


def takes_its_time() -> dict[str, object]:
    time.sleep(0.15)
    return {"pid": os.getpid()}


def load() -> tuple[list[Case], list[Case], dict[str, object]]:
    """The cases that the environment names, perhaps with a number."""
    if os.environ.get("MADE_UP_BROKEN"):
        raise RuntimeError("nothing to run on")
    if os.environ.get("MADE_UP_ROOM"):  # for one process only
        os.close(os.open(os.environ["MADE_UP_ROOM"], os.O_CREAT | os.O_EXCL))
    names = os.environ["MADE_UP_CASES"].split(",")
    cases = [Case(name, globals()[name.rstrip("0123456789")], needs_triton=False) for name in names]
    return cases, cases, {"gpu": "Made-up GPU 1", "commit": None, "modified": None}


def main() -> int:
    """Serve the cases, or run the script on them."""
    if sys.argv[1:2] == ["worker"]:
        serve(load)
        return 0
    script.STEPS = (Step("made_up", 60, 0.5, workers=int(os.environ.get("MADE_UP_WORKERS", "2"))),)
    script.worker_command = lambda *_: [sys.executable, "-u", __file__, "worker"]
    return script.main([*sys.argv[1:], "--tiny", "--device", "cpu"])


if __name__ == "__main__":
    sys.exit(main())
