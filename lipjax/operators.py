"""The pieces of a network as small pytrees: arrays as data, shapes as static metadata.

Every operator has static `in_shape` and `out_shape` (without the batch axis), `__call__(x)` on a batch, `bound()`
(proved, NumPy float64), `rounding_error(x)` (float64) and, where its norm is not known beforehand, `adjoint` and
`estimate`. A rounding error is a bound, one value per image, on the l2 distance between the computed and the exact
value of the operator at the stored x, with conventional summation in any order, the operator compiled apart from its
neighbours, and but for underflow, which FrozenNetwork adds (docs/soundness.md). `check()`, where there is one, raises
ValueError for arrays of the wrong shape.
"""

import dataclasses
import math
from typing import Any, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lipjax import activations, conv, spectral
from lipjax.errors import NotCertifiable

# A field that holds an array: a JAX array, a NumPy array once frozen, or what a tree transformation puts in its place.
Leaf = Any

UNIT_ROUNDOFF = 2.0**-53
# The error bounds are themselves computed in float64: their relative error is below 1e-8 for sums of up to 1e7 terms.
_COMPUTED = 1 + 1e-8


def gamma(num_roundings: int) -> float:
    """gamma_n = n u / (1 - n u), rounded up: the relative error of n roundings in float64."""
    return num_roundings * UNIT_ROUNDOFF / (1 - num_roundings * UNIT_ROUNDOFF) * (1 + 2**-50)


@dataclass_transform(frozen_default=True)
def _operator(*arrays: str, static: tuple[str, ...]):
    """Class decorator: a frozen dataclass that is a pytree of `arrays` with `static` metadata."""

    def wrap(cls):
        cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
        return jax.tree_util.register_dataclass(cls, data_fields=arrays, meta_fields=static)

    return wrap


def norm_per_image(x: Float[Array, "b ..."]) -> Float[Array, " b"]:
    """l2 norm of every image of a batch, in the unit of x."""
    return jnp.linalg.norm(x.reshape(x.shape[0], -1), axis=1)


def check_input(operator, x) -> None:
    """Raises: ValueError unless x is a batch of `operator.in_shape`."""
    if x.shape[1:] != tuple(operator.in_shape):
        shape = ", ".join(map(str, operator.in_shape))
        raise ValueError(f"{type(operator).__name__} expects a batch (b, {shape}), got {x.shape}.")


class _Linear:
    """What linear operators share: the estimate of the norm by power iteration on A^T A."""

    def _map(self, x, precision) -> Any: ...
    def _adjoint(self, y, precision) -> Any: ...

    def estimate(self, v, num_iters: int):
        """Differentiable estimate of the norm, never above it before rounding.

        Args: v: (*in_shape), start vector. num_iters: steps of power iteration.
        Returns: (sigma, v): sigma = |A v| for the v reached, a constant under differentiation.
        """
        sigma, v = spectral.power_iteration(
            lambda u: self._map(u[None], jax.lax.Precision.HIGHEST)[0],
            lambda u: self._adjoint(u[None], jax.lax.Precision.HIGHEST)[0],
            v,
            num_iters,
        )
        return sigma, v

    def __call__(self, x):
        check_input(self, x)
        return self._map(x, None)

    def adjoint(self, y):
        """A^T y for a batch (b, *out_shape): (b, *in_shape)."""
        return self._adjoint(y, None)


@_operator("matrix", static=())
class Dense(_Linear):
    """x -> W x on vectors. matrix: (out, in)."""

    matrix: Leaf

    @property
    def in_shape(self):
        return (self.matrix.shape[1],)

    @property
    def out_shape(self):
        return (self.matrix.shape[0],)

    def check(self) -> None:
        if np.ndim(self.matrix) != 2:
            raise ValueError(f"Expected a matrix (out, in), got shape {np.shape(self.matrix)}.")

    def _map(self, x, precision):
        return jnp.matmul(x, self.matrix.T, precision=precision)

    def _adjoint(self, y, precision):
        return jnp.matmul(y, self.matrix, precision=precision)

    def bound(self) -> spectral.NormBound:
        return spectral.matrix_norm_bound(np.asarray(self.matrix, np.float64))

    def rounding_error(self, x):
        return gamma(self.matrix.shape[1] + 2) * _COMPUTED * norm_per_image(jnp.abs(x) @ jnp.abs(self.matrix).T)


