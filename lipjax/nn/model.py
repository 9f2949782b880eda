"""The base of all models: a sequence of layers and a head."""

import math
from typing import Any

import flax.linen as nn
import jax

from lipjax import bounds
from lipjax.network import Network, make_network
from lipjax.nn.layers import COLLECTION
from lipjax.operators import Head, Operator

LOG_SCALE = "log_scale"
"""Name of the parameter of models with a `logit_scale`: the logarithm of the factor of logits and L in losses."""


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
      logit_scale: what a learned factor of logits and L in losses starts from; 0: there is none. A 1-Lipschitz network
        has no scale of its own. It is a parameter beside the network, which neither a certificate nor a radius sees.
    """

    input_shape: tuple[int, int, int]
    num_classes: int
    input_mean: float | tuple[float, ...] = 0.0
    input_std: float | tuple[float, ...] = 1.0
    batch_size: int = 128
    logit_scale: float = 0.0

    def layers(self) -> tuple[list, Any]:
        """Returns the layers in order (in_shape, train) -> named operators, and the head, likewise."""
        raise TypeError(f"{type(self).__name__} must define layers().")

    @nn.nowrap
    def check_choices(self, **known: tuple) -> None:
        """Raises: ValueError for an attribute whose value is not among its known ones."""
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"expected {name} to be one of {values}, got {getattr(self, name)!r}.")

    @nn.compact
    def build(self, train: bool = False) -> Network:
        """The network of the current parameters; train: for a training step."""
        layers, head = self.layers()
        ops, shape = [], tuple(self.input_shape)
        for layer in layers:
            ops += _called(layer, shape, train, is_head=False)
            shape = ops[-1][1].out_shape
        network = make_network(ops, _called(head, shape, train, is_head=True), self.input_mean, self.input_std)
        if self.is_initializing():
            self.variable(COLLECTION, "vectors", lambda: bounds.init_vectors(network, self.make_rng("params")))
        if self.logit_scale:  # the last parameter: all others start as without it
            self.param(LOG_SCALE, nn.initializers.constant(math.log(self.logit_scale)), ())
        return network

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits (b, k) of pixels x (b, *input_shape)."""
        return self.build(train)(x)


def _called(layer, shape: tuple[int, ...], train: bool, is_head: bool) -> Any:
    """The operators that a layer or a head builds. Raises: ValueError for what is neither, such as a layer of Flax."""
    kind = type(layer).__name__
    what, gives = ("LinearHead", "a Head") if is_head else ("Dense", "a list of (name, operator) pairs")
    wanted = f"{'a head' if is_head else 'layers'}: called with (in_shape, train), lipjax.nn.{what} returns {gives}"
    if not callable(layer) or isinstance(layer, nn.Module) and type(layer).__module__.startswith("flax."):
        raise ValueError(
            f"layers() gives a {type(layer).__module__}.{kind}, but expected are {wanted}. A layer of Flax maps arrays "
            "to arrays, and nothing is known of its Lipschitz constant: use one of lipjax.nn, or write one as "
            "docs/add_a_layer.md does."
        )
    built: Any = layer(shape, train)
    pairs = isinstance(built, list) and built and all(isinstance(item, tuple) and len(item) == 2 for item in built)
    if not (isinstance(built, Head) if is_head else pairs and all(isinstance(op, Operator) for _, op in built)):
        raise ValueError(f"layers() gives a {kind} that returned a {type(built).__name__}, but expected are {wanted}.")
    return built
