"""Dense and convolutional maps, biases and the normalisation of the input."""

import math

import jax.numpy as jnp
import numpy as np

from lipjax import conv, spectral
from lipjax.errors import NotCertifiable
from lipjax.numerics import ENLARGEMENT, UNIT_ROUNDOFF, gamma
from lipjax.operators.base import (
    Bounded,
    Factor,
    Isometric,
    Leaf,
    Linear,
    Operator,
    check_input,
    kernel_text,
    norm_per_image,
    operator,
    sizes,
)
from lipjax.spectral.arithmetic import check_rounding, exact_float64


@operator("matrix", static=())
class Dense(Factor):
    """x -> W x on vectors.

    Attributes:
      matrix: (out, in).
    Example:
      >>> lipjax.operators.Dense(jnp.array([[1.0, 2.0]]))(jnp.ones((1, 2))).tolist()
      [[3.0]]
    """

    matrix: Leaf

    def _arrays_text(self):
        outputs, inputs = sizes(self.matrix, 2)
        return f"{inputs} -> {outputs}"

    @property
    def in_shape(self):
        return (self.matrix.shape[1],)

    @property
    def out_shape(self):
        return (self.matrix.shape[0],)

    def check(self) -> None:
        if np.ndim(self.matrix) != 2:
            raise ValueError(f"Expected a matrix (out, in), got shape {np.shape(self.matrix)}.")
        if 0 in np.shape(self.matrix):
            raise ValueError(f"Expected a matrix (out, in) that is not empty, got shape {np.shape(self.matrix)}.")

    def _map(self, x, precision):
        return jnp.matmul(x, self.matrix.T, precision=precision)

    def _adjoint(self, y, precision):
        return jnp.matmul(y, self.matrix, precision=precision)

    def transpose(self, factor: float) -> "Dense":
        return Dense(factor * self.matrix.T)

    def channels(self, start: int, stop: int | None) -> "Dense":
        return Dense(self.matrix[:, start:stop])

    def bound(self) -> spectral.NormBound:
        return spectral.matrix_norm_bound(exact_float64(self.matrix, "Dense: the matrix"))

    def row_sum_bound(self) -> spectral.NormBound:
        return spectral.row_sum_bound(exact_float64(self.matrix, "Dense: the matrix").T[None, None])

    def rounding_error(self, x):
        return gamma(self.matrix.shape[1] + 2) * ENLARGEMENT * norm_per_image(jnp.abs(x) @ jnp.abs(self.matrix).T)


@operator("kernel", static=("in_shape", "strides", "padding"))
class Conv(Factor):
    """Convolution of NHWC images.

    Attributes:
      kernel: HWIO.
      in_shape: (h, w, c) of the images.
      strides: as in `conv.conv2d`.
      padding: as in `conv.conv2d`.
    Example:
      >>> lipjax.operators.Conv(jnp.ones((3, 3, 16, 8)), (32, 32, 16), strides=2).out_shape
      (16, 16, 8)
    """

    kernel: Leaf
    in_shape: tuple[int, ...]
    strides: int | tuple[int, int] = 1
    padding: conv.Padding = "ZERO"

    def _arrays_text(self):
        return kernel_text(self.kernel)

    @property
    def out_shape(self):
        size = conv.output_size(self.in_shape[:2], self.kernel.shape[:2], self.strides, self.padding)
        return (*size, self.kernel.shape[3])

    def check(self) -> None:
        if np.ndim(self.kernel) != 4 or len(self.in_shape) != 3 or self.kernel.shape[2] != self.in_shape[2]:
            raise ValueError(f"Expected an HWIO kernel for images {self.in_shape}, got shape {np.shape(self.kernel)}.")
        _ = self.out_shape  # what strides, padding and sizes do not give raises here

    def _map(self, x, precision):
        return conv.conv2d(x, self.kernel, strides=self.strides, padding=self.padding, precision=precision)

    def _adjoint(self, y, precision):
        options = {"in_size": self.in_shape[:2], "strides": self.strides, "padding": self.padding}
        return conv.conv2d_adjoint(y, self.kernel, **options, precision=precision)

    def transpose(self, factor: float) -> "ConvAdjoint":
        return ConvAdjoint(factor * self.kernel, self.in_shape, self.strides, self.padding)

    def channels(self, start: int, stop: int | None) -> "Conv":
        kernel = self.kernel[:, :, start:stop]
        return Conv(kernel, (*self.in_shape[:2], kernel.shape[2]), self.strides, self.padding)

    def bound(self) -> spectral.NormBound:
        padding = self.padding
        if padding != "CIRCULAR":
            padding = conv.explicit_padding(self.kernel.shape[:2], padding)
        kernel = exact_float64(self.kernel, "Conv: the kernel")
        return spectral.conv_norm_bound(kernel, self.in_shape, self.strides, padding)

    def row_sum_bound(self) -> spectral.NormBound:
        return spectral.row_sum_bound(exact_float64(self.kernel, "Conv: the kernel"), self.strides)

    def rounding_error(self, x):
        size = conv.conv2d(jnp.abs(x), jnp.abs(self.kernel), strides=self.strides, padding=self.padding)
        return gamma(math.prod(self.kernel.shape[:3]) + 2) * ENLARGEMENT * norm_per_image(size)


