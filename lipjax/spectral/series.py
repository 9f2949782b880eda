"""The truncated exponential on the imaginary axis: proved bounds, in exact rational arithmetic.

A real skew matrix A is normal with eigenvalues i theta, |theta| <= |A|. So S_p(A), S_p(z) = sum_{j<=p} z^j / j!, has
the singular values |S_p(i theta)|: its norm is at most their supremum over 0 <= theta <= |A| (docs/soundness.md).
"""

import functools
import heapq
import math
from fractions import Fraction

from lipjax.errors import NotCertifiable
from lipjax.spectral import verified

# Of |S_p|^2, relative to it: half of that, of |S_p|, is what the result may lie above the supremum.
_TOLERANCE = Fraction(1, 10**9)
_MAX_SPLITS = 2000
# Shorter intervals are lengthened to this, lest the fractions of a tiny norm become long; it changes no rounded result.
_LEAST = Fraction(1, 2**60)


def _excess_polynomial(num_terms: int) -> list[Fraction]:
    """Coefficients a_0, ..., a_p of |S_p(i theta)|^2 - 1 as a polynomial in t = theta^2.

    a_k = (-1)^k sum over i + j = 2 k of (-1)^i / (i! j!), the product of S_p(i theta) and its conjugate S_p(-i theta).
    """
    inverse = [Fraction(1, math.factorial(j)) for j in range(num_terms + 1)]
    coefficients = []
    for k in range(num_terms + 1):
        pairs = range(max(0, 2 * k - num_terms), min(num_terms, 2 * k) + 1)
        coefficients.append((-1) ** k * sum((-1) ** i * inverse[i] * inverse[2 * k - i] for i in pairs))
    return [coefficients[0] - 1, *coefficients[1:]]


def _bernstein(coefficients: list[Fraction], end: Fraction) -> tuple[list[int], int]:
    """Bernstein coefficients of a polynomial on [0, end], as integers over one common denominator."""
    degree = len(coefficients) - 1
    scaled = [c * end**k / math.comb(degree, k) for k, c in enumerate(coefficients)]
    found = [sum(math.comb(i, k) * scaled[k] for k in range(i + 1)) for i in range(degree + 1)]
    denominator = math.lcm(*(f.denominator for f in found))
    return [f.numerator * (denominator // f.denominator) for f in found], denominator


def _halves(coefficients: list[int]) -> tuple[list[int], list[int]]:
    """Bernstein coefficients on the left and right half of the interval, times 2^degree (de Casteljau)."""
    degree = len(coefficients) - 1
    left, right, row = [], [], coefficients
    for level in range(degree + 1):
        left.append(row[0] << (degree - level))
        right.append(row[-1] << (degree - level))
        row = [a + b for a, b in zip(row, row[1:], strict=False)]
    return left, right[::-1]


def _supremum(coefficients: list[Fraction], end: Fraction) -> Fraction:
    """Upper bound of max(0, the largest value of the polynomial on [0, end]); 0 where that is proved.

    On an interval a polynomial lies between its least and largest Bernstein coefficient, and takes the first and the
    last as values at the ends. The interval whose largest coefficient is the highest is halved until that one is 0 or
    close to a value that is taken.
    """
    row, denominator = _bernstein(coefficients, end)
    taken = max(Fraction(0), Fraction(row[-1], denominator))
    heap = [(-Fraction(max(row), denominator), 0, row, denominator)]
    for split in range(_MAX_SPLITS):
        upper, _, row, denominator = heapq.heappop(heap)
        if -upper <= (taken + _TOLERANCE * (1 + taken) if taken else 0):
            return max(taken, -upper)
        denominator <<= len(row) - 1
        for side, half in enumerate(_halves(row)):
            taken = max(taken, Fraction(half[0], denominator), Fraction(half[-1], denominator))
            heapq.heappush(heap, (-Fraction(max(half), denominator), 2 * split + side + 1, half, denominator))
    return max(taken, -heap[0][0])


def _checked(num_terms: int, norm: float) -> Fraction:
    if num_terms < 0 or norm < 0:
        raise ValueError(f"Expected num_terms >= 0 and norm >= 0, got {num_terms} and {norm}.")
    if not math.isfinite(norm):
        raise NotCertifiable(f"the truncated exponential of a map of norm {norm} has no bound")
    return Fraction(norm)


@functools.lru_cache(maxsize=256)
def gain_bound(num_terms: int, norm: float) -> float:
    """Proved upper bound of |S_p(A)| for every real skew A with |A| <= norm: sup |S_p(i theta)|, 0 <= theta <= norm.

    Args: num_terms: p >= 0, the highest power. norm: finite, >= 0.
    Returns: the supremum rounded up, at most 1e-9 of itself above it; exactly 1.0 where it is 1, that is for p = 0 or
      3 modulo 4 up to some theta* (2.828, 3.395, 3.379, 3.324 for p = 4, 8, 12, 16; about 1.7 for p = 3, 7, 11, 15).
    Raises: ValueError for a negative num_terms or norm; NotCertifiable if the result exceeds the float64 range or the
      norm is not finite.
    """
    exact = _checked(num_terms, norm)
    if exact == 0:
        return 1.0
    excess = _supremum(_excess_polynomial(num_terms), max(exact, _LEAST) ** 2)
    return _sqrt_up(1 + excess)


def _sqrt_up(x: Fraction) -> float:
    """A double not below the root of x >= 1, exactly 1.0 for 1."""
    exponent = (x.numerator.bit_length() - x.denominator.bit_length()) // 2
    root = verified.sqrt_up(x / Fraction(4) ** exponent)
    return verified.float_up(Fraction(root) * Fraction(2) ** exponent)


def truncation_bound(num_terms: int, norm: float) -> float:
    """Proved upper bound of |exp(A) - S_p(A)| for every real skew A with |A| <= norm: norm^(p+1) / (p+1)!, rounded up.

    It is |e^{i theta} - S_p(i theta)|, by the integral form of the remainder, where |e^{is}| = 1.
    Args, errors: as `gain_bound`.
    """
    exact = _checked(num_terms, norm)
    return verified.float_up(exact ** (num_terms + 1) / math.factorial(num_terms + 1))


def terms_for(norm: float, error: float) -> int:
    """The least p >= 1 whose `truncation_bound` at this norm is at most `error`.

    Args: norm: finite, >= 0. error: positive. Raises: ValueError for other numbers.
    """
    if not error > 0:
        raise ValueError(f"Expected a positive error, got {error}.")
    exact, p = _checked(1, norm), 1
    term = exact**2 / 2
    while term > Fraction(error):
        p += 1
        term *= exact / (p + 1)
    return p
