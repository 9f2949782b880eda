"""The jitted step and the schedules: the same on 1 and 8 devices, clipped, warm-started, silent about nothing."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiers import everyday
from training_helpers import differing, quick_compiles, tiny_config  # noqa: F401  quick_compiles is a fixture

from lipjax.training import objective, optimizer, sharding
from lipjax.training import step as steps
from lipjax.training.loop import Run

EPS32 = 2.0**-23
SCHEDULE = {"epsilon": 0.1}


def make_run(devices=1, **changes):
    return Run(tiny_config(**{"mesh.data": devices, **changes}), 0)


def losses(run, num_steps):
    state, train_batch, found = run.fresh_state(), run.batch_runner(0), []
    for step in range(num_steps):
        state, metrics = train_batch(state, step, SCHEDULE)
        found.append(float(metrics["loss"]))
    return np.array(found), state


@pytest.mark.nightly
@pytest.mark.x64_off
def test_one_and_eight_devices_give_the_same_losses():
    one, state = losses(make_run(1), 4)
    eight, state8 = losses(make_run(8), 4)
    # Sums over the batch are associated differently: a relative error of a few eps at each step, which grows with the
    # steps, since each follows from the last. 100 eps after four steps is far below what another batch would change.
    np.testing.assert_allclose(eight, one, rtol=100 * EPS32, atol=0)
    assert len(state8.step.sharding.device_set) == 8 and len(state.step.sharding.device_set) == 1
    other = losses(Run(tiny_config(), 1), 4)[0]
    assert np.all(np.abs(other / one - 1) > 1000 * EPS32)  # control


@pytest.mark.nightly
def test_training_also_runs_with_x64_on():
    found, state = losses(make_run(1), 2)
    assert np.isfinite(found).all() and len(set(found)) == 2
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((state.params, state.lip)))
    assert jnp.zeros(()).dtype == jnp.float64  # control


@pytest.mark.x64_off
@pytest.mark.parametrize("devices", everyday([1, 8], 8))
def test_each_step_sees_the_batch_of_its_place_in_the_permutation(devices):
    run = make_run(devices)
    key, part = run.fresh_state().key, run.dataset.split("train")

    def look(state, images, labels, schedule):
        pixels = steps.preprocess(jax.random.fold_in(state.key, 3), images, run.config.data, run.pixel_max)
        return state, (images, labels, pixels)

    jitted = steps.jit_array_step(look, run.mesh, 16)
    seen = []
    for epoch in (0, 1):
        order = steps.epoch_order(key, epoch, run.num_images)
        assert np.array_equal(np.sort(order), np.arange(48))
        for start in (0, 16, 32):
            args = jax.device_put((part.images, part.labels, order), sharding.replicated(run.mesh))
            _, (images, labels, pixels) = jitted(run.fresh_state(), *args, start, SCHEDULE)
            index = np.asarray(order)[start : start + 16]
            assert np.array_equal(images, part.images[index]) and np.array_equal(labels, part.labels[index])
            plain = steps.preprocess(jax.random.fold_in(key, 3), jnp.asarray(images), run.config.data, 255)
            assert np.array_equal(pixels, plain)  # the augmentation does not depend on the mesh
            assert not np.array_equal(pixels, np.asarray(images, np.float32) / 255)  # control: it does something
            seen.append(index)
    assert not np.array_equal(np.concatenate(seen[:3]), np.concatenate(seen[3:]))  # each epoch has its own order


@pytest.mark.x64_off
def test_the_step_on_eight_devices_gathers_no_batch():
    run = make_run(8)
    train_step = steps.make_train_step(run.model, run.optimizer, run.config, run.mesh, run.pixel_max)
    part, everywhere = run.dataset.split("train"), sharding.replicated(run.mesh)
    data = jax.device_put((part.images, part.labels, jnp.arange(run.num_images)), everywhere)

    def program(step):
        lowered = steps.jit_array_step(step, run.mesh, 16).lower(run.fresh_state(), *data, 0, SCHEDULE)
        return lowered.compile().as_text()

    text = program(train_step)
    assert "all-gather" not in text and "all-to-all" not in text
    assert "all-reduce" in text  # the sum of the gradients: the batch is divided

    def gathering(state, images, labels, schedule):
        pixels = images / jnp.float32(255)
        return state, jax.lax.with_sharding_constraint(pixels, everywhere).sum((1, 2, 3)) * labels

    assert "all-gather" in program(gathering)  # control


@pytest.mark.x64_off
def test_vectors_are_warm_started_and_reach_the_norm_of_the_dense_matrix():
    run = make_run(1, **{"optimizer.learning_rate": 1e-9})  # the same network at every step
    _, state = losses(run, 30)
    network = jax.jit(lambda params: run.model.apply({"params": params}, method="build"))(state.params)
    estimate = jax.jit(lambda op, v: op.estimate(v, 1)[0])
    fresh = run.fresh_state().lip["vectors"]
    gaps, cold = {}, {}
    for name, op in zip(network.names, network.ops, strict=True):
        if not hasattr(op, "estimate"):
            continue
        size = math.prod(op.in_shape)
        unit = np.eye(size, dtype=np.float32).reshape(size, *op.in_shape)
        dense = np.asarray(jax.jit(lambda op, x: op(x))(op, unit)).reshape(size, -1)
        norm = np.linalg.norm(dense.astype(np.float64), 2)
        for vectors, found in ((state.lip["vectors"], gaps), (fresh, cold)):
            found[name] = 1 - float(estimate(op, vectors[name])) / norm
    assert set(gaps) == {"stem/linear", "block_01/linear", "neck_conv/linear", "neck_dense/linear"}
    # An estimate is a Rayleigh quotient, never above the norm but for rounding.
    assert all(-1e-5 <= gap < 0.02 for gap in gaps.values()), gaps
    assert sum(cold.values()) > 5 * sum(gaps.values())  # control: without the steps before, one iteration is far off


# The numbers of the epoch that a loss follows, and a field that changes it and nothing else.
READ = {
    "emma": ({"epsilon"}, None),
    "margin": ({"epsilon"}, None),
    "gloro": ({"epsilon"}, None),
    "trades": ({"epsilon"}, "trades_weight"),
    "certificate_regularization": (set(), "gamma"),
    "curvature": (set(), "curvature_weight"),
    "crm": ({"crm_weight", "crm_radius"}, "temperature"),
    "crm_max": ({"crm_weight", "crm_radius"}, "temperature"),
    "cross_entropy": (set(), None),
    "offset_cross_entropy": (set(), "offset"),
    "scaled_offset_cross_entropy": (set(), "epsilon"),
    "logit_annealing": ({"epsilon"}, "power"),
    "cll": (set(), "shift"),
    "hkr": (set(), "margin"),
    "lse_hkr": (set(), "penalty"),
    "multi_margin": (set(), "power"),
    "margin_boosting": (set(), None),
}


@pytest.mark.parametrize("name", sorted(objective.LOSSES))
def test_every_loss_reads_its_fields_and_the_numbers_of_the_epoch(name):
    config = tiny_config(**{"loss.name": name})
    logits, labels = jnp.array([[1.0, 0.5, 0.0], [0.0, 2.0, 1.0]]), jnp.array([0, 2])
    seen = objective.Seen(logits, labels, jnp.ones((3, 3)) - jnp.eye(3), lambda: jnp.array([[1.0], [2.0]]))
    numbers, field = READ[name]
    assert set(objective.loss_schedule(config.loss, 0, 3)) == numbers
    schedule = {"epsilon": 0.3, "crm_weight": 1.0, "crm_radius": 2.0}
    found = objective.LOSSES[name].apply(config.loss, seen, schedule)
    assert found.shape == (2,) and jnp.isfinite(found).all() and found[0] < found[1]
    for number in schedule:
        later = objective.LOSSES[name].apply(config.loss, seen, schedule | {number: 0.1})
        assert bool(jnp.any(later != found)) == (number in numbers), number
    if field is not None:
        other = tiny_config(**{"loss.name": name, f"loss.{field}": 7.0})
        assert bool(jnp.any(objective.LOSSES[name].apply(other.loss, seen, schedule) != found))


# ---- optimizer.py --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("warmup_epochs", "num_epochs"), [(0.0, 3), (1.0, 3), (0.5, 2), (2.0, 5), (9.0, 2), (0.1, 1)])
def test_the_learning_rate_is_the_closed_form(warmup_epochs, num_epochs):
    per_epoch, peak, final = 10, 0.3, 1e-2
    config = tiny_config(
        **{
            "optimizer.learning_rate": peak,
            "optimizer.warmup_epochs": warmup_epochs,
            "optimizer.final_fraction": final,
        }
    ).optimizer
    schedule = optimizer.learning_rate_schedule(config, per_epoch, num_epochs)
    total = per_epoch * num_epochs
    warmup = min(round(warmup_epochs * per_epoch), total - 1)
    for i in range(total):
        cosine = final + (1 - final) * (1 + math.cos(math.pi * (i - warmup) / (total - warmup))) / 2
        expected = peak * ((i + 1) / warmup if i < warmup else cosine)
        assert abs(float(schedule(i)) - expected) <= 10 * EPS32 * peak, i


def test_the_training_radius_rises_linearly_by_epoch():
    config = tiny_config(**{"loss.epsilon": 36 / 255, "loss.epsilon_end": 3.0}).loss
    for epoch in range(20):  # the papers: epsilon [0.1 + 2.9 min(2 e / E, 1)]
        expected = 36 / 255 * (0.1 + 2.9 * min(2 * epoch / 20, 1))
        assert objective.epsilon_at(config, epoch, 20) == pytest.approx(expected, rel=1e-14)
    at_once = tiny_config(**{"loss.epsilon_ramp": 0.0, "loss.epsilon": 0.25, "loss.epsilon_end": 2.0}).loss
    assert objective.epsilon_at(at_once, 0, 20) == 0.5


def test_the_triangular_schedule_is_the_interpolation_of_its_corners():
    with jax.enable_x64(False):
        fields = {"learning_rate": 0.3, "schedule": "triangular", "warmup_epochs": 8.0}
        config = tiny_config(**{f"optimizer.{name}": value for name, value in fields.items()}).optimizer
        rate = optimizer.learning_rate_schedule(config, 10, 20)
        found = np.array([float(rate(i)) for i in range(200)])
        # Step i of the warm-up takes (i + 1) / 80 of the peak, so it ends a step before the corner.
        expected = np.interp(np.arange(200), [-1, 79, 80, 160, 200], [0, 0.3, 0.3, 0.3 / 20, 0])
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_the_exponential_schedule_is_the_closed_form():
    """Constant for decay_from epochs, then straight in the logarithm to final_fraction at the last step."""
    for warmup_epochs, decay_from, num_epochs in ((0.0, 2.0, 5), (1.0, 2.0, 5), (1.0, 0.0, 3), (0.0, 0.0, 1)):
        config = tiny_config(**{"optimizer.learning_rate": 0.3, "optimizer.schedule": "exponential"}).optimizer
        with config.unlocked():
            config.update({"warmup_epochs": warmup_epochs, "decay_from": decay_from, "final_fraction": 1e-3})
        rate = optimizer.learning_rate_schedule(config, 10, num_epochs)
        warmup, last = int(10 * warmup_epochs), 10 * num_epochs - 1
        begin = max(10 * decay_from, warmup)
        for i in range(last + 1):
            expected = 0.3 * ((i + 1) / warmup if i < warmup else 1e-3 ** max(0.0, (i - begin) / (last - begin)))
            # log(1e-3) = -7: the exponent's rounding is multiplied by it.
            assert abs(float(rate(i)) - expected) <= 20 * EPS32 * expected, (i, warmup_epochs, decay_from)
        assert float(rate(last)) == pytest.approx(3e-4, rel=20 * EPS32)
    with config.unlocked():
        config.decay_from = 5.0  # never: not below the number of epochs
    constant = optimizer.learning_rate_schedule(config, 10, 5)
    assert float(constant(0)) == float(constant(49)) == pytest.approx(0.3)


def test_the_weight_of_crm_starts_late_and_both_grow_from_then_on():
    changes = {"loss.name": "crm", "loss.weight": 30.0, "loss.radius": 2.2, "loss.weight_start_epoch": 10}
    config = tiny_config(**changes).loss
    found = [objective.loss_schedule(config, epoch, 20) for epoch in range(20)]
    assert [schedule["crm_weight"] for schedule in found] == 10 * [0.0] + 10 * [30.0]
    assert {schedule["crm_radius"] for schedule in found} == {2.2}
    config = tiny_config(**changes, **{"loss.weight_growth": 1.1, "loss.radius_growth": 0.9}).loss
    for epoch in (0, 9, 10, 11, 15):
        schedule, grown = objective.loss_schedule(config, epoch, 20), max(epoch - 10, 0)
        assert schedule["crm_weight"] == pytest.approx(30 * 1.1**grown if epoch >= 10 else 0.0, rel=1e-14)
        assert schedule["crm_radius"] == pytest.approx(2.2 * 0.9**grown, rel=1e-14)


def test_adam_is_torchs():
    """m and v corrected for their start, eps beside the root, the decay in the gradient."""
    config = tiny_config(**{"optimizer.name": "adam", "optimizer.learning_rate": 0.1, "optimizer.eps": 0.5}).optimizer
    with config.unlocked():
        config.update({"schedule": "step", "warmup_epochs": 0.0, "clip_norm": 0.0, "weight_decay": 0.25})
    transform = optimizer.make_optimizer(config, 10, 1)
    params = {"matrix": jnp.array([[2.0]])}
    state, p, m, v = transform.init(params), 2.0, 0.0, 0.0
    for i in range(1, 5):
        updates, state = transform.update({"matrix": jnp.array([[float(i)]])}, state, params)
        params = optax.apply_updates(params, updates)
        g = i + 0.25 * p
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        p -= 0.1 * (m / (1 - 0.9**i)) / (math.sqrt(v / (1 - 0.999**i)) + 0.5)
        np.testing.assert_allclose(params["matrix"], [[p]], rtol=1e-5)


def test_gradients_are_clipped_by_their_global_norm():
    def update(clip_norm, gradients, name="sgd"):
        config = tiny_config(
            **{"optimizer.name": name, "optimizer.learning_rate": 1.0, "optimizer.clip_norm": clip_norm}
        ).optimizer
        with config.unlocked():
            config.warmup_epochs = 0.0
        transform = optimizer.make_optimizer(config, 10, 1)
        params = jax.tree.map(jnp.zeros_like, gradients)
        return transform.update(gradients, transform.init(params), params)[0]

    gradients = {"a": jnp.array([30.0, 0.0]), "b": jnp.array([40.0])}  # norm 50
    clipped, free, unclipped = (update(norm, gradients) for norm in (5.0, 100.0, 0.0))
    np.testing.assert_allclose(clipped["a"], [-3, 0], rtol=1e-6)
    np.testing.assert_allclose(clipped["b"], [-4], rtol=1e-6)
    np.testing.assert_allclose(free["b"], [-40], rtol=1e-6)  # control
    np.testing.assert_array_equal(unclipped["b"], free["b"])


def test_sgd_is_torchs():
    """Momentum 0.9 without Nesterov, the decay in the gradient: v <- 0.9 v + g + d p, p <- p - rate v."""
    config = tiny_config(
        **{"optimizer.name": "sgd", "optimizer.learning_rate": 0.1, "optimizer.weight_decay": 0.5}
    ).optimizer
    with config.unlocked():
        config.update({"schedule": "step", "warmup_epochs": 0.0, "clip_norm": 0.0})
    transform = optimizer.make_optimizer(config, 2, 4)  # eight steps: the rate falls at 4 and 6
    params = {"matrix": jnp.array([[2.0]]), "theta": jnp.array([2.0])}
    state, p, v, t = transform.init(params), 2.0, 0.0, 2.0
    velocity = 0.0
    for step_number in range(8):
        grads = {"matrix": jnp.array([[1.0]]), "theta": jnp.array([1.0])}
        updates, state = transform.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        rate = 0.1 * (1 if step_number < 4 else 0.1 if step_number < 6 else 0.01)
        v = 0.9 * v + 1 + 0.5 * p
        p -= rate * v
        velocity = 0.9 * velocity + 1  # an angle does not decay
        t -= rate * velocity
        np.testing.assert_allclose(params["matrix"], [[p]], rtol=1e-5)
        np.testing.assert_allclose(params["theta"], [t], rtol=1e-5)


def test_weight_decay_of_weights_spares_biases_angles_and_the_mlp_head():
    params = {"conv": {"kernel": jnp.ones((1, 1, 2, 2)), "bias": jnp.ones(2)}, "head": {"w1": jnp.ones((2, 2))}}
    params["conv"]["activation"] = {"theta": jnp.ones(1)}
    params["stack"] = {name: jnp.ones((3, 2)) for name in ("bias", "gamma")} | {"weight": jnp.ones((3, 2, 2))}
    for which, expected in (("all", [True, True, True, False]), ("weights", [True, False, False, False])):
        mask = optimizer.decay_mask(which)(params)
        found = [mask["conv"]["kernel"], mask["conv"]["bias"], mask["head"]["w1"], mask["conv"]["activation"]["theta"]]
        assert found == expected
        assert mask["stack"] == {"bias": which == "all", "gamma": which == "all", "weight": True}


def test_training_the_head_alone_moves_nothing_else():
    config = tiny_config(**{"optimizer.weight_decay": 0.1}).optimizer
    params = {"conv": {"kernel": jnp.ones(3)}, "head": {"matrix": jnp.ones(3)}}
    for head_only in (True, False):
        transform = optimizer.make_optimizer(config, 10, 1, head_only)
        updates, _ = transform.update(jax.tree.map(jnp.ones_like, params), transform.init(params), params)
        assert (np.asarray(updates["head"]["matrix"]) != 0).all()
        assert (np.asarray(updates["conv"]["kernel"]) != 0).all() != head_only


@pytest.mark.parametrize("name", sorted(optimizer.OPTIMIZERS))
def test_weight_decay_pulls_towards_zero(name):
    def moved(decay):
        config = tiny_config(**{"optimizer.name": name, "optimizer.weight_decay": decay}).optimizer
        transform = optimizer.make_optimizer(config, 10, 1)
        params = {"a": jnp.array([2.0]), "orthogonal_b": jnp.eye(2)}
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, _ = transform.update(zeros, transform.init(params), params)
        return optax.apply_updates(params, updates)["a"][0]

    assert moved(0.0) == 2.0 and moved(0.1) < 2.0


def test_the_batch_must_divide_over_the_mesh():
    from lipjax.errors import UserError

    assert sharding.make_mesh(-1, 16).size == 8
    with pytest.raises(UserError, match="batch_size = 20 does not divide over 8 devices"):
        sharding.make_mesh(-1, 20)
    with pytest.raises(UserError, match="16 devices, but JAX sees 8"):
        sharding.make_mesh(16, 16)


def test_the_state_is_a_pytree_of_its_five_fields():
    names = [field.name for field in dataclasses.fields(steps.TrainState)]
    assert names == ["step", "params", "lip", "opt_state", "key"]  # the checkpoints of earlier runs have these
