"""Work without images, divided over devices: the same results, shares that fall as 1 / devices, what is sent."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from tiers import everyday
from training_helpers import quick_compiles, tiny_config  # noqa: F401  quick_compiles is a fixture

from benchmarks.sharding import compiled_build, describe
from lipjax import _spread, bounds, linalg, operators
from lipjax.parametrize import soc_frequency
from lipjax.plan import hlo
from lipjax.training import sharding


def eight(data=8, model=1):
    return sharding.make_mesh(data, data * model, model)


@pytest.fixture
def everything(monkeypatch):
    """However small, it is divided."""
    monkeypatch.setattr(_spread, "SMALL", 0)
    monkeypatch.setattr(_spread, "SMALL_IN_COLUMNS", 0)


# ---- work without images, divided ----------------------------------------------------------------------------------


def draw(*shape):
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape) / np.sqrt(shape[-1]))


def both_ways(function, mesh):
    """Jitted on the mesh: arrays -> (values, gradient for some cotangent)."""

    @jax.jit
    @sharding.spread_over(mesh)
    def value_and_gradient(*arrays):
        found, pull_back = jax.vjp(function, *arrays)
        waves = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), found)
        return found, pull_back(waves)

    return lambda *arrays: value_and_gradient(*jax.device_put(arrays, sharding.replicated(mesh)))


def skew(a):
    return a - jnp.swapaxes(a, -1, -2)


MATRIX_FUNCTIONS = {
    "cayley": lambda w: linalg.cayley(w),
    "complex cayley": lambda w: linalg.cayley_split(w, 0.3 * w**2),
    "expm": lambda w: linalg.expm_skew_split(skew(w), w + jnp.swapaxes(w, -1, -2)),
    "cholesky": lambda w: linalg.cholesky_orthogonalize(w),
    "reflector": lambda w: linalg.block_reflector_split(w, 0.3 * w**2, 1e-3),
    "series": lambda w: soc_frequency._series((skew(w), jnp.stack([skew(w)] * 2, 1)), 5, w.shape[-1]),
}


# On eight devices: 11 matrices are divided by matrices, not evenly; one by columns; two, and three with one that is
# made up, over groups of four and of two devices; one by columns over four, which the other four do as well.
WHOLE, COLUMNS, BOTH, UNEVEN, SPARE = (11, 20, 20), (1, 256, 256), (2, 128, 128), (3, 64, 64), (128, 128)


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *[("expm", WHOLE), ("cholesky", SPARE)],
        *[
            pytest.param(name, shape, marks=pytest.mark.nightly)
            for name in MATRIX_FUNCTIONS
            for shape in (WHOLE, (11, 45, 20), COLUMNS, BOTH, UNEVEN, SPARE, (3, 192, 96))
        ],
    ],
)
def test_matrix_functions_are_the_same_on_a_mesh(name, shape):
    w = draw(*shape)
    on_one, on_eight = (both_ways(MATRIX_FUNCTIONS[name], mesh) for mesh in (eight(1), eight(4, 2)))
    one, many, other = (jax.tree.leaves(found) for found in (on_one(w), on_eight(w), on_one((1 + 1e-6) * w)))
    # Numbers of size 1 from sums of n terms; condition numbers below 1000 (Cholesky with ridge 1e-3).
    allowed = [1e3 * shape[-1] * 2.0**-52 * np.abs(a).max() for a in one]
    for a, b, limit in zip(one, many, allowed, strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=limit)
    assert any(np.abs(a - c).max() > limit for a, c, limit in zip(one, other, allowed, strict=True))  # control


@pytest.mark.usefixtures("everything", "quick_compiles")
def test_factors_of_a_factorisation_are_gathered_once():
    """Forward and backward: L^-1 (a factor of three products), L^T and the gradient of x x^T; results, once each."""

    @sharding.spread_over(eight())
    def both(w):
        found, pull_back = jax.vjp(linalg.cholesky_orthogonalize, w)
        return _spread.gathered(found), pull_back(jnp.cos(found))[0]

    everywhere = sharding.replicated(eight())
    w = jax.ShapeDtypeStruct((1, 256, 512), jnp.float32, sharding=everywhere)
    text = jax.jit(both, out_shardings=everywhere).lower(w).compile().as_text()
    size = {"square": 256 * 256 * 4, "result": 256 * 512 * 4}
    found = [c for c in hlo.Program(text or "").collectives() if c.kind == "all-gather" and c.bytes >= size["square"]]
    assert all(c.times == 1 and c.group == 8 for c in found)
    assert sorted(c.bytes for c in found) == 3 * [size["square"]] + 2 * [size["result"]]


@pytest.mark.usefixtures("everything")
def test_explicit_meshes_and_shard_map_are_left_alone():
    with jax.set_mesh(jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))):
        assert _spread.num_devices() == 1
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        assert _spread.num_devices() == 8  # control: what is not ours is taken, too
        # Maps of 1 x 1 have no pairs of frequencies; 7 of 8 devices have work; 9 matrices make two for one device.
        shapes = (
            (0, 2, 256, 256),
            (1, 256, 256),
            (7, 256, 256),
            (9, 256, 256),
            (9, 256, 250),
            (512, 512),
            (64, 512, 512),
        )
        assert [_spread.by_columns(shape) for shape in shapes] == [False, True, False, True, False, True, False]
        inside = []
        jax.shard_map(
            lambda x: inside.append(_spread.num_devices()) or x,
            in_specs=PartitionSpec("x"),
            out_specs=PartitionSpec("x"),
        )(jnp.zeros(8))
        assert inside == [1]
    assert _spread.num_devices() == 1


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize(("count", "channels"), [(1, 4), (2, 64), (11, 4)])
def test_equal_tasks_are_divided(count, channels):
    items = [{"a": draw(channels, channels) * (i + 1), "b": draw(3) + i} for i in range(count)]
    task = lambda item: (item["a"] @ item["a"], jnp.sum(item["b"] ** 2) * item["a"][0])  # noqa: E731

    def divided(*items):
        return _spread.each(task, items, channels=channels)

    one, many = (both_ways(divided, mesh)(*items) for mesh in (eight(1), eight(2, 4)))
    assert jax.tree.structure(one) == jax.tree.structure(many)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-12, atol=1e-12), one, many)


@pytest.mark.nightly
@pytest.mark.usefixtures("everything")
def test_chains_of_liplt_are_divided_by_their_ends(monkeypatch):
    """Three linear maps and a residual block, with two activations between them and one inside."""
    groups, row_groups = [], _spread.row_groups
    monkeypatch.setattr(_spread, "row_groups", lambda *args: groups.append(row_groups(*args)) or groups[-1])

    def estimate(*kernels):
        first, inner, outer, last = kernels
        block = operators.Residual(
            (operators.Conv(inner, (4, 4, 2)), operators.ReLU((4, 4, 2)), operators.Conv(outer, (4, 4, 2)))
        )
        relu = operators.ReLU((4, 4, 2))
        path = [operators.Conv(first, (4, 4, 1)), relu, block, relu, operators.Conv(last, (4, 4, 2), strides=2)]
        vectors = bounds.liplt_vectors(path, jax.random.key(0))
        pairwise, rest = bounds.liplt_estimate(path, vectors, 3)
        return pairwise, rest.constants, rest.norms, rest.vectors

    shapes = [(3, 3, 1, 2), (3, 3, 2, 2), (3, 3, 2, 2), (3, 3, 2, 3)]
    kernels = [draw(*shape) + 0.1 * i for i, shape in enumerate(shapes)]
    one, many, other = (
        jax.tree.leaves(both_ways(estimate, mesh)(*scaled))
        for mesh, scaled in (
            (eight(1), kernels),
            (eight(2, 4), kernels),
            (eight(1), [(1 + 1e-9) * k for k in kernels]),
        )
    )
    assert max(groups) > 1  # they are divided indeed
    # Six applications, as many transposed ones and as many again backward, each of sums of 18 numbers.
    allowed = [18 * 18 * 2.0**-52 * np.abs(a).max() for a in one]
    for a, b, limit in zip(one, many, allowed, strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=limit)
    assert any(np.abs(a - c).max() > limit for a, c, limit in zip(one, other, allowed, strict=True))  # control


# ---- who does what -------------------------------------------------------------------------------------------------

DEVICES = (8, 16, 64, 256)
LARGE = {
    "eight dense layers of 2048": (8, 2048, 2048),
    "a neck": (1, 2048, 9408),
    "sixteen dense layers of 1024": (16, 1024, 1024),
    "64 channels on 32 x 32 maps": (510, 2, 64, 64),
    "512 channels on 16 x 16 maps": (126, 2, 512, 512),
    "1024 channels on 4 x 4 maps": (6, 2, 1024, 1024),
    "twelve layers of 3072": (12, 3072, 3072),
}


def abstract_mesh(devices):
    """What `sharding.make_mesh` makes of so many devices, which are not here."""
    sizes = sharding._prime_factors(devices)
    return AbstractMesh(sizes, tuple(f"data{i}" for i in range(len(sizes))), axis_types=(AxisType.Auto,) * len(sizes))


def share(shape, devices, even=False):
    """What the busiest device has of all."""
    with jax.sharding.use_abstract_mesh(abstract_mesh(devices)):
        groups = _spread._groups_of(shape, even)
    count = shape[0]
    assert devices % (groups.count * groups.parts) == 0
    return -(-count // groups.count) / count * -(-shape[-1] // groups.parts) / shape[-1]


@pytest.mark.parametrize("name", LARGE)
def test_shares_fall_as_devices_become_more(name):
    shares = [share(LARGE[name], devices) for devices in DEVICES]
    assert all(found <= 2 / devices for found, devices in zip(shares, DEVICES, strict=True))
    assert shares == sorted(shares, reverse=True)
    for devices in (2, 3, 6, 12, 24, 48, 96):  # and other numbers
        assert share(LARGE[name], devices) <= 2 / devices


def test_what_is_too_small_is_not_divided_further():
    assert [share((1, 2048, 2048), devices) for devices in DEVICES] == [1 / 8, 1 / 16, 1 / 64, 1 / 64]  # 32 columns
    assert [share((1, 256, 256), devices) for devices in DEVICES] == [1] * 4  # sooner done than asked for
    assert [share((4, 256, 256), devices) for devices in DEVICES] == [1 / 4] * 4
    assert [share((34, 16, 16), devices) for devices in DEVICES] == [1] * 4
    assert [share((126, 2, 128, 128), devices) for devices in DEVICES] == [16 / 126, 8 / 126, 2 / 126, 1 / 126]
    # Eliminations take whole panels: 588 columns are 4 times 147, which are 3 times 49.
    assert share((1, 1024, 588 * 2), 64, even=True) == 1 / 8
    assert [_spread.panel(width) for width in (32, 147, 256, 131)] == [32, 49, 128, 1]


# ---- what the compiled programs say --------------------------------------------------------------------------------

TINY = {"name": "lipconvnet", "depth": 2, "num_blocks": 1, "width": 16}
BUILDS = {
    "cayley": (TINY | {"layer": "cayley"}, {}),
    "bro": (TINY | {"layer": "bro"}, {}),
    "soc": (TINY | {"padding": "CIRCULAR", "form": "response", "train_terms": None}, {}),
    "cholesky": (
        {
            **{"name": "liresnet", "depth": 1, "width": 4, "neck": "cholesky", "neck_features": 64},
            **{"dense_depth": 16},
        },
        {},
    ),
    "estimates": (
        {"name": "liresnet", "depth": 16, "width": 16, "stem_kernel": 3, "stem_padding": 1},
        {"power_iterations": 2},
    ),
}


def build_on(name, mesh):
    model, fields = BUILDS[name]
    config = tiny_config(**fields)
    with config.unlocked():
        config.model = ml_collections.ConfigDict(model)
    return describe(compiled_build(config, (16, 16, 3), mesh))


@pytest.mark.x64_off
@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize("name", everyday(BUILDS, "cholesky"))
def test_a_device_of_eight_does_at_most_a_sixth_of_what_does_not_depend_on_images(name, monkeypatch):
    one, many = build_on(name, eight(1)), build_on(name, eight(8))
    # XLA's count of all operations, the body of a loop once; and products and convolutions, loops by their length.
    assert many["flops"] <= one["flops"] / 6
    assert 0 < many["products"] <= one["products"] / 6
    # Results are gathered, sums over the devices' shares (gradients of kernels, norms) are added up, and that is all.
    # But for transposes and cuts of what is divided by columns, a small part.
    size = {kind: found[1] for kind, found in many["collectives"].items()}
    cuts = sum(size.pop(kind, 0) for kind in ("all-to-all", "collective-permute"))
    assert set(size) <= {"all-gather", "all-reduce"} and cuts <= 0.1 * size["all-gather"]
    assert not one["collectives"] and not one["calls"] and not many["calls"]
    if name == "cholesky":
        monkeypatch.setattr(sharding, "spread_over", lambda mesh: lambda function: function)
        assert build_on(name, eight(8))["flops"] > 0.9 * one["flops"]  # control: every device does everything


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["cayley", "expm", "cholesky", "reflector"])
def test_the_compiled_share_of_a_device_falls_up_to_256(name):
    root = pathlib.Path(__file__).resolve().parents[2]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=256", "PYTHONPATH": str(root)}
    options = [f"--functions={name}", f"--devices={','.join(map(str, DEVICES))}"]
    command = [sys.executable, "benchmarks/stack_shares.py", *options]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr
    shares = json.loads(done.stdout)[name]
    assert shares == sorted(shares, reverse=True) and shares[0] > 1 / 9  # control: someone does the work
    assert all(found <= 2 / devices for found, devices in zip(shares, DEVICES, strict=True)), shares
