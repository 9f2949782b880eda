"""Meshes: what is stored where, one loss curve on all of them, and what a device computes and sends."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from tiers import everyday
from training_helpers import differing, quick_compiles, tiny_config  # noqa: F401  quick_compiles is a fixture

import lipjax
from lipjax import operators
from lipjax.errors import UserError
from lipjax.plan.hlo import Program
from lipjax.training import loop, sharding
from lipjax.training import step as steps
from lipjax.training.loop import Run

EPS32 = 2.0**-23
SCHEDULE = {"epsilon": 0.1}
LIPCONVNET = {"name": "lipconvnet", "depth": 2, "num_blocks": 2, "width": 4, "input_std": (0.1,)}
NETS = {
    "liresnet": {},
    "soc": LIPCONVNET | {"padding": "CIRCULAR", "train_terms": None, "eval_terms": None, "form": "response"},
    "spatial": LIPCONVNET | {"train_terms": 3, "eval_terms": 3},
    "series": LIPCONVNET | {"padding": "CIRCULAR", "train_terms": 3, "eval_terms": 3, "form": "series"},
    "cayley": LIPCONVNET | {"layer": "cayley", "head": "orthonormal"},
}


def eight(data=8, model=1):
    return sharding.make_mesh(data, data * model, model)


def config_of(net="liresnet", data=1, model=1, **changes):
    config = tiny_config(**{"model.depth": 3, "mesh.data": data, "mesh.model": model, **changes})
    if NETS[net]:
        with config.unlocked():
            config.model = ml_collections.ConfigDict(NETS[net])
    return config


@pytest.fixture
def small_parts(monkeypatch):
    """The arrays of the tiny networks are large enough to be stored in parts."""
    monkeypatch.setattr(sharding, "MIN_SIZE", 8)


# ---- the mesh and what is stored where -----------------------------------------------------------------------------


def test_the_mesh_of_a_config():
    assert dict(sharding.make_mesh(-1, 16).shape) == {"data0": 2, "data1": 2, "data2": 2}
    assert dict(sharding.make_mesh(-1, 16, 4).shape) == {"data0": 2, "model0": 2, "model1": 2}
    assert dict(sharding.make_mesh(6, 12).shape) == {"data0": 3, "data1": 2}
    assert dict(sharding.make_mesh(1, 12).shape) == {"data0": 1}
    mesh = sharding.make_mesh(2, 16, 4)
    assert [sharding.size(mesh, name) for name in (sharding.DATA, sharding.MODEL)] == [2, 4]
    assert list(mesh.devices.flat) == jax.devices()
    assert sharding.batch_sharded(mesh).shard_shape((16, 3)) == (2, 3)
    one = sharding.make_mesh(1, 5)
    assert one.size == 1 and one.devices.flat[0] == jax.devices()[0]
    for arguments, message in (
        ((-1, 16, 3), "config.mesh.model = 3 does not divide the 8 devices"),
        ((4, 16, 4), "4 x 4 = 16 devices, but JAX sees 8"),
        ((2, 18, 2), "batch_size = 18 does not divide over 4 devices"),
    ):
        with pytest.raises(UserError, match=message):
            sharding.make_mesh(*arguments)


def test_several_processes_leave_no_device_out(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="4 x 1 = 4 devices, but the 2 processes have 8"):
        sharding.make_mesh(4, 16)
    assert sharding.make_mesh(4, 16, 2).size == 8  # control


def test_large_arrays_are_stored_by_their_largest_axis_that_divides():
    mesh, model = eight(2, 4), ("model0", "model1")
    for shape, expected in (
        ((3, 3, 64, 128), (None, None, None, model)),
        ((5, 5, 3, 512), (None, None, None, model)),
        ((2048, 512), (model, None)),
        ((10, 8192), (None, model)),
        ((514, 512), (None, model)),  # the larger one does not divide
        ((129, 131), ()),
        ((2**14 - 4,), ()),  # too small
        ((2**14,), (model,)),
        ((), ()),
    ):
        assert sharding.spec_of(shape, mesh) == PartitionSpec(*expected), shape
        assert sharding.spec_of(shape, eight(8, 1)) == PartitionSpec()


@pytest.mark.nightly
@pytest.mark.x64_off
@pytest.mark.usefixtures("small_parts")
def test_a_state_lies_as_described_before_and_after_a_step():
    run = Run(config_of(data=4, model=2, **{"optimizer.name": "nadam"}), 0)
    state, described = run.fresh_state(), sharding.describe(run.abstract_state, run.mesh)
    assert described[".params['block_01']['weight']"] == PartitionSpec(None, None, ("model0",), None)
    assert described[".params['neck_dense']['matrix']"] == PartitionSpec(("model0",), None)
    assert described[".params['stem']['bias']"] == described[".step"] == described[".key"] == PartitionSpec()
    parts = {path: spec for path, spec in described.items() if spec != PartitionSpec()}
    weights = [path for path in parts if path.endswith("['weight']") and path.startswith(".params")]
    assert all(sum(path.endswith(w.removeprefix(".params")) for path in parts) == 3 for w in weights)  # and two moments
    train_batch = run.batch_runner(0)
    for _ in range(2):
        for path, leaf in jax.tree_util.tree_leaves_with_path(state):
            spec = described[jax.tree_util.keystr(path)]
            assert leaf.sharding.is_equivalent_to(jax.sharding.NamedSharding(run.mesh, spec), leaf.ndim), path
            assert leaf.addressable_shards[0].data.size == leaf.size // (2 if spec else 1)
        state, metrics = train_batch(state, 0, SCHEDULE)
        assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(metrics))


# ---- one training on all meshes ------------------------------------------------------------------------------------


def curve(run, num_steps, change=lambda params: params):
    state, train_batch, found = run.fresh_state(), run.batch_runner(0), []
    state = dataclasses.replace(state, params=change(state.params))
    for step in range(num_steps):
        state, metrics = train_batch(state, step, SCHEDULE)
        found.append(float(metrics["loss"]))
    return np.array(found)


def moved(params, relative):
    """Every parameter moved by +-relative of itself."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: p * (1 + relative * rng.choice(np.float32([-1, 1]), p.shape)), params)


