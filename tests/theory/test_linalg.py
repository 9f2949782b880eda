"""Exponentials against eigendecompositions and SciPy, Cayley transforms against their definition."""

import inspect

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import scipy.linalg
from tiers import everyday

from lipjax import linalg
from lipjax.linalg import functions

UNIT = {"float32": 2.0**-24, "float64": 2.0**-53, "complex64": 2.0**-24, "complex128": 2.0**-53}
DTYPES = tuple(UNIT)
GROWTH = {"float32": 6, "float64": 12.4, "complex64": 6, "complex128": 12.4}  # the docstring's c


def adjoint(x):
    return np.conj(np.swapaxes(x, -1, -2))


def norm(x):
    return np.max(np.linalg.norm(x, 2, (-2, -1)), initial=0.0) if x.size else 0.0


def draw(shape, dtype, scale=None, seed=0):
    """Normal entries; `scale`: the largest spectral norm of the batch."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) + (1j * rng.normal(size=shape) if "complex" in dtype else 0)
    return (x if scale is None else x * (scale / norm(x))).astype(dtype)


def draw_skew(shape, dtype, scale, seed=0):
    x = draw(shape, dtype, seed=seed)
    x = x - adjoint(x)
    return (x * (scale / norm(x) if norm(x) else 0)).astype(dtype)


def exact_exponential(a):
    """By the eigenvectors of the Hermitian -i a, in double precision."""
    values, vectors = np.linalg.eigh(-1j * a.astype("complex128"))
    return (vectors * np.exp(1j * values)[..., None, :]) @ adjoint(vectors)


def departure(q):
    """|q^H q - I|, computed in double precision."""
    q = np.asarray(q).astype("complex128")
    return norm(adjoint(q) @ q - np.eye(q.shape[-1]))


# --- The exponential ---


@pytest.mark.parametrize(
    ("shape", "dtype"),
    everyday(
        [
            *(((3, 8, 8), dtype) for dtype in DTYPES),
            *(((2, 64, 64), dtype) for dtype in ("complex64", "complex128")),
            ((1, 1), "complex64"),
            ((2, 2, 3, 3), "float64"),
            ((4, 2, 2), "float32"),
            ((0, 3, 3), "complex128"),
            ((0, 0), "float32"),
        ],
        *[((3, 8, 8), "float32"), ((3, 8, 8), "complex128"), ((2, 2, 3, 3), "float64"), ((0, 0), "float32")],
    ),
)
def test_exponential_is_orthogonal_and_accurate(shape, dtype):
    """One compiled function for every norm: the number of squarings is no shape."""
    exponential = jax.jit(lambda a: linalg.expm_skew(a))
    unit = UNIT[dtype]
    for scale in (0.0, 1e-3, 0.9, 1.4, 3.0, 7.0, 50.0):
        a = draw_skew(shape, dtype, scale)
        u = exponential(jnp.asarray(a))
        assert (u.shape, u.dtype) == (shape, a.dtype)
        if not u.size:
            continue
        # In double precision the product of the check rounds too, and so do the oracle's products (n u) and eigenvalues
        # (sqrt(n) u |a|); its eigenvectors are as far from orthogonal as LAPACK leaves them.
        n, size = shape[-1], norm(a)
        assert departure(u) <= (8 + 4 * n**0.5) * unit
        assert norm(np.asarray(u) - exact_exponential(a)) <= GROWTH[dtype] * (1 + size) * unit + 2**-53 * (
            n + n**0.5 * size
        ) + departure(np.linalg.eigh(-1j * a.astype("complex128"))[1])
    assert exponential._cache_size() == 1


def test_exponential_agrees_with_scipy():
    a = draw_skew((5, 6, 6), "complex128", 20.0)
    expected = np.stack([scipy.linalg.expm(block) for block in a])
    assert norm(np.asarray(linalg.expm_skew(jnp.asarray(a))) - expected) <= 2 * 12.4 * 21 * 2.0**-53


@pytest.mark.parametrize("dtype", everyday(DTYPES, "float32", "complex128"))
def test_exponential_of_zero_is_the_identity(dtype):
    assert np.array_equal(jax.jit(linalg.expm_skew)(np.zeros((2, 3, 3), dtype)), np.stack([np.eye(3)] * 2))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_too_few_squarings_or_no_polish_are_noticed(dtype, monkeypatch):
    """Control of the two bounds above: each fails without the step that it rests on."""
    a = draw_skew((8, 8), dtype, 50.0)
    # Compiled anew at every call.
    exponential = lambda: jax.jit(lambda a: functions._exponential_forward((a, None))[0][0])(jnp.asarray(a))  # noqa: E731
    bound = (8 + 4 * 8**0.5) * UNIT[dtype]
    assert departure(exponential()) <= bound
    with monkeypatch.context() as patch:
        patch.setattr(functions, "_newton_schulz", lambda v: v)
        assert departure(exponential()) > bound
    squarings = functions._squarings
    monkeypatch.setattr(functions, "_squarings", lambda a2: squarings(a2) - 2)
    assert norm(np.asarray(exponential()) - exact_exponential(a)) > 2 * GROWTH[dtype] * 51 * UNIT[dtype]


@pytest.mark.parametrize(("dtype", "value", "slope"), [("float32", 1.6e-8, 1.2e-6), ("float64", 3.8e-17, 2.6e-14)])
def test_the_polynomial_is_as_close_as_stated(dtype, value, slope):
    """On i[-theta, theta], in 30 digits, with the coefficients rounded as they are used. Control: Taylor's."""

    def errors(coefficients, theta):
        with mpmath.workdps(30):
            x1, x2, x4, x5, x6, x7, y2 = (mpmath.mpf(float(c)) for c in coefficients)

            def p(z):
                z4 = z * z * (x1 * z + x2 * z * z)
                return 1 + z + y2 * z * z + (z * z + z4) * (x4 + x5 * z + x6 * z * z + x7 * z4)

            points = [1j * theta * k / mpmath.mpf(60) for k in range(-60, 61)]
            rise = max(abs(mpmath.diff(p, z) - mpmath.exp(z)) for z in points)
            return float(max(abs(p(z) - mpmath.exp(z)) for z in points)), float(rise)

    theta, coefficients = functions._THETA[dtype], functions._COEFFICIENTS[dtype]
    found = errors(coefficients, theta)
    assert found[0] <= value
    assert found[1] <= slope
    assert errors(coefficients, 1.2 * theta)[0] > 2 * value
    if dtype == "float32":  # those of float64 are nearly Taylor's
        assert errors(functions._COEFFICIENTS["float64"], theta)[0] > 3 * value


