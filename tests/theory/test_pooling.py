"""Pooling of pairs: the papers' values and gradients, distances to a wedge by brute force, hostile points."""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lipjax import pooling

pytestmark = pytest.mark.quick_compiles

PI = math.pi
GOLDEN = Path(__file__).parents[1] / "golden"
ANGLES = np.array([0.0, 1e-300, 1e-9, 0.7, PI / 2, 2.5, PI - 1e-9, PI])
FUNCTIONS = {"max_pool_pairs": 0, "projection_pool": 1}  # and how many angles each takes


@functools.cache
def pool(name):
    return jax.jit(getattr(pooling, name))


@functools.cache
def gradient(name):
    """(x, angles, cotangent) -> value, gradient with respect to x, gradients with respect to the angles."""

    def run(x, theta, cotangent):
        y, vjp = jax.vjp(getattr(pooling, name), x, *theta)
        return y, *vjp(cotangent)

    return jax.jit(run)


def angles_for(name, dtype=float):
    return [jnp.asarray(ANGLES, dtype)] * FUNCTIONS[name]


def hostile_points(dtype=float):
    """(points, 2): zeros of both signs, axes, ties, and neighbours of every edge and its normal, mirrored too."""
    points = [(0.0, 0.0), (-0.0, 0.0), (0.0, -0.0), (1.0, 0.0), (-1.0, 0.0), (-1.0, -0.0), (0.0, 1.0), (0.0, -1.0)]
    points += [(1.0, 1.0), (-1.0, -1.0), (1.0, -1.0), (1.0, -1e-20), (-1.0, 1e-20)]
    for angle in np.concatenate([ANGLES / 2, ANGLES / 2 + PI / 2]):
        for shift in (0.0, 1e-15, -1e-15, 1e-8, -1e-8):
            a, b = math.cos(angle + shift), math.sin(angle + shift)
            points += [(a, b), (a, -b)]
    return np.asarray(points + [tuple(v) for v in np.random.default_rng(0).normal(size=(30, 2))], dtype)


def on_all_pairs(points):
    return jnp.asarray(np.repeat(points, len(ANGLES), axis=1))


def distance_by_projection(x, y, theta):
    """The signed distance of one point to the wedge: the distance to each bounding ray, the sign by an angle."""
    distances = []
    for sign in (1, -1):
        cos, sin = math.cos(theta / 2), sign * math.sin(theta / 2)
        along = max(0.0, x * cos + y * sin)
        distances.append(math.hypot(x - along * cos, y - along * sin))
    return math.copysign(min(distances), abs(math.atan2(y, x)) - theta / 2)


@pytest.mark.parametrize(("file", "name"), [("lip1", "projection_pool"), ("max", "max_pool_pairs")])
def test_golden_values_and_gradients(file, name):
    z = np.load(GOLDEN / f"pool_{file}.npz")

    def nhwc(key):
        return np.moveaxis(z[key], 1, -1)

    theta = [jnp.asarray(z["param/theta"])] if FUNCTIONS[name] else []
    y, grad, *grads = gradient(name)(jnp.asarray(nhwc("input/z")), theta, jnp.asarray(nhwc("input/cotangent")))
    np.testing.assert_allclose(y, nhwc("output/y"), rtol=1e-9, atol=1e-12)
    smooth = nhwc("input/smooth_mask") == 1
    np.testing.assert_allclose(np.asarray(grad)[smooth], nhwc("output/grad_z")[smooth], rtol=1e-9, atol=1e-12)
    for found in grads:
        np.testing.assert_allclose(found, z["output/grad/theta"], rtol=1e-9, atol=1e-12)


def test_projection_pool_is_the_signed_distance_to_the_wedge():
    points = hostile_points()
    got = np.asarray(pool("projection_pool")(on_all_pairs(points), *angles_for("projection_pool")))
    expected = np.array([[distance_by_projection(a, b, t) for t in ANGLES] for a, b in points])
    # Ours is within gamma_16 = 2e-15 of the exact value, the oracle with its rounded cosine and sine within 3e-15.
    np.testing.assert_allclose(got, expected, rtol=0, atol=5e-15 * np.hypot(*points.T).max())
    assert (got < -0.1).any() and (got > 0.1).any()


def test_the_wedge_of_the_oracle_is_the_wedge():
    """By brute force: the least distance to many points of the wedge, or of its complement."""
    theta, (radius, angle) = 1.3, np.meshgrid(np.linspace(0, 4, 400), np.linspace(-PI, PI, 721))
    plane = radius * np.exp(1j * angle)
    inside = np.abs(angle) <= theta / 2
    for x, y in np.random.default_rng(1).normal(size=(30, 2)):
        to_wedge, to_rest = (np.abs(plane[m] - complex(x, y)).min() for m in (inside, ~inside))
        sampled = to_wedge if abs(math.atan2(y, x)) > theta / 2 else -to_rest
        assert abs(sampled - distance_by_projection(x, y, theta)) < 0.03  # the grid's spacing at radius 3


def test_a_right_wedge_and_a_half_plane(key):
    x = jax.random.normal(key, (50, 2))
    np.testing.assert_allclose(pooling.projection_pool(x, jnp.asarray([PI]))[:, 0], -x[:, 0], atol=1e-15)
    ray = pooling.projection_pool(x, jnp.asarray([0.0]))[:, 0]
    np.testing.assert_allclose(ray, np.where(x[:, 0] > 0, np.abs(x[:, 1]), np.hypot(*x.T)), atol=2e-15)


