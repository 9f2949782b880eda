"""1-Lipschitz activations as pure functions. Channels pair by halves: i with i + C/2.

A pair is a point z of the plane, or a complex number. The Householder activations fold that plane: each is continuous
and orthogonal on each of a few sectors, hence exactly 1-Lipschitz and gradient-norm preserving. Their angles theta
enter only through directions (cos theta/2, sin theta/2), on which everything else is arithmetic without transcendental
functions; any other vectors in their place also define exactly 1-Lipschitz maps. That is what operators store.
"""

import math

import jax
import jax.numpy as jnp
from jax.lax import optimization_barrier, stop_gradient
from jaxtyping import Array, Bool, Float

HOUSEHOLDER_THETA = math.pi / 2
"""The angle at which the paper starts `householder`: there it is (min, max) of each pair."""
HOUSEHOLDER2_THETA = (0.0, math.pi)
"""The paper draws the three angles of `householder2` uniformly between these."""


def split_pairs(x: Float[Array, "*batch c"], name: str) -> tuple[Float[Array, "*batch half"], ...]:
    """The two halves of the channels. Raises: ValueError, speaking of `name`, if their number is odd."""
    if x.shape[-1] % 2:
        raise ValueError(f"{name} pairs channels: expected an even number of them, got shape {x.shape}.")
    first, second = jnp.split(x, 2, axis=-1)
    return first, second