def exact_gradient(a, g):
    """The adjoint of the derivative of exp at a, applied to g: divided differences between the eigenvalues i w."""
    values, vectors = np.linalg.eigh(-1j * a.astype("complex128"))
    mean, half = (values[..., :, None] + values[..., None, :]) / 2, (values[..., :, None] - values[..., None, :]) / 2
    differences = np.exp(1j * mean) * np.sinc(half / np.pi)
    return vectors @ (differences.conj() * (adjoint(vectors) @ g @ vectors)) @ adjoint(vectors)


@pytest.mark.parametrize("dtype", everyday(DTYPES, "float32", "complex128"))
def test_gradient_is_accurate(dtype):
    """For a cotangent that is tangent to nothing, whose part off the tangents is right to the same accuracy."""

    @jax.jit
    def gradient(a, g):
        if "float" in dtype:
            return jax.vjp(linalg.expm_skew, a)[1](g)[0]
        parts = jax.vjp(linalg.expm_skew_split, a.real, a.imag)[1]((g.real, g.imag))
        return jax.lax.complex(*parts)

    g = draw((2, 5, 5), dtype, 1.0, seed=1)
    for scale in (0.0, 0.3, 1.5, 5.0, 20.0):
        a = draw_skew((2, 5, 5), dtype, scale)
        found, expected = np.asarray(gradient(jnp.asarray(a), jnp.asarray(g))), exact_gradient(a, g)
        assert found.dtype == dtype
        # |p' - exp'| of the polynomial; the rounding of U enters from both sides of the tangent, and in the oracle.
        slope = {"float32": 1.2e-6, "float64": 2.6e-14}["float32" if UNIT[dtype] > 1e-10 else "float64"]
        limit = slope + 4 * GROWTH[dtype] * (1 + scale) * UNIT[dtype]
        assert norm(found - expected) <= limit
        if scale:  # control: neighbours are told apart
            assert norm(found - exact_gradient((1 + 10 * limit) * a.astype("complex128"), g)) > limit


