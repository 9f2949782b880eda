"""Errors that operators and heads add in binary32: bounds that hold for every input (docs/soundness.md, section 13)."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import numpy as np

from lipjax import _dft, operators, spectral
from lipjax.bounds import LayerBound
from lipjax.certify.float32_merging import merged, sum_before
from lipjax.certify.float32_sums import LEAVES, MOVED, SUMS
from lipjax.errors import NotCertifiable
from lipjax.network import Network
from lipjax.numerics import ENLARGEMENT32, LARGEST, LEAST_NORMAL32, UNIT_ROUNDOFF32, gamma, gamma32

# Of an operator without sums, generously.
_TINY = 2.0**-110


def length_bound(array) -> float:
    """|array|_2, rounded up, of numbers up to LARGEST."""
    return float(np.sqrt(np.sum(np.square(array)))) * ENLARGEMENT32 + 2.0**-400


@dataclasses.dataclass(frozen=True)
class Local:
    """Bound, for every x of binary32, on the error that one operator adds: |computed(x) - exact(x)|_2 is at most

        absolute + relative |x|_2 + sums(x),

    sums(x) that of `float32_sums.errors_at_images`, with `inner` for its norm, `bias`, `leaves` and `whole`, and with
    the Lipschitz constant `sums`; 0 for operators that are not in `SUMS`. Of a composite it is what the addition of x
    and g(x) adds, absolute + relative (|x|_2 + |g(x)|_2) + sums |x|_2, 0 without one, and `parts` are those of g;
    `shares` are 1 and the product of the parts' norms, over the norm of the whole.

    Nothing that the operator computes exceeds offset + gain |x|_2. A bias behind it may join a sum of `terms`; None
    leaves that to the operator before.
    """

    absolute: float = 0.0
    relative: float = 0.0
    sums: float = 0.0
    offset: float = 0.0
    gain: float = 1.0
    terms: int | None = 0
    shares: tuple[float, float] = 1.0, 1.0
    inner: float = 1.0
    bias: np.ndarray | None = None
    leaves: int = LEAVES
    whole: bool = True
    parts: tuple["Local", ...] = ()

    @property
    def slope(self) -> float:
        """Lipschitz constant of the bound in x."""
        return self.relative + self.sums


@functools.singledispatch
def _local(op, row: LayerBound, terms: int) -> Local:
    """The bound of an operator of exactly this class.

    Args: row: its proved norm. terms: length of the sums whose results it may be merged with.
    """
    raise NotCertifiable(f"no bound of the float32 error is known for an operator of type {type(op).__name__}.")


def locals_of(network: Network, rows: list[LayerBound]) -> list[Local]:
    """The bounds of the normalisation and all operators, infinite for arrays that binary32 cannot hold.

    Args: rows: of `bounds.operator_bounds`. Raises: NotCertifiable naming the layer of which no bound is known.
    """
    ops = network.normalize, *network.ops
    return merged(ops, _locals(ops, rows)[0])[0]


def _locals(ops: Sequence, rows: list[LayerBound], terms: int = 0) -> tuple[list[Local], int]:
    """The bounds of operators in turn, and of how many terms the sum is that a bias behind them may join.

    terms: of the sum that a bias before them may join.
    """
    found = []
    for i, (row, op) in enumerate(zip(rows, ops, strict=True)):
        composite = isinstance(op, operators.Composite)
        if type(op) not in _local.registry and not composite:  # a subclass may compute something else
            raise NotCertifiable(
                f"{row.name}: no bound of the float32 error is known for an operator of type {type(op).__name__}."
            )
        fits = _fits(op) or composite  # of which each part is asked
        local = _local(op, row, terms) if fits else Local(absolute=math.inf)
        place = sum_before(ops, i)
        if fits and isinstance(op, operators.Bias) and place is not None:
            # The sum counts it as one more product. (8 roundings are what `_local` takes for it otherwise.)
            bias = np.pad(np.asarray(op.bias), (0, ops[place].out_shape[-1] - len(op.bias)))
            found[place], local = dataclasses.replace(found[place], bias=bias), _local(op, row, -8)
        if isinstance(op, SUMS) and not terms:
            local = dataclasses.replace(local, leaves=LEAVES + MOVED)  # that of the normalisation
        terms = terms if local.terms is None else local.terms
        found.append(local)
    return found, terms


def _fits(part) -> bool:
    return all(np.abs(a).max(initial=0.0) <= LARGEST for a in jax.tree.leaves(part))


def _sums(terms: int, entries: int, weights: float) -> Local:
    """Of sums of products with stored weights. entries: in and out. weights: bound of | |A| |_2 and of their length."""
    lost = 8 * LEAST_NORMAL32 * terms * math.sqrt(entries)
    return Local(lost * (1 + weights), lost, gamma32(terms + 10) * weights, gain=weights, terms=terms)


def _pointwise(op, absolute: float = 0.0, relative: float = 0.0, gain: float = 1.0) -> Local:
    """Of operators on single components or pairs."""
    return Local(absolute + _TINY * math.sqrt(math.prod(op.in_shape)), relative + _TINY, gain=gain)


@_local.register
def _(op: operators.Normalize, row: LayerBound, terms: int) -> Local:
    least, entries = float(np.min(op.std)), math.prod(op.in_shape)
    if not least >= 1 / LARGEST:
        return Local(absolute=math.inf)
    shift = length_bound(np.broadcast_to(np.abs(op.mean) / op.std, op.in_shape))
    lost = 8 * LEAST_NORMAL32 * math.sqrt(entries) * (1 + 1 / least)
    return Local(gamma32(10) * shift + lost, gamma32(8) / least, offset=shift, gain=max(1.0, 1 / least))


@_local.register(operators.Bias)
@_local.register(operators.PositionalBias)
def _(op, row: LayerBound, terms: int) -> Local:
    size = length_bound(np.broadcast_to(op.bias, op.in_shape))
    lost = 8 * LEAST_NORMAL32 * math.sqrt(math.prod(op.in_shape))
    return Local((gamma32(terms + 8) + gamma32(4)) * size + lost, gamma32(2), offset=size, terms=None)


@_local.register
def _(op: operators.Dense, row: LayerBound, terms: int) -> Local:
    return _sums(op.matrix.shape[1], sum(op.matrix.shape), length_bound(op.matrix))


def _taps(kernel: np.ndarray) -> float:
    """Bound of the norm of the convolution with |K|: the sum of the taps' Frobenius norms."""
    return float(np.sum(np.sqrt(np.sum(np.square(kernel), axis=(2, 3))))) * ENLARGEMENT32 + 2.0**-400


