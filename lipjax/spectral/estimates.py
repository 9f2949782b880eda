"""Estimates of norms, on a map and its adjoint: power iteration, which training uses, and one that converges sooner."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from lipjax.linalg.unit import of_peak_1, unit, unit_of_peak_1
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
      held constant (so d sigma / dA = u v^T at convergence; 0 where A v = 0); v of norm 1, without gradient. NaN where
      A v is not finite.
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
    v = of_peak_1(v, v)

    def step(u: Array) -> Array:
        # The direction is the same as that of a unit vector, and takes one sum over the entries instead of two.
        return of_peak_1(adjoint(apply(u)), u)

    # Hoisting what the closures capture lets the loop see constants: nothing of it is kept for the gradient.
    closed, captured = jax.closure_convert(step, v)
    captured = [lax.stop_gradient(c) for c in captured]
    if num_iters <= 16:
        for _ in range(num_iters):
            v = closed(v, *captured)
    else:
        v = lax.fori_loop(0, num_iters, lambda _, u: closed(u, *captured), v)
    v = lax.stop_gradient(unit_of_peak_1(v, v))
    image = apply(v)
    largest = lax.stop_gradient(jnp.max(jnp.abs(image)))
    zero = largest == 0  # which an image that is not a number is not
    largest = jnp.where(zero, 1, largest)
    squares = jnp.sum(jnp.abs(image / largest) ** 2)
    sigma = jnp.where(zero, 0, largest * jnp.sqrt(jnp.where(zero, 1, squares)))
    return sigma, v


# `largest_vector` ends when so many steps gain less than a part in 10^6, or after so many rounds of them.
_STEPS, _GAIN, _ROUNDS = 10, 1e-6, 50


def largest_vector(
    apply: Callable[[Array], Array], adjoint: Callable[[Array], Array], v: Float[Array, "..."]
) -> Float[Array, "..."]:
    """A unit vector v at which |A v| hardly grows any more, by conjugate directions: for norms outside of training.

    Each step goes to the best vector in the span of the last one, of its gradient and of the last direction. A power
    iteration needs the square of its number of steps where the largest singular values lie close to each other. Not a
    proof: a start that is orthogonal to what is largest, or a gain too slow to be seen, ends below the norm.

    Args:
      apply: v -> A v. adjoint: y -> A^T y.
      v: start vector, any nonzero norm; one that A maps to zero is kept as it is.
    Returns: v, without gradient, after at most 500 steps, of which each applies A and A^T once.
    Source: Knyazev 2001, Toward the optimal preconditioned eigensolver, SIAM J. Sci. Comput. 23 (no preconditioner).
    Example:
      >>> a = jnp.diag(jnp.array([3.0, 4.0]))
      >>> v = lipjax.spectral.largest_vector(lambda v: a @ v, lambda y: a.T @ y, jnp.ones(2))
      >>> f"{jnp.linalg.norm(a @ v):.4f}"
      '4.0000'
    """
    v = lax.stop_gradient(v)

    def gram(u):
        return lax.stop_gradient(adjoint(apply(u)))

    def inner(a, b):
        return jnp.vdot(a, b, precision=lax.Precision.HIGHEST)

    def across(a, b, of_a, of_b):
        """b without its part along the unit vector a, of length 1 (0 if nothing is left), and its image under A^T A."""
        part = inner(a, b)
        rest, image = b - part * a, of_b - part * of_a
        size = jnp.sqrt(inner(rest, rest))
        factor = jnp.where(size > 1e-30, 1 / jnp.where(size > 1e-30, size, 1), 0)
        return factor * rest, factor * image

    def step(_, state):
        v, of_v, p, of_p = state
        p, of_p = across(v, p, of_v, of_p)
        gradient = unit(of_v - inner(v, of_v) * v, jnp.zeros_like(v))
        for _ in range(2):  # once more against rounding
            gradient, _ = across(v, gradient, of_v, of_v)
            gradient, _ = across(p, gradient, of_p, of_p)
        basis, images = (v, gradient, p), (of_v, gram(gradient), of_p)
        small = jnp.stack([jnp.stack([inner(a, b) for b in images]) for a in basis])
        y = jnp.linalg.eigh((small + small.T) / 2)[1][:, -1]

        def at(y, of):
            return y[0] * of[0] + y[1] * of[1] + y[2] * of[2]

        there, moved = at(y, basis), y.at[0].set(0)
        good = inner(there, there) > 0.5  # not where A maps all three to zero
        v, of_v = jnp.where(good, there, v), jnp.where(good, at(y, images), of_v)
        return v, of_v, at(moved, basis), at(moved, images)

    def further(state):
        rounds, before, now, *_ = state
        return (now > (1 + _GAIN) ** 2 * before) & (rounds < _ROUNDS)

    def some(state):
        rounds, _, now, v, p = state
        # Images are computed anew in each round: sums of sums have rounded by then.
        v, of_v, p, _ = lax.fori_loop(0, _STEPS, step, (v, gram(v), p, gram(p)))
        return rounds + 1, now, inner(v, of_v), unit(v, v), p

    none = jnp.zeros((), v.dtype)
    # The second number, of the last round, is below the third at first, so that the loop begins.
    found = lax.while_loop(further, some, (jnp.zeros((), jnp.int32), none - 1, none, unit(v, v), jnp.zeros_like(v)))
    return lax.stop_gradient(found[3])


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
