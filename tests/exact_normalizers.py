"""The normalizers that solve for a threshold or a projection, once more in exact arithmetic or with many digits."""

import itertools
from fractions import Fraction

import mpmath


def sparsemax(x: list[Fraction]) -> list[Fraction]:
    """Euclidean projection onto the simplex."""
    total, threshold = Fraction(0), None
    for k, value in enumerate(sorted(x, reverse=True), start=1):
        total += value
        if 1 + k * value > total:
            threshold = (total - 1) / k
    return [max(value - threshold, Fraction(0)) for value in x]


def entmax(x: list[Fraction], alpha: Fraction) -> list[mpmath.mpf]:
    """``((alpha - 1) x - tau)_+ ** (1 / (alpha - 1))`` with tau by bisection; SoftMax where alpha is 1.

    With as many digits as the powers of what is worth 1e-3 take.
    """
    digits = 30 + int(3 * alpha)
    with mpmath.workdps(digits):
        scores = [mpmath.mpf(value.numerator) / value.denominator for value in x]
        peak = max(scores)
        if alpha == 1:
            weights = [mpmath.exp(value - peak) for value in scores]
            return [weight / sum(weights) for weight in weights]
        d = mpmath.mpf(alpha.numerator) / alpha.denominator - 1

        def at(log_largest: mpmath.mpf) -> list[mpmath.mpf]:
            bases = [mpmath.exp(d * log_largest) + d * (value - peak) for value in scores]
            return [mpmath.power(base, 1 / d) if base > 0 else mpmath.mpf(0) for base in bases]

        low, high = -2 * mpmath.log(len(scores)), mpmath.mpf(0)
        for _ in range(4 * digits):
            middle = (low + high) / 2
            low, high = (middle, high) if sum(at(middle)) < 1 else (low, middle)
        return at(high)


def prox_tv(x: list[Fraction], lam: Fraction) -> list[Fraction]:
    """``argmin 1/2 ||z - x||^2 + lam sum |z_{i+1} - z_i|``: the partition into blocks that meets all conditions."""
    n = len(x)
    for cuts in itertools.product((-1, 0, 1), repeat=n - 1):  # whether z steps down, not at all or up after i
        edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), n]
        z: list[Fraction] = []
        for start, end in itertools.pairwise(edges):
            before = cuts[start - 1] if start else 0
            after = cuts[end - 1] if end < n else 0
            z += [sum(x[start:end], Fraction(0)) / (end - start) + lam * (after - before) / (end - start)] * (
                end - start
            )
        if any(cut and (z[i + 1] - z[i]) * cut <= 0 for i, cut in enumerate(cuts)):
            continue
        dual, within = Fraction(0), True
        for i in range(n - 1):
            dual += z[i] - x[i]
            within &= abs(dual) <= lam
        if within:
            return z
    raise AssertionError("no partition is optimal")


def prox_oscar(x: list[Fraction], alpha: Fraction, beta: Fraction) -> list[Fraction]:
    """Of the ordered weighted L1 norm with weights ``alpha + beta (n - 1 - rank)``, by pooling adjacent violators."""
    n = len(x)
    order = sorted(range(n), key=lambda i: abs(x[i]), reverse=True)
    blocks: list[list[Fraction]] = []
    for rank, i in enumerate(order):
        blocks.append([abs(x[i]) - alpha - beta * (n - 1 - rank)])
        while len(blocks) > 1 and sum(blocks[-2]) * len(blocks[-1]) <= sum(blocks[-1]) * len(blocks[-2]):
            last = blocks.pop()
            blocks[-1] += last
    z = [Fraction(0)] * n
    values = itertools.chain.from_iterable([max(sum(block) / len(block), Fraction(0))] * len(block) for block in blocks)
    for i, value in zip(order, values):
        z[i] = value if x[i] > 0 else -value
    return z
