"""Constants of the proofs and bounds of rounding errors, under the names of docs/soundness.md; `checker` has its own.

Derivations: docs/soundness.md, section 0; of what ends in 32, section 13.
"""

import math
from fractions import Fraction

from lipjax.errors import NotCertifiable

UNIT_ROUNDOFF = 2.0**-53
"""u in float64."""

UNIT_ROUNDOFF32 = 2.0**-24
"""u in float32."""

EXACT_UNIT_ROUNDOFF = Fraction(UNIT_ROUNDOFF)
"""u in float64, as a fraction: a product of it with another fraction is exact."""

TERMS = 9_000_000
"""Error bounds are themselves sums in float64, of at most so many terms; a larger layer is refused, as by `checker`."""

ENLARGEMENT = 1 + 1e-8
"""Error bounds are themselves computed in float64: their relative error is below 1e-8 for sums of up to TERMS terms."""

ENLARGEMENT32 = 1 + 2.0**-20
"""Bounds on errors in float32 are computed in float64 as well: of each step the relative error is below 2^-20."""

ROOM = Fraction(1, 2**32)
"""A claimed norm lies by this much above the proved one, relatively, for the rounding in the proof of `checker`."""

UNDERFLOW = 2.0**-900
"""More than all underflows (flush to zero included) of one step of a proof add up to.

For scaled matrices of fewer than 2^40 entries, and for unit vectors on their way through one operator whose entries lie
between SMALLEST and LARGEST.
"""

EXACT_UNDERFLOW = Fraction(UNDERFLOW)
"""UNDERFLOW as a fraction."""

UNDERFLOW_OF_OPERATOR = 2.0**-480
"""Times 1 + |x| more than an operator at x loses by underflow: XLA's CPU code makes all subnormal numbers zero."""

LARGEST = 2.0**100
"""Beyond this nothing is composed and nothing is claimed for float32: so no sum, nor twice a sum, overflows."""

SMALLEST = 2.0**-100
"""Operators with entries below this, zero apart, are not composed: underflow would matter."""

LEAST_NORMAL32 = 2.0**-126
"""omega: float32 may make what is below it zero. Its place in every bound stands for what underflows."""


def check_terms(count: int, what: str) -> None:
    """Raises: NotCertifiable if sums of so many terms are needed: the errors of error bounds are allowed for TERMS."""
    if count > TERMS:
        raise NotCertifiable(
            f"{what} has {count:,} numbers to add up, and rounding errors are bounded for sums of at most {TERMS:,}."
        )


def gamma(num_roundings: int) -> float:
    """gamma_n = n u / (1 - n u), rounded up: the relative error of n roundings in float64.

    Raises: NotCertifiable for sums of more than TERMS terms, beyond which error bounds err by more than is allowed for.
    """
    check_terms(num_roundings - 64, "An operator")  # a few roundings are of other kinds
    return num_roundings * UNIT_ROUNDOFF / (1 - num_roundings * UNIT_ROUNDOFF) * (1 + 2**-50)


def exact_gamma(num_roundings: int) -> Fraction:
    """gamma_n = n u / (1 - n u) as a fraction, for proofs in exact arithmetic (Higham 2002, section 3.1)."""
    return num_roundings * EXACT_UNIT_ROUNDOFF / (1 - num_roundings * EXACT_UNIT_ROUNDOFF)


def gamma32(num_roundings: int) -> float:
    """gamma_n = n u / (1 - n u) for float32, infinite from n u = 1/2 on."""
    roundings = num_roundings * UNIT_ROUNDOFF32
    return roundings / (1 - roundings) if roundings < 0.5 else math.inf
