"""The one table of tolerances: what rounding alone may cost, by data type."""

import torch

#: relative to the largest entry of the reference
RELATIVE = {
    torch.float64: 1e-10,
    torch.float32: 2e-6,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-11,
}


def relative_error(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest absolute difference over the largest absolute reference entry, in float64; NaN is never small."""
    actual, reference = actual.detach().double(), reference.detach().double()
    error = (actual - reference).abs().max() / reference.abs().max().clamp_min(1e-30)
    return float("inf") if error.isnan() else error.item()


def assert_no_worse(actual: torch.Tensor, plain: torch.Tensor, reference: torch.Tensor, what: str = "") -> None:
    """``actual`` errs at most twice as much as the ``plain`` computation of the same type, plus 1e-6."""
    error, allowed = relative_error(actual, reference), 2 * relative_error(plain, reference) + 1e-6
    assert error <= allowed, f"{what}: relative error {error:.3g} > {allowed:.3g}"
