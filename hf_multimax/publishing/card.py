"""Model cards: rendered from a model and its results.json, or put into a card that is there already."""

import functools
import importlib.resources
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from hf_multimax.publishing import tables
from hf_multimax.publishing.results import Arm, Results, metric_label, one_line
from hf_multimax.publishing.subject import Subject, find_subject, layer_modulators, stock_name

__all__ = ["layer_modulators", "model_card"]

_INSTALL = "pip install hf-multimax"
_NOTICE, _SECTION = "multimax-install", "multimax"
#: The Auto classes that a card names, and the Hub's name for what their models do.
_AUTO_CLASSES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSeq2SeqLM": None,  # translation, summarisation, ...: the results or the class say which
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForMultipleChoice": "multiple-choice",
    "AutoModel": "feature-extraction",
}
_PIPELINES = ("text-generation", "image-classification")
#: Metrics of results.json that are metrics of the Hub, too.
_HUB_METRICS = ("perplexity", "accuracy", "bleu", "chrf")


def model_card(
    model: PreTrainedModel | None,
    results: Results | Mapping[str, Any] | str | Path | None = None,
    *,
    repo_id: str | None = None,
    existing: ModelCard | None = None,
    tokenizer: Any = None,
    name: str | None = None,
    license: str | None = None,
    curves: str | None = None,
    modulator_figure: str | None = None,
    measure_figure: str | None = None,
) -> ModelCard:
    """The card of a patched model, or without a model that of a results.json.

    Args:
        model: a patched model; its class, config and scalars are what the card describes. None: a run's results.json
            stands for its model, a comparison's gets a card that shows all arms.
        results: results.json, its path or what it holds. Of a comparison, the arm that has the model's config is the
            model's; the others are its twins. None: the card has no figures.
        repo_id: where the model is published, for the title and the code that loads it.
        existing: a card to edit. Its text and metadata stay; tags, data sets and metrics are joined, results of the
            same task and data set replaced, and MultiMax's own two marked blocks replaced or added. It is not changed
            itself.
        tokenizer: the tokenizer, image processor or processor published with the model; the code then loads it.
        name: the title; default the last part of ``repo_id``, else made of the model type and the data.
        license: the Hub's identifier of the model's licence; default that of ``existing``, else ``unknown``.
        curves, modulator_figure, measure_figure: where figures of the learning curves, of the modulators, and of
            sparsity against multi-modality are, as links.

    Raises:
        ValueError: if the model is not patched, ``results`` is no results.json, belongs to another model or to a stock
            one, or ``existing`` has a marker of MultiMax's blocks without its counterpart.
    """
    if results is not None and not isinstance(results, Results):
        results = Results(results)
    subject, arm = find_subject(model, results)
    described = _Card(subject, arm, results, repo_id, name)
    data = described.metadata(license)
    figures = {"curves": curves, "modulator_figure": modulator_figure, "measure_figure": measure_figure}
    context = described.context(tokenizer, figures)
    template = importlib.resources.files(__package__).joinpath("template.md").read_text(encoding="utf-8")
    card = ModelCard.from_template(data, template_str=template, **context)
    card.text = re.sub(r"\n{3,}", "\n\n", card.text).rstrip("\n") + "\n"
    return card if existing is None else _edited(existing, card, replace_license=license is not None)


# -- a card of its own ------------------------------------------------------------------------------------------------


