"""Norms of operators by Lanczos: converged numbers to hold bounds and estimates against, but no bounds."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.sparse.linalg import LinearOperator, eigsh

from lipjax.certify.frozen import float64_on_cpu
from lipjax.operators.grid import Circulants


def largest_singular_value(apply, adjoint, shape: tuple[int, ...]) -> float:
    """Of a linear map of single arrays, by Lanczos on A^T A to 1e-7. apply, adjoint: jitted, float64."""
    size = int(np.prod(shape))
    gram = jax.jit(lambda x: adjoint(apply(x.reshape(shape))).reshape(-1))
    if size <= 2:
        columns = [np.asarray(gram(row)) for row in jnp.eye(size)]
        return float(np.linalg.norm(np.array(columns), 2)) ** 0.5
    options: dict[str, Any] = {"matvec": lambda x: np.asarray(gram(jnp.asarray(x))), "dtype": np.float64}
    start = np.random.default_rng(0).normal(size=size)
    search: dict[str, Any] = {"k": 1, "ncv": min(40, size), "tol": 1e-7, "v0": start, "return_eigenvectors": False}
    return float(eigsh(LinearOperator((size, size), **options), **search)[0]) ** 0.5


def lanczos_norm(op) -> float:
    """A linear operator's norm."""
    with float64_on_cpu():
        op = jax.tree.map(jnp.asarray, op)
        return largest_singular_value(lambda x: op(x[None])[0], lambda y: op.adjoint(y[None])[0], op.in_shape)


def grid_norm(op: Circulants) -> float:
    """The least norm of a convolution's circulants: what its proof states, up to rounding."""
    with float64_on_cpu():
        op, norms = jax.tree.map(jnp.asarray, op), []
        for grid, twist in op.variants:
            shape = (grid[0] * op.strides[0], grid[1] * op.strides[1], op.in_shape[3])
            signs = jnp.asarray(twist)

            def apply(x, signs=signs):
                return op._map(x, signs)

            def adjoint(y, apply=apply, shape=shape):
                return jax.linear_transpose(apply, jnp.zeros(shape))(y)[0]

            norms.append(largest_singular_value(apply, adjoint, shape))
        return min(norms)


def local_norm(op, x: np.ndarray) -> float:
    """The norm of the Jacobian of any operator at an image x: a lower bound of its Lipschitz constant."""
    with float64_on_cpu():
        op = jax.tree.map(jnp.asarray, op)
        _, forward = jax.linearize(lambda z: op(z[None])[0], jnp.asarray(x))
        backward = jax.linear_transpose(forward, jnp.asarray(x))
        return largest_singular_value(forward, lambda y: backward(y)[0], x.shape)
