"""The ONNX file of a network."""

import importlib
import os
from collections.abc import Mapping

from lipjax.errors import UserError, require_extra
from lipjax.files import replacing
from lipjax.network import Network
from lipjax.shipping import onnx_activations, onnx_linear, onnx_moves  # noqa: F401  they enter their translations
from lipjax.shipping.onnx_graph import IR_VERSION, OPSET, Graph, channels_first
from lipjax.shipping.onnx_registry import translate

# A protocol buffer holds no more.
_MOST_BYTES = 2**31 - 2**20
INPUT, OUTPUT = "pixels", "logits"


def write_onnx(path: str | os.PathLike, network: Network, metadata: Mapping[str, str]) -> None:
    """Writes a network as an ONNX file; it appears whole or not at all. `FrozenNetwork.to_onnx` says what is in it.

    Args: network: of NumPy arrays. metadata: texts to keep in the file.
    Raises: UserError naming an operator without a translation, for numbers beyond float32 and for networks beyond 2 GB;
      MissingExtra without the package onnx.
    """
    require_extra("onnx", "onnx")
    onnx = importlib.import_module("onnx")
    graph, rank = Graph(), 1 + len(network.in_shape)
    x = graph.transpose(INPUT, channels_first(rank))
    chain = zip(("input", *network.names, "head"), (network.normalize, *network.ops, network.head), strict=True)
    for name, op in chain:
        x = translate(name, op, graph, x)
    graph.nodes[-1].output[0] = OUTPUT  # a head's last node gives the logits
    size = sum(len(constant.raw_data) for constant in graph.constants)
    if size > _MOST_BYTES:
        raise UserError(f"An ONNX file holds 2 GB at most, and this network has {size / 2**30:.1f} GB in float32.")
    floats = onnx.TensorProto.FLOAT
    values = (
        onnx.helper.make_tensor_value_info(INPUT, floats, ["b", *network.in_shape]),
        onnx.helper.make_tensor_value_info(OUTPUT, floats, ["b", network.num_classes]),
    )
    made = onnx.helper.make_graph(graph.nodes, "lipjax", values[:1], values[1:], graph.constants)
    opset = onnx.helper.make_opsetid("", OPSET)
    model = onnx.helper.make_model(made, opset_imports=[opset], producer_name="lipjax", ir_version=IR_VERSION)
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model, full_check=True)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(model.SerializeToString(deterministic=True))
