"""Exact arithmetic on arrays of integers, hostile arrays, and the search for a bound that is too low."""

import math
import os
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FEW = 60
# A test with the argument `examples` tries so many, and many more at night.
few_and_nightly_many = pytest.mark.parametrize(
    "examples",
    [
        pytest.param(FEW, id="normal"),
        pytest.param(int(os.environ.get("LIPJAX_EXAMPLES", "2000")), id="nightly", marks=pytest.mark.nightly),
    ],
)


# Exponents of two by which whole operators are scaled: about 1e-30 to 1e30, and now and then the ends of the range.
SCALES = st.one_of(st.just(0), st.integers(-100, 100), st.sampled_from([-1060, -1022, -700, 500, 900]))


def search(check, strategy, count):
    """Runs a check on what examples of a strategy make: the same ones in every run of the same size.

    Strategies return functions, since constructors of operators check types with the help of random numbers.
    """

    def run(make):
        check(make())

    rules = settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    rules(given(strategy)(run))()


def integers(array) -> tuple[np.ndarray, int]:
    """(n, e) with array = n 2^e exactly."""
    mantissas, exponents = np.frexp(np.asarray(array, np.float64))
    whole = (mantissas * 2.0**53).astype(np.int64)
    used = exponents[whole != 0]
    least = int(used.min()) if used.size else 0
    shifted = [int(m) << int(e - least) if m else 0 for m, e in zip(whole.ravel(), exponents.ravel(), strict=True)]
    return np.array(shifted, dtype=object).reshape(whole.shape), least - 53


def power(e: int) -> Fraction:
    return Fraction(2) ** e


def floats(n: np.ndarray) -> tuple[np.ndarray, int]:
    """(f, e) with n about f 2^e and f of order one, for LAPACK."""
    e = max((int(abs(v)).bit_length() for v in n.ravel()), default=0)
    return np.array([float(Fraction(int(v), 2**e)) for v in n.ravel()]).reshape(n.shape), e


def squared_gain(n: np.ndarray) -> Fraction:
    """A lower bound of |n|^2, n a matrix of integers: at its float64 top singular vector, without rounding."""
    matrix, _ = floats(n)
    if not matrix.any():
        return Fraction(0)
    vector = np.linalg.svd(matrix)[2][0]
    v, _ = integers(vector)
    image = n @ v
    return Fraction(int(sum(image * image)), int(sum(v * v)))


def looseness(bound: float, squared: Fraction, scale: Fraction = Fraction(1)) -> float:
    """bound / sqrt(squared scale^2) - 1 after asserting that the bound is not below."""
    squared = squared * scale**2
    assert bound >= 0 and math.isfinite(bound)
    assert Fraction(bound) ** 2 >= squared
    if squared == 0:
        return 0.0
    ratio = Fraction(bound) ** 2 / squared
    if Fraction(bound) < power(-1000):
        return 0.0  # at the bottom of the range a bound is the next float64, which may be a multiple of the norm
    return math.sqrt(ratio) - 1 if ratio < power(1000) else math.inf


PATTERNS = (
    "normal",
    "ones",
    "signs",
    "rank one",
    "orthogonal",
    "clustered",
    "graded",
    "sparse",
    "subnormal",
    "equal rows",
)


def array_of(pattern: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows, columns = math.prod(shape[:-1]), shape[-1]
    if pattern in ("orthogonal", "clustered"):
        left, right = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (rows, columns))
        count = min(rows, columns)
        values = np.ones(count) if pattern == "orthogonal" else 1 + 1e-13 * np.arange(count)
        return ((left[:, :count] * values) @ right[:count]).reshape(shape)
    values = {
        "normal": lambda: rng.normal(size=(rows, columns)),
        "ones": lambda: np.ones((rows, columns)),
        "signs": lambda: rng.choice([-1.0, 1.0], (rows, columns)),
        "rank one": lambda: np.outer(rng.normal(size=rows), rng.normal(size=columns)),
        "graded": lambda: rng.normal(size=(rows, columns)) * 10.0 ** rng.integers(-20, 20, (rows, 1)),
        "sparse": lambda: rng.normal(size=(rows, columns)) * (rng.random((rows, columns)) < 0.2),
        "subnormal": lambda: np.where(rng.random((rows, columns)) < 0.5, 5e-324, 1.0) * rng.integers(1, 9),
        "equal rows": lambda: np.repeat(rng.normal(size=(1, columns)), rows, 0),
    }[pattern]()
    return values.reshape(shape)


