"""Frozen networks: what they claim against exact rational arithmetic and search, and that their files are checked."""

import contextlib
import dataclasses
import json
import subprocess
import sys
from fractions import Fraction

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lipjax
from lipjax import bounds, operators
from lipjax.certify import FrozenNetwork
from lipjax.certify.frozen import float64_on_cpu
from lipjax.errors import NotCertifiable, UserError
from lipjax.models import LiResNet
from lipjax.network import make_network


def small_network(scale=1.0, seed=0, mean=0.3, std=0.7):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) * scale)  # noqa: E731
    ops = [
        ("conv", operators.Conv(draw(3, 3, 1, 2), (3, 3, 1))),
        ("bias", operators.Bias(draw(2), (3, 3, 2))),
        ("act", operators.MaxMin((3, 3, 2))),
        ("flat", operators.Flatten((3, 3, 2))),
        ("dense", operators.Dense(draw(4, 18))),
        ("act2", operators.MaxMin((4,))),
    ]
    return make_network(ops, operators.LinearHead(draw(3, 4), draw(3)), mean, std)


def frozen_network(**kwargs):
    return FrozenNetwork(jax.tree.map(np.asarray, small_network(**kwargs)))


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

    def gap(x, p, i):
        logits = network(x[None])[0]
        return logits[p] - logits[i]

    flips = 0
    with float64_on_cpu():
        for image, p, i, radius in zip(images, found.predictions, found.rivals, found.radii, strict=True):
            direction = np.asarray(jax.grad(gap)(jnp.asarray(image), p, i))
            direction = -direction / np.linalg.norm(direction)
            inside = np.clip(image + 0.999 * radius * direction, 0, 1)
            outside = np.clip(image + 30 * radius * direction, 0, 1)
            assert np.argmax(frozen(inside[None])[0]) == p
            flips += np.argmax(frozen(outside[None])[0]) != p
    assert flips > 5  # control: further out, the class does change


@pytest.fixture(scope="module")
def model_and_variables():
    model = LiResNet(
        input_shape=(8, 8, 1), num_classes=3, depth=2, width=4, stem_kernel=3, stem_strides=1, stem_padding=1
    )
    jax.config.update("jax_enable_x64", False)
    try:
        variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1), jnp.float32))
    finally:
        jax.config.update("jax_enable_x64", True)
    return model, variables


def test_freeze_gives_the_models_function(model_and_variables):
    model, variables = model_and_variables
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(variables))
    frozen = lipjax.freeze(model, variables)
    x = np.random.default_rng(0).uniform(0, 1, (5, 8, 8, 1))
    double = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), variables)
    np.testing.assert_allclose(frozen(x), np.asarray(model.apply(double, jnp.asarray(x))), rtol=1e-12, atol=1e-13)
    single = np.asarray(model.apply(variables, jnp.asarray(x, jnp.float32)))
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


def test_save_and_load_give_the_same_certificate(tmp_path, model_and_variables):
    frozen = lipjax.freeze(*model_and_variables)
    frozen.save(tmp_path)
    loaded = FrozenNetwork.load(tmp_path)
    assert loaded.sha256() == frozen.sha256() and loaded.network.names == frozen.network.names
    x = np.random.default_rng(1).uniform(0, 1, (3, 8, 8, 1))
    first, second = frozen.certify(x), loaded.certify(x)
    np.testing.assert_array_equal(first.radii, second.radii)
    np.testing.assert_array_equal(first.margins, second.margins)
    other = frozen_network()
    assert other.sha256() != frozen.sha256()


def flip_byte(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


def edit_json(path, change):
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: flip_byte(d / "network.safetensors", -1), "hash"),
        (lambda d: (d / "network.safetensors").write_bytes(b"abc"), "damaged"),
        (lambda d: (d / "network.safetensors").unlink(), "missing"),
        (lambda d: (d / "network.json").unlink(), "missing"),
        (lambda d: (d / "network.json").write_text("{"), "damaged"),
        (lambda d: edit_json(d / "network.json", lambda j: j.update(schema=99)), "schema"),
        (lambda d: edit_json(d / "network.json", lambda j: j["ops"][0].update(type="Unknown")), "fit"),
        (lambda d: edit_json(d / "network.json", lambda j: j["ops"][0].update(padding="CIRCULAR")), "hash"),
        (lambda d: edit_json(d / "network.json", lambda j: j.update(sha256="0" * 64)), "hash"),
    ],
)
def test_damaged_files_are_refused(tmp_path, damage, message):
    frozen_network().save(tmp_path)
    FrozenNetwork.load(tmp_path)  # control: undamaged files load
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        FrozenNetwork.load(tmp_path)


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


def test_the_arrays_cannot_be_made_writable_again(tmp_path):
    """Bounds are computed once: an array that changed after that would be certified with them."""
    matrix = np.eye(3)
    network = make_network([("dense", operators.Dense(matrix))], operators.LinearHead(np.eye(3), np.zeros(3)))
    frozen = FrozenNetwork(jax.tree.map(lambda a: np.asarray(a, np.float64), network))
    for array in frozen.arrays().values():
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.setflags(write=True)
    matrix[0, 0] = 100.0  # control: the caller's own array is another one
    assert frozen.network.ops[0].matrix[0, 0] == 1.0


@pytest.mark.parametrize("shape", [[], [3, 4, 5, 6], "wide", {}])
def test_a_damaged_layout_ends_as_one_error(tmp_path, shape):
    network = make_network(
        [("sort", operators.MaxMin((4,)))], operators.LinearHead(np.eye(4), np.zeros(4)), np.zeros(1), np.ones(1)
    )
    FrozenNetwork(jax.tree.map(lambda a: np.asarray(a, np.float64), network)).save(tmp_path)
    document = json.loads((tmp_path / "network.json").read_text())
    document["ops"][0]["in_shape"] = shape
    (tmp_path / "network.json").write_text(json.dumps(document))
    with pytest.raises(UserError):
        FrozenNetwork.load(tmp_path)


RUN_ELSEWHERE = """
import sys
import jax
import jax.export
import numpy as np
jax.config.update("jax_enable_x64", sys.argv[4] == "float64")
with open(sys.argv[1], "rb") as file:
    program = jax.export.deserialize(bytearray(file.read()))
np.save(sys.argv[3], program.call(np.load(sys.argv[2]).astype(sys.argv[4])))
assert not any(name.split(".")[0] in ("lipjax", "flax") for name in sys.modules)
"""


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_exported_program_runs_without_lipjax(tmp_path, model_and_variables, dtype):
    frozen = lipjax.freeze(*model_and_variables)
    (tmp_path / "program").write_bytes(frozen.export(dtype))
    images = np.random.default_rng(0).random((3, *frozen.in_shape))
    np.save(tmp_path / "images.npy", images)
    files = [str(tmp_path / name) for name in ("program", "images.npy", "logits.npy")]
    subprocess.run([sys.executable, "-I", "-c", RUN_ELSEWHERE, *files, dtype], check=True, cwd=tmp_path)
    logits = np.load(files[2])
    assert logits.dtype == dtype
    np.testing.assert_allclose(logits, frozen(images), rtol=0, atol=1e-4 if dtype == "float32" else 1e-12)
    if dtype == "float32":
        assert (logits != frozen(images)).any()  # control: it is the rounded network
    with pytest.raises(ValueError, match="float16"):
        frozen.export("float16")


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
