"""Layers of LipNeXt-style networks: patches as tokens, blocks that shift and mix channels, l2 pooling.

The matrices of a block are orthogonal up to rounding, or contractive: a training step counts their norms as 1,
evaluation estimates them, and certification proves them as those of any `operators.Conv`, as they are stored.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lipjax import operators
from lipjax.nn.layers import NamedOperators, check_counts, contraction
from lipjax.parametrize import cholesky, exponential

POSITIONS = ("block", "shared", "none")


def haar(key, shape, dtype=float):
    """Random orthogonal matrices, one for each of an array (..., n, n)."""
    basis, upper = jnp.linalg.qr(jax.random.normal(key, shape, dtype))
    return basis * jnp.sign(jnp.diagonal(upper, axis1=-2, axis2=-1))[..., None, :]


def identity(key, shape, dtype=float):
    """Identity matrices, one for each of an array (..., n, n)."""
    del key
    return jnp.broadcast_to(jnp.eye(shape[-1], dtype=dtype), shape)


# How matrices are made of parameters, and where these start for random matrices and for the identity. Of "manifold" the
# parameters are the matrices, which only an optimizer on the manifold keeps orthogonal.
ORTHOGONAL: dict[str, tuple[Callable, Callable, Callable]] = {
    "cholesky": (cholesky.dense, haar, identity),
    "exponential": (exponential.dense, exponential.random_weight, nn.initializers.zeros),
    "manifold": (lambda matrices: matrices, haar, identity),
}


def patch_tokens(in_shape: tuple[int, ...], train: bool = False, *, block: int, channels: int) -> NamedOperators:
    """The layer without parameters that makes tokens of square patches: block^2 pixels as channels, zeros appended."""
    patches = operators.SpaceToDepth(tuple(in_shape), block)
    return [("stem/patches", patches), ("stem/pad", operators.PadChannels(patches.out_shape, channels))]


def l2_pool(
    in_shape: tuple[int, ...], train: bool = False, *, regions: tuple[int, int], delta: float
) -> NamedOperators:
    """The layer without parameters that pools each region of a map to lengths."""
    return [("pool", operators.L2Pool(tuple(in_shape), regions, delta))]


class ShiftBlocks(nn.Module):
    """num_layers times Z = activation(M R^T S(R (X + p)) + b), named <blocks>_01/position and so on.

    R and M are square matrices on the channels of every token, S is `operators.Shift` of `shift` channels in each
    direction, p a number for each token, b one for each channel. M R^T is multiplied out once per build, so that a
    block costs two products with tokens. One array holds the parameters of all M, another of all R.

    orthogonal: of ORTHOGONAL; the names of the parameters of "manifold" begin with "orthogonal". premix: False leaves R
    out: activation(M S(X + p) + b). identity_start: M starts as the identity, else at random as R does. positions: a p
    for each "block", one "shared" by all, or "none". p and b start at 0.

    Source: Hu, Hu & Fredrikson 2026, arXiv:2601.18513, as others describe it (docs/lipnext.md says what is known).
    """

    num_layers: int
    shift: int
    orthogonal: str = "cholesky"
    premix: bool = True
    identity_start: bool = True
    positions: str = "block"
    activation: Callable = operators.MaxMin

    def _matrices(self, name: str, channels: int, random: bool) -> jax.Array:
        make, at_random, at_identity = ORTHOGONAL[self.orthogonal]
        prefix = "orthogonal_" if self.orthogonal == "manifold" else ""
        start = at_random if random else at_identity
        return make(self.param(f"{prefix}{name}", start, (self.num_layers, channels, channels)))

    @nn.compact
    def __call__(self, in_shape: tuple[int, ...], train: bool = False) -> NamedOperators:
        check_counts(self)
        if len(in_shape) != 3:
            raise ValueError(f"ShiftBlocks takes maps of tokens: expected a shape (h, w, c), got {tuple(in_shape)}.")
        for name, known in (("orthogonal", tuple(ORTHOGONAL)), ("positions", POSITIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"ShiftBlocks expects {name} to be one of {known}, got {getattr(self, name)!r}.")
        shape, layers, (height, width, channels) = tuple(in_shape), self.num_layers, in_shape
        maps = self._matrices("map", channels, not self.identity_start)
        mixes = self._matrices("mix", channels, True) if self.premix else None
        if mixes is not None:
            maps = jnp.matmul(maps, jnp.swapaxes(mixes, -1, -2), precision=jax.lax.Precision.HIGHEST)
        bias = self.param("bias", nn.initializers.zeros, (layers, channels))
        count = {"block": layers, "shared": 1, "none": 0}[self.positions]
        places = self.param("position", nn.initializers.zeros, (count, height, width, 1)) if count else None

        def product(matrix):
            return contraction(operators.Conv(matrix.T[None, None], shape), train)

        ops: NamedOperators = []
        for i in range(layers):
            parts: dict[str, Any] = {}
            if places is not None:
                parts["position"] = operators.PositionalBias(places[i % count], shape)
            if mixes is not None:
                parts["mix"] = product(mixes[i])
            parts |= {"shift": operators.Shift(shape, self.shift), "linear": product(maps[i])}
            parts |= {"bias": operators.Bias(bias[i], shape), "activation": self.activation(shape)}
            ops += [(f"{self.name or type(self).__name__}_{i + 1:02d}/{part}", op) for part, op in parts.items()]
        return ops
