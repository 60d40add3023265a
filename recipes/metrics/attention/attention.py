"""Sparsity and multi-modality of attention (MultiMax paper, Definitions 3.2 and 3.3), entropy and top-k mass."""

import datasets
import evaluate
import torch
from torch.nn.utils.rnn import pad_sequence

from hf_multimax import diagnostics

_INPUTS = """
Args:
    scores: for each query the scores of the keys that it sees, before they are modulated.
    probabilities: what was made of them.
    k: of topk_mass.
Returns:
    sparsity, multi_modality, entropy (nats) and topk_mass: means over the queries where each is defined, else NaN.
"""


class Attention(evaluate.Measurement):
    """``evaluate.load("recipes/metrics/attention").compute(scores=..., probabilities=...)``."""

    def _info(self) -> evaluate.MeasurementInfo:
        rows = datasets.Sequence(datasets.Value("float32"))
        features = datasets.Features(scores=rows, probabilities=rows)
        return evaluate.MeasurementInfo(description=__doc__, citation="", inputs_description=_INPUTS, features=features)

    def _compute(self, scores: list[list[float]], probabilities: list[list[float]], k: int = 8) -> dict[str, float]:
        x = pad_sequence([torch.tensor(row) for row in scores], batch_first=True, padding_value=float("-inf"))
        p = pad_sequence([torch.tensor(row) for row in probabilities], batch_first=True)
        measures = {
            "sparsity": diagnostics.sparsity(x, p),
            "multi_modality": diagnostics.multi_modality(x, p),
            "entropy": diagnostics.entropy(p),
            "topk_mass": diagnostics.topk_mass(p, k),
        }
        return {name: measure.value for name, measure in measures.items()}
