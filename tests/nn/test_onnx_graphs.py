"""Networks from ONNX files: those of PyTorch's two exporters (tests/golden/make_sequential.py), and made ones."""

import importlib.util

import golden_helpers
import jax.numpy as jnp
import numpy as np
import pytest
from golden_helpers import nhwc, relative

import lipjax
from lipjax import interop
from lipjax.errors import MissingExtra, UserError
from lipjax.interop.assembly import Assembly

onnx = pytest.importorskip("onnx")
helper = pytest.importorskip("onnx.helper")

# The files hold the network in float32, whose arrays are those of float64, but for what the exporter folds in float32.
PARITY = {"script": 1e-6, "dynamo": 1e-6}
RNG = np.random.default_rng(0)
KERNEL = RNG.normal(size=(4, 2, 3, 3)).astype(np.float32)
MATRIX = RNG.normal(size=(3, 64)).astype(np.float32)


@pytest.mark.parametrize("exporter", ["script", "dynamo"])
@pytest.mark.parametrize("name", ["conv", "dense", "last"])
def test_exported_networks_give_the_logits_of_torch(name, exporter, tmp_path):
    arrays, meta = golden_helpers.load(f"sequential_{name}")
    (tmp_path / "net.onnx").write_bytes(arrays[f"onnx/{exporter}"].tobytes())
    frozen = lipjax.freeze(interop.from_onnx(tmp_path / "net.onnx", compare=name == "last"))
    assert frozen.in_shape == (*meta["input_shape"][1:], meta["input_shape"][0])
    assert relative(frozen(nhwc(arrays["input/x"])), arrays["output/logits"]) < PARITY[exporter]


def save(path, nodes, arrays, shape=("b", 2, 4, 4), opset=20, kind=1):
    """An ONNX file of nodes (type, inputs, outputs, attributes); x is its input and y its output."""
    made = [
        helper.make_node(op, list(inputs), list(outputs), name=f"/{i}/{op}", **attributes)
        for i, (op, inputs, outputs, attributes) in enumerate(nodes)
    ]
    values = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in arrays.items()]
    ends = [helper.make_tensor_value_info(name, kind, size) for name, size in (("x", shape), ("y", ("b", "k")))]
    graph = helper.make_graph(made, "net", ends[:1], ends[1:], values)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.example", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets), path)
    return path


CONV = ("Conv", ("x", "k"), ("a",), {"pads": [1, 1, 1, 1]})
FLAT = ("Flatten", ("a",), ("f",), {})
DENSE = ("Gemm", ("f", "m"), ("y",), {"transB": 1, "alpha": 0.5})
ARRAYS = {"k": KERNEL, "m": MATRIX}
END = [("Flatten", ("f",), ("g",), {}), ("Gemm", ("g", "m"), ("y",), {"transB": 1})]
PIXELS = np.random.default_rng(1).uniform(size=(2, 4, 4, 2))


def logits(a):
    """Of the layers behind `a`, (b, 4, 4, 4) as NCHW."""
    return a.reshape(len(a), -1) @ MATRIX.T.astype(np.float64) * 0.5


def convolved(x):
    conv = lipjax.conv.conv2d(*map(jnp.asarray, (x, np.moveaxis(KERNEL, (0, 1), (3, 2)).astype(np.float64))))
    return np.moveaxis(np.asarray(conv), -1, 1)


def read(path, **options):
    return lipjax.freeze(interop.from_onnx(path, **options))(PIXELS)


def sorted_pairs(a):
    return np.sort(a.reshape(len(a), 2, 2, 4, 4), axis=2).reshape(a.shape)


