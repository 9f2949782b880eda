"""The operator protocol: its capabilities, what asks for them, and the one line that an operator is in print."""

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lipjax
from lipjax import FrozenNetwork, bounds, operators
from lipjax.attacks.input_gradient import of_images
from lipjax.certify import deployment
from lipjax.certify.layout import arrays_of, entry_of, rebuild
from lipjax.errors import NotCertifiable
from lipjax.network import Application, Network, make_network
from lipjax.operators.grid import on_grid

pytestmark = pytest.mark.quick_compiles

ROOT = Path(lipjax.__file__).parent
# Rooms that meet operators. The protocol itself may look at any attribute.
ROOMS = ("spectral", "operators", "parametrize", "bounds", "attacks", "certify", "nn", "models", "evaluation")
FILES = [*(path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))), *sorted(ROOT.glob("*.py"))]
PROTOCOL = ROOT / "operators" / "base.py"
# Attributes that are looked for on what is no operator: (file, attribute).
OF_OTHERS = {
    ("checker.py", "sched_getaffinity"),
    ("checker.py", "O_NONBLOCK"),
    ("verified.py", "sched_getaffinity"),
    ("pairs.py", "is_fully_addressable"),  # of an array
    ("channelwise.py", "is_fully_addressable"),  # of an array
    ("channelwise.py", "dtype"),  # of an array, or of what stands in its place
    ("layers.py", "name"),  # of the fields of a Flax module
    ("manifold.py", "key"),  # of the keys of a path in a tree
    ("manifold.py", "name"),
    ("manifold.py", "idx"),
    ("text.py", "shape"),  # of an array, or of what stands in its place
    ("__init__.py", "__name__"),
}


