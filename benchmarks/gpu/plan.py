"""The steps, in order of worth, and their limits."""

from dataclasses import dataclass

__all__ = ["STEPS", "Step"]


@dataclass(frozen=True)
class Step:
    """One step: the module of that name in :mod:`benchmarks.gpu.steps`, and what it may take on a GPU.

    Attributes:
        name: of the module and of the file of results.
        seconds: for the whole step.
        case_seconds: for one of its cases, the compiling included.
        workers: how many processes may run its cases at once; None is as many as there are. What is timed runs alone.
        prepares: whether all cases first run once in many processes, which fills the compilers' caches on disk.
    """

    name: str
    seconds: float
    case_seconds: float
    workers: int | None = 1
    prepares: bool = False


STEPS = (
    Step("environment", 60, 45),
    Step("correctness", 240, 100, workers=None),
    Step("attention", 200, 90, prepares=True),
    Step("tiles", 130, 45, prepares=True),
    Step("training_step", 110, 60, prepares=True),
    Step("cross_entropy", 60, 40),
    Step("rows", 150, 60, prepares=True),
    Step("row_attention", 240, 90, prepares=True),
    Step("evidence", 600, 240, workers=4),
)
