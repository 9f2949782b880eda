"""Elementwise activations: slopes, rounding errors against mpmath, derivatives, and networks made of them."""

import json
import math

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

from lipjax import operators, spectral
from lipjax.certify import FrozenNetwork
from lipjax.errors import UserError
from lipjax.network import make_network
from lipjax.numerics import UNDERFLOW_OF_OPERATOR
from lipjax.operators import softplus

U = 2.0**-53


def leaky(slope):
    return lambda shape: operators.LeakyReLU(shape, slope)


MAKE = {
    "ReLU": operators.ReLU,
    "LeakyReLU": operators.LeakyReLU,
    "leaky 0.3": leaky(0.3),
    "leaky -0.7": leaky(-0.7),
    "abs": leaky(-1.0),
    "leaky 0": leaky(0.0),
    "Tanh": operators.Tanh,
    "Sigmoid": operators.Sigmoid,
    "Softplus": operators.Softplus,
}
SLOPES = {
    "LeakyReLU": (0.01, 1.0),
    "leaky 0.3": (0.3, 1.0),
    "leaky -0.7": (-0.7, 1.0),
    "abs": (-1.0, 1.0),
    "Sigmoid": (0.0, 0.25),
}
SMOOTH = ("Tanh", "Sigmoid", "Softplus")


def exact(name, x):
    """The activation in 400 bits."""
    with mpmath.workprec(400):
        x = mpmath.mpf(x)
        if name == "Tanh":
            return mpmath.tanh(x)
        if name == "Sigmoid":
            return 1 / (1 + mpmath.exp(-x)) if x > 0 else mpmath.exp(x) / (1 + mpmath.exp(x))
        if name == "Softplus":
            return max(x, mpmath.mpf(0)) + mpmath.log1p(mpmath.exp(-abs(x)))
        return x if x > 0 else x * mpmath.mpf(SLOPES.get(name, (0.0,))[0])


def hostile_points():
    """Of either sign: tiny, huge, and around the ends of the table's intervals, of x and of 2 x."""
    rng = np.random.default_rng(0)
    edges = np.arange(0, 325) / 16
    parts = [rng.uniform(0, 45, 300), abs(rng.normal(size=300)), edges, np.nextafter(edges, 99)]
    parts += [np.nextafter(edges[1:], 0), 10.0 ** -np.arange(1, 320, 13), [0.0, 40.0, 700.0, 1e100]]
    points = np.concatenate(parts)
    return np.concatenate([points, -points])


