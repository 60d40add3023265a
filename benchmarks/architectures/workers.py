"""Each model type in a process of its own, so that a crash, a hang or a flood of memory costs that type alone."""

import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

__all__ = ["run_all"]

Row = dict[str, Any]


def run_all(
    function: Callable[[str], Row], names: Sequence[str], jobs: int, seconds: float, gigabytes: float
) -> Iterator[Row]:
    """``function(name)`` for every name, each in a forked process, as they finish.

    Args:
        jobs: how many run at a time, each on one thread.
        seconds, gigabytes: what one may take; beyond it is ended, and its row says so.
    """
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    waiting, running = list(reversed(names)), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop()
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(function, name, sender, gigabytes), daemon=True)
            process.start()
            sender.close()
            running[receiver] = (name, process, time.monotonic() + seconds)
        ready = wait(list(running), timeout=0.5)
        late = [receiver for receiver, (_, _, until) in running.items() if time.monotonic() > until]
        for receiver in {*ready, *late}:
            name, process, _ = running.pop(receiver)
            try:
                row = receiver.recv() if receiver in ready else None
                reason = "crashed"
            except EOFError:
                row, reason = None, "the process died"
            if row is None:
                reason = reason if receiver in ready else f"took more than {seconds:.0f} s"
                process.kill()
            process.join()
            receiver.close()
            yield row or {
                "type": name,
                "status": "failed",
                "reason": reason,
                "checks": {"process": reason},
                "seconds": seconds,
            }


def _work(function: Callable[[str], Row], name: str, sender: Connection, gigabytes: float) -> None:
    limit = int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    torch.set_num_threads(1)
    sender.send(function(name))
    sender.close()
