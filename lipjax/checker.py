"""Checks a frozen network and its certificate again, with NumPy and safetensors alone: python checker.py DIRECTORY.

With --data FILE all images of a large data set are evaluated again, with --images N as many.

DIRECTORY holds frozen/network.json, frozen/network.safetensors, certificate.json and images.safetensors, as
docs/certificates.md describes them; report.json is checked where it is there. Exit code 0: everything is proved.
1: something is not, with the place of every mismatch. 2: a file is missing, damaged or of another schema, or checking
it would cost more than the limits, which --budget FACTOR raises. Nothing is ever written.

Nothing of lipjax is used, so that this file may be copied and run where neither lipjax nor JAX is installed. What it
accepts is proved by its own arithmetic: no stored number is believed but as a claim to be proved, and no tolerance is
added to a bound, a margin or a radius. (That a rival limits a radius is stated but for the rounding of evaluations.)
Sections (§) are those of docs/soundness.md, which derives every constant, and whose assumptions about IEEE arithmetic,
BLAS and LAPACK (§0) are those of this file, too.

Contents, each part under a line of dashes:

    Arithmetic          the rounding mode is tested; fractions and bounds rounded up                      §0, §1
    Norms of matrices   a claimed norm is proved by floating Cholesky                                     §1, §4a
    Norms of            the same for convolutions: per frequency, dense, or for maps of every size;       §2, §3, §3a, b
      convolutions        how convolutions are evaluated
    Truncated           the supremum of SOC's series on an interval                                       §9
      exponential
    Functions           exp, softplus, sigmoid and tanh with proved errors                                §11.4
    Operators           each proves its Lipschitz constant, evaluates and bounds its rounding;            §4 to §7, §9,
                          OPERATORS lists them                                                              §10, §10a
    Heads               constants of logit differences, curvatures, radii by minorants                    §6, §11
    Loop transformation norms of chains, and the constants that follow (LipLT)                            §12
    Files               JSON, safetensors and npz, read with limits
    One run             its files and findings; `prove` calls everything below in turn
    The network         hashes; operators made of layout and arrays
    The bounds          every operator's constant, and the table of logit differences                     §1 to §6, §12
    The images          form, class, margin and radius of every row                                       §7, §8, §11
    The report          accuracies follow from the rows
    Numbers as text     rounding of what is shown, radii, hashes, draws                                   §8
    What to call        check, run, main
"""

import os

for _library in ("OPENBLAS_NUM", "OMP_NUM", "MKL_NUM", "BLIS_NUM", "VECLIB_MAXIMUM"):
    os.environ[f"{_library}_THREADS"] = "1"  # read when NumPy is imported

import argparse  # noqa: E402
import dataclasses  # noqa: E402
import decimal  # noqa: E402
import functools  # noqa: E402
import hashlib  # noqa: E402
import heapq  # noqa: E402
import io  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import pathlib  # noqa: E402
import stat  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
import zipfile  # noqa: E402
from concurrent.futures import ThreadPoolExecutor  # noqa: E402
from fractions import Fraction  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import safetensors  # noqa: E402
import safetensors.numpy  # noqa: E402

NETWORK_FORMAT, NETWORK_SCHEMA = "lipjax-frozen-network", 1
FORMAT, SCHEMA = "lipjax-certificate", 3
CLAIM = (
    "For every x' with |x' - x|_2 < radius, the class that the frozen network computes in exact real arithmetic at x' "
    "is the class reported for x. Radii are l2, for pixels in [0, 1]."
)
SAMPLE = 1000
# Of data sets of at most so many images a draw by hash is repeated.
MOST_IMAGES = 2**21
LARGEST = sys.float_info.max

# The unit roundoff, and more than what all underflows of scaled numbers add up to (§1).
U, TINY = Fraction(1, 2**53), Fraction(1, 2**900)
# Error bounds are sums of non-negative terms in float64, up to so many of them: relative error below 2e-9.
TERMS = 16_000_000
GUARD = 1 + 2e-9
# Logits up to which LipLT's rows are carried back to the input, as the certifier does; beyond, to the last activation.
ROWS = 100
# Added, times 1 + |x|, to every error of an evaluation: what underflows (§7).
FLOOR = 2.0**-490
# Work is cut into pieces of about this many numbers.
CHUNK = 2**22

# Limits of what a directory may cost, whoever made it (docs/certificates.md); --budget multiplies them.
# Bytes of a JSON file, of the header of a file of arrays, and of such a file and what it unpacks to.
JSON_BYTES, HEADER_BYTES, ARRAY_BYTES = 2**26, 2**24, 2**31
# Numbers held at once, of 8 bytes: by one piece of work, and by the threads of one.
NUMBERS = HELD = 2**29
# Multiplications: so many, and so many more for each byte of the network and its images, for each SAMPLE images; and
# for each chain of LipLT, up to so many for all of them: a certifier spends 6e11 on one at most.
WORK, WORK_PER_BYTE, WORK_PER_CHAIN, WORK_OF_CHAINS = 1e12, 1e6, 2e12, 2e13
# What other things take in multiplications of a matrix product: a call of NumPy, a pass over a number, a number of the
# tables of the circle, a small matrix in a stack, a fraction.
CALL, PASS, ANGLE, MATRIX, FRACTION = 1e5, 40, 1.5e6, 1e5, 1e5
# Steps towards the weights of row sums.
PERRON_STEPS = 200
# Words of integers that are added for one truncated exponential, at most, before it counts as not proved.
SERIES_WORDS = 10**8


# Methods by which several kinds of operators, and chains of them, are bounded.
ZERO = "zero"
ONLY_TAP = "Cholesky of the Gram matrix of the only block tap"
DENSE = "Cholesky of the dense operator's Gram matrix"
PER_FREQUENCY = "Cholesky per frequency of a block circulant"
EVERYWHERE = "autocorrelation of the taps, for maps of every size"
ROW_SUMS = "row sums of the Gram matrix of the taps, for maps of every size"
GROUPS = "the largest norm of its groups of channels"
RESHAPED = "sqrt(kh kw) times the norm of the kernel as {}"
COMPOSED = "Cholesky of the Gram matrix of the dense composition"
BANDED = "Cholesky of the banded Gram matrix of the composition"
CIRCULAR = "composed circular kernel; "
PRODUCT = "product of the norms of its operators"
SPLIT = "product of the bounds to and from "
ALONE = "norm of the only operator"


class Unreadable(Exception):
    """A file that is missing, damaged or of another schema: exit code 2."""


class TooLarge(Unreadable):
    """A check that would cost more than the limits allow: exit code 2."""


class Unproved(Exception):
    """A statement that this checker cannot prove: exit code 1."""


@dataclasses.dataclass
class Budget:
    """The limits of work and memory, times `factor`, and the work that is spent already."""

    factor: int | float = 1.0
    allowed: int | float = dataclasses.field(init=False)
    spent: int | float = dataclasses.field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self.allowed = WORK * self.factor

    def _refuse(self, place: str, needed: int | float, limit: int | float, unit: str) -> None:
        if not needed <= limit:
            factor = math.ceil(min(self.factor * needed / limit * 1.01, 1e9))
            raise TooLarge(
                f"{place}: about {needed:.3g} {unit}, and the limit is {limit:.3g}: not checked. If you trust the "
                f"source, --budget {factor} raises the limits"
            )

    def spend(self, place: str, work: int | float) -> None:
        """Counts multiplications. Raises: TooLarge, before the work is done, if they are too many."""
        self._refuse(place, self.spent + work, self.allowed, "multiplications in all")
        self.spent += work

    def hold(self, place: str, numbers: int | float) -> None:
        """Raises: TooLarge for more numbers than may be held at once."""
        self._refuse(place, numbers, NUMBERS * self.factor, "numbers at once")

    def take(self, path: pathlib.Path, size: int, limit: int, what: str = "bytes") -> None:
        """Raises: TooLarge for a file, or a part of one, of too many bytes."""
        self._refuse(str(path), size, limit * self.factor, what)


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic: the rounding mode, fractions, bounds rounded up (§0, §1)


