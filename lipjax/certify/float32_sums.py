"""Errors of sums of products in binary32 at given images, for every order of summation (docs/soundness.md, 13.2)."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from lipjax import _dft, conv, operators
from lipjax.numerics import UNIT_ROUNDOFF32, gamma32

# Of every product: its weight and itself are rounded.
LEAVES = 2
# Of a factor that moves into the products behind it: a quotient counts 4, the product with a weight is rounded.
MOVED = 6
# Of the distance between the values inside two evaluations: what float64 rounds, at most 2^-29 n for sums of n terms.
_ALSO = 1 + 2.0**-6
# How many biases and inputs of residual blocks may join one sum; of more, nothing is claimed.
MOST_JOINED = 2
# Additions for n terms: n - 1, and one more for each that may join.
_JOINED = MOST_JOINED - 1


def sum_errors(
    sizes: Any, values: Any, additions: Any, further: Any = 0.0, leaves: int = LEAVES, whole: bool = True
) -> Any:
    """Two bounds of the errors of sums, in any order, of products that are off by `leaves` roundings each.

    Every partial sum of the exact products lies between the sum of the negative ones and that of the positive ones, so
    its modulus is at most (sizes + |values|) / 2, and an addition errs by u times that. The second bound is for these
    sums, and has a Lipschitz constant. The first is for all sums whose sizes and values are greater by `further` at
    most, and smaller than the second would be there: a number rounds by u times the power of two below it.

    Args: sizes: sums of the products' absolute values. values: the sums, exact but for the rounding of float64.
      additions: how many round at most; infinite bounds from u times that = 1/2 on. whole: nothing else joins the
      sums. Of others both bounds are linear, so that what joins can add its own part.
    Returns: (2, *shape), a NumPy array if sizes are one.
    """
    xp: Any = np if isinstance(sizes, np.ndarray) else jnp
    rounded = xp.asarray(additions, sizes.dtype) * UNIT_ROUNDOFF32

    def bound(sizes, addend):
        return xp.where(rounded < 0.5, (gamma32(leaves) * sizes + rounded * addend) / (1 - rounded), math.inf)

    largest, sizes_here = (sizes + xp.abs(values)) / 2, sizes + further
    smooth, reach = bound(sizes, largest), largest + further
    # The largest number that an addition may have to round.
    _, exponent = xp.frexp((reach + bound(sizes_here, reach)) * (1 + 2.0**-20))
    power = xp.where(xp.isfinite(reach) & whole, xp.ldexp(xp.ones_like(reach), exponent - 1), reach)
    return xp.stack([bound(sizes_here, xp.minimum(power, reach)), smooth])


def _length(errors: Array, batch_axis: int = 0) -> Float[Array, "2 b"]:
    axes = tuple(i for i in range(1, errors.ndim) if i != batch_axis + 1)
    return jnp.sqrt(jnp.sum(jnp.square(errors), axes))


def _with_bias(sizes, values, bias):
    """A bias may join the sum before it: as one more product."""
    return (sizes, values) if bias is None else (sizes + jnp.abs(bias), values + bias)


@functools.singledispatch
def _at_images(op, norm, bias, options, x, distance) -> Float[Array, "2 b"]: ...


@functools.partial(jax.jit, static_argnums=(3, 4))
def errors_at_images(op, norm, bias, leaves, whole, x, distance) -> Float[Array, "2 b"]:
    """Two bounds of the l2 error that the sums of one operator add, to first order, but for underflow: as `sum_errors`.

    Args: op: of a class in `SUMS`. norm: of what amplifies errors inside the operator. bias: of a `Bias` behind it,
      or None. leaves, whole: of `sum_errors`. x: float64 images. distance: (b,), of inputs from x up to which the first
      bound holds.
    """
    return _at_images(op, norm, bias, {"leaves": leaves, "whole": whole}, x, distance)


def _rows(weights, *axes):
    """Lengths of the rows of a linear map."""
    return jnp.sqrt(jnp.sum(jnp.square(weights), axes))


@_at_images.register
def _(op: operators.Dense, norm, bias, options, x, distance):
    sizes, values = _with_bias(jnp.abs(x) @ jnp.abs(op.matrix).T, x @ op.matrix.T, bias)
    terms, further = jnp.sum(op.matrix != 0, axis=1), distance[:, None] * _rows(op.matrix, 1)
    return _length(sum_errors(sizes, values, _JOINED + terms, further, **options))


def _convolve(op, x, kernel):
    """The convolution of `op` with another kernel."""
    return conv.conv2d(x, kernel, **op.options())


def _terms(op):
    """Number of products in each value of a convolution, without those with zeros of the padding or the kernel."""
    return _convolve(op, jnp.ones((1, *op.in_shape)), (op.kernel != 0).astype(jnp.float64))


@_at_images.register
def _(op: operators.Conv, norm, bias, options, x, distance):
    sizes, values = _with_bias(_convolve(op, jnp.abs(x), jnp.abs(op.kernel)), _convolve(op, x, op.kernel), bias)
    # Of circular padding, several taps may read one pixel.
    rows = _rows(op.kernel, 0, 1, 2) if op.padding != "CIRCULAR" else jnp.sum(_rows(op.kernel, 2), (0, 1))
    further = distance[:, None, None, None] * rows
    return _length(sum_errors(sizes, values, _JOINED + _terms(op), further, **options))


@_at_images.register
def _(op: operators.ConvTranspose, norm, bias, options, x, distance):
    kernel = op.conv.kernel
    sizes, values = _with_bias(op.through(jnp.abs(x), jnp.abs(kernel)), op.through(x, kernel), bias)
    terms = op.through(jnp.ones((1, *op.in_shape)), (kernel != 0).astype(jnp.float64))
    # Of each pixel of the output, a row for each channel; with circular padding several taps may meet one.
    turned = conv.adjoint_kernel(kernel, op.conv.groups)
    rows = _rows(turned, 0, 1, 2) if op.conv.padding != "CIRCULAR" else jnp.sum(_rows(turned, 2), (0, 1))
    further = distance[:, None, None, None] * rows
    return _length(sum_errors(sizes, values, _JOINED + terms, further, **options))


@_at_images.register
def _(op: operators.ConvExponential, norm, bias, options, x, distance):
    options = options | {"leaves": options["leaves"] + MOVED}  # the division by k moves, too
    magnitudes, terms, partial, errors = jnp.abs(op.kernel), _JOINED + 1 + _terms(op), x, jnp.zeros((2, len(x)))
    rows, reach = jnp.sum(_rows(op.kernel, 2), (0, 1)), distance
    for k in range(op.num_terms, 0, -1):
        sizes = jnp.abs(x) + _convolve(op, jnp.abs(partial), magnitudes) / k
        partial = x + _convolve(op, partial, op.kernel) / k
        sizes, values = _with_bias(sizes, partial, bias if k == 1 else None)
        further = distance[:, None, None, None] + (reach + errors[0] * _ALSO)[:, None, None, None] * rows / k
        errors = norm / k * errors + _length(sum_errors(sizes, values, terms, further, **options))
        reach = distance + norm / k * reach
    return errors


def _absolute_blocks(op, z):
    """Sums of absolute values of the products of blocks with absolute coefficients z: (n, b, o)."""
    split, absolute = len(op.fixed), jnp.abs(op.paired)
    single = jnp.einsum("rbi,roi->rbo", z[:split], jnp.abs(op.fixed))
    if not len(op.paired):
        return single
    both = z[split:].reshape(len(op.paired), 2, *z.shape[1:])
    pairs = jnp.einsum("qpbi,qoi->qpbo", both, absolute[:, 0])
    pairs += jnp.einsum("qpbi,qoi->qpbo", both[:, ::-1], absolute[:, 1])
    return jnp.concatenate([single, pairs.reshape(-1, *pairs.shape[2:])])


@_at_images.register
def _(op: operators.CircularConv, norm, bias, options, x, distance):
    size, precision, errors = op.in_shape[:2], lax.Precision.HIGHEST, jnp.zeros((2, len(x)))
    for inverse in (False, True):
        found = list(zip(_dft.steps(size, inverse), _dft.steps(size, inverse, absolute=True), strict=True))
        for i, ((terms, step), (_, of_absolute)) in enumerate(found, 1):
            sizes, x = of_absolute(jnp.abs(x), precision), step(x, precision)
            last = inverse and i == len(found)
            axis = 0 if last else x.ndim - 2
            with_bias = _with_bias(sizes, x, bias if last else None)
            further = (distance + errors[0] * _ALSO).reshape([-1 if a == axis else 1 for a in range(x.ndim)])
            errors += _length(sum_errors(*with_bias, _JOINED + terms, further, **options), axis)
        if not inverse:
            sizes, x = _absolute_blocks(op, jnp.abs(x)), _dft.apply_blocks(x, op.fixed, op.paired, precision)
            terms = op.in_shape[2] * jnp.where(jnp.arange(len(x)) < len(op.fixed), 1, 2)[:, None, None]
            rows = jnp.concatenate([_rows(op.fixed, 2), jnp.repeat(_rows(op.paired, 1, 3), 2, axis=0)])
            further = (distance + errors[0] * _ALSO)[:, None] * rows[:, None]
            errors = norm * errors + _length(sum_errors(sizes, x, _JOINED + terms, further, **options), 1)
            distance = norm * distance
    return errors


# What these read and give is one array, computed once; whatever lies between them may be merged.
SUMS = tuple(cls for cls in _at_images.registry if cls is not object)
