"""What a patched model owes to the stock one: each check passes, raises AssertionError, or does not apply."""

import contextlib
import copy
import filecmp
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from transformers import AutoModel, PreTrainedModel

from benchmarks.architectures.compare import describe, difference, relative_rms
from benchmarks.architectures.inputs import make_inputs
from benchmarks.architectures.models import EAGER_IS_BROKEN, build, classes, without_dropout
from benchmarks.architectures.trial import NotApplicable, Trial
from hf_multimax import backend, is_patched, multimax_parameters, patch_model, unpatch_model

__all__ = ["CHECKS", "TYPES", "check_all"]

Tensors = dict[str, torch.Tensor]

#: What training steps are taken in: float32, and autocast's types.
TYPES = (None, torch.bfloat16, torch.float16)

#: Largest difference between two computations of the same in float32, relative to the largest entry: rounding grows
#: on its way through a network, routers and normalisations.
ROUNDING = 1e-3
#: What the last token may change in earlier outputs.
NOTHING = 1e-5
_SET_BY_SAVING = ("architectures", "dtype", "transformers_version", "_name_or_path")
_SINKS = "equal up to rounding: stock's eager attention scales by the sinks after softmax"
_SDPA = "equal up to rounding: stock calls SDPA there, also under eager attention"
_JOINED = "equal up to rounding: stock sums the sinks with the scores"
#: Model types whose own eager attention computes the same in another order, so that bits differ.
ANOTHER_ORDER = {
    **{"granite_swa": _SINKS, "granitemoe_swa": _SINKS, "inkling2": _JOINED, "inkling2_text": _JOINED},
    **dict.fromkeys(("aimv2", "aimv2_vision_model", "bridgetower"), _SDPA),
    **dict.fromkeys(EAGER_IS_BROKEN, "equal up to rounding: stock's eager attention gives NaN, SDPA is compared with"),
}


def check_all(trial: Trial) -> None:
    """Put the result of every check into the row: "passed", "- why it does not apply", or what was seen."""
    trial.row["status"] = "passed"
    for name, check in CHECKS.items():
        try:
            check(trial)
            result = "passed"
        except NotApplicable as error:
            result = f"- {error}"
        except AssertionError as error:
            result = f"{error}"
        except Exception as error:
            result = describe(error)
        trial.row["checks"][name] = result
        if result != "passed" and not result.startswith("- "):
            trial.row["status"] = "failed"


# -- at identity


def discovery(trial: Trial) -> None:
    """Every module that computed attention in the stock model, and whose result counts, has a normalizer."""
    layers = trial.layers()
    left = {
        name: cls.__name__
        for name, cls in trial.stock["sites"].items()
        if name not in layers and not any(name.startswith(f"{layer}.") for layer in layers)  # a part of a layer
    }
    left = {name: cls for name, cls in left.items() if name in trial.stock["used"] or _acts(trial, name)}
    assert not left, f"SoftMax stays in {', '.join(f'{name} ({cls})' for name, cls in left.items())[:300]}"


def _acts(trial: Trial, name: str) -> bool:
    """Whether the outputs depend on the weights of a module: they may without a gradient, through a codebook."""
    return trial.change(list(trial.model.get_submodule(name).parameters())) > trial.noise


def identity(trial: Trial) -> None:
    """The outputs are the stock model's bit for bit in the eager backend."""
    with backend("eager"):
        found = difference(trial.run(), trial.stock["outputs"])
    if trial.model_type in ANOTHER_ORDER and found <= ROUNDING:
        raise NotApplicable(ANOTHER_ORDER[trial.model_type])
    assert found <= trial.noise, f"eager outputs differ by {found:.2g} from stock's"


def identity_by_default(trial: Trial) -> None:
    """The outputs are the stock model's up to rounding in the default backend."""
    trial.stock["at identity"] = trial.run()
    found = difference(trial.stock["at identity"], trial.stock["outputs"])
    assert found <= ROUNDING + trial.noise, f"outputs differ by {found:.2g} from stock's"


def generation_as_stock(trial: Trial) -> None:
    """Generation gives the stock model's tokens."""
    expected = _of_stock(trial, "generated")[0]
    assert torch.equal(trial.generate(use_cache=True), expected), "generate gives other tokens than stock"


