"""Activations on pairs: the papers' values and gradients, formulas with angles, brute force over hostile points."""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import everyday

from lipjax import activations

PI = math.pi
GOLDEN = Path(__file__).parents[1] / "golden"
ANGLES = [0.0, 1e-300, 1e-9, 0.7, PI / 2, 2.5, PI, 4.0, 2 * PI - 1e-9, 2 * PI]
FUNCTIONS = {"maxmin": 0, "householder": 1, "householder2": 3}  # and how many angles each takes


@functools.cache
def activation(name):
    return jax.jit(getattr(activations, name))


@functools.cache
def gradient(name):
    """(x, angles, cotangent) -> value, gradient with respect to x, gradients with respect to the angles."""

    def run(x, theta, cotangent):
        y, vjp = jax.vjp(getattr(activations, name), x, *theta)
        return y, *vjp(cotangent)

    return jax.jit(run)


def angles_for(name, dtype=float):
    """(number of angles, pairs): every combination of hostile angles for order 1; every third one for order 2."""
    count = FUNCTIONS[name]
    grid = np.stack([a.ravel() for a in np.meshgrid(*[ANGLES] * count)]) if count else np.empty((0, 10))
    return jnp.asarray(grid[:, ::3] if count == 3 else grid, dtype)


def hostile_points(dtype=float):
    """(points, 2): zeros of both signs, axes, diagonals, and neighbours of every ray at a sum of half angles."""
    points = [(0.0, 0.0), (-0.0, 0.0), (0.0, -0.0), (1.0, 0.0), (-1.0, 0.0), (-1.0, -0.0), (0.0, 1.0), (0.0, -1.0)]
    points += [(1.0, 1.0), (-1.0, -1.0), (1.0, -1.0), (1.0, -1e-20), (-1.0, 1e-20), (-1.0, -1e-20)]
    halves = np.array(ANGLES) / 2
    angles = np.concatenate([halves, halves + PI, (halves[3:, None] + halves[3:]).ravel()])
    for angle in angles[np.unique(angles.round(7), return_index=True)[1]]:
        for shift in (0.0, 1e-15, -1e-15):
            points.append((math.cos(angle + shift), math.sin(angle + shift)))
    points += [tuple(v) for v in np.random.default_rng(0).normal(size=(10, 2))]
    return np.asarray(points, dtype)


def on_all_pairs(points, pairs):
    """(points, 2 * pairs): every point at every pair of channels."""
    return jnp.asarray(np.repeat(points, pairs, axis=1))


def norm(halves):
    """|.| of each pair of channels, without under- or overflow."""
    return np.hypot(*np.split(np.asarray(halves), 2, axis=-1))


def householder2_by_angles(x, y, theta0, theta1, theta2):
    """The formula of the paper, for one pair."""
    phi = math.remainder(math.atan2(y, x) - theta0 / 2, 2 * PI) % (2 * PI)
    cases = (theta1 / 2, None), ((theta1 + theta2) / 2, theta0 + theta1), (theta2 / 2 + PI, "rotate"), (9, theta0)
    kind = next(kind for edge, kind in cases if phi <= edge)
    if kind is None:
        return x, y
    if kind == "rotate":
        return x * math.cos(theta2) + y * math.sin(theta2), y * math.cos(theta2) - x * math.sin(theta2)
    return x * math.cos(kind) + y * math.sin(kind), x * math.sin(kind) - y * math.cos(kind)


