"""Networks from PyTorch's layers: logits of torch itself (tests/golden/make_sequential.py), and what is refused."""

import contextlib
import sys
import types

import golden_helpers
import numpy as np
import pytest
from golden_helpers import nhwc, relative
from tiers import everyday

import lipjax
from lipjax import interop
from lipjax.certify.document import write_certificate
from lipjax.checker import main as check
from lipjax.errors import UserError
from lipjax.interop.assembly import Assembly

PARITY = 1e-12  # float64 on both sides
NAMES = ("around", "conv", "dense", "last")
NEIGHBOURS = {"pairs": "neighbours", "first": "min"}


def layers_of(name):
    """The tuples of a golden network, its arrays and metadata."""
    arrays, meta = golden_helpers.load(f"sequential_{name}")
    state = {key.removeprefix("param/"): value for key, value in arrays.items() if key.startswith("param/")}
    layers = [(kind, {a: state[key] for a, key in names.items()}, options) for kind, names, options in meta["layers"]]
    return layers, arrays, tuple(meta["input_shape"])


@pytest.mark.parametrize("name", everyday(NAMES, "conv", "last"))
def test_logits_are_those_of_torch(name):
    layers, arrays, shape = layers_of(name)
    frozen = lipjax.freeze(interop.from_sequential(layers, shape))
    assert relative(frozen(nhwc(arrays["input/x"])), arrays["output/logits"]) < PARITY


@pytest.mark.parametrize(("name", "place"), [("conv", 2), ("last", 1)])
def test_other_pairs_are_another_network(name, place):
    layers, arrays, shape = layers_of(name)
    layers[place] = ("maxmin", {}, {**layers[place][2], "pairs": "halves"})
    frozen = lipjax.freeze(interop.from_sequential(layers, shape))
    assert relative(frozen(nhwc(arrays["input/x"])), arrays["output/logits"]) > 1e-3


def test_what_is_read_is_certified_and_checked(tmp_path):
    layers, arrays, shape = layers_of("conv")
    frozen = lipjax.freeze(interop.from_sequential(layers, shape))
    pixels = np.round(255 * np.moveaxis(arrays["input/x"], 1, -1)).astype(np.uint8)
    certificate = frozen.certify(pixels / 255)
    assert (certificate.radii > 0).any()
    about = {"name": "made up", "split": "test", "num_images": 3, "of": 3, "pixel_max": 255, "sha256": "0" * 64}
    frozen.save(tmp_path / "frozen")
    write_certificate(tmp_path, frozen, certificate, pixels, certificate.predictions, about)
    assert check([str(tmp_path)]) == 0


def test_normalisations_compose():
    shape, mean, std = (2, 3, 3), np.array([0.5, 0.25]), np.array([0.5, 2.0])
    layers = [("normalize", {"mean": mean, "std": std}), ("flatten",), ("linear", {"weight": np.eye(18)[::3]})]
    given = {"input_mean": (0.1, 0.2), "input_std": (0.25, 0.5)}
    network = interop.from_sequential(layers, shape, **given)
    np.testing.assert_allclose(network.input_std, [0.125, 1.0], rtol=1e-15)
    np.testing.assert_allclose(network.input_mean, [0.1 + 0.25 * 0.5, 0.2 + 0.5 * 0.25], rtol=1e-15)


def test_numbers_of_their_own_for_all_units_of_an_image():
    rng, x = np.random.default_rng(0), np.random.default_rng(1).uniform(size=(3, 2, 2, 2))
    mean, std, bias = rng.normal(size=8), rng.uniform(0.5, 2, 8), rng.normal(size=8)
    flat = np.moveaxis(x, -1, 1).reshape(3, 8)
    ones = {"running_mean": np.zeros(8), "running_var": np.ones(8), "bias": bias}
    cases = [("normalize", {"mean": mean, "std": std}), ("batch_norm", {**ones, "weight": np.repeat([2.0, 3.0], 4)})]
    expected = [(flat - mean) / std, flat * np.repeat([2.0, 3.0], 4) / np.sqrt(1 + 1e-5) + bias]
    for layer, logits in zip(cases, expected, strict=True):
        found = lipjax.freeze(interop.from_sequential([("flatten",), layer], (2, 2, 2)))(x)
        np.testing.assert_allclose(found, logits, rtol=1e-12, atol=1e-12)


