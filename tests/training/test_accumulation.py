"""Micro-batches, rematerialisation and loops over layers: the same step, in less memory or sooner compiled."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import everyday
from training_helpers import equations, quick_compiles, tiny_config  # noqa: F401  quick_compiles is a fixture

from lipjax.errors import UserError
from lipjax.models import get_model
from lipjax.network import Application, _pieces
from lipjax.nn import COLLECTION
from lipjax.plan.hlo import Program
from lipjax.training import sharding
from lipjax.training import step as steps
from lipjax.training.accumulate import _after, accumulate
from lipjax.training.config import validate
from lipjax.training.loop import METRIC, Run
from lipjax.training.objective import LOSSES, Seen
from lipjax.training.same_run import check_same_run, plain

EPS32 = 2.0**-23
SCHEDULE = {"epsilon": 0.1}
RATE = 0.01
# Plain gradient descent, so that the parameters show the gradients.
SGD = {"optimizer.name": "sgd", "optimizer.learning_rate": RATE, "optimizer.clip_norm": 0.0}
NET = {"model.depth": 2, "model.neck": "cholesky", "optimizer.warmup_epochs": 0.0}


def make_run(seed=0, **changes):
    return Run(tiny_config(**{**SGD, **NET, **changes}), seed)


def three_steps(run):
    """Parameters at the start and after the first step, and the metrics of three steps."""
    state, train_batch, found = run.fresh_state(), run.batch_runner(0), []
    params = [jax.tree.map(np.array, state.params)]
    for step in range(3):
        state, metrics = train_batch(state, step, SCHEDULE)
        found.append({name: float(metrics[name]) for name in ("loss", "grad_norm", "accuracy", METRIC)})
        assert metrics["finite"]
        if step == 0:
            params.append(jax.tree.map(np.array, state.params))
    return params, found


@functools.cache
def reference():
    return three_steps(make_run())


@pytest.mark.nightly
@pytest.mark.x64_off
@pytest.mark.parametrize(
    "switches",
    [{"accumulation": 2, "remat": 2, "mesh.data": 8}, {"accumulation": 4, "remat": 1, "scan": True}],
    ids=str,
)
def test_the_switches_change_nothing_but_rounding(switches):
    (start, after), metrics = reference()
    (other_start, other), found = three_steps(make_run(**switches))
    assert jax.tree.structure(other) == jax.tree.structure(after)  # names: checkpoints are the same
    jax.tree.map(np.testing.assert_array_equal, other_start, start)
    # As between meshes, a few eps a step of the sums that are associated differently.
    for name in ("loss", "grad_norm"):
        values = [[m[name] for m in run] for run in (found, metrics)]
        np.testing.assert_allclose(*values, rtol=100 * EPS32, err_msg=name)
    for name in ("accuracy", METRIC):
        assert [m[name] for m in found] == [m[name] for m in metrics]
    # The first update is rate times gradient, after which the parameter is rounded.
    slack = 100 * EPS32 * RATE * metrics[0]["grad_norm"]
    for a, b, before in zip(*map(jax.tree.leaves, (other, after, start)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2 * EPS32, atol=slack)
        assert np.abs(b - before).max() > 20 * slack  # control: every parameter has moved


@pytest.mark.x64_off
def test_another_seed_differs_by_more():
    """The control of the tolerance above."""
    _, metrics = reference()
    run = make_run(1)
    _, other = run.batch_runner(0)(run.fresh_state(), 0, SCHEDULE)
    assert abs(float(other["loss"]) / metrics[0]["loss"] - 1) > 1000 * EPS32


def step_and_arguments(run):
    """A run's step, for batches from the host, and abstract arguments."""
    step = steps.make_train_step(run.model, run.optimizer, run.config, run.mesh, run.pixel_max)
    size = run.config.batch_size
    batch = [jax.ShapeDtypeStruct((size, 8, 8, 1), jnp.uint8), jax.ShapeDtypeStruct((size,), jnp.int32)]
    return step, (run.abstract_state, *batch, SCHEDULE)