@pytest.mark.parametrize(
    ("file", "name", "theta"),
    [
        ("maxmin", "maxmin", ()),
        ("hh1", "householder", ("theta",)),
        ("hh2", "householder2", ("theta0", "theta1", "theta2")),
    ],
)
def test_golden_values_and_gradients(file, name, theta):
    z = np.load(GOLDEN / f"act_{file}.npz")

    def nhwc(key):
        return np.moveaxis(z[key], 1, -1)

    smooth, cotangent = nhwc("input/smooth_mask") == 1, jnp.asarray(nhwc("input/cotangent"))
    value = nhwc("output/y_fixed" if file == "hh2" else "output/y")
    if file == "hh2":
        defect = nhwc("input/defect_mask") == 1
        cotangent = jnp.asarray(np.where(defect, 0.0, cotangent))  # there the original is 0, and so is its gradient
        assert (np.abs(value - nhwc("output/y"))[defect] > 0.1).any()  # control: the defect is among the inputs
    angles = [jnp.asarray(z[f"param/{p}"].ravel()) for p in theta]
    y, grad, *grads = gradient(name)(jnp.asarray(nhwc("input/z")), angles, cotangent)
    np.testing.assert_allclose(y, value, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(np.asarray(grad)[smooth], nhwc("output/grad_z")[smooth], rtol=1e-9, atol=1e-12)
    for p, found in zip(theta, grads, strict=True):
        np.testing.assert_allclose(found, z[f"output/grad/{p}"].ravel(), rtol=1e-9, atol=1e-12)


def test_householder_at_a_right_angle_is_min_and_max(key):
    x = jax.random.normal(key, (50, 6))
    theta = jnp.full(3, activations.HOUSEHOLDER_THETA)
    a, b = jnp.split(x, 2, axis=-1)
    expected = jnp.concatenate([jnp.minimum(a, b), jnp.maximum(a, b)], axis=-1)
    np.testing.assert_allclose(activations.householder(x, theta), expected, atol=1e-15)


def test_householder_is_the_papers_formula(key):
    x, y, theta = jax.random.normal(key, (3, 100)) * 3
    got = np.asarray(activations.householder(jnp.concatenate([x, y])[None], theta))[0]
    for i, (a, b, t) in enumerate(zip(*map(np.asarray, (x, y, theta)), strict=True)):
        if a * math.sin(t / 2) - b * math.cos(t / 2) > 0:
            a, b = a * math.cos(t) + b * math.sin(t), a * math.sin(t) - b * math.cos(t)
        np.testing.assert_allclose(got[[i, i + 100]], (a, b), atol=2e-15 * math.hypot(a, b))


def test_householder2_is_the_papers_formula():
    theta, points = angles_for("householder2"), hostile_points()
    got = np.asarray(activations.householder2(on_all_pairs(points, theta.shape[1]), *theta))
    first, second = np.split(got, 2, axis=1)
    for (x, y), a, b in zip(points, first, second, strict=True):
        expected = np.array([householder2_by_angles(x, y, *t) for t in np.asarray(theta).T])
        # Angles of the oracle are off by up to 2 pi eps (twice), which near a ray moves a point by as much.
        np.testing.assert_allclose(np.stack([a, b], axis=1), expected, atol=1e-14 * math.hypot(x, y))


@pytest.mark.parametrize("scale", [1e-150, 1.0, 1e150])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_two_points_move_apart(name, scale):
    """All pairs of hostile points, far and near, on both sides of each ray."""
    theta, points = angles_for(name)[:, ::7], hostile_points() * scale
    x = on_all_pairs(points, theta.shape[1])
    y = np.asarray(activation(name)(x, *theta))
    size = np.hypot(*points.T)
    apart = np.hypot(*(points[:, None] - points).T)[..., None]
    # The exact maps are 1-Lipschitz, and each computed point is within gamma_128 = 1.5e-14 of the exact one.
    allowed = apart * (1 + 1e-15) + 1.5e-14 * (size[:, None] + size)[..., None]
    assert (norm(y[:, None] - y) <= allowed).all()
    np.testing.assert_allclose(norm(y), np.broadcast_to(size[:, None], norm(y).shape), rtol=1.5e-14)
    # Control: one point whose value were 0, the original's defect, would be seen.
    y = np.where(np.arange(len(y))[:, None] == 20, 0.0, y)
    assert (norm(y[20] - y) > allowed[20]).any()


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("precision", everyday(["x64", "x32"], "x32"), indirect=True)
def test_gradients_are_finite_and_keep_norms_everywhere(name, precision):
    dtype = jnp.float64 if precision == "x64" else jnp.float32
    theta, points = angles_for(name, dtype), hostile_points(dtype)
    scales = (1.0, 1e-30, 1e30) if precision == "x32" else (1.0, 1e-200, 1e200)
    for scale in scales:
        x = on_all_pairs(points * points.dtype.type(scale), theta.shape[1])
        cotangent = jnp.asarray(np.random.default_rng(1).normal(size=x.shape), dtype)
        y, grad, *grads = gradient(name)(x, theta, cotangent)
        assert y.dtype == dtype and jnp.isfinite(y).all()
        assert all(g.dtype == dtype and jnp.isfinite(g).all() for g in (grad, *grads))
        if name != "maxmin":  # whose gradient is the mean of both sides' on a tie
            np.testing.assert_allclose(norm(grad), norm(cotangent), rtol=100 * jnp.finfo(dtype).eps)


@pytest.mark.parametrize("name", ["householder", "householder2"])
def test_gradients_are_those_of_finite_differences(name, key):
    x, direction = jax.random.normal(key, (2, 20, 8))
    theta = jnp.asarray(np.random.default_rng(3).uniform(0.3, 5.5, (FUNCTIONS[name], 4)))
    step = 1e-6

    @jax.jit
    def moved(t):
        return activation(name)(x + t * direction, *(theta + t * jnp.arange(1.0, 5.0)))

    difference = (moved(step) - moved(-step)) / (2 * step)
    _, tangent = jax.jvp(moved, (0.0,), (1.0,))
    error = np.abs(difference - tangent)
    assert np.median(error) < 1e-8 and np.quantile(error, 0.97) < 1e-7  # points next to a ray differ


def test_householder2_clips_its_angles_with_zero_gradient_outside(key):
    x = jax.random.normal(key, (200, 8))
    outside = jnp.asarray([-1e-3, -2.0, 2 * PI + 1e-3, 20.0])
    clipped = jnp.asarray([0.0, 0.0, 2 * PI, 2 * PI])
    inside = jnp.asarray([0.4, 1.0, 2.0, 3.0])
    run = jax.jit(jax.value_and_grad(lambda *theta: jnp.sum(activations.householder2(x, *theta) ** 3), (0, 1, 2)))
    for place in range(3):
        (value, slopes), (same, edge) = (
            run(*[theta if i == place else inside for i in range(3)]) for theta in (outside, clipped)
        )
        assert value == same
        assert (slopes[place] == 0).all() and (edge[place] != 0).all()


def test_a_half_angle_above_pi_by_rounding_has_no_negative_sine(precision):
    dtype = jnp.float64 if precision == "x64" else jnp.float32
    theta = jnp.asarray([2 * PI, 7.0, 0.0, -0.0, -1.0], dtype)
    directions = jax.jit(activations.householder2_directions)(theta, theta, theta)
    assert directions.dtype == dtype and (directions[1:, 1] >= 0).all()
    assert precision == "x64" or (directions[0, 1] < 0).any()  # control: in float32 pi is rounded up
    slopes = jax.jacobian(lambda t: activations.householder2_directions(t, t, t))(theta)
    np.testing.assert_allclose(slopes[1, 1, 0, 0], -0.5, rtol=1e-6)  # of sin(theta / 2) at 2 pi, all the same


@pytest.mark.parametrize("name", everyday(FUNCTIONS, "householder2"))
def test_transformations_agree(name, key):
    x = jax.random.normal(key, (5, 3, 8))
    theta = jnp.asarray(np.random.default_rng(4).uniform(0, 6, (FUNCTIONS[name], 4)))
    f, none = activation(name), (None,) * len(theta)
    expected = getattr(activations, name)(x, *theta)
    np.testing.assert_allclose(f(x, *theta), expected, atol=1e-15)
    np.testing.assert_allclose(jax.vmap(f, (0, *none))(x, *theta), expected, atol=1e-15)
    many = jax.vmap(lambda *t: f(x, *t))(*(jnp.stack([t, t / 2]) for t in theta)) if len(theta) else None
    if many is not None:
        np.testing.assert_allclose(many[0], expected, atol=1e-15)
    _, tangent = jax.jvp(lambda v: f(v, *theta), (x,), (x,))  # the map is homogeneous
    np.testing.assert_allclose(tangent, expected, atol=1e-14)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_cannot_be_paired_is_refused(name):
    theta = [jnp.zeros(2)] * FUNCTIONS[name]
    with pytest.raises(ValueError, match="even number"):
        activation(name)(jnp.zeros((1, 5)), *theta)
    if theta:
        with pytest.raises(ValueError, match="one angle or direction for each of the 3 pairs"):
            activation(name)(jnp.zeros((1, 6)), *theta)


def test_maxmin_splits_a_ties_gradient_evenly():
    value, vjp = jax.vjp(activations.maxmin, jnp.asarray([1.0, 5.0, 3.0, 5.0]))
    np.testing.assert_array_equal(value, [3.0, 5.0, 1.0, 5.0])
    np.testing.assert_array_equal(vjp(jnp.asarray([1.0, 2.0, 3.0, 4.0]))[0], [3.0, 3.0, 1.0, 3.0])