def probes(name, source):
    """What a source file asks of an operator but through the protocol, as readable lines."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            continue
        call, arguments = node.func.id, node.args
        if call == "hasattr" or call == "getattr" and len(arguments) == 3:
            asked = arguments[1].value if isinstance(arguments[1], ast.Constant) else ast.unparse(arguments[1])
            if (name, asked) not in OF_OTHERS:
                yield f"{name}:{node.lineno}: {ast.unparse(node)}"
        elif call == "isinstance" or call == "type":
            names = {n.attr if isinstance(n, ast.Attribute) else n.id for n in ast.walk(node) if hasattr(n, "ctx")
                     and isinstance(n, ast.Name | ast.Attribute)}  # fmt: skip
            if "Residual" in names:
                yield f"{name}:{node.lineno}: {ast.unparse(node)}"


def test_operators_are_asked_through_the_protocol_alone():
    found = [line for path in FILES if path != PROTOCOL for line in probes(path.name, path.read_text())]
    assert found == []
    assert len(FILES) > 60 and PROTOCOL in FILES


@pytest.mark.parametrize(
    "source",
    [
        "if hasattr(op, 'bound'): pass",
        "getattr(op, 'nonexpansive', False)",
        "isinstance(op, operators.Residual)",
        "isinstance(op, (Dense, Residual))",
        "isinstance(op, Dense | Residual)",
    ],
)
def test_a_probe_is_noticed(source):
    assert len(list(probes("product.py", source))) == 1
    assert not list(probes("product.py", "isinstance(op, Composite); getattr(op, name); op.bound()"))  # control


SHAPE = (4, 4, 2)
MADE = {
    "Bias(in (4, 4, 2))": operators.Bias(np.zeros(2), SHAPE),
    "CircularConv(2 -> 3, in (4, 4, 2))": operators.CircularConv(np.zeros((4, 3, 3, 2), complex), SHAPE),
    "Conv(3x3, 16 -> 16, in (32, 32, 16))": operators.Conv(np.zeros((3, 3, 16, 16)), (32, 32, 16)),
    "Conv(2x2, 2 -> 6, strides 2, padding CIRCULAR, in (4, 4, 2))": operators.Conv(
        np.zeros((2, 2, 2, 6)), SHAPE, 2, "CIRCULAR"
    ),
    "Conv(3x3, 16 -> 16, groups 4, in (32, 32, 16))": operators.Conv(np.zeros((3, 3, 4, 16)), (32, 32, 16), groups=4),
    "Conv(3x3, 2 -> 4, groups 2, dilation (1, 2), in (4, 4, 2))": operators.Conv(
        np.zeros((3, 3, 1, 4)), SHAPE, groups=2, dilation=(1, 2)
    ),
    "ConvTranspose(Conv(3x3, 2 -> 6, strides 2, in (4, 4, 2)))": operators.ConvTranspose(
        operators.Conv(np.zeros((3, 3, 2, 6)), SHAPE, 2)
    ),
    "ChannelShuffle(groups 2, in (4, 4, 2))": operators.ChannelShuffle(SHAPE, 2),
    "ConvExponential(3x3, 2 -> 2, num_terms 6, groups 2, in (4, 4, 2))": operators.ConvExponential(
        np.zeros((3, 3, 1, 2)), SHAPE, 6, groups=2
    ),
    "ConvExponential(3x3, 2 -> 2, num_terms 6, nonexpansive, in (4, 4, 2))": operators.ConvExponential(
        np.zeros((3, 3, 2, 2)), SHAPE, 6, nonexpansive=True
    ),
    "Crop(crops ((1, 0), (0, 2)), in (4, 4, 2))": operators.Crop(SHAPE, ((1, 0), (0, 2))),
    "CropChannels(channels 1, in (4, 4, 2))": operators.CropChannels(SHAPE, 1),
    "Dense(3 -> 5)": operators.Dense(np.zeros((5, 3))),
    "Flatten(in (4, 4, 2))": operators.Flatten(SHAPE),
    "Householder(in (4, 4, 2))": operators.Householder(np.ones((2, 1)), SHAPE),
    "Householder2(in (4, 4, 2))": operators.Householder2(np.ones((3, 2, 1)), SHAPE),
    "L2Pool(regions (2, 1), in (4, 4, 2))": operators.L2Pool(SHAPE, (2, 1)),
    "LeakyReLU(negative_slope 0.2, in (4, 4, 2))": operators.LeakyReLU(SHAPE, 0.2),
    "LinearSpline(spacing 0.5, in (4, 4, 2))": operators.LinearSpline(np.zeros((2, 5)), np.ones(2), SHAPE, 0.5),
    "MaxMin(in (4, 4, 2))": operators.MaxMin(SHAPE),
    "MaxPoolPairs(in (4, 4, 2))": operators.MaxPoolPairs(SHAPE),
    "NActivation(in (4, 4, 2))": operators.NActivation(np.zeros(2), np.ones(2), SHAPE),
    "PartialAbs(in (4, 4, 2))": operators.PartialAbs(SHAPE),
    "PadChannels(channels 5, in (4, 4, 2))": operators.PadChannels(SHAPE, 5),
    "PotentialStep(Dense(3 -> 5), ReLU(in (5,)), nonexpansive)": operators.PotentialStep(
        operators.Dense(np.zeros((5, 3))), np.zeros(5), operators.ReLU((5,)), nonexpansive=True
    ),
    "ProjectionPool(in (4, 4, 2))": operators.ProjectionPool(np.ones((2, 1)), SHAPE),
    "ReLU(in (4, 4, 2))": operators.ReLU(SHAPE),
    "Residual(Dense(4 -> 4), ReLU(in (4,)))": operators.Residual((operators.Dense(np.eye(4)), operators.ReLU((4,)))),
    "Sandwich(Dense(3 -> 5), Tanh(in (5,)), outputs 2)": operators.Sandwich(
        operators.Dense(np.zeros((5, 3))), np.zeros(5), operators.Tanh((5,)), 2
    ),
    "PositionalBias(in (4, 4, 2))": operators.PositionalBias(np.zeros((4, 4, 1)), SHAPE),
    "Shift(channels 2, in (4, 4, 8))": operators.Shift((4, 4, 8), 2),
    "Sigmoid(in (4, 4, 2))": operators.Sigmoid(SHAPE),
    "Softplus(in (4, 4, 2))": operators.Softplus(SHAPE),
    "SpaceToDepth(block 2, in (4, 4, 2))": operators.SpaceToDepth(SHAPE, 2),
    "Tanh(in (4, 4, 2))": operators.Tanh(SHAPE),
    "ZeroPad(pads ((1, 0), (0, 2)), in (4, 4, 2))": operators.ZeroPad(SHAPE, ((1, 0), (0, 2))),
    "LinearHead(4 -> 10)": operators.LinearHead(np.zeros((10, 4)), np.zeros(10)),
    "MLPHead(4 -> 7 -> 10)": operators.MLPHead(np.zeros((7, 4)), np.zeros(7), np.zeros((10, 7)), np.zeros(10)),
    "Normalize(in (4, 4, 2))": operators.Normalize(np.zeros(1), np.ones(1), SHAPE),
    "Contraction(Dense(3 -> 5))": operators.Contraction(operators.Dense(np.zeros((5, 3)))),
    "Centering(in (4, 4, 2))": operators.Centering(SHAPE),
    "Centered(Dense(4 -> 4))": operators.Centered(operators.Dense(np.eye(4))),
}


@pytest.mark.parametrize("text", MADE)
def test_an_operator_is_one_line_whatever_its_leaves_are(text):
    op = MADE[text]
    assert repr(op) == text
    traced = []
    jax.jit(lambda op: traced.append(repr(op)))(op)
    shapes = jax.eval_shape(lambda op: op, jax.tree.map(jnp.asarray, op))
    assert traced == [text] and repr(shapes) == text  # tracers, ShapeDtypeStruct
    for leaf in (None, object(), 1.5):
        empty = repr(jax.tree.map(lambda _, leaf=leaf: leaf, op))
        assert empty.startswith(type(op).__name__ + "(") and "object at" not in empty
    _, structure = jax.tree.flatten(op)
    assert "..." not in repr(jax.tree.unflatten(structure, [jnp.ones(300)] * structure.num_leaves))


def test_every_operator_has_its_line():
    shown = {type(op) for op in MADE.values()}
    assert {*operators.OPERATORS.values(), *operators.HEADS.values()} <= shown


def net(depth=2):
    dense = operators.Dense(np.eye(4))
    layers = [(f"block{i}/{kind}", op) for i in range(depth) for kind, op in (("linear", dense), ("act", RELU))]
    return make_network([("first", dense), *layers], operators.LinearHead(np.eye(4), np.zeros(4)))


RELU = operators.ReLU((4,))


def test_a_network_is_a_table_of_a_few_lines():
    network = net(40)
    wanted = """\
