"""fusedmax and oscarmax (Niculae & Blondel 2017, arXiv:1705.07704): a proximal operator, then sparsemax."""

import math

import torch
from torch import Tensor

from hf_multimax.normalizers.entmax import entmax_package
from hf_multimax.normalizers.options import below_peak, non_negative, of_numbers
from hf_multimax.normalizers.prox import prox_oscar, prox_tv
from hf_multimax.normalizers.registry import Option, register_normalizer, rowwise
from hf_multimax.numbers import is_finite
from hf_multimax.rows.function import RowFunction

__all__: list[str] = []

# What these fuse shares one gradient: scores that lie within reach of lam (or beta) of each other from the start get no
# gradient that could part them. Under a mask with holes, or in a cache, what counts is the order of what is kept.


@rowwise(compiled=lambda lam=1.0: of_numbers("fusedmax", lam))
def _fusedmax(x: Tensor, keep: Tensor, lam: float = 1.0) -> Tensor:
    x = below_peak(x)
    # Scores that far down stay apart from the support, whatever they are; they would take the digits of the others.
    x = x.clamp(min=-4 * lam - 2)
    if bool(keep.all()):
        return entmax_package("fusedmax").sparsemax(prox_tv(x, lam), dim=-1)
    # The kept entries move together: what a mask removes does not stand between neighbours.
    order = (~keep).to(torch.uint8).argsort(dim=-1, stable=True)
    there = keep.gather(-1, order)
    scores = x.gather(-1, order).masked_fill(~there, 0.0)
    scores = prox_tv(scores, lam, there.sum(-1, keepdim=True)).masked_fill(~there, -math.inf)
    return torch.zeros_like(x).scatter(-1, order, entmax_package("fusedmax").sparsemax(scores, dim=-1))


def _compiled_oscarmax(alpha: float = 0.0, beta: float | None = None) -> RowFunction | None:
    return of_numbers("oscarmax", alpha, -1.0 if beta is None else beta)


@rowwise(compiled=_compiled_oscarmax)
def _oscarmax(x: Tensor, keep: Tensor, alpha: float = 0.0, beta: float | None = None) -> Tensor:
    # As in fusedmax; here signs and ranks of magnitudes count, so that the bound is further away.
    count = keep.sum(-1, keepdim=True).to(x.dtype)
    strength = alpha + (2.0 if beta is None else beta * count)
    x = x.maximum(-2 * x.detach().amax(-1, keepdim=True).abs() - 4 * strength - 2)
    scores = prox_oscar(x.masked_fill(~keep, 0.0), keep, alpha, beta)
    return entmax_package("oscarmax").sparsemax(scores.masked_fill(~keep, -math.inf), dim=-1)


register_normalizer(
    "fusedmax",
    _fusedmax,
    citation="Niculae, Blondel. A Regularized Framework for Sparse and Structured Neural Attention. NeurIPS 2017. "
    "arXiv:1705.07704.",
    options={"lam": non_negative(1.0, "strength of the fusing of neighbours; 0 is sparsemax")},
)
register_normalizer(
    "oscarmax",
    _oscarmax,
    citation="Niculae, Blondel. A Regularized Framework for Sparse and Structured Neural Attention. NeurIPS 2017. "
    "arXiv:1705.07704.",
    options={
        "alpha": non_negative(0.0, "strength of the pull to zero"),
        "beta": Option(
            None,
            "strength of the grouping of entries of any place; null is 1 / (unmasked entries - 1)",
            "a number >= 0, or null",
            lambda value: value is None or (is_finite(value) and value >= 0),
        ),
    },
)
