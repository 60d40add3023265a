"""entmax of scores that every query scales by itself: ``asentmax`` with ``scaling="adapt"``."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from hf_multimax.functional import compute_dtype
from hf_multimax.normalizers.registry import FunctionNormalizer, Learned

__all__ = ["IDENTITY_DELTA", "QueryScaledEntmax"]

#: what makes the factor of weights that are 0 exactly one: their beta is softplus(0), their gamma 0
IDENTITY_DELTA = 1 - math.log(2)


class QueryScaledEntmax(FunctionNormalizer):
    """alpha-entmax of ``(delta + beta * log(n + 1) ** gamma) * x``, beta and gamma from the query of the row.

    ``beta = softplus(w_beta . q)`` and ``gamma = 2 tanh(w_gamma . q)`` for every query q of every head; n is the number
    of keys that it sees. The factor multiplies scores, and a position bias among them, before a mask acts.

    Args:
        name, options, learned, share: see :class:`FunctionNormalizer`; the options are ``alpha`` and ``delta``.
        num_heads, head_dim: the shape of the weights; None stands for 1, enough to look at a config.

    Attributes:
        beta_weight, gamma_weight: ``[num_heads, head_dim]``, float32, zeros at the start.

    Raises:
        ValueError: for a ``delta`` that lets the factor vanish, a ``share`` other than 1, and queries of another shape.
    """

    def __init__(
        self,
        name: str,
        options: Mapping[str, Any],
        learned: Mapping[str, Learned],
        num_heads: int | None = None,
        head_dim: int | None = None,
        share: float = 1.0,
    ) -> None:
        if not options["delta"] > 0:
            raise ValueError(f"delta of {name!r} must be > 0 with scaling='adapt', got {options['delta']}")
        super().__init__(name, options, learned, num_heads, share)
        for option in ("beta_weight", "gamma_weight"):
            weight = torch.zeros((num_heads or 1, head_dim or 1), dtype=torch.float32)
            self.register_parameter(option, nn.Parameter(weight))

    @property
    def share(self) -> float:
        """How much of the result is the function's: all of it."""
        return 1.0

    @share.setter
    def share(self, value: float) -> None:
        if value != 1.0:  # SoftMax's part would be of scores that the query has scaled
            raise ValueError("scaling='adapt' is not mixed with SoftMax: start as SoftMax with init='identity'")

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        for name in ("beta_weight", "gamma_weight"):
            if name in self._parameters:  # the base class is there first
                self.get_parameter(name).zero_()

    def row_factor(self, q: Tensor, seen: Callable[[], Tensor]) -> Tensor:
        if self.beta_weight.shape != (q.shape[1], q.shape[3]):
            raise ValueError(
                f"{self.name} has weights {list(self.beta_weight.shape)} for queries of {q.shape[1]} heads of width "
                f"{q.shape[3]}: give build_normalizer these numbers; a layer that tells others goes by exclude="
            )
        dtype = compute_dtype(q.dtype)
        weights = torch.stack((self.beta_weight, self.gamma_weight), -1).to(dtype)
        beta, gamma = torch.matmul(q.to(dtype), weights).split(1, -1)
        length = (seen().clamp(min=1) + 1).to(dtype).log()  # of a query that sees nothing, any finite number
        return self.options["delta"] + softplus(beta) * length ** (2 * torch.tanh(gamma))

    def arguments(self) -> dict[str, Any]:
        # of scores that row_factor has multiplied
        return {"alpha": self.values()["alpha"], "beta": 0.0, "gamma": 0.0, "delta": 1.0}

    def forward(self, x: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
        raise ValueError(f"{self.name} with scaling='adapt' reads the queries of attention: scores alone do not tell")
