"""The metrics of ``recipes/metrics``, modules of ``evaluate``."""

from pathlib import Path
from typing import Any

METRICS = Path(__file__).parents[1] / "metrics"


def compute(metric: str, **inputs: Any) -> dict[str, Any]:
    """What a metric gives for its inputs; nothing is fetched, and each process computes for itself."""
    import evaluate  # slow to import, and needed when all else is done

    return evaluate.load(str(METRICS / metric), keep_in_memory=True).compute(**inputs)
