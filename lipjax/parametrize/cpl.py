"""CPL: a linear map divided by an estimate of its norm, for potential steps.

Source: Meunier et al. 2022, arXiv:2110.12690.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from lipjax.parametrize.sll import BELOW_ONE

EPSILON = 1e-4
"""The number that the original adds to the squared norm."""

MARGIN = 1 + 2.0**-10
"""A factor of converged estimates, which are low: the norm of what is frozen is then proved to be at most 1."""


def contracted(
    weight: Float[Array, "..."], sigma: Float[Array, ""], *, epsilon: float = EPSILON, room: float = BELOW_ONE
) -> tuple[Float[Array, "..."], Float[Array, ""]]:
    """The array A = room W / sqrt(sigma^2 + epsilon), and the factor.

    x - h W^T f(W x + b) with h = 2 / (sigma^2 + epsilon) is the potential step of A with the bias factor * b, where
    f(c z) = c f(z). It is contractive if sigma is not below the norm of W, which an estimate does not know.

    Args:
      weight: W, a matrix or kernel.
      sigma: an estimate of its norm.
      epsilon: added to sigma^2, >= 0.
      room: as of `sll.dense`.
    Returns: (A, factor): as W; a scalar, 0 if sigma and epsilon are 0.
    Source: Meunier et al. 2022, arXiv:2110.12690, section 3.
    Example:
      >>> a, factor = lipjax.parametrize.cpl.contracted(2 * jnp.eye(2), jnp.array(2.0), epsilon=0.0, room=1.0)
      >>> a.tolist(), float(factor)
      ([[1.0, 0.0], [0.0, 1.0]], 0.5)
    """
    squared = sigma**2 + epsilon
    positive = squared > 0
    factor = jnp.where(positive, room * lax.rsqrt(jnp.where(positive, squared, 1)), 0)
    return factor * weight, factor


def converged(operator: Any, v: Float[Array, "..."]) -> Float[Array, ""]:
    """The norm of an operator where its estimate has converged, times MARGIN: for evaluation and freezing.

    Not a proof (`spectral.largest_vector`). What is frozen is bounded as it is.

    Args:
      operator: one with `converge`, such as `operators.grid.on_grid` makes.
      v: the vector to start from.
    Returns: a scalar, differentiable with the vector that is reached as a constant.
    Source: Meunier et al. 2022, arXiv:2110.12690, whose code makes 100 steps of power iteration and adds nothing.
    Example:
      >>> operator = lipjax.operators.Dense(jnp.diag(jnp.array([3.0, 4.0])))
      >>> f"{lipjax.parametrize.cpl.converged(operator, jnp.ones(2)):.4f}"
      '4.0039'
    """
    return MARGIN * operator.converge(v)[0]
