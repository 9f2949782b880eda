"""Heads: the last map, from features to logits."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lipjax import spectral
from lipjax.errors import NotCertifiable
from lipjax.numerics import ENLARGEMENT, ROOM, gamma
from lipjax.operators.base import Head, Leaf, check_input, operator
from lipjax.operators.softplus import softplus, softplus_error
from lipjax.operators.text import matrix_text, sizes
from lipjax.spectral.arithmetic import check_rounding, exact_float64

# The norm of W1 in `MLPHead.pairwise_lipschitz` is estimated by this many steps of power iteration.
_POWER_STEPS = 8
# Entries of an MLP head up to 2^100: then no product of its proofs leaves the range of float64.
_MAX_EXPONENT = 100


def _distances(rows) -> Float[Array, "k k"]:
    """|r_i - r_j|_2 for all pairs of rows, by direct differences; differentiable, with gradient 0 at equal rows."""
    count, width = rows.shape
    if count * count * width <= 2**24:
        squared = jnp.sum((rows[:, None] - rows) ** 2, axis=2)
    else:  # the differences of all pairs would not fit in memory, also not as what the gradient keeps
        distances = jax.checkpoint(lambda row, rows: jnp.sum((row - rows) ** 2, axis=1))
        squared = jax.lax.map(lambda row: distances(row, rows), rows, batch_size=16)
    same = squared == 0
    return jnp.where(same, 0.0, jnp.sqrt(jnp.where(same, 1.0, squared)))


def distance_bounds(rows: np.ndarray) -> np.ndarray:
    """Proved upper bounds of |r_i - r_j|_2 for all pairs of float64 rows below 2^1000: exactly 0 for equal ones."""
    # A power of two brings the rows to order one, so that squares neither overflow nor vanish; what underflows all
    # the same is below the last term.
    scale = 2.0 ** math.frexp(float(np.abs(rows).max(initial=0.0)))[1]
    lengths = np.stack([np.sqrt(np.sum(((row - rows) / scale) ** 2, axis=1)) for row in rows])
    bound = lengths * (1 + gamma(rows.shape[1] + 8)) + np.where(lengths > 0, 2.0**-500, 0.0)
    same = np.stack([(row == rows).all(axis=1) for row in rows])
    return np.where(same, 0.0, np.nextafter(np.maximum(bound, 2.0**-500) * scale, np.inf))


def checked(array, name: str, max_exponent: int) -> np.ndarray:
    """The same numbers in float64, on a machine that may compute proofs.

    Raises: NotCertifiable if an entry is not finite or reaches 2^max_exponent, and as `exact_float64`.
    """
    check_rounding()
    array = exact_float64(array, f"The head's {name}")
    if not np.isfinite(array).all():
        raise NotCertifiable(f"The head's {name} has entries that are not finite.")
    largest = float(np.abs(array).max(initial=0.0))
    if math.frexp(largest)[1] > max_exponent:
        raise NotCertifiable(f"The head's {name} has entries up to {largest:g}, too large for float64 bounds.")
    return array


@operator("matrix", "bias", static=())
class LinearHead(Head):
    """Logits W x + b. matrix: (classes, features), used as it is: LLN is a parametrisation of it. bias: (classes,)."""

    matrix: Leaf
    bias: Leaf

    def _arrays_text(self):
        return matrix_text(self.matrix)

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
        return _distances(self.matrix)

    def pairwise_bound(self) -> np.ndarray:
        """Proved upper bound of |w_i - w_j|_2 for all pairs: (k, k) float64.

        Raises: NotCertifiable if an entry is not finite or above 2^1000.
        """
        return distance_bounds(checked(self.matrix, "matrix", 1000))

    def rounding_error(self, x):
        """Bound, (b, k), on the error of every computed logit."""
        size = jnp.abs(x) @ jnp.abs(self.matrix).T + jnp.abs(self.bias)
        return gamma(self.matrix.shape[1] + 3) * ENLARGEMENT * size


@operator("w1", "b1", "w2", "b2", static=())
class MLPHead(Head):
    """Logits W2 softplus(W1 x + b1) + b2: one hidden layer with an activation whose curvature is bounded.

    The Lipschitz constants of logit differences below hold everywhere and are loose near any one x. There
    `certify.mlp_radius`, and `FrozenNetwork.certify` with a proof, use the gradient at x and the curvature.

    w1: (hidden, features), b1: (hidden,), w2: (classes, hidden), b2: (classes,).
    Source: Singla & Feizi 2022, arXiv:2211.08453.
    """

    w1: Leaf
    b1: Leaf
    w2: Leaf
    b2: Leaf

    def _arrays_text(self):
        hidden, inputs = sizes(self.w1, 2)
        return f"{inputs} -> {hidden} -> {sizes(self.w2, 2)[0]}"

    @property
    def in_shape(self):
        return (self.w1.shape[1],)

    @property
    def out_shape(self):
        return (self.w2.shape[0],)

    def check(self) -> None:
        shapes = tuple(np.shape(a) for a in (self.w1, self.b1, self.w2, self.b2))
        if [len(shape) for shape in shapes] != [2, 1, 2, 1] or not (
            shapes[1] == shapes[0][:1] == shapes[2][1:] and shapes[3] == shapes[2][:1]
        ):
            raise ValueError(
                "Expected w1 (hidden, features), b1 (hidden,), w2 (classes, hidden) and b2 (classes,), got "
                f"{', '.join(map(str, shapes))}."
            )

    def __call__(self, x):
        check_input(self, x)
        return softplus(x @ self.w1.T + self.b1) @ self.w2.T + self.b2

    def pairwise_lipschitz(self) -> Float[Array, "k k"]:
        """(|W1^T (w_i - w_j)| + |W1| |w_i - w_j|) / 2 for all pairs, w_i the rows of W2: at most |W1| |w_i - w_j|.

        An estimate, perhaps low: |W1| comes from a few steps of power iteration, always from the same vector, which is
        a constant under differentiation. For training; `pairwise_bound` is the proof.
        """
        start = jax.random.normal(jax.random.key(0), self.in_shape, self.w1.dtype)
        precision = jax.lax.Precision.HIGHEST
        sigma, _ = spectral.power_iteration(
            lambda v: jnp.matmul(self.w1, v, precision=precision),
            lambda y: jnp.matmul(y, self.w1, precision=precision),
            start,
            _POWER_STEPS,
        )
        through = jnp.matmul(self.w2, self.w1, precision=precision)
        return (_distances(through) + sigma * _distances(self.w2)) / 2

    def pairwise_bound(self) -> np.ndarray:
        """Proved upper bound of what `pairwise_lipschitz` estimates: (k, k) float64.

        Raises: NotCertifiable if an entry is not finite or reaches 2^100.
        """
        w1, _, w2, _ = self.exact_arrays()
        through = w2 @ w1
        # Entry by entry the product errs by gamma |W2| |W1|, so its rows by gamma |W1|_F |w_i|.
        # (Row sums first, so that no sum is longer than a side.)
        lengths, frobenius = np.sqrt(np.sum(w2**2, axis=1)), math.sqrt(np.sum(np.sum(w1**2, axis=1)))
        error = gamma(w1.shape[0] + 3) * frobenius * lengths * ENLARGEMENT + 2.0**-400
        distances = distance_bounds(w2)
        sigma = spectral.matrix_norm_bound(w1).claimed
        total = distance_bounds(through) + error[:, None] + error + sigma * distances
        # With room for the rounding errors of another product W2 W1.
        return np.where(distances > 0, total / 2 * (1 + gamma(8)) * (1 + float(ROOM)), 0.0)

    def exact_arrays(self) -> list[np.ndarray]:
        """w1, b1, w2 and b2 in float64, as proofs take them.

        Raises: NotCertifiable if an entry is not finite or reaches 2^100, or float64 does not hold the numbers.
        """
        return [checked(getattr(self, name), name, _MAX_EXPONENT) for name in ("w1", "b1", "w2", "b2")]

    def rounding_error(self, x):
        """Bound, (b, k), on the error of every computed logit."""
        features, hidden = self.in_shape[0], self.w1.shape[0]
        sums = jnp.abs(x) @ jnp.abs(self.w1).T + jnp.abs(self.b1)
        units = softplus(x @ self.w1.T + self.b1)
        # softplus is 1-Lipschitz: the error of a unit is that of its sum and its own.
        unit_error = gamma(features + 3) * sums + softplus_error(units)
        size = units @ jnp.abs(self.w2).T + jnp.abs(self.b2)
        return ENLARGEMENT * (gamma(hidden + 3) * size + unit_error @ jnp.abs(self.w2).T)
