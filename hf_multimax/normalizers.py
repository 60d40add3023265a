"""The registry of normalizers: everything that ``patch_model(model, normalizer=...)`` and ``normalize(...)`` know."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_multimax.config import MultiMaxConfig
from hf_multimax.functional import masked_softmax, multimax
from hf_multimax.modulator import MultiMax, Normalizer

__all__ = ["NormalizerSpec", "SoftMax", "build_normalizer", "get_normalizer", "normalize", "register_normalizer"]


@dataclass(frozen=True)
class NormalizerSpec:
    """One registered normalizer.

    Attributes:
        name: what users write.
        function: ``(x, dim=-1, mask=None, training=False, **options) -> probabilities``.
        module: ``(config, num_heads) -> Normalizer``, the module that a patched attention layer holds; ``num_heads``
            is None unless ``config.per_head``. It raises ValueError for options that it does not know.
        citation: where the function is defined.
        modulates_output: whether its ``modulate`` may stand before a cross-entropy loss on the output logits.
    """

    name: str
    function: Callable[..., Tensor]
    module: Callable[[MultiMaxConfig, int | None], Normalizer]
    citation: str
    modulates_output: bool = False


_REGISTRY: dict[str, NormalizerSpec] = {}


def register_normalizer(
    name: str,
    function: Callable[..., Tensor],
    module: Callable[[MultiMaxConfig, int | None], Normalizer],
    citation: str,
    modulates_output: bool = False,
) -> NormalizerSpec:
    """Make a normalizer available to ``patch_model`` and ``normalize``; see :class:`NormalizerSpec` for the arguments.

    Raises:
        ValueError: if ``name`` is taken.
    """
    if name in _REGISTRY:
        raise ValueError(f"a normalizer called {name!r} is registered already")
    _REGISTRY[name] = NormalizerSpec(name, function, module, citation, modulates_output)
    return _REGISTRY[name]


def get_normalizer(name: str) -> NormalizerSpec:
    """The registered normalizer of that name; ValueError, with the known names, if there is none."""
    if name not in _REGISTRY:
        raise ValueError(
            f"unknown normalizer {name!r}; registered are {', '.join(sorted(_REGISTRY))}. "
            "Make your own known with hf_multimax.register_normalizer before patching or loading."
        )
    return _REGISTRY[name]


def normalize(
    name: str, x: Tensor, dim: int = -1, mask: Tensor | None = None, training: bool = False, **options: Any
) -> Tensor:
    """Turn scores into probabilities along ``dim`` by any registered normalizer.

    Args:
        name: a registered name.
        x: scores of floating type; float64 stays, other types are computed in float32.
        mask: boolean, broadcastable to ``x``, True = keep. Other entries get exactly 0; a row without any is all 0.
        training: for the normalizers that differ between training and inference.
        options: what the normalizer takes.

    Returns:
        Probabilities, shaped and typed like ``x``.

    Raises:
        ValueError: for an unknown name. TypeError: for an option that the normalizer does not have.
    """
    return get_normalizer(name).function(x, dim=dim, mask=mask, training=training, **options)


def build_normalizer(config: MultiMaxConfig, num_heads: int | None) -> Normalizer:
    """The module that ``config`` asks for; ValueError if its normalizer or an option of it is unknown."""
    return get_normalizer(config.normalizer).module(config, num_heads)


class SoftMax(Normalizer):
    """SoftMax with a fixed temperature."""

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0, got {temperature}")
        self.temperature = temperature

    def modulate(self, x: Tensor) -> Tensor:
        return x if self.temperature == 1.0 else x / self.temperature

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"


def _softmax(
    x: Tensor, dim: int = -1, mask: Tensor | None = None, training: bool = False, temperature: float = 1.0
) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return masked_softmax(SoftMax(temperature).modulate(x.to(dtype)), dim, mask).to(x.dtype)


def _multimax(
    x: Tensor,
    dim: int = -1,
    mask: Tensor | None = None,
    training: bool = False,
    ranges: Tensor | None = None,
    ts: Tensor | None = None,
    affine: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    if (ranges is None) != (ts is None):
        raise ValueError("ranges and ts must be given together")
    if ranges is None or ts is None:
        ranges = ts = torch.zeros(2, device=x.device)
    return multimax(x, ranges, ts, dim, mask, affine)


def _softmax_module(config: MultiMaxConfig, num_heads: int | None) -> SoftMax:
    try:
        return SoftMax(**config.normalizer_kwargs)
    except TypeError as error:
        raise ValueError(f"MultiMaxConfig.normalizer_kwargs of 'softmax': {error}") from error


def _multimax_module(config: MultiMaxConfig, num_heads: int | None) -> MultiMax:
    if config.normalizer_kwargs:
        raise ValueError(
            "MultiMaxConfig.normalizer_kwargs must be empty for 'multimax', whose options are the config's own fields, "
            f"got {config.normalizer_kwargs!r}"
        )
    assert config.order is not None
    return MultiMax(config.order, num_heads, config.init, config.init_std, config.affine)


register_normalizer(
    "multimax",
    _multimax,
    _multimax_module,
    "Zhou, Fritz, Keuper. MultiMax: Sparse and Multi-Modal Attention Learning. ICML 2024.",
    modulates_output=True,
)
register_normalizer(
    "softmax",
    _softmax,
    _softmax_module,
    "Bridle. Training Stochastic Model Recognition Algorithms as Networks. NeurIPS 1989.",
)