class _Card:
    """The metadata of a card, and what its template needs: prose is the template's, figures come from here."""

    def __init__(
        self, subject: Subject | None, arm: Arm | None, results: Results | None, repo_id: str | None, name: str | None
    ) -> None:
        self.subject, self.arm, self.results, self.repo_id = subject, arm, results, repo_id
        self.data: Mapping[str, Any] = results.values["data"] if results else {}
        self.run: Mapping[str, Any] = next(iter(arm.runs if arm else results.runs if results else ()), {})
        self.title = one_line(name or (repo_id or self._default_name()).rpartition("/")[2])

    def metadata(self, license: str | None) -> ModelCardData:
        metrics = [metric for metric in (self.results.metrics if self.results else ()) if metric in _HUB_METRICS]
        entries = self._eval_results()
        tags = ["multimax", *([self.subject.model_type] if self.subject else ())]
        return ModelCardData(
            base_model=self._base_model(),
            library_name="transformers",
            pipeline_tag=self._task(),
            datasets=[self.data["dataset"]] if self.data.get("dataset") else None,
            metrics=metrics or None,
            license=license or "unknown",
            language=list(self.data.get("language") or ()) or None,
            tags=tags,
            eval_results=entries or None,
            model_name=self.title if entries else None,
        )

    def context(self, tokenizer: Any, figures: Mapping[str, str | None]) -> dict[str, Any]:
        results, comparison = self.results, bool(self.results and self.results.is_comparison)
        context: dict[str, Any] = {
            "title": self.title,
            "install": _INSTALL,
            "subject": self.subject,
            "base_model": self._base_model(),
            "results": results,
            "comparison": comparison,
            **figures,
            "modulators": tables.modulators(self.subject, self.results),
            "measures": tables.measures(self.results) if results else None,
            "code": self._code(tokenizer),
            "data": self.data,
            "run": self.run,
            "text": one_line,
        }
        if results:
            context |= {"command": " ".join(results.values["command"].split())}
            context |= {"scores": tables.scores(results), "costs": tables.costs(results)}
        if comparison:
            context |= {
                "class_names": " and ".join(dict.fromkeys(map(stock_name, results.runs))) or "model",
                "arms": tables.arms(results),
                "metric": metric_label(results.metric),
                "arm": self.arm.name if self.arm else None,
            }
        return context

    # -- metadata ------------------------------------------------------------------------------------------------------

    def _default_name(self) -> str:
        parts = [self.run["model"]["type"] if self.run else None, self.data.get("name")]
        if self.subject:
            parts = [self.subject.model_type, self.data.get("name"), self.subject.config.normalizer]
        return "-".join(part for part in parts if part) or "comparison"

    def _base_model(self) -> str | None:
        """The Hub id of the model that training started from, if it has one; results know it best."""
        source = self.run["model"].get("source") if self.run else self.subject.source if self.subject else None
        return source if source and source != self.repo_id and _is_hub_id(source) else None

    def _task(self) -> str | None:
        if self.results:
            return self.results.values["task"]
        if self.subject.class_name == "MarianMTModel":
            return "translation"
        return _AUTO_CLASSES.get(_auto_class(self.subject.class_name) or "")

    def _eval_results(self) -> list[EvalResult]:
        """The model's own arm; all arms in the card of a comparison."""
        if self.results is None:
            return []
        arms = [self.arm] if self.arm else self.results.arms.values()
        task, data, comparison = self.results.values["task"], self.data, self.results.is_comparison
        return [
            EvalResult(
                task_type=task,
                task_name=task.replace("-", " "),
                dataset_type=data.get("dataset") or data["name"],
                dataset_name=data["name"],
                metric_type=metric,
                metric_value=figure.mean,
                metric_name=f"{metric_label(metric)}, {arm.name}{_over(figure.n) if comparison else ''}",
                metric_args={"arm": arm.name, "seeds": figure.n, **({} if figure.std is None else {"std": figure.std})},
            )
            for arm in arms
            for metric, figure in arm.metrics.items()
        ]

    # -- code ----------------------------------------------------------------------------------------------------------

    def _code(self, tokenizer: Any) -> str:
        where = self.repo_id or "path/to/the/model"
        name = self.subject.class_name if self.subject else stock_name(self.run) if self.run else "PreTrainedModel"
        model, loads, task = _auto_class(name), _preprocessor(tokenizer), self._task()
        piped = loads in ("AutoTokenizer", "AutoImageProcessor") and task in _PIPELINES
        imports = sorted(part for part in (model, loads) if part) + ["pipeline"] * piped
        code = [] if model else [f"from hf_multimax.modeling import MultiMax{name}"]
        code += ["import hf_multimax  # teaches Transformers the model type"] if model else []
        code += [f"from transformers import {', '.join(imports)}"] if imports else []
        code += ["", f'model = {model or f"MultiMax{name}"}.from_pretrained("{where}")']
        if loads:
            variable = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", loads.removeprefix("Auto")).lower()
            code.append(f'{variable} = {loads}.from_pretrained("{where}")')
        if piped:
            code.append(f'pipe = pipeline("{task}", model=model, {variable}={variable})')
        return "\n".join(code)