def training(trial: Trial, dtype: torch.dtype = torch.bfloat16) -> None:
    """A training step under autocast errs at most three times as much as the stock model's, in one of four draws.

    Rounding may send a token to another expert, in either model.
    """
    for seed in range(4):
        if seed:
            model = build(trial.model_type, seed)
            drawn = Trial(trial.model_type, model, make_inputs(model), trial.labels)
            stock = {None: drawn.training_step(None), dtype: drawn.training_step(dtype)}
            patch_model(model)
        else:
            drawn, stock = trial, _of_stock(trial, "training")
        for result in (stock[None], stock[dtype]):
            if isinstance(result, Exception):
                raise NotApplicable(f"stock: {describe(result)}")
        if not all(tensor.isfinite().all() for part in stock[dtype] for tensor in part.values()):
            raise NotApplicable("stock's overflows")
        try:
            return _trains_as(drawn, dtype, stock[None], stock[dtype])
        except AssertionError:
            if seed == 3:
                raise


def training_in_float16(trial: Trial) -> None:
    """The same in float16, where models generate."""
    if not trial.model.can_generate():
        raise NotApplicable("it does not generate")
    training(trial, torch.float16)


Step = tuple[Tensors, Tensors]


def _trains_as(trial: Trial, dtype: torch.dtype, exact: Step, stock: Step) -> None:
    actual = trial.training_step(dtype)
    for index, what in enumerate(("loss", "gradients")):
        if what == "loss" and not trial.labels:
            continue  # a random projection, which may cancel
        keys = exact[index].keys()
        assert actual[index].keys() >= keys, f"no gradient for {sorted(keys - actual[index].keys())[:3]}"
        error, allowed = (relative_rms(found[index], exact[index], keys) for found in (actual, stock))
        rounding = torch.finfo(dtype).eps / 2
        assert error <= 3 * allowed + rounding, f"{dtype} {what} err by {error:.2g}, stock's by {allowed:.2g}"


# -- with random scalars


