"""The tuner: patches a stock model, puts copies of the scalars into a patched one, and takes both out again."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import PreTrainedModel

from hf_multimax.models.attachment import attach, build_normalizers, detach, output_modulator
from hf_multimax.models.changes import Changes
from hf_multimax.models.checkpointing import keep_gradients
from hf_multimax.models.classes import registered_model_class
from hf_multimax.models.divergence import watch
from hf_multimax.models.patching import patch_model, unpatch_model
from hf_multimax.normalizers.base import OUTPUT, Normalizer, StockSoftMax, is_patched, named_places
from hf_multimax.peft.config import MultiMaxAdapterConfig, patch_config
from hf_multimax.peft.fit import check_same, place_of
from hf_multimax.peft.layer import MultiMaxLayer
from hf_multimax.peft.names import PREFIX

__all__ = ["MultiMaxAdapterModel"]


class MultiMaxAdapterModel(BaseTuner):
    """What ``get_peft_model`` makes of a model and a :class:`MultiMaxAdapterConfig`.

    A stock model is patched, its own SoftMax staying what acts without an adapter; unloading gives it back.
    """

    prefix = PREFIX
    tuner_layer_cls = MultiMaxLayer
    target_module_mapping: dict[str, list[str]] = {}

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Raises NotImplementedError: a modulator is not linear in its scalars."""
        raise NotImplementedError(
            "MultiMax adapters cannot be added up: a modulator bends at thresholds, and the mean of two is none of "
            "either. Choose one with set_adapter, or give each row its own with adapter_names"
        )

    def delete_adapter(self, adapter_name: str) -> None:
        was_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        if was_active and self.peft_config:  # each layer has chosen one of its own
            self.set_adapter(self.active_adapters or [next(iter(self.peft_config))])

    def _prepare_adapter_config(self, peft_config: MultiMaxAdapterConfig, model_config: dict) -> MultiMaxAdapterConfig:
        return peft_config

    def _prepare_model(self, peft_config: MultiMaxAdapterConfig, model: PreTrainedModel) -> None:
        """See to it that every layer that the adapter asks for has a place for its scalars.

        Raises:
            ValueError: if the model cannot be patched so, or is patched otherwise. It is then as it was.
        """
        if not isinstance(model, PreTrainedModel):
            patch_model(model)  # raises
        layers = peft_config.layers(model)
        wanted = [*layers, *([OUTPUT] if peft_config.output else [])]
        if _is_stock_underneath(model) and not any(layer.holds_others() for layer in _layers(model).values()):
            unpatch_model(model)  # its adapters were deleted: the next one may be of another kind
        peft_config.settle(model)
        if is_patched(model):
            check_same(peft_config, model)
            self._make_room(peft_config, model, wanted)
        else:
            patch_model(model, patch_config(model, peft_config, layers, peft_config.output))
            with Changes() as changes:
                for name in wanted:
                    _put(model, name, StockSoftMax(), changes)
        self._places = [place_of(name) for name in wanted]

    def _make_room(self, peft_config: MultiMaxAdapterConfig, model: PreTrainedModel, wanted: list[str]) -> None:
        """Patch what the adapter asks for beyond the layers that are patched already."""
        present = dict(named_places(model))
        missing = [name for name in wanted if name not in present]
        if not missing:
            return
        if not _is_stock_underneath(model):
            raise ValueError(
                f"the adapter asks for scalars in {', '.join(missing[:6])}, where this patched {type(model).__name__} "
                "has SoftMax: leave them out with exclude= (or output=False), or patch the model there, too"
            )
        _rebuild(model, peft_config, {**present, **{name: StockSoftMax() for name in missing}})

    def _check_target_module_exists(self, peft_config: MultiMaxAdapterConfig, key: str) -> bool:
        return key in self._places

    def _create_and_replace(
        self,
        peft_config: MultiMaxAdapterConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if not isinstance(target, MultiMaxLayer | Normalizer):
            raise ValueError(
                f"{current_key} is trained and saved whole by an adapter of another kind (modules_to_save): give the "
                "model one or the other"
            )
        layer = target if isinstance(target, MultiMaxLayer) else MultiMaxLayer(target, adapter_name)
        underneath = layer.underneath()
        normalizer = self._new(peft_config, current_key) if underneath is None else copy.deepcopy(underneath)
        layer.multimax_adapter_layers[adapter_name] = normalizer.requires_grad_(adapter_name in layer.active_adapters)
        layer.train(parent.training)
        setattr(parent, target_name, layer)

    def _new(self, peft_config: MultiMaxAdapterConfig, key: str) -> Normalizer:
        """Scalars as they start on a stock model."""
        if key == OUTPUT:
            return output_modulator(self.model, peft_config)
        name = key.removesuffix(".multimax")
        return build_normalizers(peft_config, {name: self.model.get_submodule(name)})[name]

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Keep the scalars in float32, and where their layer is."""
        for name, layer in _layers(self.model).items():
            if adapter_name in layer.multimax_adapter_layers:
                head = self.model.get_output_embeddings() or self.model
                around = head if name == OUTPUT else self.model.get_submodule(name)
                device = next((p.device for n, p in around.named_parameters() if PREFIX not in n), None)
                for parameter in layer.multimax_adapter_layers[adapter_name].parameters():
                    parameter.data = parameter.data.float()
                    if device is not None and "meta" not in (device.type, parameter.device.type):
                        parameter.data = parameter.data.to(device)

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """What PEFT runs a forward pass in: gives each row the adapter that ``adapter_names`` names.

        Raises:
            ValueError: in training, or for a name that is no adapter's.
        """
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names is for inference: call eval() first, or train one adapter at a time")
        unknown = sorted({*names} - {"__base__", *self.peft_config})
        if unknown:
            raise ValueError(
                f"adapter_names has {', '.join(unknown)}, and the adapters are {', '.join(self.peft_config)}"
            )
        options = kwargs.get("generation_config")
        counts = [kwargs.get(key, getattr(options, key, None)) for key in ("num_beams", "num_return_sequences")]
        copies = max(count or 1 for count in counts)
        encoder = self.model.get_encoder() if getattr(self.model.config, "is_encoder_decoder", False) else None
        once = set() if encoder is None else {*encoder.modules()}  # an encoder runs before the rows are multiplied
        layers = _layers(self.model).values()
        for layer in layers:
            layer.names_by_row = [name for name in names for _ in range(1 if layer in once else copies)]
        try:
            yield
        finally:
            for layer in layers:
                layer.names_by_row = None

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> PreTrainedModel:
        layers = _layers(self.model)
        if merge:
            with Changes() as changes:
                for layer in layers.values():
                    changes.set(layer, "merged_adapters", [*layer.merged_adapters])
                    layer.merge(safe_merge, adapter_names)
        standing = {name: layer.standing() for name, layer in layers.items()}
        if _is_stock_underneath(self.model):
            merged = next((name for layer in layers.values() for name in layer.merged_adapters), None)
            kept = {name: normalizer for name, normalizer in standing.items() if normalizer is not None}
            _rebuild(self.model, self.peft_config[merged] if merged else None, kept)
        else:
            with Changes() as changes:
                for name, normalizer in standing.items():
                    _put(self.model, name, normalizer, changes)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)


def _layers(model: nn.Module) -> dict[str, MultiMaxLayer]:
    """The places of adapters' scalars, by the attention layer's name; ``multimax_output`` is the output's."""
    return {name: module for name, module in named_places(model) if isinstance(module, MultiMaxLayer)}


def _put(model: nn.Module, name: str, module: nn.Module, changes: Changes) -> None:
    parent, _, attribute = place_of(name).rpartition(".")
    changes.set(model.get_submodule(parent), attribute, module)


def _is_stock_underneath(model: nn.Module) -> bool:
    """Whether a model was patched only to hold adapters."""
    return any(layer.underneath() is None for layer in _layers(model).values())


def _rebuild(
    model: PreTrainedModel,
    config: MultiMaxAdapterConfig | None,
    modules: dict[str, nn.Module],
) -> None:
    """Patch a model that holds adapters anew, whole or not at all.

    Args:
        config: of an adapter. Its normalizer, order and so on are the model's.
        modules: what is to stand in the normalizers' places, by the layer's name; with none the model is a stock one.
    """
    layers = [name for name in modules if name != OUTPUT]
    options = patch_config(model, config, layers, OUTPUT in modules) if modules else None
    with Changes() as changes:
        detach(model, changes)
        if options is not None:
            attach(model, options, registered_model_class(type(model)), changes)
            for name, module in modules.items():
                _put(model, name, module, changes)
    if options is not None:
        watch(model)
        keep_gradients(model)