@pytest.mark.x64_off
@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(
    ("net", "num_steps", "meshes"),
    [
        pytest.param("liresnet", 20, [(2, 4)], marks=pytest.mark.nightly),
        pytest.param("cayley", 4, [(8, 1)], marks=pytest.mark.nightly),
        pytest.param(
            "liresnet", 20, [(2, 1), (4, 1), (8, 1), (1, 2), (2, 2), (4, 2), (1, 8)], marks=pytest.mark.nightly
        ),
        pytest.param("soc", 20, [(2, 1), (8, 1), (1, 2), (2, 2), (4, 2)], marks=pytest.mark.nightly),
        pytest.param("series", 4, [(8, 1), (2, 4)], marks=pytest.mark.nightly),
        pytest.param("cayley", 20, [(2, 1), (4, 1), (1, 2), (2, 2), (4, 2)], marks=pytest.mark.nightly),
    ],
)
def test_the_loss_curve_is_the_same_on_all_meshes(net, num_steps, meshes):
    one = Run(config_of(net), 0)
    expected = curve(one, num_steps)
    # What a mesh changes is in which order numbers are summed. A sum of n numbers has a relative error of about
    # sqrt(n) units; the longest, of the weight gradients, has as many as pixels in a batch, 16 x 8 x 8. Every step
    # makes such errors anew. How far the curve goes with an error of one unit at the start, in all parameters, is
    # measured.
    amplified = np.abs(curve(one, num_steps, lambda p: moved(p, EPS32)) - expected)
    allowed = np.sqrt(16 * 8 * 8) * np.arange(1, num_steps + 1) * np.maximum.accumulate(amplified + EPS32 * expected[0])
    for data, model in meshes:
        found = curve(Run(config_of(net, data, model), 0), num_steps)
        assert (np.abs(found - expected) <= allowed).all(), (data, model, found - expected, allowed)
    off = curve(one, num_steps, lambda p: moved(p, 1e-3))
    assert (np.abs(off - expected) > allowed).any()  # control


@pytest.mark.nightly
@pytest.mark.x64_off
@pytest.mark.usefixtures("small_parts")
def test_start_batches_and_order_do_not_depend_on_the_mesh():
    def look(state, images, labels, schedule):
        return state, (images, labels, steps.preprocess(state.key, images, config.data, 255))

    seen = []
    for data, model in ((1, 1), (8, 1), (2, 4)):
        config = config_of(data=data, model=model)
        run = Run(config, 0)
        part, state = run.dataset.split("train"), run.fresh_state()
        order = steps.epoch_order(state.key, 1, run.num_images)
        args = jax.device_put((part.images, part.labels, order), sharding.replicated(run.mesh))
        jitted = steps.jit_array_step(look, run.mesh, 16, run.shardings)
        copy = jax.tree.map(jnp.copy, state)
        seen.append((jax.device_get(jitted(copy, *args, 16, SCHEDULE)[1]), np.asarray(order), state))
    for found, order, state in seen[1:]:
        assert all(map(np.array_equal, found, seen[0][0])) and np.array_equal(order, seen[0][1])
        assert differing(state, seen[0][2]) == []
    assert differing(Run(config_of(), 1).fresh_state(), seen[0][2])  # control


