"""Circular convolutions given by their frequency response, held as the real blocks of `_dft`."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from lipjax import _dft, spectral
from lipjax.numerics import ENLARGEMENT, check_terms, gamma
from lipjax.operators.base import Factor, Leaf, Linear, norm_per_image, operator
from lipjax.operators.text import sizes
from lipjax.spectral.arithmetic import exact_float64


def _check_blocks(fixed: Any, paired: Any, in_shape: tuple[int, ...]) -> None:
    """Raises: ValueError unless the blocks are those of a map on images of in_shape."""
    if len(in_shape) != 3 or min(in_shape) < 1:
        raise ValueError(f"Expected in_shape (h, w, c), got {in_shape}.")
    h, w, c = in_shape
    r, shape = (2 - h % 2) * (2 - w % 2), np.shape(fixed)  # self-conjugate frequencies: 0, and n / 2 of even sides
    q = (h * w - r) // 2
    if len(shape) != 3 or shape[0] != r or shape[2] != c or np.shape(paired) != (q, 2, *shape[1:]):
        raise ValueError(
            f"Expected blocks fixed ({r}, o, {c}) and paired ({q}, 2, o, {c}) for images {tuple(in_shape)}, "
            f"got shapes {shape} and {np.shape(paired)}."
        )


@operator("fixed", "paired", static=("in_shape", "nonexpansive"))
class CircularConv(Factor):
    """x -> the exact inverse discrete Fourier transform of R(f) x^(f), a map between real images.

    `CircularConv(response, in_shape)` takes R on the half grid of `jnp.fft.rfft2`, complex (h, w // 2 + 1, o, i), and
    of its columns that are their own mirror image (0, and w / 2 if w is even) the Hermitian part
    (R[j] + conj R[-j]) / 2. `from_blocks` takes the blocks that are stored.

    Attributes:
      fixed: (r, o, i), the real blocks of the frequencies f with 2 f = 0 modulo (h, w).
      paired: (q, 2, o, i), real and imaginary part of the blocks of one of each other pair +-f, in the order of
        `_dft.grid`. In an orthonormal basis of real sinusoids the map is block diagonal, with these blocks.
      in_shape: (h, w, i).
      nonexpansive: a promise of who made the blocks that the norm is 1 at most; training skips its estimate.
        `bound` does not look at it.
    Example:
      >>> lipjax.operators.CircularConv(np.full((4, 3, 8, 16), 1.0 + 0j), (4, 4, 16)).out_shape
      (4, 4, 8)
    """

    fixed: Leaf
    paired: Leaf
    in_shape: tuple[int, ...]
    nonexpansive: bool = False

    def __init__(self, response: Any, in_shape: tuple[int, ...], nonexpansive: bool = False):
        shape, in_shape = np.shape(response), tuple(in_shape)
        if len(in_shape) != 3 or len(shape) != 4 or shape[:2] != (in_shape[0], in_shape[1] // 2 + 1):
            raise ValueError(f"Expected a response (h, w // 2 + 1, o, i) for images {in_shape}, got shape {shape}.")
        self._set(*_dft.pack(response, in_shape[:2]), in_shape, nonexpansive)

    def _set(self, *fields) -> None:
        for field, value in zip(dataclasses.fields(self), fields, strict=True):
            object.__setattr__(self, field.name, value)
        self.check()

    @classmethod
    def from_blocks(
        cls, fixed: Any, paired: Any, in_shape: tuple[int, ...], nonexpansive: bool = False
    ) -> "CircularConv":
        """The operator that stores these blocks, unchanged.

        Raises: ValueError if they do not fit images of in_shape.
        """
        self = object.__new__(cls)
        self._set(fixed, paired, tuple(in_shape), nonexpansive)
        return self

    @classmethod
    def rebuild(cls, **fields) -> Any:
        return cls.from_blocks(**fields)

    def _arrays_text(self):
        outputs, inputs = sizes(self.fixed, 2)
        return f"{inputs} -> {outputs}"

    @property
    def out_shape(self):
        return (*self.in_shape[:2], self.fixed.shape[1])

    @property
    def response(self) -> Any:
        """R on the half grid: complex, (h, w // 2 + 1, o, i)."""
        return _dft.unpack(self.fixed, self.paired, self.in_shape[:2])

    def check(self) -> None:
        _check_blocks(self.fixed, self.paired, self.in_shape)

    def _blocks_map(self, x, fixed, paired, precision):
        z = _dft.apply_blocks(_dft.spectrum(x, precision), fixed, paired, precision)
        return _dft.image(z, self.in_shape[:2], precision)

    def _map(self, x, precision):
        return self._blocks_map(x, jnp.asarray(self.fixed), jnp.asarray(self.paired), precision)

    def _adjoint(self, y, precision):
        blocks = _dft.adjoint_blocks(jnp.asarray(self.fixed), jnp.asarray(self.paired))
        return self._blocks_map(y, *blocks, precision)

    def transpose(self, factor: float) -> "CircularConv":
        # Without jnp: the blocks of a frozen network stay float64 on the host.
        conjugate = np.array([1, -1], self.paired.dtype)[:, None, None]
        fixed, paired = self.fixed.swapaxes(1, 2), self.paired.swapaxes(2, 3) * conjugate
        return CircularConv.from_blocks(factor * fixed, factor * paired, self.out_shape)

    def channels(self, start: int, stop: int | None) -> "CircularConv":
        fixed, paired = self.fixed[..., start:stop], self.paired[..., start:stop]
        return CircularConv.from_blocks(fixed, paired, (*self.in_shape[:2], fixed.shape[2]))

    def bound(self) -> spectral.NormBound:
        fixed, paired = (exact_float64(getattr(self, n), f"CircularConv: {n}") for n in ("fixed", "paired"))
        check_terms(math.prod(fixed.shape[1:]), "CircularConv: a block")
        return spectral.blocks_norm_bound(fixed, paired)

    def rounding_error(self, x):
        # A transform, the blocks and the inverse transform, each with an error relative to the norm of its input.
        transform, products = _dft.transform_error(self.in_shape[:2]), gamma(2 * self.in_shape[2] + 4)
        relative = (2 * transform + transform**2) * (1 + products) + products
        return relative * ENLARGEMENT * self._size() * norm_per_image(x)

    def _size(self) -> Float[Array, ""]:
        """Bound on | |B_f| |_2 for every block: the Frobenius norm of its real form [[R, -I], [I, R]]."""
        squares = [jnp.sum(jnp.square(self.fixed), (1, 2)), 2 * jnp.sum(jnp.square(self.paired), (1, 2, 3))]
        return jnp.sqrt(jnp.max(jnp.concatenate(squares)))


@operator("fixed", "paired", static=("in_shape", "out_channels", "num_terms", "nonexpansive"))
class CircularSeries(Linear):
    """x -> the inverse transform of S_p(A(f)) x^(f), S_p(A) = sum_{j<=p} A^j / j!, without forming S_p(A(f)).

    For training, where images are few beside channels: p products with c x c blocks per frequency and image, instead of
    the products of c x c matrices that a matrix function takes. It has no `bound`: p roundings of an operator whose
    norm says nothing about its series would have to be followed, and nothing is gained, since a network is frozen once
    and applied often: freezing uses `CircularConv`.

    Attributes:
      fixed, paired: skew-Hermitian blocks A(f) of m x m, as in `CircularConv`.
      in_shape: (h, w, c), c <= m: the missing channels are zero.
      out_channels: how many of the m channels are kept, the first ones.
      num_terms: p >= 1, the highest power.
      nonexpansive: as in `CircularConv`.
    """

    fixed: Leaf
    paired: Leaf
    in_shape: tuple[int, ...]
    out_channels: int
    num_terms: int
    nonexpansive: bool = False

    def __post_init__(self):
        if self.num_terms < 1:
            raise ValueError(f"Expected num_terms >= 1, the highest power of the series, got {self.num_terms}.")

    @property
    def out_shape(self):
        return (*self.in_shape[:2], self.out_channels)

    def check(self) -> None:
        m = np.shape(self.fixed)[-1] if np.ndim(self.fixed) else 0
        _check_blocks(self.fixed, self.paired, (*self.in_shape[:2], m))
        if np.shape(self.fixed)[1] != m or not max(self.in_shape[2], self.out_channels) <= m:
            raise ValueError(
                f"Expected square blocks of at least {max(self.in_shape[2], self.out_channels)} channels, "
                f"got shape {np.shape(self.fixed)}."
            )

    def _series(self, x, fixed, paired, out_channels, precision):
        size, m = self.in_shape[:2], fixed.shape[-1]
        term = _dft.spectrum(x, precision)
        total = jnp.pad(term, ((0, 0), (0, 0), (0, m - term.shape[-1])))

        def next_term(term, power, rows):
            """The first rows of A term / power. The first term lacks the channels that are zero."""
            blocks = fixed[:, :rows, : term.shape[-1]], paired[:, :, :rows, : term.shape[-1]]
            return _dft.apply_blocks(term, *blocks, precision) / power

        if len(term) == 1:
            # A loop adds up the gradients of A in turn. XLA on the CPU would otherwise add all of them inside the
            # transpose that `skew_kernel` ends the backward pass with: half the time of a layer of 2048 channels.
            def step(carry, power):
                term, total = carry
                term = next_term(term, power, m)
                return (term, total + term), None

            powers = jnp.arange(1, self.num_terms + 1, dtype=total.dtype)
            (_, total), _ = lax.scan(step, (total, total), powers)
            return _dft.image(total[..., :out_channels], size, precision)
        for power in range(1, self.num_terms):
            term = next_term(term, power, m)
            total = total + term
        total = total[..., :out_channels] + next_term(term, self.num_terms, out_channels)
        return _dft.image(total, size, precision)

    def _map(self, x, precision):
        return self._series(x, jnp.asarray(self.fixed), jnp.asarray(self.paired), self.out_channels, precision)

    def _adjoint(self, y, precision):
        blocks = _dft.adjoint_blocks(jnp.asarray(self.fixed), jnp.asarray(self.paired))
        return self._series(y, *blocks, self.in_shape[2], precision)
