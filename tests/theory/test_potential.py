"""Potential steps and sandwiches: constants against dense oracles, errors against 60 digits, every walk."""

import decimal
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from deployment_helpers import apply, numbers
from tiers import everyday

from lipjax import FrozenNetwork, bounds, operators
from lipjax.attacks.input_gradient import of_images
from lipjax.certify.float64 import advance, float64_on_cpu
from lipjax.errors import NotCertifiable
from lipjax.network import Application, make_network
from lipjax.operators.grid import Circulants, on_grid

RNG = np.random.default_rng(0)
# Each with 5 columns or input channels, and 3 outputs.
LINEAR = {
    "dense": operators.Dense(RNG.normal(size=(3, 5)) / 3),
    "strided": operators.Conv(RNG.normal(size=(3, 2, 5, 3)) / 6, (5, 4, 5), (2, 1), ((1, 0), (0, 1))),
    "around": operators.Conv(RNG.normal(size=(2, 3, 5, 3)) / 6, (2, 4, 5), 2, "CIRCULAR"),
    "small": operators.Conv(RNG.normal(size=(5, 5, 5, 3)) / 6, (3, 2, 5)),  # a kernel larger than the map
    "circular": operators.CircularConv.from_blocks(
        RNG.normal(size=(2, 3, 5)) / 3, RNG.normal(size=(5, 2, 3, 5)) / 4, (3, 4, 5)
    ),
}
BIAS = RNG.normal(size=3) / 4


run = jax.jit(lambda op, x: op(x))


def dense(op):
    """The matrix of a linear operator: column by column."""
    eye = np.eye(int(np.prod(op.in_shape))).reshape(-1, *op.in_shape)
    return np.asarray(run(op, eye)).reshape(len(eye), -1).T


def of_norm(linear, norm):
    """The operator scaled to a norm, but for its bound's slack."""
    factor = norm / np.linalg.norm(dense(linear), 2)
    return jax.tree.map(lambda a: factor * np.asarray(a), linear)


def relu(linear):
    return operators.ReLU(linear.out_shape)


def step_of(linear, activation=None):
    return operators.PotentialStep(linear, BIAS, activation or relu(linear))


def sandwich_of(linear, outputs=2):
    return operators.Sandwich(linear, BIAS, relu(linear), outputs)


@pytest.mark.quick_compiles
@pytest.mark.parametrize("name", everyday(LINEAR, "dense", "strided", "circular"))
def test_the_transpose_and_the_columns_are_those_of_the_dense_matrix(name):
    linear = LINEAR[name]
    matrix = dense(linear)
    columns = np.arange(matrix.shape[1]).reshape(linear.in_shape)[..., 1:4].ravel()
    np.testing.assert_allclose(dense(linear.transpose(-2.0)), -2 * matrix.T, atol=1e-14)
    np.testing.assert_allclose(dense(linear.channels(1, 4)), matrix[:, columns], atol=1e-14)
    back = linear.transpose(1.0)
    both = jax.jit(lambda op, x: op.adjoint(op(x)))(back, np.ones((1, *back.in_shape)))
    np.testing.assert_allclose(np.ravel(both), matrix @ matrix.T @ np.ones(len(matrix)), atol=1e-13)
    norm = np.linalg.norm(matrix, 2)
    assert norm <= back.bound().proved <= norm * (1 + 1e-9)


@pytest.mark.parametrize("norm", [0.8, 1.0, 1.3])
@pytest.mark.parametrize("name", LINEAR)
def test_constants_of_steps_are_those_of_dense_jacobians(name, norm):
    """I - 2 A^T S A for diagonal S: none above the bound, and S = 0 or S = I attain it."""
    linear = of_norm(LINEAR[name], norm)
    matrix = dense(linear)
    bound = step_of(linear).bound()
    assert bound.proved >= max(1, 2 * norm**2 - 1) * (1 - 1e-12)
    assert bound.proved <= max(1, 2 * norm**2 - 1) + 1e-8
    if norm < 1:
        assert bound.proved == bound.claimed == 1.0
    rng, found = np.random.default_rng(1), []
    for slopes in (np.zeros(len(matrix)), np.ones(len(matrix)), *rng.integers(0, 2, (9, len(matrix)))):
        jacobian = np.eye(matrix.shape[1]) - 2 * (matrix.T * slopes) @ matrix
        found.append(np.linalg.norm(jacobian, 2))
    assert max(found) <= bound.proved * (1 + 1e-12) and max(found) >= bound.proved - 1e-7
    # Controls: what |x|, whose slopes are refused, would make of it; and the same map in the clothing of a Residual.
    assert np.linalg.norm(np.eye(matrix.shape[1]) + 2 * matrix.T @ matrix, 2) > bound.proved + 1
    clothed = operators.Residual(step_of(linear).parts())
    assert clothed.bound().proved == pytest.approx(1 + 2 * norm**2, abs=1e-6)


