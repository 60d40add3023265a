"""MultiMaxConfig: what ``patch_model`` does, stored in a model's config.json under ``"multimax"``."""

import dataclasses
import json
import logging
import re
from dataclasses import dataclass, field
from typing import Any

from hf_multimax.numbers import is_finite, is_integer

__all__ = ["MultiMaxConfig"]

logger = logging.getLogger(__name__)

#: Beyond it, scores of a few hundred overflow float32.
MAX_ORDER = 16
#: Fields of later versions, and their defaults.
_ADDED = {"outside": "softmax"}
_MAX_PATTERN = 300
_MAX_REPEATS = 4


def _option(default: Any, help: str) -> Any:
    kind = "default_factory" if callable(default) else "default"
    return field(**{kind: default}, metadata={"help": help})


@dataclass
class MultiMaxConfig:
    """How the SoftMax of a model is replaced. Nothing here is about hardware: see :func:`hf_multimax.backend`.

    Every field is checked when the object is made; a wrong value raises ValueError and an unknown name TypeError.

    Examples:
        >>> from hf_multimax import MultiMaxConfig
        >>> MultiMaxConfig(per_head=True).replace(order=1).order
        1
    """

    normalizer: str = _option("multimax", "name of a registered normalizer that takes SoftMax's place in attention")
    normalizer_kwargs: dict[str, Any] = _option(dict, "options of that normalizer, as normalize() takes them")
    order: int | None = _option(None, "order N of the modulator: 2N thresholds and 2N slopes (default 2; 1 if affine)")
    affine: bool = _option(False, "first-order modulator of scale * x + shift, two more scalars per modulator")
    attention: bool = _option(True, "replace SoftMax in the attention layers")
    output: bool = _option(False, "modulate the output logits, before the loss and before sampling")
    per_head: bool = _option(False, "one set of parameters per attention head instead of one per layer")
    init: str = _option("identity", "'identity': starts as SoftMax, for checkpoints; 'paper': random, from scratch")
    init_std: float = _option(0.02, "standard deviation of init='paper' (a normal distribution cut at -2 and 2)")
    include: list[str] | str | None = _option(None, "regular expressions: only attention layers whose name matches one")
    exclude: list[str] | str | None = _option(None, "regular expressions: no attention layer whose name matches one")
    outside: str = _option(
        "softmax", "attention outside Transformers' interface: 'softmax' answers its softmax, 'refuse' raises"
    )

    def __post_init__(self) -> None:
        self._unknown: dict[str, Any] = {}
        if self.order is None and isinstance(self.affine, bool):
            self.order = 1 if self.affine else 2
        self.validate()

    def validate(self) -> None:
        """Raise ValueError, naming the field, if any value is impossible."""
        for name in ("affine", "attention", "output", "per_head"):
            self._check(name, isinstance(getattr(self, name), bool), "must be true or false")
        self._check("normalizer", isinstance(self.normalizer, str) and self.normalizer != "", "must be a name")
        self._check("normalizer_kwargs", _is_json_object(self.normalizer_kwargs), "must be a JSON object")
        self._check("order", is_integer(self.order, 1), "must be an integer >= 1")
        self._check("order", self.order <= MAX_ORDER, f"must be at most {MAX_ORDER}")
        self._check("order", not (self.affine and self.order != 1), "must be 1 when affine is true")
        self._check("init", self.init in ("identity", "paper"), "must be 'identity' or 'paper'")
        self._check("outside", self.outside in ("softmax", "refuse"), "must be 'softmax' or 'refuse'")
        self._check("init_std", is_finite(self.init_std) and self.init_std > 0, "must be a number > 0")
        for name in ("include", "exclude"):
            self._check_patterns(name)
        if not self.attention and (self.patterns("include") or self.patterns("exclude")):
            raise ValueError("MultiMaxConfig.include and exclude choose attention layers, but attention is false")
        if not (self.attention or self.output):
            raise ValueError("MultiMaxConfig.attention and MultiMaxConfig.output are both false: nothing to replace")

    def matches(self, name: str) -> bool:
        """Whether the attention layer called ``name`` is to be replaced (``re.search``, ``exclude`` wins)."""
        included = self.include is None or any(re.search(p, name) for p in self.patterns("include"))
        return included and not any(re.search(p, name) for p in self.patterns("exclude"))

    def patterns(self, field_name: str) -> list[str]:
        """``include`` or ``exclude`` as a list, whatever form it was given in."""
        value = getattr(self, field_name)
        return [] if value is None else [value] if isinstance(value, str) else list(value)

    def replace(self, **overrides: Any) -> "MultiMaxConfig":
        """A copy with other values; raises TypeError, with the known ones, for an unknown field."""
        known = [f.name for f in dataclasses.fields(self)]
        unknown = sorted(overrides.keys() - set(known))
        if unknown:
            raise TypeError(f"MultiMaxConfig has no field {unknown[0]!r}; there are {', '.join(known)}")
        if overrides.get("affine") and not self.affine:
            overrides.setdefault("order", None)  # the default order follows affine
        new = dataclasses.replace(self, **overrides)
        new._unknown = dict(self._unknown)
        return new

    def to_dict(self) -> dict[str, Any]:
        """A plain dict of JSON types, with the keys of a newer version that ``from_dict`` did not know.

        A field that the first version did not have is left out at its default: older versions then know every key.
        """
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values = {name: value for name, value in values.items() if _ADDED.get(name, self) != value}
        return json.loads(json.dumps({**self._unknown, **values}))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "MultiMaxConfig":
        """The inverse of ``to_dict``. Unknown keys, of a newer version, are kept and reported in the log.

        Raises:
            ValueError: if a value is impossible, naming its field, or if ``values`` is no dict.
        """
        if not isinstance(values, dict):
            raise ValueError(f"the 'multimax' entry of the config must be an object, got {values!r}")
        known = {f.name for f in dataclasses.fields(cls)}
        config = cls(**{key: value for key, value in values.items() if key in known})
        config._unknown = {key: value for key, value in values.items() if key not in known}
        if config._unknown:
            logger.warning(
                "The MultiMax config has keys that this version of hf_multimax does not know, perhaps of a newer one: "
                f"{', '.join(sorted(config._unknown))}. They are kept but have no effect."
            )
        return config

    def _check(self, name: str, valid: bool, requirement: str) -> None:
        if not valid:
            raise ValueError(f"MultiMaxConfig.{name} {requirement}, got {shown(getattr(self, name))}")

    def _check_patterns(self, name: str) -> None:
        value = getattr(self, name)
        listed = isinstance(value, list | tuple) and all(isinstance(p, str) for p in value)
        self._check(name, value is None or isinstance(value, str) or listed, "must be a string, a list of them or null")
        for pattern in self.patterns(name):
            self._check(name, len(pattern) <= _MAX_PATTERN, f"must have at most {_MAX_PATTERN} characters a pattern")
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"MultiMaxConfig.{name}: {pattern!r} is no regular expression ({error})") from error
            if _may_take_forever(pattern):
                raise ValueError(
                    f"MultiMaxConfig.{name}: {pattern!r} could take forever to match: use at most {_MAX_REPEATS} of "
                    "* + ? {n} and (a|b), none of them on a group that has one inside, or alternatives, and no comments"
                )


