"""Norms of operators by Lanczos: converged numbers to hold bounds and estimates against, but no bounds."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.sparse.linalg import LinearOperator, eigsh

from lipjax import conv, operators, spectral
from lipjax.certify.frozen import float64_on_cpu


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


def grid_norm(op: operators.Conv) -> float | None:
    """The least norm of the circulants by which a zero-padded convolution is proved: what its proof states, up to
    rounding. None for one that is bounded as it is.
    """
    *sides, per_group, outputs = op.kernel.shape
    of_group = (*sides, per_group, outputs // op.groups), (*op.in_shape[:2], per_group)
    used, variants = spectral.embeddings(*of_group, op.strides, op.pads, op.dilation)
    with float64_on_cpu():
        kernel, norms = jnp.where(used[..., None, None], op.kernel, 0), []
        strides = conv.stride_pair(op.strides)
        for grid, twist in variants:
            shape = (grid[0] * strides[0], grid[1] * strides[1], op.in_shape[2])

            def apply(x, twist=twist):
                return _periodic(op, kernel, x, twist)

            def adjoint(y, apply=apply, shape=shape):
                return jax.linear_transpose(apply, jnp.zeros(shape))(y)[0]

            norms.append(largest_singular_value(apply, adjoint, shape))
    return min(norms, default=None)


def _periodic(op: operators.Conv, kernel, x, twist: tuple[int, int]):
    """The convolution of (h, w, c) with period (h, w), up to the sign (-1)^twist; no alignment changes its norm."""
    for axis in range(2):
        size, taps = x.shape[axis], conv.window(kernel.shape, op.dilation)[axis]
        places = np.arange(-((taps - 1) // 2), size + taps // 2)
        signs = 1 - 2 * (places // size % 2) * twist[axis]
        x = jnp.take(x, places % size, axis) * signs.astype(x.dtype).reshape(-1, *(1,) * (2 - axis))
    options = {"strides": op.strides, "groups": op.groups, "dilation": op.dilation}
    return conv.conv2d(x[None], kernel, padding="VALID", precision=jax.lax.Precision.HIGHEST, **options)[0]


def local_norm(op, x: np.ndarray) -> float:
    """The norm of the Jacobian of any operator at an image x: a lower bound of its Lipschitz constant."""
    with float64_on_cpu():
        op = jax.tree.map(jnp.asarray, op)
        _, forward = jax.linearize(lambda z: op(z[None])[0], jnp.asarray(x))
        backward = jax.linear_transpose(forward, jnp.asarray(x))
        return largest_singular_value(forward, lambda y: backward(y)[0], x.shape)