# Two sorts, one written by slices and gathers, one by a transposition, a reduction and a concatenation.
BY_SLICES = [
    ("Slice", ("a", "zero", "four", "one", "two"), ("even",), {}),
    ("Gather", ("a", "odd"), ("uneven",), {"axis": 1}),
    ("Min", ("even", "uneven"), ("low",), {}),
    ("Max", ("uneven", "even"), ("high",), {}),
    ("Unsqueeze", ("low", "two"), ("low_",), {}),
    ("Unsqueeze", ("high", "two"), ("high_",), {}),
    ("Concat", ("low_", "high_"), ("both",), {"axis": 2}),
    ("Reshape", ("both", "size"), ("s",), {}),
]
BY_REDUCTION = [
    ("Transpose", ("a",), ("t",), {"perm": [2, 0, 3, 1]}),
    ("Reshape", ("t", "apart"), ("p",), {}),
    ("ReduceMin", ("p", "last"), ("low",), {"keepdims": 1}),
    ("ReduceMax", ("p", "last"), ("high",), {"keepdims": 1}),
    ("Concat", ("low", "high"), ("both",), {"axis": -1}),
    ("Reshape", ("both", "turned"), ("r",), {}),
    ("Transpose", ("r",), ("s",), {"perm": [1, 3, 0, 2]}),
]
INTEGERS = {
    **{"zero": [0], "one": [1], "two": [2], "four": [4], "odd": [1, 3], "last": [-1], "size": [0, 4, 4, 4]},
    **{"apart": [4, -1, 4, 2, 2], "turned": [4, -1, 4, 4]},
}
INTEGERS = {name: np.array(value) for name, value in INTEGERS.items()}


@pytest.mark.parametrize("sort", [BY_SLICES, BY_REDUCTION])
def test_a_sort_is_known_however_it_is_written(sort, tmp_path):
    flat = ("Flatten", ("s",), ("f",), {})
    path = save(tmp_path / "net.onnx", [CONV, *sort, flat, DENSE], {**ARRAYS, **INTEGERS})
    network = interop.from_onnx(path)
    assert [type(op).__name__ for op in network.ops] == ["Conv", "MaxMin", "Flatten"]
    np.testing.assert_allclose(lipjax.freeze(network)(PIXELS), logits(sorted_pairs(convolved(PIXELS))), rtol=1e-12)


def test_pixels_are_normalised_and_constants_computed_first(tmp_path):
    nodes = [
        ("Mul", ("x", "double"), ("u",), {}),
        ("Sub", ("u", "mean"), ("v",), {}),
        ("Neg", ("minus",), ("k",), {}),
        ("Conv", ("v", "k"), ("a",), {"pads": [1, 1, 1, 1]}),
        ("Shape", ("a",), ("shape",), {}),
        ("Gather", ("shape", "first"), ("batch",), {}),
        ("Concat", ("batch", "rest"), ("size",), {"axis": 0}),
        ("Reshape", ("a", "size"), ("f",), {}),
        DENSE,
    ]
    mean = np.array([0.5, 0.25], np.float32).reshape(1, 2, 1, 1)
    arrays = {"double": np.float32(2), "mean": mean, "minus": -KERNEL, "m": MATRIX}
    path = save(tmp_path / "net.onnx", nodes, {**arrays, "first": np.array([0]), "rest": np.array([-1])})
    network = interop.from_onnx(path)
    assert np.array_equal(network.input_std, [0.5, 0.5]) and np.array_equal(network.input_mean, [0.25, 0.125])
    expected = logits(convolved(2 * PIXELS - mean.reshape(2)))
    np.testing.assert_allclose(lipjax.freeze(network)(PIXELS), expected, rtol=1e-12)


def test_padding_is_that_of_auto_pad(tmp_path):
    nodes = [("Conv", ("x", "k"), ("a",), {"auto_pad": "VALID", "pads": [1, 1, 1, 1]}), FLAT, DENSE]
    path = save(tmp_path / "net.onnx", nodes, {**ARRAYS, "m": MATRIX[:, :16]})
    expected = convolved(PIXELS)[:, :, 1:-1, 1:-1].reshape(2, 16) @ MATRIX[:, :16].T.astype(np.float64) * 0.5
    np.testing.assert_allclose(read(path, compare=False), expected, rtol=1e-12)


