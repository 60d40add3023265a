"""Modulating a model's output logits, and the loss of the modulated logits."""

import contextlib
import inspect
import typing
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from hf_multimax.attention.context import differentiated_by_functions
from hf_multimax.functional import compute_dtype
from hf_multimax.models.discovery import code_names
from hf_multimax.models.fused_output import FusedLoss, captured_input, fused_loss
from hf_multimax.models.replacement import check_class_forward, check_replacement
from hf_multimax.normalizers.base import Normalizer, acting_by_row, active_normalizer, normalizers_by_row, on_its_device

__all__ = ["check_output_supported", "modulated_forward"]

#: The loss of stock code is met to rounding; a larger difference means that it contains something else.
_LOSS_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}


def check_output_supported(model: PreTrainedModel, stock_class: type[PreTrainedModel]) -> None:
    """Raise ValueError if ``stock_class`` has no single tensor of logits under a cross-entropy loss."""
    name, fields = stock_class.__name__, _output_fields(stock_class)
    if fields and "logits" not in fields:
        raise ValueError(f"output=True needs a model that returns logits; {name} returns {', '.join(fields)}")
    others = [field for field in fields if field.endswith("_logits")]
    if others:
        raise ValueError(f"output=True does not support {name}, which returns {', '.join(others)} besides logits")
    check_class_forward(stock_class)
    if "forward" in vars(model):
        check_replacement(model.forward, type(model).forward)
    names = code_names(stock_class)
    if "labels" not in names:
        raise ValueError(f"output=True needs a model with a loss; the forward of {name} takes no labels")
    if any(variable in names for variable in ("shift_logits", "lm_logits_shifted", "shifted_prediction_scores")):
        raise ValueError(f"output=True does not support the loss that {name} computes in its forward")
    problem = getattr(model.config, "problem_type", None)
    if _is_classifier(stock_class):
        if problem in ("regression", "multi_label_classification"):
            raise ValueError(f"output=True needs a cross-entropy loss; config.problem_type of {name} is {problem!r}")
        if problem is None and getattr(model.config, "num_labels", 2) == 1:
            raise ValueError(f"output=True needs a cross-entropy loss; {name} with num_labels=1 is a regression")


def modulated_forward(
    model: PreTrainedModel, stock_class: type[PreTrainedModel], *args: Any, **kwargs: Any
) -> ModelOutput | tuple[Any, ...]:
    """``stock_class.forward`` with its logits modulated, after every additive bias, and the loss of those logits.

    In training, with labels, the loss comes without the logits where the model's head allows it: ``logits`` is None.
    """
    if all(module is None for module in _acting(model.multimax_output)):
        return stock_class.forward(model, *args, **kwargs)
    arguments, rest = _named_arguments(model, stock_class, args, kwargs)
    labels = arguments.get("labels")
    return_dict = arguments.pop("return_dict", None)
    if return_dict is None:
        return_dict = getattr(model.config, "return_dict", True)
    fused = None if labels is None else _fused_loss(model, stock_class)
    unsure = not model._output_loss_checked or (fused is not None and model._output_is_fusible is None)
    check = labels is not None and unsure and not torch.compiler.is_compiling()
    if labels is not None and not check:
        arguments = _without_labels(model, arguments)

    with captured_input(fused.head, shorten=not check) if fused else contextlib.nullcontext() as hidden:
        outputs = stock_class.forward(model, **arguments, return_dict=True)
    if check:
        _check_loss(model, stock_class, outputs, labels, rest)
        model._output_loss_checked = True
        if fused is not None:
            model._output_is_fusible = fused.makes(outputs.logits, hidden)
    if labels is not None and getattr(outputs, "aux_loss", None) is not None:
        raise ValueError("output=True does not support auxiliary losses: set config.output_router_logits to False")

    if fused is not None and model._output_is_fusible:
        with on_its_device(active_normalizer(model.multimax_output)):
            logits, loss = None, fused(hidden[0], labels, rest)
    else:
        # The loss sees the modulated logits before they are rounded to the model's type.
        modulated = _modulated(model.multimax_output, outputs.logits.to(compute_dtype(outputs.logits.dtype)))
        loss = None if labels is None else _loss(model, stock_class, modulated, labels, rest)
        logits = modulated.to(outputs.logits.dtype)
    outputs = type(outputs)(**{**outputs, "logits": logits, "loss": loss})
    return outputs if return_dict else outputs.to_tuple()


def _acting(module: nn.Module) -> list[Normalizer | None]:
    """The normalizers that act on the logits of a batch."""
    by_row = acting_by_row(module)
    return [active_normalizer(module)] if by_row is None else by_row