@pytest.mark.parametrize("scale", [1e-150, 1e-200, 1.0, 1e150, 1e200])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_two_points_move_apart(name, scale):
    points = hostile_points() * scale
    y = np.asarray(pool(name)(on_all_pairs(points), *angles_for(name)))
    size = np.hypot(*points.T)
    apart = np.hypot(*(points[:, None] - points).T)[..., None]
    # The exact map is 1-Lipschitz, and each computed value is within gamma_16 |z| of the exact one.
    allowed = apart * (1 + 1e-15) + 2e-15 * (size[:, None] + size)[..., None]
    assert (np.abs(y[:, None] - y) <= allowed).all()
    assert (np.abs(1.01 * y[:, None] - 1.01 * y) > allowed).any()  # control: the constant is 1, not less


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_are_finite_and_at_most_1_everywhere(name, precision):
    dtype = jnp.float64 if precision == "x64" else jnp.float32
    for scale in (1.0, 1e-30, 1e30) if precision == "x32" else (1.0, 1e-200, 1e200):
        points = hostile_points(dtype)
        x = on_all_pairs(points * points.dtype.type(scale))
        theta = angles_for(name, dtype)
        y, grad, *grads = gradient(name)(x, theta, jnp.ones((len(x), len(ANGLES)), dtype))
        assert y.dtype == dtype and jnp.isfinite(y).all()
        assert all(g.dtype == dtype and jnp.isfinite(g).all() for g in (grad, *grads))
        size = np.hypot(*np.split(np.asarray(grad), 2, axis=1))
        assert (size <= 1 + 10 * jnp.finfo(dtype).eps).all()
        if name == "projection_pool":  # of length 1 wherever the distance is differentiable
            generic = size[-30:]
            np.testing.assert_allclose(generic, 1.0, rtol=10 * jnp.finfo(dtype).eps)


def test_gradients_are_those_of_finite_differences(key):
    x, direction = jax.random.normal(key, (2, 20, 16))
    theta, step = jnp.linspace(0.2, 2.9, 8), 1e-6

    @jax.jit
    def moved(t):
        return pooling.projection_pool(x + t * direction, theta + t * jnp.arange(1.0, 9.0))

    difference = (moved(step) - moved(-step)) / (2 * step)
    _, tangent = jax.jvp(moved, (0.0,), (1.0,))
    error = np.abs(difference - tangent)
    assert np.median(error) < 1e-8 and np.quantile(error, 0.97) < 1e-7  # points next to an edge differ
    # Second derivatives exist where the distance is to the apex: that of |z| along z is 0, across it 1 / |z|.
    hessian = jax.hessian(lambda v: pooling.projection_pool(v, jnp.zeros(1))[0])(jnp.asarray([-2.0, 0.0]))
    np.testing.assert_allclose(hessian, [[0.0, 0.0], [0.0, 0.5]], atol=1e-15)


def test_the_angle_is_clipped_with_zero_gradient_outside(key):
    x = jax.random.normal(key, (200, 8))
    run = jax.jit(jax.value_and_grad(lambda theta: jnp.sum(pooling.projection_pool(x, theta) ** 3)))
    outside, slopes = run(jnp.asarray([-1e-3, -2.0, PI + 1e-3, 20.0]))
    clipped, edge = run(jnp.asarray([0.0, 0.0, PI, PI]))
    assert outside == clipped and (slopes == 0).all() and (edge != 0).all()


def test_the_edge_of_a_half_plane_has_no_negative_component(precision):
    dtype = jnp.float64 if precision == "x64" else jnp.float32
    theta = jnp.asarray([PI, 4.0, 0.0, -1.0], dtype)
    direction = jax.jit(pooling.wedge_direction)(theta)
    assert direction.dtype == dtype and (direction >= 0).all()
    assert precision == "x64" or jnp.cos(theta[0] / 2) < 0  # control: in float32 pi / 2 is rounded up


@pytest.mark.parametrize("name", FUNCTIONS)
def test_transformations_agree(name, key):
    x = jax.random.normal(key, (5, 3, 2 * len(ANGLES)))
    theta = angles_for(name)
    expected = getattr(pooling, name)(x, *theta)
    assert expected.shape == (5, 3, len(ANGLES))
    f, none = pool(name), (None,) * len(theta)
    np.testing.assert_allclose(f(x, *theta), expected, atol=1e-15)
    np.testing.assert_allclose(jax.vmap(f, (0, *none))(x, *theta), expected, atol=1e-15)
    _, tangent = jax.jvp(lambda v: f(v, *theta), (x,), (x,))  # the map is homogeneous
    np.testing.assert_allclose(tangent, expected, atol=1e-14)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_cannot_be_paired_is_refused(name):
    theta = [jnp.zeros(2)] * FUNCTIONS[name]
    with pytest.raises(ValueError, match="even number"):
        getattr(pooling, name)(jnp.zeros((1, 5)), *theta)
    if theta:
        with pytest.raises(ValueError, match="one angle or direction for each of the 3 pairs"):
            pooling.projection_pool(jnp.zeros((1, 6)), *theta)
