"""Everything about one model type: the stock model first, then the patched one, then the checks."""

import functools
import inspect
import re
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.architectures.checks import TYPES, check_all
from benchmarks.architectures.compare import describe, difference, plain
from benchmarks.architectures.inputs import make_inputs
from benchmarks.architectures.models import build, classes
from benchmarks.architectures.sites import attention_sites
from benchmarks.architectures.trial import NotApplicable, Trial
from hf_multimax import is_patched, multimax_parameters, patch_model

__all__ = ["try_type"]

#: Modules with a softmax over something else than keys: streams of the residual, entries of a table.
NOT_ATTENTION = {"DeepseekV4HyperConnection", "Glm5NextTextHyperConnection", "Ovis2VisionModel"}


def try_type(model_type: str) -> dict[str, Any]:
    """What there is to say about one model type; never raises.

    Returns:
        A row of the results: "type"; "status", one of "not run" (the stock model does not), "refused", "failed" and
        "passed"; "checks", by name "passed", "- why it does not apply", or what was seen; "class" and "base"; "inputs",
        the names of the tensors; "attention", the modules that compute it, "outside" those of them that do not take it
        from the AttentionInterface; "layers", how many were patched, "not reached" those of them that do not run;
        "sentence" of a refusal and whether it "names the place"; "reason" where something else raised; "seconds".
    """
    start = time.perf_counter()
    row: dict[str, Any] = {"type": model_type, "status": "not run", "checks": {}}
    stage = "the classes"
    try:
        found = classes(model_type)
        row.update({"class": found.head.__name__, "base": found.base.__name__ if found.base else None})
        stage = "the model"
        model = build(model_type)
        stage = "the inputs"
        batch = make_inputs(model)
        row["inputs"] = sorted(name for name, value in batch.items() if isinstance(value, Tensor))
        stage = "stock"
        trial = Trial(model_type, model, batch, row=row)
        _run_stock(trial)
        row["status"] = "failed"  # unless it is found to be otherwise
        stage = "patch_model"
        if _patch(trial):
            check_all(trial)
    except Exception as error:
        row["reason"] = f"{stage}: {describe(error)}"
        if row["status"] == "failed":
            row["checks"]["patch_model"] = describe(error)
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


def _run_stock(trial: Trial) -> None:
    """Run the stock model, and keep what the patched one is compared with."""
    model, stock = trial.model, trial.stock
    stock["outputs"] = trial.run()
    if not stock["outputs"]:
        raise NotApplicable("the outputs hold no floating tensor")
    if any(tensor.isnan().any() for tensor in stock["outputs"]):
        raise NotApplicable("the outputs hold NaN")
    stock["noise"] = difference(trial.run(), stock["outputs"])
    sites = attention_sites(model, lambda: model(**trial.batch))
    sites = {name: cls for name, cls in sites.items() if cls.__name__ not in NOT_ATTENTION}
    stock["sites"], stock["used"] = sites, _used(trial, list(sites))
    trial.row["attention"] = {_pattern(name): cls.__name__ for name, cls in sites.items()}
    trial.row["outside"] = sorted({_pattern(name) for name in _outside(sites)})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trial.find_labels()
    stock["leak"] = _or_error(trial.leak)
    stock["generated"] = _or_error(lambda: tuple(trial.generate(use_cache=cache) for cache in (True, False)))
    stock["static"] = _or_error(lambda: _logits_pair(trial))
    stock["last logits"] = _or_error(trial.last_logits)
    types = TYPES if model.can_generate() else TYPES[:-1]  # float16 is slow on a CPU
    stock["training"] = {dtype: _or_error(functools.partial(trial.training_step, dtype)) for dtype in types}
    stock["noise"] = max(stock["noise"], difference(trial.run(), stock["outputs"]))
    stock["class"], stock["config"] = type(model), model.config.to_dict()
    stock["state"] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    # quantisation ranges, codebooks: what changes as the model runs
    stock["volatile"] = {name for name, tensor in before.items() if not torch.equal(tensor, stock["state"][name])}


def _logits_pair(trial: Trial) -> tuple[Tensor, Tensor]:
    """The logits of generation with a growing cache, and with a static one."""
    return trial.logits_of_generation(), trial.logits_of_generation(cache_implementation="static")


def _or_error(function: Callable[[], Any]) -> Any:
    """The result, or the exception where the stock model cannot do it."""
    try:
        return function()
    except Exception as error:
        return error


def _used(trial: Trial, sites: list[str]) -> set[str]:
    """The modules with a weight that has a gradient from the outputs, or with no weight at all."""
    try:
        trial.loss(labels=False).backward()
    except Exception:  # no gradient through this model: nothing is known
        return set(sites)
    weights = {name: list(trial.model.get_submodule(name).parameters()) for name in sites}
    used = {n for n, ps in weights.items() if not ps or any(p.grad is not None and p.grad.any() for p in ps)}
    trial.model.zero_grad()
    return used


def _patch(trial: Trial) -> bool:
    """Patch the model; where that is refused, note the sentence and whether the model is what it was."""
    row, model, stock = trial.row, trial.model, trial.stock
    try:
        patch_model(model)
    except ValueError as error:
        row["sentence"] = plain(str(error))
        modules = [name.removeprefix(f"{model.base_model_prefix}.") for name, _ in model.named_modules()]
        row["names the place"] = any(name in str(error) for name in modules if "." in name)
        same = type(model) is stock["class"] and not is_patched(model) and not multimax_parameters(model)
        same = same and difference(trial.run(), stock["outputs"]) <= trial.noise
        row["checks"]["a refusal changes nothing"] = "passed" if same else "the model changed"
        row["status"] = "refused" if same else "failed"
        return False
    row["layers"] = len(trial.layers())
    row["not reached"] = sorted({_pattern(name) for name in trial.layers() - stock["sites"].keys()})
    return True


def _outside(sites: dict[str, type]) -> list[str]:
    """Those of the modules whose forward does not take its attention from Transformers' AttentionInterface."""
    return [name for name, cls in sites.items() if not _uses_interface(cls)]


def _uses_interface(cls: type) -> bool:
    code = getattr(inspect.unwrap(cls.forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _pattern(name: str) -> str:
    """The name of a module with a star for the number of a layer."""
    return re.sub(r"\b\d+\b", "*", name)
