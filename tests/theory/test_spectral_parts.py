"""The parts below the norm bounds (twiddles, geometry, stated errors, guesses) and the power iteration."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from lipjax import spectral
from lipjax.spectral import symbol as symbols
from lipjax.spectral import verified

EPS = 2.0**-52


def test_stride_and_offset_bookkeeping_of_the_axis():
    for taps, size, stride, low, high in np.ndindex(6, 5, 3, 4, 4):
        taps, size, stride = taps + 1, size + 1, stride + 1
        out = (size + low + high - taps) // stride + 1
        if out < 1:
            continue
        axis = symbols.Axis(taps, size, stride, low, out, False)
        reads = [{i * stride + t - low for i in range(out)} & set(range(size)) for t in range(taps)]
        assert axis.offsets() == [t - low if reads[t] else None for t in range(taps)]
        n = axis.least_grid()
        for i in range(out):  # no output sees, around the end, a pixel that it does not read
            for t in range(taps):
                place = i * stride + t - low
                assert (0 <= place < size) == (place % (stride * n) < size)


def test_twiddles_are_within_half_a_unit():
    with mpmath.workdps(40):
        for n in (1, 2, 3, 17, 226):
            cosines, sines = symbols.twiddles(n)
            for a in range(2 * n):
                angle = mpmath.pi * a / n
                assert abs(mpmath.mpf(float(cosines[a])) - mpmath.cos(angle)) <= mpmath.mpf(2) ** -53
                assert abs(mpmath.mpf(float(sines[a])) - mpmath.sin(angle)) <= mpmath.mpf(2) ** -53
    assert symbols.twiddles(2)[0][1] == 0.0 != np.cos(np.pi / 2)  # the control: libm's argument is rounded


def test_gram_errors_cover_the_exact_matrices():
    rng = np.random.default_rng(13)
    taps, _ = verified.scale_to_unit(rng.normal(size=(2, 3, 4, 3)))
    polynomial = symbols.GramPolynomial(taps)
    grid, twist = (5, 6), (1, 0)
    family = polynomial.family(grid, twist)
    computed = family.grams(np.arange(family.count))
    mesh = [(2 * j + 1, 2 * k) for j in range(5) for k in range(6)]
    kept = [f for f in mesh if f[0] * 12 + f[1] <= (-f[0] % 10) * 12 + (-f[1] % 12)]
    assert len(kept) == family.count
    with mpmath.workdps(40):
        for (a1, a2), gram in zip(kept, computed, strict=True):
            symbol = mpmath.zeros(4, 3)
            for t1, t2 in np.ndindex(2, 3):
                phase = mpmath.expjpi(mpmath.mpf(a1 * t1) / 5 + mpmath.mpf(a2 * t2) / 6)
                symbol += phase * mpmath.matrix(taps[t1, t2].tolist())
            difference = symbol.H * symbol - mpmath.matrix(gram.tolist())
            distance = mpmath.sqrt(sum(abs(x) ** 2 for x in difference))
            assert 0 < distance <= mpmath.mpf(family.error.numerator) / family.error.denominator
            assert distance >= 1e-4 * float(family.error)  # not absurdly loose either


def test_rounding_helpers_round_up():
    rng = np.random.default_rng(15)
    for x in rng.random(200):
        q = Fraction(float(x)) / 3
        root = Fraction(verified.sqrt_up(q))
        assert q <= root**2 <= q * (1 + 4 * Fraction(EPS))
        up = verified.float_up(q)
        assert Fraction(up) >= q > Fraction(math.nextafter(up, 0))
    assert verified.float_up(Fraction(1, 2**1080)) == 5e-324
    values = rng.normal(size=1000)
    assert verified.sum_of_squares_up(values) >= sum(Fraction(float(v)) ** 2 for v in values)
    assert np.sum(values * values) < verified.sum_of_squares_up(values)


def test_lanczos_guess_above_1024_is_good():
    rng = np.random.default_rng(8)
    n = 1100
    with threadpool_limits(limits=1, user_api="blas"):
        q = np.linalg.qr(rng.normal(size=(n, n)))[0]
        for spectrum in (1 - np.linspace(0, 1, n) ** 2, np.r_[1.0, np.full(n - 1, 0.9999)], np.ones(n)):
            assert abs(verified._lanczos((q * spectrum) @ q.T) - 1) <= 1e-5
        for size in (1e-17, 1e-16, 1e-15, 1e-14, 1e-10):  # the basis breaks down, and a Ritz value would explode
            noise = rng.normal(size=(n, n))
            gram = np.eye(n) + size * (noise + noise.T)
            assert abs(verified._lanczos(gram) - 1) <= 200 * size + 1e-12
            estimate = verified._estimates(gram[None].astype(complex))[0]
            assert abs(estimate - 1) <= 200 * size + 1e-5


def iterate(matrix, v, num_iters):
    return spectral.power_iteration(lambda u: matrix @ u, lambda y: matrix.T @ y, v, num_iters)


@pytest.mark.parametrize("num_iters", [0, 3, 16, 17, 60])
def test_power_iteration_against_numpy(num_iters):
    rng = np.random.default_rng(17)
    matrix, v = rng.normal(size=(5, 4)), rng.normal(size=4)
    sigma, vector = jax.jit(iterate, static_argnums=2)(matrix, v, num_iters)
    u = v / np.linalg.norm(v)
    for _ in range(num_iters):
        u = matrix.T @ (matrix @ u)
        u = u / np.linalg.norm(u)
    np.testing.assert_allclose(vector, u, rtol=1e-12)
    np.testing.assert_allclose(sigma, np.linalg.norm(matrix @ u), rtol=1e-13)


@pytest.mark.parametrize("num_iters", [8, 200])
def test_power_iteration_gradient_holds_the_vector_constant(num_iters):
    rng = np.random.default_rng(18)
    matrix, v = jnp.asarray(rng.normal(size=(5, 4))), jnp.asarray(rng.normal(size=4))
    (sigma, vector), gradient = jax.value_and_grad(iterate, has_aux=True)(matrix, v, num_iters)
    left = matrix @ vector / sigma
    np.testing.assert_allclose(gradient, jnp.outer(left, vector), atol=1e-13)
    to_start = jax.grad(lambda start: iterate(matrix, start, num_iters)[0])(v)
    np.testing.assert_array_equal(to_start, 0)
    if num_iters == 200:
        u, s, vt = np.linalg.svd(matrix)
        np.testing.assert_allclose(sigma, s[0], rtol=1e-12)
        np.testing.assert_allclose(gradient, np.outer(u[:, 0], vt[0]), atol=1e-6)


@pytest.mark.parametrize("num_iters", [4, 20])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_power_iteration_of_zeros_and_extremes(num_iters, dtype):
    v = jnp.ones(3, dtype)
    value_and_grad = jax.value_and_grad(iterate, has_aux=True)
    (sigma, vector), gradient = value_and_grad(jnp.zeros((2, 3), dtype), v, num_iters)
    assert sigma == 0 and vector.dtype == dtype
    np.testing.assert_array_equal(gradient, 0)
    np.testing.assert_allclose(vector, 3**-0.5, rtol=1e-6)  # kept: a later nonzero operator starts from it
    (sigma, vector), gradient = value_and_grad(jnp.ones((2, 3), dtype), 0 * v, num_iters)
    assert sigma == 0 and not np.isnan(vector).any() and not np.isnan(gradient).any()
    # A^T A has entries around scale^2; float32 squares of its products would leave the range twice over.
    scale = 1e-15 if dtype == np.float32 else 1e-140
    (sigma, _), gradient = value_and_grad(scale * jnp.eye(3, dtype=dtype), v, num_iters)
    np.testing.assert_allclose(sigma / scale, 1, rtol=1e-6)
    assert np.isfinite(gradient).all()
    for entry in (np.nan, np.inf):  # weights that are no numbers have no norm, least of all 0
        assert np.isnan(iterate(jnp.full((2, 3), entry, dtype), v, num_iters)[0])


def test_power_iteration_traces_no_gradient_through_the_loop():
    matrix, v = jnp.eye(4), jnp.ones(4)

    def products(num_iters):
        jaxpr = jax.make_jaxpr(jax.grad(lambda m: iterate(m, v, num_iters)[0]))(matrix)
        return str(jaxpr).count("dot_general")

    assert products(6) - products(5) == 2  # A v and A^T (A v), nothing backwards
    with pytest.raises(ValueError, match="num_iters"):
        iterate(matrix, v, -1)


def test_an_estimate_is_not_a_bound():
    # A clustered spectrum: 20 steps from ones stay below the norm, the bound does not.
    rng = np.random.default_rng(19)
    q = np.linalg.qr(rng.normal(size=(40, 40)))[0]
    matrix = q @ np.diag(np.linspace(0.9, 1, 40)) @ q.T
    estimate, _ = iterate(matrix, jnp.ones(40), 20)
    assert float(estimate) < 0.999 < 1 - 1e-13 <= spectral.matrix_norm_bound(matrix).proved < 1 + 1e-10