def test_means_over_all_pixels(tmp_path):
    matrix = RNG.normal(size=(4, 5)).astype(np.float32)
    for mean in (("ReduceMean", ("a", "axes"), ("g",), {"keepdims": 0}), ("GlobalAveragePool", ("a",), ("h",), {})):
        flat = [("Flatten", ("h",), ("g",), {})] if mean[0] == "GlobalAveragePool" else []
        nodes = [CONV, mean, *flat, ("MatMul", ("g", "w"), ("z",), {}), ("Add", ("z", "b"), ("y",), {})]
        arrays = {"k": KERNEL, "w": matrix, "b": np.arange(5, dtype=np.float32), "axes": np.array([-1, 2])}
        expected = convolved(PIXELS).mean((2, 3)) @ matrix.astype(np.float64) + np.arange(5)
        np.testing.assert_allclose(read(save(tmp_path / "net.onnx", nodes, arrays)), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (
            [CONV, ("Relu", ("a",), ("r",), {}), ("Add", ("r", "a"), ("f",), {})],
            "'?/2/Add'? \\(Add\\): reads what a layer",
        ),
        ([CONV, ("Add", ("a", "a"), ("f",), {})], "/1/Add.*expected one operand that is constant"),
        (
            [
                *(("Mul", ("x", "double"), ("a",), {}), ("Slice", ("a", "zero", "one", "one"), ("scaled",), {})),
                ("Slice", ("x", "one", "two", "one"), ("raw",), {}),
                ("Concat", ("scaled", "raw"), ("c",), {"axis": 1}),
                ("Conv", ("c", "k"), ("f",), {"pads": [1, 1, 1, 1]}),
            ],
            "/2/Slice.*reads what a layer gave before others changed it",
        ),
        (
            [CONV, ("Flatten", ("a",), ("e",), {}), ("Gemm", ("m", "e"), ("f",), {"transB": 1})],
            "/2/Gemm.*expected numbers that the network computes, got a constant",
        ),
        ([CONV, ("ReduceMax", ("a", "nine"), ("f",), {})], "/1/ReduceMax.*out of range"),
        ([("Neg", ("k",), ("f",), {"domain": "com.example"})], "/0/Neg.*is of the domain 'com.example'"),
        (
            [CONV, ("MaxPool", ("a",), ("f",), {"kernel_shape": [2, 2]})],
            "/1/MaxPool.* is not supported: expected a chain",
        ),
        ([CONV, ("Max", ("a", "one"), ("f",), {})], "/1/Max.*two tensors"),
        ([CONV, ("Gather", ("a", "odd"), ("f",), {"axis": 1})], "/2/Flatten|/3/Gemm.*leaves numbers"),
        ([CONV, ("Concat", ("a", "k"), ("f",), {"axis": 0})], "/1/Concat.*mixes"),
        ([CONV, ("Mul", ("a", "pixels"), ("f",), {})], "/1/Mul.*one number for each channel"),
        ([CONV, ("Cast", ("a",), ("f",), {"to": 10})], "/1/Cast.*rounds"),
        ([CONV, ("ReduceMax", ("a", "last"), ("f",), {})], "/1/ReduceMax.*an axis of two"),
        ([("Conv", ("x", "k"), ("f",), {"auto_pad": "SAME_UPPER"})], "/0/Conv.*auto_pad"),
        ([CONV, ("AveragePool", ("a",), ("f",), {"kernel_shape": [2, 2], "pads": [1, 1, 1, 1]})], "count_include_pad"),
        (
            [CONV, ("Transpose", ("a",), ("f",), {"perm": [0, 1, 3, 2]}), ("Conv", ("f", "l"), ("g",), {})],
            "in their order",
        ),
        ([("RandomNormal", (), ("f",), {"shape": [1, 64]})], "/0/RandomNormal.*random"),
        ([CONV, ("Dropout", ("a", "half", "yes"), ("f",), {})], "/1/Dropout.*training mode"),
    ],
)
def test_what_is_not_supported_is_refused_by_the_name_of_its_node(nodes, message, tmp_path):
    arrays = {**ARRAYS, **INTEGERS, "pixels": np.arange(16, dtype=np.float32).reshape(4, 4)}
    arrays |= {"double": np.float32(2), "nine": np.array([9])}
    arrays |= {"l": np.ones((4, 4, 1, 1), np.float32), "half": np.float32(0.5), "yes": np.array(True)}
    path = save(tmp_path / "net.onnx", [*nodes, *(END if "g" not in nodes[-1][2] else END[1:])], arrays)
    with pytest.raises(UserError, match=message):
        interop.from_onnx(path)


