"""Operators as ONNX nodes: `TRANSLATIONS` has a function for each class, which its file enters by `translation_of`.

Each computes in float32 what the operator computes, with the same sums of products, so that the bounds of its float32
error (docs/soundness.md, section 13) are true of both. An operator without one is refused by name. What moves numbers
(`Reordering`) and what is made of other operators (`Composite`) needs none: they say themselves what they do.
"""

import math
from collections.abc import Callable

import numpy as np

from lipjax import operators
from lipjax.errors import UserError
from lipjax.shipping.onnx_graph import Graph, channels_last

Translation = Callable[[operators.Operator, Graph, str], str]

TRANSLATIONS: dict[type, Translation] = {}
"""By class, exactly: (operator, graph, name of its input) -> name of its output. A subclass may compute otherwise."""


def translates(op: operators.Operator) -> bool:
    """Says if an operator has a translation, and all that it is made of."""
    if isinstance(op, operators.Composite):
        return all(map(translates, op.parts()))
    return type(op) in TRANSLATIONS or isinstance(op, operators.Reordering)


def translate(name: str, op: operators.Operator, graph: Graph, x: str) -> str:
    """Appends an operator to the graph. Returns: its output. Raises: UserError naming it if it has no translation."""
    if isinstance(op, operators.Composite):
        y = x
        for place, part in enumerate(op.parts()):
            y = translate(f"{name}/{place}", part, graph, y)
        return graph.add("Add", x, y) if op.adds_input else y
    graph.place = name
    if type(op) in TRANSLATIONS:
        return TRANSLATIONS[type(op)](op, graph, x)
    if isinstance(op, operators.Reordering):
        return _gathered(op, graph, x)
    kind = type(op).__name__
    raise UserError(
        f"{name}: an operator of type {kind} has no translation to ONNX: enter one (lipjax/shipping/onnx_registry.py), "
        "or ship the network by FrozenNetwork.export, a StableHLO program."
    )


def translation_of(*classes: type) -> Callable[[Callable], Callable]:
    """Decorator: enters a function as the translation of these classes."""

    def enter(function):
        for cls in classes:
            TRANSLATIONS[cls] = function
        return function

    return enter


def rank(op: operators.Operator) -> int:
    """The number of axes of its input, with that of the batch."""
    return 1 + len(op.in_shape)


def _gathered(op, graph: Graph, x: str) -> str:
    """Any operator that moves numbers: where each comes from, as it says itself; zeros from beyond the end."""
    count = math.prod(op.in_shape)
    numbered = np.arange(1, count + 1, dtype=np.float64).reshape(1, *op.in_shape)
    places = np.moveaxis(op.host_maps()[0](numbered)[0], -1, 0).astype(np.int64) - 1
    flat = graph.reshape(graph.transpose(x, channels_last(rank(op))), (0, count))
    if (places < 0).any():
        flat, places = graph.pad(flat, 2, {1: (0, 1)}), np.where(places < 0, count, places)
    moved = graph.add("Gather", flat, graph.constant(places.reshape(-1), "places"), axis=1)
    return graph.reshape(moved, (0, *places.shape))
