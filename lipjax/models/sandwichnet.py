"""The convolutional network of sandwich layers."""

from lipjax.nn import LAYERS, LayeredModel, LinearHead, flatten

SANDWICHES = tuple(name for name, layer in LAYERS.items() if layer.inner and not layer.square)


class SandwichNet(LayeredModel):
    """Pairs of 3x3 convolutions, the second of them of stride 2; dense layers; a head. ReLU is inside of the layers.

    layer: "sandwich" (circular, as published) or "sandwich_spatial"; layer_options: its fields. widths: of the pairs;
    (64, 128, 256) for 32 x 32 images and (64, 128, 256, 512) for 64 x 64 in the original. dense_widths: of the dense
    layers. head: "lln" (rows of length 1) or "orthonormal" (a sandwich's B).

    Source: Wang & Manchester 2023, arXiv:2301.11526.
    """

    layer: str = "sandwich"
    widths: tuple[int, ...] = (64, 128, 256)
    dense_widths: tuple[int, ...] = (2048, 2048, 1024)
    head: str = "lln"

    def check(self) -> None:
        """Raises: ValueError if an attribute has no such value, or the sizes do not fit each other."""
        self.check_choices(layer=SANDWICHES, head=("lln", "orthonormal"))
        for name in ("widths", "dense_widths"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(type(width) is int and width >= 1 for width in value):
                raise ValueError(f"expected {name} to be a tuple of widths >= 1, such as (64, 128), got {value!r}.")
        shrink = 2 ** len(self.widths)
        if self.input_shape[0] % shrink or self.input_shape[1] % shrink:
            raise ValueError(
                f"{len(self.widths)} pairs need images whose sides are multiples of {shrink}, got "
                f"{self.input_shape[:2]}: set widths to fit."
            )
        self.check_layer()

    def layers(self):
        layers: list = []
        for i, width in enumerate(self.widths, start=1):
            layers.append(self.conv(f"conv{i}_a", width, 3, 1, None))
            layers.append(self.conv(f"conv{i}_b", width, 3, 2, None))
        layers.append(flatten)
        layers += [self.dense(f"dense_{i:02d}", width, None) for i, width in enumerate(self.dense_widths, start=1)]
        if self.head == "orthonormal":
            return layers, self.orthonormal_head()
        return layers, LinearHead(self.num_classes, name="head")
