"""The networks of convex potential layers and of SDP-based Lipschitz layers, which are one but for the layer."""

import functools

import jax.numpy as jnp

from lipjax import operators
from lipjax.nn import LAYERS, FirstFeatures, LayeredModel, LinearHead, flatten
from lipjax.nn.layers import NamedOperators, contraction

LAYERS_OF_POTENTIALS = tuple(name for name, layer in LAYERS.items() if layer.square)


class PotentialNet(LayeredModel):
    """Zeros appended to `width` channels, conv_depth residual convolutions, a pooling, dense_depth dense ones, a head.

    All convolutions are 3x3 at full size, of conv_hidden channels inside; dense layers have dense_hidden numbers
    inside. The pooling sums pool x pool pixels and divides by pool, which is of norm 1. layer: "sll" or "cpl";
    layer_options: its fields. head: "lln" (rows of length 1) or "first" (the first features are the logits).

    Source: Meunier et al. 2022, arXiv:2110.12690 (CPL); Araujo et al. 2023, arXiv:2303.03169 (SLL).
    """

    layer: str = "sll"
    width: int = 45
    conv_depth: int = 20
    conv_hidden: int = 5
    dense_depth: int = 7
    dense_hidden: int = 2048
    pool: int = 4
    head: str = "lln"

    def check(self) -> None:
        """Raises: ValueError if an attribute has no such value, or the sizes do not fit each other."""
        for name, known in (("layer", LAYERS_OF_POTENTIALS), ("head", ("lln", "first"))):
            if getattr(self, name) not in known:
                raise ValueError(f"expected {name} to be one of {known}, got {getattr(self, name)!r}.")
        for name in ("conv_hidden", "dense_hidden", "pool"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} >= 1, got {getattr(self, name)}.")
        for name in ("conv_depth", "dense_depth"):
            if getattr(self, name) < 0:
                raise ValueError(f"expected {name} >= 0, got {getattr(self, name)}.")
        h, w, channels = self.input_shape
        if self.width < channels:
            raise ValueError(f"expected a width of at least the {channels} channels of images, got {self.width}.")
        if h % self.pool or w % self.pool:
            raise ValueError(f"expected a pool that divides images of {(h, w)} pixels, got {self.pool}.")
        features = self.width * h * w // self.pool**2
        if self.head == "first" and features < self.num_classes:
            raise ValueError(f"{self.num_classes} classes need as many features, got {features}: set head 'lln'.")
        self.check_layer()

    def layers(self):
        layers: list = [functools.partial(_widen, self.width)]
        layers += [
            self.conv(f"conv_{i:02d}", self.width, 3, activation=None, hidden=self.conv_hidden)
            for i in range(1, self.conv_depth + 1)
        ]
        layers += [functools.partial(_pool, self.pool), flatten]
        h, w, _ = self.input_shape
        features = self.width * h * w // self.pool**2
        layers += [
            self.dense(f"dense_{i:02d}", features, activation=None, hidden=self.dense_hidden)
            for i in range(1, self.dense_depth + 1)
        ]
        head = LinearHead if self.head == "lln" else FirstFeatures
        return layers, head(self.num_classes, name="head")


def _widen(width: int, in_shape: tuple[int, ...], train: bool = False) -> NamedOperators:
    """Zeros appended to the channels."""
    return [("widen", operators.PadChannels(tuple(in_shape), width))]


def _pool(side: int, in_shape: tuple[int, ...], train: bool = False) -> NamedOperators:
    """Sums of side x side pixels over side, channel by channel: a convolution of norm 1."""
    kernel = jnp.full((side, side, 1, in_shape[-1]), 1 / side)
    op = operators.Conv(kernel, tuple(in_shape), side, "VALID", groups=in_shape[-1])
    return [("pool", contraction(op, train))]