def test_a_branch_that_reads_what_the_network_computes_is_refused(tmp_path):
    branches = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node(op, ["a"], ["out"])], name, [], [helper.make_tensor_value_info("out", 1, None)]
        )
        for name, op in (("then", "Relu"), ("else", "Tanh"))
    }
    nodes = [CONV, ("If", ("flag",), ("r",), branches), ("Flatten", ("r",), ("f",), {}), DENSE]
    path = save(tmp_path / "net.onnx", nodes, {**ARRAYS, "flag": np.array(True)})
    with pytest.raises(UserError, match=r"Node '/1/If' \(If\): cannot be computed by itself"):
        interop.from_onnx(path)


def test_an_output_without_a_name_is_one_that_nothing_reads(tmp_path):
    split = ("Split", ("a", "sizes"), ("", "f", ""), {"axis": 1})
    path = save(tmp_path / "net.onnx", [CONV, split, *END], {**ARRAYS, "sizes": np.array([1, 2, 1])})
    with pytest.raises(UserError, match="/2/Flatten|/3/Gemm.*leaves numbers"):
        interop.from_onnx(path)
    split = ("Split", ("a", "sizes"), ("f", ""), {"axis": 1})
    path = save(tmp_path / "net.onnx", [CONV, split, *END], {**ARRAYS, "sizes": np.array([4, 0])})
    np.testing.assert_allclose(read(path, compare=False), 2 * logits(convolved(PIXELS)), rtol=1e-12)


def test_files_that_are_no_chain_of_one_image_are_refused(tmp_path):
    nodes, path = [CONV, FLAT, DENSE], tmp_path / "net.onnx"
    with pytest.raises(UserError, match="whose first axis, the batch, is open or 1"):
        interop.from_onnx(save(path, nodes, ARRAYS, (3, 2, 4, 4)))
    with pytest.raises(UserError, match="float32 or float64"):
        interop.from_onnx(save(path, nodes, ARRAYS, kind=10))
    save(path, nodes, ARRAYS, ("b", 2, "h", 4))
    with pytest.raises(UserError, match="give an input_shape"):
        interop.from_onnx(path)
    np.testing.assert_allclose(read(path, input_shape=(2, 4, 4)), logits(convolved(PIXELS)), rtol=1e-12)
    with pytest.raises(UserError, match="Expected opset 13 or later, got \\[12\\]"):
        interop.from_onnx(save(path, nodes, ARRAYS, opset=12))
    read(save(path, nodes, ARRAYS, opset=13), compare=False)  # the control
    with pytest.raises(UserError, match="Output 'y': expected numbers that the network computes, got a constant"):
        interop.from_onnx(save(path, [CONV, ("Neg", ("m",), ("y",), {})], ARRAYS))
    path.write_text("no network")
    with pytest.raises(UserError, match="holds no ONNX network"):
        interop.from_onnx(path)


def test_what_computes_something_else_is_noticed(tmp_path, monkeypatch):
    path = save(tmp_path / "net.onnx", [CONV, FLAT, DENSE], ARRAYS)
    before = Assembly.dense

    def careless(self, name, weight, bias):  # takes the columns in our order
        self.places = np.sort(self.places.ravel())
        before(self, name, weight, bias)

    monkeypatch.setattr(Assembly, "dense", careless)
    with pytest.raises(UserError, match="reference implementation differ by up to"):
        interop.from_onnx(path)


def test_without_the_package_the_extra_is_named(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "onnx" else found(name, *rest))
    with pytest.raises(MissingExtra, match="lipjax\\[onnx\\]"):
        interop.from_onnx("net.onnx")