def test_orders_that_no_layer_takes_on_become_an_operator():
    sort = ("maxmin", {}, NEIGHBOURS)
    halves = ("maxmin", {}, {"pairs": "halves", "first": "max"})
    x = np.random.default_rng(0).uniform(size=(5, 8))
    network = interop.from_sequential([sort, halves, sort], (8,))
    expected = np.sort(x.reshape(5, 4, 2), 2).reshape(5, 2, 4)
    expected = np.concatenate([expected.max(1), expected.min(1)], 1)
    expected = np.sort(expected.reshape(5, 4, 2), 2).reshape(5, 8)
    assert np.array_equal(lipjax.freeze(network)(x), expected)
    kinds = [type(op).__name__ for op in network.ops]
    assert kinds == ["ChannelShuffle", "MaxMin", "Dense", "MaxMin", "Dense", "MaxMin"]


class Module:
    """What a module is asked for."""

    training = False

    def __init__(self, **attributes):
        vars(self).update(attributes)

    def forward(self, x):
        raise NotImplementedError


class Conv2d(Module):
    def forward(self, x):
        return self._conv_forward(x)

    def _conv_forward(self, x):
        raise NotImplementedError


class Linear(Module):
    pass


class GroupSort2(Module):
    group_size = 2


class MaxMin(Module):
    pass


class Flatten(Module):
    pass


class Dropout(Module):
    pass


class BatchNorm2d(Module):
    pass


class ReLU(Module):
    pass


class Sequential(Module):
    """As torch's, whose named_children leaves out what was there before."""

    def __init__(self, layers):
        self._modules = {str(i): layer for i, layer in enumerate(layers)}

    def __iter__(self):
        return iter(self._modules.values())

    def named_children(self):
        return ((name, layer) for i, (name, layer) in enumerate(self._modules.items()) if layer not in [*self][:i])


class Residual(Sequential):
    def forward(self, x):
        return x


class Parametrized(Conv2d):
    pass


class SpectralConv2d(Conv2d):
    def forward(self, x):
        return 2 * x


class Doubled(Conv2d):
    def _conv_forward(self, x):
        return 2 * x


class Called(Linear):
    def __call__(self, x):
        return 2 * x


# Classes of others that keep the name of what they derive from.
SameName = type("Conv2d", (Conv2d,), {"forward": SpectralConv2d.forward})
SameSequential = type("Sequential", (Sequential,), {"forward": SpectralConv2d.forward})
OrthogoniumMaxMin = type("MaxMin", (MaxMin,), {"__module__": "orthogonium.layers", "axis": 1})


class MaxPool2d(Module):
    pass


def test_modules_are_read_by_the_name_of_their_class():
    rng = np.random.default_rng(0)
    first = {"weight": rng.normal(size=(4, 1, 3, 3)), "bias": rng.normal(size=4)}
    last = {"weight": rng.normal(size=(3, 16)), "bias": None}
    steps = {"stride": (2, 2), "padding": (1, 1)}
    inner = Sequential([Parametrized(**first, **steps), GroupSort2(), MaxMin(pairs="halves", first="max")])
    modules = Sequential([inner, Dropout(), Flatten(), Linear(**last)])
    halves = ("maxmin", {}, {"pairs": "halves", "first": "max"})
    tuples = [("conv2d", first, steps), ("maxmin", {}, NEIGHBOURS), halves, ("flatten",), ("linear", last)]
    ours, theirs = (interop.from_sequential(layers, (1, 4, 4)) for layers in (modules, tuples))
    assert ours.names[0] == "0.0_Parametrized/linear" and theirs.names[0] == "0_conv2d/linear"
    for a, b in zip(lipjax.freeze(ours).arrays().values(), lipjax.freeze(theirs).arrays().values(), strict=True):
        assert np.array_equal(a, b)


def test_a_module_that_stands_there_twice_is_read_twice():
    rng, relu = np.random.default_rng(0), ReLU()
    linear = [Linear(weight=rng.normal(size=(4, 4)), bias=rng.normal(size=4)) for _ in range(3)]
    inner = Sequential([linear[2], relu, linear[2]])
    assert [name for name, _ in inner.named_children()] == ["0", "1"]  # the control: the fake is as torch is
    network = interop.from_sequential(Sequential([linear[0], relu, linear[1], relu, inner, inner]))
    x = expected = rng.uniform(size=(5, 4))
    for i in (0, None, 1, None, 2, None, 2, 2, None, 2):
        expected = np.maximum(expected, 0) if i is None else expected @ linear[i].weight.T + linear[i].bias
    np.testing.assert_allclose(lipjax.freeze(network)(x), expected, rtol=1e-12)


