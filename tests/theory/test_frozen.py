"""Frozen networks: what they claim against exact rational arithmetic and search, and that their files are checked."""

import contextlib
import dataclasses
from fractions import Fraction

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from frozen_helpers import frozen_network, small_model, small_network

import lipjax
from lipjax import bounds, operators
from lipjax.certify import FrozenNetwork
from lipjax.certify.frozen import float64_on_cpu
from lipjax.errors import NotCertifiable, UserError
from lipjax.network import make_network

pytestmark = pytest.mark.quick_compiles


@pytest.fixture(scope="module")
def model_and_variables():
    return small_model()


def exact_logits(network, image):
    """The function of the stored arrays in rational arithmetic, written without the library's operators."""
    number = lambda a: Fraction(float(a))  # noqa: E731
    conv, bias, _, _, dense, _ = network.ops
    x = {}
    for r, c in np.ndindex(3, 3):
        x[r, c] = (number(image[r, c, 0]) - number(network.input_mean[0])) / number(network.input_std[0])
    maps = []
    for r, c in np.ndindex(3, 3):
        sums = []
        for o in range(2):
            taps = (
                number(conv.kernel[a, b, 0, o]) * x[r + a - 1, c + b - 1]
                for a, b in np.ndindex(3, 3)
                if (r + a - 1, c + b - 1) in x
            )
            sums.append(sum(taps) + number(bias.bias[o]))
        maps += [max(sums), min(sums)]
    hidden = [sum(number(w) * m for w, m in zip(row, maps, strict=True)) for row in dense.matrix]
    hidden = [
        max(hidden[0], hidden[2]),
        max(hidden[1], hidden[3]),
        min(hidden[0], hidden[2]),
        min(hidden[1], hidden[3]),
    ]
    rows = zip(network.head.matrix, network.head.bias, strict=True)
    return [sum(number(w) * h for w, h in zip(row, hidden, strict=True)) + number(b) for row, b in rows]


@pytest.mark.parametrize("scale", [1.0, 1e6, 1e-6])
def test_margins_lie_below_exact_arithmetic(scale):
    frozen = frozen_network(scale=scale)
    rng = np.random.default_rng(2)
    images = rng.uniform(0, 1, (40, 3, 3, 1))
    predictions, lower = frozen.margins(images, batch_size=16)
    logits = frozen(images)
    above, slack = 0, 0.0
    for image, p, row, computed in zip(images, predictions, lower, logits, strict=True):
        exact = exact_logits(frozen.network, image)
        for i in range(3):
            if i != p:
                assert Fraction(float(row[i])) <= exact[p] - exact[i]
                above += Fraction(float(computed[p])) - Fraction(float(computed[i])) > exact[p] - exact[i]
                slack = max(slack, float(exact[p] - exact[i] - Fraction(float(row[i]))) / np.abs(computed).max())
    assert above > 10  # control: the computed margins do exceed the exact ones, so the slack is needed
    assert slack < 1e-11


def test_no_pair_of_images_beats_the_proved_constants():
    frozen = frozen_network()
    constants = frozen.margin_lipschitz()
    rng = np.random.default_rng(3)
    x = rng.uniform(0, 1, (200, 3, 3, 1))
    y = np.clip(x + rng.normal(size=x.shape) * 1e-3, 0, 1)
    fx, fy = frozen(x), frozen(y)
    moved = (fx - fy)[:, :, None] - (fx - fy)[:, None, :]
    ratio = np.abs(moved) / np.linalg.norm((x - y).reshape(200, -1), axis=1)[:, None, None]
    assert (ratio <= constants * (1 + 1e-9)).all()
    assert ratio.max() > 0.05 * constants.max()
    # The constant is the product of dense norms, the head's distances and 1/std, and barely more.
    dense = [np.linalg.norm(np.asarray(m), 2) for m in (to_matrix(frozen.network.ops[0]), frozen.network.ops[4].matrix)]
    head = np.linalg.norm(frozen.network.head.matrix[0] - frozen.network.head.matrix[1])
    expected = dense[0] * dense[1] * head / 0.7
    assert expected <= constants[0, 1] * (1 + 1e-15) and constants[0, 1] <= expected * (1 + 1e-8)


def to_matrix(op):
    with float64_on_cpu():
        size = int(np.prod(op.in_shape))
        op = jax.tree.map(jnp.asarray, op)
        return np.asarray(op(jnp.eye(size).reshape(size, *op.in_shape))).reshape(size, -1).T


