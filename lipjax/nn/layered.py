"""The base of models whose convolutions are chosen by name."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from flax.core import FrozenDict

from lipjax import operators
from lipjax.nn.by_name import LAYERS, layer_fields
from lipjax.nn.model import LipschitzModel


class LayeredModel(LipschitzModel):
    """The base of models whose convolutions are chosen by name.

    layer: a name of `LAYERS`. layer_options: its fields; those that are missing have their defaults. In a config both
    are fields of config.model: `layer`, and beside it what the layer brings.
    """

    layer: str = "soc"
    layer_options: Mapping[str, Any] = FrozenDict()

    def fields_of_layer(self) -> dict[str, Any]:
        """All fields of the chosen layer, with their values."""
        return {name: field.default for name, field in layer_fields(self.layer).items()} | dict(self.layer_options)

    def check_layer(self) -> None:
        """Raises: ValueError for an unknown layer, or fields that it does not have or cannot use."""
        if self.layer not in LAYERS:
            raise ValueError(f"expected layer to be one of {tuple(LAYERS)}, got {self.layer!r}.")
        known, given = layer_fields(self.layer), self.fields_of_layer()
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ValueError(f"the layer {self.layer!r} has the fields {sorted(known)}, got {unknown}.")
        for name, field in known.items():
            field.check(name, given[name])
        LAYERS[self.layer].check(given)

    def conv(
        self,
        name: str | None,
        features: int,
        kernel_size: int,
        strides: int = 1,
        activation: Callable | None = operators.MaxMin,
        **more,
    ):
        """The chosen convolution as a layer, strides by reordering pixels where it has none of its own.

        Layers that keep the number of channels get zeros appended, or channels left out behind them. more: arguments
        of the layer's module that the model sets, over its fields.
        """
        kind = LAYERS[self.layer]
        own = strides if kind.strides(kernel_size, strides) else 1
        extra = {"batch_size": self.batch_size} if kind.per_batch else {}
        given = {**self.fields_of_layer(), **extra, **more, "kernel_size": kernel_size, "name": name}
        if kind.square:
            layer = kind.conv(**given)
        elif kind.inner:
            layer = kind.conv(features=features, strides=own, **given)
        else:
            layer, activation = kind.conv(features=features, strides=own, activation=activation, **given), None
        return functools.partial(_around, layer, name, features, strides // own, activation, kind.square)

    def dense(self, name: str, features: int, activation: Callable | None = operators.MaxMin, **more):
        """The dense layer that goes with the chosen convolution. Raises: ValueError if there is none."""
        kind = LAYERS[self.layer]
        if kind.dense is None:
            known = [name for name, layer in LAYERS.items() if layer.dense is not None]
            raise ValueError(f"the layer {self.layer!r} has no dense counterpart; those with one are {known}.")
        takes = inspect.signature(kind.dense).parameters
        own = {field: value for field, value in self.fields_of_layer().items() if field in takes}
        given = {**own, **more, "name": name}
        if kind.square:
            layer = kind.dense(**given)
        elif kind.inner:
            layer = kind.dense(features=features, **given)
        else:
            layer, activation = kind.dense(features=features, activation=activation, **given), None
        return functools.partial(_around, layer, name, features, 1, activation, kind.square)

    def orthonormal_head(self, name: str = "head"):
        """The head with orthonormal rows that goes with the chosen convolution."""
        return LAYERS[self.layer].head(self.num_classes, name=name, **self.fields_of_layer())


def _around(layer, name, features: int, strides: int, activation, square: bool, in_shape, train=False):
    """A layer behind a reordering of strides x strides pixels, and an activation.

    square: the layer keeps the number of channels: zeros are appended in front of it, or channels left out behind it,
    to make `features` of them.
    """
    ops: list = []
    shape = tuple(in_shape)
    if strides > 1:
        ops.append((f"{name}/spacetodepth", operators.SpaceToDepth(shape, strides)))
        shape = ops[-1][1].out_shape
    if square and shape[-1] < features:
        ops.append((f"{name}/padchannels", operators.PadChannels(shape, features)))
        shape = ops[-1][1].out_shape
    ops += layer(shape, train)
    if square and shape[-1] > features:
        ops.append((f"{name}/cropchannels", operators.CropChannels(shape, features)))
    if activation is not None:
        ops.append((f"{name}/activation", activation(ops[-1][1].out_shape)))
    return ops