@pytest.mark.parametrize("name", LINEAR)
def test_constants_of_sandwiches_are_never_below_dense_jacobians(name):
    for linear in (LINEAR[name], of_norm(LINEAR[name], 1.0)):
        matrix = dense(linear)
        places = np.arange(matrix.shape[1]).reshape(linear.in_shape)
        a, b = matrix[:, places[..., :2].ravel()], matrix[:, places[..., 2:].ravel()]
        bound, rng = sandwich_of(linear).bound().proved, np.random.default_rng(1)
        assert bound == pytest.approx(np.linalg.norm(matrix, 2) ** 2, rel=1e-8)
        for slopes in (np.ones(len(matrix)), *rng.integers(0, 2, (9, len(matrix)))):
            assert np.linalg.norm(2 * (a.T * slopes) @ b, 2) <= bound
    rows = operators.Dense(np.array([[0.6, 0.8]]))  # with |A| = |B|, S = I attains it
    even = operators.Sandwich(operators.Dense(np.full((1, 2), 0.5**0.5)), np.zeros(1), operators.ReLU((1,)), 1)
    assert 1 <= even.bound().proved < 1 + 1e-9
    assert operators.Sandwich(rows, np.zeros(1), operators.ReLU((1,)), 1).bound().proved >= 2 * 0.6 * 0.8


@pytest.mark.parametrize("make", [step_of, sandwich_of])
@pytest.mark.parametrize("name", everyday(LINEAR, "circular"))
def test_errors_of_float64_are_within_their_bound(name, make):
    op = make(LINEAR[name])
    row = bounds.operator_bounds(one_layer(op))[1]
    x = np.random.default_rng(2).uniform(-1, 1, (3, *op.in_shape))
    x[1] *= 2.0**40  # beside a bias that is far smaller
    with float64_on_cpu():
        y, local = advance(jax.tree.map(jnp.asarray, op), row.norms, jnp.zeros(3), jnp.asarray(x))
        _, with_error = advance(jax.tree.map(jnp.asarray, op), row.norms, jnp.full(3, 1e-3), jnp.asarray(x))
    with decimal.localcontext(decimal.Context(prec=60)):
        distance = (numbers(np.asarray(y), object) - apply(op, numbers(x, object), object)).astype(float)
    distance = np.linalg.norm(distance.reshape(3, -1), axis=1)
    assert (distance <= local).all() and (distance >= 1e-3 * local).any()
    # What lies before passes by the constant of the whole, not by 1 + the product of the parts' constants.
    np.testing.assert_allclose(np.asarray(with_error - local), 1e-3 * row.claimed, rtol=1e-9)


def one_layer(op, features=4):
    flat = [("flat", operators.Flatten(op.out_shape))] if len(op.out_shape) == 3 else []
    rng, width = np.random.default_rng(3), int(np.prod(op.out_shape))
    head = operators.LinearHead(rng.normal(size=(features, width)), np.zeros(features))
    return make_network([("layer", op), *flat], head)


@pytest.mark.quick_compiles
@pytest.mark.parametrize(
    ("name", "make"),
    everyday(
        itertools.product(["strided", "circular"], [step_of, sandwich_of]),
        ("strided", step_of),
        ("circular", sandwich_of),
    ),
)
def test_saved_loaded_and_exported(name, make, tmp_path):
    frozen = FrozenNetwork(one_layer(make(LINEAR[name])))
    images = np.random.default_rng(4).uniform(size=(3, *frozen.in_shape))
    frozen.save(tmp_path)
    again = FrozenNetwork.load(tmp_path)
    assert again.sha256() == frozen.sha256() and repr(again) == repr(frozen)
    np.testing.assert_array_equal(again.certify(images).radii, frozen.certify(images).radii)
    assert {"ops/layer/bias"} < {key for key in frozen.arrays() if key.startswith("ops/layer/")}
    program = jax.export.deserialize(bytearray(frozen.export("float64")))
    np.testing.assert_allclose(np.asarray(program.call(images)), frozen(images), atol=1e-12)
    row = again.lipschitz_report()[1]
    assert [part.type for part in row.parts][1:3] == ["Bias", "ReLU"] and row.details["linear"]["bound"] > 0
    assert row.parts[3].claimed == 2 * row.parts[0].claimed == 2 * row.details["linear"]["bound"]