def _modulated(module: nn.Module, logits: Tensor) -> Tensor:
    """Logits ``[batch, ..., classes]`` modulated, each row by the normalizer of its adapter."""
    groups = normalizers_by_row(module, logits.shape[0])
    if groups[0][1] is None:
        with on_its_device(groups[0][0]):
            return groups[0][0].modulate(logits)
    out = logits.clone()
    for normalizer, rows in groups:
        if normalizer is not None:
            rows = rows.to(logits.device)
            with on_its_device(normalizer):
                out[rows] = normalizer.modulate(logits[rows])
    return out


def _named_arguments(
    model: PreTrainedModel, stock_class: type[PreTrainedModel], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A call of ``forward`` by name, and those of its arguments that the signature does not list."""
    signature = inspect.signature(stock_class.forward)
    arguments, rest = dict(signature.bind(model, *args, **kwargs).arguments), {}
    arguments.pop(next(iter(signature.parameters)))
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            rest = arguments.pop(parameter.name, {})
    return {**arguments, **rest}, rest


def _fused_loss(model: PreTrainedModel, stock_class: type[PreTrainedModel]) -> FusedLoss | None:
    """The fused loss, in training and where nothing speaks against it."""
    training = model.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if not (training and model.fused_output_loss) or model._output_is_fusible is False or differentiated_by_functions():
        return None
    return fused_loss(model, stock_class)


def _without_labels(model: PreTrainedModel, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments for a forward that computes no loss but is the same otherwise."""
    labels = arguments.pop("labels")
    given = any(arguments.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds"))
    if hasattr(model, "prepare_decoder_input_ids_from_labels") and not given:
        arguments["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
        arguments.setdefault("use_cache", False)
    return arguments


def _loss(
    model: PreTrainedModel, stock_class: type[PreTrainedModel], logits: Tensor, labels: Tensor, rest: dict[str, Any]
) -> Tensor:
    """The loss that ``stock_class.forward`` computes of its logits, with ``num_items_in_batch`` honoured."""
    if labels.is_floating_point():
        raise ValueError(
            f"output=True needs a cross-entropy loss, but {stock_class.__name__} got labels of type {labels.dtype}"
        )
    labels = labels.to(logits.device)
    if "loss_function" in code_names(stock_class):
        parameters = inspect.signature(model.loss_function).parameters
        known = {"logits": logits, "pooled_logits": logits, "labels": labels, "config": model.config}
        known["vocab_size"] = logits.shape[-1]
        return model.loss_function(**{name: known[name] for name in parameters if name in known}, **rest)
    items = rest.get("num_items_in_batch")
    flat = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    if items is None:
        return cross_entropy(*flat)
    return cross_entropy(*flat, reduction="sum") / (items.to(logits.device) if torch.is_tensor(items) else items)


def _check_loss(
    model: PreTrainedModel,
    stock_class: type[PreTrainedModel],
    outputs: ModelOutput,
    labels: Tensor,
    rest: dict[str, Any],
) -> None:
    """Once per model: raise ValueError if the stock loss is not what ``_loss`` makes of the stock logits."""
    if "loss_function" not in code_names(stock_class):
        rest = {key: value for key, value in rest.items() if key != "num_items_in_batch"}
    with torch.no_grad():
        expected = _loss(model, stock_class, outputs.logits, labels, rest)
    tolerance = _LOSS_TOLERANCE.get(outputs.logits.dtype, 2e-2)
    if not torch.isclose(outputs.loss.float(), expected.float(), rtol=tolerance, atol=tolerance, equal_nan=True):
        raise ValueError(
            f"output=True does not support {stock_class.__name__}: its loss ({outputs.loss.item():.6g}) is not the "
            f"cross-entropy of its logits ({expected.item():.6g})"
        )


def _is_classifier(stock_class: type[nn.Module]) -> bool:
    return "problem_type" in code_names(stock_class) or any(
        word in stock_class.__name__ for word in ("SequenceClassification", "ImageClassification")
    )


def _output_fields(stock_class: type[nn.Module]) -> tuple[str, ...]:
    """The fields of the ModelOutput that ``forward`` is annotated to return; empty where it does not say."""
    try:
        annotation = typing.get_type_hints(inspect.unwrap(stock_class.forward)).get("return")
    except (NameError, TypeError):
        return ()
    for candidate in typing.get_args(annotation) or (annotation,):
        if isinstance(candidate, type) and issubclass(candidate, ModelOutput):
            return tuple(candidate.__dataclass_fields__)
    return ()
