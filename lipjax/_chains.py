"""Proved norms of compositions of linear operators, in NumPy float64.

A composition is carried through vectors that start as unit vectors, with a bound on the rounding error of each, and the
matrix or its Gram matrix is then bounded as any other. Derivations: docs/soundness.md, section 12.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse.linalg
from threadpoolctl import threadpool_limits

from lipjax import _verified, conv, spectral
from lipjax._verified import float_up, parallel_map
from lipjax.errors import NotCertifiable
from lipjax.operators import Conv, CropChannels, Dense, Flatten, PadChannels, SpaceToDepth
from lipjax.operators._base import COMPUTED, gamma

# Underflows on the way of a unit vector through one operator add up to less, for entries and dimensions that fit.
_FLOOR = 2.0**-900
# Entries beyond these would let underflow or overflow matter: such operators are not composed.
_LARGEST, _LEAST = 2.0**100, 2.0**-100
# Vectors are carried in chunks of about this many numbers.
_CHUNK = 2**20
# A dense composition may have this many entries, and cost this many multiplications.
_DENSE_ENTRIES, _DENSE_COST = 2**27, 6e11
# A banded Gram matrix may have this many entries, and its factorisation cost this many multiplications.
_BANDED_ENTRIES, _BANDED_COST = 2**28, 6e11
# Above the guessed norm^2 of a banded Gram matrix, relative.
_EXCESS = 2.0**-14


@dataclasses.dataclass(frozen=True)
class HostMap:
    """A linear map on float64 host arrays, with what is known about it and about its rounding.

    Attributes:
      apply, adjoint: batches (b, *in_shape) -> (b, *out_shape), and back.
      in_shape, out_shape: without the batch axis.
      norm: proved upper bound of the spectral norm.
      local, floor: the computed image of any stored x is off by at most local |x| + floor, in both directions.
      cost: multiplications per vector.
      window: (stride, low, size) where row p of the output depends on the rows stride p - low + (0, ..., size - 1) of
        the input alone; None where rows mix. is_adjoint: whether that is said of the adjoint instead.
    """

    apply: Callable[[np.ndarray], np.ndarray]
    adjoint: Callable[[np.ndarray], np.ndarray]
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    norm: float
    local: float
    cost: float
    window: tuple[int, int, int] | None = None
    is_adjoint: bool = False
    floor: float = _FLOOR

    @property
    def transposed(self) -> "HostMap":
        return HostMap(
            self.adjoint,
            self.apply,
            self.out_shape,
            self.in_shape,
            self.norm,
            self.local,
            self.cost,
            self.window,
            not self.is_adjoint,
            self.floor,
        )


def host_map(op, norm: float) -> HostMap | None:
    """The operator as a HostMap; None for types, or sizes of entries, that are not composed.

    norm: its proved bound.
    """
    shapes = tuple(op.in_shape), tuple(op.out_shape)
    if isinstance(op, (Flatten, SpaceToDepth, PadChannels, CropChannels)):
        rows = (op.block, 0, op.block) if isinstance(op, SpaceToDepth) else (1, 0, 1)
        window = None if isinstance(op, Flatten) or len(op.in_shape) != 3 else rows
        return HostMap(*_reordering(op), *shapes, 1.0, 0.0, 0.0, window)
    if not isinstance(op, (Dense, Conv)):
        return None
    array = np.ascontiguousarray(op.matrix if isinstance(op, Dense) else op.kernel, np.float64)
    sizes = np.abs(array[array != 0])
    if sizes.size and not (sizes.max() <= _LARGEST and sizes.min() >= _LEAST):
        return None
    if isinstance(op, Dense):
        terms, cost = max(array.shape), float(array.size)
        rows, columns = (float(np.abs(array).sum(axis).max()) for axis in (1, 0))
        maps, window = ((lambda x: x @ array.T), (lambda y: y @ array)), None
    else:
        terms = math.prod(array.shape[:2]) * (max(array.shape[2:]) + 2)
        cost = float(array.size * math.prod(op.out_shape[:2]))
        # An output reads every tap at most once, and so an input meets every tap at most once.
        rows, columns = (float(np.abs(array).sum(axis).max()) for axis in ((0, 1, 2), (0, 1, 3)))
        maps, window = _convolution(array, op), None
        if op.padding != "CIRCULAR":
            low = conv.explicit_padding(array.shape[:2], op.padding)[0][0]
            window = (conv.stride_pair(op.strides)[0], low, array.shape[0])
    # ||A|| <= sqrt(|A|_1 |A|_inf); the sums round upwards by the factor.
    size = math.sqrt(rows * columns) * COMPUTED
    return HostMap(*maps, *shapes, norm, gamma(terms + 4) * size, cost, window)


def _reordering(op):
    if isinstance(op, Flatten):
        return (lambda x: x.reshape(len(x), -1)), (lambda y: y.reshape(len(y), *op.in_shape))
    if isinstance(op, SpaceToDepth):
        h, w, c = op.in_shape
        k = op.block

        def merge(x):
            blocks = x.reshape(len(x), h // k, k, w // k, k, c).transpose(0, 1, 3, 5, 2, 4)
            return blocks.reshape(len(x), *op.out_shape)

        def split(y):
            blocks = y.reshape(len(y), h // k, w // k, c, k, k).transpose(0, 1, 4, 2, 5, 3)
            return blocks.reshape(len(y), h, w, c)

        return merge, split
    few, many = sorted((op.in_shape[-1], op.out_shape[-1]))

    def pad(x):
        return np.concatenate([x, np.zeros((*x.shape[:-1], many - few))], axis=-1)

    def crop(x):
        return np.ascontiguousarray(x[..., :few])

    return (pad, crop) if isinstance(op, PadChannels) else (crop, pad)


def _convolution(kernel: np.ndarray, op: Conv):
    """Patches of the padded images times the kernel as a matrix, and the adjoint."""
    (h, w, _), (oh, ow, _) = op.in_shape, op.out_shape
    kh, kw = kernel.shape[:2]
    sh, sw = conv.stride_pair(op.strides)
    (top, _), (left, _) = conv.explicit_padding((kh, kw), op.padding)
    tall, wide = sh * (oh - 1) + kh, sw * (ow - 1) + kw
    # For each row and column of the padded image, which one of the image it copies; -1 for zeros.
    rows, columns = np.arange(tall) - top, np.arange(wide) - left
    if op.padding == "CIRCULAR":
        rows, columns = rows % h, columns % w
    else:
        rows, columns = (np.where((a >= 0) & (a < n), a, -1) for a, n in ((rows, h), (columns, w)))
    inside = np.ix_(np.flatnonzero(rows >= 0), np.flatnonzero(columns >= 0))
    taps = [
        (slice(i, i + sh * (oh - 1) + 1, sh), slice(j, j + sw * (ow - 1) + 1, sw)) for i in range(kh) for j in range(kw)
    ]
    matrix = kernel.reshape(-1, kernel.shape[3])

    def apply(x):
        padded = np.zeros((len(x), tall, wide, x.shape[3]))
        padded[(slice(None), *inside)] = x[:, rows[rows >= 0]][:, :, columns[columns >= 0]]
        patches = np.stack([padded[:, i, j] for i, j in taps], axis=3)
        return (patches.reshape(-1, len(matrix)) @ matrix).reshape(len(x), *op.out_shape)

    def adjoint(y):
        patches = (y.reshape(-1, matrix.shape[1]) @ matrix.T).reshape(len(y), oh, ow, len(taps), -1)
        padded = np.zeros((len(y), tall, wide, kernel.shape[2]))
        for t, (i, j) in enumerate(taps):
            padded[:, i, j] += patches[:, :, :, t]
        if op.padding != "CIRCULAR":
            out = np.zeros((len(y), *op.in_shape))
            out[(slice(None), *np.ix_(rows[rows >= 0], columns[columns >= 0]))] = padded[(slice(None), *inside)]
            return out
        folded = np.zeros((len(y), h, wide, kernel.shape[2]))
        for i in range(tall):
            folded[:, rows[i]] += padded[:, i]
        out = np.zeros((len(y), *op.in_shape))
        for j in range(wide):
            out[:, :, columns[j]] += folded[:, :, j]
        return out

    return apply, adjoint


def sequence(maps: Sequence[HostMap], shape: tuple[int, ...]) -> HostMap:
    """Several maps in turn as one; none is the identity on `shape`."""
    if len(maps) == 1:
        return maps[0]
    norm, *errors = _in_turn(maps)
    _, *backward = _in_turn(maps[::-1])
    local, floor = map(max, zip(errors, backward, strict=True))
    cost = sum((m.cost for m in maps), start=0.0)

    def apply(x):
        for m in maps:
            x = m.apply(x)
        return x

    def adjoint(y):
        for m in reversed(maps):
            y = m.adjoint(y)
        return y

    ends = (maps[0].in_shape, maps[-1].out_shape) if maps else (shape, shape)
    return HostMap(apply, adjoint, *ends, norm, local, cost, floor=floor)


def _in_turn(maps: Sequence[HostMap]) -> tuple[float, float, float]:
    """Norm, local and floor of maps applied in turn. What underflows here is less than the floors added."""
    norm, local, floor = 1.0, 0.0, 0.0
    for m in maps:
        local = (m.norm * local + m.local * (norm + local)) * COMPUTED + _FLOOR
        floor = ((m.norm + m.local) * floor + m.floor) * COMPUTED
        norm = m.norm * norm * COMPUTED + _FLOOR
    return norm, local, floor


def weighted_sum(first: HostMap, weight: float, second: HostMap) -> HostMap:
    """x -> first(x) + weight second(x)."""
    size = abs(weight)
    norm = (first.norm + size * second.norm) * COMPUTED
    local = first.local + size * second.local
    total = first.norm + first.local + size * (second.norm + second.local)
    return HostMap(
        lambda x: first.apply(x) + weight * second.apply(x),
        lambda y: first.adjoint(y) + weight * second.adjoint(y),
        first.in_shape,
        first.out_shape,
        norm,
        (local + gamma(3) * total) * COMPUTED + _FLOOR,
        first.cost + second.cost,
        floor=(first.floor + size * second.floor) * COMPUTED + _FLOOR,
    )


def row_norms(x: np.ndarray) -> np.ndarray:
    """Upper bounds of the norms of a batch."""
    flat = x.reshape(len(x), -1)
    return np.sqrt(np.einsum("bi,bi->b", flat, flat)) * (1 + gamma(flat.shape[1] + 4)) + 2.0**-500


def carry(maps: Sequence[HostMap], x: np.ndarray, error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images of vectors under maps in turn, and bounds on the distance of each to the exact image.

    error: (b,), the same for x itself. An image beyond the float64 range has an infinite error.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        for m in maps:
            error = (m.norm * error + m.local * row_norms(x) + m.floor) * COMPUTED
            x = m.apply(x)
        return x, np.where(np.isfinite(error) & np.isfinite(row_norms(x)), error, np.inf)


def frobenius(errors: np.ndarray) -> float:
    """Upper bound of the root of the sum of squares of non-negative numbers, none subnormal; infinite if one is."""
    largest = float(errors.max(initial=0.0))
    if largest == 0 or not math.isfinite(largest):
        return largest
    return math.sqrt(float(np.sum((errors / largest) ** 2))) * largest * COMPUTED


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
    value = float_up(Fraction(found.value) + Fraction(error))
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
    error = Fraction(_finite(math.sqrt(2) * frobenius(errors) * COMPUTED))
    if largest == 0:
        return spectral.NormBound(float_up(Fraction(_verified.sqrt_up(error))), "zero but for rounding", {})
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
    value = float_up(Fraction(_verified.sqrt_up(squared)) * Fraction(2) ** (exponent // 2))
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
    """As `_verified._verify` for the symmetric matrix with these lower blocks: block by block, left-looking."""
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
    backward = _verified.gamma(2 * (n + 4))
    total = Fraction(trace) / (1 - _verified.gamma(n + count))
    return backward / (1 - backward) * total + 2 * _verified.UNIT * Fraction(largest) + _verified.UNDERFLOW


def circular_bound(ops: Sequence[Conv]) -> spectral.NormBound | None:
    """Proved upper bound of the norm of circular convolutions in turn, from the kernel of their composition.

    None where an entry is too large or small, or a product too large. The composed kernel is
    y[p] = sum_t (K2 K1)[t] x[s1 s2 p + t], up to a shift of the image, which changes no norm.
    """
    kernel = np.ascontiguousarray(ops[0].kernel, np.float64)
    majorant, terms, strides = np.abs(kernel), 0, conv.stride_pair(ops[0].strides)
    floor = 0.0
    for op in ops:
        sizes = np.abs(np.asarray(op.kernel)[np.asarray(op.kernel) != 0])
        if sizes.size and not (sizes.max() <= _LARGEST and sizes.min() >= _LEAST):
            return None
    for op in ops[1:]:
        taps = np.ascontiguousarray(op.kernel, np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            kernel, majorant = (
                _composed(first, second, strides) for first, second in ((kernel, taps), (majorant, np.abs(taps)))
            )
        terms += math.prod(taps.shape[:3]) + 2
        floor = (floor * _sum_of_tap_norms(taps) + _FLOOR) * COMPUTED
        own = conv.stride_pair(op.strides)
        strides = strides[0] * own[0], strides[1] * own[1]
    error = (gamma(terms) * (_sum_of_tap_norms(majorant) + floor) + floor) * COMPUTED
    if not math.isfinite(error):
        return None
    found = spectral.conv_norm_bound(kernel, ops[0].in_shape, strides, "CIRCULAR")
    value = float_up(Fraction(found.value) + Fraction(error))
    return spectral.NormBound(value, f"composed circular kernel; {found.method}", found.details | {"error": error})


def _sum_of_tap_norms(kernel: np.ndarray) -> float:
    """At least the norm of a circular convolution, but for rounding: the sum of the Frobenius norms of its taps."""
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
    """The norm by power iteration: not above it but for rounding. For judging bounds."""
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
