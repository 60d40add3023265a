"""What a normalizer is, and the table of those that ``patch_model(model, normalizer=...)`` and ``normalize(...)`` know.

The functions themselves are in :mod:`hf_multimax.normalizers`.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_multimax.config import MultiMaxConfig
from hf_multimax.functional import check_scores, compute_dtype
from hf_multimax.normalizers.base import Normalizer
from hf_multimax.numbers import is_number
from hf_multimax.rows.choose import compiled_rows
from hf_multimax.rows.function import RowFunction

__all__ = [
    "REQUIRED",
    "FunctionNormalizer",
    "Learned",
    "NormalizerSpec",
    "Option",
    "build_from_function",
    "build_normalizer",
    "get_normalizer",
    "normalize",
    "register_normalizer",
    "registered_normalizers",
    "rowwise",
]

#: The default of an option that has none.
REQUIRED = inspect.Parameter.empty

_COMMON = ("x", "dim", "mask", "training")


@dataclass(frozen=True)
class Option:
    """A keyword of a normalizer.

    Attributes:
        default: its value where it is not given; ``REQUIRED`` if it must be.
        help: what it does.
        requirement: what a value must be, in the words of an error message.
        valid: whether a value of a config, or a number given to ``normalize``, is that. Tensors are not looked into.
    """

    default: Any
    help: str = ""
    requirement: str = "anything"
    valid: Callable[[Any], bool] = lambda value: True

    def describe(self, name: str) -> str:
        """E.g. ``alpha (default 1.5): 1 is SoftMax, 2 is sparsemax``."""
        default = "required" if self.default is REQUIRED else f"default {self.default}"
        return f"{name} ({default}){': ' + self.help if self.help else ''}"


@dataclass(frozen=True)
class Learned:
    """An option that can be a parameter of each layer or head: the parameter is unconstrained, the option is not.

    Attributes:
        value: the option's value from the parameter.
        raw: the parameter from an initial value (a number); raises ValueError where that cannot be reached.
        always: whether it is learned without being asked for by ``learn=True``.
        draw: fills the parameter where the initial value is None.
    """

    value: Callable[[Tensor], Tensor]
    raw: Callable[[float], float]
    always: bool = False
    draw: Callable[[Tensor], object] | None = None


@dataclass(frozen=True)
class NormalizerSpec:
    """One registered normalizer.

    Attributes:
        name: what users write.
        function: ``(x, dim=-1, mask=None, training=False, **options) -> probabilities``.
        module: ``(config, num_heads) -> Normalizer``, the module that a patched attention layer holds; ``num_heads``
            is None unless ``config.per_head``. It raises ValueError for options that it does not know. With a further
            argument ``head_dim`` it gets what :func:`build_normalizer` got.
        citation: where the function is defined.
        modulates_output: whether its ``modulate`` may stand before a cross-entropy loss on the output logits. Not for
            functions with exact zeros, whose cross-entropy is infinite.
        options: its keywords, by name.
        learned: which of them a patched model can learn.
        per_head: whether its parameters are one per head even where the config does not ask for it.
        identity: what is learned instead with the option ``init="identity"``, and from where on, so that a patched
            model starts as SoftMax; ``raw`` ignores the option's value.
        identity_options: the other options' values then.
        takes_training: whether the function takes ``training``.
    """

    name: str
    function: Callable[..., Tensor]
    module: Callable[[MultiMaxConfig, int | None], Normalizer]
    citation: str = ""
    modulates_output: bool = False
    options: Mapping[str, Option] = field(default_factory=dict)
    learned: Mapping[str, Learned] = field(default_factory=dict)
    per_head: bool = False
    identity: Mapping[str, Learned] = field(default_factory=dict)
    identity_options: Mapping[str, Any] = field(default_factory=dict)
    takes_training: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "takes_training", _takes_training(self.function))  # asked for at every call

    def complete(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """``given`` with the defaults of the other options.

        Raises:
            TypeError: for an option that does not exist or is missing. ValueError: for an impossible value.
        """
        problem = next((f"has no option {name!r}" for name in given if name not in self.options), None)
        for name, option in self.options.items():
            if option.default is REQUIRED and name not in given:
                problem = problem or f"needs the option {name!r}"
        if problem:
            known = "; ".join(option.describe(name) for name, option in self.options.items())
            raise TypeError(f"the normalizer {self.name!r} {problem}. Its options: {known or 'none'}")
        for name, value in given.items():
            if not isinstance(value, Tensor) and not self.options[name].valid(value):
                raise ValueError(
                    f"{name} of the normalizer {self.name!r} must be {self.options[name].requirement}, got {value!r}"
                )
        return {**{name: option.default for name, option in self.options.items()}, **given}


_REGISTRY: dict[str, NormalizerSpec] = {}


def register_normalizer(
    name: str,
    function: Callable[..., Tensor],
    module: Callable[[MultiMaxConfig, int | None], Normalizer] | None = None,
    citation: str = "",
    modulates_output: bool = False,
    options: Mapping[str, Option] | None = None,
    learned: Mapping[str, Learned] | None = None,
    per_head: bool = False,
    identity: Mapping[str, Learned] | None = None,
    identity_options: Mapping[str, Any] | None = None,
) -> NormalizerSpec:
    """Make a normalizer available to ``patch_model`` and ``normalize``; see :class:`NormalizerSpec` for the arguments.

    A function is enough: its further keywords become the options, and patched layers call it with those that
    ``MultiMaxConfig.normalizer_kwargs`` gives. It takes a boolean mask (True = keep), gives 0 to what is masked, and
    takes ``training`` if it wants to know; :func:`rowwise` makes such a function from a simpler one.

    Raises:
        ValueError: if ``name`` is taken, or the function does not take ``(x, dim=..., mask=...)``.

    Examples:
        >>> import torch
        >>> from hf_multimax import normalize, register_normalizer, rowwise
        >>> spec = register_normalizer("halved", rowwise(lambda x, keep, factor=0.5: (factor * x).softmax(-1)))
        >>> torch.allclose(normalize("halved", torch.tensor([2.0, 0.0])), torch.tensor([1.0, 0.0]).softmax(-1))
        True
    """
    if name in _REGISTRY:
        raise ValueError(f"a normalizer called {name!r} is registered already")
    found = _signature_options(name, function)
    _REGISTRY[name] = NormalizerSpec(
        name,
        function,
        functools.partial(_build_from_function, name) if module is None else module,
        citation,
        modulates_output,
        found if options is None else options,
        learned or {},
        per_head,
        identity or {},
        identity_options or {},
    )
    return _REGISTRY[name]


def get_normalizer(name: str) -> NormalizerSpec:
    """The registered normalizer of that name; ValueError, with the known names, if there is none."""
    if name not in _REGISTRY:
        raise ValueError(
            f"unknown normalizer {name!r}; registered are {', '.join(sorted(_REGISTRY))}. "
            "Make your own known with hf_multimax.register_normalizer before patching or loading."
        )
    return _REGISTRY[name]


def registered_normalizers() -> tuple[str, ...]:
    """The names of all registered normalizers, in alphabetical order.

    Examples:
        >>> from hf_multimax import registered_normalizers
        >>> {"entmax15", "multimax", "softmax", "sparsemax"} <= set(registered_normalizers())
        True
    """
    return tuple(sorted(_REGISTRY))


def normalize(
    name: str, x: Tensor, dim: int = -1, mask: Tensor | None = None, training: bool = False, **options: Any
) -> Tensor:
    """Turn scores into probabilities along ``dim`` by any registered normalizer.

    Args:
        name: a registered name.
        x: scores of floating type; float64 stays, other types are computed in float32.
        mask: boolean, broadcastable to ``x``, True = keep. Other entries get exactly 0, as does a score of minus
            infinity; a row without any other is all 0. A row that keeps NaN or infinity becomes NaN.
        training: for the normalizers that differ between training and inference.
        options: what the normalizer takes. Where a patched model can learn an option, a tensor is taken too, of size 1
            along ``dim`` and otherwise broadcastable to ``x``; a gradient flows to it.

    Returns:
        Probabilities, shaped and typed like ``x``.

    Raises:
        ValueError: for an unknown name, or an impossible value of an option. TypeError: for an option that the
            normalizer does not have, or lacks, and for scores or a mask of the wrong type.

    Examples:
        >>> import torch
        >>> from hf_multimax import normalize
        >>> normalize("sparsemax", torch.tensor([2.0, 1.5, -1.0])).tolist()
        [0.75, 0.25, 0.0]
    """
    spec = get_normalizer(name)
    options = spec.complete(options)
    if options.pop("learn", False):
        raise ValueError(f"learn=True is for patched models; give normalize({name!r}, ...) a tensor that needs a grad")
    if spec.identity and options.pop("init") == "identity":
        raise ValueError(f"init='identity' is where patched models start; give normalize({name!r}, ...) the options")
    if spec.takes_training:
        options["training"] = training
    return spec.function(x, dim=dim, mask=mask, **options)


def build_normalizer(
    config: MultiMaxConfig, num_heads: int | None, head_dim: int | Callable[[], int] | None = None
) -> Normalizer:
    """The module that ``config`` asks for; ValueError if its normalizer or an option of it is impossible.

    Args:
        num_heads: None, or the number of heads for parameters of each.
        head_dim: the width of a layer's queries, or what tells it: asked by a module that reads them.

    Examples:
        >>> from hf_multimax import MultiMaxConfig, build_normalizer
        >>> build_normalizer(MultiMaxConfig(normalizer="rsoftmax", normalizer_kwargs={"sparsity": 0.3}), None)
        FunctionNormalizer(rsoftmax, sparsity=0.3)
    """
    spec = get_normalizer(config.normalizer)
    if "head_dim" in inspect.signature(spec.module).parameters:
        return spec.module(config, num_heads, head_dim=head_dim)
    return spec.module(config, num_heads)


def rowwise(
    function: Callable[..., Tensor] | None = None, *, compiled: Callable[..., RowFunction | None] | None = None
) -> Callable[..., Any]:
    """Make a normalizer function of ``function(x, keep, **options)``, which sees nothing but rows worth normalizing.

    ``function`` works along the last dimension of ``x``, float32 or float64, minus infinity where the boolean ``keep``
    is False, with at least one entry kept in every row; what it returns for other entries is ignored. Options may be
    tensors that broadcast to ``x`` with size 1 in the last dimension. It may take ``training``.

    ``@rowwise(compiled=...)`` has a compiled function run instead where it can: ``compiled(**options)``, with
    ``training`` where the function takes it, returns that, or None for options that it does not know.

    Returns:
        ``(x, dim=-1, mask=None, training=False, **options)``, as :func:`register_normalizer` takes it: any dimension
        and floating type, zeros where masked and in rows that keep nothing, NaN in rows that keep NaN or infinity.

    Examples:
        >>> import torch
        >>> from hf_multimax import rowwise
        >>> squared = rowwise(lambda x, keep: x.softmax(-1) ** 2 / (x.softmax(-1) ** 2).sum(-1, keepdim=True))
        >>> squared(torch.zeros(4), mask=torch.tensor([True, True, False, False])).tolist()
        [0.5, 0.5, 0.0, 0.0]
    """
    if function is None:
        return functools.partial(rowwise, compiled=compiled)
    takes_training = _takes_training(function)

    @functools.wraps(function)
    def normalizer(
        x: Tensor, dim: int = -1, mask: Tensor | None = None, training: bool = False, **options: Any
    ) -> Tensor:
        check_scores(x, mask)
        if x.numel() == 0:
            return torch.zeros_like(x)
        if takes_training:
            options["training"] = training
        chosen = None if compiled is None else compiled(**options)
        p = None if chosen is None else compiled_rows(chosen, x, dim, mask)
        if p is not None:
            return p
        scores = x.to(compute_dtype(x.dtype)).movedim(dim, -1)
        keep = ~(scores <= torch.finfo(scores.dtype).min / 2)  # true for NaN, which is not to vanish
        if mask is not None:
            keep = keep & mask.expand(x.shape).movedim(dim, -1)
        scores = torch.where(keep, scores, -math.inf)  # where, not masked_fill, which is slow on a CPU
        peak = scores.detach().amax(-1, keepdim=True)
        usable = peak.isfinite()
        options = {name: _aligned(value, scores, dim) for name, value in options.items()}
        p = function(torch.where(usable, scores, 0.0), keep | ~usable, **options)
        broken = torch.where(usable | (peak == -math.inf), 0.0, math.nan).to(p.dtype)
        p = torch.where(keep, p + broken, 0.0)
        return p.movedim(-1, dim).to(x.dtype)

    parameters = list(inspect.signature(function).parameters.values())[2:]
    leading = list(inspect.signature(normalizer, follow_wrapped=False).parameters.values())[:-1]
    own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters if p.name not in _COMMON]
    normalizer.__signature__ = inspect.Signature([*leading, *own])  # type: ignore[attr-defined]
    normalizer.compiled = compiled  # type: ignore[attr-defined]
    normalizer.takes_training = takes_training  # type: ignore[attr-defined]
    return normalizer


class FunctionNormalizer(Normalizer):
    """A registered function as the module of a layer.

    A learned option is a float32 parameter of the option's name, ``[]`` or ``[num_heads]``. It holds an unconstrained
    number: read the option itself from :meth:`values`.

    Args:
        name: a registered name, whose function is called.
        options: all its options; those learned give the initial values.
        learned: the options that are parameters.
        num_heads: None for one value, or the number of heads for one each; scores are then ``[..., heads, q, k]``.
        share: how much of the result is the function's, in [0, 1]; the rest is SoftMax's.
    """

    def __init__(
        self,
        name: str,
        options: Mapping[str, Any],
        learned: Mapping[str, Learned] | None = None,
        num_heads: int | None = None,
        share: float = 1.0,
    ) -> None:
        super().__init__()
        self.share = share
        self.name, self.options, self.learned = name, dict(options), dict(learned or {})
        given = {option: self.options.pop(option) for option in self.learned}
        self._initial = {
            option: rule.draw if given[option] is None and rule.draw else rule.raw(given[option])
            for option, rule in self.learned.items()
        }
        self._takes_training = get_normalizer(name).takes_training
        shape = () if num_heads is None else (num_heads,)
        for option in self.learned:
            self.register_parameter(option, nn.Parameter(torch.empty(shape, dtype=torch.float32)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for name, initial in self._initial.items():
            parameter = self.get_parameter(name)
            initial(parameter) if callable(initial) else parameter.fill_(initial)

    def values(self) -> dict[str, Any]:
        """Every option's present value: numbers, and for a learned one a tensor ``[]`` or ``[num_heads]``."""
        return {**self.options, **{name: rule.value(getattr(self, name)) for name, rule in self.learned.items()}}

    def arguments(self) -> dict[str, Any]:
        """What the function is called with, but for ``training``: see :meth:`values`."""
        return self.values()

    def compiled(self) -> RowFunction | None:
        function = get_normalizer(self.name).function
        compiled = getattr(function, "compiled", None)
        if compiled is None or self.share != 1.0:
            return None
        return compiled(**self.arguments(), **({"training": self.training} if function.takes_training else {}))

    def normalize(self, x: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
        options = {
            name: value[:, None, None] if isinstance(value, Tensor) and value.ndim == 1 else value
            for name, value in self.arguments().items()
        }
        if self._takes_training:
            options["training"] = self.training
        p = get_normalizer(self.name).function(x, dim=dim, mask=mask, **options)
        if self.share == 1.0:
            return p
        return torch.lerp(get_normalizer("softmax").function(x, dim=dim, mask=mask), p, self.share)

    def extra_repr(self) -> str:
        fixed = [f"{option}={value}" for option, value in self.options.items()]
        fixed += [] if self.share == 1.0 else [f"share={self.share:g}"]
        return ", ".join([self.name, *fixed, *(f"learned {option}" for option in self.learned)])


def _build_from_function(name: str, config: MultiMaxConfig, num_heads: int | None) -> FunctionNormalizer:
    """The module of a normalizer that has none of its own."""
    return build_from_function(FunctionNormalizer, get_normalizer(name), config.normalizer_kwargs, num_heads=num_heads)


def build_from_function(
    module: type[FunctionNormalizer], spec: NormalizerSpec, given: Mapping[str, Any], **others: Any
) -> FunctionNormalizer:
    """``module(name, options, learned, share=share, **others)`` by the options that a config gives.

    Raises:
        ValueError: for an impossible option; the text names it.
    """
    try:
        given, name = dict(given), spec.name
        share = 1.0 if "share" in spec.options else given.pop("share", 1.0)
        if not is_number(share) or not 0 <= share <= 1:
            raise ValueError(f"share of the normalizer {name!r} must be a number in [0, 1], got {share!r}")
        options = spec.complete(given)
        learn = options.pop("learn", False)
        learned = {option: rule for option, rule in spec.learned.items() if learn or rule.always}
        if spec.identity and options.pop("init") == "identity":
            learned = dict(spec.identity)
            options.update(spec.identity_options)
        return module(name, options, learned, share=float(share), **others)
    except (TypeError, ValueError) as error:
        raise ValueError(f"MultiMaxConfig.normalizer_kwargs: {error}") from error


def _signature_options(name: str, function: Callable[..., Tensor]) -> dict[str, Option]:
    """The options that a function's signature shows."""
    parameters = inspect.signature(function).parameters
    missing = [common for common in ("dim", "mask") if common not in parameters]
    if missing or next(iter(parameters)) in ("dim", "mask"):
        raise ValueError(
            f"the function of normalizer {name!r} must take (x, dim=-1, mask=None, **options), but its signature is "
            f"{inspect.signature(function)}; hf_multimax.normalizers.rowwise makes one from (x, keep, **options)"
        )
    named = (p for p in list(parameters.values())[1:] if p.name not in _COMMON)
    return {p.name: Option(p.default) for p in named if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def _takes_training(function: Callable[..., Tensor]) -> bool:
    return "training" in inspect.signature(function).parameters


def _aligned(value: Any, scores: Tensor, dim: int) -> Any:
    """A tensor option with its dimensions where those of ``scores`` went, in their type."""
    if not isinstance(value, Tensor):
        return value
    value = value.to(scores.dtype)
    if value.ndim == 0:
        return value
    return value.reshape((1,) * (scores.ndim - value.ndim) + value.shape).movedim(dim, -1)
