"""Proved bounds of the truncated exponential: against 50-digit arithmetic, exact identities, and dense exponentials."""

import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import scipy.linalg

from lipjax.errors import NotCertifiable
from lipjax.spectral import series


def modulus(p, theta):
    """|S_p(i theta)| in 50 digits, by its definition."""
    with mpmath.workdps(50):
        return abs(mpmath.fsum(mpmath.mpc(0, theta) ** j / mpmath.factorial(j) for j in range(p + 1)))


def supremum(p, norm):
    """Largest modulus on [0, norm]: a scan in double precision, then a search around the best point in 50 digits."""
    thetas = np.linspace(0, norm, 2001)
    values = np.abs(sum((1j * thetas) ** j / math.factorial(j) for j in range(p + 1)))
    best = int(np.argmax(values))
    with mpmath.workdps(50):
        low, high = (mpmath.mpf(float(thetas[i])) for i in (max(best - 1, 0), min(best + 1, 2000)))
        for _ in range(120):
            third = (high - low) / 3
            if modulus(p, low + third) < modulus(p, high - third):
                low += third
            else:
                high -= third
        ends = [modulus(p, 0), modulus(p, mpmath.mpf(norm))]
        return max(modulus(p, (low + high) / 2), *ends)


@pytest.mark.parametrize("num_terms", [0, 1, 2, 3, 4, 5, 7, 8, 12, 14, 30])
def test_gain_is_the_supremum_rounded_up(num_terms):
    for norm in (1e-9, 0.5, 1.7, 2.1, 3.0, 3.38, 3.5, 5.0, 7.0, 11.0):
        truth = supremum(num_terms, norm)
        gain = mpmath.mpf(series.gain_bound(num_terms, norm))
        assert truth <= gain <= truth * (1 + mpmath.mpf(1e-9)), norm


def test_interior_maxima_are_found():
    # |S_5(i theta)| has a maximum of 1.00474 inside [0, 3] and is smaller at 3: the value at the end is no bound.
    inside = series.gain_bound(5, 3.0)
    assert inside > float(modulus(5, 3.0)) + 1e-7
    assert inside == pytest.approx(series.gain_bound(5, 2.0), rel=1e-9)


@pytest.mark.parametrize(
    ("num_terms", "theta"), [(3, 3**0.5), (4, 8**0.5), (8, 3.3951402), (12, 3.3793773), (16, 3.3248131)]
)
def test_gain_is_exactly_one_up_to_where_the_modulus_exceeds_one(num_terms, theta):
    below, above = theta * (1 - 1e-7), theta * (1 + 1e-7)
    assert modulus(num_terms, below) < 1 < modulus(num_terms, above)
    for norm in (1e-300, 1e-5, 1.0, below):
        assert series.gain_bound(num_terms, norm) == 1.0
    assert 1 < series.gain_bound(num_terms, above) < 1 + 1e-4


@pytest.mark.parametrize("num_terms", [1, 2, 5, 6, 14, 29, 30])
def test_other_numbers_of_terms_always_stretch(num_terms):
    assert series.gain_bound(num_terms, 0.0) == 1.0
    for norm in (5e-324, 1e-200, 1e-3):
        assert 1 < series.gain_bound(num_terms, norm) <= 1 + norm**2 + 2**-51


def test_coefficients_are_those_of_the_squared_modulus():
    for p in range(9):
        coefficients = series._excess_polynomial(p)
        for theta in (Fraction(1, 3), Fraction(7, 2), Fraction(5)):
            powers = [theta**j / math.factorial(j) for j in range(p + 1)]
            real = sum((-1) ** (j // 2) * powers[j] for j in range(0, p + 1, 2))
            imaginary = sum((-1) ** (j // 2) * powers[j] for j in range(1, p + 1, 2))
            assert 1 + sum(a * theta ** (2 * k) for k, a in enumerate(coefficients)) == real**2 + imaginary**2


def test_supremum_of_any_polynomial():
    rng = np.random.default_rng(0)
    positive = 0
    for _ in range(30):
        coefficients = [Fraction(float(c)) for c in rng.normal(size=6) * [0.3, 5, 20, 20, 5, 2]]
        found = series._supremum(coefficients, Fraction(3, 2))
        ts = np.linspace(0, 1.5, 20001)
        scan = max(0.0, float(np.polynomial.polynomial.polyval(ts, [float(c) for c in coefficients]).max()))
        # Of the scan: rounding, and half the second derivative (below 1e4) times the square of half a step.
        assert scan - 1e-12 <= float(found) <= (scan + 1e4 * (1.5 / 4e4) ** 2) * (1 + 1e-9) + 1e-9
        assert (scan == 0) == (found == 0)
        positive += scan > 0
    assert 0 < positive < 30  # both kinds occurred


@pytest.mark.parametrize("scale", [0.5, 2.1, 3.3, 6.0])
def test_gain_and_truncation_of_a_dense_skew_matrix(scale):
    matrix = np.random.default_rng(1).normal(size=(9, 9))
    matrix = (matrix - matrix.T) / 2
    matrix *= scale / np.linalg.norm(matrix, 2)
    norm = np.linalg.norm(matrix, 2) * (1 + 1e-14)
    exact, total, term = scipy.linalg.expm(matrix), np.eye(9), np.eye(9)
    for p in range(1, 15):
        term = term @ matrix / p
        total = total + term
        error = np.linalg.norm(total - exact, 2)
        limit = series.truncation_bound(p, norm)
        assert error <= limit + 1e-13
        if limit > 1e-8 and scale < 3:
            assert error > series.truncation_bound(p + 1, norm)  # control: one power more is no bound
        # Singular values are moduli at the eigenvalues, of which the largest is the norm.
        moduli = [float(modulus(p, theta)) for theta in np.linalg.eigvals(matrix).imag]
        assert np.linalg.norm(total, 2) == pytest.approx(max(moduli), rel=1e-12)
        assert np.linalg.norm(total, 2) <= series.gain_bound(p, norm) * (1 + 1e-13)


def test_terms_for_is_the_least_number():
    for norm, error in ((2.1, 1e-6), (3.0, 1e-6), (0.7, 1e-3), (2.0, 0.5), (0.0, 1e-9), (20.0, 1e-6)):
        p = series.terms_for(norm, error)
        assert series.truncation_bound(p, norm) <= error
        assert p == 1 or series.truncation_bound(p - 1, norm) > error


def test_norms_at_the_ends_of_the_range_and_beyond():
    assert series.gain_bound(5, 1e10) == pytest.approx(1e50 / 120, rel=1e-9)
    assert series.gain_bound(12, 0.0) == 1.0 and series.truncation_bound(12, 0.0) == 0.0
    assert series.truncation_bound(12, 1e-200) == 5e-324  # rounded up, not to zero
    for call in (series.gain_bound, series.truncation_bound):
        for norm in (1e200, math.inf, math.nan):
            with pytest.raises(NotCertifiable):
                call(12, norm)
        for arguments in ((-1, 1.0), (3, -1.0)):
            with pytest.raises(ValueError, match="Expected num_terms >= 0"):
                call(*arguments)
    with pytest.raises(ValueError, match="positive error"):
        series.terms_for(1.0, 0.0)
