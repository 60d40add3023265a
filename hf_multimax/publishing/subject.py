"""The model that a card describes: at hand, or known from the results.json of the run that made it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_multimax.config import MultiMaxConfig
from hf_multimax.normalizers import get_normalizer, registered_normalizers
from hf_multimax.normalizers.base import (
    OUTPUT,
    MultiMax,
    Normalizer,
    is_patched,
    multimax_parameters,
    named_normalizers,
    on_its_device,
    whole,
)
from hf_multimax.publishing.results import MEASURES, Arm, Results, one_line

__all__ = ["Subject", "find_subject", "layer_modulators", "modulator_of", "stock_name"]


@dataclass(frozen=True)
class Subject:
    """What a card says about one model, whether it is at hand or known from a run."""

    class_name: str
    model_type: str
    source: str | None
    parameters: int
    multimax_parameters: int
    config: MultiMaxConfig
    layers: Mapping[str, Mapping[str, Any]]

    @property
    def normalizer(self) -> str:
        return "MultiMax" if self.is_multimax else self.config.normalizer

    @property
    def is_multimax(self) -> bool:
        return self.config.normalizer == "multimax"

    @property
    def citation(self) -> str:
        known = self.config.normalizer in registered_normalizers()
        return one_line(get_normalizer(self.config.normalizer).citation) if known else ""

    @property
    def facts(self) -> list[tuple[str, str]]:
        config = self.config
        facts = [("Where", self._where())]
        if self.is_multimax:
            each = "attention head" if config.per_head else "layer"
            affine = ", of scores that are scaled and shifted first" if config.affine else ""
            facts.append(("Modulator", f"order {config.order}{affine}, one for each {each}"))
        if config.normalizer_kwargs:
            options = ", ".join(f"`{key}={value!r}`" for key, value in sorted(config.normalizer_kwargs.items()))
            facts.append(("Options", options))
        if self.is_multimax:
            start = "as SoftMax exactly, all scalars zero" if config.init == "identity" else "at small random scalars"
            facts.append(("Start of training", f'{start} (`init="{config.init}"`)'))
        facts.append(("Size", f"{self.multimax_parameters:,} of {self.parameters:,} parameters are the normaliser's"))
        return facts

    def _where(self) -> str:
        places = []
        if self.config.attention:
            count = sum(name != OUTPUT for name in self.layers)
            chosen = self.config.patterns("include") or self.config.patterns("exclude")
            layers = f"{count} attention layer{'' if count == 1 else 's'}" if self.layers else "attention"
            places.append(f"{layers}{' (some, chosen by name)' if chosen else ''}")
        if self.config.output:
            places.append("the output logits")
        return " and ".join(places)


def find_subject(model: PreTrainedModel | None, results: Results | None) -> tuple[Subject | None, Arm | None]:
    """The model and its arm of the results; no model for the card of a whole comparison."""
    if model is None:
        if results is None:
            raise ValueError("a card needs a model, results or both")
        if results.is_comparison:
            return None, None
        (arm,) = results.arms.values()
        return _of_run(arm.runs[0], results.name), arm
    if not isinstance(model, PreTrainedModel) or not is_patched(model):
        raise ValueError(
            f"this {type(model).__name__} is not a MultiMax model: call patch_model first, or unwrap what is inside "
            "(PEFT's merge_and_unload, accelerator.unwrap_model)"
        )
    subject = _of_model(model)
    return subject, None if results is None else _arm_of(subject, results)


def _of_model(model: PreTrainedModel) -> Subject:
    return Subject(
        class_name=model.stock_class.__name__,
        model_type=model.config.model_type,
        source=model.config._name_or_path or None,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        multimax_parameters=sum(parameter.numel() for parameter in multimax_parameters(model).values()),
        config=MultiMaxConfig.from_dict(model.config.multimax),
        layers=layer_modulators(model),
    )


def _of_run(run: Mapping[str, Any], name: str) -> Subject:
    if not run.get("multimax"):
        raise ValueError(f"{name} is of a stock model with SoftMax: a card needs the results of a patched one")
    facts = run["model"]
    return Subject(
        class_name=stock_name(run),
        model_type=facts["type"],
        source=facts.get("source"),
        parameters=facts["parameters"],
        multimax_parameters=facts["multimax_parameters"],
        config=MultiMaxConfig.from_dict(run["multimax"]),
        layers={layer: modulator_of(values) for layer, values in run.get("layers", {}).items()},
    )


def modulator_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a layer's normalizer learned, without the measures of its attention."""
    return {key: value for key, value in values.items() if key not in MEASURES and value is not None}


def _arm_of(subject: Subject, results: Results) -> Arm:
    """The arm whose runs made the model; ValueError, with the difference, if none can have."""
    reasons = []
    for arm in results.arms.values():
        differences = [_difference(subject, run) for run in arm.runs]
        if any(difference is None for difference in differences):
            return arm
        reasons += [f"{arm.name}: {difference}" for difference in dict.fromkeys(differences)]
    raise ValueError(
        f"{results.name} is not of this model. {'; '.join(reasons) or 'It has no runs'}. "
        "Give the results of the run that made the model, or none"
    )


def _difference(subject: Subject, run: Mapping[str, Any]) -> str | None:
    """How the model differs from that of a run, None if it does not."""
    if stock_name(run) != subject.class_name:
        return f"a {stock_name(run)} instead of a {subject.class_name}"
    if not run.get("multimax"):
        return "SoftMax"
    if MultiMaxConfig.from_dict(run["multimax"]).to_dict() != subject.config.to_dict():
        return "another MultiMaxConfig"
    if run["model"]["parameters"] != subject.parameters:
        return f"{run['model']['parameters']:,} parameters instead of {subject.parameters:,}"
    for layer, values in run.get("layers", {}).items():
        for key, there in modulator_of(values).items():
            here = subject.layers.get(layer, {}).get(key)
            if here is None or not _close(here, there):
                return f"{layer}.{key} is {there}, in the model {here}"
    return None


def _close(here: Any, there: Any) -> bool:
    here, there = torch.tensor(here), torch.tensor(there)
    return here.shape == there.shape and torch.allclose(here.double(), there.double(), rtol=1e-4, atol=1e-4)


def stock_name(run: Mapping[str, Any]) -> str:
    return run["model"]["class"].removeprefix("MultiMax")


@torch.no_grad()
def layer_modulators(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """What every normalizer of a patched model learned, by layer, as results.json has it under ``layers``.

    A model that FSDP2 has sharded must be given on every process.

    Returns:
        ``{"transformer.h.0.attn": {"ranges": [2N], "ts": [2N]}, ...}``, lists of lists where there are parameters per
        head, with ``scale`` and ``shift`` for the affine variant, and the learned options of other normalizers as
        ``learned_alpha`` and so on: rsoftmax has one that is called as a measure of attention, sparsity.
    """
    layers = {}
    for name, normalizer in named_normalizers(model):
        with on_its_device(normalizer):
            learned = {key: whole(value) for key, value in _learned(normalizer).items() if value is not None}
            layers[name] = {key: value.tolist() for key, value in learned.items()}
    return layers


def _learned(module: Normalizer) -> dict[str, torch.Tensor | None]:
    if isinstance(module, MultiMax):
        return {"ranges": module.ranges, "ts": module.ts, "scale": module.scale, "shift": module.shift}
    if hasattr(module, "values"):  # the options, not the unconstrained numbers behind them
        values = module.values().items()
        return {f"learned_{key}": value for key, value in values if isinstance(value, torch.Tensor)}
    return dict(module.named_parameters())
