"""Parametrisations of potential steps and sandwiches: norms of what they make, gradients at zeros, a careless one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lipjax import operators, spectral
from lipjax.operators.grid import on_grid
from lipjax.parametrize import cpl, sandwich, sll
from lipjax.spectral import norms

pytestmark = pytest.mark.quick_compiles


def norm(matrix):
    return np.linalg.norm(np.asarray(matrix), 2)


def step_bound(linear):
    linear = jax.tree.map(np.asarray, linear)
    activation = operators.ReLU(linear.out_shape)
    return operators.PotentialStep(linear, np.zeros(linear.out_shape[-1]), activation).bound().proved


@pytest.mark.parametrize("spread", [0.0, 1.0, 200.0])
def test_scaled_rows_have_a_norm_of_at_most_one_and_a_constant_of_exactly_one(spread):
    rng = np.random.default_rng(0)
    for rows, columns in ((3, 7), (7, 3), (4, 4)):
        matrix, theta = jnp.asarray(rng.normal(size=(rows, columns))), jnp.asarray(spread * rng.normal(size=rows))
        made, scale = sll.dense(matrix, theta)
        assert norm(made) <= 1 and step_bound(operators.Dense(made)) == 1.0
        np.testing.assert_allclose(made, scale[:, None] * matrix)
        shifted, _ = sll.dense(matrix, theta + 1000.0)  # only differences count
        np.testing.assert_allclose(shifted, made, rtol=1e-6)
    assert norm(made) > 0.4  # control: nothing vanishes
    for padding, strides in (("ZERO", 1), ("CIRCULAR", 1), (((2, 1), (0, 3)), (2, 1))):
        kernel, theta = jnp.asarray(rng.normal(size=(3, 2, 2, 3))), jnp.asarray(spread * rng.normal(size=3))
        conv = operators.Conv(sll.conv(kernel, theta)[0], (2, 3, 2), strides, padding)
        assert step_bound(conv) == 1.0
    # No frequency of a large map is looked at: row sums are enough, and the checker's method for that is named.
    large = operators.Conv(np.asarray(conv.kernel), (512, 512, 2))
    found = operators.PotentialStep(large, np.zeros(3), operators.ReLU(large.out_shape)).bound()
    assert found.details["linear"]["method"] == spectral.ROW_SUMS and found.details["linear"]["bound"] <= 1
    # Rows that are orthonormal attain the norm: the room is what keeps the constant at exactly 1.
    eye = jnp.asarray(np.linalg.qr(rng.normal(size=(5, 5)))[0])
    made, _ = sll.dense(eye, jnp.zeros(5))
    assert norm(made) > 0.3
    made, _ = sll.dense(jnp.eye(5), jnp.zeros(5))
    assert norm(made) == pytest.approx(sll.BELOW_ONE, abs=1e-15) and step_bound(operators.Dense(made)) == 1.0
    assert step_bound(operators.Dense(sll.dense(jnp.eye(5), jnp.zeros(5), room=1.0)[0])) > 1.0


def test_float32_weights_keep_large_thetas():
    rng = np.random.default_rng(1)
    matrix = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
    theta = jnp.asarray([90.0, -90.0, 50.0, 0.0], jnp.float32)  # e^90 is beyond float32
    made, back = jax.vjp(lambda m, t: sll.dense(m, t)[0], matrix, theta)
    gradients = back(jnp.ones_like(made))
    assert all(np.isfinite(a).all() for a in (made, *gradients)) and 0.3 < norm(made) <= 1 + 1e-6


def test_zero_rows_and_zero_correlations_have_gradients():
    matrix = jnp.asarray([[1.0, 2.0], [0.0, 0.0], [2.0, -1.0]])
    made, back = jax.vjp(lambda m, t: sll.dense(m, t)[0], matrix, jnp.zeros(3))
    gradients = back(jnp.ones_like(made))
    assert np.isfinite(made).all() and all(np.isfinite(g).all() for g in gradients)
    assert not made[1].any() and not gradients[0][1].any()
    # Rows 0 and 2 are orthogonal: |0|' is 0, as that of torch, and both sides of 0 weigh the same.
    first = gradients[0][0]
    np.testing.assert_allclose(first, jax.grad(lambda r: jnp.sum(r * sll.BELOW_ONE / jnp.sqrt(r @ r)))(matrix[0]))
    pulled = jax.grad(lambda m: jnp.sum(sll.dense(m, jnp.zeros(1))[0]))(jnp.zeros((1, 3)))
    assert not pulled.any()
    assert np.isfinite(
        jax.grad(lambda w: jnp.sum(cpl.contracted(w, norm_of(w), epsilon=0.0)[0]))(jnp.zeros((2, 2)))
    ).all()


@pytest.mark.parametrize("size", [1e-18, 1e-6, 1e6])
def test_gradients_of_tiny_weights_stay_in_the_range_of_float32(size):
    """A row r becomes r / |r|, whose derivative is of the order 1 / |r|; |r|^-3 would be 10^54."""
    row, pull = np.float32([[3 * size, -4 * size]]), np.float32([[1.0, 2.0]])
    found = jax.grad(lambda w: jnp.sum(pull * sll.dense(w, jnp.zeros(1, jnp.float32))[0]))(row)
    unit = row.astype(np.float64) / np.linalg.norm(row.astype(np.float64))
    exact = sll.BELOW_ONE * (pull - np.sum(pull * unit) * unit) / np.linalg.norm(row.astype(np.float64))
    np.testing.assert_allclose(found, exact, rtol=1e-5)


def norm_of(w):
    return operators.Dense(w).estimate(jnp.ones(w.shape[1]), 3)[0]


def test_converged_estimates_make_constants_of_exactly_one(monkeypatch):
    monkeypatch.setattr(norms, "_DENSE_SIDE", 0)  # proved by embedding, as large maps are: the estimate is on the grid
    rng = np.random.default_rng(2)
    shape = (5, 4, 3)
    conv = operators.Conv(jnp.asarray(rng.normal(size=(3, 3, 3, 2))), shape)
    grid = on_grid(conv)
    assert type(grid) is not operators.Conv
    start = jnp.asarray(rng.normal(size=grid.in_shape))
    sigma = jax.jit(lambda op, v: cpl.converged(op, op.estimate(v, 50)[1]))(grid, start)  # as a layer starts
    proved = jax.tree.map(np.asarray, conv).bound().proved
    assert proved < sigma < proved * (1 + 2.0**-9)
    kernel, _ = cpl.contracted(conv.kernel, sigma)
    assert step_bound(operators.Conv(kernel, shape)) == 1.0
    gradient = jax.grad(lambda k: cpl.converged(operators.Dense(k), jnp.ones(4)))(jnp.diag(jnp.arange(1.0, 5.0)))
    np.testing.assert_allclose(gradient, np.diag([0, 0, 0, cpl.MARGIN]), atol=0.03)


def test_a_power_iteration_that_starts_anew_is_not_certified_as_a_contraction():
    """CPL with a few steps from a fixed vector: what trains on it finds the hole, and the bound shows its width."""
    rng = np.random.default_rng(3)
    start, probe = (jnp.asarray(v / np.linalg.norm(v)) for v in rng.normal(size=(2, 12)))
    weight = jnp.eye(12) + 1e-3 * jnp.asarray(rng.normal(size=(12, 12)))

    def careless(w):
        return cpl.contracted(w, operators.Dense(w).estimate(start, 8)[0], epsilon=0.0)[0]

    @jax.jit
    def climb(w):  # as a loss that gains where the network is steep in one direction of its images
        return w + 0.02 * jax.grad(lambda w: jnp.linalg.norm(careless(w) @ probe))(w)

    weights = [weight]
    for _ in range(15):
        weights.append(climb(weights[-1]))
    weight = max(weights, key=lambda w: norm(careless(w)))
    made = careless(weight)
    true = 2 * norm(made) ** 2 - 1
    assert true > 1.5
    assert true * (1 - 1e-12) <= step_bound(operators.Dense(made)) <= true * (1 + 1e-8)
    # Its estimate from that vector promises 1; converged, and with a margin, the same weights are a contraction.
    assert float(operators.Dense(made).estimate(start, 8)[0]) <= 1
    honest = cpl.contracted(weight, cpl.converged(operators.Dense(weight), start), epsilon=0.0)[0]
    assert step_bound(operators.Dense(honest)) == 1.0


def test_sandwiches_are_contractions_before_and_after_scaling():
    rng = np.random.default_rng(4)
    for gain in (1.0, 0.25, 3.0):
        stacked = sandwich.dense(jnp.asarray(rng.normal(size=(3, 5))), jnp.asarray(2.0), outputs=2, gain=gain)
        op = operators.Sandwich(operators.Dense(np.asarray(stacked)), np.zeros(3), operators.ReLU((3,)), 2)
        assert gain * (1 - 1e-7) < op.bound().proved <= gain
    with pytest.raises(ValueError, match=r"more columns than rows .* got shape \(4, 4\)"):
        sandwich.dense(jnp.eye(4), jnp.asarray(1.0), outputs=2)
    with pytest.raises(ValueError, match="than outputs = 5"):
        sandwich.blocks(jnp.ones((3, 3, 5, 2)), jnp.asarray(1.0), (4, 4), outputs=5)
    for function, weight in ((sll.dense, jnp.ones((3, 2))), (sll.conv, jnp.ones((3, 3, 2, 3)))):
        with pytest.raises(ValueError, match=r"theta of shape \(3,\), .* got \(2,\)"):
            function(weight, jnp.zeros(2))
