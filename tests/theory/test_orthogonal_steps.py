"""Steps between orthogonal matrices against exponentials in double precision, singular values and n x n geodesics."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from lipjax import linalg
from lipjax.linalg import orthogonal_steps

pytestmark = pytest.mark.quick_compiles

U32, U64 = 2.0**-24, 2.0**-53


def skew(shape, norm, seed=0):
    """Of the given Frobenius norm each."""
    a = np.random.default_rng(seed).normal(size=shape)
    a = a - np.swapaxes(a, -1, -2)
    return norm * a / np.linalg.norm(a, axis=(-2, -1), keepdims=True)


def orthonormal(n, p, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(n, p)))[0]


def one_plane(angle, n=6):
    """Skew of rank 2: all of its Frobenius norm, sqrt(2) angle, turns one plane."""
    q = orthonormal(n, 2, seed=1)
    return angle * (np.outer(q[:, 1], q[:, 0]) - np.outer(q[:, 0], q[:, 1]))


def departure(x):
    x = np.asarray(x, np.float64)
    x = np.swapaxes(x, -1, -2) if x.shape[-2] < x.shape[-1] else x
    return np.linalg.norm(np.swapaxes(x, -1, -2) @ x - np.eye(x.shape[-1]), 2, axis=(-2, -1)).max()


# ---- the exponential ------------------------------------------------------------------------------------------------

FACTORS = {
    2: lambda t: np.sqrt(1 + t**4 / 4),
    3: lambda t: np.sqrt(1 - t**4 / 12 + t**6 / 36),
    4: lambda t: np.sqrt(1 - t**6 / 72 + t**8 / 576),
}


@pytest.mark.parametrize(
    ("order", "norm", "stated"), [(2, 0.05, 2e-7), (3, 0.25, 4.1e-5), (4, 1.0, 9e-4), (4, 0.25, 2.2e-7)]
)
def test_singular_values_drift_as_stated_in_the_worst_case(order, norm, stated):
    angle = norm / np.sqrt(2)
    both = jnp.asarray(np.stack([one_plane(angle, 5), skew((5, 5), norm)]))
    worst, generic = np.linalg.svd(linalg.expm_truncated(both, order), compute_uv=False)
    far = worst[np.argmax(np.abs(worst - 1))]
    np.testing.assert_allclose(far, FACTORS[order](angle), rtol=20 * U64)
    assert stated / 2 < abs(far - 1) < stated
    first = {2: angle**4 / 8, 3: -(angle**4) / 24, 4: -(angle**6) / 144}[order]
    np.testing.assert_allclose(far - 1, first, rtol=0.4)  # the leading term
    assert np.abs(generic - 1).max() < abs(far - 1)


def test_the_series_is_as_long_as_the_largest_norm_of_the_stack_needs():
    """One program for all norms; each branch gives the numbers of its order."""
    traced = []
    function = jax.jit(lambda a: traced.append(1) or linalg.expm_truncated(a))
    for norm, order in ((0.0499, 2), (0.0501, 3), (0.2499, 3), (0.2501, 4), (0.9999, 4), (1.0001, "exact")):
        a = jnp.asarray(np.stack([skew((5, 5), norm), skew((5, 5), norm / 7, seed=1)]))
        found = function(a)
        np.testing.assert_allclose(found, linalg.expm_truncated(a, order), rtol=0, atol=8 * U64)
        for other in {2, 3, 4, "exact"} - {order}:  # control
            assert np.abs(found - linalg.expm_truncated(a, other)).max() > 1e-12
    assert len(traced) == 1
    assert np.isnan(function(jnp.full((2, 5, 5), jnp.nan))).all()


@pytest.mark.parametrize("norm", [0.3, 1.5, 6.0, 40.0])
def test_large_steps_are_exponentials(norm):
    a = skew((2, 5, 5), norm)
    expected = np.stack([scipy.linalg.expm(m) for m in a])
    np.testing.assert_allclose(linalg.expm_truncated(jnp.asarray(a), "exact"), expected, rtol=0, atol=40 * norm * U64)
    taylor = linalg.expm_truncated(jnp.asarray(a))
    np.testing.assert_allclose(taylor, expected, rtol=0, atol=max(40 * norm * U64, norm**5 / 120 * (norm < 1)))


# ---- tangents and geodesics ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "p"), [(7, 3), (6, 6)])
def test_geodesics_are_those_of_the_whole_space(n, p):
    """exp(W x^T - x W^T) x with the n x n exponential; wide matrices by transposition."""
    x, g = orthonormal(n, p), np.random.default_rng(3).normal(size=(n, p))
    z = np.asarray(linalg.tangent(jnp.asarray(x), jnp.asarray(g)))
    a, b = z[:p], z[p:] if n > p else np.zeros((n, p))
    np.testing.assert_array_equal(a, -a.T)
    np.testing.assert_allclose(x.T @ b, 0, atol=40 * U64)
    symmetric = (x.T @ g + g.T @ x) / 2
    np.testing.assert_allclose(x @ a + b, g - x @ symmetric, atol=40 * U64)  # the projection of g
    w = b + x @ a / 2
    for scale in (1e-9, 0.3, 3.0):
        expected = scipy.linalg.expm(scale * (w @ x.T - x @ w.T)) @ x
        step = linalg.geodesic_step(jnp.asarray(x), jnp.asarray(scale * z), order="exact")
        np.testing.assert_allclose(x + step, expected, rtol=0, atol=1000 * U64)
        np.testing.assert_allclose(step, expected - x, rtol=0, atol=1e-13 * max(1, scale * np.abs(g).max()))
        wide = linalg.geodesic_step(jnp.asarray(x.T), jnp.asarray(scale * z), order="exact")
        if n > p:
            np.testing.assert_allclose(wide, np.asarray(step).T, rtol=0, atol=50 * U64)
    # The first order is the direction itself.
    np.testing.assert_allclose(
        linalg.geodesic_step(jnp.asarray(x), jnp.asarray(1e-9 * z)), 1e-9 * (x @ a + b), atol=1e-16
    )
    if n > p:
        wide = linalg.tangent(jnp.asarray(x.T), jnp.asarray(g.T))
        np.testing.assert_array_equal(wide, z)


def test_the_rectangular_way_of_a_square_matrix_is_the_square_way():
    x, z = orthonormal(6, 6), skew((6, 6), 0.4)
    longer = np.concatenate([z, np.random.default_rng(0).normal(size=(6, 6))])  # none of it leads out
    step = jax.jit(lambda x, z: orthogonal_steps._rectangular_step(x, z, "exact"))(x, longer)
    np.testing.assert_allclose(step, linalg.geodesic_step(jnp.asarray(x), jnp.asarray(z), "exact"), atol=200 * U64)


def test_a_step_that_leaves_the_span_in_few_directions_is_as_good():
    """B of rank 1, of tiny size, and zero: nothing is divided by what is not there."""
    x = orthonormal(8, 3)
    out = scipy.linalg.null_space(x.T)[:, :1] @ np.array([[1.0, -2.0, 0.5]])
    for b in (out, 1e-170 * out, 0 * out):
        a = skew((3, 3), 0.7)
        w = b + x @ a / 2
        expected = scipy.linalg.expm(w @ x.T - x @ w.T) @ x
        found = x + linalg.geodesic_step(jnp.asarray(x), jnp.asarray(np.concatenate([a, b])), "exact")
        np.testing.assert_allclose(found, expected, atol=200 * U64)
        assert departure(found) < 200 * U64


@pytest.mark.parametrize("order", [2, 4])
def test_truncated_rectangular_steps_drift_as_square_ones(order):
    """The same polynomial of the n x n matrix: out of the span along one direction turns one plane."""
    x = orthonormal(7, 3)
    angle = 0.6
    b = angle * scipy.linalg.null_space(x.T)[:, :1] @ np.array([[0.0, 1.0, 0.0]])
    z = jnp.asarray(np.concatenate([np.zeros((3, 3)), b]))
    values = np.linalg.svd(x + linalg.geodesic_step(jnp.asarray(x), z, order), compute_uv=False)
    np.testing.assert_allclose(values[np.argmax(np.abs(values - 1))], FACTORS[order](angle), rtol=40 * U64)


# ---- the way back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "shape", "spread"),
    [
        *(("float32", (20, 20), spread) for spread in (1e-6, 1e-2, 1.0)),
        ("float32", (7, 12), 0.5),
        ("float64", (3, 12, 7), 0.1),
        *(("float64", (9, 4), spread) for spread in (1e-6, 3.0, 12.0)),
    ],
)
def test_the_polar_factor_is_that_of_singular_vectors(dtype, shape, spread):
    """Singular values between exp(-spread) and exp(spread): 12 is a condition number of 3e10."""
    rng = np.random.default_rng(0)
    u, s, v = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    s = np.exp(np.linspace(-spread, spread, s.shape[-1])) * np.ones_like(s)
    x = ((u * s[..., None, :]) @ v).astype(dtype)
    unit = U32 if dtype == "float32" else U64
    found = np.asarray(linalg.polar(jnp.asarray(x)))
    assert found.dtype == dtype
    assert departure(found) <= 4 * np.sqrt(min(shape[-2:])) * unit
    # Rounding of x, and of products along the way, moves the factor by as much over the least singular value.
    np.testing.assert_allclose(found, u @ v, rtol=0, atol=40 * unit * np.exp(2 * spread))
    assert spread < 1e-3 or departure(x) > 1e-2  # control


def test_a_matrix_without_a_polar_factor_ends():
    assert np.isfinite(linalg.polar(jnp.zeros((2, 2)))).all()
    found = linalg.polar(jnp.asarray(np.diag([2.0, 0.0])))
    np.testing.assert_allclose(found, np.diag([1.0, 0.0]), atol=1e-12)
    assert np.isnan(linalg.polar(jnp.full((2, 2), jnp.nan))).all()


def test_no_library_of_linear_algebra_is_called():
    """LAPACK can hang inside of XLA's threads on the CPU."""
    x, z = jnp.zeros((2, 6, 4)), jnp.zeros((2, 10, 4))
    for function, arguments in ((linalg.polar, (x,)), (linalg.tangent, (x, x)), (linalg.geodesic_step, (x, z))):
        text = jax.jit(function).lower(*arguments).as_text()
        assert "custom_call" not in text and "while" in text or function is linalg.tangent
    assert "custom_call" in jax.jit(jnp.linalg.svd).lower(x).as_text()  # control


