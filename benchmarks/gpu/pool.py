"""Worker processes and the cases they run, under limits: for each case, and for all of them together."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

__all__ = ["Pool", "StepFailed", "worker_command"]

ROOT = Path(__file__).resolve().parents[2]
#: how often a worker may fail to start
_FAULTY_STARTS = 2

Done = Callable[[str, dict[str, Any]], None]


class StepFailed(Exception):
    """No worker of the step starts; the text says why."""


class _Worker:
    """One process. What it says is put into ``events``, and None when it has ended."""

    def __init__(self, command: Sequence[str], events: "queue.Queue[tuple[_Worker, dict[str, Any] | None]]") -> None:
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            process_group=0,  # so that what it starts can be ended with it
        )
        self.said: deque[str] = deque(maxlen=40)
        self.ready = False
        self.case: str | None = None
        self.since = time.monotonic()
        self._errors = threading.Thread(target=self.said.extend, args=(self.process.stderr,), daemon=True)
        self._errors.start()
        threading.Thread(target=self._read, args=(self.process.stdout, events), daemon=True).start()

    def _read(self, answers: IO[str], events: "queue.Queue[tuple[_Worker, dict[str, Any] | None]]") -> None:
        for line in answers:
            events.put((self, json.loads(line)))
        events.put((self, None))

    def order(self, case: str, prepare: bool) -> None:
        """Have it run a case."""
        self.case, self.since = case, time.monotonic()
        with contextlib.suppress(BrokenPipeError):  # that it has ended is an event of its own
            self.process.stdin.write(json.dumps({"case": case, "prepare": prepare}) + "\n")
            self.process.stdin.flush()

    def end(self) -> None:
        """Kill it, and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # the driver may hold on to it
            self.process.wait(timeout=10)

    def last_words(self) -> str:
        """How it ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=10)
        code = self.process.returncode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
        self._errors.join(timeout=5)
        lines = [line.strip() for line in self.said if line.strip()]
        return f"the process {how}{': ' + lines[-1] if lines else ''}"


class Pool:
    """The workers of one step.

    Args:
        command: what starts a worker.
        case_seconds: how long a case, or a worker's start, may take.
        deadline: ``time.monotonic()`` when everything must have ended.
    """

    def __init__(self, command: Sequence[str], case_seconds: float, deadline: float) -> None:
        self.command, self.case_seconds, self.deadline = command, case_seconds, deadline
        self.announced: dict[str, Any] | None = None
        self._events: queue.Queue[tuple[_Worker, dict[str, Any] | None]] = queue.Queue()
        self._workers: list[_Worker] = []
        self._faulty_starts = 0
        self._startable = sys.maxsize  # how many processes have room on the device

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self._shrink(0)

    def start(self, workers: int) -> dict[str, Any] | None:
        """Start workers; what the first of them announces, or None if the deadline comes before.

        Raises:
            StepFailed: if they cannot start.
        """
        for _ in range(workers - len(self._workers)):
            self._workers.append(_Worker(self.command, self._events))
        while self.announced is None and self._wait(lambda case, done: None, self.deadline):
            if not self._workers:
                self._workers.append(_Worker(self.command, self._events))
        return self.announced

    def run(self, cases: Sequence[str], most: int, done: Done, *, prepare_for: float | None = None) -> list[str]:
        """Run cases in at most ``most`` workers at once; ``done`` gets each one's name and outcome.

        A worker that dies, or is killed because its case takes too long, costs that case alone. ``prepare_for`` has the
        cases prepared instead of run, for so many seconds at the most.

        Returns:
            What was not run, or not to its end, before the deadline.

        Raises:
            StepFailed: if no worker can start any more.
        """
        waiting = deque(cases)
        prepare = prepare_for is not None
        deadline = min(self.deadline, time.monotonic() + prepare_for) if prepare else self.deadline
        self._shrink(most)
        while waiting or any(worker.case for worker in self._workers):
            for worker in self._workers:
                if waiting and worker.ready and worker.case is None:
                    worker.order(waiting.popleft(), prepare)
            busy = [worker.case for worker in self._workers if worker.case]
            if len(self._workers) < min(most, self._startable, len(waiting) + len(busy)):
                self._workers.append(_Worker(self.command, self._events))
                continue
            if not self._wait(done, deadline):
                for worker in [worker for worker in self._workers if worker.case]:
                    self._workers.remove(worker)
                    worker.end()
                return [*busy, *waiting]
        return []

    def _wait(self, done: Done, deadline: float) -> bool:
        """Take in the next event, or end what is over its limit; False when the deadline has passed."""
        now = time.monotonic()
        if now >= deadline:
            return False
        limits = [worker.since + self.case_seconds for worker in self._workers if worker.case or not worker.ready]
        try:
            worker, said = self._events.get(timeout=max(0.0, min([deadline, *limits]) - now))
        except queue.Empty:
            self._end_overdue(done)
            return True
        if worker not in self._workers:
            return True  # the last words of one that was ended
        if said is None:
            self._ended(worker, done, worker.last_words())
        elif "broken" in said:
            if self.announced is None:
                raise StepFailed(said["broken"])
            self._ended(worker, done, said["broken"])
        elif "ready" in said:
            worker.ready = True
            self.announced = self.announced or said["ready"]
        else:
            case, worker.case = worker.case, None
            if said.pop("unusable", False):
                self._workers.remove(worker)
                worker.end()
            done(case, {key: value for key, value in said.items() if key != "case"})
        return True

    def _end_overdue(self, done: Done) -> None:
        for worker in list(self._workers):
            if (worker.case or not worker.ready) and time.monotonic() >= worker.since + self.case_seconds:
                worker.end()
                self._ended(worker, done, f"took longer than {self.case_seconds:g} s and was killed")

    def _ended(self, worker: _Worker, done: Done, how: str) -> None:
        self._workers.remove(worker)
        if worker.case is not None:
            seconds = round(time.monotonic() - worker.since, 2)
            trace = "".join(worker.said)[-2500:]
            done(worker.case, {"status": "failed", "error": how, "traceback": trace, "seconds": seconds})
        elif not worker.ready:
            self._faulty_starts += 1
            if self._faulty_starts >= _FAULTY_STARTS:
                self._startable = len(self._workers)
                if not self._workers:
                    raise StepFailed(f"a worker did not start: {how}")

    def _shrink(self, most: int) -> None:
        """End workers beyond ``most``, those that are still starting first."""
        self._workers.sort(key=lambda worker: not worker.ready)
        for worker in self._workers[most:]:
            worker.end()
        del self._workers[most:]


def worker_command(step: str, device: str, tiny: bool) -> list[str]:
    """What starts a worker of a step."""
    command = [sys.executable, "-u", "-m", "benchmarks.gpu.worker", step, "--device", device]
    return [*command, "--tiny"] if tiny else command