@pytest.mark.nightly
@pytest.mark.x64_off
@pytest.mark.usefixtures("small_parts")
def test_a_run_in_parts_is_saved_resumed_elsewhere_chosen_from_and_frozen(tmp_path):
    run = loop.train(config_of(data=4, model=2, num_epochs=1), tmp_path, 0)
    variables, state, step = loop.load_best(tmp_path, run)
    assert step == 3 and all(leaf.is_fully_replicated for leaf in jax.tree.leaves(state.params))
    elsewhere = Run(config_of(data=1, num_epochs=1), 0)
    assert differing(loop.load_best(tmp_path, elsewhere)[1], state) == []
    with loop.Checkpointer(tmp_path / "checkpoints", read_only=True) as checkpointer:
        parts = checkpointer.restore(run.abstract_state)[0]
        others = checkpointer.restore(Run(config_of(data=2, model=4), 0).abstract_state)[0]
    assert differing(parts, state) == differing(others, state) == []
    assert not parts.params["neck_dense"]["matrix"].is_fully_replicated
    logits = [
        lipjax.freeze(run.model, v)(np.zeros((2, 8, 8, 1)))
        for v in (variables, {"params": parts.params, **lip_of(parts)})
    ]
    assert np.array_equal(*logits)
    found = run.validator()(parts)
    single = elsewhere.validator()(loop.load_best(tmp_path, elsewhere)[1])
    for name, value in found.items():
        assert value == pytest.approx(single[name], rel=1e-4), name


def lip_of(state):
    return {"lip": state.lip}


# ---- what the compiled program says ---------------------------------------------------------------------------------


@pytest.mark.x64_off
@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(
    ("net", "data", "model"),
    everyday([("liresnet", 8, 1), ("liresnet", 2, 4), ("spatial", 8, 1)], ("liresnet", 2, 4)),
)
def test_what_travels_in_a_training_step(net, data, model):
    run = Run(config_of(net, data, model), 0)
    train_step = steps.make_train_step(run.model, run.optimizer, run.config, run.mesh, run.pixel_max)
    part, everywhere = run.dataset.split("train"), sharding.replicated(run.mesh)
    arrays = jax.device_put((part.images, part.labels, jnp.arange(run.num_images)), everywhere)
    jitted = steps.jit_array_step(train_step, run.mesh, 16, run.shardings)
    size = sizes(jitted.lower(run.fresh_state(), *arrays, 0, SCHEDULE))
    assert set(size) <= {"all-gather", "all-reduce", "reduce-scatter"} and "all-reduce" in size
    params = sum(leaf.nbytes for leaf in jax.tree.leaves(run.fresh_state().params))
    # Gradients are added up once. Beside them, in nets that centre no blocks: the loss, other numbers of the batch and
    # flags, 53 bytes as measured. An array of eight numbers that is sent twice is too much.
    few = 4 * 20
    assert 0.5 * params <= size["all-reduce"] + size.get("reduce-scatter", 0) <= params + few
    # What is gathered: parameters from their parts.
    assert size.get("all-gather", 0) <= (model > 1) * params


def sizes(lowered):
    """Bytes of the collectives of a program, by kind."""
    found = {}
    for one in Program(lowered.compile().as_text()).collectives():
        found[one.kind] = found.get(one.kind, 0) + one.times * one.bytes
    return found


@pytest.mark.x64_off
def test_an_array_that_is_used_several_times_has_its_gradient_added_up_once():
    """The blocks of a series of four terms, and the control: XLA alone adds up at each use."""
    mesh, blocks = eight(), (np.zeros((4, 6, 6), np.float32), np.zeros((6, 2, 6, 6), np.float32))

    def value_and_grad(blocks, x):
        def value(blocks):
            y = operators.CircularSeries(*blocks, (4, 4, 6), 6, 4)(x)
            return jnp.mean(y**2), (jnp.sum(y, (1, 2, 3)), {})

        return jax.value_and_grad(value, has_aux=True)(blocks)

    x = jax.ShapeDtypeStruct((16, 4, 4, 6), np.float32, sharding=sharding.batch_sharded(mesh))
    once = sizes(jax.jit(sharding.averaged(value_and_grad, mesh)).lower(blocks, x))
    each_time = sizes(jax.jit(value_and_grad).lower(blocks, x))
    assert once == {"all-reduce": sum(a.nbytes for a in blocks) + 4}
    assert each_time["all-reduce"] >= 4 * once["all-reduce"] - 16