def test_gradients_of_a_step_are_derivatives():
    """expm_truncated with a fixed order is a polynomial: reverse mode goes through it."""
    a, direction = jnp.asarray(skew((4, 4), 0.5)), jnp.asarray(skew((4, 4), 1.0, seed=2))
    w = jnp.cos(jnp.arange(16.0).reshape(4, 4))
    f = lambda a: jnp.sum(w * linalg.expm_truncated(a, 4))  # noqa: E731
    slope = (f(a + 1e-5 * direction) - f(a - 1e-5 * direction)) / 2e-5
    np.testing.assert_allclose(jnp.sum(jax.jit(jax.grad(f))(a) * direction), slope, rtol=1e-8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda of: of("polar")(jnp.zeros(3)), "polar takes float32 or float64 matrices"),
        (lambda of: of("polar")(jnp.zeros((2, 2), jnp.bfloat16)), "bfloat16"),
        (lambda of: of("tangent")(jnp.zeros((3, 2)), jnp.zeros((2, 3))), "of equal shapes, got float64 \\(3, 2\\) and"),
        (lambda of: of("expm_truncated")(jnp.zeros((2, 3))), "square matrices"),
        (lambda of: of("expm_truncated")(jnp.zeros((2, 2)), 5), "order of the exponential out of"),
        (
            lambda of: of("geodesic_step")(jnp.eye(3, 2), jnp.zeros((2, 2))),
            "coordinates float64 \\(5, 2\\) at x \\(3, 2\\)",
        ),
    ],
)
def test_bad_input_is_one_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call(lambda name: inspect.unwrap(getattr(linalg, name)))