@pytest.mark.x64_off
def test_the_network_is_parametrised_once():
    """Norm estimates (at the highest precision) and Cholesky factors (loops) are as many as without micro-batches."""

    def counts(**switches):
        step, arguments = step_and_arguments(make_run(**switches))
        found = list(equations(jax.make_jaxpr(step)(*arguments).jaxpr))
        products = [e.params["precision"] for e in found if e.primitive.name in ("conv_general_dilated", "dot_general")]
        loops = [e for e in found if e.primitive.name in ("while", "scan")]
        default = products.count(None)
        return len(products) - default, len(loops), default

    highest, loops, default = counts()
    assert highest >= 10 and loops >= 2 and default >= 12  # control
    assert counts(accumulation=4) == (highest, loops, 4 * default)


def test_devices_keep_their_images():
    """Each device adds up its own part of every micro-batch: nothing but sums travels, once."""
    mesh = sharding.make_mesh(8, 32)
    split, everywhere = sharding.batch_sharded(mesh), sharding.replicated(mesh)
    shapes = [((4, 3), everywhere), ((32, 4), split), ((32,), split)]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place) for shape, place in shapes]

    def objective(matrix, pixels, labels):
        logits = pixels @ matrix
        return jnp.mean(logits.T * labels), (logits, labels, {})

    def collectives(function):
        found = Program(jax.jit(function).lower(*arguments).compile().as_text() or "").collectives()
        return {one.kind for one in found}, sum(one.bytes * one.times for one in found if one.kind == "all-reduce")

    sums = 4 * (4 * 3 + 1)  # of the gradient and of the mean, in bytes
    gradient = jax.value_and_grad(objective, has_aux=True)
    for scan in (False, True):
        config = tiny_config(accumulation=2, batch_size=32, scan=scan)
        of_shard = functools.partial(in_parts, gradient, config)
        assert collectives(sharding.averaged(of_shard, mesh)) == ({"all-reduce"}, sums)
        # Control: left to XLA, sums of each of the two micro-batches.
        kinds, size = collectives(of_shard)
        assert "all-reduce" in kinds and size >= 2 * sums

    def halves(matrix, pixels, labels):
        pixels = jax.lax.with_sharding_constraint(pixels[:16], split)
        return jax.grad(objective, has_aux=True)(matrix, pixels, labels[:16])

    assert collectives(halves)[0] > {"all-reduce"}  # control


def in_parts(value_and_grad, config, matrix, *batch):
    return accumulate(value_and_grad, matrix, batch, config)


@pytest.mark.nightly
@pytest.mark.x64_off
def test_memory_falls():
    """Of temporary arrays. On the CPU nothing is computed again but in loops: XLA finds what it has already."""
    net = {"model.depth": 4, "model.width": 16, "model.stem_strides": 1, "model.neck": "free", "batch_size": 48}

    def temporary(**switches):
        run = make_run(**net, **switches)
        step, arguments = step_and_arguments(run)
        program: Any = steps.jit_stream_step(step, run.mesh).lower(*arguments).compile()
        return program.memory_analysis().temp_size_in_bytes

    whole, looped = temporary(), temporary(scan=True)
    assert temporary(accumulation=4) < 0.6 * whole
    assert temporary(scan=True, remat=2) < 0.8 * looped


# ---- the network ---------------------------------------------------------------------------------------------------


def build(depth, **options):
    config = tiny_config(**{"model.depth": depth, **{f"model.{name}": value for name, value in options.items()}})
    model = get_model(config.model, input_shape=(8, 8, 1), num_classes=3)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    return model, variables


def network_of(model, variables, params):
    return model.apply({**variables, "params": params}, True, method="build", mutable=[COLLECTION])[0]


@functools.cache
def features_means_and_gradients(application):
    model, variables = build(4, centering=True)
    x = jax.random.uniform(jax.random.key(1), (4, 8, 8, 1))

    def value(params):
        features, means = network_of(model, variables, params).features_and_means(x, application)
        return jnp.sum(features**2) + sum(i * jnp.sum(m**2) for i, m in enumerate(means.values())), (features, means)

    gradients, (features, means) = jax.jit(jax.grad(value, has_aux=True))(variables["params"])
    return features, means, gradients


@pytest.mark.parametrize(
    "application",
    everyday(
        [Application(remat=2), Application(scan=True), Application(remat=2, scan=True)],
        Application(remat=2, scan=True),
    ),
    ids=str,
)
def test_features_means_and_gradients_do_not_depend_on_the_plan(application):
    expected, found = features_means_and_gradients(Application()), features_means_and_gradients(application)
    assert set(found[1]) == {f"block_{i:02d}/linear" for i in range(1, 5)}
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e4 * 2.0**-52 * np.abs(b).max())
    sizes = {round(float(jnp.linalg.norm(mean)), 6) for mean in found[1].values()}
    assert len(sizes) == 4  # control: each layer has its own