@operator("kernel", static=("image_shape", "strides", "padding"))
class ConvAdjoint(Linear, Bounded):
    """The adjoint of a convolution, as a map of its own: from the convolution's outputs to images.

    Attributes:
      kernel: HWIO, of the convolution.
      image_shape: (h, w, c) of the images, the convolution's in_shape.
      strides: of the convolution.
      padding: of the convolution.
    Example:
      >>> lipjax.operators.Conv(jnp.ones((3, 3, 16, 8)), (32, 32, 16), 2).transpose(1.0).in_shape
      (16, 16, 8)
    """

    kernel: Leaf
    image_shape: tuple[int, ...]
    strides: int | tuple[int, int] = 1
    padding: conv.Padding = "ZERO"

    def _arrays_text(self):
        return kernel_text(self.kernel)

    @property
    def _conv(self) -> Conv:
        return Conv(self.kernel, self.image_shape, self.strides, self.padding)

    @property
    def in_shape(self):
        return self._conv.out_shape

    @property
    def out_shape(self):
        return tuple(self.image_shape)

    def check(self) -> None:
        self._conv.check()

    def _map(self, x, precision):
        return self._conv._adjoint(x, precision)

    def _adjoint(self, y, precision):
        return self._conv._map(y, precision)

    def bound(self) -> spectral.NormBound:
        return self._conv.bound()

    def rounding_error(self, x):
        options = {"in_size": self.image_shape[:2], "strides": self.strides, "padding": self.padding}
        size = conv.conv2d_adjoint(jnp.abs(x), jnp.abs(self.kernel), **options)
        terms = self.kernel.shape[0] * self.kernel.shape[1] * self.kernel.shape[3]
        return gamma(terms + 2) * ENLARGEMENT * norm_per_image(size)


@operator("mean", "std", static=("in_shape",))
class Normalize(Operator, Bounded):
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
        check_rounding()
        std = exact_float64(self.std, "input_std")
        if not (np.isfinite(std).all() and (std > 0).all()):
            raise NotCertifiable(f"input_std must be positive and finite to certify, got {std}.")
        least = float(std.min())
        value = 1.0 if least == 1 else math.nextafter(1 / least, math.inf)
        return spectral.NormBound(value, "exact: 1 / min(input_std)", {})

    def rounding_error(self, x):
        # Two roundings, or three where the division is a product with a rounded reciprocal.
        return gamma(3) * ENLARGEMENT * norm_per_image(self(x))


@operator("bias", static=("in_shape",))
class Bias(Isometric):
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
        return UNIT_ROUNDOFF * ENLARGEMENT * norm_per_image(self(x))
