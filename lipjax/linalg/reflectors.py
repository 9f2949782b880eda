"""Block reflectors I - 2 V (V^H V + e I)^-1 V^H: orthogonal but for e, by Cholesky factors of small Gram matrices."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact

from lipjax import _spread
from lipjax.linalg import cholesky
from lipjax.linalg.parts import Parts, add, adjoint, product, scaled


def block_reflector(
    v: Inexact[Array, "*batch m r"],
    ridge: float = 1e-5,
    *,
    rows: int | None = None,
    columns: int | None = None,
    constant_ridge: bool = False,
) -> Inexact[Array, "*batch o i"]:
    """The block reflector W = I - 2 v (v^H v + e I)^-1 v^H, e = ridge times the mean of the diagonal of v^H v.

    W is Hermitian. Along a left singular vector of v with singular value s it has the eigenvalue 1 - 2 s^2 / (s^2 + e),
    and 1 on all that is orthogonal to them: W is a reflection for e = 0 and otherwise a contraction, close to it for
    s^2 well above e. Parts of W are contractions, too.

    Args:
      v: (..., m, r), r <= m, float or complex of 32 or 64 bits per real number. W is the same for c v, c > 0, but for
        under- and overflow of squares.
      ridge: >= 0; at least 8 sqrt(m) u is taken, u the unit roundoff, since columns that depend on each other more
        closely cannot be told apart.
      rows, columns: of W, the first ones are returned; None for all m.
      constant_ridge: take e as a constant for the gradient.
    Returns: W[:rows, :columns], dtype of v; parts of I for v = 0.
    Error: in spectral norm |W - exact| <= 8 u (m + r) / x, x = max(ridge, the least squared singular value of v over
      the mean of all), where ridge is what was taken: measured, not proved.
    Derivatives: reverse mode, once: products of m x r matrices alone, nothing goes back through the factorisation.
    Raises: ValueError for fewer than two axes, r > m, ridge < 0 or numbers of rows and columns beyond m.
    Source: Lai et al. 2025, arXiv:2505.15174.
    Example: one column gives a Householder reflection.
      >>> lipjax.linalg.block_reflector(jnp.array([[0.0], [2.0]]), ridge=0.0).round(3).tolist()
      [[1.0, 0.0], [0.0, -1.0]]
    """
    parts = (v.real, v.imag) if jnp.iscomplexobj(v) else (v, None)
    real, imag = _checked(parts, ridge, rows, columns, constant_ridge)
    return real if imag is None else jax.lax.complex(real, imag)


def block_reflector_split(
    real: Float[Array, "*batch m r"],
    imag: Float[Array, "*batch m r"],
    ridge: float = 1e-5,
    *,
    rows: int | None = None,
    columns: int | None = None,
    constant_ridge: bool = False,
) -> tuple[Float[Array, "*batch o i"], Float[Array, "*batch o i"]]:
    """`block_reflector` of a complex v given and returned as real and imaginary part."""
    return _checked((real, imag), ridge, rows, columns, constant_ridge)


def _checked(v: Parts, ridge: float, rows: int | None, columns: int | None, constant_ridge: bool) -> Any:
    shape = v[0].shape
    m = shape[-2] if len(shape) > 1 else 0
    rows, columns = (m if n is None else n for n in (rows, columns))
    if len(shape) < 2 or shape[-1] > m or not ridge >= 0 or not (1 <= rows <= m and 1 <= columns <= m):
        raise ValueError(
            f"Expected v (..., m, r) with r <= m, ridge >= 0 and 1 to m rows and columns, got shape {shape}, ridge "
            f"{ridge}, {rows} rows and {columns} columns."
        )
    if 0 in shape:  # no vector to reflect, or no matrix
        eye = jnp.broadcast_to(jnp.eye(rows, columns, dtype=v[0].dtype), (*shape[:-2], rows, columns))
        return eye, None if v[1] is None else jnp.zeros_like(eye)
    return _spread.gathered(_reflector(v, float(ridge), rows, columns, constant_ridge))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _reflector(v: Parts, ridge: float, rows: int, columns: int, constant_ridge: bool) -> Parts:
    return _forward(v, ridge, rows, columns)[0]


def _forward(v: Parts, ridge: float, rows: int, columns: int):
    # Of a v scaled so that the mean of the diagonal is 1: then e, which all pivots reach, is the ridge.
    ridge = _effective(ridge, v[0])
    squares = v[0] ** 2 if v[1] is None else v[0] ** 2 + v[1] ** 2
    mean = jnp.sum(squares, (-2, -1), keepdims=True) / v[0].shape[-1]
    zero = mean == 0
    scale = 1 / jnp.sqrt(jnp.where(zero, 1, mean))
    v = scaled(scale, v)
    real, imag = product(adjoint(v), v)
    eye = jnp.eye(real.shape[-1], dtype=real.dtype)
    gram = real + jnp.where(zero, 1, jnp.asarray(ridge, real.dtype)) * eye, imag
    inverse = cholesky.inverse_factor(gram, ridge)
    z = product(inverse, adjoint(v))
    # I - 2 z^H z, in which rounding errs by little whatever the condition of the Gram matrix.
    w = scaled(-2.0, product(adjoint(_columns(z, rows)), _columns(z, columns)))
    w = w[0] + jnp.eye(rows, columns, dtype=real.dtype), w[1]
    return w, (v, scale, inverse, z)


def _effective(ridge: float, v: Array) -> float:
    """The ridge, or what rounding of the Gram matrix may be mistaken for."""
    return max(ridge, 4 * math.sqrt(v.shape[-2]) * float(jnp.finfo(v.dtype).eps))


def _columns(x: Parts, count: int) -> Parts:
    return jax.tree.map(lambda part: part[..., :count], x)


def _vjp_forward(v: Parts, ridge: float, rows: int, columns: int, constant_ridge: bool):
    w, (v, scale, inverse, z) = _forward(v, ridge, rows, columns)
    return w, (v, scale, product(adjoint(z), inverse))


def _backward(ridge: float, rows: int, columns: int, constant_ridge: bool, residuals, g: Parts):
    # With y = v (v^H v + e I)^-1: dW = -2 (dv y^H + y dv^H - y (dv^H v + v^H dv + de I) y^H). For the cotangent g and
    # h = g + g^H that gives -2 h y + 2 v (y^H h y), and from e = ridge |v|^2 / r also (2 ridge / r) tr(y^H h y) v.
    v, scale, y = residuals
    m, r = v[0].shape[-2:]

    def rest(x: Parts) -> Parts:  # rows of zeros below
        widths = [(0, 0)] * (x[0].ndim - 2) + [(0, m - x[0].shape[-2]), (0, 0)]
        return jax.tree.map(lambda part: jnp.pad(part, widths), x)

    def first(count: int) -> Parts:
        return jax.tree.map(lambda part: part[..., :count, :], y)

    hy = add(rest(product(g, first(columns))), rest(product(adjoint(g), first(rows))))
    inner = product(adjoint(y), hy)
    found = add(scaled(-2.0, hy), scaled(2.0, product(v, inner)))
    if not constant_ridge:
        trace = jnp.trace(inner[0], axis1=-2, axis2=-1)[..., None, None]
        found = add(found, scaled(2 * _effective(ridge, v[0]) / r * trace, v))
    return (scaled(scale, found),)


_reflector.defvjp(_vjp_forward, _backward)
