"""Curvatures of MLP heads: the papers' values, eigenvalues, power iteration, and proved bounds on hostile weights."""

import pathlib

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from tiers import everyday

from lipjax import curvature, losses
from lipjax.errors import NotCertifiable

pytestmark = pytest.mark.quick_compiles

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
PARITY = 1e-9


def golden(classes):
    z = np.load(GOLDEN / f"crc_head_{classes}.npz")
    return z, jnp.asarray(z["param/linear1.weight"]), jnp.asarray(z["param/linear2.weight"])


def exact(w1, w2, i, j):
    """m[i, j] by an eigenvalue solver in 60 digits."""
    mpmath.mp.dps = 60
    w1, w2 = (mpmath.matrix(np.asarray(a).tolist()) for a in (w1, w2))
    negative = mpmath.diag([max(w2[j, h] - w2[i, h], mpmath.mpf(0)) for h in range(w2.cols)])
    return max(mpmath.eigsy(w1.T * negative * w1, eigvals_only=True)) / 4


@pytest.mark.parametrize("classes", [10, 20])
def test_parity_of_tables(classes):
    z, w1, w2 = golden(classes)
    labels, rivals = z["input/labels"][:, None], z["output/all_rivals/rivals"]
    for table, name in (
        (curvature.eigenvalue_table(w1, w2), "curv_{}_eigh"),
        (curvature.norm_table(jnp.linalg.norm(w1, 2), w2), "closed_form_{}"),
    ):
        table = np.asarray(table)
        # From above the curvature is that of the difference the other way round.
        for side, found in (("m", table[labels, rivals]), ("M", table[rivals, labels])):
            expected = z[f"output/all_rivals/{name.format(side)}"]
            np.testing.assert_allclose(found, expected, rtol=PARITY)
        assert (np.diag(table) == 0).all() and np.abs(table - table.T).max() > 0.01  # control: the sides differ


@pytest.mark.parametrize("classes", everyday([10, 20], 20))
def test_parity_of_the_training_penalty_and_its_gradient(classes):
    z, w1, w2 = golden(classes)
    logits, labels = jnp.asarray(z["output/logits"]), jnp.asarray(z["input/labels"])
    u = jnp.asarray(z["param/_u"])
    rivals = curvature.top_rivals(logits, labels, 9)

    def by_table(w1, w2):
        table = curvature.estimate_table(w1, w2, u, 2)
        return losses.curvature_penalty(logits, labels, jnp.maximum(table, table.T)[labels[:, None], rivals], 1.0)

    def by_pairs(w1, w2):
        own = jnp.broadcast_to(labels[:, None], rivals.shape)
        both = [curvature.estimate(w1, w2, *pair, u, 2) for pair in ((own, rivals), (rivals, own))]
        return losses.curvature_penalty(logits, labels, jnp.maximum(*both), 1.0)

    plain = losses.cross_entropy(logits, labels)
    for penalised in (by_table, by_pairs):
        step = jax.jit(jax.value_and_grad(lambda *w, f=penalised: jnp.mean(f(*w) - plain), (0, 1)))
        value, grads = step(w1, w2)
        np.testing.assert_allclose(value, z["output/curv_reg"], rtol=PARITY)
        for got, layer in zip(grads, (1, 2), strict=True):
            expected = z[f"output/curv_reg_grad/linear{layer}.weight"]
            assert np.abs(np.asarray(got) - expected).max() <= PARITY * np.abs(expected).max()
    # Control: another number of steps is another estimate.
    assert abs(float(jnp.mean(curvature.estimate_table(w1, w2, u, 1) - curvature.estimate_table(w1, w2, u, 2)))) > 1e-3


def test_estimates_rise_to_the_eigenvalue_and_never_above():
    _, w1, w2 = golden(10)
    table = np.asarray(curvature.eigenvalue_table(w1, w2))
    u = jnp.ones(w1.shape[1])
    low, high = (np.asarray(curvature.estimate_table(w1, w2, u, n)) for n in (1, 300))
    assert (low <= high * (1 + 1e-12)).all() and (high <= table * (1 + 1e-12)).all()
    off = ~np.eye(10, dtype=bool)
    assert (low[off] < 0.99 * table[off]).mean() > 0.5  # control: one step does not find it
    np.testing.assert_allclose(np.median(high[off] / table[off]), 1, rtol=1e-6)


def test_both_shapes_of_the_first_layer_and_both_sides_of_the_curvature():
    rng = np.random.default_rng(0)
    for hidden, features in ((4, 9), (9, 4)):
        w1, w2 = jnp.asarray(rng.normal(size=(hidden, features))), jnp.asarray(rng.normal(size=(3, hidden)))
        table = np.asarray(curvature.eigenvalue_table(w1, w2))
        for i, j in ((0, 1), (2, 0)):
            np.testing.assert_allclose(table[i, j], float(exact(w1, w2, i, j)), rtol=1e-13)

    # By definition: the Hessian of logit_i - logit_j lies between -m[i, j] and m[j, i] at every point.
    def difference(a):
        return jnp.dot(w2[0] - w2[1], jax.nn.softplus(w1 @ a))

    hessians = jax.vmap(jax.hessian(difference))(jnp.asarray(rng.normal(size=(300, 4))))
    eigenvalues = np.linalg.eigvalsh(np.asarray(hessians))
    assert -table[0, 1] <= eigenvalues.min() < -0.2 * table[0, 1]
    assert 0.2 * table[1, 0] < eigenvalues.max() <= table[1, 0]