def test_gradient_is_right_for_every_perturbation():
    """Also off the skew matrices, where neither the polynomial nor the squarings know of skewness (no polish here)."""
    a = jnp.asarray(draw_skew((3, 3), "float64", 2.0))
    g, e = jnp.asarray(draw((3, 3), "float64", seed=1)), jnp.asarray(draw((3, 3), "float64", seed=2))
    (gradient,) = jax.jit(lambda a, g: jax.vjp(linalg.expm_skew, a)[1](g))(a, g)
    # Of f(t) = <g, exp(a + t e)> by central differences: h^2 |e|^3 from truncation, u / h from rounding.
    h = 1e-5
    slope = (jnp.vdot(g, linalg.expm_skew(a + h * e)) - jnp.vdot(g, linalg.expm_skew(a - h * e))) / (2 * h)
    np.testing.assert_allclose(jnp.vdot(gradient, e), slope, rtol=0, atol=1e-8)
    assert abs(jnp.vdot(gradient, e) - jnp.vdot(g, e)) > 1e-2  # control: not the gradient at zero


def test_split_is_the_same_function_in_real_arithmetic():
    a = draw_skew((2, 4, 4), "complex64", 3.0)
    real, imag = linalg.expm_skew_split(jnp.asarray(a.real), jnp.asarray(a.imag))
    both, whole = np.asarray(real) + 1j * np.asarray(imag), linalg.expm_skew(jnp.asarray(a))
    np.testing.assert_allclose(both, whole, rtol=0, atol=2.0**-22)  # four roundings of entries of at most 1
    assert np.abs(both.conj() - whole).max() > 0.1  # control
    assert "complex" not in str(jax.make_jaxpr(linalg.expm_skew_split)(a.real, a.imag))
    alone, nothing = linalg.expm_skew_split(jnp.asarray(a.real))
    assert nothing is None
    assert np.array_equal(alone, linalg.expm_skew(jnp.asarray(a.real)))


def test_exponential_under_vmap_takes_each_its_own_squarings():
    a = jnp.asarray(np.stack([draw_skew((3, 3), "float64", scale) for scale in (0.01, 1.0, 40.0)]))
    alone = jnp.stack([linalg.expm_skew(block) for block in a])
    bound = 2 * 12.4 * 41 * 2.0**-53
    assert norm(np.asarray(jax.vmap(linalg.expm_skew)(a) - alone)) <= bound
    gradient = jax.jit(jax.grad(lambda a: jnp.sum(linalg.expm_skew(a)[0])))
    assert norm(np.asarray(jax.vmap(gradient)(a) - jnp.stack([gradient(block) for block in a]))) <= 10 * bound


@pytest.mark.quick_compiles
@pytest.mark.parametrize("precision", everyday(["x64", "x32"], "x32"), indirect=True)
def test_exponential_in_training_precision(precision):
    a = draw_skew((2, 4, 4), "complex64", 2.0)
    value, gradient = jax.jit(jax.value_and_grad(lambda a: linalg.expm_skew(a).real.sum()))(jnp.asarray(a))
    assert (value.dtype, gradient.dtype) == ("float32", "complex64")
    assert bool(jnp.isfinite(gradient).all())


@pytest.mark.parametrize("entry", [np.nan, np.inf, 1e25])
def test_what_has_no_exponential_is_not_finite(entry):
    """And the loop ends. 1e25: its square is beyond float32."""
    a = np.float32([[0, entry], [-entry, 0]])
    assert not np.isfinite(np.asarray(linalg.expm_skew(jnp.asarray(a)))).any()


