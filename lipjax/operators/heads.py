"""Heads: the last map, from features to logits."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lipjax.errors import NotCertifiable
from lipjax.operators._base import COMPUTED, Leaf, check_input, gamma, operator


@operator("matrix", "bias", static=())
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
        return gamma(self.matrix.shape[1] + 3) * COMPUTED * size
