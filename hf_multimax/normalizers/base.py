"""MultiMax as a module: its parameters, how they start, and why they stay float32."""

import abc
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from hf_multimax.functional import Affine, compute_dtype, masked_softmax, modulate, multimax
from hf_multimax.numbers import is_integer
from hf_multimax.rows.function import RowFunction

__all__ = ["LAYER", "OUTPUT", "MultiMax", "Normalizer", "NormalizerSwitch", "is_patched", "multimax_parameters"]

#: What a normalizer is called in its attention layer, and that of the output logits in the model; in files, too.
LAYER, OUTPUT = "multimax", "multimax_output"


class Normalizer(nn.LayerNorm):
    """What takes SoftMax's place: an elementwise step on the scores, then probabilities along a dimension.

    This base class is plain SoftMax. A subclass overrides ``modulate`` (what must happen before an additive mask and
    before attention sinks join), ``normalize``, or both.

    Parameters stay float32 whatever the model is cast to: they are a handful of scalars that steer every score.
    """

    # Of LayerNorm nothing is used. Trainer exempts from weight decay what is an instance of it, and offers no other
    # way that keeps the parameters' names: this is how the stock Trainer, too, leaves these scalars undecayed.

    normalized_shape: tuple[int, ...] = ()
    weight = bias = None
    eps = 0.0
    elementwise_affine = False

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def modulate(self, x: Tensor) -> Tensor:
        """The elementwise step, in x's type."""
        return x

    def normalize(self, x: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
        """Probabilities along ``dim`` over the entries that the boolean ``mask`` (True = keep) keeps."""
        return masked_softmax(x, dim, mask)

    def forward(self, x: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
        """Probabilities along ``dim``, shaped and typed like ``x``; computed in float32, or float64 for float64."""
        scores = self.modulate(x.to(compute_dtype(x.dtype)))
        return self.normalize(scores, dim, mask).to(x.dtype)

    def modulator(self, device: torch.device) -> tuple[Tensor, Tensor, Affine | None] | None:
        """``ranges``, ``ts`` and ``affine`` of the MultiMax that this is, which kernels compute; None for others."""
        return None

    def row_factor(self, q: Tensor, seen: Callable[[], Tensor]) -> Tensor | None:
        """What multiplies the scores of every query before a mask acts; None for nothing, as with a :meth:`modulator`.

        Args:
            q: the queries as attention gets them, ``[B, H, Nq, D]``.
            seen: gives how many keys each of them sees, integers that broadcast to ``[B, H, Nq, 1]``.

        Returns:
            ``[B, H, Nq, 1]``, of the type that scores of ``q`` are computed in.
        """
        return None

    def compiled(self) -> RowFunction | None:
        """This as a compiled function of rows, options as scalars or ``[heads]``; None where there is none."""
        return None

    def reset_parameters(self) -> None:
        """Set the parameters to their initial values."""

    def extra_repr(self) -> str:
        return ""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Normalizer":
        def keep_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype == tensor.dtype or not tensor.is_floating_point():
                return moved
            return tensor.to(moved.device)  # only the change of type is undone, and nothing is rounded on the way

        return super()._apply(keep_float32, recurse)


def is_patched(model: nn.Module) -> bool:
    """Whether ``model`` is a MultiMax model: patched by ``patch_model``, or loaded from a MultiMax checkpoint.

    Examples:
        >>> from transformers import AutoModelForCausalLM
        >>> from hf_multimax import is_patched, patch_model
        >>> model = AutoModelForCausalLM.from_pretrained("gpt2")
        >>> is_patched(model), is_patched(patch_model(model))
        (False, True)
    """
    return getattr(type(model), "_is_multimax_model", False)


def multimax_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of every normalizer in ``model``, by name, e.g. ``transformer.h.0.attn.multimax.ts``.

    Works on wrapped models, too (PEFT, DDP), whose names then have the wrapper's prefix.

    Raises:
        TypeError: if ``model`` is no module.

    Examples:
        >>> from transformers import AutoModelForCausalLM
        >>> from hf_multimax import multimax_parameters, patch_model
        >>> model = patch_model(AutoModelForCausalLM.from_pretrained("gpt2"))
        >>> list(multimax_parameters(model))[:2]
        ['transformer.h.0.attn.multimax.ranges', 'transformer.h.0.attn.multimax.ts']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a model, got {type(model).__name__}")
    ours = {id(p) for module in model.modules() if isinstance(module, Normalizer) for p in module.parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in ours}


class MultiMax(Normalizer):
    """``softmax(sigma(x))`` with learned sigma (Zhou, Fritz, Keuper, ICML 2024, section 4).

    Args:
        order: N >= 1; the paper uses 2, the default (1 for the affine variant, which has no other).
        num_heads: None for one modulator, or the number of heads for one each; scores are then
            ``[..., heads, queries, keys]``.
        init: ``"identity"`` (all zeros: SoftMax exactly, for models trained with SoftMax) or ``"paper"`` (a normal
            distribution of standard deviation ``init_std`` cut at -2 and 2, as the authors train from scratch).
        init_std: see ``init``.
        affine: put ``scale * x + shift`` in front of a modulator of order 1 (initially 1 and 0).

    Attributes:
        ranges: ``[b_1, d_1, ..., b_N, d_N]``, shape ``[2N]`` or ``[num_heads, 2N]``, float32.
        ts: ``[t_b1, t_d1, ...]``, shaped alike.
        scale, shift: scalars or ``[num_heads]``, float32; None unless ``affine``.

    Raises:
        ValueError: for an impossible argument.

    Examples:
        >>> import torch
        >>> from hf_multimax import MultiMax
        >>> normalizer = MultiMax(order=2)
        >>> scores = torch.tensor([2.0, 1.0, 0.0])
        >>> torch.allclose(normalizer(scores), scores.softmax(-1))  # the identity start
        True
    """

    def __init__(
        self,
        order: int | None = None,
        num_heads: int | None = None,
        init: str = "identity",
        init_std: float = 0.02,
        affine: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        order = (1 if affine else 2) if order is None else order
        if not is_integer(order, 1):
            raise ValueError(f"order must be an integer >= 1, got {order!r}")
        if affine and order != 1:
            raise ValueError(f"the affine variant has order 1, got order={order}")
        if num_heads is not None and not is_integer(num_heads, 1):
            raise ValueError(f"num_heads must be None or an integer >= 1, got {num_heads!r}")
        if init not in ("identity", "paper"):
            raise ValueError(f"init must be 'identity' or 'paper', got {init!r}")
        if not init_std > 0:
            raise ValueError(f"init_std must be > 0, got {init_std}")
        self.order, self.num_heads, self.init, self.init_std = order, num_heads, init, init_std

        def parameter(*shape: int) -> nn.Parameter:
            heads = () if num_heads is None else (num_heads,)
            return nn.Parameter(torch.empty((*heads, *shape), dtype=torch.float32, device=device))

        self.ranges, self.ts = parameter(2 * order), parameter(2 * order)
        self.scale, self.shift = (parameter(), parameter()) if affine else (None, None)
        self.reset_parameters()

    @property
    def affine(self) -> tuple[Tensor, Tensor] | None:
        """``(scale, shift)``, or None without the affine variant."""
        return None if self.scale is None else (self.scale, self.shift)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for parameter in (self.ranges, self.ts):
            if self.init == "paper":
                nn.init.trunc_normal_(parameter, std=self.init_std, a=-2.0, b=2.0)
            else:
                parameter.zero_()
        if self.scale is not None:
            self.scale.fill_(1.0)
            self.shift.zero_()

    def modulator(self, device: torch.device) -> tuple[Tensor, Tensor, Affine | None]:
        return self.ranges, self.ts, self.affine

    def modulate(self, x: Tensor) -> Tensor:
        return modulate(x, self.ranges, self.ts, self.affine)

    def forward(self, x: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
        return multimax(x, self.ranges, self.ts, dim, mask, self.affine)

    def extra_repr(self) -> str:
        options: dict[str, Any] = {"order": self.order, "num_heads": self.num_heads, "affine": self.scale is not None}
        return ", ".join(f"{name}={value}" for name, value in options.items() if value not in (None, False))


class StockSoftMax(Normalizer):
    """Stands for the SoftMax of a stock model, which Transformers' own attention computes."""


class NormalizerSwitch(nn.Module, abc.ABC):
    """What stands in a normalizer's place and holds several, for instance one for each adapter."""

    @abc.abstractmethod
    def acting(self) -> Normalizer | None:
        """The normalizer that acts at present; None where the layer is left to the stock model's SoftMax."""

    @abc.abstractmethod
    def by_row(self) -> list[Normalizer | None] | None:
        """The normalizer of each row of the batch, None if all rows have the one that acts."""

    @abc.abstractmethod
    def underneath(self) -> Normalizer | None:
        """The normalizer that was there before the others came, None for the stock model's SoftMax."""

    @abc.abstractmethod
    def holds_others(self) -> bool:
        """Whether there are others at present."""


def active_normalizer(module: nn.Module) -> Normalizer | None:
    """The normalizer of a layer: of several the one that acts, None for the stock model's SoftMax."""
    if isinstance(module, Normalizer):
        return module
    if isinstance(module, NormalizerSwitch):
        return module.acting()
    return module.reset_parameters.__self__  # of a wrapper: PEFT's of what it trains whole, FSDP's for checkpointing


def normalizers_by_row(module: nn.Module, rows: int) -> list[tuple[Normalizer | None, Tensor | None]]:
    """The normalizer of every row of a batch: each one that acts, and the indices of its rows (None for all of them).

    Raises:
        ValueError: if ``adapter_names`` gave not as many names as there are rows.
    """
    acting = acting_by_row(module)
    if acting is None:
        return [(active_normalizer(module), None)]
    if len(acting) != rows:
        raise ValueError(f"adapter_names has {len(acting)} names for a batch of {rows} rows")
    groups: dict[Normalizer | None, list[int]] = {}
    for row, normalizer in enumerate(acting):
        groups.setdefault(normalizer, []).append(row)
    return [(normalizer, torch.tensor(where)) for normalizer, where in groups.items()]


def normalizer_of_all_rows(module: nn.Module, where: str) -> Normalizer | None:
    """The one normalizer of a batch in a layer that cannot tell rows apart.

    Raises:
        ValueError: if ``adapter_names`` was given; the text says where that cannot be served.
    """
    if acting_by_row(module) is not None:
        raise ValueError(f"adapter_names cannot be served in {where}: run the rows of each adapter by themselves")
    return active_normalizer(module)


def acting_by_row(module: nn.Module) -> list[Normalizer | None] | None:
    """What ``adapter_names``, with which PEFT gives each row an adapter, asks for.

    PEFT puts it into a hook of the ``forward`` that attention does not call. An adapter without scalars of its own, and
    ``"__base__"``, have the layer's.
    """
    if isinstance(module, Normalizer):
        return None
    if isinstance(module, NormalizerSwitch):
        return module.by_row()
    hooks = module._forward_pre_hooks.values()
    names = next((hook.keywords["adapter_names"] for hook in hooks if "adapter_names" in _keywords(hook)), None)
    if names is None:
        return None
    own = module.modules_to_save
    return [own[name] if name in own else module.original_module for name in names]  # noqa: SIM401 - it has no get


def _keywords(function: Any) -> dict[str, Any]:
    return getattr(function, "keywords", {})


def named_places(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every layer's name and what stands in its normalizer's place; ``multimax_output`` is the output logits' own."""
    inside = None
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        wrapped = getattr(module, "original_module", None)  # by PEFT, of what it trains and saves whole
        if isinstance(module, Normalizer | NormalizerSwitch) or isinstance(wrapped, Normalizer):
            inside = f"{name}."
            yield name.removesuffix(".multimax"), module


def named_normalizers(model: nn.Module) -> Iterator[tuple[str, Normalizer]]:
    """Every layer's name and the normalizer that acts in it; ``multimax_output`` is that of the output logits."""
    for name, module in named_places(model):
        normalizer = active_normalizer(module)
        if normalizer is not None:
            yield name, normalizer


@contextlib.contextmanager
def on_its_device(module: nn.Module | None) -> Iterator[None]:
    """Have a module's parameters whole and in place where its methods are called rather than the module itself.

    Offloading by accelerate and sharding by FSDP2 bring parameters in hooks of ``forward``, which does not run then.

    Raises:
        ValueError: if FSDP's mixed precision has rounded the parameters.
    """
    if module is not None:
        _gather(module)
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def _gather(module: nn.Module) -> None:
    """All-gather what ``fully_shard`` has sharded in a unit of its own, once per step; see ``distributed``."""
    for part in module.modules():
        if isinstance(part, FSDPModule) and any(isinstance(p, DTensor) for p in part.parameters(recurse=False)):
            # Accelerate gives one policy to every unit; this one is read again at every all-gather.
            part._get_fsdp_state()._fsdp_param_group.mp_policy = MixedPrecisionPolicy()
            part.unshard()
    if getattr(module, "_is_fsdp_managed_module", False):
        rounded = next((p.dtype for p in module.parameters() if p.dtype in (torch.bfloat16, torch.float16)), None)
        if rounded is not None:
            raise ValueError(
                f"FSDP's mixed precision rounds the scalars of {type(module).__name__} to {rounded}: call "
                "hf_multimax.distributed.shard_modulators(model) before fully_shard, or list "
                f"{type(module).__name__} in Accelerate's fsdp_transformer_layer_cls_to_wrap, with fsdp_version 2"
            )


def whole(tensor: Tensor) -> Tensor:
    """A plain tensor also where FSDP2 holds a part of it; all processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
