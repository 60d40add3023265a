"""The one table of tolerances: what rounding alone may cost, by data type."""

import torch

#: relative to the largest entry of the reference
RELATIVE = {
    torch.float64: 1e-10,
    torch.float32: 2e-6,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-11,
}

#: a reference below this is a sum that cancels: its error is taken relative to this instead
NOTHING = 1e-4


def relative_error(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest absolute difference over the largest absolute reference entry, in float64; NaN is never small."""
    actual, reference = actual.detach().double(), reference.detach().double()
    error = (actual - reference).abs().max() / reference.abs().max().clamp_min(NOTHING)
    return float("inf") if error.isnan() else error.item()


def assert_close(actual: torch.Tensor, reference: torch.Tensor, tolerance: float, what: str = "") -> None:
    """The relative error is below ``tolerance``."""
    error = relative_error(actual, reference)
    assert error < tolerance, f"{what}: relative error {error:.3g} >= {tolerance:.3g}"


def assert_no_worse(actual: torch.Tensor, plain: torch.Tensor, reference: torch.Tensor, what: str = "") -> None:
    """``actual`` errs at most twice as much as the ``plain`` computation of the same type, plus 1e-6."""
    error, allowed = relative_error(actual, reference), 2 * relative_error(plain, reference) + 1e-6
    assert error <= allowed, f"{what}: relative error {error:.3g} > {allowed:.3g}"


def assert_draws_no_worse(actual: list[float], plain: list[float], what: str = "") -> None:
    """Over draws of one call, the geometric mean of the errors plus 1e-6 is at most twice the plain computation's.

    For calls where rounding decides between the scores of a row, and errors of draws differ by a factor of 10,000: the
    plain computation with its sums in another order errs more than twice as much in every fifth draw.
    """
    error, allowed = (torch.tensor(x, dtype=torch.float64).add(1e-6).log().mean().exp().item() for x in (actual, plain))
    assert error <= 2 * allowed, f"{what}: mean relative error {error:.3g} > {2 * allowed:.3g}"


def root_mean_square_error(actual: dict, reference: dict) -> float:
    """Of the relative errors of many tensors together."""
    assert actual.keys() == reference.keys()
    return (sum(relative_error(actual[key], reference[key]) ** 2 for key in reference) / max(len(reference), 1)) ** 0.5


def assert_none_worse(actual: dict, plain: dict, reference: dict, what: str = "") -> None:
    """The same of many tensors together, by the root mean square of their errors: one alone errs by luck."""
    error, allowed = (root_mean_square_error(tensors, reference) for tensors in (actual, plain))
    allowed = 2 * allowed + 1e-6
    assert error <= allowed, f"{what}: root mean square relative error {error:.3g} > {allowed:.3g}"


#: attention in float32 against float64 for scores of standard deviation 1 and |ts| <= 1; 1e-5 for what is not named
ATTENTION = {
    "out": 2e-6,
    **dict.fromkeys(("ranges", "ts", "affine_scale", "affine_shift", "sinks"), 1e-4),
}