@pytest.mark.parametrize("where", ["numpy", "jax"])
def test_tanh_is_as_exact_as_it_claims(where, monkeypatch):
    x = hostile_points()
    got = softplus.tanh_of(x, np) if where == "numpy" else np.asarray(jax.jit(softplus.tanh)(x))
    truth = [exact("Tanh", a) for a in x]
    error = max(float(abs(mpmath.mpf(float(a)) - b)) for a, b in zip(got, truth, strict=True))
    assert error <= softplus.TANH_ERROR
    assert (abs(got) <= 1).all()
    np.testing.assert_array_equal(got, -got[np.argsort(np.arange(len(x)) < len(x) // 2, kind="stable")])  # odd
    # Control: the error is there (docs/soundness.md derives 6.1 u, the code allows 12 u), and a shorter series shows.
    assert error > 0.5 * U
    monkeypatch.setattr(softplus, "_EXP", softplus._EXP[:-4])
    assert not (np.abs(softplus.tanh_of(x, np) - got) <= softplus.TANH_ERROR).all()


def test_tanh_at_the_edges_and_its_derivatives():
    edges = jnp.array([np.nan, np.inf, -np.inf, 1e308, -1e308])
    np.testing.assert_array_equal(jax.jit(softplus.tanh)(edges), [np.nan, 1, -1, 1, -1])
    x = jnp.linspace(-50.0, 50.0, 81)

    @jax.jit
    def derivatives(x):
        pairs = [(softplus.tanh, jnp.tanh)]
        return [[jax.vmap(jax.grad(f))(x), jax.vmap(jax.grad(jax.grad(f)))(x)] for pair in pairs for f in pair]

    ours, theirs = derivatives(x)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=64 * U)
    assert np.abs(theirs).max() > 0.5  # control


@pytest.mark.x64_off
def test_float32_is_jaxs():
    x = jnp.linspace(-100.0, 100.0, 77)
    assert x.dtype == jnp.float32
    np.testing.assert_array_equal(softplus.tanh(x), jnp.tanh(x))
    for op in [make(x.shape) for make in MAKE.values()]:
        y, slopes = jax.jit(lambda x, op=op: (op(x[None]), jax.grad(lambda x: op(x[None]).sum())(x)))(x)
        assert y.dtype == slopes.dtype == jnp.float32 and np.isfinite(slopes).all()


@pytest.mark.parametrize("name", MAKE)
def test_slopes_lie_in_the_interval_and_fill_it(name):
    op = MAKE[name]((3, 2))
    low, high = op.slope
    assert type(low) is type(high) is float and (low, high) == SLOPES.get(name, (0.0, 1.0))
    rng = np.random.default_rng(1)
    s = np.concatenate([rng.normal(size=200) * 10.0 ** rng.integers(-3, 3, 200), [-60.0, 60.0, -1e-9]])
    t = np.concatenate([s[:100] + 1e-6 * rng.normal(size=100), rng.permutation(s[:100]), [-61.0, 61.0, 1e-9]])
    with mpmath.workprec(400):
        values = [[(mpmath.mpf(float(a)), exact(name, a)) for a in points] for points in (s, t)]
        slopes = [(f - g) / (a - b) for (a, f), (b, g) in zip(*values, strict=True)]
        assert all(low <= slope <= high for slope in slopes)
        assert min(slopes) - low < 1e-12 and high - max(slopes) < 1e-4  # so that no smaller interval would do
    assert op.bound().proved == spectral.norm_bound(op) == max(abs(low), abs(high))
    assert f"{high:g}" in op.bound().method


@pytest.mark.parametrize("name", MAKE)
def test_rounding_error_covers_the_distance_to_exact_arithmetic(name):
    rng = np.random.default_rng(2)
    points = hostile_points()
    points = rng.permutation(points)[: len(points) // 12 * 12].reshape(-1, 2, 2, 3)
    small = np.concatenate([points, rng.normal(size=(20, 2, 2, 3)), np.zeros((1, 2, 2, 3))])
    op = MAKE[name]((2, 2, 3))
    y, claimed = jax.jit(lambda op, x: (op(x), op.rounding_error(x)))(op, jnp.asarray(small))
    assert y.shape == small.shape and claimed.shape == (len(small),)
    assert op.out_shape == op.in_shape == (2, 2, 3)
    ratios = []
    for x, found, bound in zip(small, np.asarray(y), np.asarray(claimed), strict=True):
        with mpmath.workprec(400):
            pairs = zip(found.ravel(), x.ravel(), strict=True)
            error = mpmath.sqrt(mpmath.fsum((mpmath.mpf(float(a)) - exact(name, b)) ** 2 for a, b in pairs))
            allowed = float(bound) + UNDERFLOW_OF_OPERATOR * (1 + float(np.linalg.norm(x)))
            assert error <= allowed
            ratios.append(float(error / allowed))
    if name in ("ReLU", "abs", "leaky 0"):
        assert name == "abs" or not np.asarray(claimed).any()
        wanted = np.abs(small) if name == "abs" else np.maximum(small, 0)
        np.testing.assert_allclose(y, wanted, rtol=0, atol=2.0**-1022)  # XLA flushes subnormal numbers
    else:
        assert max(ratios) > 0.05  # control: rounding does happen, and is not bounded by something huge


def test_the_rounding_error_of_one_product_is_attained():
    op, x = operators.LeakyReLU((1,), 0.3), -1 - np.random.default_rng(6).uniform(size=(400, 1))
    y, claimed = jax.jit(lambda x: (op(x), op.rounding_error(x)))(x)
    with mpmath.workprec(400):
        pairs = zip(np.ravel(y), x.ravel(), strict=True)
        errors = [abs(mpmath.mpf(float(a)) - exact("leaky 0.3", b)) for a, b in pairs]
    ratios = [float(error / float(bound)) for error, bound in zip(errors, claimed, strict=True)]
    assert 0.8 < max(ratios) <= 1


@pytest.mark.parametrize("name", MAKE)
def test_nan_and_gradients(name):
    x = jnp.array([np.nan, 0.0, -0.0, 1e-300, -1e-300, 2.5, -2.5, 800.0, -800.0, 1e300, -1e300])
    op = MAKE[name]((len(x),))

    @jax.jit
    def run(x):
        y, vjp = jax.vjp(lambda x: op(x[None])[0], x)
        return y, vjp(jnp.ones_like(x))[0], op.rounding_error(x[None])

    y, slopes, _ = map(np.asarray, run(x))
    assert np.isnan(y[0]) and np.isfinite(y[1:]).all() and np.isfinite(slopes[1:]).all()
    assert np.isfinite(slopes[0]) or name in SMOOTH
    low, high = op.slope
    assert (slopes[1:] >= low).all() and (slopes[1:] <= high).all()
    if name in SMOOTH:
        expected = {
            "Tanh": lambda a: mpmath.sech(a) ** 2,
            "Sigmoid": lambda a: mpmath.sech(a / 2) ** 2 / 4,
            "Softplus": lambda a: 1 / (1 + mpmath.exp(-a)),
        }[name]
        found = [float(expected(mpmath.mpf(float(a)))) for a in x[1:9]]
        np.testing.assert_allclose(slopes[1:9], found, rtol=0, atol=32 * U)
    else:
        np.testing.assert_array_equal(slopes[1:], np.where(x[1:] > 0, 1.0, low))


@pytest.mark.parametrize("slope", [math.nan, math.inf, -math.inf, 1.5, -1.0000001])
def test_other_negative_slopes_are_refused(slope):
    with pytest.raises(ValueError, match="between -1 and 1, got"):
        operators.LeakyReLU((4,), slope)


@pytest.mark.parametrize("name", MAKE)
def test_they_are_pytrees_without_leaves_and_check_shapes(name):
    op = MAKE[name]((4,))
    leaves, tree = jax.tree.flatten(op)
    assert leaves == [] and jax.tree.unflatten(tree, []).slope == op.slope
    others = [jax.tree.structure(make((4,))) for other, make in MAKE.items() if other != name]
    assert tree not in others and tree == jax.tree.structure(MAKE[name]((4,)))
    with pytest.raises(ValueError, match="expects a batch"):
        op(jnp.zeros((2, 3)))


def elementwise_network():
    rng = np.random.default_rng(3)
    ops = []
    for i, (name, make) in enumerate(MAKE.items()):
        matrix = rng.normal(size=(5, 5)) / 2
        bias = operators.Bias(jnp.asarray(rng.normal(size=5)), (5,))
        ops += [(f"{i}/linear", operators.Dense(jnp.asarray(matrix))), (f"{i}/bias", bias), (f"{i}/{name}", make((5,)))]
    head = operators.LinearHead(jnp.asarray(rng.normal(size=(3, 5))), jnp.asarray(rng.normal(size=3)))
    return FrozenNetwork(jax.tree.map(np.asarray, make_network(ops, head)))


@pytest.mark.quick_compiles
def test_a_frozen_network_of_them_certifies_and_comes_back(tmp_path):
    frozen = elementwise_network()
    activations = [row for row in frozen.lipschitz_report() if row.type not in ("Normalize", "Dense", "Bias")]
    assert [row.type for row in activations] == [type(make((5,))).__name__ for make in MAKE.values()]
    assert [row.claimed for row in activations] == [0.25 if name == "Sigmoid" else 1.0 for name in MAKE]
    rng = np.random.default_rng(4)
    x = rng.uniform(size=(20, 5))
    certificate = frozen.certify(x)
    assert (certificate.radii > 1e-6).all()
    # The margins lie below those of 400 bits, and not far.
    predictions, margins = frozen.margins(x[:5])
    for image, lower, p in zip(x, margins, predictions, strict=False):
        z = exact_logits(frozen.network, image)
        slack = [float(z[p] - value - mpmath.mpf(float(low))) for value, low in zip(z, lower, strict=True)]
        assert 0 < min(slack) <= max(slack) < 1e-11
    frozen.save(tmp_path)
    loaded = FrozenNetwork.load(tmp_path)
    np.testing.assert_array_equal(loaded.certify(x).radii, certificate.radii)
    assert [getattr(op, "negative_slope", None) for op in loaded.network.ops] == [
        getattr(op, "negative_slope", None) for op in frozen.network.ops
    ]
    # Control: another slope in the file is noticed, and so is one that is none.
    document = json.loads((tmp_path / "network.json").read_text())
    for slope, message in [(0.02, "hash"), (2.0, "between -1 and 1"), ("steep", "fit each other")]:
        next(op for op in document["ops"] if op["type"] == "LeakyReLU")["negative_slope"] = slope
        (tmp_path / "network.json").write_text(json.dumps(document))
        with pytest.raises(UserError, match=message):
            FrozenNetwork.load(tmp_path)


def exact_logits(network, image):
    with mpmath.workprec(400):
        z = [mpmath.mpf(float(v)) for v in image]
        for name, op in [*zip(network.names, network.ops, strict=True), ("head", network.head)]:
            if isinstance(op, operators.Dense | operators.LinearHead):
                rows = [[mpmath.mpf(float(w)) for w in row] for row in op.matrix]
                z = [mpmath.fsum(w * v for w, v in zip(row, z, strict=True)) for row in rows]
            if isinstance(op, operators.Bias | operators.LinearHead):
                z = [v + mpmath.mpf(float(b)) for v, b in zip(z, op.bias, strict=True)]
            elif not isinstance(op, operators.Dense):
                z = [exact(name.split("/")[1], v) for v in z]
        return z