def test_modules_between_tuples_are_compared(monkeypatch):
    def halves(self, x):
        a, b = np.split(x, 2, 1)
        return np.concatenate([np.maximum(a, b), np.minimum(a, b)], 1)

    def normalized(self, x):
        return (x - self.mean[:, None, None]) / self.std[:, None, None]

    base = type("Module", (Module,), {"__call__": lambda self, x: self.forward(x), "parameters": lambda self: []})
    sort, normalize = type("MaxMin", (base,), {"forward": halves}), type("Normalize", (base,), {"forward": normalized})
    torch = types.SimpleNamespace(nn=types.SimpleNamespace(Module=base), from_numpy=np.array)
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(**vars(torch), no_grad=contextlib.nullcontext))
    steps = normalize(mean=np.array([0.25, 0.5]), std=np.array([0.5, 2.0])), ("conv2d", {"weight": KERNEL})
    end = ("flatten",), ("linear", {"weight": np.eye(3, 16)})
    good, other = (sort(pairs=pairs, first="max") for pairs in ("halves", "neighbours"))
    interop.from_sequential([*steps, good, *end], (2, 3, 3))
    with pytest.raises(UserError, match="numbers that layers give here and those of the modules 2 to 2 differ"):
        interop.from_sequential([*steps, other, *end], (2, 3, 3))
    interop.from_sequential([*steps, other, *end], (2, 3, 3), compare=False)
    normalize.forward = lambda self, x: x
    with pytest.raises(UserError, match="the modules 0 to 0 differ"):
        interop.from_sequential([*steps, good, *end], (2, 3, 3))


