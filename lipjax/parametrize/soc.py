"""Skew orthogonal convolutions (SOC): the exponential of a skew convolution, and the normalisation of its kernel.

A raw kernel becomes `conv.skew_kernel`, then `normalize`d to a norm kappa by the least of four reshaped norms. With A
the convolution (zero or circular padding, images of any size), |A| <= sqrt(kh kw) min of the four norms: so the norm of
A is promised to be kappa sqrt(kh kw) at most, 2.1 for 3x3 kernels and kappa = 0.7, not kappa. What holds for the kernel
in the end is for `operators.ConvExponential.bound` to prove; the estimates here may be low.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from lipjax.conv import series_exponential as exponential
from lipjax.conv import series_exponential_fast_gradient as exponential_fast_gradient
from lipjax.linalg.unit import unit
from lipjax.parametrize.soc_frequency import exponential_response

__all__ = [
    "Vectors",
    "exponential",
    "exponential_fast_gradient",
    "exponential_response",
    "init_vectors",
    "normalize",
    "reshaped_norm",
]

Vectors = dict[str, Float[Array, "..."]]
"""u1, v1, ..., u4, v4: singular vectors of the four reshapes, with the kernel's axes HWIO; the sides left out are 1."""

# The axes (of HWIO) of u for each reshape; v has the others: (o h, i w), (o w, i h), (o, i h w), (o h w, i).
_SUPPORTS = ((1, 2), (0, 2), (0, 1, 2), (0, 1, 3))


@functools.partial(jax.jit, static_argnames="kernel_shape")
def init_vectors(kernel_shape: tuple[int, int, int, int], key: PRNGKeyArray) -> Vectors:
    """Random unit vectors for `reshaped_norm`, in JAX's default float type.

    They know nothing of the kernel: the first call of `reshaped_norm` must make at least one step.

    Args: kernel_shape: HWIO.
    """
    shapes = {}
    for i, support in enumerate(_SUPPORTS, start=1):
        shapes[f"u{i}"] = tuple(side if axis in support else 1 for axis, side in enumerate(kernel_shape))
        shapes[f"v{i}"] = tuple(1 if axis in support else side for axis, side in enumerate(kernel_shape))
    sizes = [math.prod(shape) for shape in shapes.values()]
    # One draw for all compiles several times faster than eight.
    parts = jnp.split(jax.random.normal(key, (sum(sizes),)), list(itertools.accumulate(sizes))[:-1])
    pairs = zip(shapes.items(), parts, strict=True)
    return {name: (part / jnp.linalg.norm(part)).reshape(shape) for (name, shape), part in pairs}


def _step(kernel: Float[Array, "kh kw i o"], vectors: Vectors) -> Vectors:
    """One power iteration for each reshape: v from u, then u from the new v."""
    advanced = {}
    for i, support in enumerate(_SUPPORTS, start=1):
        rest = tuple(axis for axis in range(4) if axis not in support)
        u, v = vectors[f"u{i}"], vectors[f"v{i}"]
        v = unit(jnp.sum(kernel * u, axis=support, keepdims=True), v)
        advanced[f"u{i}"] = unit(jnp.sum(kernel * v, axis=rest, keepdims=True), u)
        advanced[f"v{i}"] = v
    return advanced


@functools.partial(jax.jit, static_argnames="num_iters")
def reshaped_norm(
    kernel: Float[Array, "kh kw i o"], vectors: Vectors, num_iters: int
) -> tuple[Float[Array, ""], Vectors]:
    """Estimates the least spectral norm of the kernel as a matrix (o h, i w), (o w, i h), (o, i h w) or (o h w, i).

    sqrt(kh kw) times that norm bounds the convolution; the estimate, the least of sum(K u v), bounds nothing.

    Args:
      kernel: HWIO. vectors: from `init_vectors` or the last call.
      num_iters: steps of power iteration, >= 0; 0 takes the vectors as they are.
    Returns: (sigma, the advanced vectors): sigma differentiable with respect to the kernel, the vectors held constant.
    Raises: ValueError if num_iters is negative.
    Source: Singla & Feizi 2021, arXiv:1911.10258 (the four norms), arXiv:2105.11417 (SOC).
    """
    if num_iters < 0:
        raise ValueError(f"reshaped_norm: expected num_iters >= 0, got {num_iters}")
    constant, vectors = jax.lax.stop_gradient((kernel, vectors))
    if num_iters <= 2:
        for _ in range(num_iters):
            vectors = _step(constant, vectors)
    else:
        vectors = jax.lax.fori_loop(0, num_iters, lambda _, found: _step(constant, found), vectors)
    estimates = [jnp.sum(kernel * vectors[f"u{i}"] * vectors[f"v{i}"]) for i in range(1, 5)]
    return jnp.min(jnp.stack(estimates)), vectors


def normalize(kernel: Float[Array, "kh kw c c"], sigma: Float[Array, ""], kappa: float) -> Float[Array, "kh kw c c"]:
    """kappa K / sigma; zero, with gradient zero, where sigma is not positive (a zero kernel, unfit vectors).

    Args:
      kernel: HWIO, skew; so is the result, bit for bit.
      sigma: an estimate of its `reshaped_norm`, through which the gradient flows too.
      kappa: the norm wanted; the papers take 0.7 (arXiv:2108.04062) or 1 (arXiv:2211.08453), and 1 for 1x1 kernels.
    Returns: a kernel whose convolution has a norm of at most kappa sqrt(kh kw) if sigma is right.
    """
    positive = sigma > 0
    sigma = jnp.where(positive, sigma, 1)
    # Of order one first, lest the gradient's 1 / sigma^2 overflow.
    scale = jax.lax.stop_gradient(sigma)
    return jnp.where(positive, kernel / scale * (kappa / (sigma / scale)), 0)


def __dir__() -> list[str]:
    return __all__
