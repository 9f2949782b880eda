"""The truncated exponential of a skew convolution: SOC in the spatial domain."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np

from lipjax import conv, spectral
from lipjax.errors import NotCertifiable
from lipjax.numerics import ENLARGEMENT, check_terms, gamma
from lipjax.operators.base import Bounded, Leaf, Linear, check_input, norm_per_image, operator
from lipjax.operators.text import kernel_text
from lipjax.spectral import series, verified
from lipjax.spectral.arithmetic import exact_float64


@operator(
    "kernel",
    static=("in_shape", "num_terms", "padding", "nonexpansive", "fast_gradient", "groups"),
    later=("groups",),
)
class ConvExponential(Linear, Bounded):
    """x -> sum_{k <= num_terms} J^k x / k!, J the stride-1 convolution with a skew kernel.

    Attributes:
      kernel: HWIO (kh, kw, c / groups, c), odd sides, a `conv.skew_kernel` times any number, without which there is no
        bound.
      in_shape: (h, w, c).
      num_terms: the highest power, 1 ... 64.
      padding: "ZERO" or "CIRCULAR".
      nonexpansive: what made the kernel promises that its norm is small enough for a Lipschitz constant of about 1, so
        that training may skip the estimate. `bound` does not look at it.
      fast_gradient: differentiates as `conv.series_exponential_fast_gradient`, approximately.
      groups: of channels, each with an exponential of its own.
    Example: with 12 terms the norm of a small enough kernel is 1.
      >>> kernel = lipjax.conv.skew_kernel(jnp.ones((3, 3, 1, 1)).at[0].set(0.5))
      >>> lipjax.spectral.norm_bound(lipjax.operators.ConvExponential(kernel, (8, 8, 1), num_terms=12))
      1.0
    """

    kernel: Leaf
    in_shape: tuple[int, ...]
    num_terms: int
    padding: str = "ZERO"
    nonexpansive: bool = False
    fast_gradient: bool = False
    groups: int = 1

    def __post_init__(self):
        if not 1 <= self.num_terms <= 64 or self.padding not in ("ZERO", "CIRCULAR"):
            raise ValueError(
                "ConvExponential expects num_terms in 1 ... 64 and padding 'ZERO' or 'CIRCULAR', "
                f"got {self.num_terms} and {self.padding!r}."
            )

    def _arrays_text(self):
        return kernel_text(self.kernel, self.groups)

    @property
    def out_shape(self):
        return self.in_shape

    def check(self) -> None:
        shape = np.shape(self.kernel)
        images = len(self.in_shape) == 3 and len(shape) == 4 and shape[3] == self.in_shape[2]
        if not images or not (shape[0] % 2 and shape[1] % 2) or self.groups == 1 and shape[2] != shape[3]:
            raise ValueError(f"Expected an HWIO kernel with odd sides for images {self.in_shape}, got shape {shape}.")
        conv.check_groups(self.in_shape[2], shape, self.groups)

    def options(self, precision=None) -> dict:
        """The options of `conv.conv2d` for J."""
        return {"padding": self.padding, "groups": self.groups, "precision": precision}

    def _options(self, precision) -> dict:
        return {"num_terms": self.num_terms, **self.options(precision)}

    def _map(self, x, precision):
        return conv.series_exponential(x, self.kernel, **self._options(precision))

    def _adjoint(self, y, precision):
        return conv.series_exponential(y, conv.adjoint_kernel(self.kernel, self.groups), **self._options(precision))

    def __call__(self, x):
        check_input(self, x)
        if self.fast_gradient:  # the same arithmetic
            return conv.series_exponential_fast_gradient(x, self.kernel, **self._options(None))
        return self._map(x, None)

    def bound(self) -> spectral.NormBound:
        kernel = exact_float64(self.kernel, "ConvExponential: the kernel")
        check_terms(kernel.size, "ConvExponential: the kernel")
        if not np.isfinite(kernel).all():
            raise NotCertifiable("the kernel has NaN or infinite entries")
        parts = self._parts(kernel)
        if not np.array_equal(parts, -np.flip(parts, (1, 2)).swapaxes(3, 4)):
            raise NotCertifiable(
                "the stored kernel is not bit for bit skew (K == -flip(K)^T), so that nothing is known about the "
                "spectrum: make it by conv.skew_kernel and multiply it by one number at most"
            )
        best, reason, value, found = math.inf, "", math.inf, {}
        for norm, method, details in self._skew_norm_bounds(kernel):
            norm = spectral.with_room(norm)
            if norm < best:
                best, reason, value, found = norm, method, series.gain_bound(self.num_terms, norm), details
            if value == 1:
                break
        details = {"num_terms": self.num_terms, "skew_norm": best, "skew_norm_method": reason}
        details |= {key: found[key] for key in ("grid", "twist", "groups") if key in found}
        return spectral.NormBound(value, spectral.SUPREMUM, details)

    def _parts(self, kernel):
        """The kernels of the groups: (groups, kh, kw, c / groups, c / groups)."""
        kh, kw, c, _ = kernel.shape
        return kernel.reshape(kh, kw, c, self.groups, c).transpose(3, 0, 1, 2, 4)

    def _skew_norm_bounds(self, kernel: np.ndarray):
        """Proved bounds of |J|, cheap ones first: sqrt(kh kw) times norms of the reshaped kernel, then the convolution.

        The symbol of J is a product of the reshaped kernel with blocks of phases, whose norms multiply to sqrt(kh kw).
        A skew kernel's four reshaped norms are two pairs of equal ones. Of groups the largest norm counts.
        """
        kh, kw, c, _ = kernel.shape
        parts = self._parts(kernel)
        root = Fraction(verified.sqrt_up(Fraction(kh * kw)))
        reshapes = {
            "(kh kw i, o)": parts.reshape(-1, kh * kw * c, c),
            "(kh o, kw i)": parts.transpose(0, 1, 4, 2, 3).reshape(-1, kh * c, kw * c),
        }
        for name, matrix in reshapes.items():
            norm = Fraction(spectral.matrix_norm_bound(matrix).proved)
            yield verified.float_up(root * norm), f"sqrt(kh kw) times the norm of the kernel as {name}", {}
        padding = self.padding
        if padding != "CIRCULAR":
            padding = conv.explicit_padding((kh, kw), padding)
        found = spectral.conv_norm_bound(kernel, self.in_shape, 1, padding, self.groups)
        yield found.proved, found.method, found.details

    def rounding_error(self, x):
        """A number that depends on the kernel, times the norm of each image (docs/soundness.md)."""
        kh, kw, c, _ = self.kernel.shape
        norm, size = self._norms()
        # Of exact partial sums, and of the distance of computed ones, in units of |x|.
        local = gamma(kh * kw * c + 8)
        length, error = 1.0, 0.0
        for k in range(self.num_terms, 0, -1):
            error = norm / k * error + local * (1 + size * (length + error) / k)
            length = 1 + norm / k * length
        # The last term stands for what underflows on the way, or in the norm: J amplifies that, too.
        return error * ENLARGEMENT * (norm_per_image(x) + 2.0**-480)

    def _norms(self):
        """Bounds of |J| and of the norm of the convolution with |K|, in JAX, for float64.

        With A the kernel as (kh kw i, o): |J| <= sqrt(kh kw) |A|, and |A|^8 = |(A^T A)^4| <= its Frobenius norm. The
        loss is at most c^(1/16). Every product adds its own rounding. Of groups the largest counts.
        """
        kh, kw, c, _ = self.kernel.shape
        largest = jnp.max(jnp.abs(self.kernel))
        largest = jnp.where(largest > 0, largest, 1)
        # Neither overflows nor underflows when squared.
        matrix = self._parts(self.kernel).reshape(-1, kh * kw * c, c) / largest
        sizes, lengths = [_largest_frobenius(matrix)], [kh * kw * c, c, c]
        for _ in lengths:
            matrix = jnp.matmul(matrix.swapaxes(1, 2), matrix, precision=jax.lax.Precision.HIGHEST)
            sizes.append(_largest_frobenius(matrix))
        norm = sizes[-1]
        for size, length in zip(sizes[-2::-1], lengths[::-1], strict=True):
            norm = jnp.sqrt(norm + gamma(length + 2) * size**2)
        scale = math.sqrt(kh * kw) * largest * ENLARGEMENT
        return scale * norm, scale * sizes[0]


def _largest_frobenius(stack):
    return jnp.max(jnp.sqrt(jnp.sum(jnp.square(stack), axis=(1, 2))))
