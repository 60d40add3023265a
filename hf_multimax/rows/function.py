"""A function of rows of scores, as attention and the compiled operators get it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

__all__ = ["RowFunction", "Rowwise"]


class RowFunction(NamedTuple):
    """A compiled function with its options.

    Attributes:
        kind: its name, one of ``KINDS``.
        a, b: options that are numbers.
        value: in place of ``a``, a tensor that broadcasts to the scores with size 1 in the dimension of the rows; in
            attention a scalar or ``[heads]``.
        beta, gamma: asentmax's, such tensors or numbers.
    """

    kind: str
    a: float = 0.0
    b: float = 0.0
    value: Tensor | None = None
    beta: float | Tensor | None = None
    gamma: float | Tensor | None = None


@dataclass(frozen=True)
class Rowwise:
    """A normalizer other than MultiMax, in the forms that attention can compute with.

    Attributes:
        name: what messages call it.
        plain: gives ``function(scores, keep, *parameters) -> probabilities``, differentiable in scores and parameters,
            and these parameters.
        compiled: the same as a compiled function, None where there is none.
    """

    name: str
    plain: Callable[[], tuple[Callable[..., Tensor], Sequence[Tensor]]]
    compiled: RowFunction | None = None