Network of 81 operators and a head
  first          Dense(4 -> 4)
  block0/linear  Dense(4 -> 4)
  block0/act     ReLU(in (4,))
  ... block39    40 layers like block0
  head           LinearHead(4 -> 4)"""
    assert repr(network) == wanted
    assert repr(FrozenNetwork(network)) == wanted.replace("Network", "FrozenNetwork")
    assert repr(jax.tree.map(lambda _: None, network)).startswith("Network of 81 operators and a head\n")
    widths = [operators.Dense(np.zeros((n + 2, n + 1))) for n in range(60)]  # no two alike
    long = make_network([(f"d{i}", op) for i, op in enumerate(widths)], operators.LinearHead(np.eye(61), np.zeros(61)))
    lines = repr(long).splitlines()
    assert len(lines) == 25 and lines[13].split() == ["...", "38", "more"]
    assert lines[12].split()[0] == "d11" and lines[14].split()[0] == "d50" and lines[-1].split()[0] == "head"


@operators.operator("first", "second", static=("note",))
class Pair(operators.Composite):
    """x -> x + second(relu(first(x))): a composite of one file, that no walk knows by name."""

    first: operators.Leaf
    second: operators.Leaf
    note: str = ""
    adds_input = True

    @property
    def in_shape(self):
        return self.first.in_shape

    @property
    def out_shape(self):
        return self.first.in_shape

    def parts(self):
        return self.first, operators.ReLU(self.first.out_shape), self.second

    def with_parts(self, parts):
        return operators.Residual(parts)

    def lipschitz_of(self, product):
        return 1 + product


def test_a_new_composite_adds_one_file(monkeypatch):
    """Evaluation, errors, float32, estimates, plans, gradients and files take it as the Residual of the same parts."""
    monkeypatch.setitem(operators.OPERATORS, "Pair", Pair)
    rng = np.random.default_rng(0)
    first, second = operators.Dense(rng.normal(size=(6, 4)) / 3), operators.Dense(rng.normal(size=(4, 6)) / 3)
    head = operators.LinearHead(rng.normal(size=(3, 4)), np.zeros(3))
    pair = Pair(first, second, "a note")
    made = {name: make_network([("block", op)], head) for name, op in (("new", pair), ("old", of_parts(pair)))}
    frozen = {name: FrozenNetwork(network) for name, network in made.items()}
    images = rng.uniform(size=(5, 4))
    for name in ("predictions", "margins", "radii"):
        new, old = (getattr(f.certify(images), name) for f in frozen.values())
        np.testing.assert_array_equal(new, old)
    assert (frozen["new"].certify(images).radii > 0).any()
    with jax.numpy_dtype_promotion("standard"):  # the errors count terms in integers
        new, old = (deployment.float32_error(f, images) for f in frozen.values())
    np.testing.assert_array_equal(new, old)
    assert np.isfinite(new).all() and (new > 0).all()
    new, old = (f.norm_estimates() for f in frozen.values())
    assert new == old and new["block"] > 1
    small = {name: jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), network) for name, network in made.items()}
    x = jnp.asarray(images, jnp.float32)
    plan = Application(precision="bfloat16")
    new, old = (network.features_and_means(x, plan)[0] for network in small.values())
    np.testing.assert_array_equal(new, old)
    new, old = (jax.grad(lambda x, n=network: of_images(n)(x).sum())(x) for network in small.values())
    np.testing.assert_allclose(new, old)
    assert isinstance(on_grid(pair), operators.Composite)
    entry = entry_of(pair)
    document = {"ops": [{"name": "block", **entry}], "head": "LinearHead"}
    pixels = {"input_mean": np.zeros(1), "input_std": np.ones(1)}
    arrays = {**arrays_of("ops/block", pair), **arrays_of("head", head), **pixels}
    again = rebuild(document, arrays).ops[0]
    assert isinstance(again, Pair) and again.note == "a note" and set(arrays) > {"ops/block/first/matrix"}
    np.testing.assert_array_equal(again.second.matrix, second.matrix)


def of_parts(composite):
    return operators.Residual(composite.parts())


def test_what_lacks_a_capability_is_refused_by_name():
    class Nothing(operators.Operator):
        in_shape = out_shape = (4,)

        def __call__(self, x):
            return x

    head = operators.LinearHead(np.eye(4), np.zeros(4))
    network = make_network([("strange", Nothing())], head)
    with pytest.raises(NotCertifiable, match="strange: no proved Lipschitz bound is known .* type Nothing"):
        bounds.operator_bounds(network)
    with pytest.raises(NotCertifiable, match="rounding error is known for an operator of type Nothing"):
        Nothing().rounding_error(np.zeros((1, 4)))
    with pytest.raises(ValueError, match="strange: expected an operator, .* got a function"):
        make_network([("strange", lambda x: x)], head)
    with pytest.raises(TypeError, match="abstract"):
        operators.Operator()  # pyright: ignore[reportAbstractUsage]
    assert isinstance(network, Network)
