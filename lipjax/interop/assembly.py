"""Networks put together layer by layer from what PyTorch and ONNX say of them: images (c, h, w), kernels OIHW.

Ours are (h, w, c) and HWIO, and sort pairs of channels i and i + c/2. So a network that is read here may have another
order of its numbers at every place, and `Assembly.places` says which: what stands at a position of the tensor there
stands at places[position] of our flattened array. Linear maps take their rows and columns from it, so that reorderings
(of channels, of pairs, of what is flattened) mostly cost nothing, and round nothing.
"""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from lipjax import conv, operators
from lipjax.certify.float64 import float64_on_cpu
from lipjax.errors import UserError
from lipjax.network import Network, make_network
from lipjax.spectral.arithmetic import exact_float64

ACTIVATIONS: dict[str, Callable[..., Any]] = {
    "leaky_relu": operators.LeakyReLU,
    "relu": operators.ReLU,
    "sigmoid": operators.Sigmoid,
    "tanh": operators.Tanh,
}
# An order of units that no layer before it can take on is a matrix of zeros and ones, of at most so many rows.
_ORDERED_UNITS = 4096


class Assembly:
    """A network under construction.

    Attributes:
      ops: named operators so far.
      places: the tensor as it is there, (c, h, w) or (n,), without the batch: of each number its place in ours.
      generation: how often layers changed the tensor: one that an earlier layer gave is not the one of now.
    """

    def __init__(self, shape: tuple[int, ...], input_mean: Any = 0.0, input_std: Any = 1.0):
        """shape: of one input there, (c, h, w) or (n,). input_mean, input_std: of the input, by channel; pixel units.

        Raises: UserError for another shape.
        """
        sizes = tuple(int(n) for n in shape)
        if len(sizes) not in (1, 3) or min(sizes) < 1:
            raise UserError(f"Expected an input shape (channels, height, width) or (features,), got {tuple(shape)}.")
        self.ops: list[tuple[str, Any]] = []
        self.generation = 0
        self._shape: tuple[int, ...] = sizes if len(sizes) == 1 else (sizes[1], sizes[2], sizes[0])
        self._in_shape = self._shape
        self.places: Any = self._standard()
        self._flatten_name = "flatten"
        self._mean, self._std = (exact_float64(np.asarray(a), "The normalisation") for a in (input_mean, input_std))

    def convolve(self, name: str, weight, bias, *, strides, padding: conv.Padding, groups: int = 1, dilation=1) -> None:
        """A convolution: weight (o, c / groups, kh, kw), bias (o,) or None; padding of zeros, or "CIRCULAR"."""
        weight, channels = exact_float64(weight, f"{name}: the weight"), self._channels(name)
        if weight.ndim != 4 or weight.shape[1] * groups != len(channels) or weight.shape[0] % groups:
            raise UserError(
                f"{name}: expected a weight (out, in / groups, height, width) for {len(channels)} channels in {groups} "
                f"groups, got shape {weight.shape}."
            )
        inputs, outputs = weight.shape[1], weight.shape[0] // groups
        if (channels // inputs != np.arange(len(channels)) // inputs).any():  # a channel of another group
            self._reorder(name, channels)
            channels = self._channels(name)
        kernel = np.empty((*weight.shape[2:], inputs, weight.shape[0]))
        for g in range(groups):
            ours = channels[g * inputs : (g + 1) * inputs] - g * inputs
            part = slice(g * outputs, (g + 1) * outputs)
            kernel[:, :, ours, part] = np.transpose(weight[part], (2, 3, 1, 0))
        options = {"strides": _one(strides), "padding": padding, "groups": groups, "dilation": _one(dilation)}
        self._append(f"{name}/linear", lambda: operators.Conv(kernel, self._shape, **options))
        self.places = self._standard()
        self._bias(name, bias)

    def dense(self, name: str, weight, bias) -> None:
        """A dense layer: weight (out, in), bias (out,) or None."""
        weight = exact_float64(weight, f"{name}: the weight")
        if weight.ndim != 2 or weight.shape[1:] != self.places.shape:
            raise UserError(
                f"{name}: expected a weight (out, in) for inputs of shape {self.places.shape}, got shape "
                f"{weight.shape}: is a Flatten missing?"
            )
        self._flatten(name)
        matrix = np.empty_like(weight)
        matrix[:, self.places] = weight
        self._append(f"{name}/linear", lambda: operators.Dense(matrix))
        self.places = self._standard()
        self._bias(name, bias)

    def _bias(self, name: str, bias) -> None:
        if bias is not None:
            bias = exact_float64(bias, f"{name}: the bias")
            self._append(f"{name}/bias", lambda: operators.Bias(bias, self._shape))

    def activation(self, name: str, kind: str, **options) -> None:
        """An elementwise activation of ACTIVATIONS."""
        self._append(name, lambda: ACTIVATIONS[kind](self._shape, **options))

    def flatten(self, name: str, order: str = "chw") -> None:
        """(c, h, w) -> (n,), in the order "chw" or "hwc" there; (n,) stays what it is."""
        if order not in ("chw", "hwc"):
            raise UserError(f"{name}: expected the order 'chw' or 'hwc', got {order!r}.")
        places = np.moveaxis(self.places, 0, -1) if order == "hwc" else self.places
        self.places, self._flatten_name = places.reshape(-1), name

    def sort_pairs(self, name: str, first: np.ndarray, second: np.ndarray, larger: np.ndarray) -> None:
        """The larger or the smaller of two numbers at every position.

        Args: of the output's shape there: two places of numbers, and whether the larger is taken.
        Raises: UserError unless every number is in one pair, of which the larger and the smaller are taken once.
        """
        low, high = np.minimum(first, second), np.maximum(first, second)
        members = [np.sort(np.stack([low[taken], high[taken]]), axis=None) for taken in (larger, ~larger)]
        pairs = [set(zip(low[taken].tolist(), high[taken].tolist(), strict=True)) for taken in (larger, ~larger)]
        every = np.arange(math.prod(self._shape))
        if pairs[0] != pairs[1] or not all(np.array_equal(found, every) for found in members):
            raise UserError(
                f"{name}: expected the larger and the smaller of each pair of numbers, every number in one pair."
            )
        if not self._pairs_channels(low, high):
            self._flatten(name)
        channels = self._shape[-1]
        partner = np.empty(channels, int)
        for one, other in ((low, high), (high, low)):
            partner[one % channels] = other % channels
        lows = np.flatnonzero(np.arange(channels) < partner)
        low, high = self._reorder(name, np.concatenate([lows, partner[lows]]), low, high)
        self._append(name, lambda: operators.MaxMin(self._shape))
        self.places = np.where(larger, np.minimum(low, high), np.maximum(low, high))

    def _pairs_channels(self, low: np.ndarray, high: np.ndarray) -> bool:
        """Whether pairs are of two of our channels at one pixel, the same ones at all pixels."""
        channels = self._shape[-1]
        found = np.unique(np.stack([low % channels, high % channels], -1).reshape(-1, 2), axis=0)
        return bool((low // channels == high // channels).all()) and len(np.unique(found)) == 2 * len(found)

    def average(self, name: str, sides: tuple[int, int], strides, padding: conv.Padding) -> None:
        """The mean over each window, zeros of the padding counted: a convolution of every channel by itself."""
        channels = self._channels(name)
        kernel = np.full((*sides, 1, len(channels)), 1 / math.prod(sides))
        self._append(name, lambda: operators.Conv(kernel, self._shape, _one(strides), padding, len(channels)))
        self.places = self._standard()[channels]

    def affine(self, name: str, scale, shift) -> None:
        """x -> scale x + shift. Both broadcast to the tensor there, one number for each channel, or for each unit.

        The scale goes into the rows of the linear map before it, rounded to float64, or becomes a diagonal one.
        """
        self._by_channel(name, shift)  # either may make vectors of images, of which there are more numbers
        factor, added = self._by_channel(name, scale), self._by_channel(name, shift)
        if (factor != 1).any():
            self._scale(name, factor)
        if not added.any():
            return
        if self.ops and isinstance(self.ops[-1][1], operators.Bias):
            name, last = self.ops.pop()
            bias = last.bias + added
        else:
            name, bias = f"{name}/bias", added
        self._append(name, lambda: operators.Bias(bias, self._shape))

    def _scale(self, name: str, factor: np.ndarray) -> None:
        start = len(self.ops) - 1
        while start > 0 and isinstance(self.ops[start][1], operators.Bias):
            start -= 1
        if start >= 0 and isinstance(self.ops[start][1], operators.Conv | operators.Dense):
            self._change_rows(start, lambda rows: rows * factor)
        elif len(self._shape) == 3:
            kernel = np.diag(factor)[None, None]
            self._append(f"{name}/scale", lambda: operators.Conv(kernel, self._shape, padding="VALID"))
        else:
            self._append(f"{name}/scale", lambda: operators.Dense(np.diag(factor)))

    def normalize(self, name: str, mean, std) -> None:
        """x -> (x - mean) / std, both as in `affine`. Of pixels, before all layers, it is that of the network."""
        centre, size = self._by_channel(name, mean), self._by_channel(name, std)
        if not (size > 0).all():
            raise UserError(f"{name}: expected standard deviations above 0, got {size}.")
        if self.ops:
            self.affine(name, 1 / std, -mean / std)
        else:
            self._mean, self._std = self._mean + self._std * centre, self._std * size
            self.generation += 1

    def _by_channel(self, name: str, values) -> np.ndarray:
        """What broadcasts to the tensor there, as one number for each of our channels."""
        try:
            values = np.broadcast_to(exact_float64(np.asarray(values), name), self.places.shape)
        except ValueError as error:
            raise UserError(f"{name}: {error}") from error
        ours = np.empty(math.prod(self._shape))
        ours[self.places] = values
        rows = ours.reshape(-1, self._shape[-1])
        if (rows == rows[0]).all():
            return rows[0]
        if self.places.ndim == 1:
            self._flatten(name)
            return ours
        raise UserError(f"{name}: expected one number for each channel, got some for pixels.")

    def apply(self, x: np.ndarray) -> np.ndarray:
        """Applies the layers so far to a batch, in float64: x and what comes are tensors as they are there."""
        with float64_on_cpu():
            ours = jnp.asarray((np.moveaxis(x, 1, -1) if x.ndim == 4 else x) - self._mean) / self._std
            for _, op in self.ops:
                ours = op(ours)
            return np.asarray(ours).reshape(len(x), -1)[:, self.places]

    def finish(self) -> Network:
        """The network; the last dense layer is its head. Raises: UserError unless it ends with at least two logits."""
        if self.places.ndim != 1 or len(self.places) < 2:
            raise UserError(
                f"The network ends with a tensor {self.places.shape}, expected at least two logits (classes,): flatten "
                "what it gives, and make two logits of a single one by a last linear layer of rows 1 and -1."
            )
        self._flatten("head")
        ops, bias = list(self.ops), np.zeros(len(self.places))
        if len(ops) > 1 and isinstance(ops[-1][1], operators.Bias) and isinstance(ops[-2][1], operators.Dense):
            bias = ops.pop()[1].bias
        dense = isinstance(ops[-1][1], operators.Dense) if ops else False
        matrix = ops.pop()[1].matrix if dense else np.eye(len(self.places))
        if not ops:  # a network has at least one operator
            ops = [("flatten", operators.Flatten(self._in_shape))]
        head = operators.LinearHead(matrix[self.places], bias[self.places])
        return make_network(ops, head, self._mean, self._std)

    def _append(self, name: str, make: Callable[[], Any]) -> None:
        """Adds an operator. Raises: UserError naming it for what the operator refuses."""
        try:
            op = make()
        except ValueError as error:
            raise UserError(f"{name}: {error}") from error
        taken = {known for known, _ in self.ops}
        self.ops.append((next(n for n in _numbered(name) if n not in taken), op))
        self._shape = tuple(op.out_shape)
        self.generation += 1

    def _standard(self) -> np.ndarray:
        """The places of a tensor whose channels and pixels, or units, are in our order."""
        places = np.arange(math.prod(self._shape)).reshape(self._shape)
        return np.moveaxis(places, -1, 0) if len(self._shape) == 3 else places

    def _channels(self, name: str) -> np.ndarray:
        """Our channel of each channel there. Raises: UserError unless the tensor is images, pixels in their order."""
        standard = self._standard()
        if self.places.ndim == 3 and self.places.shape == standard.shape:
            channels = self.places[:, 0, 0]
            if np.array_equal(self.places, standard[channels]):
                return channels
        raise UserError(
            f"{name}: expected images (channels, height, width) of pixels in their order, got a tensor "
            f"{self.places.shape} that something before it reshaped."
        )

    def _flatten(self, name: str) -> None:
        """Makes vectors of our images: places are those of the flattened array as it is."""
        if len(self._shape) == 3:
            known = f"{name}/flatten" if self._flatten_name == "flatten" else self._flatten_name
            self._append(known, lambda: operators.Flatten(self._shape))

    def _reorder(self, name: str, order: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
        """Makes our channel i of the channel order[i]. Returns: places that the caller holds, as they are then."""
        channels, new = len(order), np.argsort(order)
        if (order != np.arange(channels)).any() and not self._reorder_rows(order):
            self._append(f"{name}/order", lambda: self._reordering(order))
        moved = [places // channels * channels + new[places % channels] for places in (self.places, *others)]
        self.places = moved[0]
        return moved[1:]

    def _reorder_rows(self, order: np.ndarray) -> bool:
        """Reorders the rows of the last linear map, if only channels by themselves follow it."""
        start = len(self.ops) - 1
        while start > 0 and _is_channelwise(self.ops[start][1]):
            start -= 1
        last = self.ops[start][1] if self.ops else None
        if not isinstance(last, operators.Dense) and not (isinstance(last, operators.Conv) and last.groups == 1):
            return False
        self._change_rows(start, lambda rows: rows[..., order])
        return True

    def _reordering(self, order: np.ndarray):
        """The operator that makes channel i of channel order[i]."""
        channels = len(order)
        if channels % 2 == 0 and np.array_equal(order, np.arange(channels).reshape(-1, 2).T.ravel()):
            return operators.ChannelShuffle(self._shape, 2)
        if channels > _ORDERED_UNITS:
            raise ValueError(f"expected a linear layer before what pairs or regroups {channels} channels.")
        matrix = np.eye(channels)[:, order]
        if len(self._shape) == 1:
            return operators.Dense(matrix.T.copy())
        return operators.Conv(matrix[None, None], self._shape, padding="VALID")

    def _change_rows(self, start: int, change: Callable[[np.ndarray], np.ndarray]) -> None:
        """Applies a change, of arrays whose last axis is that of output channels, from the operator `start` on."""
        for i, (name, op) in list(enumerate(self.ops))[start:]:
            if isinstance(op, operators.Dense):
                op = operators.Dense(change(op.matrix.T).T.copy())
            elif isinstance(op, operators.Conv):
                options = op.in_shape, op.strides, op.padding, op.groups, op.dilation
                op = operators.Conv(change(op.kernel), *options)
            elif isinstance(op, operators.Bias):
                op = operators.Bias(change(op.bias), op.in_shape)
            self.ops[i] = name, op
        self.generation += 1


def _is_channelwise(op) -> bool:
    """Whether an operator takes every channel by itself, so that an order of channels passes it."""
    if isinstance(op, operators.Conv):  # an average
        return op.groups == op.in_shape[2] == op.out_shape[2] and op.groups > 1
    return isinstance(op, (operators.Bias, *ACTIVATIONS.values()))  # pyright: ignore[reportArgumentType]


def _one(steps):
    """Equal steps along both axes as a single number."""
    pair = conv.stride_pair(steps)
    return pair[0] if pair[0] == pair[1] else pair


def _numbered(name: str):
    yield name
    count = 2
    while True:
        yield f"{name}_{count}"
        count += 1