@_local.register
def _(op: operators.Conv, row: LayerBound, terms: int) -> Local:
    entries = math.prod(op.in_shape) + math.prod(op.out_shape)
    return _sums(math.prod(op.kernel.shape[:3]), entries, _taps(op.kernel))


@_local.register
def _(op: operators.ConvTranspose, row: LayerBound, terms: int) -> Local:
    kernel = op.conv.kernel
    entries, own = math.prod(op.in_shape) + math.prod(op.out_shape), kernel.shape[3] // op.conv.groups
    return _sums(math.prod(kernel.shape[:2]) * own, entries, _taps(kernel))


@_local.register
def _(op: operators.ConvExponential, row: LayerBound, terms: int) -> Local:
    terms, size = math.prod(op.kernel.shape[:3]), _taps(op.kernel)
    # The certificate may rest on a norm that is twice this one, with whose exponential errors grow.
    plain = operators.Conv(op.kernel, op.in_shape, padding=op.padding, groups=op.groups)
    norm = min(row.details["skew_norm"], size, plain.bound().proved)
    local, lost = gamma32(terms + 16), 16 * LEAST_NORMAL32 * terms * math.sqrt(2 * math.prod(op.in_shape))
    # Of exact partial sums, and of what they leave out of the whole series, whose functions are at most 1.
    length, tail = 1.0, norm / (op.num_terms + 1)
    # To first order in u, and the rest.
    first, rest, absolute, longest = 0.0, 0.0, 0.0, 1.0
    for k in range(op.num_terms, 0, -1):
        error = first + rest
        longest = max(longest, length + error + absolute)
        absolute = (norm + local * size) / k * absolute + lost * (1 + size + absolute)
        rest = norm / k * rest + local * size * error / k + lost * (1 + length + error)
        first = norm / k * first + local * (1 + size * length / k)
        tail *= norm / k
        length = 1 + min(norm / k * length, tail)
    return Local(absolute, rest * ENLARGEMENT32, first, gain=2 * (1 + size) * longest, terms=terms, inner=norm)


