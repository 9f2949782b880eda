"""Dense and convolutional maps, biases and the normalisation of the input."""

import math
from typing import Any

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
    norm_per_image,
    operator,
)
from lipjax.operators.text import kernel_text, matrix_text
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
        return matrix_text(self.matrix)

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


@operator("kernel", static=("in_shape", "strides", "padding", "groups", "dilation"), later=("groups", "dilation"))
class Conv(Factor):
    """Convolution of NHWC images.

    Attributes:
      kernel: HWIO; with groups (kh, kw, in / groups, out).
      in_shape: (h, w, c) of the images.
      strides: as in `conv.conv2d`.
      padding: as in `conv.conv2d`.
      groups: of channels: part g of the outputs reads part g of the inputs alone.
      dilation: the distance between taps, a number or one for each axis.
    Example:
      >>> lipjax.operators.Conv(jnp.ones((3, 3, 16, 8)), (32, 32, 16), strides=2).out_shape
      (16, 16, 8)
    """

    kernel: Leaf
    in_shape: tuple[int, ...]
    strides: int | tuple[int, int] = 1
    padding: conv.Padding = "ZERO"
    groups: int = 1
    dilation: int | tuple[int, int] = 1

    def _arrays_text(self):
        return kernel_text(self.kernel, self.groups)

    @property
    def out_shape(self):
        window = conv.window(self.kernel.shape, self.dilation)
        size = conv.output_size(self.in_shape[:2], window, self.strides, self.padding)
        return (*size, self.kernel.shape[3])

    @property
    def pads(self) -> conv.Padding:
        """The padding, spelled out as zeros on each side unless it is "CIRCULAR"."""
        window = conv.window(self.kernel.shape, self.dilation)
        return self.padding if self.padding == "CIRCULAR" else conv.explicit_padding(window, self.padding)

    def check(self) -> None:
        if np.ndim(self.kernel) != 4 or len(self.in_shape) != 3:
            raise ValueError(f"Expected an HWIO kernel for images {self.in_shape}, got shape {np.shape(self.kernel)}.")
        if self.groups == 1 and self.kernel.shape[2] != self.in_shape[2]:
            raise ValueError(f"Expected an HWIO kernel for images {self.in_shape}, got shape {self.kernel.shape}.")
        conv.check_groups(self.in_shape[2], self.kernel.shape, self.groups)
        _ = self.out_shape  # what strides, padding, dilation and sizes do not give raises here

    def options(self, precision=None) -> dict:
        """The options of `conv.conv2d`."""
        options = {"strides": self.strides, "padding": self.padding, "groups": self.groups, "dilation": self.dilation}
        return {**options, "precision": precision}

    def _map(self, x, precision):
        return conv.conv2d(x, self.kernel, **self.options(precision))

    def _adjoint(self, y, precision):
        return conv.conv2d_adjoint(y, self.kernel, in_size=self.in_shape[:2], **self.options(precision))

    def transpose(self, factor: float) -> "ConvTranspose":
        return ConvTranspose(self._with(factor * self.kernel))

    def channels(self, start: int, stop: int | None) -> "Conv":
        if self.groups > 1:
            raise ValueError(
                f"Expected a convolution with one group, got {self.groups}: channels of groups cannot be taken apart."
            )
        return self._with(self.kernel[:, :, start:stop])

    def _with(self, kernel) -> "Conv":
        """The same with another kernel of as many taps."""
        in_shape = (*self.in_shape[:2], kernel.shape[2] * self.groups)
        return Conv(kernel, in_shape, self.strides, self.padding, self.groups, self.dilation)

    def bound(self) -> spectral.NormBound:
        kernel = exact_float64(self.kernel, "Conv: the kernel")
        return spectral.conv_norm_bound(kernel, self.in_shape, self.strides, self.pads, self.groups, self.dilation)

    def row_sum_bound(self) -> spectral.NormBound:
        kernel = conv.without_groups(exact_float64(self.kernel, "Conv: the kernel"), 1, self.dilation)
        parts = np.split(kernel, self.groups, axis=3)
        return spectral.largest_of_groups([spectral.row_sum_bound(part, self.strides) for part in parts])

    def rounding_error(self, x):
        size = conv.conv2d(jnp.abs(x), jnp.abs(self.kernel), **self.options())
        return gamma(math.prod(self.kernel.shape[:3]) + 2) * ENLARGEMENT * norm_per_image(size)


@operator("conv", static=())
class ConvTranspose(Linear, Bounded):
    """y -> A^T y, A a convolution: from images of its out_shape to images of its in_shape, usually larger ones.

    What others call output padding is said by A's in_shape: (7, 7) and (8, 8) have the same number of windows of 3 with
    stride 2.

    Attributes:
      conv: A, an `operators.Conv` of any strides, padding, groups and dilation.
    Example:
      >>> down = lipjax.operators.Conv(jnp.ones((3, 3, 8, 16)), (32, 32, 8), strides=2)
      >>> lipjax.operators.ConvTranspose(down)
      ConvTranspose(Conv(3x3, 8 -> 16, strides 2, in (32, 32, 8)))
    """

    conv: Any

    def _arrays_text(self):
        return repr(self.conv)

    @property
    def in_shape(self):
        return self.conv.out_shape

    @property
    def out_shape(self):
        return self.conv.in_shape

    def check(self) -> None:
        if type(self.conv) is not Conv:
            raise ValueError(f"ConvTranspose expects a Conv, got a {type(self.conv).__name__}.")
        self.conv.check()

    def _map(self, x, precision):
        return self.conv._adjoint(x, precision)

    def _adjoint(self, y, precision):
        return self.conv._map(y, precision)

    def bound(self) -> spectral.NormBound:
        """The convolution's: an adjoint has the same norm."""
        return self.conv.bound()

    def through(self, x, kernel):
        """The same map with another kernel of the same shape."""
        return conv.conv2d_adjoint(x, kernel, in_size=self.out_shape[:2], **self.conv.options())

    def rounding_error(self, x):
        kernel = self.conv.kernel
        # A pixel of the output meets every tap once at most: out channels / groups of products.
        terms = math.prod(kernel.shape[:2]) * kernel.shape[3] // self.conv.groups
        return gamma(terms + 2) * ENLARGEMENT * norm_per_image(self.through(jnp.abs(x), jnp.abs(kernel)))


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


class Translation(Isometric):
    """Base of operators x -> x + bias: one array, of one shape for every in_shape. No Lipschitz constant sees it."""

    bias: Leaf
    _reason = "exact: a translation"

    @property
    def _bias_shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    def check(self) -> None:
        # Another shape would broadcast, and copying an input to several outputs is no translation.
        if np.shape(self.bias) != self._bias_shape:
            raise ValueError(f"Expected a bias of shape {self._bias_shape}, got {np.shape(self.bias)}.")

    def __call__(self, x):
        check_input(self, x)
        return x + self.bias

    def rounding_error(self, x):
        return UNIT_ROUNDOFF * ENLARGEMENT * norm_per_image(self(x))


@operator("bias", static=("in_shape",))
class Bias(Translation):
    """x -> x + b along the last axis. bias: (in_shape[-1],)."""

    bias: Leaf
    in_shape: tuple[int, ...]

    @property
    def _bias_shape(self):
        return (self.in_shape[-1],)