def test_the_pieces_of_a_network():
    """stem, 5 blocks, neck_conv: three operators each; flatten: one; neck_dense: three."""
    model, variables = build(5)
    network = jax.eval_shape(lambda params: network_of(model, variables, params), variables["params"])
    single = [(3 * i, 3, 1) for i in range(7)] + [(21, 1, 1), (22, 3, 1)]
    assert _pieces(network, Application()) == _pieces(network, Application(remat=1)) == single
    assert _pieces(network, Application(scan=True)) == [single[0], (3, 3, 5), *single[6:]]
    assert _pieces(network, Application(remat=4)) == [(0, 12, 1), (12, 10, 1), (22, 3, 1)]
    assert _pieces(network, Application(remat=2, scan=True)) == [(0, 3, 1), (3, 6, 2), (15, 6, 1), (21, 4, 1)]


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_arrays_without_entries_do_not_stop_micro_batches():
    # Such as the pairs of frequencies of a circulant on a map of one pixel.
    total, part = {"paired": jnp.zeros((0, 2)), "real": jnp.ones(2)}, jnp.arange(3.0)
    np.testing.assert_array_equal(jax.jit(_after)(total, part), part)
    np.testing.assert_array_equal(jax.jit(_after)({**total, "real": jnp.full(2, np.nan)}, part), jnp.zeros(3))


@pytest.mark.x64_off
def test_centering_and_micro_batches_exclude_each_other():
    changes = {"accumulation": 2, "model.centering": True}
    with pytest.raises(UserError, match="config.accumulation = 2 needs config.model.centering = False"):
        validate(tiny_config(**changes))
    with pytest.raises(UserError, match="config.accumulation = 2 needs"):  # whatever the model calls it
        step, arguments = step_and_arguments(make_run(**changes))
        jax.eval_shape(step, *arguments)
    validate(tiny_config(**{**changes, "accumulation": 1}))  # control


def test_micro_batches_divide_over_the_devices():
    with pytest.raises(UserError, match="micro-batches of 4 images, which do not divide over 8 devices"):
        make_run(**{"accumulation": 4, "mesh.data": 8})


def test_a_run_may_be_resumed_with_other_switches_but_not_another_precision():
    meta = {"config": plain(tiny_config()), "seed": 0}
    check_same_run("there", meta, tiny_config(accumulation=4, remat=2, scan=True), 0)
    with pytest.raises(UserError, match="config.precision: 'float32' there, 'bfloat16' now"):
        check_same_run("there", meta, tiny_config(precision="bfloat16"), 0)


PARTS = [({"model.centering": True}, {"mesh.data": 4}), ({}, {"accumulation": 2, "mesh.data": 8})]


@pytest.mark.x64_off
@pytest.mark.parametrize("both, parted", everyday(PARTS, PARTS[0]))
def test_means_over_images_and_classes_are_those_of_the_whole_batch(both, parted):
    """On several devices, also in micro-batches of one image a device: none of them sees all classes."""
    found, states = [], []
    for switches in ({}, parted):
        changes = SGD | {"model.depth": 2, "loss.name": "hkr", "loss.alpha": 0.25} | both | switches
        run = Run(tiny_config(**changes), 0)
        state, metrics = run.batch_runner(0)(run.fresh_state(), 0, {})
        found.append([float(metrics[name]) for name in ("loss", "grad_norm")])
        states.append([np.array(leaf) for leaf in jax.tree.leaves((state.params, state.lip))])
    np.testing.assert_allclose(*found, rtol=100 * EPS32)
    for one, many in zip(*states, strict=True):  # of centering, the running means are among them
        np.testing.assert_allclose(one, many, rtol=1e-5, atol=1e-5)
    # Control: by their own counts the values of a micro-batch are others.
    logits, labels = jnp.eye(3)[jnp.array([0, 0, 1])], jnp.array([0, 0, 1])
    counts = (None, jnp.full(3, 4))
    seen = [Seen(logits, labels, None, class_counts=of_whole) for of_whole in counts]
    own, whole = (LOSSES["hkr"].apply(run.config.loss, part, {}).mean() for part in seen)
    assert abs(own - whole) > 0.01
