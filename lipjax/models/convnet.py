"""Plain convolutional networks with elementwise activations: those of the paper on certified radius maximisation."""

import functools

from lipjax import conv
from lipjax.nn import (
    ELEMENTWISE,
    Conv,
    Dense,
    LinearHead,
    LipschitzModel,
    flatten,
    torch_bias,
    torch_conv,
    torch_linear,
)

# (features, kernel size, strides, zero padding on every side). The nets for MNIST and CIFAR-10 are cut from one row.
_ROW = ((32, 3, 1, 1), (32, 4, 2, 1), *((64, 3, 1, 1), (64, 4, 2, 1)) * 2)
_EIGHT = (
    *((64, 3, 1, 1), (64, 3, 1, 0), (64, 4, 2, 0)),
    *((128, 3, 1, 1), (128, 3, 1, 1), (128, 4, 2, 0)),
    *((256, 3, 1, 1), (256, 4, 2, 0)),
)

VARIANTS: dict[str, tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]] = {
    "4c3f": (_ROW[:4], (512, 512)),
    "6c2f": (_ROW[:6], (512,)),
    "8c2f": (_EIGHT, (256,)),
}
"""Convolutions and widths of the dense layers before the head, by the number of both (the head counts as one)."""


class ConvNet(LipschitzModel):
    """Convolutions, dense layers and a head with free rows; an elementwise activation after every layer but the head.

    variant: a name of `VARIANTS`: "4c3f" is the paper's for MNIST, "6c2f" for CIFAR-10, "8c2f" for Tiny-ImageNet (as
    its code corrected it). "custom" takes `convs`, a tuple of (features, kernel size, strides, zero padding on every
    side), and `dense`, the widths of the dense layers before the head, which the names leave empty.

    activation: a name of `nn.ELEMENTWISE`; negative_slope is that of "leaky_relu" alone. Weights and biases start as
    torch's do, U(+-1 / sqrt(fan_in)). Norms are unconstrained.

    Source: Fazlyab et al. 2023, arXiv:2310.00116, with the shapes of its code.
    """

    variant: str = "6c2f"
    convs: tuple[tuple[int, ...], ...] = ()
    dense: tuple[int, ...] = ()
    activation: str = "relu"
    negative_slope: float = 0.01

    def _shapes(self):
        return (self.convs, self.dense) if self.variant == "custom" else VARIANTS[self.variant]

    def check(self) -> None:
        """Raises: ValueError if an attribute has no such value, or the sizes do not fit each other or the images."""
        self.check_choices(variant=(*VARIANTS, "custom"), activation=tuple(ELEMENTWISE))
        if self.variant != "custom" and (self.convs or self.dense):
            raise ValueError(f"{self.variant!r} has its own convs and dense: leave them out, or take variant 'custom'.")
        if self.activation == "leaky_relu" and not -1 <= self.negative_slope <= 1:
            raise ValueError(f"expected a negative_slope between -1 and 1, got {self.negative_slope}.")
        convs, dense = self._shapes()
        if not isinstance(dense, tuple) or not all(_whole(width, 1) for width in dense):
            raise ValueError(f"expected dense to be a tuple of widths >= 1, such as (512, 512), got {dense!r}.")
        if not isinstance(convs, tuple) or not all(isinstance(layer, tuple) for layer in convs):
            raise ValueError(f"expected convs to be a tuple of tuples, such as ((32, 3, 1, 1),), got {convs!r}.")
        size = tuple(self.input_shape[:2])
        for i, layer in enumerate(convs, start=1):
            if len(layer) != 4 or not all(map(_whole, layer, (1, 1, 1, 0))):
                raise ValueError(
                    "expected every element of convs to be (features, kernel size, strides, padding), the first three "
                    f">= 1 and the padding >= 0, got {layer!r}."
                )
            _, side, strides, padding = layer
            try:
                size = conv.output_size(size, (side, side), strides, _pads(padding))
            except ValueError as error:
                where = f"convolution {i} of {len(convs)}"
                raise ValueError(f"images {self.input_shape} are used up at {where}: {error}") from error

    def _activation(self):
        make = ELEMENTWISE[self.activation]
        if self.activation == "leaky_relu":
            return functools.partial(make, negative_slope=self.negative_slope)
        return make

    def layers(self):
        convs, dense = self._shapes()
        activation = self._activation()
        layers: list = [
            Conv(
                features,
                side,
                strides,
                _pads(padding),
                activation=activation,
                kernel_init=torch_conv,
                bias_init=torch_bias,
                name=f"conv_{i:02d}",
            )
            for i, (features, side, strides, padding) in enumerate(convs, start=1)
        ]
        layers.append(flatten)
        layers += [
            Dense(width, activation=activation, kernel_init=torch_linear, bias_init=torch_bias, name=f"dense_{i:02d}")
            for i, width in enumerate(dense, start=1)
        ]
        return layers, LinearHead(self.num_classes, False, torch_bias, name="head")


def _whole(value, least: int) -> bool:
    return type(value) is int and value >= least


def _pads(padding: int):
    return (padding, padding), (padding, padding)