@_operator("kernel", static=("in_shape", "strides", "padding"))
class Conv(_Linear):
    """Convolution of NHWC images. kernel: HWIO; strides, padding: as in `conv.conv2d`; in_shape: (h, w, c)."""

    kernel: Leaf
    in_shape: tuple[int, ...]
    strides: int | tuple[int, int] = 1
    padding: conv.Padding = "ZERO"

    @property
    def out_shape(self):
        size = conv.output_size(self.in_shape[:2], self.kernel.shape[:2], self.strides, self.padding)
        return (*size, self.kernel.shape[3])

    def check(self) -> None:
        if np.ndim(self.kernel) != 4 or len(self.in_shape) != 3 or self.kernel.shape[2] != self.in_shape[2]:
            raise ValueError(f"Expected an HWIO kernel for images {self.in_shape}, got shape {np.shape(self.kernel)}.")

    def _map(self, x, precision):
        return conv.conv2d(x, self.kernel, strides=self.strides, padding=self.padding, precision=precision)

    def _adjoint(self, y, precision):
        options = {"in_size": self.in_shape[:2], "strides": self.strides, "padding": self.padding}
        return conv.conv2d_adjoint(y, self.kernel, **options, precision=precision)

    def bound(self) -> spectral.NormBound:
        padding = self.padding
        if padding != "CIRCULAR":
            padding = conv.explicit_padding(self.kernel.shape[:2], padding)
        return spectral.conv_norm_bound(np.asarray(self.kernel, np.float64), self.in_shape, self.strides, padding)

    def rounding_error(self, x):
        size = conv.conv2d(jnp.abs(x), jnp.abs(self.kernel), strides=self.strides, padding=self.padding)
        return gamma(math.prod(self.kernel.shape[:3]) + 2) * _COMPUTED * norm_per_image(size)


class _Isometric:
    """Operators whose Lipschitz constant is 1 by what they are."""

    in_shape: tuple[int, ...]
    _reason = ""

    @property
    def out_shape(self):
        return self.in_shape

    def bound(self) -> spectral.NormBound:
        return spectral.NormBound(1.0, self._reason, {})

    def rounding_error(self, x):
        return jnp.zeros(x.shape[0], x.dtype)


@_operator("mean", "std", static=("in_shape",))
class Normalize:
    """x -> (x - mean) / std along the last axis. mean, std: (in_shape[-1],) or (1,); std > 0."""

    mean: Leaf
    std: Leaf
    in_shape: tuple[int, ...]

    @property
    def out_shape(self):
        return self.in_shape

    def check(self) -> None:
        for label, value in (("input_mean", self.mean), ("input_std", self.std)):
            if np.shape(value) not in ((1,), (self.in_shape[-1],)):
                raise ValueError(
                    f"Expected {label} to be a number or {self.in_shape[-1]} numbers, got shape {np.shape(value)}."
                )

    def __call__(self, x):
        return (x - self.mean) / self.std

    def bound(self) -> spectral.NormBound:
        std = np.asarray(self.std, np.float64)
        if not (np.isfinite(std).all() and (std > 0).all()):
            raise NotCertifiable(f"input_std must be positive and finite to certify, got {std}.")
        least = float(std.min())
        value = 1.0 if least == 1 else math.nextafter(1 / least, math.inf)
        return spectral.NormBound(value, "exact: 1 / min(input_std)", {})

    def rounding_error(self, x):
        # Two roundings, or three where the division is a product with a rounded reciprocal.
        return gamma(3) * _COMPUTED * norm_per_image(self(x))


@_operator("bias", static=("in_shape",))
class Bias(_Isometric):
    """x -> x + b along the last axis. bias: (in_shape[-1],)."""

    bias: Leaf
    in_shape: tuple[int, ...]
    _reason = "exact: a translation"

    def check(self) -> None:
        # A shorter or longer bias would broadcast, and copying an input to several outputs is no translation.
        if np.shape(self.bias) != (self.in_shape[-1],):
            raise ValueError(f"Expected a bias of shape ({self.in_shape[-1]},), got {np.shape(self.bias)}.")

    def __call__(self, x):
        check_input(self, x)
        return x + self.bias

    def rounding_error(self, x):
        return UNIT_ROUNDOFF * _COMPUTED * norm_per_image(self(x))


