"""The patchwise network of almost orthogonal layers."""

import functools

from lipjax import operators
from lipjax.nn import ALL_ACTIVATIONS, FirstFeatures, LayeredModel, LinearHead, flatten
from lipjax.nn.layers import NamedOperators


class PatchNet(LayeredModel):
    """Patches as pixels, a 1x1 convolution to `width` channels, conv_depth 3x3 ones, few channels left, dense layers.

    Patches of patch x patch pixels become the channels of one pixel. Behind the convolutions stands a 1x1 one whose
    first `features` channels are kept; what is left is flattened and goes through dense_depth dense layers of equal
    width. An activation follows every layer but the 1x1 convolution at the end and the last dense layer. head: "first"
    (the first features are the logits, as in the original) or "lln" (rows of length 1).

    layer: one with a dense counterpart; layer_options: its fields. activation: a name of `nn.ALL_ACTIVATIONS`.
    features: 16 (Small), 32 (Medium), 48 (Large) in the original.

    Source: Prach & Lampert 2022, arXiv:2208.03160.
    """

    layer: str = "aol"
    patch: int = 4
    width: int = 192
    conv_depth: int = 12
    features: int = 16
    dense_depth: int = 14
    activation: str = "maxmin"
    head: str = "first"

    def check(self) -> None:
        """Raises: ValueError if an attribute has no such value, or the sizes do not fit each other."""
        self.check_choices(activation=tuple(ALL_ACTIVATIONS), head=("first", "lln"))
        for name, least in (("patch", 1), ("conv_depth", 0), ("dense_depth", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"expected {name} >= {least}, got {getattr(self, name)}.")
        h, w, _ = self.input_shape
        if h % self.patch or w % self.patch:
            raise ValueError(f"expected a patch that divides images of {(h, w)} pixels, got {self.patch}.")
        if self.width % 2 or not 1 <= self.features <= self.width:
            raise ValueError(f"expected an even width >= features >= 1, got {self.width} and {self.features}.")
        units = self.features * (h // self.patch) * (w // self.patch)
        if units % 2 or self.head == "first" and units < self.num_classes:
            raise ValueError(f"expected an even number of dense units, at least one per class, got {units}.")
        self.check_layer()

    def layers(self):
        activation = ALL_ACTIVATIONS[self.activation]
        layers: list = [functools.partial(_patches, self.patch), self.conv("first", self.width, 1, 1, activation)]
        layers += [self.conv(f"conv_{i:02d}", self.width, 3, 1, activation) for i in range(1, self.conv_depth + 1)]
        layers += [self.conv("last_conv", self.width, 1, 1, None), functools.partial(_keep, self.features), flatten]
        h, w, _ = self.input_shape
        units = self.features * (h // self.patch) * (w // self.patch)
        for i in range(1, self.dense_depth + 1):
            layers.append(self.dense(f"dense_{i:02d}", units, activation if i < self.dense_depth else None))
        head = FirstFeatures if self.head == "first" else LinearHead
        return layers, head(self.num_classes, name="head")


def _patches(side: int, in_shape: tuple[int, ...], train: bool = False) -> NamedOperators:
    """Patches of pixels as channels."""
    return [("patches", operators.SpaceToDepth(tuple(in_shape), side))]


def _keep(channels: int, in_shape: tuple[int, ...], train: bool = False) -> NamedOperators:
    """The first channels alone."""
    return [("keep", operators.CropChannels(tuple(in_shape), channels))]
