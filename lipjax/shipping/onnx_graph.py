"""An ONNX graph that is being written, node by node: names, constants, and the layout of values.

Images are (b, c, h, w), so that the channels of every value, also of vectors (b, c), are its axis 1.
"""

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from lipjax.errors import UserError

OPSET, IR_VERSION = 17, 8
"""The version of the operators, and of the file format that came with it: runtimes since 2022 read both."""


def single(array, what: str) -> np.ndarray:
    """An array in float32. Raises: UserError if a number is beyond its range."""
    with np.errstate(over="ignore"):
        found = np.ascontiguousarray(np.asarray(array, np.float32))
    if not np.isfinite(found).all():
        raise UserError(f"{what} holds numbers that float32 does not: an ONNX file would hold infinities.")
    return found


class Graph:
    """Nodes and constants in the order in which they are made. Values are named by what made them, and a number."""

    def __init__(self):
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.place = "network"  # the operator that is being translated, for names and messages
        self._onnx = importlib.import_module("onnx")
        self._known: dict[tuple, str] = {}

    def constant(self, array, name: str = "constant") -> str:
        """The name of a constant; floats become float32. The same numbers are kept once."""
        array = np.asarray(array)
        kept = single(array, self.place) if array.dtype.kind == "f" else np.asarray(array, np.int64)
        key = kept.dtype.str, kept.shape, kept.tobytes()
        if key not in self._known:
            self._known[key] = f"{self.place}/{name}_{len(self.constants)}"
            self.constants.append(self._onnx.numpy_helper.from_array(kept, self._known[key]))
        return self._known[key]

    def add(self, kind: str, *inputs: str, outputs: int = 1, **attributes) -> Any:
        """Appends a node. Returns: the name of its output, or names of several."""
        names = [f"{self.place}/{kind}_{len(self.nodes)}" + (f"_{i}" if outputs > 1 else "") for i in range(outputs)]
        self.nodes.append(self._onnx.helper.make_node(kind, list(inputs), names, name=names[0], **attributes))
        return names[0] if outputs == 1 else names

    def transpose(self, x: str, order: Sequence[int]) -> str:
        order = list(order)
        return x if order == sorted(order) else self.add("Transpose", x, perm=order)

    def reshape(self, x: str, shape: Sequence[int]) -> str:
        """x in another shape, of which 0 keeps an axis's length, and -1 is what remains."""
        return self.add("Reshape", x, self.constant(np.array(list(shape))))

    def slice(self, x: str, axis: int, start: int, stop: int) -> str:
        """The entries from start to stop along an axis."""
        bounds = (self.constant(np.array([n])) for n in (start, stop, axis))
        return self.add("Slice", x, *bounds)

    def pad(self, x: str, rank: int, pads: dict[int, tuple[int, int]]) -> str:
        """x, of `rank` axes, with zeros around it: so many before and behind, by axis."""
        sides = [[pads.get(axis, (0, 0))[end] for axis in range(rank)] for end in (0, 1)]
        return self.add("Pad", x, self.constant(np.array(sides[0] + sides[1])))

    def halves(self, x: str, channels: int) -> list[str]:
        """The two halves of the channels."""
        return self.add("Split", x, self.constant(np.array([channels // 2] * 2)), outputs=2, axis=1)

    def per_channel(self, array, rank: int, name: str = "constant") -> str:
        """A constant with one number for each channel, (c,) or (1,), that fits values with `rank` axes."""
        return self.constant(np.asarray(array).reshape(1, -1, *(1,) * (rank - 2)), name)


def channels_first(rank: int) -> list[int]:
    """The order of axes that takes (b, ..., c) to (b, c, ...)."""
    return [0, rank - 1, *range(1, rank - 1)]


def channels_last(rank: int) -> list[int]:
    """The order of axes that takes (b, c, ...) to (b, ..., c)."""
    return [0, *range(2, rank), 1]