def orthonormal(rng, rows, columns):
    return np.linalg.qr(rng.normal(size=(max(rows, columns),) * 2))[0][:rows, :columns]


def paraunitary(c, o, pairs, seed=0):
    """A kernel of pairs + 1 taps a side with an orthogonal symbol: factors P + (I - P) z of random projectors."""
    rng = np.random.default_rng(seed)
    side = max(c, o)
    kernel = orthonormal(rng, side, side)[None, None]
    for axis in (0, 1) * pairs:
        basis = orthonormal(rng, side, max(1, side // 2))
        factor = np.stack([basis @ basis.T, np.eye(side) - basis @ basis.T])
        shape = [n + (a == axis) for a, n in enumerate(kernel.shape[:2])]
        total = np.zeros((*shape, side, side))
        for t in range(2):
            place = tuple(slice(t, t + n) if a == axis else slice(None) for a, n in enumerate(kernel.shape[:2]))
            total[place] += kernel @ factor[t]
        kernel = total
    return kernel[:, :, :c, :o]


def strided(c, o, block, pairs, seed=0):
    """As `paraunitary`, for strides: blocks of pixels are its channels."""
    k = pairs + 1
    kernel = paraunitary(c * block**2, o, pairs, seed).reshape(k, k, block, block, c, o)
    return kernel.transpose(0, 2, 1, 3, 4, 5).reshape(k * block, k * block, c, o)


def scaled(array: np.ndarray, exponent: int) -> np.ndarray:
    with np.errstate(over="ignore", under="ignore"):
        found = np.ldexp(array, exponent)
    return np.where(np.abs(found) < 2.0**960, found, 0.0)


@st.composite
def arrays(draw, *shape):
    return scaled(array_of(draw(st.sampled_from(PATTERNS)), shape, draw(st.integers(0, 2**32))), draw(SCALES))


def conv_matrix(op) -> tuple[np.ndarray, int]:
    """The matrix of y[p] = sum_t K[t] x[s p + d t - lo], tap by tap, exactly; of every group apart."""
    (h, w, c), (out_h, out_w, o) = op.in_shape, op.out_shape
    kernel, exponent = integers(op.kernel)
    k1, k2, inner, _ = kernel.shape
    s1, s2 = (op.strides, op.strides) if isinstance(op.strides, int) else op.strides
    d1, d2 = (op.dilation, op.dilation) if isinstance(op.dilation, int) else op.dilation
    circular, own = op.padding == "CIRCULAR", o // op.groups
    low = (d1 * (k1 - 1) // 2, d2 * (k2 - 1) // 2)
    if not isinstance(op.padding, str):
        low = tuple(pad[0] for pad in op.padding)
    matrix = np.zeros((out_h, out_w, o, h, w, c), dtype=object)
    for p1, p2, t1, t2 in np.ndindex(out_h, out_w, k1, k2):
        x1, x2 = s1 * p1 + d1 * t1 - low[0], s2 * p2 + d2 * t2 - low[1]
        if circular:
            x1, x2 = x1 % h, x2 % w
        if 0 <= x1 < h and 0 <= x2 < w:
            for g in range(op.groups):
                outputs, inputs = slice(g * own, (g + 1) * own), slice(g * inner, (g + 1) * inner)
                matrix[p1, p2, outputs, x1, x2, inputs] += kernel[t1, t2][:, outputs].T
    return matrix.reshape(out_h * out_w * o, h * w * c), exponent
