"""Operators on maps of tokens, images (h, w, c): shifts of groups of channels, biases by position, l2 pooling."""

import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np

from lipjax.numerics import ENLARGEMENT, gamma
from lipjax.operators.base import Isometric, Leaf, Reordering, check_input, norm_per_image, operator
from lipjax.operators.linear import Translation

DELTAS = (2.0**-64, 2.0**64)
"""The least and the largest delta of `L2Pool`: single precision has numbers between them, and their roots."""


@operator(static=("in_shape", "channels"))
class Shift(Reordering):
    """Moves four groups of channels by one token, circularly: up, down, left and right; the other channels stay.

    A permutation, so an isometry. What leaves the map comes in again on the other side.

    Attributes:
      in_shape: (h, w, c).
      channels: of each of the four groups, which are the first 4 channels in this order; at least 1, at most c / 4.
    Source: the spatial shift of LipNeXt (Hu, Hu & Fredrikson 2026, arXiv:2601.18513); order and places of the groups
      are our choice.
    Example: a column of tokens; one of five channels moves up and one down.
      >>> x = jnp.arange(3.0).reshape(1, 3, 1, 1) * jnp.ones(5)
      >>> lipjax.operators.Shift((3, 1, 5), 1)(x)[0, :, 0].T.tolist()[:3]
      [[1.0, 2.0, 0.0], [2.0, 0.0, 1.0], [0.0, 1.0, 2.0]]
    """

    in_shape: tuple[int, ...]
    channels: int
    _reason = "exact: a reordering"

    def __post_init__(self):
        if len(self.in_shape) != 3:
            raise ValueError(f"Shift expects images: an in_shape (h, w, c), got {self.in_shape}.")
        if not _is_count(self.channels) or 4 * self.channels > self.in_shape[-1]:
            raise ValueError(
                f"Shift expects to move between 1 and c / 4 of its {self.in_shape[-1]} channels in each direction, got "
                f"{self.channels!r}."
            )

    def _move(self, x):
        return self._rolled(x, -1)

    def _move_back(self, y):
        return self._rolled(y, 1)

    def _rolled(self, x, step: int):
        n = self.channels
        xp = jnp if isinstance(x, jax.Array) else np
        groups = [xp.roll(x[..., i * n : (i + 1) * n], sign * step, axis) for i, (sign, axis) in enumerate(_MOVES)]
        return xp.concatenate([*groups, x[..., 4 * n :]], -1)


# Up, down, left, right, as (sign, axis) of a batch: up and left bring the next token's number.
_MOVES = ((1, 1), (-1, 1), (1, 2), (-1, 2))


@operator("bias", static=("in_shape",))
class PositionalBias(Translation):
    """x -> x + p, one number for each token, the same for all of its channels: what tells tokens apart.

    Attributes:
      bias: p, (h, w, 1).
      in_shape: (h, w, c).
    Source: LipNeXt (Hu, Hu & Fredrikson 2026, arXiv:2601.18513).
    Example:
      >>> lipjax.operators.PositionalBias(jnp.arange(2.0).reshape(1, 2, 1), (1, 2, 3))(jnp.zeros((1, 1, 2, 3))).tolist()
      [[[[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]]]
    """

    bias: Leaf
    in_shape: tuple[int, ...]

    def __post_init__(self):
        if len(self.in_shape) != 3:
            raise ValueError(f"PositionalBias expects images: an in_shape (h, w, c), got {self.in_shape}.")

    @property
    def _bias_shape(self):
        return (*self.in_shape[:2], 1)


@operator(static=("in_shape", "regions", "delta"))
class L2Pool(Isometric):
    """sqrt(sum of x^2 + delta) over each region of a grid, channel by channel: the length of what is pooled.

    1-Lipschitz, as the length of (x, sqrt(delta)) is, and regions do not overlap. delta > 0 keeps the gradient finite
    where all that is pooled is 0.

    Attributes:
      in_shape: (h, w, c).
      regions: rows and columns of equal regions, which divide h and w; (1, 1) pools the whole map.
      delta: a number between 2^-64 and 2^64, in the square of the unit of x.
    Source: the pooling of LipNeXt (Hu, Hu & Fredrikson 2026, arXiv:2601.18513); delta and regions are our choice.
    Example: 3-4-5.
      >>> pool = lipjax.operators.L2Pool((1, 2, 1))
      >>> pool(jnp.array([3.0, 4.0]).reshape(1, 1, 2, 1)).round(4).tolist()
      [[[[5.0]]]]
    """

    in_shape: tuple[int, ...]
    regions: tuple[int, int] = (1, 1)
    delta: float = 1e-6
    _reason = "exact: lengths over regions that do not overlap"

    def __post_init__(self):
        if len(self.in_shape) != 3:
            raise ValueError(f"L2Pool expects images: an in_shape (h, w, c), got {self.in_shape}.")
        pair = isinstance(self.regions, tuple | list) and len(self.regions) == 2 and all(map(_is_count, self.regions))
        if not pair or self.in_shape[0] % self.regions[0] or self.in_shape[1] % self.regions[1]:
            raise ValueError(
                f"L2Pool expects (rows, columns) of regions, at least 1 each, that divide the size "
                f"{self.in_shape[:2]}, got {self.regions!r}."
            )
        object.__setattr__(self, "regions", tuple(map(int, self.regions)))
        number = isinstance(self.delta, numbers.Real) and not isinstance(self.delta, bool)
        if not number or not DELTAS[0] <= self.delta <= DELTAS[1]:
            raise ValueError(
                f"L2Pool expects a delta between 2^-64 and 2^64, got {self.delta!r}: without one its gradient is not "
                "finite where a region is 0."
            )
        object.__setattr__(self, "delta", float(self.delta))

    @property
    def out_shape(self):
        return (*self.regions, self.in_shape[-1])

    @property
    def region_size(self) -> int:
        """Tokens in each region."""
        return math.prod(self.in_shape[:2]) // math.prod(self.regions)

    def __call__(self, x):
        check_input(self, x)
        (h, w, c), (rows, columns) = self.in_shape, self.regions
        tokens = x.reshape(x.shape[0], rows, h // rows, columns, w // columns, c)
        return jnp.sqrt(jnp.sum(tokens * tokens, axis=(2, 4)) + self.delta)

    def rounding_error(self, x):
        return gamma(self.region_size + 4) * ENLARGEMENT * norm_per_image(self(x))


def _is_count(n) -> bool:
    return isinstance(n, numbers.Integral) and not isinstance(n, bool) and int(n) >= 1
