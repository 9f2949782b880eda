"""The pytree decorator of operators and their two base classes."""

import dataclasses
import numbers
from typing import Any, dataclass_transform

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lipjax import spectral

# A field that holds an array: a JAX array, a NumPy array once frozen, or what a tree transformation puts in its place.
Leaf = Any


def _check_fields(op, arrays: tuple[str, ...], static: tuple[str, ...]) -> None:
    """The checks of all constructors: arrays are arrays, in_shape is a tuple of sizes (lists become one).

    Raises: ValueError naming class and field.
    """
    kind = type(op).__name__
    for name in arrays:
        value = getattr(op, name)
        plain = isinstance(value, numbers.Number) and not hasattr(value, "shape")
        if plain or isinstance(value, list) and not any(hasattr(part, "in_shape") for part in value):
            raise ValueError(
                f"{kind} expects {name} to be a NumPy or JAX array, got a {type(value).__name__}: np.asarray makes one."
            )
    if "in_shape" in static:
        shape = op.in_shape
        if not isinstance(shape, (tuple, list)) or not shape or not all(_is_size(n) for n in shape):
            raise ValueError(f"{kind} expects an in_shape of sizes >= 1, such as (h, w, c) or (n,), got {shape!r}.")
        object.__setattr__(op, "in_shape", tuple(int(n) for n in shape))


def _is_size(n) -> bool:
    return isinstance(n, numbers.Integral) and not isinstance(n, bool) and int(n) >= 1


@dataclass_transform(frozen_default=True)
def operator(*arrays: str, static: tuple[str, ...]):
    """Class decorator: a frozen dataclass that is a pytree of `arrays` with `static` metadata.

    Its constructor checks types, shapes and numbers, through `check` where the class has one. Tree transformations do
    not call it: they may put anything in the place of arrays.
    """

    def wrap(cls):
        own = getattr(cls, "__post_init__", lambda op: None)

        def __post_init__(op):
            _check_fields(op, arrays, static)
            own(op)
            getattr(op, "check", tuple)()

        cls.__post_init__ = __post_init__
        cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
        keys = [jax.tree_util.GetAttrKey(name) for name in arrays]

        def flatten(op):
            return [getattr(op, name) for name in arrays], tuple(getattr(op, name) for name in static)

        def flatten_with_keys(op):
            leaves, metadata = flatten(op)
            return list(zip(keys, leaves, strict=True)), metadata

        def unflatten(metadata, leaves):
            op = object.__new__(cls)  # not the constructor: leaves may be anything
            for name, value in (*zip(static, metadata, strict=True), *zip(arrays, leaves, strict=True)):
                object.__setattr__(op, name, value)
            return op

        # Not `register_dataclass`: structures of two classes registered with it compare equal if their fields do (JAX
        # 0.10.2), and when their hashes happen to collide, jit runs the program compiled for the other class.
        jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
        return cls

    return wrap


def norm_per_image(x: Float[Array, "b ..."]) -> Float[Array, " b"]:
    """l2 norm of every image of a batch, in the unit of x."""
    return jnp.linalg.norm(x.reshape(x.shape[0], -1), axis=1)


def check_input(operator, x) -> None:
    """Raises: ValueError unless x is a batch of `operator.in_shape`."""
    if x.shape[1:] != tuple(operator.in_shape):
        shape = ", ".join(map(str, operator.in_shape))
        raise ValueError(f"{type(operator).__name__} expects a batch (b, {shape}), got {x.shape}.")


class Linear:
    """Base of linear operators: the estimate of the norm by power iteration on A^T A."""

    def _map(self, x, precision) -> Any: ...
    def _adjoint(self, y, precision) -> Any: ...

    def estimate(self, v, num_iters: int):
        """Differentiable estimate of the norm, never above it before rounding.

        Args: v: (*in_shape), start vector. num_iters: steps of power iteration.
        Returns: (sigma, v): sigma = |A v| for the v reached, a constant under differentiation.
        """
        sigma, v = spectral.power_iteration(
            lambda u: self._map(u[None], jax.lax.Precision.HIGHEST)[0],
            lambda u: self._adjoint(u[None], jax.lax.Precision.HIGHEST)[0],
            v,
            num_iters,
        )
        return sigma, v

    def __call__(self, x):
        check_input(self, x)
        return self._map(x, None)

    def adjoint(self, y):
        """A^T y for a batch (b, *out_shape): (b, *in_shape)."""
        return self._adjoint(y, None)


class Isometric:
    """Operators that are 1-Lipschitz by construction."""

    in_shape: tuple[int, ...]
    _reason = ""

    @property
    def out_shape(self):
        return self.in_shape

    def bound(self) -> spectral.NormBound:
        return spectral.NormBound(1.0, self._reason, {})

    def rounding_error(self, x):
        return jnp.zeros(x.shape[0], x.dtype)