PATCHED = Sequential([Conv2d(weight=np.ones((4, 1, 3, 3)))])
vars(PATCHED)["forward"] = lambda x: x
KERNEL = np.random.default_rng(0).normal(size=(4, 2, 2, 2))
WEIGHT = np.ones((4, 1, 3, 3))
CONV, FLAT = ("conv2d", {"weight": WEIGHT}, {"padding": 1}), ("flatten",)
STATISTICS = {"running_mean": np.zeros(1), "running_var": np.ones(1)}


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([MaxPool2d()], "Layer 0 \\(MaxPool2d\\) is not supported"),
        ([SpectralConv2d(weight=WEIGHT)], "overrides forward of Conv2d"),
        ([SameName(weight=WEIGHT)], "Layer 0 \\(Conv2d\\) computes something of its own"),
        ([Doubled(weight=WEIGHT)], "overrides _conv_forward of Conv2d"),
        ([Called(weight=np.eye(4))], "overrides __call__ of Linear"),
        ([Conv2d(weight=WEIGHT, forward=lambda x: 2 * x)], "overrides forward of Conv2d"),
        (PATCHED, "The network \\(Sequential\\) computes something of its own"),
        (SameSequential([Conv2d(weight=WEIGHT)]), "The network \\(Sequential\\) computes something of its own"),
        ([GroupSort2(_coefficient_lip=0.5)], "Layer 0 \\(GroupSort2\\): expected _coefficient_lip=1, got 0.5"),
        ([OrthogoniumMaxMin(axis=2)], "Layer 0 \\(MaxMin\\): expected axis=1, got 2"),
        ([Residual([Conv2d(weight=WEIGHT)])], "0 \\(Residual\\) computes something of its own"),
        (Residual([Conv2d(weight=WEIGHT)]), "The network \\(Residual\\) computes something of its own"),
        (Module(first=Conv2d(weight=WEIGHT)), "Expected an nn.Sequential, or a list of layers, got a Module"),
        ([Conv2d(weight=WEIGHT, _forward_pre_hooks={1: 2})], "has hooks"),
        ([Dropout(training=True)], "training=False, got True: call eval"),
        ([BatchNorm2d(training=True, **STATISTICS)], "call eval"),
        ([MaxMin()], "\\['pairs', 'first'\\] missing"),
        ([GroupSort2(group_size=4)], "group_size=2, got 4"),
        ([Flatten(start_dim=2)], "start_dim=1, got 2"),
        ([("conv3d", {}, {})], "Layer 0 \\(conv3d\\) is not supported"),
        ([("conv2d", {"weight": WEIGHT}, {"strides": 2})], "\\['strides'\\] unknown"),
        ([("conv2d", {"weight": WEIGHT}, {"stride": 1.5})], "0_conv2d: expected stride as one or two whole numbers"),
        ([("conv2d", {"weight": WEIGHT}, {"groups": 2})], "0_conv2d: expected a weight"),
        ([("conv2d", {"weight": WEIGHT}, {"padding": 1, "padding_mode": "reflect"})], "padding_mode 'zeros'"),
        ([("conv2d", {"weight": WEIGHT}, {"padding": 2, "padding_mode": "circular"})], "padding_mode 'zeros'"),
        ([("conv2d", {"weight": np.full((4, 1, 3, 3), 1 + 0j)})], "expected real numbers"),
        ([CONV, ("linear", {"weight": np.eye(4)})], "is a Flatten missing"),
        ([FLAT, CONV], "1_conv2d/linear|1_conv2d: expected images"),
        ([CONV, ("avg_pool2d", {}, {"kernel_size": 2, "padding": 1, "count_include_pad": False})], "count_include_pad"),
        ([CONV, ("adaptive_avg_pool2d", {}, {"output_size": 3})], "divides the size \\(4, 4\\)"),
        ([("maxmin", {}, NEIGHBOURS)], "even number of channels"),
        ([CONV, ("maxmin", {}, {"pairs": "all", "first": "min"})], "pairs 'neighbours' or 'halves'"),
        ([("leaky_relu", {}, {"negative_slope": 2.0})], "0_leaky_relu: LeakyReLU expects"),
        ([("normalize", {"mean": [0.5], "std": [0.0]})], "above 0"),
        ([CONV], "ends with a tensor \\(4, 4, 4\\)"),
        ([FLAT, ("linear", {"weight": np.ones((1, 16))})], "at least two logits"),
        ([("conv2d", WEIGHT)], "Layer 0: expected \\(kind, arrays, options\\)"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(layers, message):
    with pytest.raises(UserError, match=message):
        interop.from_sequential(layers, (1, 4, 4))


def test_the_input_shape_follows_from_a_first_linear_layer_alone():
    linear = ("linear", {"weight": np.ones((3, 5))})
    assert interop.from_sequential([("identity",), linear]).in_shape == (5,)
    with pytest.raises(UserError, match="Expected an input_shape"):
        interop.from_sequential([FLAT, linear])
    with pytest.raises(UserError, match="Expected an input shape"):
        interop.from_sequential([linear], (5, 5))


def test_pairs_that_are_none_are_refused():
    assembly = Assembly((4,))
    places, larger = np.arange(4), np.array([True, False, True, False])
    for first, second in (([0, 0, 2, 2], [1, 1, 1, 1]), ([0, 1, 2, 3], [1, 2, 3, 0])):
        with pytest.raises(UserError, match="larger and the smaller of each pair"):
            assembly.sort_pairs("sort", places[first], places[second], larger)
    assembly.sort_pairs("sort", places[[0, 0, 2, 2]], places[[1, 1, 3, 3]], larger)  # control
    assert len(assembly.ops) == 2


def test_real_modules_are_run_and_compared():
    torch = pytest.importorskip("torch")
    nn = torch.nn

    class GroupSort2(nn.Module):
        halves = False

        def forward(self, x):
            if self.halves:
                return torch.cat([torch.minimum(*x.chunk(2, 1)), torch.maximum(*x.chunk(2, 1))], 1)
            return torch.sort(x.reshape(len(x), -1, 2, *x.shape[2:]), dim=2)[0].reshape(x.shape)

    torch.manual_seed(0)
    conv = torch.nn.utils.parametrizations.spectral_norm(nn.Conv2d(1, 4, 3, padding=1))
    net = nn.Sequential(conv, GroupSort2(), nn.Flatten(), nn.Linear(64, 5)).eval()
    x = np.random.default_rng(0).uniform(size=(3, 4, 4, 1))
    ours = lipjax.freeze(interop.from_sequential(net, (1, 4, 4)))(x)
    with torch.no_grad():
        theirs = net.double()(torch.from_numpy(np.moveaxis(x, -1, 1))).numpy()
    assert relative(ours, theirs) < 1e-6
    net[1].halves = True  # it is not what its name says
    with pytest.raises(UserError, match="differ by up to .* at random images"):
        interop.from_sequential(net, (1, 4, 4))
    interop.from_sequential(net, (1, 4, 4), compare=False)
