"""Block reflectors against NumPy in float64: values, the documented error, gradients, no LAPACK."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import everyday

from lipjax import linalg

pytestmark = pytest.mark.quick_compiles

UNIT = {"float32": 2.0**-24, "float64": 2.0**-53}


def draw(shape, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape) + 1j * rng.normal(size=shape)


def exact(v, ridge):
    """By singular values, in double precision."""
    u, s, _ = np.linalg.svd(np.asarray(v, np.complex128), full_matrices=False)
    e = ridge * np.mean(s**2, -1, keepdims=True)
    return np.eye(v.shape[-2]) - 2 * (u * (s**2 / (s**2 + e))[..., None, :]) @ u.conj().swapaxes(-1, -2)


# One block of columns; several, the last one smaller, of a single matrix and of many.
@pytest.mark.parametrize(
    ("shape", "dtype"),
    everyday(
        itertools.product([(2, 3, 1), (150, 130), (9, 40, 37)], ["float32", "float64"]),
        ((9, 40, 37), "float32"),
    ),
)
def test_the_error_is_as_documented(shape, dtype):
    cases = [(1e-3, 1.0, draw(shape).real), (1e-5, 1e-2, draw(shape))]
    for ridge, small, v in [*cases, (0.0, 1.0, draw(shape).real)] if shape[-1] == 1 else cases:
        v[..., 0] *= small
        kinds = {"float32": ("float32", "complex64"), "float64": ("float64", "complex128")}[dtype]
        x = v.astype(kinds[np.iscomplexobj(v)])
        found = np.asarray(linalg.block_reflector(jnp.asarray(x), ridge))
        assert found.dtype == x.dtype
        s = np.linalg.svd(x.astype(np.complex128), compute_uv=False)
        least = max(ridge, (s.min(-1) ** 2 / np.mean(s**2, -1)).min())
        allowed = 8 * UNIT[dtype] * sum(shape[-2:]) / least
        error = np.linalg.norm(found - exact(x, ridge), 2, (-2, -1)).max()
        assert error <= allowed, (ridge, error, allowed)
        np.testing.assert_allclose(found, found.conj().swapaxes(-1, -2), rtol=0, atol=40 * UNIT[dtype])
        if dtype == "float64":
            assert np.linalg.norm(exact(x, ridge) - exact(x, ridge + 1e-4), 2, (-2, -1)).max() > allowed  # control


@pytest.mark.parametrize("constant", everyday([False, True], True))
@pytest.mark.parametrize(("shape",), everyday([((2, 6, 3),), ((70, 66),)], ((70, 66),)))
def test_gradient_along_a_direction(shape, constant):
    """Central differences, with the middle's e where it is a constant: h^2 from truncation, u / h from rounding."""
    rows, columns, ridge = shape[-2] - 1, shape[-2] - 2, 0.1
    v, direction, weight = draw(shape), draw(shape, 1), draw((*shape[:-2], rows, columns), 2)
    fixed = ridge * np.mean(np.sum(np.abs(v) ** 2, -2), -1)

    def reference(v):
        e = fixed if constant else ridge * np.mean(np.sum(np.abs(v) ** 2, -2), -1)
        gram = v.conj().swapaxes(-1, -2) @ v + np.asarray(e)[..., None, None] * np.eye(shape[-1])
        w = np.eye(shape[-2]) - 2 * v @ np.linalg.solve(gram, v.conj().swapaxes(-1, -2))
        return np.sum((w[..., :rows, :columns] * weight.conj()).real)

    def value(real, imag):
        options = {"rows": rows, "columns": columns, "constant_ridge": constant}
        a, b = linalg.block_reflector_split(real, imag, ridge, **options)
        return jnp.sum(a * weight.real) + jnp.sum(b * weight.imag)

    found, gradients = jax.jit(jax.value_and_grad(value, (0, 1)))(jnp.asarray(v.real), jnp.asarray(v.imag))
    np.testing.assert_allclose(found, reference(v), rtol=1e-11)
    slope = np.sum(gradients[0] * direction.real) + np.sum(gradients[1] * direction.imag)
    h = 1e-5
    expected = (reference(v + h * direction) - reference(v - h * direction)) / (2 * h)
    assert abs(slope - expected) <= 1e-6 * abs(expected)
    if not constant:  # the scale of v makes no difference
        along = sum(np.sum(np.asarray(g) * part) for g, part in zip(gradients, (v.real, v.imag), strict=True))
        assert abs(along) <= 1e-10 * sum(np.sum(np.abs(g)) for g in gradients)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_columns_that_depend_on_each_other(dtype):
    """Rank one, whose rounding errors are coherent, in one and in several blocks: its reflection, and finite gradients.

    The norm exceeds 1 by what products round, (m + r) u at most here.
    """
    for m, r in ((8, 5), (150, 100)):
        line = np.random.default_rng(0).normal(size=(m, 1)).astype(dtype)
        v = jnp.asarray(line @ np.ones((1, r), dtype))
        w, pull = jax.vjp(jax.jit(lambda v: linalg.block_reflector(v, 0.0)), v)
        w = np.asarray(w, np.float64)
        np.testing.assert_allclose(w, exact(line, 0.0).real, rtol=0, atol=30 * np.sqrt(m) * UNIT[dtype])
        assert np.linalg.norm(w, 2) <= 1 + (m + r) * UNIT[dtype]
        assert np.isfinite(pull(jnp.ones_like(v @ v.T))[0]).all()
        if m > 100:  # control: the Gram matrix alone is not positive definite
            with pytest.raises(np.linalg.LinAlgError):
                np.linalg.cholesky(np.asarray(v).T @ np.asarray(v))


def test_zero_empty_and_broken_matrices():
    v = jnp.ones((4, 2))
    assert np.isnan(linalg.block_reflector(v.at[0, 0].set(jnp.nan))).any()  # training stops on it
    np.testing.assert_array_equal(linalg.block_reflector(0 * v, 0.0), np.eye(4))
    assert linalg.block_reflector(jnp.zeros((3, 4, 0))).tolist() == np.broadcast_to(np.eye(4), (3, 4, 4)).tolist()


def test_products_are_pinned_and_no_lapack_runs():
    v = jnp.asarray(draw((4, 70, 66)).real, jnp.float32)
    f = jax.jit(jax.grad(lambda v: jnp.sum(linalg.block_reflector_split(v, 2 * v)[0])))
    text = f.lower(v).as_text()
    lines = [line for line in text.splitlines() if "dot_general" in line]
    assert len(lines) >= 12 and all("HIGHEST" in line for line in lines)
    assert "lapack" not in text and "lapack" in jax.jit(jnp.linalg.inv).lower(v[:, :66]).as_text()  # control
