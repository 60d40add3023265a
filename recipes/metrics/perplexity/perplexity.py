"""Perplexity per token and per byte, of losses that a model has been measured with."""

import math

import datasets
import evaluate

_INPUTS = """
Args:
    losses: the mean loss of each text, in nats per token.
    tokens: the number of tokens of each.
    num_bytes: of all texts in UTF-8, which makes models with different tokenizers comparable; None: not known.
Returns:
    loss (nats per token), perplexity; with num_bytes also byte_perplexity and bytes_per_token. A perplexity is infinite
    where a model has diverged.
"""


class Perplexity(evaluate.Metric):
    """``evaluate.load("recipes/metrics/perplexity").compute(losses=..., tokens=..., num_bytes=...)``."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(losses=datasets.Value("float64"), tokens=datasets.Value("int64"))
        return evaluate.MetricInfo(description=__doc__, citation="", inputs_description=_INPUTS, features=features)

    def _compute(self, losses: list[float], tokens: list[int], num_bytes: int | None = None) -> dict[str, float]:
        count, nats = sum(tokens), math.fsum(loss * n for loss, n in zip(losses, tokens))
        results = {"loss": nats / count, "perplexity": _exp(nats / count)}
        if num_bytes is not None:
            results |= {"byte_perplexity": _exp(nats / num_bytes), "bytes_per_token": num_bytes / count}
        return results


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