@pytest.mark.parametrize("dtype", everyday(UNIT, "float32", "complex128"))
def test_what_is_not_skew_is_refused_where_numbers_are_known(dtype, monkeypatch):
    a = draw_skew((2, 3, 3), dtype, 1.0)
    rounded = a * (1 + np.asarray(100 * UNIT[dtype] * draw((2, 3, 3), "float64"), a.real.dtype))
    for x in (a, rounded, a[:0], a.dtype.type(1e-30) * a):
        assert linalg.expm_skew(jnp.asarray(x)).shape == x.shape  # controls
    wrong = jnp.asarray(draw((2, 3, 3), dtype))
    for x in (wrong, a + np.eye(3, dtype=dtype), a.dtype.type(1e-30) * wrong, np.stack([a[0], wrong[0]])):
        with pytest.raises(ValueError, match="skew-Hermitian matrices, a = -a.H, got others"):
            linalg.expm_skew(jnp.asarray(x))
    # Where JAX traces nothing is looked at, and nothing added to the program.
    monkeypatch.setattr(functions, "_is_skew", None)
    assert jax.jit(lambda x: linalg.expm_skew(x))(wrong).shape == wrong.shape
    assert jax.eval_shape(linalg.expm_skew, wrong).shape == wrong.shape


def test_products_are_pinned_to_the_highest_precision():
    """In the forward and in the backward passes."""
    skew, tall = draw_skew((4, 4), "complex64", 1.0), draw((6, 4), "complex64")
    for f, x in ((linalg.expm_skew, skew), (linalg.cayley, tall)):
        text = str(jax.make_jaxpr(jax.grad(lambda x, f=f: f(x).real.sum()))(x))
        assert text.count("dot_general[") == text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((2, 3)),), "square matrices"),
        ((np.zeros(3),), "square matrices"),
        ((np.zeros((3, 3), np.float16),), "32 or 64 bits"),
        ((np.zeros((3, 3)), np.zeros((2, 3, 3))), "imaginary part like the real one"),
        ((np.zeros((3, 3)), np.zeros((3, 3), np.float32)), "imaginary part like the real one"),
    ],
)
def test_misuse_of_the_exponential_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(linalg.expm_skew_split)(*arguments)


# --- The Cayley transform ---


def cayley_by_definition(w):
    """[(I + A)^-1 (I - A); -2 V (I + A)^-1] with explicit inverses, in double precision."""
    w = w.astype("complex128")
    if w.shape[-2] < w.shape[-1]:
        return np.swapaxes(cayley_by_definition(np.swapaxes(w, -1, -2)), -1, -2)
    n = w.shape[-1]
    u, v = w[..., :n, :], w[..., n:, :]
    a = u - adjoint(u) + adjoint(v) @ v
    inverse = np.linalg.inv(np.eye(n) + a)
    return np.concatenate([inverse @ (np.eye(n) - a), -2 * v @ inverse], -2)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    everyday(
        [
            *(((2, 5, 3), dtype) for dtype in DTYPES),
            # One pivot block, several, and a last one that is smaller.
            *((shape, "complex64") for shape in ((3, 3), (2, 3, 5), (2, 1, 4), (40, 32), (100, 70), (64, 64))),
            *((shape, "float64") for shape in ((1, 1), (4, 0), (24, 40), (70, 70))),
            *((shape, "complex128") for shape in ((1, 1), (2, 3, 5), (1, 2, 4, 1), (40, 24), (2, 45, 40))),
            *((shape, "float32") for shape in ((3, 3), (4, 0), (24, 40))),
        ],
        *(((2, 5, 3), dtype) for dtype in DTYPES),
        *[((2, 3, 5), "complex64"), ((1, 1), "float64"), ((4, 0), "float64"), ((2, 45, 40), "complex128")],
    ),
)
def test_cayley_is_orthogonal_and_as_defined(shape, dtype):
    cayley = jax.jit(lambda w: linalg.cayley(w))
    for scale in (1e-3, 1.0, 30.0) if 0 not in shape else (None,):
        w = draw(shape, dtype, scale)
        q = cayley(w)
        assert (q.shape, q.dtype) == (shape, w.dtype)
        if 0 in shape:
            continue
        condition = 1 + 2 * scale + scale**2  # of I + A
        tall = np.swapaxes(q, -1, -2) if shape[-2] < shape[-1] else q
        assert departure(tall) <= 20 * UNIT[dtype] * condition
        # In double precision the oracle's inverse rounds as well.
        assert norm(np.asarray(q) - cayley_by_definition(w)) <= 20 * UNIT[dtype] * condition


