"""The staged network of adaptive orthogonal convolutions."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from lipjax import operators
from lipjax.nn import ALL_ACTIVATIONS, COLLECTION, LayeredModel, LinearHead, flatten
from lipjax.nn.layers import NamedOperators

LAYERS_WITH_KERNELS = ("aoc", "bcop", "rko", "sc_fac")


class Centred(nn.Module):
    """Subtracts the mean over a batch and pixels, of which the state keeps a running mean; bias and activation.

    Evaluation subtracts the running mean, as part of the bias.
    """

    activation: Callable

    @nn.compact
    def __call__(self, in_shape: tuple[int, ...], train: bool = False) -> NamedOperators:
        shape = tuple(in_shape)
        mean = self.variable(COLLECTION, "mean", jnp.zeros, shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, shape[-1:])
        ops: list = [(f"{self.name}/centering", operators.Centering(shape))] if train else []
        ops.append((f"{self.name}/bias", operators.Bias(bias if train else bias - mean.value, shape)))
        return [*ops, (f"{self.name}/activation", self.activation(shape))]


class StagedNet(LayeredModel):
    """Stages of convolutions of equal width, between them one of stride 2 to the next width; dense layers; a head.

    An activation follows every layer but the head. layer: an explicit kernel's, one of `LAYERS_WITH_KERNELS`;
    layer_options: its fields. widths, depths: of the stages, the convolutions of stride 2 not counted. dense_widths: of
    the dense layers. centering: a training step subtracts means over the batch in front of activations, evaluation
    running means. activation: a name of `nn.ALL_ACTIVATIONS`. head: "orthonormal" or "lln" (rows of length 1).

    Source: Boissin et al. 2025, arXiv:2501.07930; StagedCNN of its code orthogonium.
    """

    layer: str = "aoc"
    widths: tuple[int, ...] = (64, 128)
    depths: tuple[int, ...] = (2, 2)
    dense_widths: tuple[int, ...] = (256, 256)
    kernel_size: int = 3
    centering: bool = False
    activation: str = "maxmin"
    head: str = "orthonormal"

    def check(self) -> None:
        """Raises: ValueError if an attribute has no such value, or the sizes do not fit each other."""
        choices = {"activation": tuple(ALL_ACTIVATIONS), "head": ("orthonormal", "lln")}
        self.check_choices(layer=LAYERS_WITH_KERNELS, **choices)
        for name, least in (("widths", 1), ("depths", 0), ("dense_widths", 1)):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(type(n) is int and n >= least for n in value):
                raise ValueError(
                    f"expected {name} to be a tuple of integers >= {least}, such as (64, 128), got {value!r}."
                )
        if not self.widths or len(self.widths) != len(self.depths):
            raise ValueError(f"expected a depth for each of the widths, got {self.widths} and {self.depths}.")
        if self.kernel_size < 2:
            raise ValueError(f"expected kernel_size >= 2, got {self.kernel_size}.")
        shrink = 2 ** (len(self.widths) - 1)
        if self.input_shape[0] % shrink or self.input_shape[1] % shrink:
            raise ValueError(
                f"{len(self.widths)} stages need images whose sides are multiples of {shrink}, got "
                f"{self.input_shape[:2]}: set widths and depths to fit."
            )
        self.check_layer()

    def layers(self):
        activation = ALL_ACTIVATIONS[self.activation]
        layers: list = []

        def add(make, name: str, *sizes: int) -> None:
            if self.centering:
                layers.extend(
                    [make(name, *sizes, activation=None, use_bias=False), Centred(activation, name=f"{name}_centred")]
                )
            else:
                layers.append(make(name, *sizes, activation=activation))

        for name, width, strides in self.convolutions():
            add(self.conv, name, width, self.kernel_size, strides)
        layers.append(flatten)
        for i, width in enumerate(self.dense_widths, start=1):
            add(self.dense, f"dense_{i:02d}", width)
        if self.head == "orthonormal":
            return layers, self.orthonormal_head()
        return layers, LinearHead(self.num_classes, name="head")

    def convolutions(self) -> list[tuple[str, int, int]]:
        """Names, widths and strides of the convolutions in turn."""
        found = []
        for stage, (width, depth) in enumerate(zip(self.widths, self.depths, strict=True), start=1):
            if stage > 1:
                found.append((f"stage{stage}_down", width, 2))
            found += [(f"stage{stage}_conv{i}", width, 1) for i in range(1, depth + 1)]
        return found
