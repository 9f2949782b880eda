"""The arrays of a network for layers of PyTorch: their names, layouts and orders of axes."""

from collections.abc import Callable, Iterator

import jax
import numpy as np

from lipjax import operators
from lipjax.errors import UserError
from lipjax.network import Network


def _images_first(kernel: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))


# The weight of the layer of PyTorch that computes the same.
_WEIGHTS: dict[type, Callable] = {
    operators.Conv: lambda op: _images_first(op.kernel),  # Conv2d: (out, in / groups, kh, kw)
    operators.ConvTranspose: lambda op: _images_first(op.conv.kernel),  # ConvTranspose2d: (in, out / groups, kh, kw)
    operators.Dense: lambda op: op.matrix,
}

# Without arrays, and the same of every component, so that the order of the components is nothing to them.
_ORDERLESS = (operators.ReLU, operators.LeakyReLU, operators.Tanh, operators.Sigmoid, operators.Softplus)


def torch_state(network: Network) -> dict[str, np.ndarray]:
    """Arrays by the names that PyTorch's `load_state_dict` takes; `FrozenNetwork.to_torch_state` says which.

    Raises: UserError naming an operator whose arrays no plain layer of PyTorch holds, or that sees flattened images in
      an order that is not PyTorch's.
    """
    state: dict[str, np.ndarray] = {}
    layer, images = "", None  # whose bias may follow; (h, w, c) of images that were flattened, up to the next layer
    for name, op, begins_sum in _single_operators(network):
        kind, key = type(op), name.replace("/", ".")
        if images is not None and begins_sum:
            raise UserError(
                f"{name}: what it is a part of adds numbers in the order that PyTorch's Flatten gives to numbers in "
                "another: ship the network by FrozenNetwork.to_onnx or export."
            )
        if kind in _WEIGHTS:
            weight = _WEIGHTS[kind](op)
            state[f"{key}.weight"] = weight if images is None else _columns(weight, images)
            layer, images = key, None
        elif isinstance(op, operators.Bias) and layer:
            state[f"{layer}.bias"], layer = op.bias, ""
        elif jax.tree.leaves(op):
            raise UserError(
                f"{name}: no plain layer of PyTorch holds the arrays of a {kind.__name__} in this place: ship the "
                "network by FrozenNetwork.to_onnx or export."
            )
        elif kind is operators.Flatten and len(op.in_shape) == 3:
            (h, w, c), layer = op.in_shape, ""
            images = op.in_shape if h * w > 1 and c > 1 else None  # else both orders are one
        elif images is not None and not _is_orderless(op):
            raise UserError(
                f"{name}: a {kind.__name__} between a Flatten and the next dense layer sees numbers in an order that "
                "PyTorch's Flatten does not give: ship the network by FrozenNetwork.to_onnx or export."
            )
        else:
            layer = ""
    return state | _head(network.head, images) | {"input_mean": network.input_mean, "input_std": network.input_std}


def _is_orderless(op: operators.Operator) -> bool:
    if isinstance(op, operators.PartialAbs):
        return op.channels in (0, op.in_shape[-1])
    return type(op) in _ORDERLESS


def _single_operators(network: Network) -> Iterator[tuple[str, operators.Operator, bool]]:
    """Operators by name, and in the place of a composite one its parts: name/0, name/1, ...

    With each: if it is the first part of a composite that adds its input, so that what it reads is in a sum, too.
    """
    for name, op in zip(network.names, network.ops, strict=True):
        if isinstance(op, operators.Composite):
            for place, part in enumerate(op.parts()):
                yield f"{name}/{place}", part, op.adds_input and not place
        else:
            yield name, op, False


def _columns(matrix: np.ndarray, images: tuple[int, ...]) -> np.ndarray:
    """The columns of a matrix, which stand for images (h, w, c), in the order of images (c, h, w)."""
    return np.ascontiguousarray(matrix.reshape(len(matrix), *images).transpose(0, 3, 1, 2).reshape(matrix.shape))


def _head(head, images: tuple[int, ...] | None) -> dict[str, np.ndarray]:
    def ordered(matrix):
        return matrix if images is None else _columns(matrix, images)

    if isinstance(head, operators.LinearHead):
        return {"head.weight": ordered(head.matrix), "head.bias": head.bias}
    if isinstance(head, operators.MLPHead):  # Sequential(Linear, Softplus, Linear)
        first = {"head.0.weight": ordered(head.w1), "head.0.bias": head.b1}
        return first | {"head.2.weight": head.w2, "head.2.bias": head.b2}
    raise UserError(f"head: no plain layer of PyTorch holds the arrays of a {type(head).__name__}.")
