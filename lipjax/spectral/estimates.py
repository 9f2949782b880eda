"""Power iteration, on a map and its adjoint: the one estimate of norms that training uses."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from lipjax.linalg.unit import unit
from lipjax.spectral.arguments import Estimated, check_operator


def power_iteration(
    apply: Callable[[Array], Array], adjoint: Callable[[Array], Array], v: Float[Array, "..."], num_iters: int
) -> tuple[Float[Array, ""], Float[Array, "..."]]:
    """Estimates the norm of a linear map A by v <- A^T A v / |A^T A v|, then sigma = |A v|.

    Args:
      apply: v -> A v.
      adjoint: y -> A^T y.
      v: start vector, any nonzero norm; one that A maps to zero is kept as it is.
      num_iters: number of steps, >= 0.
    Returns: (sigma, v): sigma <= |A| up to rounding, differentiable with respect to what `apply` closes over with v
      held constant (so d sigma / dA = u v^T at convergence; 0 where A v = 0); v of norm 1, without gradient.
    Raises: ValueError if num_iters is negative.
    Source: Miyato et al. 2018, arXiv:1802.05957, with v detached.
    Example:
      >>> a = jnp.diag(jnp.array([3.0, 4.0]))
      >>> sigma, v = lipjax.spectral.power_iteration(lambda v: a @ v, lambda y: a.T @ y, jnp.ones(2), 50)
      >>> f"{sigma:.4f}"
      '4.0000'
    """
    if num_iters < 0:
        raise ValueError(f"power_iteration: expected num_iters >= 0, got {num_iters}")
    v = lax.stop_gradient(v)
    v = unit(v, v)

    def step(u: Array) -> Array:
        return unit(adjoint(apply(u)), u)

    # Hoisting what the closures capture lets the loop see constants: nothing of it is kept for the gradient.
    closed, captured = jax.closure_convert(step, v)
    captured = [lax.stop_gradient(c) for c in captured]
    if num_iters <= 16:
        for _ in range(num_iters):
            v = closed(v, *captured)
    else:
        v = lax.fori_loop(0, num_iters, lambda _, u: closed(u, *captured), v)
    v = lax.stop_gradient(v)
    image = apply(v)
    largest = lax.stop_gradient(jnp.max(jnp.abs(image)))
    positive = largest > 0
    largest = jnp.where(positive, largest, 1)
    squares = jnp.sum(jnp.abs(image / largest) ** 2)
    sigma = jnp.where(positive, largest * jnp.sqrt(jnp.where(positive, squares, 1)), 0)
    return sigma, v


def norm_estimate(
    operator: Any, v: Float[Array, "..."], num_iters: int
) -> tuple[Float[Array, ""], Float[Array, "..."]]:
    """Differentiable estimate of a linear operator's norm, `operator.estimate`: no bound, it may be low.

    Args:
      operator: one of lipjax.operators whose norm is not known beforehand.
      v: in_shape of the operator, any nonzero start vector.
      num_iters: steps of power iteration, >= 0.
    Returns: (sigma, v): scalar; unit vector to start from next time, without gradient.
    Raises: ValueError if num_iters is negative, and for what has no `estimate`: arrays, and maps whose norm is known.
    Source: as `power_iteration`.
    Example:
      >>> operator = lipjax.operators.Dense(jnp.diag(jnp.array([3.0, 4.0])))
      >>> sigma, v = lipjax.spectral.norm_estimate(operator, jnp.ones(2), 50)
      >>> f"{sigma:.4f}"
      '4.0000'
    """
    check_operator(operator, "norm_estimate", "power_iteration")
    if not isinstance(operator, Estimated):
        kind = type(operator).__name__
        raise ValueError(f"norm_estimate: {kind} has no estimate() method; norm_bound gives a norm that is known.")
    return operator.estimate(v, num_iters)
