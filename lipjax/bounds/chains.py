"""Proved norms of compositions of linear operators, in NumPy float64.

A composition is carried through vectors that start as unit vectors, with a bound on the rounding error of each, and the
matrix or its Gram matrix is then bounded as any other. Derivations: docs/soundness.md, section 12.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse.linalg
from threadpoolctl import threadpool_limits

from lipjax import conv, spectral
from lipjax.bounds.host_map import HostMap, carry, frobenius
from lipjax.errors import NotCertifiable
from lipjax.numerics import (
    ENLARGEMENT,
    EXACT_UNDERFLOW,
    EXACT_UNIT_ROUNDOFF,
    LARGEST,
    SMALLEST,
    UNDERFLOW,
    exact_gamma,
    gamma,
)
from lipjax.operators import Conv
from lipjax.spectral import verified
from lipjax.spectral.arithmetic import exact_float64
from lipjax.spectral.verified import float_up, parallel_map

# Vectors are carried in chunks of about this many numbers.
_CHUNK = 2**20
# A dense composition may have this many entries, and cost this many multiplications.
_DENSE_ENTRIES, _DENSE_COST = 2**27, 6e11
# A banded Gram matrix may have this many entries, and its factorisation cost this many multiplications.
_BANDED_ENTRIES, _BANDED_COST = 2**28, 6e11
# Above the guessed norm^2 of a banded Gram matrix, relative.
_EXCESS = 2.0**-14


def _unit_vectors(shape: tuple[int, ...], start: int, stop: int) -> np.ndarray:
    size = math.prod(shape)
    block = np.zeros((stop - start, size))
    block[np.arange(stop - start), np.arange(start, stop)] = 1
    return block.reshape(-1, *shape)


def _widest(maps: Sequence[HostMap]) -> int:
    return max(math.prod(shape) for m in maps for shape in (m.in_shape, m.out_shape))


def composition_bound(maps: Sequence[HostMap]) -> spectral.NormBound | None:
    """Proved upper bound of the norm of maps applied in turn; None where that would cost too much.

    The composition is formed on the smaller of its two sides, as a matrix, or as a banded Gram matrix where the matrix
    would be too large and the maps are local.
    Raises: NotCertifiable if no Cholesky factorisation completes, or numbers leave the float64 range.
    """
    if math.prod(maps[0].in_shape) < math.prod(maps[-1].out_shape):
        maps = [m.transposed for m in reversed(maps)]
    # From here on the output is the smaller side.
    side, other = math.prod(maps[-1].out_shape), math.prod(maps[0].in_shape)
    cost = sum(m.cost for m in maps)
    with threadpool_limits(limits=1, user_api="blas"):
        if side * other <= _DENSE_ENTRIES and side * (side * other + cost) <= _DENSE_COST:
            return _dense_bound(maps, side, other)
        band = _half_band(maps)
        if band is not None:
            width = min(side, (band + 1) * math.prod(maps[-1].out_shape[1:]))
            if side * width <= _BANDED_ENTRIES and side * (width**2 + 2 * cost) <= _BANDED_COST:
                return _banded_bound(maps, band)
    return None


def _chunks(maps: Sequence[HostMap], side: int) -> list[tuple[int, int]]:
    step = max(1, _CHUNK // _widest(maps))
    return [(start, min(start + step, side)) for start in range(0, side, step)]


def _dense_bound(maps: Sequence[HostMap], side: int, other: int) -> spectral.NormBound:
    """By the matrix of the composition, row by row the adjoint's images of the output's unit vectors."""
    matrix, errors = np.empty((side, other)), np.empty(side)
    back = [m.transposed for m in reversed(maps)]

    def fill(bounds_of_chunk):
        start, stop = bounds_of_chunk
        rows, error = carry(back, _unit_vectors(maps[-1].out_shape, start, stop), np.zeros(stop - start))
        matrix[start:stop], errors[start:stop] = rows.reshape(stop - start, -1), error

    parallel_map(fill, _chunks(maps, side))
    found = spectral.matrix_norm_bound(matrix)
    error = _finite(frobenius(errors))
    value = float_up(Fraction(found.proved) + Fraction(error))
    details = {"side": side, "composition_error": error}
    return spectral.NormBound(value, "Cholesky of the Gram matrix of the dense composition", details)


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise NotCertifiable("the composition leaves the float64 range; rescale the operators")
    return value


def _rows_read(m: HostMap, first: int, last: int) -> tuple[int, int] | None:
    """The rows of the input that rows first..last of the output depend on."""
    if m.window is None:
        return None
    stride, low, size = m.window
    if m.is_adjoint:
        found = -(-(first + low - size + 1) // stride), (last + low) // stride
    else:
        found = stride * first - low, stride * last - low + size - 1
    return max(found[0], 0), min(found[1], m.in_shape[0] - 1)


def _half_band(maps: Sequence[HostMap]) -> int | None:
    """The largest distance of two rows of the output that depend on a common row of the input; None if not local."""
    read = []
    for row in range(maps[-1].out_shape[0]):
        interval = (row, row)
        for m in reversed(maps):
            interval = _rows_read(m, *interval)
            if interval is None:
                return None
        read.append(interval)

    def common(first, second) -> bool:
        return max(first[0], second[0]) <= min(first[1], second[1])

    return max((i - j for i in range(len(read)) for j in range(i) if common(read[i], read[j])), default=0)


def _banded_bound(maps: Sequence[HostMap], band: int) -> spectral.NormBound:
    """By the Gram matrix of the output's side, whose blocks are rows of the image, `band` of them apart at most."""
    shape = maps[-1].out_shape
    count, side = shape[0], math.prod(shape[1:])
    both = [*(m.transposed for m in reversed(maps)), *maps]
    blocks: dict[tuple[int, int], np.ndarray] = {}
    errors = np.zeros(count * side)

    def fill(column: int) -> None:
        start = column * side
        parts = []
        step = max(1, _CHUNK // _widest(maps))
        for low in range(start, start + side, step):
            high = min(low + step, start + side)
            image, errors[low:high] = carry(both, _unit_vectors(shape, low, high), np.zeros(high - low))
            parts.append(image[:, column : column + band + 1].reshape(high - low, -1, side))
        stack = np.concatenate(parts)
        for i in range(stack.shape[1]):
            blocks[column + i, column] = np.ascontiguousarray(stack[:, i].T)

    parallel_map(fill, range(count))
    largest = _finite(float(np.max([np.abs(block).max() for block in blocks.values()])))
    # Only the lower triangle is used, so that an error may count twice.
    error = Fraction(_finite(math.sqrt(2) * frobenius(errors) * ENLARGEMENT))
    if largest == 0:
        return spectral.NormBound(float_up(Fraction(verified.sqrt_up(error))), "zero but for rounding", {})
    exponent = math.frexp(largest)[1]
    exponent += exponent % 2  # even, for the root
    for key in blocks:
        blocks[key] = np.ldexp(blocks[key], -exponent)

    def product(v: np.ndarray) -> np.ndarray:
        out = v.reshape(1, *shape)
        for m in both:
            out = m.apply(out)
        return np.ldexp(out.reshape(-1), -exponent)

    size = count * side
    top = _guess(product, size)
    excess = _EXCESS
    while (slack := _verify_banded(blocks, count, band, top * (1 + excess))) is None:
        excess *= 8
        if not excess < 2.0**20:
            raise NotCertifiable("no Cholesky factorisation completed: the matrix is not numerically symmetric")
    shift = top * (1 + excess)
    squared = Fraction(shift) + slack + error / Fraction(2) ** exponent
    value = float_up(Fraction(verified.sqrt_up(squared)) * Fraction(2) ** (exponent // 2))
    details = {"side": size, "half_band": band * side, "shift": shift, "slack": float_up(slack), "exponent": exponent}
    return spectral.NormBound(value, "Cholesky of the banded Gram matrix of the composition", details)


def _guess(product: Callable[[np.ndarray], np.ndarray], size: int) -> float:
    """Estimates the largest eigenvalue; may be wrong. Raises: NotCertifiable if the iteration does not converge."""
    if size == 1:  # which eigsh refuses
        return float(product(np.ones(1))[0])
    operator: Any = scipy.sparse.linalg.LinearOperator((size, size), matvec=product, dtype=np.float64)  # pyright: ignore
    start = np.random.default_rng(0).normal(size=size)
    find: Any = scipy.sparse.linalg.eigsh
    try:
        return float(find(operator, k=1, v0=start, tol=1e-6, return_eigenvectors=False)[0])
    except scipy.sparse.linalg.ArpackError as error:
        raise NotCertifiable(f"no guess of the norm of a banded Gram matrix: {error}") from error


def _verify_banded(blocks, count: int, band: int, shift: float) -> Fraction | None:
    """As `spectral.verified._verify` for the symmetric matrix with these lower blocks: block by block, left-looking."""
    side = len(blocks[0, 0])
    factor: dict[tuple[int, int], np.ndarray] = {}
    trace = largest = 0.0
    for column in range(count):
        earlier = range(max(0, column - band), column)
        for row in range(column, min(count, column + band + 1)):
            part = -blocks[row, column]
            if row == column:
                diagonal = np.einsum("ii->i", part)  # a view
                diagonal += shift
                if not (diagonal > 0).all():
                    return None
                trace, largest = trace + float(diagonal.sum()), max(largest, float(diagonal.max()))
            for q in earlier:
                if (row, q) in factor:
                    part -= factor[row, q] @ factor[column, q].T
            if row == column:
                try:
                    pivot = np.linalg.cholesky(part)
                except np.linalg.LinAlgError:
                    return None
                roots = np.einsum("ii->i", pivot)
                if not (np.isfinite(roots).all() and (roots > 0).all()):
                    return None
                factor[row, column] = pivot
            else:
                solved = scipy.linalg.solve_triangular(factor[column, column], part.T, lower=True, check_finite=False)
                factor[row, column] = solved.T
        for q in earlier:
            if column - q == band:  # no later row reaches that column
                for row in range(q, column + 1):
                    factor.pop((row, q), None)
    n = count * side
    backward = exact_gamma(2 * (n + 4))
    total = Fraction(trace) / (1 - exact_gamma(n + count))
    return backward / (1 - backward) * total + 2 * EXACT_UNIT_ROUNDOFF * Fraction(largest) + EXACT_UNDERFLOW


def circular_bound(ops: Sequence[Conv]) -> spectral.NormBound | None:
    """Proved upper bound of the norm of circular convolutions in turn, from the kernel of their composition.

    None where an entry is too large or small, or a product too large. The composed kernel is
    y[p] = sum_t (K2 K1)[t] x[s1 s2 p + t], up to a shift of the image, which changes no norm.
    """
    kernels = [exact_float64(op.kernel, "Conv: the kernel") for op in ops]
    kernels = [conv.without_groups(kernel, op.groups, op.dilation) for kernel, op in zip(kernels, ops, strict=True)]
    kernel = kernels[0]
    majorant, terms, strides = np.abs(kernel), 0, conv.stride_pair(ops[0].strides)
    floor = 0.0
    for taps in kernels:
        sizes = np.abs(taps[taps != 0])
        if sizes.size and not (sizes.max() <= LARGEST and sizes.min() >= SMALLEST):
            return None
    for op, taps in zip(ops[1:], kernels[1:], strict=True):
        with np.errstate(over="ignore", invalid="ignore"):
            kernel, majorant = (
                _composed(first, second, strides) for first, second in ((kernel, taps), (majorant, np.abs(taps)))
            )
        terms += math.prod(taps.shape[:3]) + 2
        floor = (floor * _sum_of_tap_norms(taps) + UNDERFLOW) * ENLARGEMENT
        own = conv.stride_pair(op.strides)
        strides = strides[0] * own[0], strides[1] * own[1]
    error = (gamma(terms) * (_sum_of_tap_norms(majorant) + floor) + floor) * ENLARGEMENT
    if not math.isfinite(error):
        return None
    found = spectral.conv_norm_bound(kernel, ops[0].in_shape, strides, "CIRCULAR")
    value = float_up(Fraction(found.proved) + Fraction(error))
    return spectral.NormBound(value, f"composed circular kernel; {found.method}", found.details | {"error": error})


def _sum_of_tap_norms(kernel: np.ndarray) -> float:
    """At least the norm of a circular convolution, up to rounding: the sum of the Frobenius norms of its taps."""
    largest = float(np.abs(kernel).max())
    if largest == 0 or not math.isfinite(largest):
        return largest
    return float(np.sqrt(np.sum((kernel / largest) ** 2, axis=(2, 3))).sum()) * largest


def _composed(first: np.ndarray, second: np.ndarray, strides: tuple[int, int]) -> np.ndarray:
    """The kernel of `second` after `first`, which has these strides."""
    (h, w), (kh, kw) = first.shape[:2], second.shape[:2]
    out = np.zeros((strides[0] * (kh - 1) + h, strides[1] * (kw - 1) + w, first.shape[2], second.shape[3]))
    for i in range(kh):
        for j in range(kw):
            out[strides[0] * i : strides[0] * i + h, strides[1] * j : strides[1] * j + w] += first @ second[i, j]
    return out


def lower_estimate(maps: Sequence[HostMap], num_iters: int = 60) -> float:
    """The norm by power iteration: not above it up to rounding. For judging bounds."""
    v = np.random.default_rng(0).normal(size=(1, *maps[0].in_shape))
    value = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for _ in range(num_iters):
            length = _length(v)
            if length == 0 or not math.isfinite(length):
                return value
            image = v / length
            for m in maps:
                image = m.apply(image)
            reached = _length(image)
            if not math.isfinite(reached):
                return value
            v, value = image, reached
            for m in reversed(maps):
                v = m.adjoint(v)
    return value


def _length(x: np.ndarray) -> float:
    """The norm, rounded; scaled first, so that squares neither overflow nor underflow."""
    largest = float(np.abs(x).max())
    return largest * float(np.linalg.norm(x / largest)) if 0 < largest < math.inf else largest
