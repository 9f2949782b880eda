"""The convolutional network in which 1-Lipschitz layers were compared."""

import functools

from lipjax import operators
from lipjax.nn import ALL_ACTIVATIONS, FirstFeatures, LayeredModel, LinearHead, flatten
from lipjax.nn.layers import NamedOperators

# Activations that mix pairs of channels.
_IN_PAIRS = ("maxmin", "householder", "householder2")


class ComparedConvNet(LayeredModel):
    """num_blocks blocks of block_depth convolutions of equal width; behind each the map halves and the width doubles.

    Zeros are appended to the images' channels up to `width`; a 1x1 convolution and an activation follow. A block ends
    with the first half of its channels and the reordering of 2x2 pixels, so that the next one is twice as wide. The
    kernels of the last block, whose map is 2 x 2, are 1x1, and so is the last convolution, on one pixel. Where an
    activation mixes pairs of channels, both of a pair stay: channels are dealt out to halves in front of a block, and
    back to neighbours behind it, as which the original pairs them. Images are squares of 2^num_blocks pixels a side.

    layer, layer_options: as of `nn.LayeredModel`. kernel_size: 3 or 1 in the original. width: 16 (XS), 32 (S), 64 (M),
    128 (L). activation: a name of `nn.ALL_ACTIVATIONS`. head: "first" (the first features are the logits, as in the
    original), "lln" (rows of length 1) or "orthonormal".

    Source: Prach, Brau, Buttazzo & Lampert 2024, arXiv:2311.16833.
    """

    layer: str = "aoc"
    width: int = 16
    num_blocks: int = 5
    block_depth: int = 5
    kernel_size: int = 3
    activation: str = "maxmin"
    head: str = "first"

    def check(self) -> None:
        """Raises: ValueError if an attribute has no such value, or the sizes do not fit each other."""
        self.check_choices(activation=tuple(ALL_ACTIVATIONS), head=("first", "lln", "orthonormal"))
        for name in ("num_blocks", "block_depth", "kernel_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} >= 1, got {getattr(self, name)}.")
        h, w, channels = self.input_shape
        if not h == w == 2**self.num_blocks:
            raise ValueError(
                f"{self.num_blocks} blocks are for images of {2**self.num_blocks} pixels a side, got {(h, w)}: set "
                "num_blocks to fit, or config.data.image_size."
            )
        if self.width < max(channels, 4) or self.width % 4:
            raise ValueError(f"expected a width >= {channels} that 4 divides, got {self.width}.")
        if self.head == "first" and self.num_classes > self.width * 2**self.num_blocks:
            raise ValueError(f"{self.num_classes} classes need as many features: set head 'lln', or a larger width.")
        self.check_layer()

    def layers(self):
        activation = ALL_ACTIVATIONS[self.activation]
        width, in_pairs = self.width, self.activation in _IN_PAIRS
        layers: list = [functools.partial(_widen, width, in_pairs), self.conv("first", width, 1, 1, activation)]
        for block in range(1, self.num_blocks + 1):
            kernel_size = 1 if block == self.num_blocks else self.kernel_size
            for i in range(self.block_depth):
                layers.append(self.conv(f"block{block}_conv{i}", width, kernel_size, 1, activation))
            more = block < self.num_blocks
            layers.append(functools.partial(_halve, f"block{block}_end", in_pairs, in_pairs and more))
            width *= 2
        layers += [self.conv("last", width, 1, 1, None), flatten]
        if self.head == "orthonormal":
            return layers, self.orthonormal_head()
        head = FirstFeatures if self.head == "first" else LinearHead
        return layers, head(self.num_classes, name="head")


def _named(name: str, ops: list) -> NamedOperators:
    found = [f"{name}/{type(op).__name__.lower()}" for op in ops]
    return [(n if n not in found[:i] else f"{n}_{i}", op) for i, (n, op) in enumerate(zip(found, ops, strict=True))]


def _widen(width: int, deal: bool, in_shape: tuple[int, ...], train: bool = False) -> NamedOperators:
    """Zeros appended to the channels, and pairs of neighbours dealt out to halves."""
    shape = (*in_shape[:-1], width)
    return _named(
        "widen", [operators.PadChannels(tuple(in_shape), width), *([operators.ChannelShuffle(shape, 2)] * deal)]
    )


def _halve(name: str, gather: bool, deal: bool, in_shape: tuple[int, ...], train: bool = False) -> NamedOperators:
    """Pairs back to neighbours, the first half of the channels, 2x2 pixels as channels, and dealt out again."""
    shape, half = tuple(in_shape), in_shape[-1] // 2
    ops: list = [operators.ChannelShuffle(shape, half)] if gather else []
    ops.append(operators.CropChannels(shape, half))
    ops.append(operators.SpaceToDepth(ops[-1].out_shape, 2))
    return _named(name, [*ops, *([operators.ChannelShuffle(ops[-1].out_shape, 2)] * deal)])