def effect(trial: Trial) -> None:
    """Random scalars change the outputs. From here on the model has them."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in multimax_parameters(trial.model).items():
            value = torch.randn(parameter.shape, generator=generator)
            if name.endswith("ranges"):  # b above zero and d below it, so that every term acts on scores near zero
                value = value.abs() * torch.tensor([1.0, -1.0]).repeat(value.shape[-1] // 2)
            parameter.copy_(value)
    trial.stock["changed"] = trial.run()
    assert not any(tensor.isnan().any() for tensor in trial.stock["changed"]), "the outputs hold NaN"
    if not trial.layers() & trial.stock["used"]:
        raise NotApplicable("no layer has a gradient from the outputs")
    found = difference(trial.stock["changed"], trial.stock["at identity"])
    assert found > trial.noise, "the outputs stay what they were"


def backends(trial: Trial) -> None:
    """The default backend and eager agree."""
    with backend("eager"):
        found = difference(trial.run(), trial.stock["changed"])
    assert found <= ROUNDING + trial.noise, f"the default backend and eager differ by {found:.2g}"


def no_future(trial: Trial) -> None:
    """Where the stock model does not see later tokens, the patched one does not."""
    if _of_stock(trial, "leak") > NOTHING:
        raise NotApplicable("stock is not causal")
    found = trial.leak()
    assert found <= NOTHING, f"the last token changes earlier outputs by {found:.2g}"


def gradients(trial: Trial) -> None:
    """Every scalar that matters to the outputs has a finite gradient that is not zero."""
    model = trial.model
    model.zero_grad()
    trial.loss(labels=False).backward()
    missing = []
    for name, parameter in multimax_parameters(model).items():
        gradient = parameter.grad
        if gradient is None or not gradient.isfinite().all() or not gradient.any():
            missing.append(name)
    model.zero_grad()
    missing = [name for name in missing if name.rpartition(".multimax.")[0] in trial.stock["used"]]
    # a query that sees a single key, or that nobody looks at, gives none
    missing = [name for name in missing if trial.change([model.get_parameter(name)]) > trial.noise]
    assert not missing, f"no gradient (or not a finite one) for {', '.join(missing)[:300]}"


def save_and_load(trial: Trial) -> None:
    """Saved, loaded by its Auto class and saved again: the same files and the same outputs."""
    auto = classes(trial.model_type).auto
    with _as_stock_does(trial, lambda stock: _comes_back(stock, auto)):
        loaded, differ = _save_load_save(trial.model, auto)
    assert is_patched(loaded), "the loaded model is not patched"
    found = difference(_with(trial, loaded).run(), trial.stock["changed"])
    if differ or found > trial.noise:  # some stock models do not keep this either
        stock = unpatch_model(copy.deepcopy(trial.model))
        again, expected = _save_load_save(stock, auto)
        differ = differ - expected
        allowed = 10 * difference(_with(trial, again).run(), _with(trial, stock).run())
        assert not differ, f"saved again, {', '.join(sorted(differ))} differ"
        assert found <= allowed + trial.noise, f"the loaded model's outputs differ by {found:.2g}"


def base_and_head(trial: Trial) -> None:
    """A head's checkpoint loads as the base, and the base's as the head, each with the scalars."""
    found = classes(trial.model_type)
    if found.base is None:
        raise NotApplicable("one class only")
    with _as_stock_does(trial, lambda stock: _through_the_base(stock, found.auto)):
        base = _reload(trial.model, AutoModel)
        _compare_scalars(base, trial.model, "the base loaded from the head's checkpoint")
        head = _reload(base, found.auto)
        _compare_scalars(head, base, "the head loaded from the base's checkpoint")


def generation(trial: Trial) -> None:
    """Generation with a cache and without one gives the same tokens."""
    if not torch.equal(*_of_stock(trial, "generated")):
        raise NotApplicable("stock gives other tokens without a cache")
    cached, plain = (trial.generate(use_cache=cache) for cache in (True, False))
    assert torch.equal(cached, plain), "generate gives other tokens without a cache"


def static_generation(trial: Trial) -> None:
    """Generation with a static cache gives the same logits."""
    if difference(*([logits] for logits in _of_stock(trial, "static"))) > ROUNDING:
        raise NotApplicable("stock gives other logits with a static cache")
    dynamic, static = trial.logits_of_generation(), trial.logits_of_generation(cache_implementation="static")
    found = difference([static], [dynamic])
    assert found <= ROUNDING, f"logits differ by {found:.2g} with a static cache"


def last_logits(trial: Trial) -> None:
    """The last logits alone are those among all of them."""
    if _of_stock(trial, "last logits") > ROUNDING:
        raise NotApplicable("stock's are not")
    found = trial.last_logits()
    assert found <= ROUNDING, f"with logits_to_keep=2 they differ by {found:.2g}"


def unpatching(trial: Trial) -> None:
    """unpatch_model gives back the stock model: class, config, weights, outputs."""
    model, stock = trial.model, trial.stock
    unpatch_model(model)
    assert type(model) is stock["class"], f"the class is {type(model).__name__}"
    configs = (model.config.to_dict(), stock["config"])
    config, before = ({k: v for k, v in values.items() if k not in _SET_BY_SAVING} for values in configs)
    assert config == before, f"the config differs in {sorted(k for k in config if config[k] != before.get(k, '?'))[:5]}"
    state = model.state_dict()
    assert state.keys() == stock["state"].keys(), f"keys differ: {sorted(state.keys() ^ stock['state'].keys())[:3]}"
    fixed = [name for name in state if name not in stock["volatile"]]
    differ = [name for name in fixed if not torch.equal(state[name], stock["state"][name])]
    assert not differ, f"weights differ: {differ[:3]}"
    found = difference(trial.run(), stock["outputs"])
    assert found <= trial.noise, f"outputs differ by {found:.2g} from stock's"


CHECKS: dict[str, Callable[[Trial], None]] = {
    "discovery": discovery,
    "identity": identity,
    "identity by default": identity_by_default,
    "generate as stock": generation_as_stock,
    "bfloat16 training": training,
    "float16 training": training_in_float16,
    "effect": effect,
    "backends": backends,
    "no future": no_future,
    "gradients": gradients,
    "save and load": save_and_load,
    "base and head": base_and_head,
    "generate": generation,
    "static cache": static_generation,
    "last logits": last_logits,
    "unpatch": unpatching,
}


# -- what the checks share


def _of_stock(trial: Trial, what: str) -> object:
    """What the stock model gave; raises NotApplicable where it raised."""
    found = trial.stock[what]
    if isinstance(found, NotApplicable):
        raise found
    if isinstance(found, Exception):
        raise NotApplicable(f"stock: {describe(found)}")
    return found


@contextlib.contextmanager
def _as_stock_does(trial: Trial, same: Callable[[PreTrainedModel], object]) -> Iterator[None]:
    """Turn an exception into NotApplicable where a stock model raises at the ``same``, too."""
    try:
        yield
    except AssertionError:
        raise
    except Exception:
        try:
            same(unpatch_model(copy.deepcopy(trial.model)))
        except Exception as error:
            raise NotApplicable(f"stock: {describe(error)}") from error
        raise


def _with(trial: Trial, model: PreTrainedModel) -> Trial:
    """The same trial of another model."""
    without_dropout(model.eval())
    return Trial(trial.model_type, model, trial.batch, trial.labels)


def _reload(model: PreTrainedModel, auto: type) -> PreTrainedModel:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return auto.from_pretrained(folder)


def _through_the_base(stock: PreTrainedModel, auto: type) -> None:
    """Load a stock model's checkpoint as the base and back; raises ValueError if a layer of either has new weights."""
    base = _reload(stock, AutoModel)
    for loaded, saved in ((base, stock), (_reload(base, auto), base)):
        layers = _layers(loaded)
        found, expected = dict(loaded.named_parameters()), dict(saved.named_parameters())
        weights = {name for name in found if any(name.startswith(f"{layer}.") for layer in layers)}
        kept = {a for a, b in _pairs(weights, expected) if torch.equal(found[a], expected[b])}
        if weights - kept:
            raise ValueError(f"{type(loaded).__name__} gets a new {min(weights - kept)}")


