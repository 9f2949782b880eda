"""1-Lipschitz pooling of pairs of channels (i with i + C/2) as pure functions: C channels become C/2."""

import math

import jax
import jax.numpy as jnp
from jax.lax import optimization_barrier
from jaxtyping import Array, Float

from lipjax.activations import check_directions, clip_angle, half_angle, split_pairs

PROJECTION_THETA = (0.0, math.pi)
"""The paper draws the angle of `projection_pool` uniformly between these."""


def max_pool_pairs(x: Float[Array, "*batch c"]) -> Float[Array, "*batch half"]:
    """The larger of each pair of channels, exactly 1-Lipschitz.

    Args:
      x: (..., C), channels last, an even number C of them, any unit.
    Returns: (..., C/2), the unit of x.
    Raises: ValueError if C is odd.
    Source: Singla & Feizi 2022, arXiv:2211.08453 (the alternative to projection pooling in its code).
    Example:
      >>> lipjax.pooling.max_pool_pairs(jnp.array([1.0, 5.0, 2.0, 3.0])).tolist()
      [2.0, 5.0]
    """
    a, b = split_pairs(x, "Max pooling")
    return jnp.maximum(a, b)


def projection_pool(x: Float[Array, "*batch c"], theta: Float[Array, " half"]) -> Float[Array, "*batch half"]:
    """Projection pooling: the signed distance of each pair z to the wedge |arg z| <= theta/2, negative inside.

    The distance to a set is 1-Lipschitz, and so is the signed one to a convex set. theta = 0 is the distance to a ray,
    theta = pi is -a, the distance to a half plane. Gradients are finite everywhere; at z = 0 they are those of the
    distance to the wedge's upper edge, except that |b| has gradient 0 at b = 0.

    Args:
      x: (..., C), channels last, an even number C of them, any unit.
      theta: (C/2,), radians, clipped to [0, pi], with gradient 0 outside; the paper draws it uniformly from
        PROJECTION_THETA.
    Returns: (..., C/2), the unit of x.
    Raises: ValueError if C is odd or theta has another shape.
    Source: Singla & Feizi 2022, arXiv:2211.08453.
    Example: the nearest point to (-3, 4) of the ray to the right is the origin, 5 away.
      >>> lipjax.pooling.projection_pool(jnp.array([-3.0, 4.0]), jnp.array([0.0])).tolist()
      [5.0]
    """
    check_directions(x, (theta,))
    return wedge_distance(x, wedge_direction(theta))


def wedge_direction(theta: Float[Array, " half"]) -> Float[Array, "2 half"]:
    """The upper edge of `projection_pool`'s wedge: (cos theta/2, sin theta/2), theta clipped to [0, pi]."""
    return half_angle(clip_angle(theta, math.pi), (True, True))


def wedge_distance(x: Float[Array, "*batch c"], direction: Float[Array, "2 half"]) -> Float[Array, "*batch half"]:
    """`projection_pool` given by the direction of the wedge's upper edge, of any length; its mirror image is the lower.

    Args: x: (..., C). direction: (2, C/2), not 0, no component negative.
    Returns: (..., C/2), the unit of x.
    Raises: ValueError if C is odd or the direction has another shape.
    """
    a, b = split_pairs(x, "Projection pooling")
    check_directions(x, (direction,))
    # The barrier keeps XLA from dividing by a root as a product with `rsqrt`, whose error nobody states.
    length = optimization_barrier(jnp.sqrt(direction[0] * direction[0] + direction[1] * direction[1]))
    cos, sin = optimization_barrier(direction / length)  # lest XLA divides once per element
    height = jnp.abs(b)
    # Nearest is the edge, or the apex for what lies behind the edge's normal there.
    return jnp.where(cos * a + sin * height < 0, _length(a, b), cos * height - sin * a)


@jax.custom_jvp
def _length(a, b):
    """sqrt(a^2 + b^2), which neither overflows nor underflows in between; its gradient at 0 is 0."""
    large, small = jnp.maximum(jnp.abs(a), jnp.abs(b)), jnp.minimum(jnp.abs(a), jnp.abs(b))
    ratio = small / jnp.where(large > 0, large, 1.0)
    return large * jnp.sqrt(1 + ratio * ratio)


@_length.defjvp
def _length_jvp(primals, tangents):
    (a, b), (a_dot, b_dot) = primals, tangents
    length = _length(a, b)
    divisor = jnp.where(length > 0, length, 1.0)
    return length, (a / divisor) * a_dot + (b / divisor) * b_dot


__all__ = ["PROJECTION_THETA", "max_pool_pairs", "projection_pool", "wedge_direction", "wedge_distance"]


def __dir__() -> list[str]:
    return __all__