def check_directions(x: Float[Array, "*batch c"], directions: tuple[Array, ...]) -> None:
    """Raises: ValueError unless each direction (or pair of angles) has an entry per pair of channels of x."""
    for direction in directions:
        if direction.shape[-1:] != (x.shape[-1] // 2,):
            raise ValueError(
                f"Expected one angle or direction for each of the {x.shape[-1] // 2} pairs of channels of "
                f"{x.shape}, got shape {direction.shape}."
            )


def clip_angle(theta: Float[Array, "*shape"], limit: float) -> Float[Array, "*shape"]:
    """theta clipped to [0, limit], with gradient 1 on the closed interval and 0 outside."""
    inside = (theta >= 0) & (theta <= limit)
    return jnp.where(inside, theta, stop_gradient(jnp.clip(theta, 0.0, limit)))


def half_angle(theta: Float[Array, " half"], nonnegative: tuple[bool, bool] = (False, False)) -> Float[Array, "2 half"]:
    """(cos theta/2, sin theta/2); of the components marked, what rounding makes negative becomes 0.

    (The float nearest to pi may lie above it, and has a negative sine. The gradient stays that of cosine and sine.)
    """
    components = []
    for value, mark in zip((jnp.cos(theta / 2), jnp.sin(theta / 2)), nonnegative, strict=True):
        components.append(value + stop_gradient(jnp.maximum(value, 0.0) - value) if mark else value)
    # Without the barrier XLA computes sines and cosines again for every element that they meet: ten times the time.
    return optimization_barrier(jnp.stack(components))


def maxmin(x: Float[Array, "*batch c"]) -> Float[Array, "*batch c"]:
    """Sorts each pair of channels: concat(max(a, b), min(a, b)) of the halves a, b.

    An orthogonal map on each side of the tie a = b, and continuous there: exactly 1-Lipschitz and
    gradient-norm preserving. At the tie the gradients of both are the mean, as JAX and PyTorch have it.

    Args:
      x: (..., C), channels last, an even number of them, any unit.
    Returns: the shape and unit of x.
    Raises: ValueError if the number of channels is odd.
    Source: Anil, Lucas & Grosse 2019, arXiv:1811.05381 (called MinMax in the LiResNet code).
    Example: the pairs are (1, 2) and (5, 3).
      >>> lipjax.activations.maxmin(jnp.array([1.0, 5.0, 2.0, 3.0])).tolist()
      [2.0, 5.0, 1.0, 3.0]
    """
    return jnp.concatenate(_sorted_pair(*split_pairs(x, "MaxMin")), axis=-1)


@jax.custom_jvp
def _sorted_pair(a: Array, b: Array) -> tuple[Array, Array]:
    return jnp.maximum(a, b), jnp.minimum(a, b)


@_sorted_pair.defjvp
def _sorted_tangents(primals, tangents):
    # The gradients of JAX's own maximum and minimum are the same, but divide every element (docs/performance.md).
    (a, b), (da, db) = primals, tangents
    mean = 0.5 * (da + db)

    def first_if_larger(first, second):
        return jnp.where(a > b, first, jnp.where(a < b, second, mean))

    return _sorted_pair(a, b), (first_if_larger(da, db), first_if_larger(db, da))


def householder(x: Float[Array, "*batch c"], theta: Float[Array, " half"]) -> Float[Array, "*batch c"]:
    """Householder activation of order 1: z -> z or (I - 2 v v^T) z, by the sign of v^T z.

    v = (sin theta/2, -cos theta/2). At theta = pi/2 it gives (min, max) of each pair. At the edge v^T z = 0 the
    gradient is that of the identity.

    Args:
      x: (..., C), channels last, an even number C of them, any unit.
      theta: (C/2,), radians, one angle per pair (i, i + C/2), any real numbers; the paper starts at
        HOUSEHOLDER_THETA.
    Returns: the shape and unit of x.
    Raises: ValueError if C is odd or theta has another shape.
    Source: Singla, Singla & Feizi 2022, arXiv:2108.04062.
    Example:
      >>> lipjax.activations.householder(jnp.array([2.0, 1.0]), jnp.array([jnp.pi / 2])).round(3).tolist()
      [1.0, 2.0]
    """
    check_directions(x, (theta,))
    return fold(x, householder_direction(theta))


def householder_direction(theta: Float[Array, " half"]) -> Float[Array, "2 half"]:
    """The axis (cos theta/2, sin theta/2) along which `householder` folds the plane of each pair."""
    return half_angle(theta)


def fold(x: Float[Array, "*batch c"], direction: Float[Array, "2 half"]) -> Float[Array, "*batch c"]:
    """Folds the plane of each pair along the line of `direction`: what lies to its right is reflected to its left.

    With d the direction and v = (d_y, -d_x) this is z - 2 max(v^T z, 0) v / v^T v, in exact arithmetic 1-Lipschitz for
    every d but 0.

    Args: x: (..., C). direction: (2, C/2), not 0, of any length that has a square.
    Returns: the shape and unit of x.
    Raises: ValueError if C is odd or the direction has another shape.
    """
    a, b = split_pairs(x, "Householder")
    check_directions(x, (direction,))
    left = direction[0] * b - direction[1] * a >= 0
    real, imag = optimization_barrier(_square(direction))
    return _rotate(a, b, jnp.where(left, 1.0, real), jnp.where(left, 0.0, imag), left)


def householder2(
    x: Float[Array, "*batch c"],
    theta0: Float[Array, " half"],
    theta1: Float[Array, " half"],
    theta2: Float[Array, " half"],
) -> Float[Array, "*batch c"]:
    """Householder activation of order 2: four sectors of the plane of each pair, folded onto each other.

    From the ray at angle theta0/2, with phi the angle counted from there: identity up to phi = theta1/2, reflection in
    the ray there up to (theta1 + theta2)/2, rotation by -theta2 up to pi + theta2/2, and reflection in the first ray.
    Consecutive maps agree on the ray between them. No angle of x is computed, so none is rounded (the first published
    code gave 0 where its angle rounded to 2 pi).

    Args:
      x: (..., C), channels last, an even number C of them, any unit.
      theta0, theta1, theta2: (C/2,) each, radians, clipped to [0, 2 pi], with gradient 0 outside; the paper draws them
        uniformly from HOUSEHOLDER2_THETA.
    Returns: the shape and unit of x.
    Raises: ValueError if C is odd or an angle has another shape.
    Source: Singla, Singla & Feizi 2022, arXiv:2108.04062.
    Example: with three angles of pi/2, the point (-1, 0) is turned by -pi/2, to (0, 1).
      >>> lipjax.activations.householder2(jnp.array([-1.0, 0.0]), *jnp.full((3, 1), jnp.pi / 2)).argmax().item()
      1
    """
    check_directions(x, (theta0, theta1, theta2))
    return fold_sectors(x, householder2_directions(theta0, theta1, theta2))


def householder2_directions(
    theta0: Float[Array, " half"], theta1: Float[Array, " half"], theta2: Float[Array, " half"]
) -> Float[Array, "3 2 half"]:
    """Directions for `fold_sectors`: (cos, sin) of half of each angle of `householder2`, clipped to [0, 2 pi]."""
    theta0, theta1, theta2 = (clip_angle(theta, 2 * math.pi) for theta in (theta0, theta1, theta2))
    above = (False, True)
    return jnp.stack([half_angle(theta0), half_angle(theta1, above), half_angle(theta2, above)])


def fold_sectors(x: Float[Array, "*batch c"], directions: Float[Array, "3 2 half"]) -> Float[Array, "*batch c"]:
    """`householder2` given by directions p, q, r: complex numbers of any length, with q and r not below the real axis.

    The sectors lie between the rays p, p q, p q r, -p r and p again. As opposite sectors add up to a half turn by
    construction, whatever p, q and r are, the pieces always fit together: in exact arithmetic the map is 1-Lipschitz.

    Args: x: (..., C). directions: p, q, r as (3, 2, C/2), real and imaginary parts; none 0.
    Returns: the shape and unit of x.
    Raises: ValueError if C is odd or the directions have another shape.
    """
    a, b = split_pairs(x, "Householder2")
    check_directions(x, (directions,))
    cone, left, beyond = _sectors(a, b, directions)
    p, q, r = map(_square, directions)
    pq = p[0] * q[0] - p[1] * q[1], p[0] * q[1] + p[1] * q[0]
    p, pq, r = optimization_barrier((p, pq, r))
    real = jnp.where(cone, jnp.where(left, 1.0, p[0]), jnp.where(beyond, r[0], pq[0]))
    imag = jnp.where(cone, jnp.where(left, 0.0, p[1]), jnp.where(beyond, -r[1], pq[1]))
    return _rotate(a, b, real, imag, jnp.where(cone, left, beyond))


def _rotate(a, b, real, imag, keep) -> Float[Array, "*batch c"]:
    """The halves of k z where keep, of k conj(z) elsewhere, for z = a + i b and k = real + i imag of the same shape.

    (As k is of full shape, its gradient is summed over the batch once, not once per product.)
    """
    b = jnp.where(keep, b, -b)
    return jnp.concatenate([real * a - imag * b, imag * a + real * b], axis=-1)


def _sectors(a, b, directions) -> tuple[Bool[Array, "..."], Bool[Array, "..."], Bool[Array, "..."]]:
    """The sector, as three answers: does it touch the ray p; if so, is it left of p; if not, is it left of pqr.

    docs/soundness.md shows that a comparison that rounding decides wrongly costs a few roundings of the output.
    """
    p, q, r = directions
    # w = conj(p) z: the frame where the first ray is the positive real axis.
    along = p[0] * a + p[1] * b
    across = p[0] * b - p[1] * a
    left = across >= 0
    # The two sectors at the first ray reach up to q on its left, and down to -r on its right, the mirror image of
    # -conj(r). Where the comparison ties, w lies on that ray, and either answer will do, or the ray is horizontal and w
    # lies opposite to it, on the first ray (if along > 0, as the ray points left) or beyond the cone.
    edge_along, edge_across = jnp.where(left, q[0], -r[0]), jnp.where(left, q[1], r[1])
    turn = edge_along * jnp.abs(across) - edge_across * along
    cone = (turn < 0) | ((turn == 0) & (along > 0))
    qr = q[0] * r[0] - q[1] * r[1], q[0] * r[1] + q[1] * r[0]
    return cone, left, qr[0] * across - qr[1] * along > 0


def _square(direction) -> tuple[Float[Array, " half"], Float[Array, " half"]]:
    """d^2 / |d|^2 of a complex d: the real and imaginary part of e^(i theta) for d at theta/2."""
    along, across = direction
    size = along * along + across * across
    return (along * along - across * across) / size, 2 * along * across / size


def n_activation(
    x: Float[Array, "*batch c"], lower: Float[Array, " c"], upper: Float[Array, " c"]
) -> Float[Array, "*batch c"]:
    """The N-activation of every channel: x - 2 lower, -x, x - 2 upper, between which it changes at lower and upper.

    max(x - 2 upper, min(x - 2 lower, -x)): continuous and 1-Lipschitz for any numbers, of slopes 1, -1 and 1.

    Args:
      x: (..., c).
      lower, upper: (c,), in the unit of x; where lower >= upper it is x - 2 upper.
    Returns: (..., c), in the unit of x. At a break the derivative is that of the right-hand piece.
    Source: Prach & Lampert 2023, arXiv:2311.06103.
    Example: the absolute value, and a shift of it, below and above -1.
      >>> x = jnp.array([-3.0, -0.5, 2.0])[:, None]
      >>> lipjax.activations.n_activation(x, jnp.array([-1.0]), jnp.array([0.0])).ravel().tolist()
      [-1.0, 0.5, 2.0]
    """
    below, above = x - 2 * lower, x - 2 * upper
    # By comparisons, which unlike minimum and maximum do not halve gradients at ties.
    inner = jnp.where(below < -x, below, -x)
    return jnp.where(inner <= above, above, inner)


def n_thresholds(theta: Float[Array, "c 2"], rate: float = 1.0) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
    """Thresholds of `n_activation`, lower <= upper, from unconstrained ones.

    Args:
      theta: (c, 2).
      rate: theta is multiplied by its root, as if its learning rate were multiplied by `rate`.
    Returns: lower and upper, (c,) each.
    Source: the code of Prach & Lampert 2023, arXiv:2311.06103.
    Example:
      >>> [a.tolist() for a in lipjax.activations.n_thresholds(jnp.array([[1.0, -0.5]]), 4.0)]
      [[-1.0], [2.0]]
    """
    ordered = jnp.sort(theta * math.sqrt(rate), axis=1)
    return ordered[:, 0], ordered[:, 1]


def linear_spline(
    x: Float[Array, "*batch c"], values: Float[Array, "c n"], spacing: float, scale: Float[Array, " c"] | None = None
) -> Float[Array, "*batch c"]:
    """Interpolates between values at uniform knots, channel by channel: f(scale x) / scale.

    Knots lie at (j - (n - 1) / 2) spacing; beyond them the first and the last piece go on.

    Args:
      x: (..., c).
      values: (c, n), f at the knots. n is odd and at least 3: the middle knot is 0.
      spacing: of the knots, in the unit of x.
      scale: (c,), not 0, or None for 1.
    Returns: (..., c), in the unit of values. At a knot the derivative is that of the right-hand piece.
    Raises: ValueError for an even number of knots.
    Source: Ducotterd et al. 2022, arXiv:2210.16222.
    Example: the absolute value by three knots.
      >>> spline = lipjax.activations.linear_spline(jnp.array([[-4.0], [0.5]]), jnp.array([[1.0, 0.0, 1.0]]), 1.0)
      >>> spline.ravel().tolist()
      [4.0, 0.5]
    """
    left, right, weight = spline_pieces(x if scale is None else x * scale, values, spacing)
    y = left + weight * (right - left)
    return y if scale is None else y / scale


def spline_pieces(t: Float[Array, "*batch c"], values: Float[Array, "c n"], spacing: float) -> tuple[Array, ...]:
    """The values at the knots to the left and to the right of t, or at the last two, and the weight of the latter.

    Args: as of `linear_spline`. Returns: three arrays (..., c). Raises: ValueError for an even number of knots.
    """
    check_knots(values)
    channels, knots = values.shape
    middle = (knots - 1) // 2
    places = t / spacing
    first = stop_gradient(jnp.clip(jnp.floor(places), -middle, middle - 1))
    rows = knots * jnp.arange(channels, dtype=jnp.int32) + middle
    index = first.astype(jnp.int32) + rows
    flat = values.reshape(-1)
    left, right = (flat.at[i].get(mode="clip") for i in (index, index + 1))  # clip: of NaN any number may come
    return left, right, places - first


def check_knots(values) -> None:
    """Raises: ValueError unless values are (c, n) with n odd and at least 3."""
    if jnp.ndim(values) != 2 or values.shape[1] < 3 or values.shape[1] % 2 == 0:
        raise ValueError(
            f"Expected values (c, n) at an odd number n >= 3 of knots, one of them 0, got {jnp.shape(values)}."
        )


def spline_values(raw: Float[Array, "c n"], spacing: float) -> Float[Array, "c n"]:
    """The values with differences clipped to [-spacing, spacing], and the mean of before: slopes within [-1, 1].

    Args:
      raw: (c, n), values at knots.
      spacing: of the knots.
    Returns: (c, n). Differences at the ends of the interval pass the whole gradient.
    Source: Ducotterd et al. 2022, arXiv:2210.16222.
    Example: a step that is too steep.
      >>> lipjax.activations.spline_values(jnp.array([[0.0, 4.0, 5.0]]), 1.0).tolist()
      [[2.0, 3.0, 4.0]]
    """
    steps = jnp.diff(raw, axis=1)
    inside = (steps >= -spacing) & (steps <= spacing)
    clipped = jnp.where(inside, steps, stop_gradient(jnp.clip(steps, -spacing, spacing)))
    values = jnp.concatenate([jnp.zeros_like(raw[:, :1]), jnp.cumsum(clipped, axis=1)], axis=1)
    return values + jnp.mean(raw - values, axis=1, keepdims=True)


__all__ = [
    "HOUSEHOLDER2_THETA",
    "HOUSEHOLDER_THETA",
    "check_knots",
    "clip_angle",
    "fold",
    "fold_sectors",
    "half_angle",
    "householder",
    "householder2",
    "householder2_directions",
    "householder_direction",
    "linear_spline",
    "maxmin",
    "n_activation",
    "n_thresholds",
    "spline_pieces",
    "spline_values",
    "split_pairs",
]


def __dir__() -> list[str]:
    return __all__
