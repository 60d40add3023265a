"""BLEU and chrF of translations, as sacreBLEU computes them, with the signatures that say how."""

import datasets
import evaluate
import sacrebleu

_INPUTS = """
Args:
    predictions: translations.
    references: the reference for each.
Returns:
    bleu and chrf in [0, 100], bleu_signature, chrf_signature.
"""


class Translation(evaluate.Metric):
    """``evaluate.load("recipes/metrics/translation").compute(predictions=..., references=...)``."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(predictions=datasets.Value("string"), references=datasets.Value("string"))
        return evaluate.MetricInfo(description=__doc__, citation="", inputs_description=_INPUTS, features=features)

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float | str]:
        metrics = {"bleu": sacrebleu.BLEU(), "chrf": sacrebleu.CHRF()}
        scores = {name: metric.corpus_score(predictions, [references]).score for name, metric in metrics.items()}
        return scores | {f"{name}_signature": str(metric.get_signature()) for name, metric in metrics.items()}