@_operator(static=("in_shape",))
class MaxMin(_Isometric):
    """`activations.maxmin` along the last axis."""

    in_shape: tuple[int, ...]
    _reason = "exact: sorts pairs of channels"

    def __post_init__(self):
        if self.in_shape[-1] % 2:
            raise ValueError(f"MaxMin pairs channels: expected an even number of them, got shape {self.in_shape}.")

    def __call__(self, x):
        check_input(self, x)
        return activations.maxmin(x)


@_operator(static=("in_shape",))
class Flatten(_Isometric):
    """(h, w, c) -> (h w c,), row major."""

    in_shape: tuple[int, ...]
    _reason = "exact: a reordering"

    @property
    def out_shape(self):
        return (math.prod(self.in_shape),)

    def __call__(self, x):
        check_input(self, x)
        return x.reshape(x.shape[0], -1)


@_operator("matrix", "bias", static=())
class LinearHead:
    """Logits W x + b. matrix: (classes, features), used as it is: LLN is a parametrisation of it. bias: (classes,)."""

    matrix: Leaf
    bias: Leaf

    @property
    def in_shape(self):
        return (self.matrix.shape[1],)

    @property
    def out_shape(self):
        return (self.matrix.shape[0],)

    def check(self) -> None:
        if np.ndim(self.matrix) != 2 or np.shape(self.bias) != self.matrix.shape[:1]:
            shapes = f"{np.shape(self.matrix)} and {np.shape(self.bias)}"
            raise ValueError(f"Expected a matrix (classes, features) and a bias (classes,), got {shapes}.")

    def __call__(self, x):
        check_input(self, x)
        return x @ self.matrix.T + self.bias

    def pairwise_lipschitz(self) -> Float[Array, "k k"]:
        """|w_i - w_j|_2 for all pairs, by direct differences; differentiable, with gradient 0 where rows coincide."""
        rows, width = self.matrix.shape
        if rows * rows * width <= 2**24:
            squared = jnp.sum((self.matrix[:, None] - self.matrix) ** 2, axis=2)
        else:  # the differences of all pairs would not fit in memory, also not as what the gradient keeps
            distances = jax.checkpoint(lambda row, matrix: jnp.sum((row - matrix) ** 2, axis=1))
            squared = jax.lax.map(lambda row: distances(row, self.matrix), self.matrix, batch_size=16)
        same = squared == 0
        return jnp.where(same, 0.0, jnp.sqrt(jnp.where(same, 1.0, squared)))

    def pairwise_bound(self) -> np.ndarray:
        """Proved upper bound of |w_i - w_j|_2 for all pairs: (k, k) float64.

        Raises: NotCertifiable if an entry is not finite or above 2^1000.
        """
        w = np.asarray(self.matrix, np.float64)
        if not np.isfinite(w).all():
            raise NotCertifiable("The head's matrix has entries that are not finite.")
        exponent = math.frexp(float(np.abs(w).max(initial=0.0)))[1]
        if exponent > 1000:
            raise NotCertifiable(
                f"The head's matrix has entries up to {np.abs(w).max():g}, too large for float64 bounds."
            )
        # A power of two brings the rows to order one, so that squares neither overflow nor vanish; what underflows all
        # the same is below the last term.
        scale = 2.0**exponent
        rows = np.stack([np.sqrt(np.sum(((row - w) / scale) ** 2, axis=1)) for row in w])
        bound = rows * (1 + gamma(w.shape[1] + 8)) + np.where(rows > 0, 2.0**-500, 0.0)
        exact_zero = np.stack([(row == w).all(axis=1) for row in w])
        return np.where(exact_zero, 0.0, np.nextafter(np.maximum(bound, 2.0**-500) * scale, np.inf))

    def rounding_error(self, x):
        """Bound, (b, k), on the error of every computed logit."""
        size = jnp.abs(x) @ jnp.abs(self.matrix).T + jnp.abs(self.bias)
        return gamma(self.matrix.shape[1] + 3) * _COMPUTED * size
