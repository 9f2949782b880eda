"""Elementwise activations with numbers of their own for every channel: pieces of slope 1 and -1, and learned splines.

Proofs and rounding errors: docs/soundness.md, section 10c.
"""

import math
import numbers
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from lipjax import activations, spectral
from lipjax.errors import NotCertifiable
from lipjax.numerics import ENLARGEMENT, LARGEST, SMALLEST, gamma
from lipjax.operators.base import Elementwise, Leaf, check_input, norm_per_image, operator
from lipjax.spectral.arithmetic import exact_float64
from lipjax.spectral.verified import float_up


@operator(static=("in_shape", "fraction"))
class PartialAbs(Elementwise):
    """|x| on the first channels, x on the others; with derivative 1 at 0.

    fraction: of the channels, in [0, 1]; times their number it must be a whole number, without rounding.
    Source: Hu, Hu & Fredrikson 2026, arXiv:2601.18513 (beta-Abs).
    """

    in_shape: tuple[int, ...]
    fraction: float = 0.5

    def __post_init__(self):
        channels = self.in_shape[-1]
        number = isinstance(self.fraction, numbers.Real) and not isinstance(self.fraction, bool)
        if not number or not 0 <= self.fraction <= 1 or (Fraction(self.fraction) * channels).denominator != 1:
            raise ValueError(
                f"PartialAbs expects a fraction in [0, 1] of the {channels} channels that is a whole number of them, "
                f"without rounding, got {self.fraction!r}: of a power of two channels take a fraction such as 0.25."
            )

    @property
    def channels(self) -> int:
        """The number of channels of which the modulus is taken."""
        return int(Fraction(self.fraction) * self.in_shape[-1])

    @property
    def slope(self):
        return (-1.0 if self.fraction else 1.0), 1.0

    def __call__(self, x):
        check_input(self, x)
        return jnp.where((x < 0) & (np.arange(x.shape[-1]) < self.channels), -x, x)

    def rounding_error(self, x):
        return jnp.zeros(x.shape[0], x.dtype)


def _known(op, *fields: str) -> list[np.ndarray] | None:
    """The arrays of an operator as float64, or None while JAX traces one or a tree transformation replaced it."""
    leaves = [getattr(op, field) for field in fields]
    if any(isinstance(leaf, Tracer) or not hasattr(leaf, "dtype") for leaf in leaves):
        return None
    if not all(getattr(leaf, "is_fully_addressable", True) for leaf in leaves):
        return None
    return [exact_float64(leaf, f"{type(op).__name__}: {field}") for leaf, field in zip(leaves, fields, strict=True)]


def _check_channels(op, **leaves) -> None:
    channels = op.in_shape[-1]
    for name, leaf in leaves.items():
        if np.shape(leaf) != (channels,):
            raise ValueError(f"{type(op).__name__} expects {name} of shape ({channels},), got {np.shape(leaf)}.")


@operator("lower", "upper", static=("in_shape",))
class NActivation(Elementwise):
    """`activations.n_activation` along the last axis. lower, upper: (c,), of `activations.n_thresholds`, say.

    Source: Prach & Lampert 2023, arXiv:2311.06103.
    """

    lower: Leaf
    upper: Leaf
    in_shape: tuple[int, ...]

    def check(self) -> None:
        _check_channels(self, lower=self.lower, upper=self.upper)

    @property
    def slope(self):
        return -1.0, 1.0

    def __call__(self, x):
        check_input(self, x)
        return activations.n_activation(x, self.lower, self.upper)

    def bound(self) -> spectral.NormBound:
        for name in ("lower", "upper"):
            array = exact_float64(getattr(self, name), f"NActivation: {name}")
            if not np.abs(array).max() <= LARGEST:
                raise NotCertifiable(f"NActivation: {name} has entries that are not finite, or beyond 2^100")
        return super().bound()

    def rounding_error(self, x):
        return gamma(2) * ENLARGEMENT * norm_per_image(self(x))


@operator("values", "scale", static=("in_shape", "spacing"))
class LinearSpline(Elementwise):
    """`activations.linear_spline` along the last axis: the interpolant of the stored values, which nothing repeats.

    Attributes:
      values: (c, n) at the knots (j - (n - 1) / 2) spacing, n odd. scale: (c,), of moduli between 2^-100 and 2^100.
      spacing: a power of two, so that knots and places between them are exact.
    Source: Ducotterd et al. 2022, arXiv:2210.16222.
    """

    values: Leaf
    scale: Leaf
    in_shape: tuple[int, ...]
    spacing: float = 0.25

    def check(self) -> None:
        activations.check_knots(self.values)
        if np.shape(self.values)[0] != self.in_shape[-1]:
            raise ValueError(
                f"LinearSpline expects values for {self.in_shape[-1]} channels, got shape {np.shape(self.values)}."
            )
        _check_channels(self, scale=self.scale)
        power = isinstance(self.spacing, float) and SMALLEST <= self.spacing <= LARGEST
        if not power or math.frexp(self.spacing)[0] != 0.5:
            raise ValueError(f"LinearSpline expects a spacing that is a power of two, such as 0.25: {self.spacing!r}.")
        known = _known(self, "scale")
        if known is not None and not ((np.abs(known[0]) >= SMALLEST) & (np.abs(known[0]) <= LARGEST)).all():
            raise ValueError("LinearSpline expects scales of moduli between 2^-100 and 2^100.")

    def _slopes(self) -> tuple[Fraction, Fraction] | None:
        """The least and the largest slope, exactly; None while values are unknown."""
        known = _known(self, "values")
        if known is None:
            return None
        if not np.abs(known[0]).max() <= LARGEST:
            raise NotCertifiable("LinearSpline: values that are not finite, or beyond 2^100")
        rows = [[Fraction(value) for value in row] for row in known[0].tolist()]
        steps = [b - a for row in rows for a, b in zip(row, row[1:], strict=False)]
        return min(steps) / Fraction(self.spacing), max(steps) / Fraction(self.spacing)

    @property
    def slope(self):
        """Of the stored values, rounded outwards; (-1, 1) while JAX traces them: where `activations.spline_values`
        makes them, they have no others."""
        slopes = self._slopes()
        return (-1.0, 1.0) if slopes is None else (-float_up(-slopes[0]), float_up(slopes[1]))

    def __call__(self, x):
        check_input(self, x)
        x, values, scale = map(jnp.asarray, (x, self.values, self.scale))  # a frozen network's are NumPy's
        return activations.linear_spline(x, values, self.spacing, scale)

    def bound(self) -> spectral.NormBound:
        try:
            self.check()
        except ValueError as error:
            raise NotCertifiable(str(error)) from error
        slopes = self._slopes()
        if slopes is None:
            raise NotCertifiable("LinearSpline: values are unknown while JAX traces them.")
        return spectral.NormBound(float_up(max(map(abs, slopes))), "exact: slopes of the stored values", {})

    def rounding_error(self, x):
        t = jnp.asarray(x * self.scale)
        left, right, weight = activations.spline_pieces(t, jnp.asarray(self.values), self.spacing)
        steepest = jnp.maximum(jnp.max(jnp.abs(jnp.diff(self.values, axis=1))) / self.spacing, 1.0)
        size = jnp.abs(left) + jnp.abs(weight * (right - left)) + steepest * jnp.abs(t)
        return gamma(16) * ENLARGEMENT * norm_per_image(size / jnp.abs(self.scale))
