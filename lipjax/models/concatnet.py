"""The convolutional network of almost orthogonal layers."""

import functools

from lipjax import operators
from lipjax.nn import ALL_ACTIVATIONS, FirstFeatures, LayeredModel, LinearHead, flatten
from lipjax.nn.layers import NamedOperators


class ConcatNet(LayeredModel):
    """num_blocks blocks; each begins with 2x2 pixels as channels of one and goes on with convolutions of equal width.

    The first convolution of a block is 1x1, and block_depth - 1 others follow: 3x3, and 1x1 in the last two blocks,
    whose maps are 2 x 2 and 1 x 1. Widths grow fourfold from `width`, but in the last block, in front of which a 1x1
    convolution stands whose first quarter of channels is kept. Another one ends the network. An activation follows
    every layer of a block and none of these two. Images are squares of 2^num_blocks pixels a side.

    layer, layer_options: as of `nn.LayeredModel`. activation: a name of `nn.ALL_ACTIVATIONS`. head: "first" (the first
    features are the logits, as in the original) or "lln" (rows of length 1).

    Source: Prach & Lampert 2022, arXiv:2208.03160, with the shapes of its code.
    """

    layer: str = "aol"
    width: int = 16
    num_blocks: int = 5
    block_depth: int = 5
    activation: str = "maxmin"
    head: str = "first"

    def check(self) -> None:
        """Raises: ValueError if an attribute has no such value, or the sizes do not fit each other."""
        self.check_choices(activation=tuple(ALL_ACTIVATIONS), head=("first", "lln"))
        for name, least in (("num_blocks", 2), ("block_depth", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"expected {name} >= {least}, got {getattr(self, name)}.")
        h, w, _ = self.input_shape
        if not h == w == 2**self.num_blocks:
            raise ValueError(
                f"{self.num_blocks} blocks are for images of {2**self.num_blocks} pixels a side, got {(h, w)}: set "
                "num_blocks to fit, or config.data.image_size."
            )
        if self.width < 2 or self.width % 2:
            raise ValueError(f"expected an even width >= 2, got {self.width}.")
        if self.head == "first" and self.num_classes > self._widest():
            raise ValueError(f"{self.num_classes} classes need as many features: set head 'lln', or a larger width.")
        self.check_layer()

    def _widest(self) -> int:
        return self.width * 4 ** (self.num_blocks - 2)

    def layers(self):
        activation = ALL_ACTIVATIONS[self.activation]
        layers: list = []
        for block in range(1, self.num_blocks + 1):
            width, end = self.width * 4 ** (block - 1), self.num_blocks
            if block == end:
                width = self._widest()
                layers += [self.conv("narrow", width, 1, 1, None), functools.partial(_keep, width // 4)]
            layers.append(functools.partial(_concatenate, f"block{block}"))
            for i in range(self.block_depth):
                kernel_size = 3 if i > 0 and block < end - 1 else 1
                layers.append(self.conv(f"block{block}_conv{i}", width, kernel_size, 1, activation))
        layers += [self.conv("last", self._widest(), 1, 1, None), flatten]
        head = FirstFeatures if self.head == "first" else LinearHead
        return layers, head(self.num_classes, name="head")


def _concatenate(name: str, in_shape: tuple[int, ...], train: bool = False) -> NamedOperators:
    """2x2 pixels as the channels of one."""
    return [(f"{name}/spacetodepth", operators.SpaceToDepth(tuple(in_shape), 2))]


def _keep(channels: int, in_shape: tuple[int, ...], train: bool = False) -> NamedOperators:
    """The first channels alone."""
    return [("narrow/cropchannels", operators.CropChannels(tuple(in_shape), channels))]
