"""Linear operators as maps on float64 host arrays, with bounds on what they and their compositions round.

Derivations: docs/soundness.md, section 12.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from lipjax import conv
from lipjax.numerics import ENLARGEMENT, LARGEST, SMALLEST, UNDERFLOW, gamma
from lipjax.operators import Conv, ConvTranspose, Dense, Reordering
from lipjax.spectral.arithmetic import exact_float64


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
    floor: float = UNDERFLOW

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
    if isinstance(op, Reordering):
        return HostMap(*op.host_maps(), *shapes, 1.0, 0.0, 0.0, op.window)
    if isinstance(op, ConvTranspose):
        found = host_map(op.conv, norm)
        return None if found is None else found.transposed
    if not isinstance(op, (Dense, Conv)):
        return None
    array = exact_float64(op.matrix if isinstance(op, Dense) else op.kernel, type(op).__name__)
    if isinstance(op, Conv):
        array = conv.without_groups(array, op.groups, op.dilation)
    sizes = np.abs(array[array != 0])
    if sizes.size and not (sizes.max() <= LARGEST and sizes.min() >= SMALLEST):
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
    size = math.sqrt(rows * columns) * ENLARGEMENT
    return HostMap(*maps, *shapes, norm, gamma(terms + 4) * size, cost, window)


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
        local = (m.norm * local + m.local * (norm + local)) * ENLARGEMENT + UNDERFLOW
        floor = ((m.norm + m.local) * floor + m.floor) * ENLARGEMENT
        norm = m.norm * norm * ENLARGEMENT + UNDERFLOW
    return norm, local, floor


def weighted_sum(first: HostMap, weight: float, second: HostMap) -> HostMap:
    """x -> first(x) + weight second(x)."""
    size = abs(weight)
    norm = (first.norm + size * second.norm) * ENLARGEMENT
    local = first.local + size * second.local
    total = first.norm + first.local + size * (second.norm + second.local)
    return HostMap(
        lambda x: first.apply(x) + weight * second.apply(x),
        lambda y: first.adjoint(y) + weight * second.adjoint(y),
        first.in_shape,
        first.out_shape,
        norm,
        (local + gamma(3) * total) * ENLARGEMENT + UNDERFLOW,
        first.cost + second.cost,
        floor=(first.floor + size * second.floor) * ENLARGEMENT + UNDERFLOW,
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
            error = (m.norm * error + m.local * row_norms(x) + m.floor) * ENLARGEMENT
            x = m.apply(x)
        return x, np.where(np.isfinite(error) & np.isfinite(row_norms(x)), error, np.inf)


def frobenius(errors: np.ndarray) -> float:
    """Upper bound of the root of the sum of squares of non-negative numbers, none subnormal; infinite if one is."""
    largest = float(errors.max(initial=0.0))
    if largest == 0 or not math.isfinite(largest):
        return largest
    return math.sqrt(float(np.sum((errors / largest) ** 2))) * largest * ENLARGEMENT
