"""Operators of networks in a training step alone. None has a `bound`: a network with one of them is refused."""

from typing import Any

import jax.numpy as jnp

from lipjax.operators.base import Estimated, Operator, operator


class _Around(Operator):
    """An operator around another map: the base of those below."""

    map: Any

    def _arrays_text(self):
        return repr(self.map)

    @property
    def in_shape(self):
        return self.map.in_shape

    @property
    def out_shape(self):
        return self.map.out_shape

    def check(self) -> None:
        self.map.check()


@operator("map", static=())
class Contraction(_Around):
    """x -> map(x), for a linear map made to have a norm of at most 1: it has no estimate, so that training takes 1."""

    map: Any

    def __call__(self, x):
        return self.map(x)


@operator("map", static=())
class Centered(_Around, Estimated):
    """x -> map(x) - mean(map(x) - x), the mean over batch and pixels, for a map that keeps the shape.

    A translation for any one batch. With a batch sharded over devices, under `jit`, the mean is that of all devices.
    The mean of bfloat16 images is computed, and given, in float32.
    """

    map: Any

    def with_mean(self, x):
        """(map(x) - mean, mean); mean: (channels,), differentiable."""
        y = self.map(x)
        dtype = jnp.float32 if x.dtype == jnp.bfloat16 else x.dtype
        x, wide = x.astype(dtype), y.astype(dtype)
        mean = jnp.mean(wide - x, axis=tuple(range(x.ndim - 1)))
        return (wide - mean).astype(y.dtype), mean

    def __call__(self, x):
        return self.with_mean(x)[0]

    def estimate(self, v, num_iters: int):
        """The map's."""
        return self.map.estimate(v, num_iters)