@pytest.mark.quick_compiles
@pytest.mark.parametrize("make", everyday([step_of, sandwich_of], sandwich_of))
def test_estimates_gradients_and_bfloat16(make):
    linear = LINEAR["strided"]
    op = make(linear)
    network = jax.tree.map(jnp.asarray, one_layer(op))
    vectors = bounds.init_vectors(network, jax.random.key(0))
    assert set(vectors) == {"layer/0"} and vectors["layer/0"].shape == linear.in_shape
    estimates = jax.jit(bounds.norm_estimates, static_argnums=2)
    sigmas, _ = estimates(network, vectors, 100)
    assert sigmas["layer"] == pytest.approx(op.bound().proved, rel=1e-6)
    promised = type(op)(linear, BIAS, relu(linear), **({} if make is step_of else {"outputs": 2}), nonexpansive=True)
    assert not bounds.init_vectors(one_layer(promised), jax.random.key(0))
    assert promised.bound() == op.bound()  # which does not look at the promise
    large = operators.Conv(np.ones((3, 3, 5, 3)), (32, 32, 5))
    assert isinstance(on_grid(make(large)).measured()[0], Circulants)
    # The gradient of an estimate reaches the stored array.
    grow = jax.jit(jax.grad(lambda net: estimates(net, vectors, 100)[0]["layer"]))(
        jax.tree.map(lambda a: 2 * np.asarray(a), network)
    )
    assert jnp.linalg.norm(grow.ops[0].linear.kernel) > 0.1
    # Gradients by adjoints are those of automatic differentiation; bfloat16 computes the same map.
    x = jnp.asarray(np.random.default_rng(5).uniform(size=(2, *op.in_shape)))
    by_adjoint, plain = (jax.jit(jax.grad(lambda x, f=f: f(x)[:, 0].sum()))(x) for f in (of_images(network), network))
    np.testing.assert_allclose(by_adjoint, plain, atol=1e-13)
    single = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), network)
    how = Application(precision="bfloat16")
    narrow, _ = jax.jit(lambda net, x: net.features_and_means(x, how))(single, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(narrow, jax.jit(lambda net, x: net.features(x))(network, x), atol=0.1)


def test_equal_layers_are_one_loop_and_stand_in_no_other_block():
    rng = np.random.default_rng(6)
    maps = [operators.Dense(rng.normal(size=(3, 5)) / 3) for _ in range(3)]
    steps = [(f"s{i}/step", step_of(linear)) for i, linear in enumerate(maps)]
    network = jax.tree.map(jnp.asarray, make_network(steps, operators.LinearHead(np.eye(5), np.zeros(5))))
    x = jnp.asarray(rng.normal(size=(4, 5)))
    looped, _ = network.features_and_means(x, Application(scan=True))
    program = jax.make_jaxpr(lambda x: network.features_and_means(x, Application(scan=True))[0])(x)
    assert str(program).count("scan[") == 1
    np.testing.assert_allclose(looped, network.features(x), atol=1e-14)
    with pytest.raises(ValueError, match="operator 0: PotentialStep cannot stand inside a residual block"):
        operators.Residual((steps[0][1],))


class Halved(operators.Elementwise):
    """(x + |x|) / 4: an activation of somebody's own, whose slopes it states."""

    def __init__(self, in_shape, slope):
        self.in_shape, self._slope = in_shape, slope

    @property
    def slope(self):
        return self._slope

    def __call__(self, x):
        return jax.nn.relu(x) / 2

    def rounding_error(self, x):
        return jnp.zeros(x.shape[0], x.dtype)


jax.tree_util.register_pytree_node(Halved, lambda op: ((), op), lambda op, _: op)


def test_slopes_are_read_from_the_activation():
    linear = LINEAR["dense"]
    step = step_of(linear, Halved((3,), (0.0, 0.5)))
    assert step.bound().proved >= 1 and jax.tree.map(jnp.asarray, step)(jnp.ones((1, 5))).shape == (1, 5)
    for slope in ((-0.1, 1.0), (0.0, 1.1), (np.nan, 1.0)):
        with pytest.raises(ValueError, match="PotentialStep expects an activation of slopes in .0, 1., got a Halved"):
            step_of(linear, Halved((3,), slope))
    folds = operators.NActivation(-np.ones(4), np.zeros(4), (4,)), operators.PartialAbs((4,))
    for activation in (operators.MaxMin((4,)), operators.LeakyReLU((4,), -1.0), *folds):
        with pytest.raises(ValueError, match=type(activation).__name__):
            operators.PotentialStep(operators.Dense(np.eye(4)), np.zeros(4), activation)
    for activation in (operators.LeakyReLU, operators.Tanh, operators.Sigmoid, operators.Softplus):
        assert operators.PotentialStep(linear, BIAS, activation((3,))).bound().proved >= 1
    # Nor is one that a tree transformation has put in its place certified.
    changed = step_of(linear)
    object.__setattr__(changed, "activation", operators.LeakyReLU((3,), -1.0))
    with pytest.raises(NotCertifiable, match=r"layer \(PotentialStep\): .* LeakyReLU of slopes between -1 and 1"):
        bounds.operator_bounds(one_layer_unchecked(changed))


def one_layer_unchecked(op):
    network = one_layer(step_of(op.linear))
    object.__setattr__(network, "ops", (op, *network.ops[1:]))
    return network


def test_loop_transformation_refuses_them_by_name_and_the_product_counts_them_as_they_are():
    step = step_of(of_norm(operators.Dense(np.ones((3, 4))), 0.9))
    last = operators.Dense(np.eye(4))
    with pytest.raises(NotCertifiable, match=r"PotentialStep\): LipLT takes linear operators"):
        bounds.liplt_bound([step, last])
    network = make_network(
        [("step", step), ("act", operators.ReLU((4,)))], operators.LinearHead(np.eye(4), np.zeros(4))
    )
    assert not bounds.has_liplt(network)
    assert bounds.margin_lipschitz_bound(network)[0, 1] == pytest.approx(2**0.5)
