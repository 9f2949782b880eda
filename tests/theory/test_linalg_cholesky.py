"""Cholesky orthogonalisation against the original code, SciPy and what it does to singular values."""

import inspect
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from golden_helpers import relative

from lipjax import linalg
from lipjax.linalg import cholesky

pytestmark = pytest.mark.quick_compiles

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "liresmlp_cholesky.npz"
UNIT = {"float32": 2.0**-24, "float64": 2.0**-53}


def draw(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def exact(w, ridge):
    """By SciPy, in double precision; one matrix."""
    w = np.asarray(w, np.float64)
    if w.shape[0] > w.shape[1]:
        return exact(w.T, ridge).T
    gram = w @ w.T
    lower = scipy.linalg.cholesky(gram + ridge * np.diag(gram).mean() * np.eye(len(gram)), lower=True)
    return scipy.linalg.solve_triangular(lower, w, lower=True)


@pytest.mark.parametrize("method", ["products", "auto"])
def test_values_and_gradients_are_the_originals(method):
    z = np.load(GOLDEN)
    f = lambda w: linalg.cholesky_orthogonalize(w, method=method)  # noqa: E731
    w, pull = jax.vjp(f, jnp.asarray(z["input/X"]))
    assert relative(w, z["output/W"]) < 1e-12
    assert relative(np.linalg.svd(w, compute_uv=False), z["output/singular_values"]) < 1e-12
    assert relative(pull(jnp.asarray(z["input/G"]))[0], z["output/grad_X"]) < 1e-11


# One block of columns, exactly one, several with a last one that is smaller; tall ones.
@pytest.mark.parametrize("shape", [(1, 1), (150, 200), (90, 20)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_error_is_as_documented(shape, dtype):
    for ridge in (1e-3, 0.1):
        w = draw(shape).astype(dtype)
        found = linalg.cholesky_orthogonalize(jnp.asarray(w), ridge)
        assert found.dtype == dtype
        size = np.linalg.norm(w.astype(np.float64), 2) ** 2
        shift = ridge * np.sum(w.astype(np.float64) ** 2) / min(shape)
        allowed = 4 * UNIT[dtype] * sum(shape) * size / shift
        error = np.linalg.norm(np.asarray(found, np.float64) - exact(w, ridge), 2)
        assert error <= allowed
        if dtype == "float64":
            assert np.linalg.norm(exact(w, ridge) - exact(w, 1.001 * ridge), 2) > allowed  # control


def test_singular_values_shrink_below_one_and_small_ones_stay_small():
    u, _, v = np.linalg.svd(draw((5, 8)), full_matrices=False)
    s = np.array([3.0, 1.0, 0.3, 1e-2, 0.0])
    found = np.linalg.svd(linalg.cholesky_orthogonalize(jnp.asarray(u * s @ v)), compute_uv=False)
    shift = 1e-3 * np.sum(s**2) / 5
    np.testing.assert_allclose(found, s / np.sqrt(s**2 + shift), rtol=0, atol=1e-12)
    assert found[0] < 1 and found[3] < 0.25  # a contraction, and far from orthogonal


def test_scale_zero_and_empty_matrices():
    w = jnp.asarray(draw((4, 6)))
    one, many = linalg.cholesky_orthogonalize(w), linalg.cholesky_orthogonalize(2.0**40 * w)
    np.testing.assert_array_equal(one, many)  # a power of two: nothing rounds otherwise
    value, gradient = jax.value_and_grad(lambda w: jnp.sum(linalg.cholesky_orthogonalize(w)))(0 * w)
    assert value == 0 and np.isfinite(gradient).all()
    assert linalg.cholesky_orthogonalize(jnp.zeros((0, 3))).shape == (0, 3)
    assert np.isnan(linalg.cholesky_orthogonalize(w.at[0, 0].set(jnp.nan))).any()  # training stops on it


@pytest.mark.parametrize("shape", [(2, 5, 7), (7, 5), (70, 72)])
def test_gradient_along_a_direction_with_the_shift_held_constant(shape):
    """Central differences of the function with the middle's shift: h^2 from truncation, u / h from rounding."""
    w, weight, e = (draw(shape, seed) for seed in range(3))
    transpose = (lambda a: np.swapaxes(a, -1, -2)) if shape[-2] > shape[-1] else (lambda a: a)
    wide = transpose(w)
    gram = wide @ np.swapaxes(wide, -1, -2)
    shift = 1e-3 * np.trace(gram, axis1=-2, axis2=-1)[..., None, None] / gram.shape[-1] * np.eye(gram.shape[-1])

    def value(w):
        w = transpose(w)
        lower = np.linalg.cholesky(w @ np.swapaxes(w, -1, -2) + shift)
        return np.sum(transpose(np.linalg.solve(lower, w)) * weight)

    found = jax.jit(jax.grad(lambda w: jnp.sum(linalg.cholesky_orthogonalize(w) * weight)))(jnp.asarray(w))
    h = 1e-5
    slope = (value(w + h * e) - value(w - h * e)) / (2 * h)
    assert abs(np.sum(np.asarray(found) * e) - slope) <= 1e-5 * abs(slope)


def test_methods_agree():
    w = jnp.asarray(draw((130, 140)))
    one, two = (linalg.cholesky_orthogonalize(w, method=method) for method in ("products", "lapack"))
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-12)
    lower, inverse = cholesky.factor(w @ w.T, "products")
    np.testing.assert_allclose(lower, np.linalg.cholesky(w @ w.T), rtol=0, atol=1e-11)
    assert np.abs(np.triu(np.asarray(inverse), 1)).max() == 0
    np.testing.assert_allclose(inverse @ lower, np.eye(130), rtol=0, atol=1e-9)


def test_products_are_pinned_and_no_lapack_runs_on_the_cpu():
    w = jnp.asarray(draw((4, 70, 80)), jnp.float32)
    f = jax.jit(jax.grad(lambda w: jnp.sum(linalg.cholesky_orthogonalize(w))))
    text = f.lower(w).as_text()
    lines = [line for line in text.splitlines() if "dot_general" in line]
    assert len(lines) >= 8 and all("HIGHEST" in line for line in lines)
    assert "lapack" not in text
    other = jax.jit(lambda w: linalg.cholesky_orthogonalize(w, method="lapack")).lower(w).as_text()
    assert "lapack" in other  # control


def test_misuse_is_named():
    for w, options in ((np.zeros(3), {}), (np.zeros((3, 3)), {"ridge": 0.0}), (np.zeros((3, 3)), {"method": "qr"})):
        with pytest.raises(ValueError, match="ridge > 0 and method 'auto', 'products' or 'lapack'"):
            inspect.unwrap(linalg.cholesky_orthogonalize)(w, **options)
