"""The metrics of ``recipes/metrics``, modules of ``evaluate``."""

import functools
from pathlib import Path
from typing import Any

from evaluate import EvaluationModule, load

METRICS = Path(__file__).parents[1] / "metrics"


@functools.cache
def load_metric(name: str) -> EvaluationModule:
    """A metric by its path: nothing is fetched, and each process computes for itself."""
    return load(str(METRICS / name), keep_in_memory=True)


def compute(metric: str, **inputs: Any) -> dict[str, Any]:
    """What a metric gives for its inputs."""
    return load_metric(metric).compute(**inputs)