# -- parts of tables and code -----------------------------------------------------------------------------------------


def _over(seeds: int) -> str:
    return ", one seed" if seeds == 1 else f", mean of {seeds} seeds"


@functools.cache
def _auto_class(class_name: str) -> str | None:
    """The Auto class that makes a class of Transformers."""
    stock = getattr(transformers, class_name, None)
    for name in _AUTO_CLASSES:
        mapping = getattr(transformers, name)._model_mapping
        made = mapping[stock.config_class] if stock and stock.config_class in mapping else ()
        if stock and stock in (made if isinstance(made, tuple | list) else (made,)):
            return name
    return None


def _preprocessor(tokenizer: Any) -> str | None:
    """The Auto class of what turns inputs into tensors."""
    if tokenizer is None:
        return None
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return "AutoTokenizer"
    return "AutoProcessor" if isinstance(tokenizer, ProcessorMixin) else "AutoImageProcessor"


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


# -- an existing card -------------------------------------------------------------------------------------------------


def _edited(existing: ModelCard, new: ModelCard, replace_license: bool) -> ModelCard:
    """A copy of ``existing`` with the metadata and the blocks of ``new`` in it."""
    card = ModelCard(existing.content, ignore_metadata_errors=existing.ignore_metadata_errors)
    data, ours = card.data, new.data
    for key in ("base_model", "library_name", "pipeline_tag", "license", "language"):
        if data.get(key) is None or (key == "license" and replace_license):
            data[key] = ours.get(key)
    for key in ("tags", "datasets", "metrics"):
        data[key] = list(dict.fromkeys([*_listed(data.get(key)), *_listed(ours.get(key))])) or None
    data.eval_results = _merged(data.eval_results or [], ours.eval_results or []) or None
    data.model_name = data.model_name or ours.model_name if data.eval_results else None
    newline = "\r\n" if "\r\n" in existing.text else "\n"
    text = existing.text.replace("\r\n", "\n")
    heading = re.match(r"\s*(?:# .*(?:\n|$))?", text).end()
    text = _with_block(text, new.text, _NOTICE, heading)
    text = _with_block(text, new.text, _SECTION, None)
    card.text = text.replace("\n", newline)
    return card


def _merged(existing: list[EvalResult], new: list[EvalResult]) -> list[EvalResult]:
    """Of the existing results those of other tasks and data that did not come from here, and the new ones."""
    replaced = {(entry.task_type, entry.dataset_type) for entry in new}
    kept = [entry for entry in existing if (entry.task_type, entry.dataset_type) not in replaced]
    return [entry for entry in kept if not _is_ours(entry)] + new


def _is_ours(entry: EvalResult) -> bool:
    return isinstance(entry.metric_args, dict) and {"arm", "seeds"} <= entry.metric_args.keys()


def _with_block(text: str, source: str, marker: str, place: int | None) -> str:
    """``text`` with the marked block of ``source`` instead of its own; else at ``place``, or the end."""
    block = _block(marker).search(source).group()
    if len(_block(marker).findall(text)) == 1 and text.count(f"<!-- {marker} -->") == 1:
        return _block(marker).sub(lambda _: block, text)
    if f"<!-- {marker} -->" in text or f"<!-- /{marker} -->" in text:
        raise ValueError(
            f"the card has the marker <!-- {marker} --> or <!-- /{marker} --> more than once or without the other: "
            "take both out of the card, and the block is added anew"
        )
    if place is None:
        return f"{text.rstrip()}\n\n{block}\n".lstrip("\n")
    head, rest = text[:place].rstrip(), text[place:].lstrip()
    return "\n\n".join(part for part in (head, block, rest) if part) + ("" if rest else "\n")


def _block(marker: str) -> re.Pattern[str]:
    return re.compile(rf"<!-- {marker} -->.*?<!-- /{marker} -->", flags=re.DOTALL)


def _listed(value: Any) -> Iterable[str]:
    return [value] if isinstance(value, str) else value or []
