"""Measures of attention: of scores and probabilities (``rows.py``), and of whole models on data (``models.py``).

All are means over rows, computed in float64. Report sparsity and multi-modality together: either alone can be moved by
a temperature.
"""

from hf_multimax.diagnostics.maps import attention_maps, attention_rollout
from hf_multimax.diagnostics.models import LayerMeasures, attention_statistics, measure_model, measure_models
from hf_multimax.diagnostics.modulators import Fall, falls, modulator_curve, same_weight
from hf_multimax.diagnostics.rows import (
    MEASURES,
    Measure,
    entries_above,
    entropy,
    exact_zeros,
    multi_modality,
    sparsity,
    topk_mass,
)
from hf_multimax.diagnostics.streams import ScoreHistogram

__all__ = [
    "MEASURES",
    "Fall",
    "LayerMeasures",
    "Measure",
    "ScoreHistogram",
    "attention_maps",
    "attention_rollout",
    "attention_statistics",
    "entries_above",
    "entropy",
    "exact_zeros",
    "falls",
    "measure_model",
    "measure_models",
    "modulator_curve",
    "multi_modality",
    "same_weight",
    "sparsity",
    "topk_mass",
]
