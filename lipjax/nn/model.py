"""The base of all models: a sequence of layers and a head."""

from typing import Any

import flax.linen as nn
import jax

from lipjax import bounds
from lipjax.network import Network, make_network

COLLECTION = "lip"
"""Name of the state collection that holds the warm-started vectors of the norm estimates."""


class LipschitzModel(nn.Module):
    """Owns parameters and builds a Network of operators; subclasses define `layers`.

    `model.apply(variables, method="build")` gives the Network of these parameters, once per step;
    `model.apply(variables, x)` builds and applies it to pixels x. `model.init(key, x)` makes the collections "params"
    and "lip", the latter with start vectors for `bounds.margin_lipschitz_estimate`.

    Attributes: input_shape (h, w, c); num_classes; input_mean, input_std: numbers or one per channel, pixel units.
    """

    input_shape: tuple[int, int, int]
    num_classes: int
    input_mean: float | tuple[float, ...] = 0.0
    input_std: float | tuple[float, ...] = 1.0

    def layers(self) -> tuple[list, Any]:
        """Returns the layers in order (called with an in_shape they return named operators) and the head, likewise."""
        raise TypeError(f"{type(self).__name__} must define layers().")

    @nn.compact
    def build(self) -> Network:
        """The network of the current parameters."""
        layers, head = self.layers()
        ops, shape = [], tuple(self.input_shape)
        for layer in layers:
            ops += layer(shape)
            shape = ops[-1][1].out_shape
        network = make_network(ops, head(shape), self.input_mean, self.input_std)
        if self.is_initializing():
            self.variable(COLLECTION, "vectors", lambda: bounds.init_vectors(network, self.make_rng("params")))
        return network

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits (b, k) of pixels x (b, *input_shape)."""
        return self.build()(x)
