"""Steps between matrices with orthonormal columns: tangents, geodesics, truncated exponentials, and the way back.

What an optimiser on the orthogonal group or the Stiefel manifold is made of. Matrix products only, no LAPACK, which can
hang on CPUs; products are at the highest precision and divided over devices as those of all matrix functions. Where
functions return a difference to x, it is because x + difference then rounds each entry of x once and loses nothing.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from lipjax import _spread
from lipjax.linalg import functions

ORDERS = ("taylor", "exact", 2, 3, 4)
# Frobenius norms below which the series ends at A^2, A^3, A^4.
_LIMITS = (0.05, 0.25, 1.0)
# Frobenius norms of x^T x - I from which on a matrix is scaled first, and below which the series ends at E^2: what that
# leaves, (5/8) |E|^3, is less than the unit roundoff.
_FAR = 0.28
_NEAR = {"float32": 4e-3, "float64": 5e-6}
_PASSES = 100  # of a matrix without full rank, which has no orthonormal factor

Matrices = Float[Array, "*batch n p"]


def _t(x: Array) -> Array:
    return jnp.swapaxes(x, -1, -2)


def _squares(x: Array) -> Array:
    """Squared Frobenius norms."""
    return jnp.sum(x**2, (-2, -1))


def _eye(x: Array) -> Array:
    return jnp.eye(x.shape[-1], dtype=x.dtype)


def _check(name: str, *arrays: Array) -> None:
    x = arrays[0]
    if x.ndim < 2 or str(x.dtype) not in _NEAR or any((a.shape, a.dtype) != (x.shape, x.dtype) for a in arrays):
        found = " and ".join(f"{a.dtype} {a.shape}" for a in arrays)
        raise ValueError(f"{name} takes float32 or float64 matrices (..., n, p), of equal shapes, got {found}.")


@functools.partial(jax.jit, static_argnames="order")
def expm_truncated(a: Float[Array, "*batch n n"], order: str | int = "taylor") -> Float[Array, "*batch n n"]:
    """The exponential of small skew matrices by a series that is as short as their norms allow.

    With f the largest Frobenius norm of the batch, "taylor" takes the terms up to A^2 for f < 0.05 (1 product), A^3 for
    f < 0.25 (2 products), A^4 for f < 1 (2 products: I + A + A^2 (I/2 + A/6 + A^2/24)), and from there on scaling and
    squaring, as `expm_skew` (3 products and the squarings). The choice is made where the numbers are, so that one
    program serves all norms.

    Args:
      a: (..., n, n), skew, float32 or float64; unchecked.
      order: 2, 3, 4, whatever the norm; "taylor": by the norm, as above; "exact": scaling and squaring for all norms.
    Returns: the truncated exponential, same shape and dtype.
    Error: a singular value of the result is, for a rotation by the angle t <= f / sqrt(2), 1 times
      order 2: sqrt(1 + t^4/4), about 1 + t^4/8: it expands, by at most 2e-7 for f < 0.05;
      order 3: sqrt(1 - t^4/12 + t^6/36), about 1 - t^4/24, at most 4e-5 for f < 0.25;
      order 4: sqrt(1 - t^6/72 + t^8/576), about 1 - t^6/144, at most 9e-4 for f < 1.
      These need a single plane that turns; matrices that turn many planes alike have far smaller t. Errors of many
      steps multiply, and `polar` takes them off.
    Raises: ValueError for another order, matrices that are not square, or another dtype.
    Source: the optimiser of Hu, Hu & Fredrikson 2026, arXiv:2601.18513, after its thresholds as reported by others.
    Example: a small turn.
      >>> lipjax.linalg.expm_truncated(jnp.array([[0.0, -0.5], [0.5, 0.0]]), 2).tolist()
      [[0.875, -0.5], [0.5, 0.875]]
    """
    _check("expm_truncated", a)
    _check_order(order)
    if a.shape[-1] != a.shape[-2]:
        raise ValueError(f"expm_truncated takes square matrices (..., n, n), got {a.shape}.")
    return _spread.gathered(_eye(a) + _exponential_less_identity(a, _squares(a), order))


def _check_order(order: str | int) -> None:
    if order not in ORDERS:
        raise ValueError(f"Expected an order of the exponential out of {ORDERS}, got {order!r}.")


def _exponential_less_identity(k: Array, squares: Array, order: str | int) -> Array:
    """exp(k) - I of matrices with the eigenvalues of skew ones, whose squared Frobenius norms are given."""
    if k.size == 0:
        return k
    if order in (2, 3, 4):
        return _series(k, int(order))
    if order == "exact":
        return _any_norm(k)
    norm = jnp.sqrt(jnp.max(squares))
    # NaN compares as false: the last branch, where it stays NaN.
    index = sum(jnp.where(norm < limit, 0, 1) for limit in _LIMITS)
    return lax.switch(index, [*(functools.partial(_series, order=order) for order in (2, 3, 4)), _any_norm], k)


def _series(k: Array, order: int) -> Array:
    square = _spread.product(k, k)
    if order == 2:
        return k + square / 2
    further = k / 6 if order == 3 else k / 6 + square / 24
    return k + _spread.product(square, further + _eye(k) / 2)


def _any_norm(k: Array) -> Array:
    """By scaling and squaring. Doubling goes wrong by a few roundings only, while norms are moderate."""
    d, squarings = functions.polynomial((k, None))
    return lax.fori_loop(0, squarings, lambda _, d: functions.doubled(d), d)[0]


@jax.jit
def tangent(x: Matrices, g: Matrices) -> Float[Array, "*batch m q"]:
    """The part of a direction g that leads along the matrices with orthonormal columns, as coordinates at x.

    [A; B] with A = (x^T g - g^T x) / 2, skew, and B = g - x x^T g, whose columns are orthogonal to those of x: the
    direction x A + B is the projection of g, and of a gradient g the Riemannian gradient. A square x has no B. Where x
    is wide (orthonormal rows), x and g are transposed.

    Args:
      x: (..., n, p), orthonormal columns, or rows if n < p.
      g: as x: any direction, such as a gradient.
    Returns: (..., n + p, min(n, p)): A above B; (..., n, n) for n = p: A alone.
    Raises: ValueError for fewer than two axes, another dtype than float32 and float64, or different shapes.
    Source: Edelman, Arias & Smith 1998, arXiv:physics/9806030, section 2.2.
    Example: at the identity, the skew part.
      >>> lipjax.linalg.tangent(jnp.eye(2), jnp.array([[3.0, 4.0], [0.0, 5.0]])).tolist()
      [[0.0, 2.0], [-2.0, 0.0]]
    """
    _check("tangent", x, g)
    if x.shape[-2] < x.shape[-1]:
        x, g = _t(x), _t(g)
    inner = _spread.product(_t(x), g)
    skew = (inner - _t(inner)) / 2
    if x.shape[-2] == x.shape[-1]:
        return _spread.gathered(skew)
    return _spread.gathered(jnp.concatenate([skew, g - _spread.product(x, inner)], -2))


@functools.partial(jax.jit, static_argnames="order")
def geodesic_step(x: Matrices, z: Float[Array, "*batch m q"], order: str | int = "taylor") -> Matrices:
    """The way from x to the end of the geodesic that starts along z: x + geodesic_step(x, z) has orthonormal columns.

    For a square x the end is x exp(A). For a tall one it is exp(W x^T - x W^T) x with W = B + x A / 2, a product of an
    orthogonal n x n matrix and x, of which only the action on the 2p columns [x, B] is computed: with S = B^T B and any
    c > 0, that matrix maps [x, B/c] to [x, B/c] exp([[A, -S/c], [c I, 0]]). No n x n exponential, no QR; a B without
    full rank is as good as any other. A wide x is transposed before and after.

    Args:
      x: (..., n, p), orthonormal columns, or rows if n < p.
      z: coordinates as `tangent` gives them, times minus a step size, say; A skew. What of B is not orthogonal to x is
        taken off.
      order: of the exponential: `expm_truncated`, whose norms here are sqrt(|A|^2 + 2 |B|^2).
    Returns: (..., n, p), the difference of end and start.
    Error: that of the exponential, as a factor of singular values, and rounding. Departures of x from orthonormality
      stay.
    Raises: ValueError for shapes that do not fit, another dtype or order.
    Source: Edelman, Arias & Smith 1998, arXiv:physics/9806030, section 2.4 (canonical metric).
    Example: a quarter turn.
      >>> x = jnp.eye(2)
      >>> a = jnp.array([[0.0, -jnp.pi / 2], [jnp.pi / 2, 0.0]])
      >>> abs(x + lipjax.linalg.geodesic_step(x, a)).round(3).tolist()
      [[0.0, 1.0], [1.0, 0.0]]
    """
    _check("geodesic_step", x)
    _check_order(order)
    wide = x.shape[-2] < x.shape[-1]
    n, p = (x.shape[-1], x.shape[-2]) if wide else (x.shape[-2], x.shape[-1])
    expected = (*x.shape[:-2], p if n == p else n + p, p)
    if (z.shape, z.dtype) != (expected, x.dtype):
        raise ValueError(
            f"geodesic_step takes coordinates {x.dtype} {expected} at x {x.shape}, got {z.dtype} {z.shape}."
        )
    if n == p:
        return _spread.gathered(_spread.product(x, _exponential_less_identity(z, _squares(z), order)))
    found = _rectangular_step(_t(x) if wide else x, z, order)
    return _spread.gathered(_t(found) if wide else found)


def _rectangular_step(x: Array, z: Array, order: str | int) -> Array:
    p = x.shape[-1]
    a, b = z[..., :p, :], z[..., p:, :]
    b = b - _spread.product(x, _spread.product(_t(x), b))
    s = _spread.product(_t(b), b)
    # The two blocks S/c and cI then have equal norms. Without such a balance the small one drowns in rounding.
    c = jnp.sqrt(jnp.sqrt(_squares(s) / max(p, 1)))[..., None, None]
    c = jnp.where(c > 0, c, 1)
    eye = jnp.broadcast_to(c * _eye(x), a.shape)
    k = jnp.concatenate([jnp.concatenate([a, -s / c], -1), jnp.concatenate([eye, jnp.zeros_like(a)], -1)], -2)
    d = _exponential_less_identity(k, _squares(a) + 2 * _squares(b), order)
    return _spread.product(x, d[..., :p, :p]) + _spread.product(b / c, d[..., p:, :p])


@jax.jit
def polar(x: Matrices) -> Matrices:
    """The nearest matrix with orthonormal columns (rows, of a wide one): the polar factor x (x^T x)^(-1/2).

    With E = x^T x - I, (I + E)^(-1/2) = I - E/2 + 3 E^2/8 - 5 E^3/16 + 35 E^4/128 - ... In the everyday case, |E| in
    Frobenius norm below 0.004 (float32; 5e-6 in float64), the terms up to E^2 are exact to rounding, and cost three
    products. Otherwise passes up to E^4, of four products, come first, each of which takes |E| to the fifth power; from
    |E| = 0.28 on they are of x over a bound of its norm, for which they converge whatever the singular values: small
    ones grow by 2.4 in each pass.

    Args:
      x: (..., n, p), of full rank, float32 or float64. What has not come close after 100 passes, as a matrix without
        full rank, is returned as it then is.
    Returns: (..., n, p).
    Error: |Q^T Q - I| <= 4 sqrt(p) u in spectral norm, u the unit roundoff: measured (p <= 128), not proved.
    Raises: ValueError for fewer than two axes or another dtype.
    Source: Newton-Schulz-like iterations of higher order: Higham 2008, Functions of Matrices, section 8.
    Example: a stretched quarter turn.
      >>> lipjax.linalg.polar(jnp.array([[0.0, -2.0], [0.5, 0.0]])).round(3).tolist()
      [[0.0, -1.0], [1.0, 0.0]]
    """
    _check("polar", x)
    y, correction = _polar(x)
    return _spread.gathered(y + correction)


def polar_step(x: Array) -> Array:
    """polar(x) - x, whose rounding is relative to this difference where x is nearly orthonormal."""
    y, correction = _polar(x)
    return _spread.gathered((y - x) + correction)


def _polar(x: Array) -> tuple[Array, Array]:
    """A matrix close to the polar factor (x itself, if that is close), and what it lacks."""
    if x.size == 0:
        return x, x
    if x.shape[-2] < x.shape[-1]:
        y, correction = _polar(_t(x))
        return _t(y), _t(correction)
    near = _NEAR[str(x.dtype)]

    def departure(y):
        gram = _spread.product(_t(y), y)
        return gram, gram - _eye(y)

    def unfinished(carry):
        done, _, _, e = carry
        return (done < _PASSES) & (jnp.max(_squares(e)) > near**2)

    def improve(carry):
        done, y, gram, e = carry
        # Of x^T x; its root bounds the norm of x.
        bound = jnp.minimum(jnp.sqrt(_squares(gram)), jnp.max(jnp.sum(jnp.abs(gram), -1), -1))
        bound = jnp.where((_squares(e) < _FAR**2) | (bound == 0), 1, bound)[..., None, None]
        y, e = y / jnp.sqrt(bound), gram / bound - _eye(y)
        square = _spread.product(e, e)
        root = _spread.product(square, 0.375 * _eye(y) - 0.3125 * e + 0.2734375 * square) - e / 2
        y = y + _spread.product(y, root)
        return (done + 1, y, *departure(y))

    _, y, _, e = lax.while_loop(unfinished, improve, (0, x, *departure(x)))
    return y, _spread.product(y, 0.375 * _spread.product(e, e) - e / 2)


__all__ = ["expm_truncated", "geodesic_step", "polar", "tangent"]