def _may_take_forever(pattern: str) -> bool:
    """Whether a pattern could need exponential time, or a high power of it, on the name of a module."""
    if re.search(r"\(\?(#|[a-zA-Z]*x)", pattern):  # comments, in which anything could hide
        return True
    plain = re.sub(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", "x", pattern)  # escapes and classes match one character
    plain = re.sub(r"\(\?(P<\w+>|<?[=!]|[a-zA-Z-]*:?)", "(", plain)  # a question mark that is no repeat
    repeat = r"(?:[*+?]|\{\d*,?\d*\})[?+]?"
    forks = len(re.findall(repeat, plain))
    while group := re.search(rf"\(([^()]*)\)({repeat})?", plain):  # from the inside out
        has_choice = re.search(rf"{repeat}|\|", group[1])
        forks += "|" in group[1]
        if group[2] and has_choice:
            return True
        plain = plain[: group.start()] + ("x?" if has_choice or group[2] else "x") + plain[group.end() :]
    return forks > _MAX_REPEATS


def shown(value: Any, most: int = 100) -> str:
    """``repr`` for an error message: short, and possible for an integer of any length."""
    try:
        text = repr(value)
    except ValueError:
        text = "an integer of thousands of digits"
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _is_json_object(value: Any) -> bool:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        return False
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True
