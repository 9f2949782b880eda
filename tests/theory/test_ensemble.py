"""The ensemble: difference-of-logits ratios, members that get only what earlier ones left, and strength in sum."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import everyday
from training_helpers import quick_compiles  # noqa: F401

from lipjax import attacks
from lipjax.attacks import pgd, search

pytestmark = pytest.mark.mixed_dtypes

SHAPE = (6, 6, 1)
STEPS = {"num_steps": 6, "num_queries": 60, "num_targets": 2, "batch_size": 16}
MEMBERS = (
    {"method": "apgd", "objective": "cross_entropy"},
    {"method": "apgd", "objective": "targeted_dlr"},
    {"method": "square"},
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Uneven:
    """Five classes from two layers; where the first pixel is above 1/2, pixels are rounded first: no gradient there."""

    w1: jax.Array
    w2: jax.Array

    def __call__(self, x):
        flat = x.reshape(len(x), -1)
        flat = jnp.where(flat[:, :1] > 0.5, jnp.round(flat * 64) / 64, flat)
        return jnp.maximum(flat @ self.w1, 0) @ self.w2


@functools.cache
def problem():
    """The network, 40 images, their classes, and a radius at which each member breaks some of them."""
    rng = np.random.default_rng(0)
    model = Uneven(jnp.asarray(rng.normal(size=(36, 30))), jnp.asarray(rng.normal(size=(30, 5))))
    images = rng.uniform(0.2, 0.8, (40, *SHAPE))
    images[:, 0, 0, 0] = np.where(np.arange(40) % 2, 0.9, 0.1)
    return model, images, np.argmax(np.asarray(model(jnp.asarray(images))), axis=1).astype(np.int32), 0.35


def broken(images, radius, **options):
    model, _, labels, _ = problem()
    result = attacks.attack_l2(model, images, labels[: len(images)], (radius,), **STEPS, **options)
    assert np.all(result.distances[np.isfinite(result.distances)] <= radius * (1 + 1e-6))
    return np.isfinite(result.distances), result


def test_difference_of_logits_ratios_are_those_of_the_paper():
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(20, 6)), rng.integers(0, 6, 20)
    targets = (labels + rng.integers(1, 6, 20)) % 6
    found = [np.asarray(f) for f in (pgd.dlr(jnp.asarray(logits), jnp.asarray(labels)),
             pgd.targeted_dlr(jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(targets)))]  # fmt: skip
    for z, y, t, untargeted, targeted in zip(logits, labels, targets, *found, strict=True):
        order = sorted(z, reverse=True)
        best = max(value for i, value in enumerate(z) if i != y)
        assert untargeted == pytest.approx(-(z[y] - best) / (order[0] - order[2]), rel=1e-9)
        assert targeted == pytest.approx(-(z[y] - z[t]) / (order[0] - (order[2] + order[3]) / 2), rel=1e-9)
    # Neither a factor nor a summand matters, while cross-entropy saturates: its gradient vanishes.
    scaled = jnp.asarray(1e4 * logits + 7)
    np.testing.assert_allclose(pgd.dlr(scaled, jnp.asarray(labels)), found[0], rtol=1e-6)
    np.testing.assert_allclose(pgd.targeted_dlr(scaled, jnp.asarray(labels), jnp.asarray(targets)), found[1], rtol=1e-6)
    # With few classes: finite values and gradients, of the same sign as the margin.
    for classes in (2, 3):
        z, y = jnp.asarray(logits[:, :classes]), jnp.asarray(labels % classes)
        t = (y + 1) % classes
        for function in (lambda v, y=y: pgd.dlr(v, y), lambda v, y=y, t=t: pgd.targeted_dlr(v, y, t)):
            values, slope = function(z), jax.grad(lambda v, f=function: f(v).sum())(z)
            assert np.isfinite(values).all() and np.isfinite(slope).all() and np.abs(slope).max() > 0
            assert np.isfinite(jax.grad(lambda v, f=function: f(v).sum())(jnp.zeros_like(z))).all()


@jax.jit
def by_number(model, x, y, radius, key, objective, targets):
    return pgd.apgd_l2(model, x, y, radius, key, objective=objective, num_steps=4, targets=targets)


@pytest.mark.parametrize("objective", everyday(attacks.OBJECTIVES, "targeted_dlr"))
def test_an_objective_by_name_and_by_number_is_the_same(objective, key):
    model, images, labels, radius = problem()
    x, y = jnp.asarray(images[:6]), jnp.asarray(labels[:6])
    targets = (y + 1) % 5
    options = {"num_steps": 4, "targets": targets}
    named = jax.jit(lambda: pgd.apgd_l2(model, x, y, radius, key, objective=objective, **options))()
    number = jnp.int32(attacks.OBJECTIVES.index(objective))
    numbered = by_number(model, x, y, radius, key, number, targets)
    np.testing.assert_allclose(numbered, named, atol=1e-12)
    assert np.abs(np.asarray(named) - images[:6]).max() > 1e-3  # control: it moves


def test_the_ensemble_is_at_least_as_strong_as_each_member():
    _, images, _, radius = problem()
    everything, _ = broken(images, radius, method="ensemble")
    members = [broken(images, radius, **options)[0] for options in MEMBERS]
    for options, found in zip(MEMBERS, members, strict=True):
        assert np.all(everything >= found), options
        assert 0 < found.sum() < everything.sum(), options  # control: each alone finds less
    assert np.array_equal(everything, np.any(members, axis=0))
    # The margin, which was the default, is no match for it.
    assert broken(images, radius, method="apgd", objective="margin")[0].sum() < everything.sum()


def test_members_get_what_earlier_ones_have_left(monkeypatch):
    _, images, _, radius = problem()
    seen, run = [], search._Options.run

    def spied(self, network, attempt, x, *rest):
        moved, wrong, margin = run(self, network, attempt, x, *rest)
        seen.append(((attempt.method, attempt.objective, attempt.rank), np.asarray(x), np.asarray(wrong)))
        return moved, wrong, margin

    monkeypatch.setattr(search._Options, "run", spied)
    _, result = broken(images, radius, method="ensemble")
    stages = {}
    for name, x, wrong in seen:
        stages.setdefault(name, []).extend((row.tobytes(), bool(hit)) for row, hit in zip(x, wrong, strict=True))
    names = [
        ("apgd", "cross_entropy", 0),
        ("apgd", "targeted_dlr", 0),
        ("apgd", "targeted_dlr", 1),
        ("square", "margin", 0),
    ]
    assert list(stages) == names
    left = {image.tobytes() for image in images}
    for name in names:
        assert {row for row, _ in stages[name]} == left, name
        left -= {row for row, hit in stages[name] if hit}
    assert 0 < len(left) < len(images)
    # Few shapes, so that few programs are compiled: a full batch, and an eighth of it.
    assert {len(x) for _, x, _ in seen} <= {16, 2}
    # Every point says how it was found.
    ways = {result.ways[i]["method"] for i in result.found_by if i >= 0}
    assert ways == {"apgd", "square"}
    assert np.array_equal(result.found_by >= 0, np.isfinite(result.distances))
    way = next(way for way in result.ways if way.get("objective") == "targeted_dlr")
    assert way == {"method": "apgd", "objective": "targeted_dlr", "rival": 1, "steps": 6, "restart": 0, "seed": 0}


def test_what_is_found_does_not_depend_on_the_batch_or_on_the_order_of_images():
    model, images, labels, radius = problem()
    _, result = broken(images, radius, method="ensemble")
    rows = np.random.default_rng(2).permutation(40)[:23]
    options = STEPS | {"batch_size": 7}
    part = attacks.attack_l2(model, images[rows], labels[rows], (radius,), numbers=rows, **options)
    np.testing.assert_allclose(part.distances, result.distances[rows], rtol=1e-6)
    other = attacks.attack_l2(model, images[rows], labels[rows], (radius,), numbers=rows, seed=1, **options)
    assert not np.allclose(other.points, part.points)  # control: the seed matters


def test_smaller_radii_are_tried_where_a_larger_one_found_something(monkeypatch):
    model, images, labels, radius = problem()
    radii, tried, run = (0.5 * radius, radius, 0.75 * radius), [], search._Options.run

    def spied(self, network, attempt, x, y, epsilon, *rest):
        tried.append((float(epsilon[0]), len({row.tobytes() for row in np.asarray(x)})))
        return run(self, network, attempt, x, y, epsilon, *rest)

    monkeypatch.setattr(search._Options, "run", spied)
    progress = []
    found = attacks.attack_l2(model, images, labels, radii, method="apgd", watch=progress.append, **STEPS)
    counts = {epsilon: sum(n for e, n in tried if e == epsilon) for epsilon, _ in tried}
    assert list(counts) == sorted(counts, reverse=True) and counts[radius] == 40
    broken_at = {r: np.sum(found.distances <= r * (1 + 1e-6)) for r in radii}
    assert counts[0.75 * radius] <= broken_at[radius] < 40
    assert 0 < broken_at[0.5 * radius] < broken_at[radius]
    assert progress == sorted(progress) and 0 < progress[0] < 1 and progress[-1] == 1