@pytest.mark.parametrize("scales", [(1.0, 1.0), (1e20, 1e-25), (1e-30, 1e30), (1e-150, 1e-150)])
@pytest.mark.parametrize("kind", ["normal", "equal", "graded"])
def test_bound_is_above_the_exact_curvature(kind, scales):
    rng = np.random.default_rng(3)
    w1, w2 = rng.normal(size=(12, 5)), rng.normal(size=(3, 12))
    if kind == "equal":
        w1, w2[2] = np.ones_like(w1), w2[1] + 1
    if kind == "graded":
        w1, w2 = w1 * np.logspace(0, -12, 5), w2 * np.logspace(0, -12, 12)
    w1, w2 = w1 * scales[0], w2 * scales[1]
    for i, j in ((0, 1), (1, 2), (2, 1)):
        proved, value = curvature.bound(w1, w2, i, j), exact(w1, w2, i, j)
        assert value <= mpmath.mpf(proved)
        assert float(value) >= proved * (1 - 1e-6) - 2.0**-900


@pytest.mark.parametrize("place", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_bound_of_short_floats_is_above_the_exact_curvature(dtype, place):
    rng = np.random.default_rng(4)
    for _ in range(10):
        w1, w2 = (place(jnp.asarray(rng.normal(size=s), dtype)) for s in ((12, 5), (3, 12)))
        proved, value = curvature.bound(w1, w2, 0, 1), exact(*(np.asarray(a, np.float64) for a in (w1, w2)), 0, 1)
        assert value <= mpmath.mpf(proved)
        assert float(value) >= proved * (1 - 1e-6)


def test_bound_refuses_what_it_would_misread():
    w1, w2 = np.ones((3, 2)), np.arange(6.0).reshape(2, 3)
    assert curvature.bound(w1, w2, 0, 1) > 0  # control
    for wrong, name in (((np.where(w1 > 0, np.nan, 0), w2), "w1"), ((w1, w2 - np.inf), "w2"), ((w1, w2 + 1e300), "w2")):
        with np.errstate(invalid="ignore"), pytest.raises(NotCertifiable, match=name):
            curvature.bound(*wrong, 0, 1)
    for pair, name in (((-1, 0), "class_"), ((0, -2), "rival"), ((2, 0), "class_"), ((0, 2), "rival")):
        with pytest.raises(ValueError, match=f"Expected {name} to be an integer from 0 to 1, got"):
            curvature.bound(w1, w2, *pair)
    with pytest.raises(ValueError, match=r"Expected w1 \(hidden, features\) and w2"):
        curvature.bound(w1, w2[:, :2], 0, 1)


def test_bound_of_equal_rows_is_zero():
    assert curvature.bound(np.ones((3, 2)), np.ones((2, 3)), 0, 1) == 0


def test_no_curvature_has_finite_gradients():
    w1, w2 = jnp.ones((3, 2)), jnp.ones((2, 3))
    table, pull = jax.vjp(lambda *w: curvature.estimate_table(*w, jnp.array([1.0, 2.0]), 2), w1, w2)
    assert (np.asarray(table) == 0).all()
    assert all(np.isfinite(np.asarray(g)).all() for g in pull(jnp.ones((2, 2))))


def test_precision_and_jit(precision):
    rng = np.random.default_rng(1)
    w1, w2, u = (jnp.asarray(rng.normal(size=s), float) for s in ((6, 4), (3, 6), (4,)))
    expected = jnp.float64 if precision == "x64" else jnp.float32
    tables = jax.jit(lambda w1, w2, u: (curvature.estimate_table(w1, w2, u, 50), curvature.eigenvalue_table(w1, w2)))
    estimate, table = tables(w1, w2, u)
    assert estimate.dtype == table.dtype == expected
    np.testing.assert_allclose(estimate, table, rtol=1e-2)


def test_top_rivals():
    logits, labels = jnp.array([[3.0, 1.0, 2.0, 0.0], [3.0, 1.0, 2.0, 0.0]]), jnp.array([0, 3])
    np.testing.assert_array_equal(curvature.top_rivals(logits, labels, 2), [[2, 1], [0, 2]])
    np.testing.assert_array_equal(curvature.top_rivals(logits, labels, 3), [[2, 1, 3], [0, 2, 1]])
    with pytest.raises(ValueError, match="1 to 3 rivals"):
        curvature.top_rivals(logits, labels, 4)


def test_misuse_of_estimate():
    w1, w2, u = jnp.ones((3, 2)), jnp.ones((2, 3)), jnp.ones(2)
    pair = jnp.array([0]), jnp.array([1])
    with pytest.raises(ValueError, match="num_iters"):
        curvature.estimate(w1, w2, *pair, u, -1)