def test_cayley_without_its_lower_part_is_not_orthogonal():
    """Control of the bound on the departure: A without V^H V."""
    w = draw((5, 3), "float64", 1.0)
    inverse = np.linalg.inv(np.eye(3) + w[:3] - w[:3].T)
    assert departure(np.concatenate([inverse @ (np.eye(3) - w[:3] + w[:3].T), -2 * w[3:] @ inverse])) > 1e-2


def test_cayley_of_zero_and_of_a_wide_complex_matrix():
    assert np.array_equal(linalg.cayley(jnp.zeros((5, 3))), np.eye(5, 3))
    w = jnp.asarray(draw((3, 5), "complex128"))
    assert np.array_equal(linalg.cayley(w), linalg.cayley(w.T).T)  # transposed, not conjugated


@pytest.mark.quick_compiles
@pytest.mark.x64_off
@pytest.mark.parametrize(("shape",), everyday([((4, 9, 6),), ((4, 6, 9),)], ((4, 6, 9),)))
def test_cayley_is_as_defined_in_training_precision(shape):
    """Values to 5e-7 entry by entry, and gradients to the same relative to their norm; the oracle factorises."""
    w, weight = draw(shape, "complex64", 1.0), jnp.asarray(draw(shape, "complex64", seed=1))
    value = lambda w, transform: jnp.sum((transform(w) * weight).real)  # noqa: E731

    def definition(w):
        if w.shape[-2] < w.shape[-1]:
            return jnp.swapaxes(definition(jnp.swapaxes(w, -1, -2)), -1, -2)
        n, adjoint = w.shape[-1], lambda x: jnp.conj(jnp.swapaxes(x, -1, -2))
        u, v, eye = w[..., :n, :], w[..., n:, :], jnp.eye(w.shape[-1], dtype=w.dtype)
        inverse = jnp.linalg.inv(eye + u - adjoint(u) + adjoint(v) @ v)
        return jnp.concatenate([inverse @ (eye - u + adjoint(u) - adjoint(v) @ v), -2 * v @ inverse], -2)

    np.testing.assert_allclose(linalg.cayley(jnp.asarray(w)), cayley_by_definition(w), rtol=0, atol=5e-7)
    gradients = [jax.jit(jax.grad(value), static_argnums=1)(jnp.asarray(w), f) for f in (linalg.cayley, definition)]
    assert gradients[0].dtype == w.dtype
    assert norm(np.asarray(gradients[0] - gradients[1])) <= 2e-6 * norm(np.asarray(gradients[1]))


@pytest.mark.quick_compiles
@pytest.mark.parametrize(
    ("shape", "dtype"),
    everyday(
        [((5, 3), "float64"), ((2, 5, 3), "complex128"), ((3, 5), "complex128"), ((40, 36), "complex128")],
        *[((5, 3), "float64"), ((3, 5), "complex128")],
    ),
)
def test_gradient_of_cayley(shape, dtype):
    """Along a random direction, by central differences: h^2 from truncation, u / h from rounding."""
    w, weight, e = (draw(shape, dtype, 1.0, seed) for seed in range(3))
    f = jax.jit(lambda w: jnp.sum((linalg.cayley(w) * weight).real))
    # JAX's gradient is the conjugate of steepest ascent.
    found = np.sum((np.asarray(jax.jit(jax.grad(f))(jnp.asarray(w))) * e).real)
    slope = (f(w + 1e-5 * e) - f(w - 1e-5 * e)) / 2e-5
    np.testing.assert_allclose(found, slope, rtol=0, atol=1e-8)
    assert abs(slope) > 1e-3  # control


def test_misuse_of_cayley_is_named():
    with pytest.raises(ValueError, match="expects matrices"):
        inspect.unwrap(linalg.cayley)(np.zeros(3))
    with pytest.raises(TypeError, match="method"):  # what can hang is gone
        linalg.cayley(jnp.eye(3), method="solve")
