"""Class weights: what they are, that losses are linear in them, on any mesh and in any micro-batches, and refusals."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import everyday
from training_helpers import made_up_images, npz_file, quick_compiles, tiny_config  # noqa: F401

from lipjax.errors import UserError
from lipjax.plan import plan
from lipjax.training import step as steps
from lipjax.training.checks import check_class_weights
from lipjax.training.data import StreamDataset
from lipjax.training.loop import METRIC, Run, train

pytestmark = pytest.mark.x64_off

EPS32 = 2.0**-23
SCHEDULE = {"epsilon": 0.1, "crm_weight": 1.0, "crm_radius": 2.0}
RATE = 0.01
COUNTS = (70, 20, 10)


def skewed(**changes):
    """A run on images of which the classes hold 70, 20 and 10, by plain gradient descent."""
    images, labels = made_up_images(3 * COUNTS[0])
    kept = np.concatenate([np.flatnonzero(labels == c)[:n] for c, n in enumerate(COUNTS)])
    path = npz_file("skewed", images=images[kept], labels=labels[kept])
    config = {"data.path": str(path), "optimizer.name": "sgd", "optimizer.learning_rate": RATE}
    config |= {"optimizer.clip_norm": 0.0, "optimizer.warmup_epochs": 0.0, "batch_size": 32}
    return Run(tiny_config(**config | {"loss.class_weights": "balanced"} | changes), 0)


def test_balanced_weights_let_all_classes_count_alike():
    labels = np.repeat(np.arange(3), COUNTS)
    weights = steps.balanced_weights(labels, 3)
    np.testing.assert_allclose(weights, [100 / (3 * n) for n in COUNTS], rtol=EPS32)
    np.testing.assert_allclose(np.bincount(labels, weights[labels]), 100 / 3, rtol=10 * EPS32)
    np.testing.assert_allclose(weights[labels].mean(), 1, rtol=10 * EPS32)
    assert np.array_equal(steps.balanced_weights(np.arange(60) % 3, 3), np.ones(3))
    assert np.array_equal(steps.balanced_weights(np.zeros(5, int), 3), [1, 0, 0])


def test_a_run_takes_its_weights_from_its_training_images():
    run = skewed()
    counts = np.bincount(run.dataset.split("train").labels)
    assert counts.tolist() == [56, 16, 8]  # less a fifth for validation
    np.testing.assert_allclose(run.class_weights, 80 / (3 * counts), rtol=EPS32)
    assert skewed(**{"loss.class_weights": "none"}).class_weights is None


def first_step(run):
    """Loss, gradient norm and the parameters' change in the first step."""
    state = run.fresh_state()
    before = jax.tree.map(np.array, state.params)
    state, metrics = run.batch_runner(0)(state, 0, SCHEDULE)
    assert metrics["finite"]
    change = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - b, state.params, before)
    return float(metrics["loss"]), float(metrics["grad_norm"]), change


@functools.cache
def reference():
    return first_step(skewed())


@pytest.mark.parametrize(
    "switches",
    everyday(
        [{"accumulation": 4}, {"accumulation": 2, "scan": True, "mesh.data": 4}, {"mesh.data": 8}], {"mesh.data": 8}
    ),
    ids=str,
)
def test_weighted_gradients_do_not_depend_on_micro_batches_and_devices(switches):
    loss, norm, change = reference()
    found = first_step(skewed(**switches))
    np.testing.assert_allclose(found[:2], (loss, norm), rtol=100 * EPS32)
    for a, b in zip(*map(jax.tree.leaves, (found[2], change)), strict=True):
        # The parameter that the update is added to is rounded.
        np.testing.assert_allclose(a, b, rtol=0, atol=100 * EPS32 * RATE * norm + 4 * EPS32)


def test_without_weights_it_is_another_step():
    """The control of the tolerance above."""
    loss, norm, _ = reference()
    plain, plain_norm, _ = first_step(skewed(**{"loss.class_weights": "none"}))
    assert abs(plain / loss - 1) > 1000 * EPS32 and abs(plain_norm / norm - 1) > 1000 * EPS32


@pytest.mark.nightly
def test_losses_are_linear_in_the_weights():
    """Each class alone adds up to the weighted loss, and weights of 1 are none: for losses of every kind."""
    run = skewed(**{"loss.name": "crm", "loss.weight_start_epoch": 0, "loss.radius": 5.0})

    def loss(weights):
        run.__dict__["class_weights"] = weights
        return first_step(run)[0]

    alone = [loss(np.eye(3, dtype=np.float32)[c]) for c in range(3)]
    weights = np.array([0.5, 2.0, 7.0], np.float32)
    assert all(value > 0 for value in alone) and len(set(alone)) == 3  # control
    np.testing.assert_allclose(loss(weights), np.dot(weights, alone), rtol=100 * EPS32)
    np.testing.assert_allclose(loss(np.ones(3, np.float32)), loss(None), rtol=10 * EPS32)


def test_validation_weighs_images_alike():
    run = skewed()
    state = run.fresh_state()
    counts, weights = np.bincount(run.dataset.split("validation").labels), run.class_weights

    def validated(weights):
        run.__dict__["class_weights"] = weights
        return run.validator()(state)

    found, plain = validated(weights), validated(None)
    alone = [validated(np.eye(3, dtype=np.float32)[c]) for c in range(3)]
    for name in ("accuracy", METRIC, "cross_entropy"):
        of_class = [each[name] for each in alone]
        expected = np.dot(weights * counts, of_class) / np.dot(weights, counts)
        np.testing.assert_allclose(found[name], expected, rtol=100 * EPS32)
        np.testing.assert_allclose(plain[name], np.dot(counts, of_class) / counts.sum(), rtol=100 * EPS32)
    accuracy = [each["accuracy"] for each in alone]
    assert abs(found["accuracy"] - np.dot(counts, accuracy) / counts.sum()) > 0.05  # control: an untrained network
    np.testing.assert_allclose(found["accuracy"], np.mean(accuracy), atol=1e-6)  # validation holds a fifth of each


def test_a_weighted_run_trains_and_does_not_resume_without(tmp_path):
    config = skewed(num_epochs=1).config
    train(config, tmp_path, 0)
    train(config, tmp_path, 0)  # control
    with config.unlocked():
        config.loss.class_weights = "none"
    with pytest.raises(UserError, match="config.loss.class_weights: 'balanced' there, 'none' now"):
        train(config, tmp_path, 0)


def test_a_plan_knows_the_weights():
    weighted, plain = (plan.traced_step(skewed(**{"loss.class_weights": w})).lower() for w in ("balanced", "none"))
    assert weighted.as_text() != plain.as_text()
    assert jnp.isfinite(steps.balanced_weights(np.broadcast_to(np.int32(0), (9,)), 3)).all()  # of a planned data set


def test_weights_without_counts_are_refused():
    config = tiny_config(**{"loss.class_weights": "balanced"})
    stream = StreamDataset("imagenet", {}, 3, 8)
    with pytest.raises(UserError, match="imagenet is streamed"):
        check_class_weights(config, stream)
    array = types.SimpleNamespace(name="cifar10")
    check_class_weights(config, array)  # control
    mixed = tiny_config(
        **{"loss.class_weights": "balanced", "data.generated.path": "x.npz", "data.generated.per_batch": 4}
    )
    with pytest.raises(UserError, match="would count generated images"):
        check_class_weights(mixed, array)
