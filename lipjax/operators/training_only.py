"""Operators of networks in a training step alone. None has a `bound`: a network with one of them is refused."""

import abc
from typing import Any

import jax.numpy as jnp
from jax import lax

from lipjax.operators.base import Estimated, Operator, check_input, operator


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


class Centers(Operator):
    """A map that subtracts a mean over the batch: a translation for any one batch, if the rest of it is linear.

    With a batch sharded over devices, under `jit`, the mean is that of all devices; inside `jax.shard_map` if the axes
    of the mesh are named. The mean of bfloat16 images is computed, and given, in float32.
    """

    @abc.abstractmethod
    def with_mean(self, x, axes: tuple[str, ...] = ()) -> Any:
        """(the output, mean); mean: (channels,), differentiable. axes: over which `jax.shard_map` divides the batch."""

    def __call__(self, x):
        return self.with_mean(x)[0]


def _without_mean(y, axes, x=None):
    """y minus the mean over batch and pixels of y, or of y - x; and that mean."""
    dtype = jnp.float32 if y.dtype == jnp.bfloat16 else y.dtype
    wide = y.astype(dtype)
    mean = jnp.mean(wide if x is None else wide - x.astype(dtype), axis=tuple(range(y.ndim - 1)))
    mean = lax.pmean(mean, axes) if axes else mean
    return (wide - mean).astype(y.dtype), mean


@operator("map", static=())
class Centered(_Around, Centers, Estimated):
    """x -> map(x) - mean(map(x) - x), the mean over batch and pixels, for a map that keeps the shape."""

    map: Any

    def with_mean(self, x, axes=()):
        return _without_mean(self.map(x), axes, x)

    def estimate(self, v, num_iters: int):
        """The map's."""
        return self.map.estimate(v, num_iters)


@operator(static=("in_shape",))
class Centering(Centers):
    """x -> x - mean(x), the mean over batch and pixels."""

    in_shape: tuple[int, ...]

    @property
    def out_shape(self):
        return self.in_shape

    def with_mean(self, x, axes=()):
        check_input(self, x)
        return _without_mean(x, axes)
