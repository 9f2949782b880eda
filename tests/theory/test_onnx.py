"""ONNX files: what onnxruntime computes of them is what the network is, within the proved bounds of float32 errors."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
from deployment_helpers import NETWORKS, U, evaluate, frozen_network, pixels
from test_deployment import float32_samples

from lipjax import FrozenNetwork, UserError, freeze, operators, shipping
from lipjax.certify import deployment
from lipjax.network import make_network
from lipjax.operators import softplus as elementary

LEVELS = [onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL]


def sessions(path):
    """Sessions of a file: as it is, and with all optimisations of the graph."""
    for level in LEVELS:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level, options.intra_op_num_threads = level, 1
        yield onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(session, images):
    return session.run(None, {"pixels": images.astype(np.float32)})[0].astype(np.float64)


def network_of(ops, *, classes=None, head=None):
    """A frozen network of some operators; on features of another shape than a vector, a Flatten follows."""
    ops = list(ops)
    if len(ops[-1].out_shape) > 1:
        ops.append(operators.Flatten(ops[-1].out_shape))
    count = ops[-1].out_shape[0]
    if head is None:
        head = operators.LinearHead(np.eye(classes or count, count), np.zeros(classes or count))
    return freeze(make_network([(f"op_{i}", op) for i, op in enumerate(ops)], head))


def errs_alike(frozen, images, path):
    """Whether a file errs as little as NumPy does in float32, in another order of sums: at most 20 times as much."""
    exact, single = (evaluate(frozen.network, images, dtype).astype(np.float64) for dtype in (object, np.float32))
    allowed = 20 * np.abs(single - exact).max() + U
    errors = [np.abs(run(session, images) - exact).max() for session in sessions(path)]
    assert np.abs(exact - exact[::-1]).max() > 100 * allowed  # control: images are told apart
    return max(errors) <= allowed


def rewritten(path):
    """What all optimisations of the graph make of a file: node types that were not there, and numbers that were not."""
    options, kept = onnxruntime.SessionOptions(), path.with_suffix(".optimised.onnx")
    options.graph_optimization_level, options.optimized_model_filepath = LEVELS[1], str(kept)
    options.log_severity_level = 3  # it warns that what it writes is for this machine
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    before, after = (onnx.load(file).graph for file in (path, kept))

    def numbers(graph):
        arrays = map(onnx.numpy_helper.to_array, graph.initializer)
        return {np.sort(array[array != 0]).tobytes() for array in arrays if array.dtype.kind == "f"}  # in any layout

    types = {node.op_type for node in after.node} - {node.op_type for node in before.node}
    return types, len(numbers(after) - numbers(before))


@pytest.mark.parametrize("name", NETWORKS)
def test_onnxruntime_computes_the_network(name, tmp_path):
    frozen, path = frozen_network(name), tmp_path / "network.onnx"
    frozen.to_onnx(path)
    assert errs_alike(frozen, pixels(frozen, 4), path)
    types, multiplied = rewritten(path)
    assert not multiplied and "FusedMatMul" not in types  # no constant is multiplied out, nor a factor joined to a sum


def test_onnxruntime_multiplies_no_scales_of_splines_out(tmp_path):
    rng, shape, path = np.random.default_rng(0), (4, 4, 3), tmp_path / "network.onnx"

    def spline(shape, spacing):
        values = np.cumsum(rng.uniform(-spacing, spacing, size=(shape[-1], 9)), axis=1)
        return operators.LinearSpline(values, rng.uniform(0.5, 2.0, shape[-1]), shape, spacing)

    def conv(channels):
        return operators.Conv(rng.normal(size=(3, 3, channels, 3)) / 5, (*shape[:2], channels))

    bias, flat = operators.Bias(rng.normal(size=3), shape), operators.Flatten(shape)
    narrow, wide = (operators.Dense(rng.normal(size=size)) for size in ((1, 48), (4, 1)))
    for spacing in (0.5, 1.0):  # a division by 1 is left out
        convolutions = [conv(2), spline(shape, spacing), conv(3), bias, spline(shape, spacing)]
        frozen = network_of([*convolutions, flat, narrow, spline((1,), spacing), wide])
        frozen.to_onnx(path)
        types, multiplied = rewritten(path)
        assert not multiplied and "FusedMatMul" not in types
        assert errs_alike(frozen, rng.uniform(size=(4, 4, 4, 2)), path)
    network_of([conv(2), bias, bias, flat]).to_onnx(path)
    assert rewritten(path)[1]  # control: it adds two biases up, of which the bounds do not speak (they are infinite)


@pytest.mark.nightly  # compiles the bounds of every operator
@pytest.mark.parametrize("name", NETWORKS)
def test_onnxruntime_errs_no_more_than_is_proved(name, tmp_path):
    frozen = frozen_network(name)
    images = pixels(frozen, 4)
    frozen.to_onnx(tmp_path / "network.onnx")
    bound, logits = deployment.float32_error(frozen, images), frozen(images, 4)
    for session in sessions(tmp_path / "network.onnx"):
        error = np.abs(run(session, images) - logits)
        assert (error <= bound).all() and error.max() > 1e-9  # float32 it was
        assert not (np.abs(run(session, images[::-1]) - logits) <= bound).all()  # control: the bound tells images apart


def test_every_operator_of_saved_networks_is_translated_and_tested():
    used = set()
    for name in NETWORKS:
        ops = list(frozen_network(name).network.ops)
        used |= {type(op) for op in ops}
        used |= {type(part) for op in ops if isinstance(op, operators.Composite) for part in op.parts()}
        assert all(map(shipping.translates, ops))
    assert used >= set(operators.OPERATORS.values())
    entered = set(shipping.TRANSLATIONS)
    moved = {c for c in operators.OPERATORS.values() if issubclass(c, operators.Reordering | operators.Composite)}
    assert set(operators.OPERATORS.values()) - moved <= entered and set(operators.HEADS.values()) <= entered


SHAPES = [
    ((5, 4, 3), (3, 2, 3, 4), 2, ((1, 0), (0, 2)), 1, 1),
    ((6, 4, 4), (3, 3, 2, 6), (3, 2), "CIRCULAR", 2, 1),
    ((3, 4, 2), (5, 4, 2, 3), 1, "CIRCULAR", 1, (2, 1)),  # taps that reach around more than once
    ((7, 7, 2), (3, 3, 2, 3), 2, "ZERO", 1, 2),
    ((4, 4, 2), (4, 4, 2, 3), 4, "VALID", 1, 1),
]


@pytest.mark.parametrize(("in_shape", "kernel", "strides", "padding", "groups", "dilation"), SHAPES)
def test_convolutions_and_their_adjoints(in_shape, kernel, strides, padding, groups, dilation, tmp_path):
    rng = np.random.default_rng(0)
    down = operators.Conv(rng.normal(size=kernel), in_shape, strides, padding, groups, dilation)
    for op in (down, operators.ConvTranspose(down)):
        frozen, images = network_of([op]), rng.uniform(size=(3, *op.in_shape))
        frozen.to_onnx(tmp_path / "network.onnx")
        assert errs_alike(frozen, images, tmp_path / "network.onnx")


def test_softplus_heads_and_vectors(tmp_path):
    rng = np.random.default_rng(0)
    arrays = (rng.normal(size=shape) for shape in ((5, 3), (5,), (4, 5), (4,)))
    frozen = network_of([operators.Dense(rng.normal(size=(3, 6)))], head=operators.MLPHead(*arrays))
    images = rng.uniform(size=(8, 6))
    frozen.to_onnx(tmp_path / "network.onnx")
    assert errs_alike(frozen, images, tmp_path / "network.onnx")


@pytest.mark.parametrize("name", ["Tanh", "Sigmoid", "Softplus"])
def test_elementary_functions_of_onnxruntime_err_as_little_as_assumed(name, tmp_path):
    x, path = float32_samples(), tmp_path / "function.onnx"
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(name, ["pixels"], ["y"])],
        name,
        [onnx.helper.make_tensor_value_info("pixels", 1, ["b"])],
        [onnx.helper.make_tensor_value_info("y", 1, ["b"])],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)
    exact = getattr(elementary, f"{name.lower()}_of")(x.astype(np.float64), np)
    allowed = {"Tanh": 12 * U, "Sigmoid": 8 * U, "Softplus": (16 + 2 * exact) * U}[name] + 2.0**-126
    for session in sessions(path):
        share = np.max(np.abs(run(session, x) - exact) / allowed)
        assert 0.01 < share < 1


def test_the_file_says_what_it_is(tmp_path):
    frozen = frozen_network("convolutional")
    for name in ("a.onnx", "b.onnx"):
        frozen.to_onnx(tmp_path / name)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    model = onnx.load(tmp_path / "a.onnx")
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["frozen_sha256"] == frozen.sha256() and "exact real arithmetic" in metadata["claim"]
    assert {opset.domain for opset in model.opset_import} == {""}  # plain operators alone
    assert json.loads(json.dumps(metadata)) == metadata


@operators.operator("matrix", static=())
class _Doubled(operators.Dense):
    def __call__(self, x):
        return 2 * super().__call__(x)


def test_what_has_no_translation_is_refused_by_name(tmp_path):
    head = operators.LinearHead(np.eye(2), np.zeros(2))
    network = make_network([("fine", operators.Dense(np.eye(2))), ("odd", _Doubled(np.eye(2)))], head)
    with pytest.raises(UserError, match="odd: an operator of type _Doubled has no translation"):
        FrozenNetwork(network).to_onnx(tmp_path / "network.onnx")
    huge = network_of([operators.Dense(np.diag([1.0, 1e39]))])
    with pytest.raises(UserError, match="op_0 holds numbers that float32 does not"):
        huge.to_onnx(tmp_path / "network.onnx")
    assert not list(tmp_path.iterdir())
