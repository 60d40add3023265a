"""One layer's scalars, a copy for each adapter."""

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from hf_multimax.models.checkpoint import check_finite
from hf_multimax.normalizers.base import Normalizer, NormalizerSwitch, StockSoftMax, active_normalizer

__all__ = ["MultiMaxLayer"]


class MultiMaxLayer(NormalizerSwitch, BaseTunerLayer):
    """Stands in a normalizer's place, and has the one of the active adapter act.

    Attributes:
        base_layer: what acts without an adapter: a :class:`StockSoftMax`, or the normalizer of a patched model.
        multimax_adapter_layers: the normalizer of each adapter.
        names_by_row: the adapter of each row of the batch, None for the active one.
    """

    adapter_layer_names = ("multimax_adapter_layers",)

    def __init__(self, base_layer: Normalizer, adapter: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.multimax_adapter_layers = nn.ModuleDict()
        self.names_by_row: list[str] | None = None
        self.merged_adapters: list[str] = []
        self._active_adapter = [adapter]

    def acting(self) -> Normalizer | None:
        names = [] if self.disable_adapters else self.merged_adapters or self._own(self.active_adapters)
        return self._normalizer_of(names[0] if names else None)

    def by_row(self) -> list[Normalizer | None] | None:
        if self.names_by_row is None:
            return None
        return [self._normalizer_of(name) for name in self.names_by_row]

    def underneath(self) -> Normalizer | None:
        return self._normalizer_of(None)

    def holds_others(self) -> bool:
        return len(self.multimax_adapter_layers) > 0

    def forward(self, x: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
        """Probabilities along ``dim``, as a normalizer gives them."""
        return (self.acting() or self.base_layer)(x, dim, mask)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As every adapter layer's; ValueError for two adapters that both have scalars here."""
        own = self._own([adapter_names] if isinstance(adapter_names, str) else adapter_names)
        if len(own) > 1:
            raise ValueError(
                f"the adapters {', '.join(own)} all have scalars for one layer, of which one set can act: "
                "activate one of them, with others that have none"
            )
        super().set_adapter(adapter_names, inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Let an adapter's scalars be the layer's own until :meth:`unmerge`; there is nothing to compute.

        Raises:
            ValueError: for a second adapter, or with ``safe_merge`` if a scalar is NaN or infinite.
        """
        names = self._own(check_adapters_to_merge(self, adapter_names))
        if len({*self.merged_adapters, *names}) > 1:
            raise ValueError(
                f"the adapters {', '.join([*self.merged_adapters, *names])} all have scalars for one layer, of which "
                "one set can be merged: unmerge, or name one in adapter_names"
            )
        if safe_merge:
            for name in names:
                check_finite(self.multimax_adapter_layers[name], f"of the adapter {name!r} are not merged")
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        self.merged_adapters.clear()

    def standing(self) -> Normalizer | None:
        """What stays when adapters are unloaded: the merged one, or what was there without them."""
        return self._normalizer_of(self.merged_adapters[0] if self.merged_adapters else None)

    def _own(self, names: list[str]) -> list[str]:
        return [name for name in names if name in self.multimax_adapter_layers]

    def _normalizer_of(self, name: str | None) -> Normalizer | None:
        """The normalizer of an adapter, or of the layer; None for the stock model's SoftMax."""
        own = self.multimax_adapter_layers
        normalizer = active_normalizer(own[name] if name is not None and name in own else self.base_layer)
        return None if isinstance(normalizer, StockSoftMax) else normalizer

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Any = None) -> None:
        """Nothing: scalars have no type to follow, and the model knows the device of the layer around this one."""
