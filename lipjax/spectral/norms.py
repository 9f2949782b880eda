"""Norms of linear maps given by arrays: estimates (power iteration, in JAX) and proved upper bounds (NumPy, float64).

An estimate may be low and is for training; only a bound reaches a certificate. The proofs are in docs/soundness.md.
"""

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from jaxtyping import Array, Complex, Float, Num
from threadpoolctl import threadpool_limits

from lipjax import _dft, conv
from lipjax.errors import NotCertifiable
from lipjax.numerics import EXACT_UNDERFLOW, EXACT_UNIT_ROUNDOFF, ROOM, exact_gamma
from lipjax.spectral import row_sums, symbol, verified
from lipjax.spectral.arguments import Bounded, check_operator
from lipjax.spectral.arithmetic import check_rounding, exact_float64

# The dense operator is bounded itself up to this many inputs: its norm has no embedding loss.
_DENSE_SIDE, _DENSE_WINDOW = 4096, 8192
# Up to this many inputs it comes first, because it costs little.
_TINY_SIDE = 512
# Cost of a family in factorisation flops above which only the least grid, and then only one variant, is tried.
_CHEAP, _DEAR = 2e9, 2e11
# Gram matrices this close to multiples of the identity are bounded by the distance.
_ISOMETRY = 2.0**-30

EVERYWHERE = "autocorrelation of the taps, for maps of every size"
"""The method of bounds that do not depend on the map: of convolutions whose kernel is orthogonal up to rounding."""

ROW_SUMS = "row sums of the Gram matrix of the taps, for maps of every size"
"""Likewise, of any kernel: tight where rows are scaled by their row sums (AOL, SLL), far above the norm elsewhere."""

GROUPS = "the largest norm of its groups of channels"
"""The method of bounds of grouped convolutions; details["groups"] has the method and details of each group."""

SUPREMUM = "supremum of the truncated exponential on the imaginary axis"


