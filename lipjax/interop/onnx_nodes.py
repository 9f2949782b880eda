"""The nodes of an ONNX graph, read into an assembly one by one.

Nodes that move numbers about are not recognised by how they are written but carried out, on numbers that say where each
one comes from: whatever slices, splits, transposes and concatenations an exporter wrote for a sort of pairs, what
arrives is the larger and the smaller of known numbers in a known order.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from lipjax.errors import UserError
from lipjax.interop.assembly import Assembly

DOMAINS = ("", "ai.onnx")  # of ONNX's own operators, both names
_RANDOM = ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor with its batch axis of 1, as labels: below n, the number of the network's numbers there, a place; from
    there on the smaller or the larger of two places, n + 2 (low n + high) + (0 or 1).

    generation: of the assembly whose places are meant.
    """

    labels: np.ndarray
    generation: int


class Reader:
    """Reads a graph into an assembly, node by node."""

    def __init__(self, model, assembly: Assembly, known: dict[str, Any], nodes: "dict[str, Callable[..., list]]"):
        """known: constants by name, and the input's tensor. nodes: by type, (reader, node, inputs) -> outputs."""
        self._model, self.assembly, self._known, self._nodes = model, assembly, known, nodes
        self._comparison = ""

    def value(self, name: str) -> Any:
        """A tensor, or a constant; None for what nothing gives."""
        return self._known.get(name)

    def read(self, node) -> None:
        """Takes in one node. Raises: UserError naming it where it is not supported."""
        label = f"Node {node.name or ', '.join(node.output)!r} ({node.op_type})"
        inputs: list[Any] = [self._known.get(name) if name else None for name in node.input]
        missing = [name for name in node.input if name and name not in self._known]
        if missing:
            raise UserError(f"{label} reads {missing}, which nothing before it gives.")
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        try:
            if node.domain not in DOMAINS:
                raise UserError(f"is of the domain {node.domain!r}: expected ONNX's own operators.")
            if node.op_type in _RANDOM:
                raise UserError("draws random numbers: export the network for inference.")
            if not tensors:
                self._known |= self._run(node, dict(zip(node.input, inputs, strict=True)))
                return
            if any(value.generation != self.assembly.generation for value in tensors):
                raise UserError(
                    "reads what a layer gave before others changed it: branches, such as residual connections, are not "
                    "supported."
                )
            if node.op_type not in self._nodes:
                raise UserError(f"is not supported: expected a chain of {', '.join(sorted(self._nodes))}.")
            name = (node.name or f"{node.op_type}_{node.output[0]}").strip("/").replace("/", ".")
            found = self._nodes[node.op_type](self, Node(node, name), inputs)
        except (LookupError, TypeError, ValueError) as error:
            text = str(error) if isinstance(error, UserError) else f"is not as expected: {error}"
            raise UserError(f"{label}: {text}") from error
        self._known |= {output: value for output, value in zip(node.output, found, strict=False) if output}

    def _run(self, node, values: dict[str, np.ndarray]) -> dict[str, Any]:
        """What the reference implementation of ONNX makes of arrays."""
        import onnx
        import onnx.reference

        def named(names):
            return [onnx.ValueInfoProto(name=name) for name in names if name]

        given = {name: value for name, value in values.items() if name}
        graph = onnx.helper.make_graph([node], "node", named(given), named(node.output))
        single = onnx.helper.make_model(graph, opset_imports=self._model.opset_import)
        names = [name for name in node.output if name]
        try:
            return dict(zip(names, onnx.reference.ReferenceEvaluator(single).run(names, given), strict=True))
        except Exception as error:  # of whatever class: of a branch that reads what the network computes, for one
            raise UserError(f"cannot be computed by itself ({type(error).__name__}: {error}).") from error

    def move(self, node: "Node", inputs: list) -> list:
        """Moves the labels of numbers as a node moves the numbers."""
        concat = node.op_type == "Concat"
        if any(isinstance(value, Tensor) != (concat or i == 0) for i, value in enumerate(inputs) if value is not None):
            raise UserError("mixes numbers of the network with constants.")
        values = [value.labels if isinstance(value, Tensor) else value for value in inputs]
        found = self._run(node.proto, dict(zip(node.proto.input, values, strict=True)))
        return [Tensor(found[name], self.assembly.generation) if name else None for name in node.proto.output]

    def enter(self, value: Any, rank: int | None = None) -> None:
        """Makes a tensor the one that the assembly's next layer takes. rank: its axes, the batch included."""
        labels = self.plain(value)[0].labels
        if labels.shape[:1] != (1,) or (rank is not None and labels.ndim != rank):
            raise UserError(f"expected a batch of {rank} axes, got shape {labels.shape} for a single image.")
        if not np.array_equal(np.sort(labels, axis=None), np.arange(self.assembly.places.size)):
            raise UserError("leaves numbers of the layer before out, or takes some twice.")
        self.assembly.places = labels[0]

    def left(self) -> list[Tensor]:
        """The tensor that the assembly's last layer gave."""
        return [Tensor(self.assembly.places[None], self.assembly.generation)]

    def plain(self, *values: Any) -> list[Tensor]:
        """The tensors; if pairs are compared in them, once the assembly has sorted these.

        Raises: UserError for what is no tensor.
        """
        for value in values:
            if not isinstance(value, Tensor):
                got = "nothing" if value is None else "a constant"
                raise UserError(f"expected numbers that the network computes, got {got}.")
        count, generation = self.assembly.places.size, self.assembly.generation
        codes = np.unique(np.concatenate([value.labels.ravel() for value in values]))
        if (codes < count).all():
            return list(values)
        if (codes < count).any():
            raise UserError("mixes numbers with the larger or smaller of two.")
        pairs, larger = np.divmod(codes - count, 2)
        self.assembly.sort_pairs(self._comparison, pairs // count, pairs % count, larger.astype(bool))
        places, now = self.assembly.places, self.assembly.generation

        def sorted_(value: Tensor) -> Tensor:
            return Tensor(places[np.searchsorted(codes, value.labels)], now)

        for name, value in self._known.items():
            if isinstance(value, Tensor) and value.generation == generation and np.isin(value.labels, codes).all():
                self._known[name] = sorted_(value)
        return [sorted_(value) for value in values]

    def compared(self, name: str, first: np.ndarray, second: np.ndarray, larger: bool) -> Tensor:
        """The larger or smaller of plain labels at every position, by a node of this name."""
        if first.shape != second.shape or (first == second).any():
            raise UserError(f"expected two different numbers to compare, got shapes {first.shape} and {second.shape}.")
        count, self._comparison = self.assembly.places.size, name
        low, high = np.minimum(first, second), np.maximum(first, second)
        return Tensor(count + 2 * (low * count + high) + larger, self.assembly.generation)


class Node:
    """A node with the name of its layer, and attributes by name."""

    def __init__(self, proto, name: str):
        import onnx

        self.proto, self.name, self.op_type = proto, name, proto.op_type
        self._attributes = {item.name: onnx.helper.get_attribute_value(item) for item in proto.attribute}

    def get(self, name: str, default: Any = None) -> Any:
        value = self._attributes.get(name, default)
        return value.decode() if isinstance(value, bytes) else value

    def expect(self, **values) -> None:
        """Raises: UserError unless attributes are as given, or missing."""
        for name, value in values.items():
            if name in self._attributes and self.get(name) != value:
                raise UserError(f"expected {name}={value}, got {self.get(name)}.")