@functools.cache
def arithmetic_cases() -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Operands a and b, and by the operation's name the results to nearest: by integers, which no mode changes.

    In every other direction, upward, downward and toward zero, some result of each operation is another; so is a sum
    where registers are longer than a double.
    """
    ulp = Fraction(1, 2**52)
    a = [1, 1, 1, 1 + ulp, 1 + ulp, 3, 10, 7, 2, 5]
    b = [ulp / 2, ulp * 3 / 4, ulp / 2 + ulp / 2**12, 1 + ulp, Fraction(3, 2), 7, 3, 10, 3, 11]
    a, b = a + [-x for x in a], b + b
    exact = {"+": [x + s * y for x, y, s in zip(a, b, [1] * 10 + [-1] * 10, strict=True)]}
    exact["*"] = [x * y for x, y in zip(a, b, strict=True)]
    exact["/"] = [x / Fraction(y) for x, y in zip(a, b, strict=True)]
    exact["sqrt"] = [Fraction(math.isqrt(abs(x.numerator << 400) // x.denominator), 2**200) for x in map(Fraction, a)]
    results = {name: np.array([float(Fraction(x)) for x in values]) for name, values in exact.items()}
    return np.array([float(x) for x in a]), np.array([float(y) for y in b]), results


def arithmetic_problem() -> str | None:
    """Says what is wrong with the arithmetic of this thread; None if it rounds to nearest and has subnormal numbers."""
    a, b, expected = arithmetic_cases()
    signed = np.copysign(b, a)
    found = {"+": a + signed, "*": a * b, "/": a / b, "sqrt": np.sqrt(np.abs(a))}
    through_blas = np.stack([a, signed], axis=1) @ np.ones((2, 2))
    sums = np.stack([expected["+"]] * 2, axis=1)
    if not (
        np.array_equal(through_blas, sums) and all(np.array_equal(found[name], expected[name]) for name in expected)
    ):
        return (
            "this process does not round to nearest (another rounding mode is set), against what the proofs assume (§0)"
        )
    small = np.array([2.0**-1022, 2.0**-1073, 2.0**-1074]) * np.array([0.5, 0.5, 2.0])
    if not np.array_equal(small, [2.0**-1023, 2.0**-1074, 2.0**-1073]):
        return "this process flushes subnormal numbers to zero, against what the proofs assume (§0)"
    return None


def gamma(k: int) -> Fraction:
    """gamma_k = k u / (1 - k u)."""
    return k * U / (1 - k * U)


def rounding(k: int) -> float:
    """gamma_k as a float, rounded up."""
    return math.nextafter(float(gamma(k)), math.inf)


def float_up(x: Fraction) -> float:
    """A double not below x; infinite beyond the range."""
    try:
        value = float(x)
    except OverflowError:
        return math.inf if x > 0 else -LARGEST
    return value if math.isinf(value) or Fraction(value) >= x else math.nextafter(value, math.inf)


def root_up(x: Fraction) -> Fraction:
    """A number not below the root of x >= 0, within 2^-60 of it relatively: by integers, for numbers of any size."""
    if x == 0:
        return Fraction(0)
    shift = 160 - (x.numerator.bit_length() - x.denominator.bit_length())
    shift += shift % 2
    scaled = x * Fraction(2) ** shift
    return Fraction(math.isqrt(math.ceil(scaled)) + 1) / Fraction(2) ** (shift // 2)


def squares_up(array: np.ndarray) -> Fraction:
    """Upper bound of the sum of |entry|^2, entries of modulus at most about 1: any order of summation."""
    return largest_squares_up(array[None])


def largest_squares_up(arrays: np.ndarray) -> Fraction:
    """The largest `squares_up` of a stack of arrays."""
    parts = np.ascontiguousarray(arrays).reshape(len(arrays), -1).view(np.float64)
    return Fraction(float(np.sum(parts * parts, axis=1).max())) / (1 - gamma(parts.shape[1] + 2)) + TINY


def scaled(array: np.ndarray) -> tuple[np.ndarray, int]:
    """(array 2^-e, e), the largest entry of the former in [1/2, 1). array: float64, not all zero."""
    exponent = math.frexp(float(np.abs(array).max()))[1]
    return np.ldexp(array, -exponent), exponent


def in_threads(function, items, numbers: int = 0) -> list:
    """Maps with a thread per core; NumPy releases the interpreter's lock in the work done here.

    numbers: how many an item holds at once: there are as many threads as can hold theirs.
    """
    items = list(items)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def quietly(item):  # infinities and NaN end as claims without proof
        with np.errstate(all="ignore"):
            return function(item)

    workers = min(len(items), cores, 16, HELD // max(numbers, 1))
    if workers <= 1:
        return [quietly(item) for item in items]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(quietly, items))


def lengths(x: np.ndarray) -> np.ndarray:
    """l2 norms (b,) of a batch, but for rounding, which GUARD covers."""
    flat = x.reshape(len(x), -1)
    return np.sqrt(np.einsum("bi,bi->b", flat, flat))


def circle(n: int) -> tuple[np.ndarray, np.ndarray]:
    """cos(pi a / n) and sin(pi a / n) for a = 0, ..., 2 n - 1, correctly rounded but for 2^-190."""
    return _circle(n, 0)


@functools.lru_cache(maxsize=256)
def _circle(n: int, divisor: int) -> tuple[np.ndarray, np.ndarray]:
    """As `circle`, times 1 / sqrt(divisor) if that is not 0, before rounding.

    In integers, units of 2^-256. pi by Machin's formula; cosine and sine by their series in angles below 2 pi, whose
    terms are below 7^k / k!: each of 150 terms is cut off by at most a few units, and 7^150 / 150! < 2^-300.
    """
    bits = 256
    one = 1 << bits

    def arctan_inverse(x: int) -> int:
        term, total, k = one // x, 0, 0
        while term:
            total += (-1) ** k * (term // (2 * k + 1))
            term, k = term // (x * x), k + 1
        return total

    pi = 4 * (4 * arctan_inverse(5) - arctan_inverse(239))
    factor = one if divisor == 0 else math.isqrt((1 << (2 * bits)) // divisor)
    values: tuple[list[float], list[float]] = ([], [])
    for a in range(2 * n):
        angle, term, sums = pi * a // n, one, [0, 0]
        for k in range(150):
            sums[k % 2] += -term if k % 4 >= 2 else term
            term = term * angle // ((k + 1) << bits)
        for found, total in zip(values, sums, strict=True):
            total = total * factor >> bits
            # Exact zeros; all other values exceed 1 / (4 n^2 divisor).
            found.append(0.0 if abs(total) < 1 << (bits - 150) else float(Fraction(total, one)))
    return np.array(values[0]), np.array(values[1])


# ---------------------------------------------------------------------------------------------------------------------
# Norms of matrices: claims that are proved by floating Cholesky (§1, §4a)


def is_below(grams: np.ndarray, error: Fraction, limit: Fraction) -> bool:
    """True if lambda_max(G) <= limit is proved of every matrix of a stack (b, n, n), each known up to `error`.

    Cholesky of s I - G completes for the largest s that leaves room for its own backward error,
    gamma / (1 - gamma) trace(s I - G), and the rounding of the diagonal, 2 u max (§1, Demmel's bound): gamma_(n+2)
    for real, sqrt(2) gamma_(2n+2) for complex matrices, where gamma_(n+4) and gamma_(3(n+4)) are taken.
    """
    n = grams.shape[-1]
    room = min(limit - error - TINY, Fraction(2) ** 400)  # a claim may be beyond what a float holds
    diagonals = np.einsum("...ii->...i", grams).real
    if room <= 0 or not np.isfinite(diagonals).all():
        return False
    backward = gamma((3 if np.iscomplexobj(grams) else 1) * (n + 4))
    backward = backward / (1 - backward)
    top = float(room)
    spread = max(float((top - diagonals).sum(-1).max()), 0.0)
    shift = top - float(backward) * spread * (1 + 1e-6) - 2.0**-50 * top
    pivots = shift - diagonals
    if not (pivots > 0).all():
        return False
    shifted = -grams
    np.einsum("...ii->...i", shifted)[...] = pivots
    try:
        factor = np.linalg.cholesky(shifted)
    except np.linalg.LinAlgError:
        return False
    # A NaN anywhere in a row of the factor reaches its diagonal.
    roots = np.einsum("...ii->...i", factor).real
    if not (np.isfinite(roots).all() and (roots > 0).all()):
        return False
    trace = Fraction(float(pivots.sum(-1).max())) / (1 - gamma(n))
    slack = backward * trace + 2 * U * Fraction(float(pivots.max())) + TINY
    return Fraction(shift) + slack <= room


def grams_of(blocks: np.ndarray) -> tuple[np.ndarray, Fraction]:
    """The Gram matrices of the smaller sides of a stack (b, m, n) of scaled matrices, and the error of each (§1).

    Entry by entry gamma_m |W|^T |W|, for complex numbers sqrt(2) gamma_(2m); in norm that times |W|_F^2.
    """
    m, n = blocks.shape[1:]
    tall = blocks if m >= n else np.ascontiguousarray(blocks.conj().swapaxes(1, 2))
    is_complex = np.iscomplexobj(blocks)
    grams = (tall.conj() if is_complex else tall).swapaxes(1, 2) @ tall
    relative = gamma((3 if is_complex else 1) * (max(m, n) + 2))
    return grams, relative * largest_squares_up(blocks) + TINY


def norms_below(blocks: np.ndarray, limit: Fraction) -> bool:
    """True if |W| <= limit is proved of all scaled matrices of a stack (b, m, n).

    First by the distance from a multiple of the identity, lambda_max(G) <= c + |G - c I|_F + error (§4a), which holds
    for every c and is much closer where the matrices are orthogonal; then by Cholesky.
    """
    if limit < 0:
        return False
    if not blocks.any():
        return True
    grams, error = grams_of(blocks)
    side, squared = grams.shape[-1], limit**2
    centre = float(np.einsum("...ii->...i", grams[:1]).real.mean())
    centred = grams.copy()
    np.einsum("...ii->...i", centred)[...] -= centre
    parts = np.ascontiguousarray(centred).view(np.float64).reshape(len(grams), -1)
    distance = float(np.sum(parts * parts, axis=1).max())
    if math.isfinite(distance) and distance < centre**2:
        residual = root_up(Fraction(distance) / (1 - gamma(2 * side**2 + 4)) + TINY) * (1 + 2 * U)
        if Fraction(centre) + residual + error <= squared:
            return True
    return is_below(grams, error, squared)


def matrix_below(matrix: np.ndarray, limit: Fraction) -> bool:
    """True if |W| <= limit is proved of a real matrix of any size."""
    if not matrix.any():
        return limit >= 0
    unit, exponent = scaled(matrix)
    return norms_below(unit[None], limit / Fraction(2) ** exponent)


def matrix_effort(m: int, n: int, factor: int = 1) -> tuple[int | float, int | float]:
    """About how many multiplications `norms_below` takes for a matrix (m, n), and how many numbers it holds at once.

    factor: 4 for complex numbers.
    """
    side = min(m, n)
    return factor * (float(m) * n * side + float(side) ** 3) + PASS * (
        4.0 * m * n + 6.0 * side**2
    ), 3.0 * m * n + 6.0 * side**2


# ---------------------------------------------------------------------------------------------------------------------
# Norms of convolutions (§2, §3, §3a, §3b), and how they are evaluated


@dataclasses.dataclass
class Axis:
    """One axis of a convolution: y[i] = sum_t K[t] x[s i + t - lo], x zero outside [0, size) or periodic (§2)."""

    taps: int
    size: int  # pixels
    stride: int
    low: int  # padding before the first pixel
    high: int  # and after the last one
    circular: bool
    out: int = dataclasses.field(init=False)  # outputs
    used: list[int] = dataclasses.field(init=False)  # taps that meet a pixel: others multiply zeros

    def __post_init__(self) -> None:
        """Raises: Unproved for an axis of no output, or a circular one that strides do not divide."""
        if self.circular and self.size % self.stride:
            raise Unproved(f"a circular convolution of stride {self.stride} on {self.size} pixels")
        self.out = (self.size + self.low + self.high - self.taps) // self.stride + 1
        if self.out < 1:
            raise Unproved(f"a kernel of {self.taps} taps does not fit {self.size} pixels")
        self.used = [t for t in range(self.taps) if self.circular or self.reach(t) is not None]

    def reach(self, t: int) -> tuple[int, int] | None:
        """The first and last of the outputs for which tap t meets a pixel, and not padding; None without one."""
        first = max(0, -((t - self.low) // self.stride))
        last = min(self.out - 1, (self.size - 1 - t + self.low) // self.stride)
        return (first, last) if first <= last else None

    @property
    def span(self) -> int:
        """The number of pixels that all outputs read, those of the padding included."""
        return self.stride * (self.out - 1) + self.taps

    def admits(self, grid: int, twist: int) -> bool:
        """True if the map is a compression of the one on `grid` blocks, periodic up to the sign (-1)^twist (§2)."""
        if self.circular:
            return grid == self.size // self.stride and twist == 0
        if grid > 4 * (self.out + self.size + self.taps):  # no proof needs as large a one, nor would it fit memory
            return False
        if grid < self.out or self.stride * grid < self.size or twist not in (0, 1):
            return False
        # From each tap on, every stride-th pixel is read, `out` times: sums along the strides of ones and minus ones.
        ends = np.zeros((-(-self.span // self.stride) + 1 + self.out, self.stride), np.int32).reshape(-1)
        ends[self.used] += 1
        ends[np.array(self.used, int) + self.stride * self.out] -= 1
        read = np.cumsum(ends.reshape(-1, self.stride), axis=0).reshape(-1) > 0
        indices = np.flatnonzero(read) - self.low
        outside = indices[(indices < 0) | (indices >= self.size)]
        return bool((outside % (self.stride * grid) >= self.size).all())


def met_taps(kernel: np.ndarray, axes: tuple[Axis, Axis]) -> np.ndarray:
    """The kernel with zeros for taps that only ever meet padding: the same map."""
    keep = np.zeros(kernel.shape[:2], bool)
    keep[np.ix_(axes[0].used, axes[1].used)] = True
    return np.where(keep[:, :, None, None], kernel, 0.0)


def conv_below(kernel: np.ndarray, axes: tuple[Axis, Axis], method: str, details: dict, limit: Fraction) -> bool:
    """True if |conv| <= limit is proved of the convolution with a kernel HWIO, by the method that is claimed.

    Raises: Unproved for a method or grid that proves nothing.
    """
    if limit < 0:
        return False
    if method == EVERYWHERE:  # of all taps, whether this map meets them or not
        return autocorrelation_below(kernel, axes, limit)
    if method == ROW_SUMS:
        return row_sums_below(kernel, (axes[0].stride, axes[1].stride), details, limit)
    kernel = met_taps(kernel, axes)
    if not kernel.any():
        return limit >= 0
    kernel, exponent = scaled(kernel)
    limit = limit / Fraction(2) ** exponent
    if method == DENSE:
        return dense_conv_below(kernel, axes, limit)
    if method not in (PER_FREQUENCY, ONLY_TAP):
        raise Unproved(f"the method {method!r} is not known")
    places, taps = block_taps(kernel, axes, axes[0].used, axes[1].used)
    live = taps.any(axis=(1, 2))  # those between the taps of a dilated kernel add nothing
    places, taps = places[live], taps[live]
    grid: Any = details.get("grid")
    twist: Any = details.get("twist")
    moves = [len(set(places[:, a].tolist())) > 1 for a in range(2)]
    if not any(moves):  # the symbol has the same norm at every frequency
        return norms_below(taps, limit)
    need(method == PER_FREQUENCY, f"the method {method!r} is for a single block tap, and it has {len(taps)}")
    if not all(isinstance(p, list) and len(p) == 2 and all(type(n) is int for n in p) for p in (grid, twist)):
        raise Unproved(f"grid {grid!r} and twist {twist!r} are not pairs of integers")
    if not all(axes[a].admits(grid[a], twist[a]) for a in range(2) if moves[a]):
        raise Unproved(f"grid {grid} with twist {twist} proves nothing about this convolution")
    angles = [2 * np.arange(grid[a]) + twist[a] if moves[a] else np.zeros(1, int) for a in range(2)]
    periods = [2 * grid[a] if moves[a] else 2 for a in range(2)]
    # Of a real kernel, the symbols at a frequency and its negative are conjugate: one of each pair.
    mesh = np.stack(np.meshgrid(*angles, indexing="ij"), -1).reshape(-1, 2)
    mirror = -mesh % periods
    first = (mesh[:, 0] < mirror[:, 0]) | ((mesh[:, 0] == mirror[:, 0]) & (mesh[:, 1] <= mirror[:, 1]))
    mesh = mesh[first]
    tables = [circle(period // 2) for period in periods]
    # |computed - exact symbol|: phases off by less than 6 u (two entries within u, a complex product), and a sum of
    # len(taps) products in each part.
    frobenius = [root_up(squares_up(tap)) for tap in taps]
    error = 2 * gamma(len(taps) + 8) * sum(frobenius, Fraction(0)) + TINY
    size = max(1, CHUNK // (4 * max(taps[0].size, len(taps))))

    def prove(chunk) -> bool:
        phases: Any = np.ones((len(chunk), len(taps)), complex)
        for a in range(2):
            places_of_angles = np.outer(chunk[:, a], places[:, a]) % periods[a]
            phases *= tables[a][0][places_of_angles] + 1j * tables[a][1][places_of_angles]
        flat, shape = taps.reshape(len(taps), -1), (len(chunk), *taps.shape[1:])
        symbols = np.empty(shape, complex)
        symbols.real, symbols.imag = (phases.real @ flat).reshape(shape), (phases.imag @ flat).reshape(shape)
        return norms_below(symbols, limit - error)

    chunks = [mesh[start : start + size] for start in range(0, len(mesh), size)]
    return all(in_threads(prove, chunks, 12 * size * max(taps[0].size, len(taps))))


def groups_below(parts: list[np.ndarray], axes: tuple[Axis, Axis], method: str, details: dict, limit: Fraction) -> bool:
    """As `conv_below` of groups of channels: the map is block-diagonal, and each group has a proof of its own (§3c)."""
    if len(parts) == 1:
        return conv_below(parts[0], axes, method, details, limit)
    if not any(met_taps(part, axes).any() for part in parts):
        return limit >= 0
    need(method == GROUPS, f"the method {method!r} is none for {len(parts)} groups of channels")
    rows: Any = details.get("groups")
    stated = isinstance(rows, list) and len(rows) == len(parts) and all(isinstance(row, dict) for row in rows)
    need(stated and all(isinstance(row.get("details"), dict) for row in rows), "details state no proof of every group")
    return all(
        conv_below(part, axes, str(row.get("method")), row["details"], limit)
        for part, row in zip(parts, rows, strict=True)
    )


def groups_effort(
    parts: list[np.ndarray], axes: tuple[Axis, Axis], method: Any, details: dict
) -> tuple[int | float, int | float]:
    """As `conv_effort` of `groups_below`."""
    rows: Any = details.get("groups") if len(parts) > 1 else [{"method": method, "details": details}]
    rows = rows if isinstance(rows, list) else []
    found: list[tuple[int | float, int | float]] = [(CALL, 0.0)]
    for part, row in zip(parts, rows, strict=False):
        own = row.get("details") if isinstance(row, dict) else None
        if isinstance(own, dict):
            found.append(conv_effort(part.shape, axes, str(row.get("method")), own))
    return sum(work for work, _ in found), max(numbers for _, numbers in found)


def kernels_of_groups(kernel: np.ndarray, channels: int, groups: Any, dilation: Any = 1) -> list[np.ndarray]:
    """The kernels (*window, i, o) of all groups, with zeros between taps, from a kernel (kh, kw, i, o groups).

    Raises: Unproved for groups or a dilation that do not fit it or the channels of the images.
    """
    need(type(groups) is int and groups >= 1, f"groups {groups!r}")
    kh, kw, inner, outer = kernel.shape
    fit = inner * groups == channels and outer % groups == 0
    need(fit, f"a kernel {kernel.shape} in {groups} groups for images of {channels} channels")
    steps = [dilation] * 2 if type(dilation) is int else dilation
    need(is_shape(steps) and len(steps) == 2, f"dilation {dilation!r}")
    window = [step * (k - 1) + 1 for step, k in zip(steps, (kh, kw), strict=True)]
    need(math.prod(window) * inner * outer <= TERMS, f"a dilated kernel of {window} taps, more than {TERMS:,} numbers")
    wide = np.zeros((*window, inner, outer))
    wide[:: steps[0], :: steps[1]] = kernel
    return [np.ascontiguousarray(part) for part in np.split(wide, groups, axis=3)]


def by_groups(function, x: np.ndarray, parts: list[np.ndarray], axes: tuple[Axis, Axis]) -> np.ndarray:
    """`convolve` or `convolve_back` of every group, side by side."""
    images = np.split(x, len(parts), axis=3)
    return np.concatenate([function(im, part, axes) for im, part in zip(images, parts, strict=True)], axis=3)


def conv_axes(kernel: np.ndarray, in_shape, steps, padding) -> tuple[Axis, Axis]:
    """Raises: Unproved for a padding that is not known."""
    sides = kernel.shape[:2]
    low = [(k - 1) // 2 for k in sides]
    if padding == "ZERO":
        pads = [(p, p) for p in low]
    elif padding == "VALID":
        pads = [(0, 0), (0, 0)]
    elif padding == "CIRCULAR":
        pads = [(p, k - 1 - p) for p, k in zip(low, sides, strict=True)]
    else:
        pairs = isinstance(padding, list) and len(padding) == 2
        need(pairs and all(isinstance(p, list) and len(p) == 2 for p in padding), f"padding {padding!r}")
        pads = [tuple(p) for p in padding]
        need(all(type(n) is int and 0 <= n < 2**20 for p in pads for n in p), f"padding {padding!r}")
    circular = padding == "CIRCULAR"
    first, second = (Axis(sides[a], in_shape[a], steps[a], pads[a][0], pads[a][1], circular) for a in range(2))
    read = first.span * second.span * kernel.shape[2]
    need(read <= TERMS, f"an image of {read:,} numbers with its padding, and {TERMS:,} is the most")
    return first, second


def conv_cost(kernel: np.ndarray, axes: tuple[Axis, Axis]) -> int | float:
    """About how many multiplications `convolve` takes for one image."""
    (_, _, c, o), (rows, columns) = kernel.shape, axes
    places, taps = rows.out * columns.out, int(np.count_nonzero(kernel.any(axis=(2, 3))))
    # A call of NumPy per tap is shared by the images of a batch.
    calls = CALL / max(1, min(64, CHUNK // (places * o)))
    return taps * (places * (c * o + PASS * (c + 2.0 * o)) + 3 * calls) + 2.0 * PASS * kernel.size


def convolve(x: np.ndarray, kernel: np.ndarray, axes: tuple[Axis, Axis]) -> np.ndarray:
    """The convolution of a batch (b, h, w, c), tap by tap: at most kh kw c roundings reach a product."""
    rows, columns = axes
    if rows.circular:
        spans = [np.arange(-a.low, a.stride * (a.out - 1) + a.taps - a.low) % a.size for a in axes]
        x = x[:, spans[0]][:, :, spans[1]]
    total = np.zeros((len(x), rows.out, columns.out, kernel.shape[3]))

    def reach(axis: Axis, t: int) -> tuple[slice, slice] | None:
        """The outputs that tap t has an input for, and these inputs."""
        if axis.circular:
            return slice(0, axis.out), slice(t, t + axis.stride * (axis.out - 1) + 1, axis.stride)
        found = axis.reach(t)
        if found is None:
            return None
        first, last = (axis.stride * i + t - axis.low for i in found)
        return slice(found[0], found[1] + 1), slice(first, last + 1, axis.stride)

    for t1 in range(rows.taps):
        for t2 in range(columns.taps):
            places: Any = (reach(rows, t1), reach(columns, t2))
            if places[0] is None or places[1] is None or not kernel[t1, t2].any():
                continue
            (o1, i1), (o2, i2) = places
            part = np.ascontiguousarray(x[:, i1, i2])
            image = part.reshape(-1, part.shape[3]) @ kernel[t1, t2]
            total[:, o1, o2] += image.reshape(*part.shape[:3], -1)
    return total


def convolve_back(y: np.ndarray, kernel: np.ndarray, axes: tuple[Axis, Axis]) -> np.ndarray:
    """The adjoint of `convolve`: at most kh kw o roundings reach a product."""
    rows, columns = axes
    spans = [a.stride * (a.out - 1) + a.taps for a in axes]
    spread = np.zeros((len(y), *spans, kernel.shape[2]))
    flat = y.reshape(-1, y.shape[3])
    for t1 in range(rows.taps):
        for t2 in range(columns.taps):
            if not kernel[t1, t2].any():
                continue
            image = (flat @ kernel[t1, t2].T).reshape(*y.shape[:3], -1)
            places = (slice(t, t + a.stride * (a.out - 1) + 1, a.stride) for t, a in zip((t1, t2), axes, strict=True))
            spread[:, *places] += image
    for number_, axis in enumerate(axes, 1):
        moved = np.moveaxis(spread, number_, 0)
        folded = np.zeros((axis.size, *moved.shape[1:]))
        for place, part in enumerate(moved):
            index = place - axis.low
            if axis.circular or 0 <= index < axis.size:
                folded[index % axis.size] += part
        spread = np.moveaxis(folded, 0, number_)
    return np.ascontiguousarray(spread)


def block_taps(kernel: np.ndarray, axes: tuple[Axis, Axis], rows: Any, columns: Any) -> tuple[np.ndarray, np.ndarray]:
    """The taps of blocks of s pixels, which make the stride 1: t - lo = s q + rho (§2).

    Args: rows, columns: which taps of the kernel.
    Returns: the places q, (p, 2), and the matrices, (p, o, s1 s2 c).
    """
    blocks: dict[tuple[int, int], np.ndarray] = {}
    (s1, s2), (c, o) = (axis.stride for axis in axes), kernel.shape[2:]
    for t1 in rows:
        for t2 in columns:
            (q1, r1), (q2, r2) = divmod(t1 - axes[0].low, s1), divmod(t2 - axes[1].low, s2)
            blocks.setdefault((q1, q2), np.zeros((o, s1, s2, c)))[:, r1, r2] = kernel[t1, t2].T
    places = np.array(sorted(blocks))
    return places, np.stack([blocks[q1, q2].reshape(o, -1) for q1, q2 in places.tolist()])


def autocorrelation_below(kernel: np.ndarray, axes: tuple[Axis, Axis], limit: Fraction) -> bool:
    """True if the norm is at most `limit` on maps of every size, padded in any way, by the taps alone (§3a).

    With C_d = sum_q P_q^T P_(q+d), the symbol's Gram matrix is G = C_0 + sum over one d of each pair +-d of
    (C_d + C_d^T) cos + i (C_d - C_d^T) sin of some angle, and the two parts of a summand are its real and imaginary
    part: lambda_max(G) <= c + |C_0 - c I|_F + sum_d max(|C_d + C_d^T|_F, |C_d - C_d^T|_F) for every c.
    Rounding: an entry of C_d is an inner product of at most L = p m terms, so that all C_d together err by gamma_L
    (sum_q |P_q|_F)^2; the sums C_d +- C_d^T and C_0 - c I round by u relative to the result.
    """
    if not kernel.any():
        return True
    kernel, exponent = scaled(kernel)
    places, taps = block_taps(kernel, axes, range(axes[0].taps), range(axes[1].taps))
    rows, columns = (places[-1] - places[0] + 1).tolist()  # all places of a rectangle, in order
    # Columns of zeros are no inputs; the Gram matrix of the smaller side is the one close to a multiple of I.
    taps = taps[:, :, taps.any(axis=(0, 1))]
    taps = np.ascontiguousarray(taps.swapaxes(1, 2)) if taps.shape[1] < taps.shape[2] else taps
    count, m, n = taps.shape
    grid = taps.reshape(rows, columns, m, n)

    def size_up(matrix: np.ndarray) -> Fraction:
        return root_up(squares_up(matrix))

    def of_lag(lag: tuple[int, int]) -> Fraction | float:
        down, right = lag
        first = grid[: rows - down, max(0, -right) : columns - max(0, right)]
        second = grid[down:, max(0, right) : columns - max(0, -right)]
        product = first.reshape(-1, n).T @ second.reshape(-1, n)
        if lag != (0, 0):
            return max(size_up(product + product.T), size_up(product - product.T))
        centre = float(product.trace()) / n
        product[np.diag_indices(n)] -= centre
        return Fraction(centre) + size_up(product)

    lags = [(down, right) for down in range(rows) for right in range(1 - columns, columns) if (down, right) >= (0, 0)]
    total = sum(in_threads(of_lag, lags, 2 * taps.size + 3 * n * n), Fraction(0)) * (1 + 2 * U)
    size = sum((size_up(tap) for tap in taps), Fraction(0))
    error = gamma(count * m + 4) * size**2 + TINY
    return total + error <= (limit / Fraction(2) ** exponent) ** 2


def row_sums_below(kernel: np.ndarray, steps: tuple[int, int], details: dict, limit: Fraction) -> bool:
    """True if the norm is at most `limit` on maps of every size, padded in any way, by row sums alone (§3b).

    With matrices A_t from the taps and C_d = sum_t A_t A_(t+d)^T, every part of the Gram matrix of the map on all of
    Z^2 is one of the C_d, so that its norm is at most that of N = sum_d |C_d|, over d of either sign, and that at most
    max_i (N w)_i / w_i for any w > 0. For rows of outputs A_t = K_t^T, and d are multiples of the strides; for rows of
    inputs A_t = K_t and d any, as if the strides were 1, which only adds outputs.
    Rounding: an entry of C_d is a sum of L = kh kw m products, so that all C_d together err by gamma_L S S^T entry by
    entry, S = sum_t |A_t|; what follows adds, multiplies and divides numbers that are not negative.
    """
    side = details.get("rows")
    need(side in ("inputs", "outputs"), f"rows {side!r} are neither those of inputs nor of outputs")
    if not kernel.any():
        return limit >= 0
    kernel, exponent = scaled(kernel)
    taps = kernel if side == "inputs" else kernel.swapaxes(2, 3)
    steps = (1, 1) if side == "inputs" else steps
    kh, kw, n, m = taps.shape
    pairs: dict[tuple[int, int], list] = {}
    for t1, t2, r1, r2 in np.ndindex(kh, kw, kh, kw):
        lag = r1 - t1, r2 - t2
        if lag >= (0, 0) and lag[0] % steps[0] == 0 and lag[1] % steps[1] == 0:
            pairs.setdefault(lag, []).append(((t1, t2), (r1, r2)))
    total, size = np.zeros((n, n)), np.abs(taps).sum(axis=(0, 1))

    def of_lag(lag: tuple[int, int]) -> np.ndarray:
        found = np.zeros((n, n))
        for first, second in pairs[lag]:
            found += taps[first] @ taps[second].T
        return np.abs(found)

    for lag, moduli in zip(pairs, in_threads(of_lag, pairs, 3 * len(pairs) * n * n + 2 * taps.size), strict=True):
        total += moduli if lag == (0, 0) else moduli + moduli.T
    # Any weights prove something. These near a Perron vector, from which the diagonal's common part is no way off.
    weights = np.ones(n)
    best, chosen = math.inf, weights
    for _ in range(PERRON_STEPS):
        image = total @ weights
        ratios = image / weights
        if ratios.max() < best:
            best, chosen = float(ratios.max()), weights
        if ratios.max() - ratios.min() <= 2.0**-43 * ratios.max():
            break
        weights = image - float(total.diagonal().min()) * weights
        weights = np.maximum(weights / max(float(weights.max()), 2.0**-500), 2.0**-60)
    error = rounding(kh * kw * m + 4) * (size @ (size.T @ chosen))
    top = float(((total @ chosen + error) / chosen).max())
    if not math.isfinite(top):
        return False
    roundings = 3 * len(pairs) + kh * kw + 2 * n + m + 16
    return Fraction(top) / (1 - gamma(roundings)) + TINY <= (limit / Fraction(2) ** exponent) ** 2


def row_sums_effort(shape: tuple, details: dict) -> tuple[int | float, int | float]:
    """About how many multiplications `row_sums_below` takes for a kernel of this shape, and numbers it holds."""
    kh, kw, c, o = shape
    n, m = (c, o) if details.get("rows") == "inputs" else (o, c)
    taps, lags = kh * kw, 2.0 * kh * kw
    work = taps * (taps + 1) / 2 * (float(n) * n * m + PASS * n * n + CALL) + 3 * lags * PASS * n**2
    return work + taps**2 * CALL + PERRON_STEPS * (float(n) * n * 4 + CALL), 3.0 * taps * n * m + 4.0 * lags * n * n


def conv_effort(shape: tuple, axes: tuple[Axis, Axis], method: str, details: dict) -> tuple[int | float, int | float]:
    """About how many multiplications `conv_below` takes for a kernel of this shape, and numbers it holds at once."""
    rows, columns = axes
    kh, kw, c, o = shape
    if method == ROW_SUMS:
        return row_sums_effort(shape, details)
    if method == DENSE:
        side, width = rows.size * columns.size * c, columns.size * c
        pairs, inside = kh * min(kh, rows.size), min(kh, rows.size)
        work = pairs * columns.out * o * width**2 + rows.out * inside**2 * width**2 * PASS + side**3
        work += kh * kw * columns.out * CALL
        return work, kh * columns.out * o * width + pairs * width**2 + 5 * side**2
    steps, used = [axis.stride for axis in axes], [axis.used for axis in axes]
    if method == EVERYWHERE:
        used = [range(axis.taps) for axis in axes]
    blocks = math.prod(
        len({(t - axis.low) // axis.stride for t in taps}) for axis, taps in zip(axes, used, strict=True)
    )
    n = math.prod(steps) * c
    count = blocks * o * n
    work, numbers = kh * kw * CALL + blocks * CALL, 3.0 * count
    if method == EVERYWHERE:
        side, lags = min(o, n), 2 * blocks
        work += lags * (8 * CALL + 8 * FRACTION) + blocks * (blocks + 1) / 2 * (float(o) * n * side + 2 * PASS * o * n)
        return work + lags * 12.0 * PASS * side**2, numbers + 2.0 * count + 4.0 * side**2
    grid: Any = details.get("grid")
    sides = [g if type(g) is int and 0 < g < 2**31 else 1 for g in grid[:2]] if isinstance(grid, list) else [1]
    sides = [min(g, 4 * (axis.out + axis.size + axis.taps)) for g, axis in zip(sides, axes, strict=False)]
    frequencies = math.prod(sides) // 2 + 2
    work += sum(sides) * 2 * ANGLE + frequencies * (blocks * 20 * PASS + 2 * count + MATRIX)
    work += frequencies * matrix_effort(o, n, 4)[0]
    return work, numbers + 12.0 * frequencies + 12.0 * max(o * n, blocks)


def dense_conv_below(kernel: np.ndarray, axes: tuple[Axis, Axis], limit: Fraction) -> bool:
    """As `conv_below` by the Gram matrix of the dense operator T, of all inputs. kernel: scaled.

    T consists of blocks M_t that take a row of the image to a row of the output, t a row of the kernel; so T^T T
    consists of sums of at most kh products M_t^T M_t', whose entries are sums of at most kw o products: the error is at
    most gamma_(kw o + kh) |T|^T |T| entry by entry, and | |T| |^2 at most the largest sum of a row times that of a
    column, and at most (sum_t |K_t|_F)^2.
    """
    rows, columns = axes
    kh, kw, c, o = kernel.shape
    side, width = rows.size * columns.size * c, columns.size * c
    if rows.circular or side > 8192:
        raise Unproved("the dense operator is taken for zero padding and up to 8192 inputs")
    maps = np.zeros((kh, columns.out, o, columns.size, c))
    for i in range(columns.out):
        for t in range(kw):
            place = columns.stride * i + t - columns.low
            if 0 <= place < columns.size:
                maps[:, i, :, place] = kernel[:, t].swapaxes(1, 2)
    maps = maps.reshape(kh, -1, width)
    products: dict[tuple[int, int], np.ndarray] = {}
    gram = np.zeros((rows.size, width, rows.size, width))
    for i in range(rows.out):
        start = rows.stride * i - rows.low
        inside = [t for t in range(kh) if 0 <= start + t < rows.size]
        for t in inside:
            for r in inside:
                if r <= t:  # the lower triangle
                    if (t, r) not in products:
                        products[t, r] = maps[t].T @ maps[r]
                    gram[start + t, :, start + r] += products[t, r]
    sums = [
        Fraction(float(np.abs(kernel).sum(axis).max())) * (1 + gamma(kernel.size)) for axis in ((0, 1, 2), (0, 1, 3))
    ]
    taps = sum((root_up(squares_up(tap)) for row in kernel for tap in row), Fraction(0))
    error = gamma(kw * o + kh + 2) * min(sums[0] * sums[1], taps**2) + TINY
    return is_below(gram.reshape(1, side, side), error, limit**2)


# ---------------------------------------------------------------------------------------------------------------------
# Truncated exponential of a skew convolution (§9)


def series_below(num_terms: int, norm: Fraction, limit: Fraction) -> bool:
    """True if |S_p(i theta)| <= limit is proved for 0 <= theta <= norm, S_p the truncated exponential (§9).

    limit^2 - |S_p|^2 is a polynomial in theta^2 with rational coefficients. On an interval it is not negative where its
    Bernstein coefficients are not; where they are, the interval is halved. All exact, in integers.
    """
    cosine = [
        Fraction((-1) ** (j // 2), math.factorial(j)) if j % 2 == 0 else Fraction(0) for j in range(num_terms + 1)
    ]
    sine = [Fraction((-1) ** (j // 2), math.factorial(j)) if j % 2 else Fraction(0) for j in range(num_terms + 1)]
    gap = [Fraction(0)] * (num_terms + 1)
    gap[0] = limit**2
    for part in (cosine, sine):
        for i, first in enumerate(part):
            for j, second in enumerate(part):
                if first and second:
                    gap[(i + j) // 2] -= first * second
    if norm == 0:
        return limit >= 1
    end = max(norm, Fraction(1, 2**60)) ** 2
    degree = num_terms
    on_unit = [a * end**k for k, a in enumerate(gap)]
    row = [
        sum((Fraction(math.comb(i, k), math.comb(degree, k)) * on_unit[k] for k in range(i + 1)), Fraction(0))
        for i in range(degree + 1)
    ]
    scale = math.lcm(*(a.denominator for a in row))
    pieces = [[a.numerator * (scale // a.denominator) for a in row]]
    words = 0
    while words < SERIES_WORDS:
        if not pieces:
            return True
        row = pieces.pop()
        words += (degree + 1) ** 2 * (1 + max(map(int.bit_length, row)) // 64)
        if min(row) >= 0:
            continue
        if row[0] < 0 or row[-1] < 0:  # values that the polynomial takes
            return False
        left, right = [], []
        for level in range(degree + 1):
            left.append(row[0] << (degree - level))
            right.append(row[-1] << (degree - level))
            row = [a + b for a, b in zip(row, row[1:], strict=False)]
        pieces += [left, right[::-1]]
    return False


# ---------------------------------------------------------------------------------------------------------------------
# Functions without a stated error in NumPy, made of basic operations (§11.4)


@functools.cache
def _exponentials() -> np.ndarray:
    with decimal.localcontext(decimal.Context(prec=50)):
        return np.array([float((decimal.Decimal(-k) / 8).exp()) for k in range(320)])


def exp_minus(t: np.ndarray) -> np.ndarray:
    """exp(-t) for t >= 0 within 4 u exp(-t) + u / 26: a table of exp(-k / 8) times ten terms of the series."""
    near = np.where(t < 40, t, 0.0)
    k = np.floor(8 * near)
    rest = near - k / 8
    series = np.full_like(rest, 1 / math.factorial(10))
    for j in range(9, -1, -1):
        series = (-1) ** j / math.factorial(j) + rest * series
    value = np.where(t < 40, _exponentials()[k.astype(int)] * series, 0.0)
    return np.where(np.isnan(t), np.nan, value)


def softplus(x: np.ndarray) -> np.ndarray:
    """log(1 + exp(x)) within (16 + 2 value) u."""
    y = exp_minus(np.abs(x))
    v = y / (2 + y)
    square = v * v
    series = np.full_like(v, 1 / 33)
    for j in range(15, -1, -1):
        series = 1 / (2 * j + 1) + square * series
    return np.maximum(x, 0.0) + 2 * v * series


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) within 8 u."""
    y = exp_minus(np.abs(x))
    return np.where(x >= 0, 1.0, y) / (1 + y)


def tanh(x: np.ndarray) -> np.ndarray:
    """tanh within 12 u."""
    y = exp_minus(2 * np.abs(x))
    return np.copysign((1 - y) / (1 + y), x)


def softplus_error(value: np.ndarray) -> np.ndarray:
    return (16 + 2 * value) * 2.0**-53


# ---------------------------------------------------------------------------------------------------------------------
# Operators: each checks its fields, proves a claimed Lipschitz constant, evaluates, and bounds its rounding
# (§4 to §7, §9, §10, §10a). A new one is one class, put into OPERATORS


def is_shape(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(n) is int and 1 <= n <= 2**24 for n in value)


class Operator:
    """An operator on batches. Unless a subclass says otherwise it is 1-Lipschitz, keeps shapes and does not round."""

    arrays: tuple[str, ...] = ()
    settings: tuple[str, ...] = ("in_shape",)
    optional: dict[str, Any] = {}  # settings that files may leave out, and what they are then
    several: tuple[str, ...] = ()  # settings that hold a list of operators
    single: tuple[str, ...] = ()  # and those that hold one
    called = "another"  # in messages: an operator that cannot stand in ...
    # What a certificate may call its proof: another name would say something else of the operator than is proved.
    methods: tuple[str, ...] = ("exact: a reordering",)
    # LipLT takes linear maps, translations and `Elementwise` activations, and refuses all others (§12).
    linear = translation = False
    # True if the operator only gives images another shape, without moving a number.
    only_reshapes = False

    in_shape: tuple[int, ...]
    claim: Fraction  # the Lipschitz constant that its certificate states; 0 until then

    def __init__(self, fields: dict[str, Any]):
        for name, value in (self.optional | fields).items():
            setattr(self, name, value)
        if "in_shape" in self.settings:
            if not is_shape(self.in_shape):
                raise Unproved(f"in_shape {self.in_shape!r} is not a shape")
            self.in_shape = tuple(self.in_shape)
            need(math.prod(self.in_shape) <= TERMS, f"{self.in_shape} has more than {TERMS:,} numbers")
        self.claim = Fraction(0)
        self.prepare()
        need(math.prod(self.out_shape) <= TERMS, f"{self.out_shape} has more than {TERMS:,} numbers")

    @classmethod
    def may_hold(cls, kind: str) -> bool:
        """True if an operator of that type may stand in a field of this one."""
        return False

    @classmethod
    def make_parts(cls, settings: dict[str, Any], prefix: str, arrays: "Arrays") -> dict[str, Any]:
        """The fields that hold operators, made of their entries. Raises: Unproved."""
        found: dict[str, Any] = {}
        for name in (*cls.several, *cls.single):
            entries, places = [settings[name]], [f"{prefix}/{name}"]
            if name in cls.several:
                entries = settings[name]
                need(isinstance(entries, list), f"{name} is no list of operators")
                places = [f"{prefix}/{i}" for i in range(len(entries))]
            for entry in entries:
                kind = entry.get("type") if isinstance(entry, dict) else None
                fine = isinstance(entry, dict) and not (isinstance(kind, str) and not cls.may_hold(kind))
                need(fine, f"an operator that cannot stand in {cls.called}")
            made = [make_operator(entry, place, arrays) for entry, place in zip(entries, places, strict=True)]
            found[name] = made if name in cls.several else made[0]
        return found

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.in_shape

    def prepare(self) -> None:
        """Raises: Unproved where a field is not what the operator needs."""

    def proves(self, claim: Fraction, method: str, details: dict) -> bool:
        """True if the claimed Lipschitz constant is proved."""
        return claim >= 1

    def named(self, method: Any) -> str:
        """The stated method. Raises: Unproved if it is none by which such an operator is bounded."""
        known = self.known_methods()
        need(method in known, f"the method {method!r} is none for it: {' | '.join(known)}")
        need(method != ZERO or self.is_zero(), "the method is that of a zero operator, which it is not")
        return method

    def known_methods(self) -> tuple[str, ...]:
        """The names that a certificate may give its proof."""
        return self.methods

    def is_zero(self) -> bool:
        """True if the linear part is zero for its arrays."""
        return not any(getattr(self, name).any() for name in self.arrays)

    def cost(self) -> int | float:
        """About how many multiplications `evaluate`, `apply` or `back` take for one input."""
        return 4.0 * PASS * (math.prod(self.in_shape) + math.prod(self.out_shape))

    def effort(self, method: Any, details: Any) -> tuple[int | float, int | float]:
        """About how many multiplications `proves` takes, and how many numbers it or `apply` hold at once."""
        return CALL, 0.0

    def apply(self, x: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def back(self, y: np.ndarray) -> np.ndarray:
        """The adjoint of a linear operator whose `spread` is not None."""
        raise NotImplementedError

    def spread(self) -> float | None:
        """For a linear operator gamma | |A| |: the computed A x and A^T y are off by that times |x| or |y| (§12.2)."""
        return None

    def local(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Bound (b,) on |computed - exact value at the stored x|, but for underflow. y: the computed value."""
        return np.zeros(len(x))

    def evaluate(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The computed value, and its `local`."""
        y = self.apply(x)
        return y, self.local(x, y)


def fits(array: np.ndarray) -> bool:
    """True if entries are 0 or between 2^-100 and 2^100, so that no composition underflows or overflows (§12.2)."""
    sizes = np.abs(array[array != 0])
    return not sizes.size or bool(sizes.max() <= 2.0**100 and sizes.min() >= 2.0**-100)


def need(condition: bool, message: str) -> None:
    if not condition:
        raise Unproved(message)


class Normalize(Operator):
    """(x - mean) / std, channel by channel: the first of all."""

    arrays = ("mean", "std")
    methods = ("exact: 1 / min(input_std)",)
    mean: np.ndarray
    std: np.ndarray

    def prepare(self):
        allowed = ((1,), (self.in_shape[-1],))
        need(self.mean.shape in allowed and self.std.shape in allowed, "input_mean or input_std has another shape")
        need(bool((self.std > 0).all()), "input_std is not positive")

    def proves(self, claim, method, details):
        return claim * Fraction(float(self.std.min())) >= 1

    def apply(self, x):
        return (x - self.mean) / self.std

    def local(self, x, y):
        return rounding(3) * GUARD * lengths(y)


class Bias(Operator):
    """x + bias, channel by channel."""

    arrays = ("bias",)
    methods = ("exact: a translation",)
    translation = True
    bias: np.ndarray

    def prepare(self):
        # A bias of another length would broadcast, and copying an input is no translation.
        need(self.bias.shape == self.in_shape[-1:], f"a bias of shape {self.bias.shape} for inputs {self.in_shape}")

    def apply(self, x):
        return x + self.bias

    def local(self, x, y):
        return 2.0**-53 * GUARD * lengths(y)


class PositionalBias(Bias):
    """x + bias, one number for all channels of a pixel."""

    def prepare(self):
        wanted = (*self.in_shape[:2], 1)
        need(len(self.in_shape) == 3 and self.bias.shape == wanted, f"a bias of shape {self.bias.shape}")


class Dense(Operator):
    """A matrix (o, i) on vectors."""

    arrays, settings = ("matrix",), ()
    methods = (ZERO, "Cholesky of the Gram matrix", ROW_SUMS)
    linear = True
    matrix: np.ndarray
    size: np.ndarray  # the moduli of its transpose

    def prepare(self):
        need(self.matrix.ndim == 2 and self.matrix.size > 0, f"a matrix of shape {self.matrix.shape}")
        self.in_shape = self.matrix.shape[1:]
        self.size = np.abs(self.matrix).T.copy()

    @property
    def out_shape(self):
        return self.matrix.shape[:1]

    def proves(self, claim, method, details):
        if method == ROW_SUMS:
            return row_sums_below(self.matrix.T[None, None], (1, 1), details, claim)
        return matrix_below(self.matrix, claim)

    def cost(self):
        return 2.0 * self.matrix.size + super().cost()

    def effort(self, method, details):
        if method == ROW_SUMS:
            return row_sums_effort((1, 1, *self.matrix.shape[::-1]), details)
        return matrix_effort(*self.matrix.shape)

    def apply(self, x):
        return x @ self.matrix.T

    def back(self, y):
        return y @ self.matrix

    def local_back(self, y):
        return rounding(self.matrix.shape[0]) * GUARD * lengths(np.abs(y) @ self.size.T)

    def columns(self, start, stop):
        return Dense({"matrix": self.matrix[:, start:stop]})

    def spread(self):
        sums = [float(self.size.sum(axis).max()) for axis in (0, 1)]
        return (
            float(rounding(max(self.matrix.shape))) * math.sqrt(sums[0] * sums[1]) * GUARD
            if fits(self.matrix)
            else None
        )

    def local(self, x, y):
        return rounding(self.matrix.shape[1]) * GUARD * lengths(np.abs(x) @ self.size)


class Conv(Operator):
    """A convolution with a kernel HWIO (§2, §3)."""

    arrays, settings = ("kernel",), ("in_shape", "strides", "padding")
    optional = {"groups": 1, "dilation": 1}
    methods = (ZERO, ONLY_TAP, DENSE, PER_FREQUENCY, EVERYWHERE, ROW_SUMS, GROUPS)
    linear = True
    kernel: np.ndarray
    strides: Any  # JSON values
    padding: Any
    groups: Any
    dilation: Any
    group_kernels: list[np.ndarray]  # kernels of the groups, with zeros between their taps
    axes: tuple[Axis, Axis]

    def prepare(self):
        need(
            len(self.in_shape) == 3 and self.kernel.ndim == 4 and self.kernel.size > 0, "expected images and HWIO taps"
        )
        if self.groups == 1:
            need(self.kernel.shape[2] == self.in_shape[2], f"a kernel {self.kernel.shape} for images {self.in_shape}")
        self.group_kernels = kernels_of_groups(self.kernel, self.in_shape[2], self.groups, self.dilation)
        steps = [self.strides] * 2 if type(self.strides) is int else self.strides
        need(is_shape(steps) and len(steps) == 2, f"strides {self.strides!r}")
        self.axes = conv_axes(self.group_kernels[0], self.in_shape, steps, self.padding)

    @property
    def out_shape(self):
        return (self.axes[0].out, self.axes[1].out, self.kernel.shape[3])

    def full(self) -> np.ndarray:
        """The kernel of the same map with one group: zeros between groups."""
        (h, w, inner, outer), groups = self.group_kernels[0].shape, len(self.group_kernels)
        kernel = np.zeros((h, w, inner * groups, outer * groups))
        for g, part in enumerate(self.group_kernels):
            kernel[:, :, g * inner : (g + 1) * inner, g * outer : (g + 1) * outer] = part
        return kernel

    def proves(self, claim, method, details):
        return groups_below(self.group_kernels, self.axes, method, details, claim)

    def is_zero(self):
        return not any(met_taps(part, self.axes).any() for part in self.group_kernels)

    def cost(self):
        return 2 * sum(conv_cost(part, self.axes) for part in self.group_kernels) + super().cost()

    def effort(self, method, details):
        return groups_effort(self.group_kernels, self.axes, method, details)

    def apply(self, x):
        return by_groups(convolve, x, self.group_kernels, self.axes)

    def back(self, y):
        return by_groups(convolve_back, y, self.group_kernels, self.axes)

    def local_back(self, y):
        # A number of the result adds up a product for each tap and output channel of its group, at most.
        sizes = [np.abs(part) for part in self.group_kernels]
        terms = math.prod(self.kernel.shape[:2]) * sizes[0].shape[3]
        return rounding(terms) * GUARD * lengths(by_groups(convolve_back, np.abs(y), sizes, self.axes))

    def columns(self, start, stop):
        need(self.groups == 1, "columns of a convolution with groups")
        kernel = np.ascontiguousarray(self.kernel[:, :, start:stop])
        fields = {name: getattr(self, name) for name in ("strides", "padding", "dilation")}
        return Conv({"kernel": kernel, "in_shape": [*self.in_shape[:2], kernel.shape[2]], **fields})

    def spread(self):
        # An output reads every tap at most once, and so an input meets every tap at most once.
        sums = [
            max(float(np.abs(part).sum(axis).max()) for part in self.group_kernels) for axis in ((0, 1, 2), (0, 1, 3))
        ]
        terms = math.prod(self.kernel.shape[:2]) * max(self.group_kernels[0].shape[2:])
        return rounding(terms) * math.sqrt(sums[0] * sums[1]) * GUARD if fits(self.kernel) else None

    def local(self, x, y):
        terms, sizes = math.prod(self.kernel.shape[:3]), [np.abs(part) for part in self.group_kernels]
        return rounding(terms) * GUARD * lengths(by_groups(convolve, np.abs(x), sizes, self.axes))


class ConvTranspose(Operator):
    """The adjoint of a convolution: of the same norm (§2)."""

    settings, single, called = ("conv",), ("conv",), "a transposed convolution"
    linear = True
    conv: Conv

    @classmethod
    def may_hold(cls, kind):
        return kind == Conv.__name__

    def prepare(self):
        need(type(self.conv) is Conv, "expected a convolution")
        self.in_shape = tuple(self.conv.out_shape)

    @property
    def out_shape(self):
        return self.conv.in_shape

    def proves(self, claim, method, details):
        return self.conv.proves(claim, method, details)

    def named(self, method):
        return self.conv.named(method)

    def cost(self):
        return self.conv.cost()

    def effort(self, method, details):
        return self.conv.effort(method, details)

    def apply(self, x):
        return self.conv.back(x)

    def back(self, y):
        return self.conv.apply(y)

    def spread(self):
        return self.conv.spread()

    def local(self, x, y):
        return self.conv.local_back(x)


class ConvExponential(Operator):
    """S_p(J) x = sum_(k <= p) J^k x / k!, J the convolution of stride 1 with a skew kernel (§9)."""

    arrays = ("kernel",)
    settings = ("in_shape", "num_terms", "padding", "nonexpansive", "fast_gradient")
    optional = {"groups": 1}
    methods = ("supremum of the truncated exponential on the imaginary axis",)
    linear = True
    kernel: np.ndarray
    num_terms: Any  # JSON values
    padding: Any
    groups: Any
    group_kernels: list[np.ndarray]  # kernels of the groups
    axes: tuple[Axis, Axis]
    norm: float  # proved of J; infinite until then

    def prepare(self):
        need(
            type(self.num_terms) is int and 1 <= self.num_terms <= 64,
            f"num_terms {self.num_terms!r} is none of 1 ... 64",
        )
        need(self.padding in ("ZERO", "CIRCULAR"), f"padding {self.padding!r}")
        c, shape = self.in_shape[-1], self.kernel.shape
        fits = len(self.in_shape) == 3 and len(shape) == 4 and shape[3] == c and all(k % 2 for k in shape[:2])
        need(fits and 0 < self.kernel.size <= TERMS, f"a kernel {shape} for images {self.in_shape}")
        self.group_kernels = kernels_of_groups(self.kernel, c, self.groups)
        # Bit for bit, so that J^T = -J holds exactly; of each group, which has channels of its own.
        for part in self.group_kernels:
            need(bool((part == -part[::-1, ::-1].swapaxes(2, 3)).all()), "the kernel is not skew bit for bit")
        self.axes = conv_axes(self.group_kernels[0], self.in_shape, [1, 1], self.padding)
        self.norm = math.inf

    def proves(self, claim, method, details):
        norm = finite(details.get("skew_norm"), "skew_norm")
        need(details.get("num_terms") == self.num_terms, "num_terms of the details is another")
        kh, kw, c, _ = self.kernel.shape
        need(norm <= 2.0**100, f"skew_norm {norm!r} is beyond 2^100")
        self.norm, exact, by = norm, Fraction(norm), details.get("skew_norm_method")
        # |J| <= sqrt(kh kw) |K| for K reshaped in one of two ways (§9), compared by squares; of every group.
        limit = exact / root_up(Fraction(kh * kw))
        if by == RESHAPED.format("(kh kw i, o)"):
            proved = all(matrix_below(part.reshape(-1, c), limit) for part in self.group_kernels)
        elif by == RESHAPED.format("(kh o, kw i)"):
            turned = (part.transpose(0, 3, 1, 2).reshape(kh * c, kw * c) for part in self.group_kernels)
            proved = all(matrix_below(matrix, limit) for matrix in turned)
        else:
            zero = not any(met_taps(part, self.axes).any() for part in self.group_kernels)
            need(by != ZERO or zero, "skew_norm_method is that of a zero kernel, which it is not")
            proved = groups_below(self.group_kernels, self.axes, str(by), details, exact)
        need(proved, f"|J| <= {norm!r} (skew_norm) cannot be proved")
        return series_below(self.num_terms, exact, claim)

    def cost(self):
        return self.num_terms * (sum(conv_cost(part, self.axes) for part in self.group_kernels) + super().cost())

    def effort(self, method, details):
        kh, kw, c, _ = self.kernel.shape
        by = str(details.get("skew_norm_method"))
        work = SERIES_WORDS * PASS / 4
        if by in (PER_FREQUENCY, ONLY_TAP, DENSE, EVERYWHERE, ROW_SUMS, GROUPS):
            found = groups_effort(self.group_kernels, self.axes, by, details)
        else:
            found = matrix_effort(kh * c, kw * c)
            found = len(self.group_kernels) * found[0], found[1]
        return found[0] + work, found[1]

    def apply(self, x):
        total = x
        for k in range(self.num_terms, 0, -1):
            total = x + by_groups(convolve, total, self.group_kernels, self.axes) / k
        return total

    def local(self, x, y):
        kh, kw, c, _ = self.kernel.shape
        size = math.sqrt(kh * kw) * float(np.linalg.norm(self.kernel.reshape(-1))) * GUARD
        local, length, error = rounding(kh * kw * c + 4), 1.0, 0.0
        for k in range(self.num_terms, 0, -1):
            error = (self.norm / k * error + local * (1 + size * (length + error) / k)) * GUARD
            length = (1 + self.norm / k * length) * GUARD
        return error * GUARD * (lengths(x) + FLOOR)


class CircularConv(Operator):
    """T^T B T: an orthonormal Fourier transform and a block for each frequency (§4)."""

    arrays, settings = ("fixed", "paired"), ("in_shape", "nonexpansive")
    methods = (ZERO, "distance of R^H R from the identity, per frequency", "Cholesky per frequency of the response")
    linear = True
    fixed: np.ndarray  # real blocks, of the frequencies that are their own mirror images
    paired: np.ndarray  # real and imaginary parts of the blocks of one of each pair of frequencies
    fixed_at: list[tuple[int, int]]
    paired_at: list[tuple[int, int]]
    mirrored: int
    blocks: np.ndarray  # those paired, complex

    def prepare(self):
        need(len(self.in_shape) == 3 and self.fixed.ndim == 3, "expected images (h, w, c) and blocks")
        h, w, c = self.in_shape
        special = [[0] if n % 2 else [0, n // 2] for n in (h, w)]
        r = len(special[0]) * len(special[1])
        shapes = (r, self.fixed.shape[1], c), ((h * w - r) // 2, 2, self.fixed.shape[1], c)
        need(
            0 < self.fixed.size <= r * TERMS and (self.fixed.shape, self.paired.shape) == shapes,
            f"blocks of other shapes than {shapes}, or of more than {TERMS:,} numbers each",
        )
        # One of each pair +-f: first those of the columns that are their own mirror image, then column by column.
        self.fixed_at = [(f1, f2) for f2 in special[1] for f1 in special[0]]
        self.paired_at = [(f1, f2) for f2 in special[1] for f1 in range(1, (h + 1) // 2)]
        self.mirrored = len(self.paired_at)
        self.paired_at += [(f1, f2) for f2 in range(1, (w + 1) // 2) for f1 in range(h)]
        self.blocks = self.paired[:, 0] + 1j * self.paired[:, 1]

    @property
    def out_shape(self):
        return (*self.in_shape[:2], self.fixed.shape[1])

    def proves(self, claim, method, details):
        largest = max(float(np.abs(self.fixed).max()), float(np.abs(self.paired).max(initial=0.0)))
        if not largest:
            return claim >= 0
        exponent = math.frexp(largest)[1]
        limit = claim / Fraction(2) ** exponent
        complex_parts = np.ldexp(self.paired, -exponent)
        pairs = complex_parts[:, 0] + 1j * complex_parts[:, 1]
        size = max(1, CHUNK // (2 * self.fixed[0].size))
        parts = [np.ldexp(self.fixed, -exponent)] + [
            pairs[start : start + size] for start in range(0, len(pairs), size)
        ]
        return all(in_threads(lambda part: norms_below(part, limit), parts, 12 * size * self.fixed[0].size))

    def cost(self):
        (h, w, c), o = self.in_shape, self.fixed.shape[1]
        return 6.0 * h * w * (h + w) * (c + o) + 4.0 * h * w * c * o + 4 * PASS * (h**2 + w**2) + super().cost()

    def effort(self, method, details):
        (h, w, c), o = self.in_shape, self.fixed.shape[1]
        blocks = h * w // 2 + 2
        work = blocks * (matrix_effort(o, c, 4)[0] + MATRIX) + 2.0 * (h + w) * ANGLE
        return work, 8.0 * (h**2 + w**2) + 4.0 * self.paired.size + 12.0 * o * c

    def apply(self, x):
        b, (h, w, _), half = len(x), self.in_shape, self.in_shape[1] // 2 + 1
        (c1, s1), (c2, s2) = _circle(h, h), _circle(w, w)
        rows = 2 * np.outer(np.arange(h), np.arange(h)) % (2 * h)
        columns = 2 * np.outer(np.arange(half), np.arange(w)) % (2 * w)
        # The unitary transform with exp(-2 pi i f p / n), along the rows, then down the columns.
        flat = x.transpose(2, 0, 1, 3).reshape(w, -1)
        z = (c2[columns] @ flat) - 1j * (s2[columns] @ flat)
        z = z.reshape(half, b, h, -1).transpose(2, 0, 1, 3).reshape(h, -1)
        z = ((c1[rows] - 1j * s1[rows]) @ z).reshape(h, half, b, -1)
        y = np.zeros((h, half, b, self.fixed.shape[1]), complex)
        fixed, paired = (np.array(at, int).reshape(-1, 2).T for at in (self.fixed_at, self.paired_at))
        y[fixed[0], fixed[1]] = z[fixed[0], fixed[1]].real @ self.fixed.swapaxes(1, 2)
        found = z[paired[0], paired[1]] @ self.blocks.swapaxes(1, 2)
        y[paired[0], paired[1]] = found
        mirror = -paired[0][: self.mirrored] % h
        y[mirror, paired[1][: self.mirrored]] = found[: self.mirrored].conj()
        # Back: the columns, and the rows with their mirror images, which double all but the special ones.
        y = ((c1[rows] + 1j * s1[rows]) @ y.reshape(h, -1)).reshape(h, half, b, -1)
        y = y.transpose(1, 2, 0, 3).reshape(half, -1)
        weight = np.where(np.isin(np.arange(half), [f2 for _, f2 in self.fixed_at]), 1.0, 2.0)
        image = (weight[:, None] * c2[columns]).T @ y.real - (weight[:, None] * s2[columns]).T @ y.imag
        return np.ascontiguousarray(image.reshape(w, b, h, -1).transpose(1, 2, 0, 3))

    def local(self, x, y):
        h, w, c = self.in_shape
        # A real transform of n pixels is one of Frobenius norm sqrt(n); a complex one, in real numbers, of sqrt(2 n).
        # Each entry is rounded once, and each product and sum: gamma_(n+1) and gamma_(2n+1) (§4b).
        along, down = rounding(w + 3) * math.sqrt(w), rounding(2 * h + 1) * math.sqrt(2 * h)
        transform = (along + down + along * down) * GUARD
        squares = np.sum(self.fixed**2, axis=(1, 2)).max(), 2 * np.sum(self.paired**2, axis=(1, 2, 3)).max(initial=0.0)
        products = rounding(2 * c + 2)
        relative = ((2 * transform + transform**2) * (1 + products) + products) * GUARD
        return relative * GUARD * math.sqrt(float(max(squares))) * lengths(x)

    def adjoint(self):
        blocks = {"fixed": self.fixed.swapaxes(1, 2), "paired": self.paired.swapaxes(2, 3) * [[[1]], [[-1]]]}
        return CircularConv({**blocks, "in_shape": list(self.out_shape), "nonexpansive": False})

    def back(self, y):
        return self.adjoint().apply(y)

    def local_back(self, y):
        return self.adjoint().local(y, y)

    def columns(self, start, stop):
        blocks = {"fixed": self.fixed[..., start:stop], "paired": self.paired[..., start:stop]}
        shape = [*self.in_shape[:2], blocks["fixed"].shape[2]]
        return CircularConv({**blocks, "in_shape": shape, "nonexpansive": False})


class Flatten(Operator):
    """Images as vectors."""

    linear = True
    only_reshapes = True

    @property
    def out_shape(self):
        return (math.prod(self.in_shape),)

    def apply(self, x):
        return x.reshape(len(x), -1)

    def back(self, y):
        return y.reshape(len(y), *self.in_shape)

    def spread(self):
        return 0.0


class SpaceToDepth(Operator):
    """Squares of pixels as channels."""

    settings = ("in_shape", "block")
    linear = True
    block: Any  # a JSON value

    def prepare(self):
        need(len(self.in_shape) == 3 and type(self.block) is int and self.block >= 1, f"block {self.block!r}")
        need(not any(n % self.block for n in self.in_shape[:2]), f"blocks of {self.block} on images {self.in_shape}")

    @property
    def out_shape(self):
        h, w, c = self.in_shape
        return (h // self.block, w // self.block, c * self.block**2)

    def apply(self, x):
        h, w, c = self.out_shape
        k = self.block
        return x.reshape(len(x), h, k, w, k, -1).transpose(0, 1, 3, 5, 2, 4).reshape(len(x), h, w, c)

    def back(self, y):
        h, w, _ = self.out_shape
        k = self.block
        return y.reshape(len(y), h, w, -1, k, k).transpose(0, 1, 4, 2, 5, 3).reshape(len(y), *self.in_shape)

    def spread(self):
        return 0.0


class ChannelShuffle(Operator):
    """Channels, or pairs of neighbouring ones, dealt out to groups in turn."""

    settings = ("in_shape", "groups", "paired")
    linear = True
    groups: Any  # JSON values
    paired: Any
    order: np.ndarray  # which input each output is

    def prepare(self):
        need(type(self.groups) is int and self.groups >= 1 and type(self.paired) is bool, f"groups {self.groups!r}")
        channels, together = self.in_shape[-1], 1 + self.paired
        need(
            channels % (together * self.groups) == 0, f"{channels} channels, paired {self.paired}, {self.groups} groups"
        )
        dealt = np.arange(channels).reshape(-1, self.groups, together)
        self.order = np.concatenate([dealt[:, g].ravel() for g in range(self.groups)])

    def apply(self, x):
        return x[..., self.order]

    def back(self, y):
        found = np.empty_like(y)
        found[..., self.order] = y
        return found

    def spread(self):
        return 0.0


class PadChannels(Operator):
    """Channels of zeros appended."""

    settings = ("in_shape", "channels")
    methods = ("exact: zeros appended",)
    linear = True
    channels: Any  # a JSON value

    def prepare(self):
        need(type(self.channels) is int and self.in_shape[-1] <= self.channels < 2**31, f"channels {self.channels!r}")

    @property
    def out_shape(self):
        return (*self.in_shape[:-1], self.channels)

    def apply(self, x):
        return np.concatenate([x, np.zeros((*x.shape[:-1], self.channels - x.shape[-1]))], axis=-1)

    def back(self, y):
        return np.ascontiguousarray(y[..., : self.in_shape[-1]])

    def spread(self):
        return 0.0


class Shift(Operator):
    """Four groups of channels moved by one pixel, circularly: up, down, left, right. The other channels stay."""

    settings = ("in_shape", "channels")
    linear = True
    channels: Any  # of each group, a JSON value

    def prepare(self):
        need(len(self.in_shape) == 3 and type(self.channels) is int, f"channels {self.channels!r}")
        need(
            1 <= self.channels <= self.in_shape[-1] // 4, f"four times {self.channels} of {self.in_shape[-1]} channels"
        )

    def moved(self, x: np.ndarray, step: int) -> np.ndarray:
        found, n = x.copy(), self.channels
        for i, (sign, axis) in enumerate(((1, 1), (-1, 1), (1, 2), (-1, 2))):
            found[..., i * n : (i + 1) * n] = np.roll(x[..., i * n : (i + 1) * n], sign * step, axis)
        return found

    def apply(self, x):
        return self.moved(x, -1)

    def back(self, y):
        return self.moved(y, 1)

    def spread(self):
        return 0.0


class L2Pool(Operator):
    """sqrt(sum of squares + delta) over the regions of a grid, by channel: lengths of (x, sqrt(delta))."""

    settings = ("in_shape", "regions", "delta")
    methods = ("exact: lengths over regions that do not overlap",)
    regions: Any  # JSON values
    delta: Any

    def prepare(self):
        need(len(self.in_shape) == 3 and is_shape(self.regions) and len(self.regions) == 2, f"regions {self.regions!r}")
        sizes = zip(self.in_shape[:2], self.regions, strict=True)
        need(not any(n % k for n, k in sizes), f"{self.regions} regions of a map of {self.in_shape[:2]}")
        need(type(self.delta) in (int, float) and 2.0**-64 <= self.delta <= 2.0**64, f"delta {self.delta!r}")

    @property
    def out_shape(self):
        return (*self.regions, self.in_shape[-1])

    def apply(self, x):
        (h, w, c), (rows, columns) = self.in_shape, self.regions
        pixels = x.reshape(len(x), rows, h // rows, columns, w // columns, c)
        return np.sqrt((pixels * pixels).sum(axis=(2, 4)) + self.delta)

    def local(self, x, y):
        count = math.prod(self.in_shape[:2]) // math.prod(self.regions)
        return rounding(count + 4) * GUARD * lengths(y)


class CropChannels(PadChannels):
    """The first channels, which is the adjoint of appending zeros."""

    methods = ("exact: a projection",)

    def prepare(self):
        need(type(self.channels) is int and 1 <= self.channels <= self.in_shape[-1], f"channels {self.channels!r}")

    def apply(self, x):
        return np.ascontiguousarray(x[..., : self.channels])

    def back(self, y):
        return np.concatenate([y, np.zeros((*y.shape[:-1], self.in_shape[-1] - y.shape[-1]))], axis=-1)


class ZeroPad(Operator):
    """Rows and columns of zeros around an image."""

    settings = ("in_shape", "pads")
    methods = ("exact: zeros appended",)
    linear = True
    pads: Any  # JSON values
    margins: list[tuple[int, int]]

    def prepare(self):
        self.margins = self.of_image(self.pads)

    def of_image(self, margins: Any) -> list[tuple[int, int]]:
        """((top, bottom), (left, right)). Raises: Unproved for anything else."""
        need(len(self.in_shape) == 3, f"images of shape {self.in_shape}")
        pairs = isinstance(margins, list) and len(margins) == 2
        pairs = pairs and all(isinstance(pair, list) and len(pair) == 2 for pair in margins)
        sizes = pairs and all(type(n) is int and 0 <= n <= 2**24 for pair in margins for n in pair)
        need(bool(sizes), f"margins {margins!r}")
        return [(low, high) for low, high in margins]

    @property
    def out_shape(self):
        h, w, c = self.in_shape
        return (h + sum(self.margins[0]), w + sum(self.margins[1]), c)

    def with_margin(self, x):
        """Every image with zeros around it."""
        (top, bottom), (left, right) = self.margins
        b, h, w, c = x.shape
        found = np.zeros((b, top + h + bottom, left + w + right, c))
        found[:, top : top + h, left : left + w] = x
        return found

    def without_margin(self, x):
        """Every image without its margin."""
        (top, bottom), (left, right) = self.margins
        return np.ascontiguousarray(x[:, top : x.shape[1] - bottom, left : x.shape[2] - right])

    def apply(self, x):
        return self.with_margin(x)

    def back(self, y):
        return self.without_margin(y)

    def spread(self):
        return 0.0


class Crop(ZeroPad):
    """An image without its margin, which is the adjoint of zeros around it."""

    settings = ("in_shape", "crops")
    methods = ("exact: a projection",)
    crops: Any  # JSON values

    def prepare(self):
        self.margins = self.of_image(self.crops)
        need(min(self.out_shape) >= 1, f"crops {self.crops!r} of images {self.in_shape}")

    @property
    def out_shape(self):
        h, w, c = self.in_shape
        return (h - sum(self.margins[0]), w - sum(self.margins[1]), c)

    def apply(self, x):
        return self.without_margin(x)

    def back(self, y):
        return self.with_margin(y)


class Pairs(Operator):
    """Operators on pairs of channels i and i + C/2 (§10), with directions; components named by `signs` not negative."""

    lead: tuple[int, ...] = ()
    signs: tuple = ()
    roundings = 0

    def prepare(self):
        need(self.in_shape[-1] % 2 == 0, f"an odd number of channels, {self.in_shape[-1]}")
        for name in self.arrays:
            value, shape = getattr(self, name), (*self.lead, 2, self.in_shape[-1] // 2)
            need(value.shape == shape, f"{name} of shape {value.shape} instead of {shape}")
            sizes = np.hypot(value[..., 0, :], value[..., 1, :])
            need(bool(((sizes >= 0.5) & (sizes <= 2)).all()), f"{name} of lengths beyond 1/2 and 2")
            need(all(bool((value[index] >= 0).all()) for index in self.signs), f"{name} with a negative component")

    def halves(self, x):
        half = x.shape[-1] // 2
        return x[..., :half], x[..., half:]

    def local(self, x, y):
        return rounding(self.roundings) * GUARD * lengths(x) if self.roundings else np.zeros(len(x))


class MaxMin(Pairs):
    """The larger of each pair, then the smaller."""

    methods = ("exact: sorts pairs of channels",)

    def apply(self, x):
        a, b = self.halves(x)
        return np.concatenate([np.maximum(a, b), np.minimum(a, b)], axis=-1)


class MaxPoolPairs(Pairs):
    """The larger of each pair."""

    methods = ("exact: the larger of each pair of channels",)

    @property
    def out_shape(self):
        return (*self.in_shape[:-1], self.in_shape[-1] // 2)

    def apply(self, x):
        return np.maximum(*self.halves(x))


def rotation(d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """d^2 / |d|^2 of complex numbers, (2, n)."""
    size = d[0] * d[0] + d[1] * d[1]
    return (d[0] * d[0] - d[1] * d[1]) / size, 2 * d[0] * d[1] / size


class Householder(Pairs):
    """z where Im(conj(d) z) >= 0, else P conj(z), P = d^2 / |d|^2."""

    arrays = ("direction",)
    methods = ("exact: folds the plane of each pair of channels",)
    direction: np.ndarray
    roundings = 32

    def apply(self, x):
        a, b = self.halves(x)
        d = self.direction
        p = rotation(d)
        keep = d[0] * b - d[1] * a >= 0
        return np.concatenate([np.where(keep, a, p[0] * a + p[1] * b), np.where(keep, b, p[1] * a - p[0] * b)], axis=-1)


class Householder2(Pairs):
    """Four sectors, by the table and the comparisons of §10."""

    arrays, lead, signs = ("directions",), (3,), ((1, 1), (2, 1))
    methods = ("exact: folds four sectors of the plane of each pair of channels",)
    directions: np.ndarray
    roundings = 128

    def apply(self, x):
        a, b = self.halves(x)
        p, q, r = self.directions
        u, v = p[0] * a + p[1] * b, p[0] * b - p[1] * a
        above = v >= 0
        edge = np.where(above, q[0], -r[0]), np.where(above, q[1], r[1])
        turn = edge[0] * np.abs(v) - edge[1] * u
        cone = (turn < 0) | ((turn == 0) & (u > 0))
        beyond = (q[0] * r[0] - q[1] * r[1]) * v - (q[0] * r[1] + q[1] * r[0]) * u > 0
        first, second, third = rotation(p), rotation(q), rotation(r)
        both = first[0] * second[0] - first[1] * second[1], first[0] * second[1] + first[1] * second[0]
        sectors = [cone & above, cone, beyond]  # 0; then 3; then 2; else 1
        real = np.select(
            sectors, [np.ones_like(u), np.broadcast_to(first[0], u.shape), np.broadcast_to(third[0], u.shape)], both[0]
        )
        imag = np.select(
            sectors,
            [np.zeros_like(u), np.broadcast_to(first[1], u.shape), np.broadcast_to(-third[1], u.shape)],
            both[1],
        )
        b = np.where(np.where(cone, above, beyond), b, -b)
        return np.concatenate([real * a - imag * b, imag * a + real * b], axis=-1)


class ProjectionPool(Pairs):
    """Signed distance to the wedge |arg z| <= arg d."""

    arrays, signs = ("direction",), (0, 1)
    methods = ("exact: signed distances to a convex wedge in the plane of each pair of channels",)
    direction: np.ndarray
    roundings = 16

    @property
    def out_shape(self):
        return (*self.in_shape[:-1], self.in_shape[-1] // 2)

    def apply(self, x):
        a, b = self.halves(x)
        d = self.direction / np.sqrt(self.direction[0] ** 2 + self.direction[1] ** 2)
        height = np.abs(b)
        large, small = np.maximum(np.abs(a), height), np.minimum(np.abs(a), height)
        ratio = small / np.where(large > 0, large, 1.0)
        length = large * np.sqrt(1 + ratio * ratio)
        return np.where(d[0] * a + d[1] * height < 0, length, d[0] * height - d[1] * a)


class Elementwise(Operator):
    """Activations by component; the claim is at least the largest modulus of a slope (§10a)."""

    slope: tuple[Fraction, Fraction] = (Fraction(0), Fraction(1))
    error = 0.0  # of a component

    def known_methods(self) -> tuple[str, ...]:
        low, high = map(float, self.slope)
        return (f"exact: slopes between {low:g} and {high:g}",)

    def proves(self, claim, method, details):
        return claim >= max(map(abs, self.slope))

    def local(self, x, y):
        return np.full(len(x), GUARD * self.error * math.sqrt(math.prod(self.in_shape)))


class ReLU(Elementwise):
    """max(x, 0)."""

    def apply(self, x):
        return np.maximum(x, 0.0)


class LeakyReLU(Elementwise):
    """x where it is positive, and negative_slope x elsewhere."""

    settings = ("in_shape", "negative_slope")
    negative_slope: Any  # a JSON value

    def prepare(self):
        slope = finite(self.negative_slope, "negative_slope", -1.0)
        need(slope <= 1, f"negative_slope {self.negative_slope!r} beyond -1 and 1")
        self.slope = Fraction(slope), Fraction(1)

    def apply(self, x):
        return np.where(x > 0, x, float(self.slope[0]) * x)

    def local(self, x, y):
        return 2.0**-53 * GUARD * abs(float(self.slope[0])) * lengths(np.minimum(x, 0.0))


class Tanh(Elementwise):
    """tanh(x)."""

    error = 12 * 2.0**-53

    def apply(self, x):
        return tanh(x)


class Sigmoid(Elementwise):
    """1 / (1 + exp(-x))."""

    slope = (Fraction(0), Fraction(1, 4))
    error = 8 * 2.0**-53

    def apply(self, x):
        return sigmoid(x)


class Softplus(Elementwise):
    """log(1 + exp(x))."""

    def apply(self, x):
        return softplus(x)

    def local(self, x, y):
        return GUARD * lengths(softplus_error(y))


class PartialAbs(Elementwise):
    """|x| on a fraction of the channels, the first ones, and x on the others (§10c)."""

    settings = ("in_shape", "fraction")
    fraction: Any  # a JSON value

    def prepare(self):
        share = Fraction(finite(self.fraction, "fraction"))
        channels = share * self.in_shape[-1]
        need(share <= 1 and channels.denominator == 1, f"fraction {self.fraction!r} of {self.in_shape[-1]} channels")
        self.first = np.arange(self.in_shape[-1]) < int(channels)
        self.slope = Fraction(-1 if self.first.any() else 1), Fraction(1)

    def apply(self, x):
        return np.where(self.first, np.abs(x), x)


class NActivation(Elementwise):
    """max(x - 2 upper, min(x - 2 lower, -x)), of slopes 1 and -1 for any numbers (§10c)."""

    arrays = ("lower", "upper")
    slope = (Fraction(-1), Fraction(1))
    lower: np.ndarray
    upper: np.ndarray

    def prepare(self):
        for values in (self.lower, self.upper):
            need(values.shape == self.in_shape[-1:], f"thresholds {values.shape} for inputs {self.in_shape}")
            need(bool((np.abs(values) <= 2.0**100).all()), "thresholds beyond 2^100")

    def apply(self, x):
        return np.maximum(x - 2 * self.upper, np.minimum(x - 2 * self.lower, -x))

    def local(self, x, y):
        return rounding(2) * GUARD * lengths(y)


class LinearSpline(Elementwise):
    """f(scale x) / scale, f the interpolant of the values at the knots (j - (n - 1) / 2) spacing (§10c)."""

    arrays, settings = ("values", "scale"), ("in_shape", "spacing")
    values: np.ndarray
    scale: np.ndarray
    spacing: Any  # a JSON value

    def prepare(self):
        channels = self.in_shape[-1]
        fits = self.values.ndim == 2 and len(self.values) == channels and self.values.size <= 2**20
        need(fits and self.values.shape[1] % 2 == 1 and self.values.shape[1] >= 3, f"values {self.values.shape}")
        need(self.scale.shape == (channels,), f"a scale of shape {self.scale.shape} for {channels} channels")
        sizes = np.abs(self.scale)
        need(bool(((sizes >= 2.0**-100) & (sizes <= 2.0**100)).all()), "scales beyond 2^-100 and 2^100")
        need(bool((np.abs(self.values) <= 2.0**100).all()), "values beyond 2^100")
        spacing = finite(self.spacing, "spacing", 2.0**-100)
        need(spacing <= 2.0**100 and math.frexp(spacing)[0] == 0.5, f"spacing {spacing!r} is no power of two")
        # The steepest by floats, then exactly of those that rounding may have put in its place.
        steps = np.diff(self.values, axis=1)
        ends = []
        for sign in (-1, 1):
            top = (sign * steps).max()
            near = np.argwhere(sign * steps >= top - 2.0**-50 * abs(top))
            exact = {(a, b) for a, b in ((self.values[i, j], self.values[i, j + 1]) for i, j in near)}
            ends.append(sign * max(sign * (Fraction(float(b)) - Fraction(float(a))) for a, b in exact))
        self.slope = ends[0] / Fraction(spacing), ends[1] / Fraction(spacing)

    def known_methods(self):
        return ("exact: slopes of the stored values",)

    def pieces(self, t):
        """The values to the left and to the right of t, and the weight of the latter."""
        middle = self.values.shape[1] // 2
        places = t / self.spacing
        first = np.clip(np.floor(np.nan_to_num(places)), -middle, middle - 1)
        index, channels = first.astype(np.int64) + middle, np.arange(len(self.values))
        return self.values[channels, index], self.values[channels, index + 1], places - first

    def apply(self, x):
        left, right, weight = self.pieces(x * self.scale)
        return (left + weight * (right - left)) / self.scale

    def local(self, x, y):
        t = x * self.scale
        left, right, weight = self.pieces(t)
        steepest = max(1.0, *(abs(float(s)) for s in self.slope))
        size = np.abs(left) + np.abs(weight * (right - left)) + steepest * np.abs(t)
        return rounding(16) * GUARD * lengths(size / np.abs(self.scale))


def evaluate_in_turn(ops: list[Operator], x: np.ndarray, error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The computed output of operators in turn, and a bound (b,) on its error, given that of the input (§7)."""
    for op in ops:
        y, local = op.evaluate(x)
        local = local + FLOOR * (1 + lengths(x))
        error = (max(float_up(op.claim), FLOOR) * error + local) * (1 + rounding(8))
        x = y
    return x, error


class Composite(Operator):
    """An operator made of others, its parts, each with a claim of its own in details["parts"] (§6, §7).

    A subclass says which of its fields hold parts (`settings` names them, too), what follows from their claims, and how
    it evaluates. In files, the arrays of the i-th operator of a list are named prefix/i/..., those of an operator that
    has a field for itself prefix/field/...
    """

    settings = ("ops",)
    several = ("ops",)

    @classmethod
    def may_hold(cls, kind):
        return not issubclass(OPERATORS.get(kind, Operator), Composite)

    def parts(self) -> list[Operator]:
        """The operators, in the order of the rows that state their claims."""
        return [op for name in self.several for op in getattr(self, name)] + [getattr(self, n) for n in self.single]

    def combined(self, claims: list[Fraction]) -> Fraction:
        """A Lipschitz constant of the whole, given those of the parts."""
        raise NotImplementedError

    def evaluate(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        raise NotImplementedError

    def proves(self, claim, method, details):
        rows: Any = details.get("parts")
        parts = self.parts()
        need(isinstance(rows, list) and len(rows) == len(parts), "details state no bounds of its operators")
        for i, (op, row) in enumerate(zip(parts, rows, strict=True)):
            prove_row(op, row, f"operator {i} ({type(op).__name__})")
        return claim >= self.combined([op.claim for op in parts])

    def cost(self):
        return sum((op.cost() for op in self.parts()), 2 * super().cost())

    def effort(self, method, details):
        rows = details.get("parts")
        found = [(CALL, 0.0)]
        for op, row in zip(self.parts(), rows if isinstance(rows, list) else [], strict=False):
            own = row.get("details") if isinstance(row, dict) else None
            found.append(op.effort(row.get("method"), own) if isinstance(own, dict) else (CALL, 0.0))
        return sum(work for work, _ in found), max(numbers for _, numbers in found)


def prove_row(op: Operator, row: Any, place: str) -> None:
    """Proves the claim that a row states of an operator inside another, and sets it. Raises: Unproved."""
    need(isinstance(row, dict) and isinstance(row.get("details"), dict), f"{place}: its details are missing")
    need(row.get("type") == type(op).__name__, f"{place}: stated of a {row.get('type')!r}")
    op.claim = Fraction(finite(row.get("bound"), f"{place}: bound"))
    try:
        proved = op.proves(op.claim, op.named(row.get("method")), row["details"])
    except Unproved as error:
        raise Unproved(f"{place}: {error}") from error
    need(proved, f"{place}: the bound {row.get('bound')!r} cannot be proved ({row.get('method')})")


class Residual(Composite):
    """x + g(x), g the operators `ops` in turn."""

    methods = ("1 + the product of the operators' bounds",)
    called = "a residual"
    ops: list[Operator]

    def prepare(self):
        need(bool(self.ops), "expected at least one operator")
        self.in_shape = shape = tuple(self.ops[0].in_shape)
        for i, op in enumerate(self.ops):
            need(tuple(op.in_shape) == shape, f"operator {i} takes {op.in_shape}, but gets {shape}")
            shape = tuple(op.out_shape)
        need(shape == self.in_shape, f"{shape} cannot be added to {self.in_shape}")

    def combined(self, claims):
        return 1 + math.prod(claims, start=Fraction(1))

    def evaluate(self, x):
        y, error = evaluate_in_turn(self.ops, x, np.zeros(len(x)))
        total = x + y
        return total, (error + 2.0**-53 * GUARD * lengths(total)) * (1 + rounding(4))


class Back(Operator):
    """factor A^T y, A a linear operator and the factor a power of two but for its sign: no operator of files."""

    settings = ()
    map: Any
    factor: float

    def prepare(self):
        self.in_shape = tuple(self.map.out_shape)

    @property
    def out_shape(self):
        return tuple(self.map.in_shape)

    def apply(self, x):
        return self.factor * self.map.back(x)

    def local(self, x, y):
        return abs(self.factor) * self.map.local_back(x)


# What the rows of the ways forward and back state.
COLUMNS = "the bound of the stored map, of which these are columns"
TWICE = "twice the bound of the stored map"


class TwoPaths(Composite):
    """The base of potential steps and sandwiches (§6a): one stored linear map, applied forward and back.

    details["linear"] states the claim of the map, and details["parts"] what follows for the four operators that an
    evaluation goes through.
    """

    arrays = ("bias",)
    several, single = (), ("linear", "activation")
    bias: np.ndarray
    linear_map: Any  # "linear" in files; here that says whether LipLT takes an operator as a linear map
    activation: Any
    chain: list[Operator]
    adds_input = False

    def __init__(self, fields):
        super().__init__({"linear_map" if name == "linear" else name: value for name, value in fields.items()})

    def prepare(self):
        kinds = Dense, Conv, CircularConv
        need(type(self.linear_map) in kinds, f"a {type(self.linear_map).__name__} is no map of two paths")
        shape = tuple(self.linear_map.out_shape)
        need(self.bias.shape == shape[-1:], f"a bias of shape {self.bias.shape} for inputs {shape}")
        kind = type(self.activation).__name__
        need(isinstance(self.activation, Elementwise), f"a {kind} does not act on every component alone")
        low, high = self.activation.slope
        need(0 <= low and high <= 1, f"a {kind} of slopes between {float(low):g} and {float(high):g}, beyond 0 and 1")
        taken = tuple(self.activation.in_shape)
        need(taken == shape, f"the linear map gives {shape}, a {kind} takes {taken}")
        forward, back = self.ways()
        self.chain = [forward, Bias({"bias": self.bias, "in_shape": list(shape)}), self.activation, back]
        self.in_shape = tuple(forward.in_shape)

    def ways(self) -> tuple[Operator, Operator]:
        """The maps forward and back."""
        raise NotImplementedError

    @property
    def out_shape(self):
        return tuple(self.chain[-1].out_shape)

    def parts(self):
        return [self.linear_map, self.activation]

    def proves(self, claim, method, details):
        linear = self.linear_map
        prove_row(linear, details.get("linear"), f"the linear map ({type(linear).__name__})")
        whole, rows = self.combined([linear.claim]), details.get("parts")
        need(isinstance(rows, list) and len(rows) == len(self.chain), "details state no bounds of its operators")
        name = "ConvTranspose" if type(linear) is Conv else type(linear).__name__
        names = type(linear).__name__, "Bias", type(self.activation).__name__, name
        # Columns of a matrix have no larger norm, and an adjoint has the same.
        claims = linear.claim, Fraction(1), self.activation.slope[1], 2 * linear.claim
        methods = (COLUMNS,), Bias.methods, self.activation.known_methods(), (TWICE,)
        for i, (op, row) in enumerate(zip(self.chain, rows, strict=True)):
            place = f"operator {i} ({names[i]})"
            need(isinstance(row, dict) and row.get("type") == names[i], f"{place}: its row is missing")
            need(row.get("method") in methods[i], f"{place}: the method {row.get('method')!r} is none for it")
            need(row.get("details") == {}, f"{place}: its details are not empty")
            op.claim = Fraction(finite(row.get("bound"), f"{place}: bound"))
            need(op.claim >= claims[i], f"{place}: the bound {row.get('bound')!r} is not proved")
        need(
            method != AT_MOST_ONE or whole == 1, f"the method is that of a constant of 1, but it is {float(whole):.9g}"
        )
        return claim >= whole

    def effort(self, method, details):
        row = details.get("linear")
        row = row if isinstance(row, dict) else {}
        own = row.get("details")
        return self.linear_map.effort(row.get("method"), own) if isinstance(own, dict) else (CALL, 0.0)

    def cost(self):
        return self.linear_map.cost() + super().cost()

    def evaluate(self, x):
        y, error = evaluate_in_turn(self.chain, x, np.zeros(len(x)))
        if not self.adds_input:
            return y, error
        total = x + y
        return total, (error + 2.0**-53 * GUARD * lengths(total)) * (1 + rounding(4))


# A potential step whose Jacobian has no eigenvalue below -1.
AT_MOST_ONE = "exact: 2 s^2 - 1 is at most 1, s the bound of the linear map"


class PotentialStep(TwoPaths):
    """x - 2 A^T f(A x + b): the Jacobian I - 2 A^T S A is symmetric with eigenvalues from 1 - 2 |A|^2 to 1 (§6a)."""

    settings = ("linear", "activation", "nonexpansive")
    methods = (AT_MOST_ONE, "2 s^2 - 1, s the bound of the linear map")
    called = "a potential step"
    adds_input = True

    def ways(self):
        return self.linear_map, Back({"map": self.linear_map, "factor": -2.0})

    def combined(self, claims):
        return max(Fraction(1), 2 * claims[0] ** 2 - 1)


class Sandwich(TwoPaths):
    """2 A^T f(B x + b): contractive by the norm of [A B], whose first columns, `outputs` many, are A's (§6a)."""

    settings = ("linear", "activation", "outputs", "nonexpansive")
    methods = ("s^2, s the bound of the linear map",)
    called = "a sandwich"
    outputs: Any  # a JSON value

    def ways(self):
        columns = self.linear_map.in_shape[-1]
        fine = type(self.outputs) is int and 1 <= self.outputs < columns
        need(fine, f"outputs {self.outputs!r} of a map of {columns} columns")
        first = self.linear_map.columns(0, self.outputs)
        return self.linear_map.columns(self.outputs, None), Back({"map": first, "factor": 2.0})

    def combined(self, claims):
        return claims[0] ** 2


# All operators that a frozen network may have, by their names in files.
OPERATORS: dict[str, type[Operator]] = {
    cls.__name__: cls
    for cls in (
        Bias,
        ChannelShuffle,
        CircularConv,
        Conv,
        ConvExponential,
        ConvTranspose,
        Crop,
        CropChannels,
        Dense,
        Flatten,
        Householder,
        Householder2,
        L2Pool,
        LeakyReLU,
        LinearSpline,
        MaxMin,
        MaxPoolPairs,
        NActivation,
        PadChannels,
        PartialAbs,
        PositionalBias,
        PotentialStep,
        ProjectionPool,
        ReLU,
        Residual,
        Sandwich,
        Shift,
        Sigmoid,
        Softplus,
        SpaceToDepth,
        Tanh,
        ZeroPad,
    )
}


# ---------------------------------------------------------------------------------------------------------------------
# Heads: constants of logit differences (§6, §11)


def distances_up(rows: np.ndarray) -> np.ndarray:
    """Upper bounds (k, k) of |r_i - r_j|, exactly 0 for equal rows (§6).

    A difference rounds by u, and so does its square; their sum, in any order, by gamma_(d-1).
    """
    largest = float(np.abs(rows).max(initial=0.0))
    need(largest < 2.0**1000, "entries of the head too large")
    scale = 2.0 ** math.frexp(largest)[1]
    found = np.zeros((len(rows), len(rows)))
    for i, row in enumerate(rows):
        same = (row == rows).all(axis=1)
        length = np.sqrt(np.sum(((row - rows) / scale) ** 2, axis=1))
        # Half of the square's error, and the root's own rounding.
        bound = length * (1 + rounding(rows.shape[1] // 2 + 5)) + 2.0**-515
        found[i] = np.where(same, 0.0, np.nextafter(bound * scale, np.inf))
    return found


class LinearHead:
    """W x + b."""

    arrays = ("matrix", "bias")
    matrix: np.ndarray
    bias: np.ndarray
    in_shape: tuple[int, ...]
    classes: int

    def __init__(self, fields: dict[str, np.ndarray]):
        self.matrix, self.bias = fields["matrix"], fields["bias"]
        need(self.matrix.ndim == 2 and self.matrix.size > 0, f"a matrix of shape {self.matrix.shape}")
        need(self.bias.shape == self.matrix.shape[:1], f"a bias of shape {self.bias.shape}")
        self.in_shape, self.classes = self.matrix.shape[1:], len(self.matrix)

    def cost(self) -> int | float:
        """As `Operator.cost`, with what the rivals of an image take."""
        return 2.0 * self.matrix.size + self.classes * CALL

    def effort(self, claims: Any) -> tuple[int | float, int | float]:
        """As `Operator.effort`, of `prove`."""
        return self.classes * (self.matrix.size * 2.0 * PASS + CALL), 6.0 * self.classes**2 + 4.0 * self.matrix.size

    def prove(self, claims: Any) -> np.ndarray:
        """Proved constants (k, k) of all logit differences, per unit of the features."""
        need(claims is None, f"a linear head has no claims of its own, got {claims!r}")
        return distances_up(self.matrix)

    def evaluate(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Logits and bounds of their errors at the stored x, but for underflow."""
        size = np.abs(x) @ np.abs(self.matrix).T + np.abs(self.bias)
        return x @ self.matrix.T + self.bias, rounding(self.matrix.shape[1] + 2) * GUARD * size


class MLPHead:
    """W2 softplus(W1 x + b1) + b2 (§11)."""

    arrays = ("w1", "b1", "w2", "b2")
    w1: np.ndarray
    b1: np.ndarray
    w2: np.ndarray
    b2: np.ndarray
    hidden: int
    in_shape: tuple[int, ...]
    classes: int
    # Proved by `prove`: |W1|; norms of its rows; its Frobenius norm; curvatures of all pairs, and of some a better one.
    norm: float
    rows: np.ndarray
    frobenius: float
    coarse: np.ndarray
    fine: dict[tuple[int, int], float]

    def __init__(self, fields: dict[str, np.ndarray]):
        self.w1, self.b1, self.w2, self.b2 = (fields[name] for name in self.arrays)
        need(
            [a.ndim for a in (self.w1, self.b1, self.w2, self.b2)] == [2, 1, 2, 1] and self.w1.size > 0, "other shapes"
        )
        self.hidden, width = self.w1.shape
        need(self.b1.shape == (self.hidden,) and self.w2.shape[1:] == (self.hidden,), "shapes that do not fit")
        need(self.b2.shape == self.w2.shape[:1] and len(self.b2) > 0, "shapes that do not fit")
        largest = max(float(np.abs(a).max()) for a in (self.w1, self.b1, self.w2, self.b2))
        need(largest < 2.0**100, "entries of 2^100 or more")
        self.in_shape, self.classes = (width,), len(self.w2)

    def cost(self) -> int | float:
        """As `LinearHead.cost`: a rival is looked at by up to two minorants, for the radius and for the rival."""
        pair = 2.0 * self.w1.size + 30.0 * PASS * (self.hidden + self.in_shape[0])
        return 2.0 * (self.w1.size + self.w2.size) + self.classes * (4 * pair + CALL)

    def effort(self, claims: Any) -> tuple[int | float, int | float]:
        rows = claims.get("curvatures") if isinstance(claims, dict) else None
        count = 1 + (len(rows) if isinstance(rows, list) else 0)
        work, numbers = matrix_effort(*self.w1.shape)
        work = count * (work + CALL) + self.classes * (self.w1.size + self.w2.size * 4.0 * PASS + CALL)
        work += self.classes**2 * self.in_shape[0] * 2.0 * PASS
        return work, numbers + 8.0 * self.classes**2 + 3.0 * self.classes * self.in_shape[0]

    def prove(self, claims: Any) -> np.ndarray:
        """As `LinearHead.prove`: (|W1^T (w_i - w_j)| + |W1| |w_i - w_j|) / 2 (§11.1); and all curvatures (§11.3)."""
        need(isinstance(claims, dict) and isinstance(claims.get("curvatures"), list), "claims of the head are missing")
        norm = finite(claims.get("norm"), "norm")
        need(matrix_below(self.w1, Fraction(norm)), f"|W1| <= {norm!r} cannot be proved")
        self.norm = norm
        self.rows = lengths(self.w1) * GUARD + 2.0**-450
        self.frobenius = float(lengths(self.w1.reshape(1, -1))[0]) * GUARD + 2.0**-450
        negative = [np.maximum(self.w2 - row, 0.0).max(axis=1) for row in self.w2]
        # A difference, a square, a product; the factor 1/4 is exact. Rows that are equal have no curvature.
        self.coarse = np.stack([norm**2 / 4 * row * (1 + rounding(6)) for row in negative])
        self.coarse = np.where(self.coarse > 0, self.coarse + 2.0**-450, 0.0)
        self.fine = {}
        for entry in claims["curvatures"]:
            need(isinstance(entry, list) and len(entry) == 3, f"curvature {entry!r}")
            p, i, value = *entry[:2], finite(entry[2], "curvature")
            known = type(p) is int and type(i) is int and 0 <= p < self.classes and 0 <= i < self.classes
            need(known, f"curvature {entry!r}")
            need((p, i) not in self.fine, f"the curvature of classes {(p, i)} is stated twice")
            self.fine[p, i] = value
        proved = in_threads(lambda pair: self._curvature_holds(*pair), sorted(self.fine), 6 * self.w1.size)
        for pair, holds in zip(sorted(self.fine), proved, strict=True):
            need(holds, f"curvature {self.fine[pair]!r} of classes {pair} cannot be proved")
        through = self.w2 @ self.w1
        errors = rounding(self.hidden + 1) * self.frobenius * lengths(self.w2) * GUARD + 2.0**-450
        apart = distances_up(self.w2)
        total = distances_up(through) + errors[:, None] + errors + norm * apart
        return np.where(apart > 0, total / 2 * (1 + rounding(6)), 0.0)

    def _curvature_holds(self, p: int, i: int) -> bool:
        """m >= |diag(sqrt(w^-)) W1|^2 / 4, w = W2[p] - W2[i]: a float difference and root and product, gamma_4 |X|."""
        weights = np.maximum(self.w2[i] - self.w2[p], 0.0)
        limit = 4 * Fraction(self.fine[p, i])
        if not weights.any():
            return True
        matrix = np.sqrt(weights)[:, None] * self.w1
        if not matrix.any():
            return bool(not self.w1.any()) or limit >= Fraction(1, 2**800)
        unit, exponent = scaled(matrix)
        slack = gamma(6) * root_up(squares_up(unit)) + TINY
        # What underflows in the product is below 2^-1000 per entry.
        lost = Fraction(1, 2**950) / Fraction(2) ** exponent
        reach = limit / Fraction(4) ** exponent
        if reach <= 0:
            return False
        root = reach / root_up(reach)  # not above the root
        return norms_below(unit[None], root - slack - lost)

    def evaluate(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sums = np.abs(x) @ np.abs(self.w1).T + np.abs(self.b1)
        units = softplus(x @ self.w1.T + self.b1)
        # §11.5: softplus is 1-Lipschitz, so the error of a unit is that of its sum and its own.
        unit_error = rounding(self.in_shape[0] + 2) * sums + softplus_error(units)
        size, reach = units @ np.abs(self.w2).T + np.abs(self.b2), unit_error @ np.abs(self.w2).T
        return units @ self.w2.T + self.b2, GUARD * (rounding(self.hidden + 2) * size + reach)

    def distance(self, a, b, p, i, m) -> np.ndarray:
        """About how far around a f_p > f_i by the minorants at b: no proof, and 0 where there is none."""
        weights, step = self.w2[p] - self.w2[i], b - a
        sums = b @ self.w1.T + self.b1
        value = np.sum(weights * softplus(sums), axis=1) + self.b2[p] - self.b2[i]
        gradient = (weights * sigmoid(sums)) @ self.w1
        level = value - np.sum(gradient * step, axis=1) - m / 2 * lengths(step) ** 2
        outer = np.sqrt(np.maximum(lengths(gradient) ** 2 + 2 * m * value, 0.0))
        found = 2 * level / (lengths(gradient + m[:, None] * step) + outer)
        return np.where(level > 0, found, 0.0)

    def positive_within(self, a, b, p, i, m, radius) -> np.ndarray:
        """`_positive_within` for any number of rows."""
        size = max(1, CHUNK // (8 * self.hidden))
        parts = [slice(start, start + size) for start in range(0, len(a), size)]
        return np.concatenate([self._positive_within(*(v[part] for v in (a, b, p, i, m, radius))) for part in parts])

    def _positive_within(self, a, b, p, i, m, radius) -> np.ndarray:
        """True where f_p > f_i is proved on balls of these radii around a, by minorants at b of curvature m (§11.2).

        D(y) >= D(b) + g.(y - b) - m/2 |y - b|^2, whose least value where |y - a| <= radius is at least
        Q - |g + m s| radius - m/2 radius^2, with s = b - a and Q = D(b) - g.s - m/2 |s|^2. All (n,) or (n, d).
        The errors are those of §11.6.
        """
        width = self.in_shape[0]
        weights, offset = self.w2[p] - self.w2[i], self.b2[p] - self.b2[i]
        biases, sizes = np.abs(self.b2[p]) + np.abs(self.b2[i]), np.abs(weights)
        sums = b @ self.w1.T + self.b1
        reach = (lengths(b) * GUARD + 2.0**-450)[:, None]
        sum_error = rounding(width + 3) * GUARD * (self.rows * reach + np.abs(self.b1))
        units, slopes = softplus(sums), sigmoid(sums)
        value = np.sum(weights * units, axis=1) + offset
        value_error = np.sum(sizes * (sum_error + softplus_error(units)), axis=1)
        value_error += rounding(self.hidden + 6) * (np.sum(sizes * units, axis=1) + biases)
        value_error = value_error * GUARD + 2.0**-450
        inner = weights * slopes
        gradient = inner @ self.w1
        gradient_error = self.norm * (lengths(sizes * (sum_error / 4 + 12 * 2.0**-53)) * GUARD + 2.0**-450)
        gradient_error += rounding(self.hidden + 2) * self.frobenius * (lengths(inner) + 2.0**-450)
        gradient_error = gradient_error * GUARD + 2.0**-450
        step = b - a
        up = 1 + rounding(width + 16)  # for norms that enter as they are, not as errors
        moved, slope = lengths(step) * up + 2.0**-450, lengths(gradient) * up + 2.0**-450
        dot, bend = np.sum(gradient * step, axis=1), m / 2 * moved**2
        level_error = value_error + (rounding(width + 3) * slope + gradient_error) * moved
        turned = lengths(gradient + m[:, None] * step) * up + gradient_error + rounding(8) * (slope + m * moved)
        lost = (turned * radius + m / 2 * radius**2) * (1 + rounding(8)) + 2.0**-450
        level_error += rounding(16) * (np.abs(value) + np.abs(dot) + bend)
        return value - dot - bend - level_error * GUARD - lost > 2.0**-440 + rounding(8) * lost


HEADS: dict[str, type[LinearHead] | type[MLPHead]] = {"LinearHead": LinearHead, "MLPHead": MLPHead}


# ---------------------------------------------------------------------------------------------------------------------
# Loop transformation (§12)


def carried(ops, x: np.ndarray, error: np.ndarray, back: bool) -> tuple[np.ndarray, np.ndarray]:
    """Images of vectors under operators in turn, or under their adjoints in reverse, and bounds on their errors."""
    for op in reversed(ops) if back else ops:
        error = (float_up(op.claim) * error + op.spread() * (lengths(x) * GUARD + 2.0**-500) + 2.0**-900) * GUARD
        x = op.back(x) if back else op.apply(x)
    return x, np.where(np.isfinite(lengths(x)), error, np.inf)


def units(shape: tuple[int, ...], start: int, stop: int) -> np.ndarray:
    block = np.zeros((stop - start, math.prod(shape)))
    block[np.arange(stop - start), np.arange(start, stop)] = 1
    return block.reshape(-1, *shape)


def total_error(errors: np.ndarray) -> Fraction | None:
    """The root of the sum of squares, rounded up; None if it is not finite."""
    largest = float(errors.max(initial=0.0))
    if not math.isfinite(largest):
        return None
    return Fraction(math.sqrt(float(np.sum((errors / max(largest, 2.0**-900)) ** 2))) * GUARD) * Fraction(largest)


class Chain:
    """Linear operators in turn, of which the norm is to be bounded; smaller side first, so that rows are few."""

    ops: list[Operator]
    budget: Budget
    place: str  # in messages
    back: bool  # True if rows are the adjoint's images of the output's unit vectors
    shape: tuple[int, ...]  # of the smaller side, which has `side` numbers
    other: tuple[int, ...]
    side: int
    cost: int | float  # of one vector

    def __init__(self, ops: list[Operator], budget: Budget | None = None, place: str = "chain"):
        self.ops, self.budget, self.place = ops, budget or Budget(), place
        first, last = ops[0].in_shape, ops[-1].out_shape
        self.back = math.prod(first) >= math.prod(last)
        self.shape, self.other = (last, first) if self.back else (first, last)
        self.side = math.prod(self.shape)
        self.cost = sum(op.cost() + CALL for op in ops)

    @property
    def _widest(self) -> int:
        return max(math.prod(shape) for op in self.ops for shape in (op.in_shape, op.out_shape))

    def _pieces(self, most: int) -> list[tuple[int, int]]:
        size = max(1, min(most, CHUNK // (4 * self._widest)))
        return [(start, min(start + size, self.side)) for start in range(0, self.side, size)]

    def dense_below(self, limit: Fraction) -> bool:
        """By the matrix of the composition: |M| <= |computed M| + (sum of squares of its rows' errors)^(1/2)."""
        work, numbers = matrix_effort(self.side, math.prod(self.other))
        self.budget.hold(self.place, numbers)
        self.budget.spend(self.place, work + self.side * self.cost)
        matrix, errors = np.empty((self.side, math.prod(self.other))), np.empty(self.side)

        def fill(piece):
            start, stop = piece
            rows, error = carried(self.ops, units(self.shape, start, stop), np.zeros(stop - start), self.back)
            matrix[start:stop], errors[start:stop] = rows.reshape(stop - start, -1), error

        in_threads(fill, self._pieces(self.side))
        error = total_error(errors)
        return error is not None and bool(np.isfinite(matrix).all()) and matrix_below(matrix, limit - error)

    def banded_below(self, limit: Fraction) -> bool:
        """By the Gram matrix G of the smaller side in blocks, rows of the image, of which few are not 0.

        Every column is known up to its error, zeros included. A factor F is computed, in whatever way, and what is left
        of s I - G bounded: lambda_max(G) <= s + |s I - G - F F^T|_F. An entry of that difference is a sum of `terms`
        products, which errs by gamma (|s I - G| + |F| |F|^T), in norm at most gamma (|s I - G|_F + |F|_F^2).
        """
        if limit < 0:
            return False
        count, side = self.shape[0], self.side // self.shape[0]
        self.budget.hold(self.place, 4.0 * side**2)
        self.budget.spend(self.place, 2 * self.side * (self.cost + PASS * self.side))
        blocks: dict[tuple[int, int], np.ndarray] = {}
        errors = np.empty(self.side)

        def fill(column: int) -> None:
            parts = []
            for start, stop in self._pieces(side):
                low, high = max(start, column * side), min(stop, (column + 1) * side)
                if low >= high:
                    continue
                rows, error = carried(self.ops, units(self.shape, low, high), np.zeros(high - low), self.back)
                rows, errors[low:high] = carried(self.ops, rows, error, not self.back)
                image = rows.reshape(high - low, count, side)[:, column:]
                end = int(np.flatnonzero(image.any(axis=(0, 2))).max(initial=0)) + 1
                parts.append(np.ascontiguousarray(image[:, :end]))
            for row in range(column, column + max(part.shape[1] for part in parts)):
                block = np.zeros((side, side))
                start = 0
                for part in parts:
                    if row - column < part.shape[1]:
                        block[:, start : start + len(part)] = part[:, row - column].T
                    start += len(part)
                if block.any():
                    self.budget.hold(self.place, len(blocks) * float(side) ** 2)
                    blocks[row, column] = block

        in_threads(fill, range(count), 4 * CHUNK + 8 * side**2)
        lost = total_error(errors)
        if lost is None or not all(np.isfinite(block).all() for block in blocks.values()):
            return False
        # Only the lower triangle is used, so that an error may count twice.
        room = limit**2 - Fraction(3, 2) * lost
        if room <= 0:
            return False
        shift = float(room * (1 - Fraction(1, 2**24)))
        band = max(row - column for row, column in blocks)
        self.budget.hold(self.place, (len(blocks) + (band + 1.0) ** 2) * side**2)
        self.budget.spend(self.place, count * (band + 1) * (band + 4) * (float(side) ** 3 + PASS * side**2))
        factor: dict[tuple[int, int], np.ndarray] = {}
        residual, squares, size = 0.0, 0.0, 0.0
        for column in range(count):
            for row in range(column, min(count, column + band + 1)):
                part = -blocks[row, column] if (row, column) in blocks else np.zeros((side, side))
                if row == column:
                    part = np.tril(part)
                    part = part + np.tril(part, -1).T
                    part[np.diag_indices(side)] += shift
                size += float(np.sum(part**2)) * (1 if row == column else 2)
                for q in range(max(0, row - band), column):
                    if (row, q) in factor and (column, q) in factor:
                        part -= factor[row, q] @ factor[column, q].T
                if row == column:
                    try:
                        factor[row, row] = np.linalg.cholesky(part)
                    except np.linalg.LinAlgError:
                        return False
                else:
                    factor[row, column] = np.linalg.solve(factor[column, column], part.T).T
                left = part - factor[row, column] @ factor[column, column].T
                residual += float(np.sum(left**2)) * (1 if row == column else 2)
                squares += float(np.sum(factor[row, column] ** 2))
            for row in range(max(0, column - band), column + 1):
                factor.pop((row, column - band), None)
        if not (math.isfinite(residual) and math.isfinite(squares) and math.isfinite(size)):
            return False
        terms = (band + 1) * (side + 2) + 8
        slack = Fraction(math.sqrt(residual)) + 2 * gamma(terms) * (Fraction(math.sqrt(size)) + Fraction(squares))
        return Fraction(shift) + slack * (1 + Fraction(1, 2**20)) + TINY <= room

    def circular_below(self, method: str, details: dict, limit: Fraction) -> bool:
        """By the composed kernel of circular convolutions, which is theirs up to a shift of the image.

        Its entries err by gamma times the composition of the moduli, n counting the terms of all sums; the norm of what
        is left is at most the sum over taps of their Frobenius norms.
        """
        ops = [op for op in self.ops if isinstance(op, Conv) and op.padding == "CIRCULAR"]
        others = [op for op in self.ops if not op.only_reshapes]
        need(len(ops) == len(others), "a convolution that is not circular")
        for op in ops:
            self.budget.hold(self.place, 2.0 * op.group_kernels[0].size * len(op.group_kernels) ** 2)
        kernels = [op.full() for op in ops]
        kernel, majorant, terms = kernels[0], np.abs(kernels[0]), 0
        strides = [axis.stride for axis in ops[0].axes]

        def composed(first, second):
            sizes = [s * (k - 1) + n for s, k, n in zip(strides, second.shape[:2], first.shape[:2], strict=True)]
            self.budget.hold(self.place, 4.0 * math.prod(sizes) * first.shape[2] * second.shape[3])
            self.budget.spend(
                self.place, first.size * (1.0 * second.size // second.shape[2] + 2 * PASS) + second.size * CALL
            )
            total = np.zeros((*sizes, first.shape[2], second.shape[3]))
            for i, j in np.ndindex(*second.shape[:2]):
                start = strides[0] * i, strides[1] * j
                total[start[0] : start[0] + first.shape[0], start[1] : start[1] + first.shape[1]] += (
                    first @ second[i, j]
                )
            return total

        for op, taps in zip(ops[1:], kernels[1:], strict=True):
            kernel, majorant = composed(kernel, taps), composed(majorant, np.abs(taps))
            terms += math.prod(taps.shape[:3]) + 1
            strides = [s * axis.stride for s, axis in zip(strides, op.axes, strict=True)]
        sizes = [float(np.sqrt(np.sum(k**2, axis=(2, 3))).sum()) for k in (majorant, *kernels)]
        # Then all that underflows on the way stays below TINY.
        if not (math.isfinite(sizes[0]) and math.prod(max(s, 1.0) for s in sizes[1:]) < 2.0**100):
            return False
        size = sizes[0]
        error = gamma(terms) * Fraction(size) * Fraction(GUARD) * (1 + gamma(terms)) + TINY
        axes = conv_axes(kernel, ops[0].in_shape, strides, "CIRCULAR")
        work, numbers = conv_effort(kernel.shape, axes, method, details)
        self.budget.hold(self.place, numbers)
        self.budget.spend(self.place, work)
        return conv_below(kernel, axes, method, details, limit - error)


class LoopTransformation:
    """Constants of logit differences, per unit of the normalised input, from the norms of chains (§12.1)."""

    budget: Budget
    segments: list[list[Operator]]  # linear operators, between one activation and the next
    acts: list[Elementwise]
    names: list[str]  # the input, the activations and the head: chains go from one to another
    a: list[Fraction]  # of each activation the middle of its slopes, half their width, and their largest modulus
    b: list[Fraction]
    top: list[Fraction]
    chains: dict[tuple[int, int], Fraction]  # proved norms
    m: list[Fraction]  # constants from the input to before each activation, and to the logits

    def __init__(self, ops: list[Operator], names: list[str], head: Any, document: Any, budget: Budget | None = None):
        """ops, names: without the normalisation. Raises: Unproved where a chain's norm is not proved."""
        need(isinstance(head, LinearHead) and head.matrix.size <= TERMS, "LipLT takes a linear head")
        self.budget = budget or Budget()
        need(isinstance(document, dict) and isinstance(document.get("chains"), list), "liplt states no chains")
        need(set(document) == {"chains", "layers"}, f"expected chains and layers, got {sorted(document)}")
        last = Dense({"matrix": head.matrix})
        last.claim = Fraction(float(np.linalg.norm(head.matrix)) * GUARD) + Fraction(1, 2**500)  # Frobenius norm
        self.segments, self.acts, self.names = [[]], [], ["input"]
        for op, name in [*zip(ops, names, strict=True), (last, "head")]:
            if isinstance(op, Elementwise):
                self.acts.append(op)
                self.names.append(name)
                self.segments.append([])
            elif op.linear:
                self.segments[-1].append(op)
            else:
                need(op.translation, f"LipLT does not take {name} ({type(op).__name__})")
        need(bool(self.acts) and "input" not in self.names[1:], "no elementwise activation, or one named input")
        slopes = [op.slope for op in self.acts]
        self.a, self.b = [abs(low + high) / 2 for low, high in slopes], [(high - low) / 2 for low, high in slopes]
        self.top = [max(abs(low), abs(high)) for low, high in slopes]
        self.chains = {}
        self._prove_chains(document["chains"])
        self._constants()
        self._prove_layers(document["layers"])

    def _prove_chains(self, rows: list) -> None:
        places: dict[Any, int] = {name: i for i, name in enumerate(self.names)}
        n = len(self.acts)
        self.budget.spend("liplt", float(n) ** 2 * (n + len(self.names)) * FRACTION)
        stated = {}
        for row in rows:
            need(isinstance(row, dict) and isinstance(row.get("details"), dict), f"chain {row!r}")
            pair = places.get(row.get("start")), places.get(row.get("end"))
            place = f"chain from {row.get('start')!r} to {row.get('end')!r}"
            need(None not in pair and pair not in stated, f"{place}: no chain of this network, or stated twice")
            stated[pair] = row, Fraction(finite(row.get("bound"), f"{place}: bound"))
        pairs = sorted(((j, k) for k in range(1, n + 1) for j in range(k)), key=lambda pair: pair[1] - pair[0])
        for j, k in pairs:
            place = f"chain from {self.names[j]} to {self.names[k]}"
            need((j, k) in stated, f"{place} is missing")
            row, limit = stated[j, k]
            ops = [op for segment in self.segments[j:k] for op in segment]
            self._named(row.get("method"), ops, j, k, place)
            parts = [self.chains[j, s] * self.chains[s, k] for s in range(j + 1, k)]
            product = math.prod((op.claim for op in ops), start=Fraction(1))
            if min([product, *parts]) > limit:
                proved = self._composed(ops, str(row.get("method")), row["details"], limit, place)
                need(proved, f"{place}: {row['bound']!r}")
            self.chains[j, k] = limit

    def _named(self, method: Any, ops: list, j: int, k: int, place: str) -> None:
        """Raises: Unproved for a method by which no such chain is bounded."""
        single = len([op for op in ops if not op.only_reshapes]) <= 1
        known = {PRODUCT, *(SPLIT + name for name in self.names[j + 1 : k])}
        known |= {COMPOSED, BANDED, *(CIRCULAR + found for found in Conv.methods)}
        known = {ALONE} if single else known
        need(method in known, f"{place}: the method {method!r} is none for it: {' | '.join(sorted(known))}")

    def _prove_layers(self, rows: Any) -> None:
        """The stated constants from the input to before each activation, by LipLT and by the product of norms."""
        stated = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
        names = self.names[1:]
        need(stated and [row.get("name") for row in rows] == names, f"layers are not those of {names}")
        product = Fraction(1)
        for i, row in enumerate(rows):
            need(set(row) == {"name", "bound", "product"}, f"layers, {names[i]}: got the fields {sorted(row)}")
            product *= math.prod((op.claim for op in self.segments[i]), start=Fraction(1))
            for field, least in (("bound", self.m[i]), ("product", product)):
                value = Fraction(finite(row[field], f"layers, {names[i]}: {field}"))
                need(
                    value >= least,
                    f"layers, {names[i]}: {field} {row[field]!r}, but only {float_up(least)!r} is proved",
                )
            product *= self.top[i]

    def _composed(self, ops: list, method: str, details: dict, limit: Fraction, place: str) -> bool:
        need(limit >= 0, "a negative bound")  # those below look at its square
        need(bool(ops) and all(op.spread() is not None for op in ops), "an operator that cannot be composed")
        chain = Chain(ops, self.budget, f"liplt, {place}")
        if method.startswith(CIRCULAR):
            return chain.circular_below(method.partition("; ")[2], details, limit)
        if method == BANDED:
            return len(chain.shape) == 3 and chain.banded_below(limit)
        return chain.dense_below(limit)

    def _constants(self) -> None:
        """m_k, from the input to before activation k: the recursion, or a product where that is less."""
        self.m = []
        for k in range(1, len(self.acts) + 1):
            total = math.prod(self.a[: k - 1], start=Fraction(1)) * self.chains[0, k]
            for j in range(1, k):
                gain = math.prod(self.a[j : k - 1], start=Fraction(1))
                total += self.b[j - 1] * gain * self.chains[j, k] * self.m[j - 1]
            before = self.top[k - 2] * self.m[k - 2] if k > 1 else Fraction(1)
            step = math.prod((op.claim for op in self.segments[k - 1]), start=Fraction(1))
            value = float_up(min(total, before * step, before * self.chains[k - 1, k]))
            need(math.isfinite(value), "constants beyond the float64 range")
            self.m.append(Fraction(value))

    def table(self, head_table: np.ndarray) -> np.ndarray:
        """Proved constants (k, k) of logit differences. head_table: those of the head."""
        n, classes = len(self.acts), len(head_table)
        carried_back = [op for segment in self.segments[0 if classes <= ROWS else n :] for op in segment]
        widest = max(math.prod(op.in_shape) for op in carried_back)
        self.budget.hold("liplt, rows of the output", 4.0 * classes * widest)
        rows = sum(op.cost() + CALL for op in carried_back) + (n + 1) * classes * widest * 2.0 * PASS
        self.budget.spend("liplt, rows of the output", classes * rows)
        x, error = np.eye(classes), np.zeros(classes)
        total = np.zeros((classes, classes))
        # From the last activation on: the norms of what is linear, up to the head; where it is composed, all of it.
        linear = Fraction(self.top[n - 1]) * self.m[n - 1]
        linear *= math.prod((op.claim for op in self.segments[n][:-1]), start=Fraction(1))
        reach = np.nextafter(float_up(linear) * head_table, np.inf)

        def apart():
            flat = x.reshape(classes, -1)
            if not (np.isfinite(flat).all() and np.isfinite(error).all()):
                return np.full((classes, classes), np.inf)
            return (distances_up(flat) + error[:, None] + error) * (1 + rounding(4))

        for j in range(n, -1, -1):
            if any(op.spread() is None for op in self.segments[j]):
                total = np.full((classes, classes), np.inf)
                break
            x, error = carried(self.segments[j], x, error, True)
            gain = math.prod(self.a[j:], start=Fraction(1))
            gain *= self.b[j - 1] * self.m[j - 1] if j else 1
            distances = apart()
            if j == n:
                reach = np.minimum(reach, float_up(self.top[n - 1] * self.m[n - 1]) * distances * (1 + rounding(2)))
                if classes > ROWS:
                    total = np.full((classes, classes), np.inf)
                    break
            # What underflows is far below the last term.
            total = total + float_up(gain) * distances * (1 + rounding(2)) + 2.0**-900
        return np.minimum(total * (1 + rounding(n + 4)), reach + 2.0**-900)


# ---------------------------------------------------------------------------------------------------------------------
# Files: read with limits, and never believed


def number(value: Any) -> float | None:
    """A finite JSON number as a float; None for anything else."""
    if type(value) not in (int, float):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def finite(value: Any, name: str, least: float = 0.0) -> float:
    """A JSON number. Raises: Unproved for anything else, or if it is less than `least`."""
    found = number(value)
    if found is None or found < least:
        raise Unproved(f"{name} {value!r} is not a number of at least {least:g}")
    return found


def read_bytes(path: pathlib.Path, limit: int, budget: Budget) -> bytes:
    """A regular file of at most `limit` bytes, and nothing else: a pipe would block, a device never end."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise Unreadable(f"{path} is no regular file")
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise Unreadable(f"{path} is no regular file")
            budget.take(path, found.st_size, limit)
            data = file.read(found.st_size + 1)
    except FileNotFoundError as error:
        raise Unreadable(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        raise Unreadable(f"{path} cannot be read ({error})") from error
    if len(data) != found.st_size:
        raise Unreadable(f"{path} has not the {found.st_size} bytes that it is said to have")
    return data


def unique(pairs: list) -> dict:
    """A JSON object. Raises: ValueError if a key is there twice: other readers might take the other value."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def read_json(path: pathlib.Path, budget: Budget) -> dict:
    def refuse(text):
        raise ValueError(f"{text} is no number")

    try:
        document = json.loads(
            read_bytes(path, JSON_BYTES, budget).decode(), parse_constant=refuse, object_pairs_hook=unique
        )
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"{path} is damaged ({error})") from error
    if not isinstance(document, dict):
        raise Unreadable(f"{path} is damaged (expected an object)")
    return document


def read_arrays(path: pathlib.Path, budget: Budget) -> tuple[dict[str, np.ndarray], str]:
    """The arrays of a safetensors file, and the SHA-256 of its bytes."""
    data = read_bytes(path, ARRAY_BYTES, budget)
    size = int.from_bytes(data[:8], "little")
    budget.take(path, size, HEADER_BYTES, "bytes of its header")
    try:
        json.loads(data[8 : 8 + size].decode(), object_pairs_hook=unique)  # names that are there once
        return safetensors.numpy.load(data), hashlib.sha256(data).hexdigest()
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise Unreadable(f"{path} is damaged ({error})") from error


def widened(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same numbers with those of float32 arrays as float64, which holds every one of them; hashes are of these."""
    return {name: array.astype(np.float64) if array.dtype == np.float32 else array for name, array in arrays.items()}


def read_npz(path: pathlib.Path, budget: Budget) -> dict[str, np.ndarray]:
    """The arrays of an npz file, after a look at what they unpack to."""
    data = read_bytes(path, ARRAY_BYTES, budget)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            members = file.infolist()
            if len({member.filename for member in members}) < len(members):
                raise ValueError("a name is there twice")
            budget.take(path, sum(member.file_size for member in members), ARRAY_BYTES, "bytes unpacked")
            for member in members:
                if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise ValueError("packed in an unknown way")
                with file.open(member) as stream:
                    version = np.lib.format.read_magic(stream)
                    read = (
                        np.lib.format.read_array_header_1_0
                        if version == (1, 0)
                        else np.lib.format.read_array_header_2_0
                    )
                    shape, _, dtype = read(stream)
                    if math.prod(shape) * dtype.itemsize > member.file_size:
                        raise ValueError(f"{member.filename} is shorter than its shape {shape}")
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except TooLarge:
        raise
    except Exception as error:  # whatever the decoder raises that meets the damage
        raise Unreadable(f"{path} is damaged ({error})") from error


def read_split(path: pathlib.Path, budget: Budget) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (n, ...), uint8, and labels (n,) of the data set that a certificate is about."""
    pairs = ("test_images", "test_labels"), ("images", "labels"), ("pixels", "labels")
    arrays = read_npz(path, budget) if path.suffix == ".npz" else read_arrays(path, budget)[0]
    names = sorted(arrays)
    found = next(([arrays[name] for name in pair] for pair in pairs if set(pair) <= set(names)), None)
    if found is None:
        raise Unreadable(f"{path}: expected the arrays {' or '.join(' and '.join(p) for p in pairs)}, got {names}")
    pixels, labels = found
    if pixels.dtype != np.uint8 or labels.dtype.kind not in "iu" or labels.shape != pixels.shape[:1]:
        raise Unreadable(
            f"{path}: expected uint8 images and integer labels, one for each, got {pixels.dtype} {pixels.shape} and "
            f"{labels.dtype} {labels.shape}"
        )
    return pixels, labels


def expect_schema(path: pathlib.Path, document: dict, form: str, schema: int) -> None:
    if document.get("format") == form and type(document.get("schema")) is int and 0 < document["schema"] < schema:
        raise Unreadable(
            f"{path}: of schema {document['schema']}, by an earlier version, and this checker proves schema {schema}: "
            "certify the run again (python -m lipjax certify), or check it by the checker.py of that version"
        )
    if document.get("format") != form or type(document.get("schema")) is not int or document["schema"] != schema:
        found = f"{document.get('format')!r}, {document.get('schema')!r}"
        raise Unreadable(f"{path}: expected format {form!r}, schema {schema}, got {found}")


# ---------------------------------------------------------------------------------------------------------------------
# One run: its files, and what is found in them


@dataclasses.dataclass
class Files:
    """The files of a run's directory: read, and of the schema that is proved here, but nothing of them believed yet."""

    directory: pathlib.Path
    layout: dict[str, Any]  # frozen/network.json
    arrays: dict[str, np.ndarray]  # frozen/network.safetensors
    document: dict[str, Any]  # certificate.json
    sample: dict[str, Any]  # its entry of that name
    images: dict[str, np.ndarray]  # images.safetensors
    images_sha256: str
    report: dict[str, Any] | None  # report.json, where there is one
    source: str | os.PathLike | None  # a file of the whole data set
    split: tuple[np.ndarray, np.ndarray] | None  # its pixels and labels
    count: int  # of how many images everything is computed again


@dataclasses.dataclass
class Findings:
    """The problems that a check has found, each with its place, and facts for the summary if there are none."""

    problems: list[str] = dataclasses.field(default_factory=list)
    facts: list[str] = dataclasses.field(default_factory=list)

    def problem(self, place: str, message: str) -> None:
        self.problems.append(f"{place}: {message}")

    def add(self, other: "Findings") -> None:
        self.problems += other.problems
        self.facts += other.facts


@dataclasses.dataclass
class Network:
    """The frozen network: the normalisation and the operators with their names, and the head."""

    names: list[str]
    ops: list[Operator]
    head: "LinearHead | MLPHead"

    @property
    def in_shape(self) -> tuple[int, ...]:
        return self.ops[0].in_shape

    @property
    def widest(self) -> int:
        """Numbers of the largest output of an operator, for one input."""
        return max(math.prod(op.out_shape) for op in self.ops)


@dataclasses.dataclass
class Constants:
    """Proved constants (k, k) of logit differences, and the product of the operators' that they were proved by."""

    table: np.ndarray  # per unit of the input: those of the certificate
    head_table: np.ndarray  # per unit of the features: the head's own
    scale: float  # of the operators, rounded up


@dataclasses.dataclass
class Rows:
    """The rows of a certificate, one for each image, and which of them are of the right form."""

    rows: list[dict[str, Any]]
    data: dict[str, Any]  # its entry of that name
    places: list[int]  # of each row's image in the data set
    good: np.ndarray  # True for rows whose form, radius and margin fit


@dataclasses.dataclass
class Evaluated:
    """A batch of images that went through a network: the features, and how far they may be from the exact ones."""

    indices: list[int]  # of the rows
    rows: list[dict[str, Any]]
    predictions: np.ndarray  # as the rows state them
    features: np.ndarray
    error: np.ndarray  # (b,)


def read_files(directory: pathlib.Path, count: float | None, data: str | os.PathLike | None, budget: Budget) -> Files:
    """Reads a run's directory, and sets what its check may cost.

    Args: count: of how many images everything is to be computed again; None: of all whose pixels are at hand. data: a
      file of the whole data set.
    Raises: Unreadable.
    """
    frozen = directory / "frozen"
    layout = read_json(frozen / "network.json", budget)
    document = read_json(directory / "certificate.json", budget)
    expect_schema(frozen / "network.json", layout, NETWORK_FORMAT, NETWORK_SCHEMA)
    expect_schema(directory / "certificate.json", document, FORMAT, SCHEMA)
    arrays = widened(read_arrays(frozen / "network.safetensors", budget)[0])
    sample = document.get("sample")
    if not isinstance(sample, dict) or sample.get("file") != "images.safetensors":
        raise Unreadable(f"{directory / 'certificate.json'}: sample names no images.safetensors")
    images, images_sha256 = read_arrays(directory / "images.safetensors", budget)
    path = directory / "report.json"
    report = read_json(path, budget) if os.path.lexists(path) else None
    split = None if data is None else read_split(pathlib.Path(data), budget)
    files = Files(directory, layout, arrays, document, sample, images, images_sha256, report, data, split, 0)
    files.count = number_evaluated(files, count)
    held = sum(array.nbytes for array in (*arrays.values(), *images.values()))
    work = (WORK + WORK_PER_BYTE * held) * max(1.0, files.count / SAMPLE)
    liplt = document.get("liplt")
    chains = liplt.get("chains") if isinstance(liplt, dict) else None
    work += min(WORK_PER_CHAIN * (len(chains) if isinstance(chains, list) else 0), WORK_OF_CHAINS)
    budget.allowed = budget.factor * work
    return files


def number_evaluated(files: Files, asked: float | None) -> int:
    """The number of images that are evaluated again. Raises: Unreadable if more are asked for than can be."""
    rows, held = files.document.get("images"), len(files.images.get("indices", ()))
    total = len(rows) if isinstance(rows, list) else 0
    here = held if files.split is None else total
    count = here if asked is None else int(min(asked, total))
    if count > here:
        raise Unreadable(
            f"{files.directory / 'images.safetensors'} holds {here} of {total} images: for more, give --data a file "
            "with the whole data set"
        )
    if count > held and files.layout.get("head") == "MLPHead":
        raise Unreadable(
            f"radii of an MLP head rest on minorants, which {files.directory / 'images.safetensors'} holds for "
            f"{held} images: give --images {held} at most"
        )
    return count


def prove(files: Files, budget: Budget) -> Findings:
    """Checks everything that a run's files claim, one part after the other."""
    frozen_sha256 = hash_of_network(files.layout, files.arrays)
    found = check_hashes(files, frozen_sha256)
    made, network = build_network(files.layout, files.arrays)
    found.add(made)
    if network is None:
        return found
    plan(files.document, network, files.count, budget)
    layers, product = prove_layers(files.document, network)
    found.add(layers)
    bounded, constants = prove_constants(files.document, network, product, budget)
    found.add(bounded)
    formed, rows = check_rows(files.document, network, constants)
    found.add(formed)
    evaluated, undecided = check_images(files, network, constants, rows, frozen_sha256)
    found.add(evaluated)
    if files.report is not None:
        found.add(check_report(files.report, files.layout, network, rows, undecided, frozen_sha256, budget))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The network of a run: hashes, and its operators made


def hash_of_network(layout: dict[str, Any], arrays: dict[str, np.ndarray]) -> str:
    """SHA-256 of the operators' layout and of all arrays."""
    digest = hashlib.sha256(json.dumps({k: layout.get(k) for k in ("ops", "head")}, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        digest.update(
            f"\n{name} {list(array.shape)}\n".encode() + array.astype(array.dtype.newbyteorder("<")).tobytes()
        )
    return digest.hexdigest()


def check_hashes(files: Files, frozen_sha256: str) -> Findings:
    """Checks the claim's words, and that network, arrays and images are those whose hashes are stated."""
    found = Findings()
    if files.document.get("claim") != CLAIM:
        found.problem("certificate.json, claim", "not the claim that this checker proves")
    for place, stated in (
        ("frozen/network.json, sha256", files.layout.get("sha256")),
        ("certificate.json, frozen_sha256", files.document.get("frozen_sha256")),
    ):
        if stated != frozen_sha256:
            found.problem(place, f"{stated!r}, but layout and arrays hash to {frozen_sha256}")
    hashes = files.document.get("arrays")
    hashes = hashes if isinstance(hashes, dict) else {}
    for name in sorted(set(hashes) | set(files.arrays)):
        array = files.arrays.get(name)
        if array is None or hashes.get(name) != hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest():
            found.problem(f"frozen/network.safetensors, {name}", "not the array of the certificate (its hash differs)")
    if files.sample.get("sha256") != files.images_sha256:
        stated = files.sample.get("sha256")
        found.problem("images.safetensors", f"hashes to {files.images_sha256}, not to {stated!r}")
    return found


@dataclasses.dataclass
class Arrays:
    """The arrays of a network by name, each of which one operator takes."""

    arrays: dict[str, np.ndarray]
    used: set[str] = dataclasses.field(default_factory=set)

    def take(self, name: str) -> np.ndarray:
        """Raises: Unproved for an array that is missing or taken."""
        need(name in self.arrays, f"the array {name} is missing")
        need(name not in self.used, f"the array {name} is that of two operators")
        self.used.add(name)
        return self.arrays[name]


def make_operator(entry: dict[str, Any], prefix: str, arrays: Arrays) -> Operator:
    """The operator of an entry without its name; its arrays are named after the prefix. Raises: Unproved."""
    kind: Any = entry.get("type")
    need(isinstance(kind, str) and kind in OPERATORS, f"operators of type {kind!r} cannot be checked")
    cls = OPERATORS[kind]
    settings = {key: value for key, value in entry.items() if key != "type"}
    given = {name for name in settings if name not in cls.optional}
    need(given == set(cls.settings), f"expected the fields {sorted(cls.settings)}, got {sorted(settings)}")
    settings |= cls.make_parts(settings, prefix, arrays)
    return cls({**settings, **{field: arrays.take(f"{prefix}/{field}") for field in cls.arrays}})


def build_network(layout: dict[str, Any], arrays: dict[str, np.ndarray]) -> tuple[Findings, Network | None]:
    """Makes the operators of a layout; None where that fails. Raises: Unreadable for a layout without operators."""
    found = Findings()
    for name, array in sorted(arrays.items()):
        if array.dtype != np.float64 or not np.isfinite(array).all():
            found.problem(f"frozen/network.safetensors, {name}", "expected finite float64 numbers")
    entries = layout.get("ops")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise Unreadable("frozen/network.json: ops is no list of operators")
    names = [entry.get("name") for entry in entries]
    if len(set(map(str, names))) != len(names) or not all(isinstance(name, str) for name in names):
        found.problem("frozen/network.json, ops", f"names are not unique: {names}")
    if found.problems:
        return found, None
    names, store = ["input", *names], Arrays(arrays)
    made: list[Operator | None] = []
    for entry in entries:
        name = entry["name"]
        try:
            made.append(make_operator({key: v for key, v in entry.items() if key != "name"}, f"ops/{name}", store))
        except Unproved as error:
            found.problem(f"frozen/network.json, {name} ({entry.get('type')})", str(error))
            made.append(None)
    kind: Any = layout.get("head")
    head: Any = None
    try:
        need(kind in HEADS, f"heads of type {kind!r} cannot be checked")
        head = HEADS[kind]({name: store.take(f"head/{name}") for name in HEADS[kind].arrays})
        std = {name: store.take(f"input_{name}") for name in ("mean", "std")}
        if made[0] is not None:
            made.insert(0, Normalize({**std, "in_shape": list(made[0].in_shape)}))
    except Unproved as error:
        found.problem(f"frozen/network.json, head ({kind}) or input", str(error))
    for name in sorted(set(arrays) - store.used):
        found.problem(f"frozen/network.safetensors, {name}", "an array that no operator has")
    if found.problems:
        return found, None
    ops = [op for op in made if op is not None]
    called = layout.get("class_names")
    texts = isinstance(called, list) and all(isinstance(text, str) and text for text in called)
    if called is not None and not (texts and len(called) == head.classes):
        found.problem("frozen/network.json, class_names", "expected one text for each class, or null")
    chain: list[tuple[str, Any]] = [*zip(names, ops, strict=True), ("head", head)]
    for (name, op), (after, following) in zip(chain[:-1], chain[1:], strict=True):
        if tuple(op.out_shape) != tuple(following.in_shape):
            found.problem(
                f"frozen/network.json, {after}", f"takes {following.in_shape}, but {name} gives {op.out_shape}"
            )
    return found, None if found.problems else Network(names, ops, head)


# ---------------------------------------------------------------------------------------------------------------------
# The bounds of a run (§1 to §6, §12)


def plan(document: dict[str, Any], network: Network, count: int, budget: Budget) -> None:
    """Spends what all of it will take, but for LipLT's chains. Raises: TooLarge before any of it is done."""
    rows, claims = document.get("layers"), document.get("head")
    stated = [row if isinstance(row, dict) else {} for row in rows] if isinstance(rows, list) else []
    stated += [{}] * (len(network.ops) - len(stated))
    costs: list[tuple[int | float, str]] = []
    for name, op, row in zip(network.names, network.ops, stated, strict=False):
        place, details = f"certificate.json, layers, {name} ({type(op).__name__})", row.get("details")
        work, numbers = op.effort(row.get("method"), details if isinstance(details, dict) else {})
        budget.hold(place, numbers)
        costs.append((work + len(network.ops) * FRACTION, place))
    work, numbers = network.head.effort(claims)
    place = f"certificate.json, head ({type(network.head).__name__})"
    budget.hold(place, numbers)
    costs.append((work, place))
    for name, op in [*zip(network.names, network.ops, strict=True), ("head", network.head)]:
        costs.append((count * op.cost() + CALL, f"{count} images through {name}"))
    budget.spend(f"{max(costs)[1]}, which costs most, and the rest", math.fsum(work for work, _ in costs))


def prove_layers(document: dict[str, Any], network: Network) -> tuple[Findings, Fraction | None]:
    """Proves every operator's claimed Lipschitz constant. Returns their product, too: None if one is not proved.

    Raises: Unreadable for a certificate without rows of operators.
    """
    found = Findings()
    rows = document.get("layers")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise Unreadable("certificate.json: layers is no list of rows")
    kinds = [type(op).__name__ for op in network.ops]
    if [(row.get("name"), row.get("type")) for row in rows] != list(zip(network.names, kinds, strict=True)):
        found.problem("certificate.json, layers", "not the operators of the frozen network, in their order")
        return found, None
    product = Fraction(1)
    for op, name, row in zip(network.ops, network.names, rows, strict=True):
        details = row.get("details")
        try:
            claim = finite(row.get("bound"), "bound")
            need(isinstance(details, dict), "details are missing")
            op.claim = Fraction(claim)
            with np.errstate(all="ignore"):
                proved = op.proves(op.claim, op.named(row.get("method")), details)
            need(proved, f"the bound {claim!r} cannot be proved ({row.get('method')})")
            product *= op.claim
        except Unproved as error:
            found.problem(f"certificate.json, layers, {name} ({row['type']})", str(error))
            return found, None
    text = shown(float_up(product), decimal.ROUND_CEILING)
    found.facts.append(f"{len(rows)} layers: every bound proved, product {text}")
    return found, product


def prove_constants(
    document: dict[str, Any], network: Network, product: Fraction | None, budget: Budget
) -> tuple[Findings, Constants | None]:
    """Proves the table margin_lipschitz: no entry below what the head's constants and those of the operators give."""
    found, head = Findings(), network.head
    try:
        with np.errstate(all="ignore"):
            head_table = head.prove(document.get("head"))
    except Unproved as error:
        found.problem(f"certificate.json, head ({type(head).__name__})", str(error))
        return found, None
    k = head.classes
    table: Any = document.get("margin_lipschitz")
    square = isinstance(table, list) and len(table) == k and all(isinstance(r, list) and len(r) == k for r in table)
    values: Any = [[number(v) for v in row] for row in table] if square else []
    if not square or any(v is None or v < 0 for row in values for v in row):
        found.problem("certificate.json, margin_lipschitz", f"expected {k} x {k} finite numbers, not negative")
        return found, None
    if product is None:
        return found, None
    scale = float_up(product)
    stored = np.array(values)
    with np.errstate(all="ignore"):
        enough = stored >= np.nextafter(scale * head_table, np.inf)
    enough |= head_table == 0
    short = []
    for i, j in np.argwhere(~enough & ~np.eye(k, dtype=bool)).tolist():
        high = float(head_table[i, j])
        if not (math.isfinite(high) and Fraction(values[i][j]) >= product * Fraction(high)):
            short.append((i, j))
    if document.get("liplt") is not None:
        found.add(prove_transformed(document["liplt"], network, head_table, stored, short, budget))
    else:
        for i, j in short:
            needed = float_up(product * Fraction(float(head_table[i, j])))
            message = f"{float(stored[i, j])!r}, but only {needed!r} is proved"
            found.problem(f"certificate.json, margin_lipschitz[{i}][{j}]", message)
    if found.problems:
        return found, None
    above = stored[~np.eye(k, dtype=bool)]
    if above.size:
        least, most = (shown(float(n), decimal.ROUND_CEILING) for n in (above.min(), above.max()))
        found.facts.append(f"Lipschitz constants of logit differences: {least} to {most}")
    return found, Constants(stored, head_table, scale)


def prove_transformed(
    liplt: Any,
    network: Network,
    head_table: np.ndarray,
    stored: np.ndarray,
    short: list[tuple[int, int]],
    budget: Budget,
) -> Findings:
    """Proves the chains that are stated, and the constants `short` that are below the product of norms."""
    found = Findings()
    try:
        with np.errstate(all="ignore"):
            transformed = LoopTransformation(network.ops[1:], network.names[1:], network.head, liplt, budget)
            scale = np.nextafter(float_up(network.ops[0].claim), np.inf)
            table = np.nextafter(transformed.table(head_table) * scale, np.inf)
    except Unproved as error:
        found.problem("certificate.json, liplt", str(error))
        return found
    for i, j in short:
        if not table[i, j] <= stored[i, j]:
            message = f"{float(stored[i, j])!r}, but only {float(table[i, j])!r} is proved by LipLT"
            found.problem(f"certificate.json, margin_lipschitz[{i}][{j}]", message)
    if not found.problems:
        found.facts.append(f"LipLT: {len(transformed.chains)} norms of chains proved")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The images of a run (§7, §8, §11)


def check_rows(document: dict[str, Any], network: Network, constants: Constants | None) -> tuple[Findings, Rows]:
    """Checks the form of every row, and the relation of radius, margin and constant (§8).

    Raises: Unreadable for a certificate without rows of images.
    """
    found = Findings()
    rows: Any = document.get("images")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise Unreadable("certificate.json: images is no list of rows")
    head, k, data = network.head, network.head.classes, document.get("data")
    data = data if isinstance(data, dict) else {}
    if type(data.get("num_images")) is not int or data["num_images"] != len(rows):
        found.problem("certificate.json, data", f"num_images {data.get('num_images')!r}, but {len(rows)} rows")
    placed, places = places_of(data, len(rows))
    found.add(placed)
    good = np.zeros(len(rows), bool)
    for index, row in enumerate(rows):
        message = wrong_form(row, k)
        good[index] = message is None
        if message is None and not (isinstance(head, MLPHead) or constants is None or k == 1):
            margin, p, rival = row["margin"], row["prediction"], row["rival"]
            wanted = radius_of(-math.inf if margin is None else float(margin), float(constants.table[p, rival]))
            if number(row["radius"]) != wanted:
                good[index] = False
                message = f"radius {number(row['radius'])!r}, but margin and constant give {wanted!r}"
        if message is not None:
            found.problem(f"certificate.json, images[{index}]", message)
    return found, Rows(rows, data, places, good)


def wrong_form(row: dict[str, Any], classes: int) -> str | None:
    """The first thing that no row of an image of so many classes may say; None for a row of the right form."""
    if set(row) != {"label", "prediction", "rival", "margin", "radius"}:
        return f"expected label, prediction, rival, margin and radius, got {sorted(row)}"
    integers: list[Any] = [row.get(name) for name in ("label", "prediction", "rival")]
    margin, radius = row.get("margin"), number(row.get("radius"))
    if not all(type(n) is int for n in integers) or (margin is not None and number(margin) is None):
        return "label, prediction, rival or margin is not a number"
    label, p, rival = integers
    if radius is None or radius < 0 or not 0 <= label < 2**31 or not (0 <= p < classes and 0 <= rival < classes):
        return "label, prediction, rival or radius is out of range"
    if rival == p and classes > 1:
        return "the rival is the prediction"
    if classes == 1 and margin is not None:
        return f"margin {margin!r}, but there is one class, and so no difference of logits"
    if margin is None and radius > 0 and classes > 1:
        return f"radius {radius!r} without a margin"
    return None


def places_of(data: dict[str, Any], count: int) -> tuple[Findings, list[int]]:
    """Of every row the place of its image in the data set: `data.indices`, or without them the first places."""
    found, total, first = Findings(), data.get("of"), list(range(count))
    indices = data.get("indices", first)
    if type(total) is not int or total < count:
        found.problem("certificate.json, data", f"{count} rows, but of {total!r} images")
        return found, first
    integers = isinstance(indices, list) and len(indices) == count and all(type(i) is int for i in indices)
    if not integers or any(a >= b for a, b in zip([-1, *indices], [*indices, total], strict=True)):
        message = f"indices: expected {count} different places below {total}, ascending, one for each row"
        found.problem("certificate.json, data", message)
        return found, first
    if count == total:
        found.facts.append(f"about all {total} images of the data set")
        return found, indices
    how = "the first ones, not drawn by hash"
    if "indices" in data:
        if total > MOST_IMAGES:
            found.problem("certificate.json, data", f"{total} images: draws are checked of {MOST_IMAGES} at most")
            return found, first
        how = "drawn by hash" if indices == drawn(total, count) else "NOT drawn by hash, but chosen otherwise"
    found.facts.append(f"about {count} of the {total} images of the data set ({how})")
    return found, indices


def check_images(
    files: Files, network: Network, constants: Constants | None, rows: Rows, frozen_sha256: str
) -> tuple[Findings, list[int]]:
    """Proves what is claimed of the images whose pixels are there. Returns the rows without a proved class, too."""
    found, undecided = Findings(), []
    head, in_shape, data = network.head, network.in_shape, rows.data
    expected = {"indices": (np.int64, 1), "labels": (np.int64, 1), "pixels": (np.uint8, 1 + len(in_shape))}
    if isinstance(head, MLPHead):
        forms = (np.int64, 1), (np.int64, 1), (np.float32, 2)
        expected |= dict(zip(("minorant_images", "minorant_rivals", "minorant_points"), forms, strict=True))
    if {name: (a.dtype, a.ndim) for name, a in files.images.items()} != {
        name: (np.dtype(dtype), ndim) for name, (dtype, ndim) in expected.items()
    }:
        found.problem("images.safetensors", f"expected the arrays {sorted(expected)} with their types")
        return found, undecided
    indices, labels, pixels = (files.images[name] for name in ("indices", "labels", "pixels"))
    wanted = sample_indices(frozen_sha256, str(data.get("sha256")), rows.rows)
    stated = files.sample.get("num_images")
    if indices.tolist() != wanted or type(stated) is not int:
        found.problem("images.safetensors, indices", "not the images that the certificate's hashes draw")
        return found, undecided
    scale = data.get("pixel_max")
    fit = len(labels) == len(pixels) == len(wanted) == stated and pixels.shape[1:] == in_shape
    if type(scale) is not int or not 1 <= scale <= 255 or not fit or pixels.max(initial=0) > scale:
        found.problem(
            "images.safetensors", f"labels or pixels do not fit the network, pixel_max {scale!r}, or the indices"
        )
        return found, undecided
    found.add(check_fingerprint(files, rows, pixels, labels, len(wanted)))
    for place, index in enumerate(wanted):
        label = rows.rows[index].get("label")
        if label != int(labels[place]):
            found.problem(f"certificate.json, images[{index}]", f"label {label!r}, not {labels[place]}")
    chosen = sample_indices(frozen_sha256, str(data.get("sha256")), rows.rows, files.count)
    places = np.searchsorted(wanted, chosen).tolist()
    if files.split is not None:
        sample = pixels
        pixels, labels = files.split
        pixels = pixels[..., None] if pixels.ndim == len(in_shape) else pixels
        whole = check_split(files.source, rows, in_shape, pixels, labels, sample, wanted)
        found.add(whole)
        if whole.problems:
            return found, undecided
        places = [rows.places[row] for row in chosen]
    if constants is None or not rows.good[chosen].all():
        return found, undecided
    size = max(1, min(256, CHUNK // network.widest))
    batches = [slice(start, start + size) for start in range(0, len(chosen), size)]

    def run_batch(batch: slice) -> tuple[list[tuple[int, str]], list[int]]:
        own, x = chosen[batch], pixels[places[batch]] / np.float64(scale)
        return prove_batch(network, constants, files.images, own, [rows.rows[i] for i in own], x)

    for wrong, open_ in in_threads(run_batch, batches, 16 * size * network.widest):
        undecided += open_
        for index, message in wrong:
            found.problem(f"certificate.json, images[{index}]", message)
    part, rest = "all", ""
    if len(chosen) < len(rows.rows):
        part = f"{len(chosen)} (drawn by hash) of"
        rest = "; of the others only that radius, margin and constants fit"
    if undecided:
        found.facts.append(f"{len(undecided)} images whose class cannot be decided (ties), with radius 0")
    radii = [row["radius"] for row in rows.rows if row["prediction"] == row["label"]]
    largest = f", largest certified radius {shown(float(max(radii)))}" if radii else ""
    found.facts.append(f"{part} {len(rows.rows)} images evaluated again{largest}{rest}")
    return found, undecided


def check_fingerprint(files: Files, rows: Rows, pixels: np.ndarray, labels: np.ndarray, count: int) -> Findings:
    """Checks data.sha256 where it is said to be the hash of exactly these pixels and labels."""
    found = Findings()
    if files.sample.get("is_split") is not True:
        if files.split is None:
            found.facts.append("the images are not tied to the data set's hash")
        return found
    whole = count == len(rows.rows) == rows.data.get("of")
    if not whole or fingerprint(pixels, labels, rows.data["pixel_max"]) != rows.data.get("sha256"):
        found.problem("certificate.json, data", "sha256 is not that of the pixels and labels")
    return found


def check_split(
    source: str | os.PathLike | None,
    rows: Rows,
    in_shape: tuple[int, ...],
    pixels: np.ndarray,
    labels: np.ndarray,
    sample: np.ndarray,
    indices: list[int],
) -> Findings:
    """Checks that a file of the whole data set has data.sha256, the rows' labels and the sample's pixels."""
    found, data = Findings(), rows.data
    scale = data["pixel_max"]
    digest = fingerprint(pixels, labels, scale)
    if digest != data.get("sha256") or len(labels) != data.get("of"):
        message = f"{len(labels)} images with SHA-256 {digest}, but the certificate is about "
        found.problem(str(source), f"{message}{data.get('of')!r} with {data.get('sha256')!r}")
    elif pixels.shape[1:] != in_shape or max(rows.places, default=0) >= len(labels) or pixels.max(initial=0) > scale:
        found.problem(str(source), f"images {pixels.shape} do not fit the network or the rows")
    elif not np.array_equal(pixels[[rows.places[row] for row in indices]], sample):
        found.problem("images.safetensors, pixels", f"not those of {source}")
    else:
        own = labels[rows.places]
        for index in np.flatnonzero(own != [row.get("label") for row in rows.rows]).tolist():
            place = f"certificate.json, images[{index}]"
            found.problem(place, f"label {rows.rows[index].get('label')!r}, not {own[index]}")
        found.facts.append("the images are those of the data set's hash")
    return found


def prove_batch(
    network: Network,
    constants: Constants,
    images: dict[str, np.ndarray],
    indices: list[int],
    rows: list[dict[str, Any]],
    x: np.ndarray,
) -> tuple[list[tuple[int, str]], list[int]]:
    """Proves the rows of images (b, *in_shape) in [0, 1]: the class at the image and its radius (§7, §8, §11).

    Args: images: the arrays of images.safetensors, of which minorants are taken.
    Returns: of rows that are not proved their index and a message, and the indices of those without a proved class.
    """
    head = network.head
    x, error = evaluate_in_turn(network.ops, x, np.full(len(x), FLOOR))
    logits, own = head.evaluate(x)
    own = own + FLOOR * (1 + lengths(x))[:, None]
    p = np.array([row["prediction"] for row in rows])
    batch = np.arange(len(rows))
    gaps = logits[batch, p][:, None] - logits

    def slack(feature_error: np.ndarray) -> np.ndarray:
        total = constants.head_table[p] * feature_error[:, None] + own + own[batch, p][:, None]
        return total * (1 + rounding(8)) + rounding(2) * np.abs(gaps)

    room = slack(error)
    low, high = np.nextafter(gaps - room, -np.inf), np.nextafter(gaps + room, np.inf)
    low, high = np.where(np.isnan(low), -np.inf, low), np.where(np.isnan(high), np.inf, high)
    found, undecided, others = [], [], np.arange(head.classes)
    for place, (index, row) in enumerate(zip(indices, rows, strict=True)):
        rivals, radius, rival = others[others != p[place]], row["radius"], row["rival"]
        if not all(low[place, i] >= 0 for i in rivals):
            undecided.append(index)
        beaten = [i for i in rivals if high[place, i] < 0]
        if beaten:
            found.append((index, f"prediction {p[place]}, but class {beaten[0]} has a larger logit"))
        if len(rivals) == 0:
            continue
        if row["margin"] is not None and not row["margin"] <= low[place, rival]:
            found.append((index, f"margin {row['margin']!r}, but only {float(low[place, rival])!r} can be proved"))
        if isinstance(head, MLPHead):
            continue
        to_rivals = {int(i): float(constants.table[p[place], i]) for i in rivals}
        proved = {i: radius_of(float(low[place, i]), c) for i, c in to_rivals.items()}
        short = min(proved, key=proved.__getitem__)
        if not radius <= proved[short]:
            found.append((index, f"radius {radius!r}, but against class {short} only {proved[short]!r} can be proved"))
        # Another class limits the radius if it is nearer by more than the rounding errors of two evaluations (§8).
        at_least = radius_of(float(gaps[place, rival] - 8 * room[place, rival]), to_rivals[rival])
        possible = {i: math.nextafter(float(high[place, i]) / c, math.inf) for i, c in to_rivals.items() if c > 0}
        nearest = min(possible, key=possible.__getitem__, default=rival)
        if not beaten and not at_least <= possible.get(nearest, math.inf):
            found.append((index, f"rival {rival}, but class {nearest} limits the radius"))
    if isinstance(head, MLPHead):
        own_room = slack(np.zeros_like(error))
        near = np.nextafter(gaps - own_room, -np.inf)
        evaluated = Evaluated(indices, rows, p, x, error)
        found += prove_by_minorants(head, constants, images, evaluated, near, near > 2.0**20 * own_room)
    return found, undecided


def prove_by_minorants(
    head: MLPHead,
    constants: Constants,
    images: dict[str, np.ndarray],
    batch: Evaluated,
    margins: np.ndarray,
    clear: np.ndarray,
) -> list[tuple[int, str]]:
    """Proves radii of an MLP head: f_p > f_i on a ball around the computed features, for every rival i (§11.7).

    Args: images: as in `prove_batch`. margins: (b, k), proved at the computed features. clear: (b, k), where the margin
      is so far above its rounding error that radii say which rival is nearer.
    Returns: of rows that are not proved their index and a message.
    """
    indices, features, error, p = batch.indices, batch.features, batch.error, batch.predictions
    radii = np.array([row["radius"] for row in batch.rows])
    rivals = np.array([row["rival"] for row in batch.rows])
    reach = (error + constants.scale * radii * (1 + rounding(2))) * (1 + rounding(4))
    points, stored = images["minorant_points"], {}
    pairs = zip(images["minorant_images"].tolist(), images["minorant_rivals"].tolist(), strict=True)
    for row, (image, rival) in enumerate(pairs):
        if 0 <= rival < head.classes:
            stored[image, rival] = row

    def at_points(places, rivals):
        """The pairs that have a stored point, as booleans; their points, and their curvatures."""
        known = np.array([(indices[j], int(i)) in stored for j, i in zip(places, rivals, strict=True)], bool)
        places, rivals = places[known], rivals[known]
        chosen = [stored[indices[j], int(i)] for j, i in zip(places, rivals, strict=True)]
        fine = [head.fine.get((int(p[j]), int(i)), math.inf) for j, i in zip(places, rivals, strict=True)]
        curvatures = np.minimum(np.array(fine), head.coarse[p[places], rivals])
        return known, points[chosen].astype(np.float64), curvatures

    def not_positive(reach) -> np.ndarray:
        """(b, k): the rivals that are not proved to stay behind within these distances, where they are not 0."""
        open_ = np.broadcast_to(reach[:, None] > 0, clear.shape).copy()
        open_[np.arange(len(p)), p] = False
        # By the constant that holds everywhere, by the minorant at the image, by the minorant at a stored point.
        open_ &= ~(margins > constants.head_table[p] * reach[:, None] * (1 + rounding(4)) + FLOOR)
        places, rivals = np.nonzero(open_)
        if len(places):
            a, q = features[places], p[places]
            holds = head.positive_within(a, a, q, rivals, head.coarse[q, rivals], reach[places])
            open_[places[holds], rivals[holds]] = False
        places, rivals = np.nonzero(open_)
        known, b, m = at_points(places, rivals)
        places, rivals = places[known], rivals[known]
        if len(places):
            holds = head.positive_within(features[places], b, p[places], rivals, m, reach[places])
            open_[places[holds], rivals[holds]] = False
        return open_

    open_ = not_positive(np.where(radii > 0, reach, 0.0))
    found = [
        (indices[j], f"radius {float(radii[j])!r} cannot be proved against class {np.flatnonzero(open_[j])[0]}")
        for j in np.flatnonzero(open_.any(axis=1))
    ]
    # How far each rival is by the same three proofs, and whether another one is nearer by more than 0.1 %.
    all_, to_rivals = np.arange(len(p)), constants.head_table[p, rivals]
    quotients = margins[all_, rivals] / np.where(to_rivals > 0, to_rivals, 1.0)
    far = np.where(to_rivals > 0, quotients, np.inf)
    far = np.maximum(far, head.distance(features, features, p, rivals, head.coarse[p, rivals]))
    known, b, m = at_points(all_, rivals)
    if known.any():
        far[known] = np.maximum(far[known], head.distance(features[known], b, p[known], rivals[known], m))
    nearer = (1 - 2.0**-10) * far - 8 * error
    tried = clear[all_, rivals] & (nearer > 0) & (nearer < 2.0**300) & (rivals != p)
    open_ = not_positive(np.where(tried, nearer, 0.0)) & clear
    return found + [
        (indices[j], f"rival {rivals[j]}, but class {np.flatnonzero(open_[j])[0]} limits the radius")
        for j in np.flatnonzero(open_.any(axis=1))
    ]


# ---------------------------------------------------------------------------------------------------------------------
# The report of a run


def check_report(
    report: dict[str, Any],
    layout: dict[str, Any],
    network: Network,
    certificate: Rows,
    undecided: list[int],
    frozen_sha256: str,
    budget: Budget,
) -> Findings:
    """Checks what report.json derives from the certificate."""
    found, rows, classes = Findings(), certificate.rows, network.head.classes
    counted = [i for i in undecided if rows[i]["label"] == rows[i]["prediction"]]
    if counted:
        found.problem(
            "report.json, clean_accuracy",
            f"{len(counted)} images count as correct whose class is not proved, first images[{min(counted)}]",
        )
    if not certificate.good.all():
        return found
    right = np.array([row["label"] == row["prediction"] for row in rows], bool)
    radii = np.array([row["radius"] for row in rows], np.float64)
    if report.get("frozen_sha256") != frozen_sha256:
        found.problem("report.json, frozen_sha256", "of another network")
    if type(report.get("num_images")) is not int or report["num_images"] != len(rows):
        found.problem("report.json, num_images", f"{report.get('num_images')!r}, but {len(rows)} rows")
    if "of" in report and (type(report["of"]) is not int or report["of"] != certificate.data.get("of")):
        total = certificate.data.get("of")
        found.problem("report.json, of", f"{report['of']!r}, but the certificate's is {total!r}")
    if len(rows) == 0:
        found.problem("report.json", "accuracies of no images")
        return found
    if number(report.get("clean_accuracy")) != float(np.mean(right)):
        found.problem("report.json, clean_accuracy", f"{report.get('clean_accuracy')!r}, not {float(np.mean(right))!r}")
    stated, certified = report.get("radii"), report.get("certified_accuracy")
    if not isinstance(stated, list) or not isinstance(certified, dict) or any(number(r) is None for r in stated):
        found.problem("report.json", "radii or certified_accuracy is missing")
        return found
    if not all(r > 0 for r in stated) or len({shown(float(r)) for r in stated}) < len(stated):
        found.problem("report.json, radii", "not positive, or two of one name")
        return found
    budget.spend("report.json, radii", len(stated) * (1 + classes) * (CALL + PASS * len(rows)))
    wanted = {shown(float(r)): float(np.mean(right & (radii > r))) for r in stated}
    for r in stated:
        above = f"{r:.6g}"
        if float(above) > r and above in certified:
            found.problem(
                f"report.json, certified_accuracy[{above}]",
                f"{above} is more than the radius {r!r}, at which this was counted (earlier versions rounded names "
                f"of radii up: certify the run again); expected {shown(float(r))!r}",
            )
            del certified[above]
    for key in sorted(set(certified) | set(wanted)):
        if key not in wanted or number(certified.get(key)) != wanted[key]:
            place = f"report.json, certified_accuracy[{key}]"
            found.problem(place, f"{certified.get(key)!r}, not {wanted.get(key)!r}")
    names: list[str | None] = layout.get("class_names") or [None] * classes
    found.add(check_classes(report, rows, right, radii, {shown(float(r)): r for r in stated}, names))
    return found


def check_classes(
    report: dict[str, Any],
    rows: list[dict[str, Any]],
    right: np.ndarray,
    proved: np.ndarray,
    radii: dict[str, float],
    names: list[str | None],
) -> Findings:
    """Checks what report.json counts class by class, where it does.

    Args: right, proved: of each row, True for a correct prediction, and the radius. radii: by name. names: of classes.
    """
    found, fields, k = Findings(), ("per_class", "mean_over_classes", "confusion"), len(names)
    if not any(field in report for field in fields):
        return found
    labels, predictions = (np.array([row[field] for row in rows]) for field in ("label", "prediction"))
    if not ((labels >= 0) & (labels < k)).all():
        found.problem("report.json, per_class", f"some labels are not in 0 ... {k - 1}")
        return found
    table = []
    for label in range(k):
        own = labels == label
        shares = {key: float(np.mean((right & (proved > r))[own])) if own.any() else None for key, r in radii.items()}
        clean = float(np.mean(right[own])) if own.any() else None
        row = {"class": label, "name": names[label], "num_images": int(own.sum()), "clean_accuracy": clean}
        table.append({**row, "certified_accuracy": shares})
    present = [row for row in table if row["num_images"]]
    clean = math.fsum(row["clean_accuracy"] for row in present) / len(present)
    means = {key: math.fsum(row["certified_accuracy"][key] for row in present) / len(present) for key in radii}
    confusion = np.zeros((k, k), np.int64)
    np.add.at(confusion, (labels, predictions), 1)
    wanted = (table, {"clean_accuracy": clean, "certified_accuracy": means}, confusion.tolist())
    for field, value in zip(fields, wanted, strict=True):
        if json.dumps(report.get(field), sort_keys=True) != json.dumps(value, sort_keys=True):
            found.problem(f"report.json, {field}", "not what the rows of the certificate count")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Numbers as text, radii (§8), hashes and draws


def shown(value: float, towards: str = decimal.ROUND_FLOOR) -> str:
    """A number by at most six digits: the nearest, unless it lies on the other side than `towards`."""
    text = f"{value:.6g}"
    if float(text) == value or not math.isfinite(value) or (float(text) < value) == (towards == decimal.ROUND_FLOOR):
        return text
    return f"{float(decimal.Context(prec=6, rounding=towards).create_decimal_from_float(value)):.6g}"


def radius_of(margin: float, constant: float) -> float:
    """margin / constant, one float towards 0; 0 for a margin that is not positive, the largest float for constant 0."""
    if not margin > 0:
        return 0.0
    return LARGEST if constant == 0 else min(math.nextafter(margin / constant, 0.0), LARGEST)


def fingerprint(pixels: np.ndarray, labels: np.ndarray, scale: int) -> str:
    """SHA-256 of the images and labels of a data set and of the pixel value that means 1."""
    digest = hashlib.sha256(f"pixel_max {scale}\n".encode())
    for array in (pixels, labels.astype("<i4")):
        digest.update(f"{array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def drawn(total: int, count: int) -> list[int]:
    """Places of the images that stand for all of a data set: those with the least SHA-256 of a word and the place."""
    keys = ((hashlib.sha256(b"lipjax-subset" + i.to_bytes(8, "little")).digest(), i) for i in range(total))
    return sorted(i for _, i in heapq.nsmallest(count, keys))


def sample_indices(frozen_sha256: str, data_sha256: str, rows: list, count: int | None = None) -> list[int]:
    """The rows whose images are looked at: `count` (SAMPLE) with the least SHA-256 of seed and index, if not all."""
    count = SAMPLE if count is None else count
    if len(rows) <= count:
        return list(range(len(rows)))
    text = "\n".join(("lipjax-sample", frozen_sha256, data_sha256, json.dumps(rows, sort_keys=True)))
    seed = hashlib.sha256(text.encode()).digest()
    order = sorted((hashlib.sha256(seed + i.to_bytes(8, "little")).digest(), i) for i in range(len(rows)))
    return sorted(i for _, i in order[:count])


# ---------------------------------------------------------------------------------------------------------------------
# What to call: check, run, main


def check(
    directory: str | os.PathLike,
    images: float | None = None,
    data: str | os.PathLike | None = None,
    budget: int | float = 1.0,
) -> tuple[int, list[str]]:
    """Checks one run's directory. Returns: the exit code and the lines to print.

    Args: images, data: the `count` and `data` of `read_files`. budget: what multiplies the limits of work and memory.
    """
    start = time.monotonic()
    wrong = arithmetic_problem()
    if wrong is not None:
        return 2, [wrong]
    try:
        spent = Budget(budget)
        found = prove(read_files(pathlib.Path(directory), images, data, spent), spent)
    except Unreadable as error:
        return 2, [shortened(str(error))]
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RecursionError, MemoryError) as error:
        # Never accepted: some value is not of the type that its place demands.
        return 2, [shortened(f"{directory}: malformed ({type(error).__name__}: {error})")]
    if found.problems:
        first = [shortened(line) for line in found.problems[:100]]
        more = len(found.problems) - len(first)
        return 1, [*first, *([f"... and {more} more"] if more else [])]
    return 0, [*found.facts, f"proved in {time.monotonic() - start:.1f} s"]


def shortened(line: str) -> str:
    """A line without the middle of what is as long as a file."""
    return line if len(line) <= 1000 else f"{line[:700]} ... {line[-200:]}"


def directories(root: str | os.PathLike) -> list[pathlib.Path]:
    """The directory itself if it holds a certificate or no runs, and its seed_<n> folders, complete or not."""
    root = pathlib.Path(os.path.expanduser(root))
    seeds = sorted((path for path in root.glob("seed_*") if path.is_dir()), key=lambda p: (len(p.name), p.name))
    return [root, *seeds] if (root / "certificate.json").exists() or not seeds else seeds


def run(
    root: str | os.PathLike,
    images: float | None = None,
    data: str | os.PathLike | None = None,
    budget: int | float = 1.0,
) -> int:
    """Checks the run, or the runs, of a directory and prints what was found. Returns: the exit code."""
    codes = []
    for directory in directories(root):
        code, lines = check(directory, images, data, budget)
        verdict = {0: "proved", 1: "NOT PROVED", 2: "Error"}[code]
        stream = sys.stdout if code == 0 else sys.stderr
        for line in lines if code == 2 else [f"{directory}: {verdict}", *(f"  {line}" for line in lines)]:
            # What a file says is shown so that it cannot pass for a line of ours.
            line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
            print(f"Error: {line}" if code == 2 else line, file=stream)
        codes.append(code)
    return 1 if 1 in codes else max(codes)


def number_of_images(text: str) -> float:
    """The argument of --images: a positive integer, or all."""
    if text == "all":
        return math.inf
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"expected a positive number or all, got {text!r}")
    return float(text)


def positive(text: str) -> float:
    """The argument of --budget."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Proves a certificate of lipjax again, with NumPy alone.")
    parser.add_argument("directory", help="a run: frozen/, certificate.json and images.safetensors")
    parser.add_argument(
        "--images",
        type=number_of_images,
        metavar="N|all",
        help="how many are evaluated again, drawn by hash (default: all whose pixels are at hand)",
    )
    parser.add_argument("--data", metavar="FILE", help="npz or safetensors: test_images and test_labels, all of them")
    parser.add_argument(
        "--budget",
        type=positive,
        default=1.0,
        metavar="FACTOR",
        help="multiplies the limits of work and memory, for directories whose source you trust (default: 1)",
    )
    arguments = parser.parse_args(argv)
    return run(arguments.directory, arguments.images, arguments.data, arguments.budget)


if __name__ == "__main__":
    sys.exit(main())
