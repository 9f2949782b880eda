"""The precision of the matrix products that parametrisations are made of.

At JAX's highest precision a GPU multiplies float32 numbers outside of its tensor cores. On them it can multiply parts
of these numbers, in TF32 or bfloat16, and add up the products in float32, at more than twice the speed and nearly the
same precision: x y is about x1 y1 + x1 y2 + x2 y1, x1 being x rounded to 11 bits and x2 what that leaves.
"""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

PRODUCTS: dict[str, Any] = {
    "float32": lax.Precision.HIGHEST,
    "tf32x3": lax.DotAlgorithmPreset.TF32_TF32_F32_X3,
    "bfloat16x6": lax.DotAlgorithmPreset.BF16_BF16_F32_X6,
}
"""JAX's names of ways to make a product of float32 matrices, by the names that configs give them."""

_ALGORITHMS = {PRODUCTS[name].name: PRODUCTS[name] for name in ("tf32x3", "bfloat16x6")}


@contextlib.contextmanager
def products(name: str):
    """A context in which parametrisations are traced, with their gradients: of what products they are made.

    Args: name: of PRODUCTS. Other products than those at the highest precision must not be traced inside.
    """
    # JAX's own setting, because it is part of what its caches of traced functions distinguish.
    with contextlib.nullcontext() if name == "float32" else jax.default_matmul_precision(PRODUCTS[name].name):
        yield


def precise(dtype: Any) -> Any:
    """The `precision` of a product inside a parametrisation: the highest, or an algorithm where `products` names one.

    Args: dtype: of the matrices. Algorithms are for float32.
    """
    asked = str(jax.config.jax_default_matmul_precision)  # pyright: ignore[reportAttributeAccessIssue]
    return _ALGORITHMS.get(asked, lax.Precision.HIGHEST) if dtype == "float32" else lax.Precision.HIGHEST


def product(x: Array, y: Array) -> Array:
    """x @ y, `precise`."""
    return jnp.matmul(x, y, precision=precise(x.dtype))
