"""Activations and pooling on pairs of channels (i with i + C/2): 1-Lipschitz by construction.

Those with angles store directions of the plane instead, since XLA states no error for sines and cosines. The exact
operator is what the arithmetic of `activations` and `pooling` gives on the stored directions, without rounding: it is
1-Lipschitz whatever they are (docs/soundness.md).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jax.core import Tracer

from lipjax import activations, pooling
from lipjax.errors import NotCertifiable
from lipjax.numerics import ENLARGEMENT, gamma
from lipjax.operators.base import Isometric, Leaf, check_input, norm_per_image, operator
from lipjax.spectral.arithmetic import exact_float64


class _Pairs(Isometric):
    """Base of operators on pairs of channels: an even number of them."""

    def __post_init__(self):
        if self.in_shape[-1] % 2:
            name = type(self).__name__
            raise ValueError(f"{name} pairs channels: expected an even number of them, got shape {self.in_shape}.")


class _Pooled:
    """Operators that make one channel of each pair."""

    in_shape: tuple[int, ...]

    @property
    def out_shape(self):
        return (*self.in_shape[:-1], self.in_shape[-1] // 2)


def _check_directions(label: str, directions, in_shape: Sequence[int], lead: tuple[int, ...], nonnegative=()) -> None:
    """Raises: ValueError unless directions is (*lead, 2, C/2), of lengths in [1/2, 2], with these components >= 0.

    Lengths near 1 keep squares from under- and overflowing. While JAX traces, values are unknown and only the shape is
    checked; frozen networks are checked in full.
    """
    shape = (*lead, 2, in_shape[-1] // 2)
    if np.shape(directions) != shape:
        raise ValueError(f"Expected {label} of shape {shape} for inputs {tuple(in_shape)}, got {np.shape(directions)}.")
    if isinstance(directions, Tracer) or not getattr(directions, "is_fully_addressable", True):
        return
    values = exact_float64(directions, label)
    lengths = np.hypot(values[..., 0, :], values[..., 1, :])
    if not ((lengths >= 0.5) & (lengths <= 2)).all():
        raise ValueError(f"Expected {label} of lengths between 1/2 and 2, got {lengths.min()} to {lengths.max()}.")
    for index in nonnegative:
        if (values[index] < 0).any():
            raise ValueError(f"Expected {label}[{index}] >= 0, got {values[index].min()}.")


class _Directed(_Pairs):
    """Operators with stored directions, whose proof needs what `check` checks.

    Their rounding error is at most gamma(_roundings) |x|, a misjudged side of a fold included (docs/soundness.md).
    """

    _roundings = 0

    def check(self) -> None: ...

    def bound(self):
        for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            if field.name != "in_shape":
                exact_float64(getattr(self, field.name), f"{type(self).__name__}: {field.name}")
        try:
            self.check()
        except ValueError as error:
            raise NotCertifiable(f"{type(self).__name__}: {error}") from error
        return super().bound()

    def rounding_error(self, x):
        return gamma(self._roundings) * ENLARGEMENT * norm_per_image(x)


@operator(static=("in_shape",))
class MaxMin(_Pairs):
    """`activations.maxmin` along the last axis."""

    in_shape: tuple[int, ...]
    _reason = "exact: sorts pairs of channels"

    def __call__(self, x):
        check_input(self, x)
        return activations.maxmin(x)


@operator(static=("in_shape",))
class MaxPoolPairs(_Pooled, _Pairs):
    """`pooling.max_pool_pairs` along the last axis."""

    in_shape: tuple[int, ...]
    _reason = "exact: the larger of each pair of channels"

    def __call__(self, x):
        check_input(self, x)
        return pooling.max_pool_pairs(x)


@operator("direction", static=("in_shape",))
class Householder(_Directed):
    """`activations.fold` along the last axis. direction: (2, C/2), of `activations.householder_direction`."""

    direction: Leaf
    in_shape: tuple[int, ...]
    _reason = "exact: folds the plane of each pair of channels"
    _roundings = 32

    def check(self) -> None:
        _check_directions("direction", self.direction, self.in_shape, ())

    def __call__(self, x):
        check_input(self, x)
        return activations.fold(x, self.direction)


@operator("directions", static=("in_shape",))
class Householder2(_Directed):
    """`activations.fold_sectors` along the last axis.

    directions: (3, 2, C/2), of `activations.householder2_directions`; directions[1, 1] and directions[2, 1] not
    negative.
    """

    directions: Leaf
    in_shape: tuple[int, ...]
    _reason = "exact: folds four sectors of the plane of each pair of channels"
    _roundings = 128

    def check(self) -> None:
        _check_directions("directions", self.directions, self.in_shape, (3,), ((1, 1), (2, 1)))

    def __call__(self, x):
        check_input(self, x)
        return activations.fold_sectors(x, self.directions)


@operator("direction", static=("in_shape",))
class ProjectionPool(_Pooled, _Directed):
    """`pooling.wedge_distance` along the last axis. direction: (2, C/2), of `pooling.wedge_direction`, not negative."""

    direction: Leaf
    in_shape: tuple[int, ...]
    _reason = "exact: signed distances to a convex wedge in the plane of each pair of channels"
    _roundings = 16

    def check(self) -> None:
        _check_directions("direction", self.direction, self.in_shape, (), (0, 1))

    def __call__(self, x):
        check_input(self, x)
        return pooling.wedge_distance(x, self.direction)