def _layers(stock: PreTrainedModel) -> set[str]:
    """The attention layers that a stock model would have if it were patched; none where that is refused."""
    try:
        return {name.rpartition(".multimax.")[0] for name in multimax_parameters(patch_model(copy.deepcopy(stock)))}
    except ValueError:
        return set()


def _save_load_save(model: PreTrainedModel, auto: type) -> tuple[PreTrainedModel, set[str]]:
    """The loaded model, and the files that it writes otherwise than ``model``."""
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        model.save_pretrained(first)
        loaded = auto.from_pretrained(first)
        loaded.save_pretrained(second)
        names = {path.name for folder in (first, second) for path in Path(folder).iterdir()}
        _, differ, missing = filecmp.cmpfiles(first, second, names, shallow=False)
        return loaded, {*differ, *missing}


def _comes_back(stock: PreTrainedModel, auto: type) -> None:
    """Save and load; raises ValueError if a weight is lost on the way."""
    loaded, _ = _save_load_save(stock, auto)
    before, after = dict(stock.named_parameters()), dict(loaded.named_parameters())
    lost = sorted(name for name in before if name not in after or not torch.equal(before[name], after[name]))
    if lost:
        raise ValueError(f"the loaded model lost {lost[0]}")


def _compare_scalars(loaded: PreTrainedModel, saved: PreTrainedModel, what: str) -> None:
    """The scalars that both models have are the same; names may differ by a prefix."""
    found, expected = multimax_parameters(loaded), multimax_parameters(saved)
    pairs = _pairs(found, expected)
    assert pairs, f"{what} shares no scalar with it: {sorted(found)[:2]} and {sorted(expected)[:2]}"
    differ = sorted(a for a, b in pairs if not torch.equal(found[a], expected[b]))
    assert not differ, f"{what} lost {', '.join(differ[:3])}"


def _pairs(found: Iterable[str], expected: Iterable[str]) -> list[tuple[str, str]]:
    """Names of the same parameter in two models, which may differ by a prefix."""
    pairs = []
    for a in found:
        alike = [b for b in expected if a == b or a.endswith(f".{b}") or b.endswith(f".{a}")]
        pairs += [(a, min(alike, key=lambda b: abs(len(a) - len(b))))] if alike else []
    return pairs
