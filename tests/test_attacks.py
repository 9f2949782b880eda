"""Attacks: on a linear classifier the nearest other class is known exactly, and no attack may beat a certificate."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lipjax import attacks, operators
from lipjax.frozen import FrozenNetwork
from lipjax.network import make_network

SHAPE = (4, 4, 1)
# What PGD may lack of the optimum on a linear function, as a fraction of the radius. In n steps of 2.5 epsilon / n the
# tangent of half the angle to the optimum shrinks by exp(-2.5) or more: from a start at 135 degrees to 22 degrees and a
# lack of 0.08, from one at 90 degrees, which is what random starts are near in 16 dimensions, to 9 degrees and 0.013.
SHORT = 0.013


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Linear:
    """Two classes: the second where w . x + b > 0."""

    w: jax.Array
    b: jax.Array

    def __call__(self, x):
        score = x.reshape(len(x), -1) @ self.w + self.b
        return jnp.stack([jnp.zeros_like(score), score], axis=1)


@pytest.fixture
def linear():
    """A classifier, 20 images well inside the pixel box, their labels, and their exact distances to the other class."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=16)
    images = rng.uniform(0.4, 0.6, (20, *SHAPE))
    b = -0.5 * w.sum()
    score = images.reshape(20, -1) @ w + b
    model = Linear(jnp.asarray(w), jnp.asarray(b))
    return model, images, (score > 0).astype(np.int32), np.abs(score) / np.linalg.norm(w)


def norms(delta):
    return np.sqrt((np.asarray(delta, np.float64) ** 2).reshape(len(delta), -1).sum(1))


def test_pgd_finds_the_closed_form_optimum(linear, key):
    model, images, labels, distance = linear
    for factor, succeeds in ((1.02, True), (0.99, False)):
        for i in (0, 7, 13):
            one, label = jnp.asarray(images[i : i + 1]), jnp.asarray(labels[i : i + 1])
            radius = factor * distance[i]
            moved = attacks.pgd_l2(model, one, label, radius, key, num_steps=20)
            assert (np.argmax(model(moved), 1)[0] != labels[i]) == succeeds
            # The objective is linear, so the optimum is the radius along w: its gap is known.
            gap = np.linalg.norm(model.w) * (radius - distance[i])
            found = (model(moved)[0, 1] - model(moved)[0, 0]) * (1 - 2 * labels[i])
            assert gap - SHORT * np.linalg.norm(model.w) * radius <= found <= gap + 1e-9


def test_attack_distances_are_the_first_radius_that_suffices(linear):
    model, images, labels, distance = linear
    radii = (0.02, 0.05, 0.1, 0.2)
    found = attacks.attack_l2(model, images, labels, radii, num_steps=30, batch_size=8)  # the last batch is not full
    expected = np.array([min((r for r in radii if r > d), default=np.inf) for d in distance])
    clear = np.all([np.abs(distance / r - 1) > 3 * SHORT for r in radii], axis=0)
    assert clear.sum() >= 8 and len(set(expected[clear])) >= 3  # control: the radii differ in what they reach
    assert np.array_equal(np.isinf(found.distances[clear]), np.isinf(expected[clear]))
    assert np.all(found.distances[clear] <= expected[clear] * (1 + 1e-9))
    assert np.all(found.distances >= distance * (1 - 1e-12))
    np.testing.assert_allclose(norms(found.points - images), np.where(np.isinf(found.distances), 0, found.distances))
    wrong = np.argmax(np.asarray(model(jnp.asarray(found.points))), 1) != labels
    assert np.array_equal(wrong, np.isfinite(found.distances))


def test_without_steps_only_the_images_themselves_count(linear):
    model, images, labels, _ = linear
    wrong = labels.copy()
    wrong[3] = 1 - wrong[3]
    found = attacks.attack_l2(model, images, wrong, (0.5,), num_steps=0)
    assert found.distances[3] == 0 and np.isinf(np.delete(found.distances, 3)).all()


@pytest.mark.parametrize("epsilon", [0.3, 5.0])
def test_pgd_stays_in_the_ball_and_in_the_box(epsilon, key):
    model = Linear(jnp.asarray(np.random.default_rng(1).normal(size=16)), jnp.asarray(0.0))
    images = np.random.default_rng(2).integers(0, 2, (30, *SHAPE)).astype(float)  # corners of the box
    labels = jnp.asarray(np.argmax(model(jnp.asarray(images)), 1).astype(np.int32))
    moved = np.asarray(attacks.pgd_l2(model, jnp.asarray(images), labels, epsilon, key, num_steps=10))
    assert moved.min() >= 0 and moved.max() <= 1
    assert np.all(norms(moved - images) <= epsilon * (1 + 1e-12))
    assert np.any(norms(moved - images) > 0.1 * epsilon)  # control: it moves
    projected = np.asarray(attacks.project_l2(jnp.asarray(images - 0.5), epsilon))
    np.testing.assert_allclose(norms(projected), np.minimum(norms(images - 0.5), epsilon))


def test_no_attack_comes_within_a_certified_radius():
    rng = np.random.default_rng(3)
    ops = [
        ("conv", operators.Conv(jnp.asarray(rng.normal(size=(3, 3, 1, 4))), SHAPE)),
        ("activation", operators.MaxMin((4, 4, 4))),
        ("flatten", operators.Flatten((4, 4, 4))),
    ]
    head = operators.LinearHead(jnp.asarray(rng.normal(size=(3, 64))), jnp.asarray(rng.normal(size=3)))
    network = make_network(ops, head)
    images = rng.uniform(size=(40, *SHAPE))
    certificate = FrozenNetwork(jax.tree.map(np.asarray, network)).certify(images)
    labels = certificate.predictions.astype(np.int32)
    radii = tuple(np.quantile(certificate.radii, [0.25, 0.5, 0.9]) * 3)
    found = attacks.attack_l2(network, images, labels, radii, num_steps=15)
    assert np.isfinite(found.distances).any()
    assert np.all(found.distances >= certificate.radii)
    assert np.any(found.distances < 30 * certificate.radii)  # control: radii inflated that much are refuted
