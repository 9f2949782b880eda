"""The base of all models: a sequence of layers and a head."""

from typing import Any

import flax.linen as nn
import jax

from lipjax import bounds
from lipjax.network import Network, make_network
from lipjax.nn.layers import COLLECTION


class LipschitzModel(nn.Module):
    """Owns parameters and builds a Network of operators; subclasses define `layers`.

    `model.apply(variables, method="build")` gives the Network of these parameters, once per step;
    `model.apply(variables, x)` builds and applies it to pixels x. `model.init(key, x)` makes the collections "params"
    and "lip", the latter with start vectors for `bounds.margin_lipschitz_estimate` (under "vectors") and what layers
    keep. `model.apply(variables, True, method="build", mutable=["lip"])` builds for a training step and returns
    (network, {"lip": the advanced state}).

    Attributes:
      input_shape: (h, w, c). num_classes: k.
      input_mean, input_std: numbers or one per channel, pixel units.
      batch_size: images per step and device, by which layers choose how to compute; it does not change what.
    """

    input_shape: tuple[int, int, int]
    num_classes: int
    input_mean: float | tuple[float, ...] = 0.0
    input_std: float | tuple[float, ...] = 1.0
    batch_size: int = 128

    def layers(self) -> tuple[list, Any]:
        """Returns the layers in order (in_shape, train) -> named operators, and the head, likewise."""
        raise TypeError(f"{type(self).__name__} must define layers().")

    @nn.compact
    def build(self, train: bool = False) -> Network:
        """The network of the current parameters; train: for a training step."""
        layers, head = self.layers()
        ops, shape = [], tuple(self.input_shape)
        for layer in layers:
            ops += layer(shape, train)
            shape = ops[-1][1].out_shape
        network = make_network(ops, head(shape, train), self.input_mean, self.input_std)
        if self.is_initializing():
            self.variable(COLLECTION, "vectors", lambda: bounds.init_vectors(network, self.make_rng("params")))
        return network

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits (b, k) of pixels x (b, *input_shape)."""
        return self.build(train)(x)
