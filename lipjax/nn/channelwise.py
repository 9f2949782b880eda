"""Activations with parameters of their own for every channel: in_shape -> operator, as a layer's `activation`."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from lipjax import activations, operators

SPLINES: dict[str, Callable] = {
    "identity": lambda knots: knots,
    "relu": lambda knots: jnp.maximum(knots, 0.0),
    "absolute": jnp.abs,
}
"""Functions that splines may start as, by name; "alternating" is the absolute value and the identity in turn."""


def alternating_thresholds(key, shape, dtype=float):
    """Thresholds (-1, 0) and (0, 0) in turn: the absolute value shifted by -1, and the identity."""
    del key
    first = jnp.arange(shape[0]) % 2 == 0
    return jnp.stack([jnp.where(first, -1.0, 0.0), jnp.zeros(shape[0])], axis=1).astype(dtype)


class NActivation(nn.Module):
    """`operators.NActivation` with two thresholds for each channel.

    rate: by which their learning rate counts, in effect: they are stored divided by its root.

    Source: Prach & Lampert 2023, arXiv:2311.06103.
    """

    rate: float = 1.0

    @nn.compact
    def __call__(self, in_shape: tuple[int, ...]):
        if not self.rate > 0:
            raise ValueError(f"NActivation expects a rate > 0, got {self.rate!r}.")

        def start(key, shape, dtype=float):
            return alternating_thresholds(key, shape, dtype) / self.rate**0.5

        theta = self.param("theta", start, (in_shape[-1], 2))
        return operators.NActivation(*activations.n_thresholds(theta, self.rate), tuple(in_shape))


class LinearSpline(nn.Module):
    """`operators.LinearSpline` with learned values, of slopes that are clipped to [-1, 1], for each channel.

    knots: their number, odd. spacing: a power of two. start: one of `SPLINES`, or "alternating". use_scale: whether a
    scale of the argument is learned, too, by whose inverse the value is multiplied.

    Source: Ducotterd et al. 2022, arXiv:2210.16222.
    """

    knots: int = 21
    spacing: float = 0.25
    start: str = "alternating"
    use_scale: bool = True

    @nn.compact
    def __call__(self, in_shape: tuple[int, ...]):
        channels = in_shape[-1]
        if self.start not in (*SPLINES, "alternating"):
            raise ValueError(f"Expected start to be one of {(*SPLINES, 'alternating')}, got {self.start!r}.")

        def start(key, shape, dtype=float):
            del key
            places = self.spacing * (jnp.arange(shape[1], dtype=dtype) - (shape[1] - 1) / 2)
            names = ("absolute", "identity") if self.start == "alternating" else (self.start,)
            return jnp.stack([SPLINES[names[i % len(names)]](places) for i in range(shape[0])]).astype(dtype)

        raw = self.param("values", start, (channels, self.knots))
        scale = jnp.ones(channels, raw.dtype)
        if self.use_scale:
            scale = self.param("scale", nn.initializers.ones, (channels,))
        values = activations.spline_values(raw, self.spacing)
        return operators.LinearSpline(values, scale, tuple(in_shape), self.spacing)