@_local.register
def _(op: operators.CircularConv, row: LayerBound, terms: int) -> Local:
    (h, w, channels), norm = op.in_shape, row.claimed
    squares = [np.sum(np.square(op.fixed), (1, 2)), 2 * np.sum(np.square(op.paired), (1, 2, 3))]
    size = math.sqrt(float(np.max(np.concatenate(squares)))) * ENLARGEMENT32 + 2.0**-400
    sides = (h * w,) if h * w <= _dft.DENSE else (w, 2 * h)
    # To first order in u, and the rest.
    transform, beyond = 0.0, 0.0
    for side in sides:
        error = gamma32(side + 10) * math.sqrt(side)
        transform, beyond = transform + error, beyond + (transform + beyond) * error
    products, root = gamma32(2 * channels + 10) * size, math.sqrt(h * w * max(channels, op.out_shape[2]))
    sums = norm * transform + products + norm * transform
    both = transform + beyond
    before = norm * both + products * (1 + both)
    rest = norm * beyond + products * both + norm * beyond + both * before
    lost, lost_products = 40 * LEAST_NORMAL32 * max(sides) * root, 16 * LEAST_NORMAL32 * 2 * channels * root
    absolute = (norm + products) * lost + lost_products * (1 + size + lost)
    absolute = (1 + both) * absolute + lost
    rest = rest * ENLARGEMENT32 + lost_products * (1 + both) ** 2
    gain = 4 * math.sqrt(max(sides)) * (1 + size + norm) * (1 + both) ** 2
    return Local(absolute, rest, sums, gain=gain, terms=max(sides), inner=norm)


def _of_reordering(op, row: LayerBound, terms: int) -> Local:
    return Local(terms=None)


for _class in operators.OPERATORS.values():
    if issubclass(_class, operators.Reordering):
        _local.register(_class, _of_reordering)


@_local.register(operators.ReLU)
@_local.register(operators.MaxMin)
@_local.register(operators.MaxPoolPairs)
def _(op, row: LayerBound, terms: int) -> Local:
    return _pointwise(op)


@_local.register
def _(op: operators.LeakyReLU, row: LayerBound, terms: int) -> Local:
    return _pointwise(op, relative=gamma32(3) * abs(op.negative_slope))


@_local.register
def _(op: operators.PartialAbs, row: LayerBound, terms: int) -> Local:
    return _pointwise(op)


@_local.register
def _(op: operators.NActivation, row: LayerBound, terms: int) -> Local:
    # The rounded threshold, and one difference of at most |x| + 2 times it.
    size = length_bound(np.broadcast_to(np.maximum(np.abs(op.lower), np.abs(op.upper)), op.in_shape))
    local = _pointwise(op, absolute=2 * gamma32(6) * size, relative=gamma32(4))
    return dataclasses.replace(local, offset=2 * size * ENLARGEMENT32)


@_local.register
def _(op: operators.LinearSpline, row: LayerBound, terms: int) -> Local:
    # |left| + |weight| |right - left| <= C + S (R + |scale x|), C the largest value, S the steepest slope, R beyond the
    # last knot. Rounded values are off by C u each, which counts 1 + 2 |weight| times.
    largest, least, knots = float(np.abs(op.values).max()), float(np.abs(op.scale).min()), op.values.shape[1]
    steepest, count = max(row.claimed, 1.0), math.sqrt(math.prod(op.in_shape))
    reach = (largest + steepest * op.spacing * knots) * count / least
    growth = 2 * largest / op.spacing
    relative = gamma32(16) * 4 * steepest + gamma32(3) * growth
    tiny = 64 * LEAST_NORMAL32 * (1 + 1 / least) * (1 + growth) * count
    absolute = gamma32(16) * reach + gamma32(3) * largest * (1 + knots) * count / least + tiny
    local = _pointwise(op, absolute=absolute, relative=relative, gain=2 * growth + 2 * steepest)
    return dataclasses.replace(local, offset=2 * reach)


@_local.register(operators.Tanh)
@_local.register(operators.Sigmoid)
def _(op, row: LayerBound, terms: int) -> Local:
    units = 12 if isinstance(op, operators.Tanh) else 8
    return _pointwise(op, absolute=units * UNIT_ROUNDOFF32 * math.sqrt(math.prod(op.in_shape)), gain=2.0)


