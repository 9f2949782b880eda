"""The Square attack: schedule, shapes and proposals as in the paper, and what it finds that gradients miss."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from array_helpers import norms
from training_helpers import quick_compiles  # noqa: F401

from lipjax import attacks
from lipjax.attacks import square

pytestmark = pytest.mark.mixed_dtypes

SHAPE = (8, 8, 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Steps:
    """Two classes, the second where w . x + b > 0, of pixels rounded to `levels`, if there are any: no gradient."""

    w: jax.Array
    b: jax.Array
    levels: int = dataclasses.field(metadata={"static": True}, default=0)

    def __call__(self, x):
        if self.levels:
            x = jnp.round(x * self.levels) / self.levels
        score = x.reshape(len(x), -1) @ self.w + self.b
        return jnp.stack([jnp.zeros_like(score), score], axis=1)


@functools.cache
def problem():
    """A linear function, 12 images well inside the box, their classes, and exact distances to the other class."""
    rng = np.random.default_rng(0)
    w, images = rng.normal(size=64), rng.uniform(0.45, 0.55, (12, *SHAPE))
    b = -0.5 * w.sum() + 2.0
    score = images.reshape(12, -1) @ w + b
    assert np.all(score > 0)
    return w, b, images, np.ones(12, np.int32), score / np.linalg.norm(w)


def test_the_side_of_the_windows_follows_the_schedule():
    sides = square.window_sides(10_000, 50, 50)
    # sqrt(0.1 * 2500) = 15.8, then by the root of 2 after 10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000 queries.
    expected = [16, 11, 8, 6, 4, 3, 3, 3, 3, 3]
    marks = [0, 10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000, 10_000]
    for side, start, end in zip(expected, marks[:-1], marks[1:], strict=True):
        assert set(sides[start + 1 : end + 1].tolist()) <= {side}, start
    assert square.window_sides(100, 50, 50).tolist()[:6] == [16, 8, 8, 6, 6, 6]
    assert set(square.window_sides(50, 2, 9).tolist()) == {2}  # no larger than the image


@pytest.mark.parametrize("side", [1, 2, 3, 4, 7, 10])
def test_the_shape_of_a_window_is_that_of_the_paper(side):
    """Eq. 2 of arXiv:1912.00049 and the two rectangles, with indices from 1 as there."""

    def eta(h1, h2):
        n, values = h1 // 2, np.zeros((h1, h2))
        for r in range(1, h1 + 1):
            for s in range(1, h2 + 1):
                top = n - max(abs(r - n - 1), abs(s - h2 // 2 - 1))
                values[r - 1, s - 1] = sum(1 / (n + 1 - k) ** 2 for k in range(top + 1))
        return values

    k = side // 2
    expected = np.concatenate([eta(side, k), -eta(side, side - k)], axis=1)
    np.testing.assert_allclose(square.hills(side), expected / np.linalg.norm(expected), rtol=1e-12)


def test_a_proposal_is_that_of_algorithm_3():
    rng = np.random.default_rng(1)
    count, height, width, channels, side, epsilon = 6, 7, 9, 3, 3, np.linspace(0.4, 2.0, 6)
    delta = rng.normal(size=(count, height, width, channels))
    delta *= (rng.uniform(0.2, 1.0, count) * epsilon / norms(delta))[:, None, None, None]
    delta[0] = 0.0
    corners = rng.integers(0, 5, (count, 4))
    corners[1, 2:] = corners[1, :2] + 1  # windows that overlap
    signs = rng.choice([-1.0, 1.0], (count, channels))
    masks, patterns = np.zeros((2, count, height, width)), np.zeros((count, height, width))
    expected = delta.copy()
    for i, (r1, s1, r2, s2) in enumerate(corners):
        first, second = (slice(r1, r1 + side), slice(s1, s1 + side)), (slice(r2, r2 + side), slice(s2, s2 + side))
        masks[0, i][first], masks[1, i][second], patterns[i][first] = 1, 1, square.hills(side)
        unused = epsilon[i] ** 2 - np.sum(delta[i] ** 2)
        for c in range(channels):
            nu = expected[i, :, :, c]
            inside = nu[first].copy()
            norm = np.linalg.norm(inside)
            shape = signs[i, c] * square.hills(side) + (inside / norm if norm else 0)
            either = np.maximum(masks[0, i], masks[1, i]) > 0
            available = math.sqrt(np.sum(nu[either] ** 2) + unused / channels)
            nu[second] = 0
            nu[first] = shape / np.linalg.norm(shape) * available
    found = square.move_mass(*map(jnp.asarray, (delta, patterns, *masks, signs, epsilon)))
    np.testing.assert_allclose(found, expected, atol=1e-12)
    np.testing.assert_allclose(norms(found), epsilon)  # all of the budget is used
    assert np.any(norms(found - delta) > 0.3 * epsilon)  # control: the proposals are others


@pytest.mark.parametrize(("epsilon", "box"), [(0.3, (0.0, 1.0)), (4.0, (0.0, 1.0)), (4.0, None)])
def test_it_stays_in_the_ball_and_in_the_box_and_depends_on_each_images_key_alone(epsilon, box, key):
    w, b, _, _, _ = problem()
    images = np.random.default_rng(2).integers(0, 2, (9, *SHAPE)).astype(float)
    model = Steps(jnp.asarray(w), jnp.asarray(-1e3))  # always the first class: no query ends the search early
    keys = jax.random.split(key, 9)

    def search(rows):
        labels = jnp.zeros(len(rows), jnp.int32)
        attack = functools.partial(attacks.square_l2, model, num_queries=40, box=box)
        return np.asarray(jax.jit(attack)(jnp.asarray(images[rows]), labels, epsilon, keys[rows]))

    moved = search(np.arange(9))
    assert np.all(norms(moved - images) <= epsilon * (1 + 1e-12)) and np.all(
        norms(moved - images) > 0.5 * min(epsilon, 1)
    )
    assert (moved.min() >= 0 and moved.max() <= 1) == (box is not None)
    rows = np.array([4, 1])
    np.testing.assert_allclose(search(rows), moved[rows], atol=1e-12)
    before, after = images.reshape(9, -1) @ w, moved.reshape(9, -1) @ w
    assert np.all(after > before)


def test_it_finds_what_masked_gradients_hide():
    w, b, images, labels, distance = problem()
    options = {"num_steps": 30, "num_queries": 1500}
    for i in (0, 5):
        one, label, radius = images[[i]], labels[[i]], (float(2.5 * distance[i]),)
        smooth, steps = (Steps(jnp.asarray(w), jnp.asarray(b), levels) for levels in (0, 64))
        found = {
            name: np.isfinite(attacks.attack_l2(model, one, label, radius, method=method, **options).distances[0])
            for name, model, method in (
                ("gradients", smooth, "apgd"),
                ("masked gradients", steps, "apgd"),
                ("queries", steps, "square"),
                ("all", steps, "ensemble"),
            )
        }
        assert found == {"gradients": True, "masked gradients": False, "queries": True, "all": True}, i


def test_what_it_cannot_attack_is_refused(key):
    with pytest.raises(ValueError, match=r"Expected images \(b, h, w, c\) and at least one query, got \(2, 3\) and 5"):
        attacks.square_l2(lambda x: x, jnp.zeros((2, 3)), jnp.zeros(2, jnp.int32), 0.1, key, num_queries=5)