def test_certificates_hold_against_steps_towards_the_nearest_rival():
    frozen = frozen_network()
    images = np.random.default_rng(4).uniform(0.2, 0.8, (30, 3, 3, 1))
    found = frozen.certify(images)
    assert (found.radii > 0).all()

    network = jax.tree.map(jnp.asarray, frozen.network)

    @jax.jit
    @jax.grad
    def slope(x, p, i):
        logits = network(x[None])[0]
        return logits[p] - logits[i]

    flips = 0
    with float64_on_cpu():
        for image, p, i, radius in zip(images, found.predictions, found.rivals, found.radii, strict=True):
            direction = np.asarray(slope(jnp.asarray(image), p, i))
            direction = -direction / np.linalg.norm(direction)
            inside = np.clip(image + 0.999 * radius * direction, 0, 1)
            outside = np.clip(image + 30 * radius * direction, 0, 1)
            assert np.argmax(frozen(inside[None])[0]) == p
            flips += np.argmax(frozen(outside[None])[0]) != p
    assert flips > 5  # control: further out, the class does change


def test_freeze_gives_the_models_function(model_and_variables):
    model, variables = model_and_variables
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(variables))
    frozen = lipjax.freeze(model, variables)
    x = np.random.default_rng(0).uniform(0, 1, (5, 8, 8, 1))
    double = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), variables)
    apply = jax.jit(model.apply)
    np.testing.assert_allclose(frozen(x), np.asarray(apply(double, jnp.asarray(x))), rtol=1e-12, atol=1e-13)
    single = np.asarray(apply(variables, jnp.asarray(x, jnp.float32)))
    assert single.dtype == np.float32
    np.testing.assert_allclose(frozen(x), single, rtol=1e-4, atol=1e-5)
    assert np.abs(frozen(x) - single).max() > 0  # control: the two are not the same computation


@pytest.mark.x64_off
def test_certify_in_a_process_with_x64_off(model_and_variables):
    frozen = lipjax.freeze(*model_and_variables)
    assert jnp.ones(2).dtype == jnp.float32
    found = frozen.certify(np.full((2, 8, 8, 1), 0.5))
    assert found.margins.dtype == np.float64 and frozen.margin_lipschitz().dtype == np.float64


def test_report_names_every_layer(model_and_variables):
    frozen = lipjax.freeze(*model_and_variables)
    rows = frozen.lipschitz_report()
    assert [row.name for row in rows][:4] == ["input", "stem/linear", "stem/bias", "stem/activation"]
    estimates = frozen.norm_estimates()
    assert {row.name for row in rows if row.type in ("Conv", "Dense")} == set(estimates)
    for row in rows:
        if row.name in estimates:
            assert estimates[row.name] <= row.claimed <= estimates[row.name] * 1.05


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 4, 3, 1)), "shape"),
        (np.zeros((3, 3, 1)), "shape"),
        (np.zeros((2, 3, 3, 1), np.uint8), "float32 or float64"),
        (np.full((2, 3, 3, 1), 1.5), r"\[0, 1\]"),
        (np.full((2, 3, 3, 1), -0.1), r"\[0, 1\]"),
        (np.full((2, 3, 3, 1), np.inf), r"\[0, 1\]"),
    ],
)
def test_other_images_are_refused(images, message):
    with pytest.raises(UserError, match=message):
        frozen_network().certify(images)


def test_nan_pixels_and_constant_networks_and_no_images():
    frozen = frozen_network()
    images = np.full((3, 3, 3, 1), 0.5)
    images[1, 0, 0, 0] = np.nan
    found = frozen.certify(images)
    assert found.radii[1] == 0 and found.radii[0] == found.radii[2] > 0
    zero = jax.tree.map(np.zeros_like, frozen.network.head)
    tied = FrozenNetwork(
        type(frozen.network)(
            frozen.network.ops, zero, frozen.network.input_mean, frozen.network.input_std, frozen.network.names
        )
    )
    assert (tied.certify(images).radii == 0).all()
    assert frozen.certify(np.zeros((0, 3, 3, 1))).radii.shape == (0,)


class Unbounded(operators.Operator):
    """An operator that nobody has proved anything about."""

    in_shape = out_shape = (4,)

    def __call__(self, x):
        return 2 * x

    def rounding_error(self, x):
        return jnp.zeros(x.shape[0])


def test_an_operator_without_a_bound_is_not_certified():
    jax.tree_util.register_static(Unbounded)
    network = make_network([("strange", Unbounded())], operators.LinearHead(jnp.eye(4), jnp.zeros(4)))
    frozen = FrozenNetwork(jax.tree.map(np.asarray, network))
    assert frozen(np.zeros((1, 4))).shape == (1, 4)
    with pytest.raises(NotCertifiable, match="strange.*Unbounded"):
        frozen.certify(np.zeros((1, 4)))


def test_arrays_that_are_not_finite_or_not_float64_cannot_be_frozen():
    network = jax.tree.map(np.asarray, small_network())
    for leaf in (np.full(2, np.nan), np.zeros(2, np.float32)):
        ops = list(network.ops)
        ops[1] = operators.Bias(leaf, (3, 3, 2))
        broken = type(network)(tuple(ops), network.head, network.input_mean, network.input_std, network.names)
        with pytest.raises(ValueError, match="bias"):
            FrozenNetwork(broken)