Embedding = tuple[tuple[int, int], tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class NormBound:
    """A proved upper bound of a spectral norm.

    Attributes:
      proved: the bound; at least the norm of the stored operator in exact arithmetic.
      method: how it was proved.
      details: what was verified (JSON-serialisable): side of the matrices, their number, grid, `shift` and `slack`
        (of the squared norm, in units of 4^exponent).
    """

    proved: float
    method: str
    details: dict[str, Any]

    @property
    def claimed(self) -> float:
        """The value that a certificate states: the proved one, or ROOM above it unless it is exact by its method."""
        exact = self.method.startswith("exact") or (self.method == SUPREMUM and self.proved == 1)
        return self.proved if exact else with_room(self.proved)


def with_room(value: float) -> float:
    """A proved number with ROOM, so that `checker` can prove the result. Raises: NotCertifiable beyond float64."""
    return verified.float_up(Fraction(value) * (1 + ROOM))


def _checked(array: Any, ndim: int, name: str, or_complex: bool = False) -> np.ndarray:
    """Checks the machine and the array, and returns the same numbers, contiguous, as float64 or complex128."""
    check_rounding()
    array = exact_float64(array, name, or_complex=or_complex)
    if array.ndim != ndim or array.size == 0:
        raise ValueError(f"{name}: expected {ndim} axes, none empty, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise NotCertifiable(f"{name}: the operator has NaN or infinite entries")
    return array


def _finish(squared: Fraction, extra: Fraction, exponent: int, method: str, details: dict[str, Any]) -> NormBound:
    """Undoes the scaling: sqrt(squared) + extra, times 2^exponent, rounded up."""
    root = Fraction(verified.sqrt_up(squared)) + extra
    value = verified.float_up(root * Fraction(2) ** exponent)
    return NormBound(value, method, details | {"exponent": exponent})


def matrix_norm_bound(matrix: Num[np.ndarray, "*batch m n"] | Num[Array, "*batch m n"]) -> NormBound:
    """Proved upper bound of the spectral norm of a matrix, or of the largest norm of a batch of matrices.

    Args:
      matrix: real or complex, of at most double precision, or integers up to 2^53. A batch (..., m, n) is the block
        diagonal matrix of its members: one bound, for the largest of their norms. For a bound of each, call it on each.
    Returns: value >= |matrix|_2 for the stored entries, in their unit; usually 1e-10 above it, and at most 1e-3 above
      it where the guess of the norm is poor (sides above 1024, clustered spectra). 0.0 for the zero matrix. Of a batch
      details["index"] says which member has the largest bound.
    Raises: ValueError for an array that is empty or has fewer than two axes; NotCertifiable (a ValueError) for numbers
      that double precision does not hold exactly, for entries that are not finite, for a norm beyond the float64
      range, while JAX traces (`jit`), and where this process does not round to nearest.
    Source: Rump, Verification of positive definiteness, BIT 46 (2006); docs/soundness.md, section 1.
    Example:
      >>> 4 <= lipjax.spectral.matrix_norm_bound(np.array([[3, 0], [0, 4]])).proved < 4.000001
      True
    """
    checked = _checked(matrix, max(2, np.ndim(matrix)), "matrix_norm_bound", or_complex=True)
    if checked.ndim == 2:
        return _matrix_norm_bound(checked)
    lead = checked.shape[:-2]
    bounds = [_matrix_norm_bound(member) for member in checked.reshape(-1, *checked.shape[-2:])]
    largest = max(range(len(bounds)), key=lambda i: bounds[i].proved)
    index = [int(i) for i in np.unravel_index(largest, lead)]
    return dataclasses.replace(bounds[largest], details=bounds[largest].details | {"index": index})


def _matrix_norm_bound(checked: np.ndarray) -> NormBound:
    if not checked.any():
        return NormBound(0.0, "zero", {})
    scaled, exponent = verified.scale_to_unit(checked)
    with threadpool_limits(limits=1, user_api="blas"):
        squared, details = _single(*_matrix_gram(scaled))
    return _finish(squared, Fraction(0), exponent, "Cholesky of the Gram matrix", details)


def _matrix_gram(scaled: np.ndarray) -> tuple[np.ndarray, Fraction]:
    """The Gram matrix of the smaller side of a scaled matrix, and the bound on its error in spectral norm."""
    tall = np.ascontiguousarray(scaled if scaled.shape[0] >= scaled.shape[1] else scaled.conj().T)
    is_complex = np.iscomplexobj(tall)
    gram = (tall.conj().T if is_complex else tall.T) @ tall
    relative = exact_gamma((4 if is_complex else 1) * (tall.shape[0] + 2))
    return gram, relative * verified.sum_of_squares_up(tall) + EXACT_UNDERFLOW


def _single(gram: np.ndarray, error: Fraction) -> tuple[Fraction, dict[str, Any]]:
    """Bounds the largest eigenvalue of one Gram matrix known up to `error`; says what was verified."""
    family = verified.GramFamily(len(gram), 1, lambda _: gram[None], error)
    squared, shown = verified.largest_eigenvalue_bound(family, np.zeros(1, int))
    return squared, {"side": len(gram), "count": 1} | shown


def conv_norm_bound(
    kernel: Num[np.ndarray, "kh kw i o"] | Num[Array, "kh kw i o"],
    in_shape: Sequence[int],
    strides: int | tuple[int, int],
    padding: str | tuple[tuple[int, int], tuple[int, int]],
    groups: int = 1,
    dilation: int | tuple[int, int] = 1,
) -> NormBound:
    """Proved upper bound of the spectral norm of the convolution y[p] = sum_t K[t] x[s p + d t - lo].

    Orthogonal kernels are bounded by the autocorrelation of their taps, for maps of all sizes and any padding at once.
    Circular convolutions and the dense operators of small maps (h w c <= 4096) are bounded as tightly as matrices.
    Other zero-padded ones are compressions of (twisted) block circulants, whose norm is bounded instead: 0 to 1 %
    more on maps much larger than the kernel. Of groups the largest bound counts; a dilated kernel is the one with zeros
    between its taps.

    Args:
      kernel: HWIO, real; (kh, kw, c / groups, o) for groups.
      in_shape: (h, w, c) of the input.
      strides: one number or one per axis.
      padding: ((lo, hi), (lo, hi)) zeros, or "CIRCULAR" (the window's tap (k - 1) // 2 aligned with the output, sizes
        divisible by the strides, taps beyond the map wrapped and summed).
      groups, dilation: as of `conv.conv2d`.
    Returns: value >= the norm for the stored kernel.
    Raises: ValueError for shapes, strides or padding that do not fit, and as `matrix_norm_bound`.
    Source: docs/soundness.md, sections 2, 3, 3a and 3c.
    """
    kernel = _checked(kernel, 4, "conv_norm_bound: the kernel")
    if groups != 1:
        return _groups_bound(kernel, in_shape, strides, padding, groups, dilation)
    kernel = conv.without_groups(kernel, 1, dilation)
    axes = _axes(kernel, in_shape, strides, padding)
    used = symbol.without_idle_taps(kernel, axes)
    if not used.any():
        return NormBound(0.0, "zero", {})
    scaled, exponent = verified.scale_to_unit(used)
    taps = symbol.polyphase(scaled, axes)
    # Where the border takes much of the norm away, what looks at the map itself is tighter.
    anywhere = padding == "CIRCULAR" or (math.prod(in_shape) > _TINY_SIDE and np.array_equal(used, kernel))
    with threadpool_limits(limits=1, user_api="blas"):
        if anywhere and symbol.may_be_isometric(taps, _ISOMETRY):
            found = symbol.GramPolynomial(taps).bound_everywhere(_ISOMETRY)
            if found is not None:
                details = {"side": taps.shape[3]} | found[1]
                return _finish(found[0], Fraction(0), exponent, EVERYWHERE, details)
        if taps.shape[:2] == (1, 1):
            squared, details = _single(*_matrix_gram(taps[0, 0]))
            method = "Cholesky of the Gram matrix of the only block tap"
        elif _is_dense(kernel.shape, in_shape) and padding != "CIRCULAR":
            squared, details = _single(*symbol.dense_gram(scaled, axes))
            method = "Cholesky of the dense operator's Gram matrix"
        else:
            squared, details = _embedding_bound(symbol.GramPolynomial(taps), axes)
            method = "Cholesky per frequency of a block circulant"
    return _finish(squared, Fraction(0), exponent, method, details)


def row_sum_bound(kernel: Num[np.ndarray, "kh kw i o"] | Num[Array, "kh kw i o"], strides: Any = 1) -> NormBound:
    """Proved upper bound of the norm of a convolution by weighted row sums, for every padding and map at once.

    The lesser of sums over rows of inputs and over rows of outputs. It is nearly 1 for kernels whose channels are
    scaled by such sums, and costs a few products of the taps. Others it overestimates: for those `conv_norm_bound`.

    Args:
      kernel: HWIO, real. A dense layer's matrix (out, in) is the kernel matrix.T[None, None].
      strides: one number or one per axis.
    Returns: value >= the norm of the convolution with the stored kernel. details["rows"] says which.
    Raises: ValueError for an array of other axes, and as `matrix_norm_bound`.
    Source: docs/soundness.md, section 3b.
    Example: rows that do not meet: the norm is the largest of theirs.
      >>> bound = lipjax.spectral.row_sum_bound(np.array([[[[3.0, 0.0], [0.0, 4.0]]]]))
      >>> 4 <= bound.proved < 4.000001
      True
    """
    kernel = _checked(kernel, 4, "row_sum_bound: the kernel")
    steps = conv.stride_pair(strides)
    if not kernel.any():
        return NormBound(0.0, "zero", {})
    scaled, exponent = verified.scale_to_unit(kernel)
    with threadpool_limits(limits=1, user_api="blas"):
        # A strided convolution leaves outputs out, which no sum over rows of inputs needs to know.
        found = {
            "inputs": row_sums.squared_bound(scaled, (1, 1)),
            "outputs": row_sums.squared_bound(scaled.swapaxes(2, 3), steps),
        }
    rows = min(found, key=lambda name: found[name])
    return _finish(found[rows], Fraction(0), exponent, ROW_SUMS, {"rows": rows})


def _groups_bound(kernel: np.ndarray, in_shape: Sequence[int], strides, padding, groups: int, dilation) -> NormBound:
    """The largest of the bounds of groups: the map is block-diagonal."""
    conv.check_groups(in_shape[2], kernel.shape, groups)
    shape = (*in_shape[:2], in_shape[2] // groups)
    parts = np.split(kernel, groups, axis=3)
    return largest_of_groups([conv_norm_bound(part, shape, strides, padding, 1, dilation) for part in parts])


def largest_of_groups(found: list[NormBound]) -> NormBound:
    """The bound of a block-diagonal map, given those of its blocks, of which it states all; that of a single block."""
    if len(found) == 1 or not any(bound.proved for bound in found):
        return found[0]
    details = {"groups": [{"method": bound.method, "details": bound.details} for bound in found]}
    return NormBound(max(bound.proved for bound in found), GROUPS, details)


def _axes(kernel: np.ndarray, in_shape: Sequence[int], strides: Any, padding: Any) -> tuple[symbol.Axis, symbol.Axis]:
    """Checks the geometry of a convolution and describes its two axes."""
    if len(in_shape) != 3 or in_shape[2] != kernel.shape[2]:
        raise ValueError(f"expected in_shape (h, w, {kernel.shape[2]}) for a kernel {kernel.shape}, got {in_shape}")
    if isinstance(padding, str) and padding != "CIRCULAR":
        raise ValueError(f"expected padding 'CIRCULAR' or ((lo, hi), (lo, hi)), got {padding!r}")
    size, sides = (int(in_shape[0]), int(in_shape[1])), kernel.shape[:2]
    steps, pads = conv.stride_pair(strides), conv.explicit_padding(sides, padding)
    out = conv.output_size(size, sides, strides, padding)
    first, second = (
        symbol.Axis(sides[a], size[a], steps[a], pads[a][0], out[a], padding == "CIRCULAR") for a in range(2)
    )
    return first, second


def _is_dense(kernel_shape: Sequence[int], in_shape: Sequence[int]) -> bool:
    return math.prod(in_shape) <= _DENSE_SIDE and math.prod(kernel_shape[:3]) <= _DENSE_WINDOW


def _variants(axes: Sequence[symbol.Axis], taps_shape: Sequence[int]) -> list[Embedding]:
    """The embeddings to try. taps_shape: of `symbol.polyphase`."""
    least = axes[0].least_grid(), axes[1].least_grid()
    moves = [q > 1 for q in taps_shape[:2]]
    sides = [n if moving else 1 for n, moving in zip(least, moves, strict=True)]
    # Frequencies, one of each pair +-omega.
    count = (math.prod(sides) + math.prod(2 - n % 2 for n in sides)) // 2
    cost = count * taps_shape[3] ** 3
    if axes[0].circular or cost > _DEAR:
        return [(least, (0, 0))]
    grids = [least, (least[0] + 1, least[1] + 1)] if cost <= _CHEAP else [least]
    free = [(0, 1) if moving else (0,) for moving in moves]
    return [(grid, (t1, t2)) for grid in grids for t1 in free[0] for t2 in free[1]]


def embeddings(
    kernel_shape: Sequence[int], in_shape: Sequence[int], strides: Any, padding: Any, dilation: Any = 1
) -> tuple[np.ndarray, list[Embedding]]:
    """The circulants that `conv_norm_bound` bounds in the place of a zero-padded convolution: the least norm counts.

    Args: as of `conv_norm_bound`, of one group, but for the kernel's shape. It is taken to have no zeros.
    Returns: the taps that meet pixels, (kh, kw) bool; pairs (grid, twist) of numbers of blocks of `strides` pixels and
      of flags per side whether a period changes the sign. None where the operator itself is bounded: small maps, a
      single block tap, circular padding.
    """
    ones = conv.without_groups(np.ones(tuple(kernel_shape), bool), 1, dilation)
    axes = _axes(ones, in_shape, strides, padding)
    kept = symbol.without_idle_taps(ones, axes)
    rows, columns = conv.dilation_pair(dilation)
    used = np.any(kept, axis=(2, 3))[::rows, ::columns]
    if padding == "CIRCULAR" or _is_dense(ones.shape, in_shape) or not used.any():
        return used, []
    taps = symbol.polyphase(kept, axes)
    return used, [] if taps.shape[:2] == (1, 1) else _variants(axes, taps.shape)


def _embedding_bound(polynomial: symbol.GramPolynomial, axes: Sequence[symbol.Axis]) -> tuple[Fraction, dict]:
    """Least bound of the squared norm over several embeddings: every grid from the least up, twisted or not, holds."""
    variants = _variants(axes, polynomial.taps.shape)
    families = {variant: polynomial.family(*variant) for variant in variants}
    ranks = {variant: verified.rank_members(family) for variant, family in families.items()}
    variants.sort(key=lambda variant: ranks[variant][1])
    results: list[tuple[Fraction, dict]] = []
    for grid, twist in variants:
        family, (order, _) = families[grid, twist], ranks[grid, twist]
        if results and not verified.is_below(family, order, min(found["shift"] for _, found in results)):
            continue
        squared, shown = verified.largest_eigenvalue_bound(family, order)
        details = {"side": family.side, "count": family.count, "grid": list(grid), "twist": list(twist)}
        results.append((squared, details | shown))
    return min(results, key=lambda result: result[0])


def response_norm_bound(response: Complex[np.ndarray, "h f o i"], size: tuple[int, int]) -> NormBound:
    """Proved upper bound of the norm of the circular convolution that has the given frequency response.

    Args:
      response: (h, w // 2 + 1, o, i), the half grid of `numpy.fft.rfft2`. In the columns that are their own mirror
        image (0, and w / 2 if w is even) the operator uses the Hermitian part (R[j] + conj R[-j]) / 2, as the exact
        inverse transform to real images does.
      size: (h, w) of the images.
    Returns: value >= the largest norm over all frequencies.
    Raises: ValueError if the shape does not fit the size, and as `matrix_norm_bound`.
    Source: docs/soundness.md, section 4.
    """
    h, w = size
    blocks = _checked(response, 4, "response_norm_bound", or_complex=True)
    if blocks.shape[:2] != (h, w // 2 + 1):
        raise ValueError(f"expected a response (h, w // 2 + 1, o, i) for size {tuple(size)}, got {blocks.shape}")
    if not blocks.any():
        return NormBound(0.0, "zero", {})
    scaled, exponent = verified.scale_to_unit(blocks.astype(np.complex128))
    # The sums of the projection round once per component, relative to the result.
    return _blocks_bound(*_dft.pack(scaled, (h, w)), 2 * EXACT_UNIT_ROUNDOFF, exponent)


def blocks_norm_bound(fixed: Float[np.ndarray, "r o i"], paired: Float[np.ndarray, "q 2 o i"]) -> NormBound:
    """Proved upper bound of the largest norm of several matrices, some of them complex.

    It is the norm of a circular convolution that has these blocks (`operators.CircularConv`).

    Args: fixed: real matrices. paired: complex ones, as real and imaginary parts; possibly none.
    Returns: value >= every norm. For matrices with orthonormal rows or columns it is 1 up to the rounding error of
      their Gram matrices: 1e-13 for sides of 32, 3e-10 for sides of 2048.
    Raises: as `matrix_norm_bound`.
    Source: docs/soundness.md, section 4.
    """
    fixed = _checked(fixed, 3, "blocks_norm_bound: fixed")
    some = np.size(paired) > 0
    paired = _checked(paired, 4, "blocks_norm_bound: paired") if some else np.empty((0, 2, *fixed.shape[1:]))
    largest = max(float(np.abs(fixed).max()), float(np.abs(paired).max(initial=0.0)))
    if not largest:
        return NormBound(0.0, "zero", {})
    exponent = math.frexp(largest)[1]
    return _blocks_bound(np.ldexp(fixed, -exponent), np.ldexp(paired, -exponent), Fraction(0), exponent)


def _blocks_bound(fixed: np.ndarray, paired: np.ndarray, error: Fraction, exponent: int) -> NormBound:
    """The bound for scaled blocks, each known up to `error` times its Frobenius norm."""
    stacks = [fixed, paired[:, 0] + 1j * paired[:, 1]] if len(paired) else [fixed]
    extra = error * Fraction(verified.sqrt_up(max(verified.sum_of_squares_up(b) for stack in stacks for b in stack)))
    with threadpool_limits(limits=1, user_api="blas"):
        families = [verified.response_family(stack) for stack in stacks]
        results = [verified.isometry_bound(family, _ISOMETRY) for family in families]
        method = "distance of R^H R from the identity, per frequency"
        if any(result is None for result in results):
            method = "Cholesky per frequency of the response"
            results = [verified.largest_eigenvalue_bound(f, verified.rank_members(f)[0]) for f in families]
    squared, details = max((result for result in results if result), key=lambda result: result[0])
    details = {"side": families[0].side, "count": sum(family.count for family in families)} | details
    return _finish(squared, extra, exponent, method, details)


def norm_bound(operator: Any) -> float:
    """Proved upper bound of an operator's norm: the number that its `bound()` proves.

    Args:
      operator: one of lipjax.operators, its arrays finite.
    Returns: a float at least the norm of the stored operator in exact arithmetic, in output units per input unit.
    Raises: NotCertifiable naming the type if it has none, and whatever `bound` raises.
    Source: docs/soundness.md, sections 1 to 5.
    Example: the norm is 4, and the bound is not below it.
      >>> bound = lipjax.spectral.norm_bound(lipjax.operators.Dense(np.diag([3.0, 4.0])))
      >>> 4 <= bound < 4.000001
      True
    """
    check_operator(operator, "norm_bound", "matrix_norm_bound")
    if not isinstance(operator, Bounded):
        raise NotCertifiable(f"{type(operator).__name__} has no bound() method: no norm bound is proved for it")
    return operator.bound().proved
