"""Top-k accuracy: how often the right class is among the k most probable ones."""

import datasets
import evaluate
import numpy as np

_INPUTS = """
Args:
    predictions: for each example its most probable classes, best first, as many as the largest k (or all there are).
    references: the right classes.
    ks: the values of k.
Returns:
    top<k>_accuracy for each k, in [0, 1]; that of k = 1 is called accuracy.
"""


class TopKAccuracy(evaluate.Metric):
    """``evaluate.load("recipes/metrics/topk_accuracy").compute(predictions=..., references=...)``."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(
            predictions=datasets.Sequence(datasets.Value("int64")), references=datasets.Value("int64")
        )
        return evaluate.MetricInfo(description=__doc__, citation="", inputs_description=_INPUTS, features=features)

    def _compute(
        self, predictions: list[list[int]], references: list[int], ks: tuple[int, ...] = (1, 5)
    ) -> dict[str, float]:
        hits = np.asarray(predictions) == np.asarray(references)[:, None]
        return {"accuracy" if k == 1 else f"top{k}_accuracy": float(hits[:, :k].any(1).mean()) for k in ks}