def numpy_network(dtype=np.float64, **pixels):
    rng = np.random.default_rng(1)
    ops = [("dense", operators.Dense(rng.normal(size=(5, 4)).astype(dtype))), ("act", operators.ReLU((5,)))]
    head = operators.LinearHead(rng.normal(size=(3, 5)).astype(dtype), rng.normal(size=3).astype(dtype))
    return make_network(ops, head, **pixels)


@pytest.mark.x64_off
def test_a_network_of_numpy_arrays_freezes_as_it_is():
    images = np.random.default_rng(2).uniform(size=(3, 4))
    network = numpy_network(input_mean=0.1, input_std=(0.3, 0.4, 0.5, 0.6))
    frozen = lipjax.freeze(network)
    assert network.input_mean.dtype == network.input_std.dtype == np.float64
    assert frozen.network.input_mean[0] == 0.1  # not the float32 next to it
    for mine, theirs in zip(jax.tree.leaves(frozen.network), jax.tree.leaves(network), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert (frozen.certify(images).radii > 0).all()
    np.testing.assert_array_equal(lipjax.FrozenNetwork(network)(images), frozen(images))
    assert lipjax.freeze(network, class_names=["a", "b", "c"]).class_names == ("a", "b", "c")


@pytest.mark.x64_off
@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
@pytest.mark.parametrize("place", [np.asarray, jnp.asarray])
def test_a_network_of_short_floats_freezes_with_the_same_numbers(dtype, place):
    network = jax.tree.map(place, numpy_network(dtype))
    frozen = lipjax.freeze(network)
    for mine, theirs in zip(jax.tree.leaves(frozen.network), jax.tree.leaves(network), strict=True):
        assert mine.dtype == np.float64 and theirs.dtype == dtype
        np.testing.assert_array_equal(mine, np.asarray(theirs, np.float64))


def test_what_freezes_nothing_says_so():
    with pytest.raises(NotCertifiable, match=r"network\.ops\[0\]\.matrix: .*(float128|longdouble)"):
        lipjax.freeze(numpy_network(np.longdouble))
    with pytest.raises(NotCertifiable, match=r"network\.head\.matrix: .*complex128"):
        lipjax.freeze(dataclasses.replace(numpy_network(), head=operators.LinearHead(np.eye(2) * 1j, np.zeros(2))))
    with pytest.raises(ValueError, match="takes no variables"):
        lipjax.freeze(numpy_network(), {})
    with pytest.raises(ValueError, match=r"freeze\(object, variables\) takes the model's variables"):
        lipjax.freeze(object())


def test_integer_heads_leave_the_pixels_real():
    network = make_network(
        [("act", operators.ReLU((2,)))], operators.LinearHead(np.eye(2, dtype=int), np.zeros(2, int)), 0.5
    )
    assert network.input_mean.tolist() == [0.5] and lipjax.freeze(network).network.head.matrix.dtype == np.float64
    network = jax.tree.map(jnp.asarray, network)
    assert make_network([("act", operators.ReLU((2,)))], network.head, 0.5).input_mean.tolist() == [0.5]


def test_std_must_be_positive_to_certify():
    with pytest.raises(NotCertifiable, match="input_std"):
        bounds.operator_bounds(frozen_network(std=-1.0).network)


def test_freeze_takes_any_model_that_builds():
    class Tiny(nn.Module):
        @nn.compact
        def build(self):
            matrix = self.param("m", nn.initializers.normal(1.0), (2, 3))
            return make_network([("d", operators.Dense(matrix))], operators.LinearHead(jnp.eye(2), jnp.zeros(2)))

    model = Tiny()
    frozen = lipjax.freeze(model, model.init(jax.random.key(0), method="build"))
    assert frozen.num_classes == 2 and frozen.in_shape == (3,)


def test_a_users_mesh_does_not_move_the_proof_off_the_host(model_and_variables):
    frozen = lipjax.freeze(*model_and_variables)
    images = np.random.default_rng(0).uniform(0, 1, (3, 8, 8, 1))
    expected = frozen.certify(images)
    host, elsewhere = jax.devices()[0], jax.devices()[1:3]
    with jax.set_mesh(jax.sharding.Mesh(np.array(elsewhere), ("data",))):
        assert (jnp.ones(2) + 1).devices() == set(elsewhere)  # control: the mesh goes before a default device
        with float64_on_cpu():
            assert jax.jit(lambda x: x + 1)(jnp.ones(2)).devices() == {host}
        found = frozen.certify(images)
    np.testing.assert_array_equal(found.radii, expected.radii)
    assert (expected.radii > 0).any()


def test_a_proof_on_another_device_is_refused(model_and_variables, monkeypatch):
    frozen = lipjax.freeze(*model_and_variables)

    @contextlib.contextmanager
    def elsewhere():
        with jax.enable_x64(True), jax.default_device(jax.devices()[1]):
            yield

    for module in ("frozen", "float64"):
        monkeypatch.setattr(f"lipjax.certify.{module}.float64_on_cpu", elsewhere)
    with pytest.raises(NotCertifiable, match="Certificates are computed on"):
        frozen.certify(np.full((2, 8, 8, 1), 0.5))