@_local.register
def _(op: operators.Softplus, row: LayerBound, terms: int) -> Local:
    # (16 + 2 s) u with s <= max(x, 0) + log 2.
    absolute = 18 * UNIT_ROUNDOFF32 * math.sqrt(math.prod(op.in_shape))
    return _pointwise(op, absolute=absolute, relative=2 * UNIT_ROUNDOFF32, gain=2.0)


@_local.register(operators.Householder)
@_local.register(operators.Householder2)
@_local.register(operators.ProjectionPool)
def _(op, row: LayerBound, terms: int) -> Local:
    # The rounding of the operator, then that of its directions.
    roundings = {operators.Householder: 32 + 3, operators.Householder2: 128 + 5, operators.ProjectionPool: 16 + 2}
    return _pointwise(op, relative=gamma32(roundings[type(op)]), gain=64.0)


@_local.register
def _(op: operators.L2Pool, row: LayerBound, terms: int) -> Local:
    count, pooled = op.region_size, math.prod(op.out_shape)
    units = gamma32(count + 8)
    lost = 8 * LEAST_NORMAL32 * (count * math.sqrt(pooled / op.delta) + math.sqrt(math.prod(op.in_shape)))
    # It computes squares: up to 2^51 |x| <= LARGEST they stay below that.
    return Local(units * math.sqrt(pooled * op.delta) * ENLARGEMENT32 + lost, units, gain=2.0**51)


@_local.register
def _(op: operators.Composite, row: LayerBound, terms: int) -> Local:
    parts, terms = _locals(op.parts(), row.parts, terms)
    product = math.prod(part.claimed for part in row.parts)
    shares = (1 / row.claimed, product / row.claimed) if row.claimed > 0 else (math.inf, math.inf)
    if not op.adds_input:
        return Local(terms=terms, shares=shares, parts=tuple(parts))
    # Of the sum alone: the input may join a sum before it, as a bias does, and the sum rounds.
    tiny = _TINY * math.sqrt(math.prod(op.in_shape))
    joined = gamma32(terms + 8) + gamma32(4)
    return Local(tiny, gamma32(2) + _TINY, joined, terms=terms, shares=shares, parts=tuple(parts))


class HeadConstants:
    """Constants of a head: of every logit, its Lipschitz constant and that of its float32 error; of its largest number.

    lipschitz, slope: (k,). gain: a number.
    """

    def __init__(self, head):
        if type(head) not in (operators.LinearHead, operators.MLPHead):
            raise NotCertifiable(
                f"head: no bound of the float32 error is known for a head of type {type(head).__name__}."
            )
        if not _fits(head):
            self.lipschitz = self.slope = np.full(head.out_shape[0], math.inf)
            self.gain = math.inf
            return
        features = head.in_shape[0]
        if isinstance(head, operators.LinearHead):
            self.lipschitz = np.array([length_bound(row) for row in head.matrix])
            self.slope = gamma32(features + 8) * self.lipschitz + 8 * LEAST_NORMAL32 * features
            self.gain = float(self.lipschitz.max())
            return
        hidden = head.w1.shape[0]
        rows, lengths = (np.array([length_bound(row) for row in w]) for w in (head.w1, head.w2))
        norm, product = spectral.matrix_norm_bound(head.w1).claimed, head.w2 @ head.w1
        through = np.array([length_bound(row) for row in product])
        through += gamma(hidden + 3) * length_bound(head.w1) * lengths
        # With slopes in (0, 1), half of W1^T w and half of something no longer than |W1| |w|.
        self.lipschitz = np.minimum(norm * lengths, (through + norm * lengths) / 2) * ENLARGEMENT32
        size, inner, outer = np.abs(head.w2), gamma32(features + 8) + 3 * UNIT_ROUNDOFF32, gamma32(hidden + 8)
        reach = size @ rows
        self.slope = (inner + outer * (1 + 2 * inner)) * reach
        self.slope += 32 * LEAST_NORMAL32 * features * hidden * (1 + np.sum(size, axis=1)) * (1 + length_bound(rows))
        self.gain = 2 * float(max(rows.max(), reach.max()))
