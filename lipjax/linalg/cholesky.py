"""Cholesky factors and their inverses by matrix products, and the orthogonalisation that is made of them."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from lipjax import _spread

_BLOCK = 64  # sides of the blocks that are factorised column by column

Matrices = Float[Array, "*batch n n"]


def factor(s: Matrices, method: str) -> tuple[Matrices, Matrices]:
    """(L, L^-1) with L L^T = s, L lower triangular; NaN where s is not positive definite.

    Args: s: symmetric. method: "products", "lapack", or "auto": products on the CPU, the library of other devices.
    """
    if method == "products":
        return _by_blocks(s)
    if method == "lapack":
        return _by_library(s)
    return lax.platform_dependent(s, cpu=_by_blocks, default=_by_library)


def _by_library(s: Array) -> tuple[Array, Array]:
    lower = lax.linalg.cholesky(s, symmetrize_input=False)
    eye = jnp.broadcast_to(jnp.eye(s.shape[-1], dtype=s.dtype), s.shape)
    return lower, lax.linalg.triangular_solve(lower, eye, left_side=True, lower=True)


def _by_blocks(s: Array) -> tuple[Array, Array]:
    """A block of columns at a time: `_by_columns` with blocks for numbers. One loop, so that it compiles quickly."""
    n = s.shape[-1]
    if n <= _BLOCK:
        return _by_columns(s)
    if _spread.by_columns(s.shape):
        return _spread.with_columns(functools.partial(_panels, block=_spread.PANEL), s)
    size = _BLOCK * -(-n // _BLOCK)
    s = jnp.pad(s, [(0, 0)] * (s.ndim - 2) + [(0, size - n)] * 2)
    s = s + jnp.diag((jnp.arange(size) >= n).astype(s.dtype))
    lower, inverse = _panels(_spread.Columns(), s, _BLOCK)
    return lower[..., :n, :n], inverse[..., :n, :n]


def _panels(columns: _spread.Columns, s: Array, block: int) -> tuple[Array, Array]:
    size = s.shape[-2]  # s may have only the columns of one device

    def step(j, carry):
        left, lower, inverse = carry
        start = j * block
        column = columns.take(left, start, block)
        corner, corner_inverse = _by_columns(lax.dynamic_slice_in_dim(column, start, block, -2))
        under = jnp.where(jnp.arange(size)[:, None] >= start + block, matmul(column, transpose(corner_inverse)), 0)
        row = matmul(corner_inverse, lax.dynamic_slice_in_dim(inverse, start, block, -2))
        left = left - matmul(under, columns.own(transpose(under)))
        lower = columns.put(lower, lax.dynamic_update_slice_in_dim(under, corner, start, -2), start)
        inverse = lax.dynamic_update_slice_in_dim(inverse - matmul(under, row), row, start, -2)
        return left, lower, inverse

    start = (s, jnp.zeros_like(s), jnp.broadcast_to(columns.own(jnp.eye(size, dtype=s.dtype)), s.shape))
    return lax.fori_loop(0, size // block, step, start)[1:]


def _by_columns(s: Array) -> tuple[Array, Array]:
    """A column of L at a time; the same steps applied to the identity leave L^-1."""
    index = jnp.arange(s.shape[-1])

    def step(k, carry):
        left, lower, inverse = carry
        column = lax.dynamic_index_in_dim(left, k, -1, keepdims=False)
        pivot = jnp.sqrt(lax.dynamic_index_in_dim(column, k, -1))
        column = jnp.where(index >= k, column / pivot, 0)
        row = lax.dynamic_index_in_dim(inverse, k, -2) / pivot[..., None]
        left = left - column[..., :, None] * column[..., None, :]
        lower = jnp.where(index == k, column[..., :, None], lower)
        under = jnp.where(index > k, column, 0)[..., :, None]
        return left, lower, jnp.where((index == k)[:, None], row, inverse - under * row)

    eye = jnp.broadcast_to(jnp.eye(s.shape[-1], dtype=s.dtype), s.shape)
    return lax.fori_loop(0, s.shape[-1], step, (s, jnp.zeros_like(s), eye))[1:]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def orthogonalize(x: Float[Array, "*batch n m"], ridge: float, method: str) -> Float[Array, "*batch n m"]:
    """L^-1 x, L L^T = x x^T + e I, e = ridge times the mean of the diagonal of x x^T, a constant for the gradient."""
    return _forward(x, ridge, method)[0]


def _forward(x: Array, ridge: float, method: str):
    gram = matmul(x, transpose(x))
    shift = ridge * jnp.mean(jnp.diagonal(gram, axis1=-2, axis2=-1), -1)[..., None, None]
    shift = jnp.where(shift == 0, 1, shift)  # x = 0, of which L^-1 x = 0 whatever the shift
    lower, inverse = factor(gram + shift * jnp.eye(gram.shape[-1], dtype=gram.dtype), method)
    w = matmul(inverse, x)
    return w, (lower, inverse, w)


def _backward(ridge: float, method: str, residuals, g: Array):
    # W = L^-1 X: dW = L^-1 (dX - dL W), and dL = L Phi(L^-1 dS L^-T), Phi the lower triangle with half the diagonal.
    del ridge, method
    lower, inverse, w = residuals
    # XLA for CPU leaves products with a transposed first factor to a slower library: half the speed at 512 x 512.
    upper, upper_inverse = lax.optimization_barrier((transpose(lower), transpose(inverse)))
    of_lower = -jnp.tril(matmul(upper_inverse, matmul(g, transpose(w))))
    of_gram = jnp.tril(matmul(upper, of_lower))
    of_gram = of_gram + transpose(jnp.tril(of_gram, -1))
    return (matmul(upper_inverse, matmul(of_gram, w) + g),)


orthogonalize.defvjp(_forward, _backward)


matmul = _spread.product


def transpose(x: Array) -> Array:
    return jnp.swapaxes(x, -1, -2)
