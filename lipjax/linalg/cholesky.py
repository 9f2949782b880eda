"""Cholesky factors and their inverses by matrix products, and the orthogonalisation that is made of them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from lipjax import _spread
from lipjax.linalg.parts import Parts, adjoint, product, scaled, subtract, times

# Sides of the blocks that are factorised column by column, each of which reads all of its block, and of the matrices
# for which the smaller one was faster.
_BLOCK, _OF_SMALL, _SMALL = 32, 16, 256

Matrices = Float[Array, "*batch n n"]


def factor(s: Matrices, method: str) -> tuple[Matrices, Matrices]:
    """(L, L^-1) with L L^T = s, L lower triangular; NaN where s is not positive definite.

    Args: s: symmetric. method: "products", "lapack", or "auto": products on the CPU, and for matrices that are divided
      by columns over devices, which no library does; otherwise the library of other devices.
    """
    if method == "products":
        return _by_products(s)
    if method == "lapack":
        return _by_library(s)
    if _spread.by_columns(s.shape):
        return _by_products(s)
    return lax.platform_dependent(s, cpu=_by_products, default=_by_library)


def inverse_factor(s: Parts, least: float) -> Parts:
    """L^-1 with L L^H = s, L lower triangular, by blocks, mostly matrix products.

    Args:
      s: Hermitian, at least `least` times the identity but for rounding. So are then its Schur complements c, so that
        c_kk >= least and |c_jk|^2 <= (c_jj - least) (c_kk - least): enforcing both changes nothing but what rounding
        has made of them, and keeps all numbers finite where that is all that is left.
    """
    return _by_blocks(s, least)[1]


def _by_library(s: Array) -> tuple[Array, Array]:
    lower = lax.linalg.cholesky(s, symmetrize_input=False)
    eye = jnp.broadcast_to(jnp.eye(s.shape[-1], dtype=s.dtype), s.shape)
    return lower, lax.linalg.triangular_solve(lower, eye, left_side=True, lower=True)


def _by_products(s: Array) -> tuple[Array, Array]:
    (lower, _), (inverse, _) = _by_blocks((s, None), None)
    return lower, inverse


def _by_blocks(s: Parts, least: float | None) -> tuple[Parts, Parts]:
    """A block of columns at a time: `_by_columns` with blocks for numbers. One loop, so that it compiles quickly."""
    n = s[0].shape[-1]
    block = _OF_SMALL if n <= _SMALL else _BLOCK
    if n <= block:
        return _by_columns(s, least)
    if _spread.by_columns(s[0].shape):

        def of_share(columns: _spread.Columns, *parts: Array):
            whole: Any = (*parts, None)
            found = _panels(columns, whole[:2], least, _spread.panel(whole[0].shape[-1]))
            return tuple(part for half in found for part in half if part is not None)

        found = _spread.with_columns(of_share, *[part for part in s if part is not None])
        return (found[:2], found[2:]) if s[1] is not None else ((found[0], None), (found[1], None))
    size = block * -(-n // block)
    s = jax.tree.map(lambda part: jnp.pad(part, [(0, 0)] * (part.ndim - 2) + [(0, size - n)] * 2), s)
    s = s[0] + jnp.diag((jnp.arange(size) >= n).astype(s[0].dtype)), s[1]
    lower, inverse = _panels(_spread.Columns(), s, least, block)
    return jax.tree.map(lambda part: part[..., :n, :n], (lower, inverse))


def _panels(columns: _spread.Columns, s: Parts, least: float | None, block: int) -> tuple[Parts, Parts]:
    size = s[0].shape[-2]  # s may have only the columns of one device

    def step(j, carry):
        left, lower, inverse, diagonal = carry
        start = j * block
        column = jax.tree.map(lambda part: columns.take(part, start, block), left)
        corner, corner_inverse = _by_columns(_rows(column, start, block), least)
        below = jnp.arange(size)[:, None] >= start + block
        under = product(column, adjoint(corner_inverse))
        under = jax.tree.map(lambda part: jnp.where(below, part, 0), under)
        if least is not None:  # the rest of the diagonal, from which the squares of each row are taken, keeps `least`
            taken = jnp.sum(_squares(under), -1)
            most = jnp.maximum(diagonal - least, 0)
            under = scaled(jnp.sqrt(jnp.where(taken > most, most / taken, 1))[..., None], under)
            diagonal = diagonal - jnp.minimum(taken, most)
        row = product(corner_inverse, _rows(inverse, start, block))
        left = subtract(left, product(under, jax.tree.map(columns.own, adjoint(under))))
        found = _with_rows(under, corner, start)
        lower = jax.tree.map(lambda whole, part: columns.put(whole, part, start), lower, found)
        inverse = _with_rows(subtract(inverse, product(under, row)), row, start)
        return left, lower, inverse, diagonal

    eye = jnp.broadcast_to(columns.own(jnp.eye(size, dtype=s[0].dtype)), s[0].shape)
    zeros = jax.tree.map(jnp.zeros_like, s)
    start = (s, zeros, (eye, zeros[1]), columns.diagonal(s[0]))
    return lax.fori_loop(0, size // block, step, start)[1:3]


def _squares(x: Parts) -> Array:
    return x[0] ** 2 if x[1] is None else x[0] ** 2 + x[1] ** 2


def _rows(x: Parts, start: Any, count: int) -> Parts:
    return jax.tree.map(lambda part: lax.dynamic_slice_in_dim(part, start, count, -2), x)


def _with_rows(x: Parts, rows: Parts, start: Any) -> Parts:
    return jax.tree.map(lambda part, new: lax.dynamic_update_slice_in_dim(part, new, start, -2), x, rows)


def _by_columns(s: Parts, least: float | None) -> tuple[Parts, Parts]:
    """A column of L at a time; the same steps applied to the identity leave L^-1."""
    index = jnp.arange(s[0].shape[-1])

    def step(k, carry):
        left, lower, inverse, diagonal = carry
        column = jax.tree.map(lambda part: lax.dynamic_index_in_dim(part, k, -1, keepdims=False), left)
        square = lax.dynamic_index_in_dim(column[0] if least is None else diagonal, k, -1)
        if least is not None:
            square = jnp.maximum(square, least)
            most, found = jnp.maximum(diagonal - least, 0) * (square - least), _squares(column)
            column = scaled(jnp.sqrt(jnp.where(found > most, most / found, 1)), column)
        pivot = jnp.sqrt(square)
        real, imag = scaled(1 / pivot, column)
        real = jnp.where(index == k, pivot, jnp.where(index > k, real, 0))
        column: Parts = real, None if imag is None else jnp.where(index > k, imag, 0)
        diagonal = diagonal - _squares(column)
        row = jax.tree.map(lambda part: lax.dynamic_index_in_dim(part, k, -2) / pivot[..., None], inverse)
        down, across = (jax.tree.map(lambda part, axis=axis: jnp.expand_dims(part, axis), column) for axis in (-1, -2))
        across = across[0], None if imag is None else -across[1]
        left = subtract(left, times(down, across))
        lower = jax.tree.map(lambda whole, part: jnp.where(index == k, part, whole), lower, down)
        under = jax.tree.map(lambda part: jnp.where((index > k)[:, None], part, 0), down)
        rest = subtract(inverse, times(under, row))
        inverse = jax.tree.map(lambda part, new: jnp.where((index == k)[:, None], new, part), rest, row)
        return left, lower, inverse, diagonal

    eye = jnp.broadcast_to(jnp.eye(s[0].shape[-1], dtype=s[0].dtype), s[0].shape)
    zeros = jax.tree.map(jnp.zeros_like, s)
    start = (s, zeros, (eye, zeros[1]), jnp.diagonal(s[0], axis1=-2, axis2=-1))
    return lax.fori_loop(0, s[0].shape[-1], step, start)[1:3]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def orthogonalize(x: Float[Array, "*batch n m"], ridge: float, method: str) -> Float[Array, "*batch n m"]:
    """L^-1 x, L L^T = x x^T + e I, e = ridge times the mean of the diagonal of x x^T, a constant for the gradient."""
    return _forward(x, ridge, method)[0]


def _forward(x: Array, ridge: float, method: str):
    gram = matmul(x, transpose(x))
    shift = ridge * jnp.mean(jnp.diagonal(gram, axis1=-2, axis2=-1), -1)[..., None, None]
    shift = jnp.where(shift == 0, 1, shift)  # x = 0, of which L^-1 x = 0 whatever the shift
    lower, inverse = factor(gram + shift * jnp.eye(gram.shape[-1], dtype=gram.dtype), method)
    inverse = _spread.in_groups(inverse)  # a factor here and, turned, of the gradient
    w = matmul(inverse, x)
    return w, (lower, inverse, w)


def _backward(ridge: float, method: str, residuals, g: Array):
    # W = L^-1 X: dW = L^-1 (dX - dL W), and dL = L Phi(L^-1 dS L^-T), Phi the lower triangle with half the diagonal.
    del ridge, method
    lower, inverse, w = residuals
    # XLA for CPU leaves products with a transposed first factor to a slower library: half the speed at 512 x 512.
    upper, upper_inverse = lax.optimization_barrier((transpose(lower), transpose(inverse)))
    of_lower = -jnp.tril(matmul(upper_inverse, matmul(g, transpose(w))))
    of_gram = _spread.in_groups(jnp.tril(matmul(upper, of_lower)))  # turned, and a factor
    of_gram = of_gram + transpose(jnp.tril(of_gram, -1))
    return (matmul(upper_inverse, matmul(of_gram, w) + g),)


orthogonalize.defvjp(_forward, _backward)


matmul = _spread.product


def transpose(x: Array) -> Array:
    return jnp.swapaxes(x, -1, -2)
