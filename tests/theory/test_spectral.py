"""Norm bounds against oracles that share no code with them: loops over taps with LAPACK's SVD, 40-digit arithmetic."""

import inspect
import json
import math
import types
from fractions import Fraction

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

from lipjax import spectral
from lipjax.errors import NotCertifiable
from lipjax.spectral import norms, symbol, verified

pytestmark = pytest.mark.usefixtures("one_blas_thread")

EPS = 2.0**-52


def dense_matrix(kernel, size, strides, padding):
    """The matrix of y[p] = sum_t K[t] x[s p + t - lo], entry by entry."""
    (h, w), (s1, s2), (k1, k2, c, o) = size, strides, kernel.shape
    circular = padding == "CIRCULAR"
    if circular:
        lows, out = ((k1 - 1) // 2, (k2 - 1) // 2), (h // s1, w // s2)
    else:
        lows = padding[0][0], padding[1][0]
        out = (h + sum(padding[0]) - k1) // s1 + 1, (w + sum(padding[1]) - k2) // s2 + 1
    matrix = np.zeros((*out, o, h, w, c))
    for p1, p2, t1, t2 in np.ndindex(*out, k1, k2):
        x1, x2 = s1 * p1 + t1 - lows[0], s2 * p2 + t2 - lows[1]
        if circular:
            x1, x2 = x1 % h, x2 % w
        if 0 <= x1 < h and 0 <= x2 < w:
            matrix[p1, p2, :, x1, x2, :] += kernel[t1, t2].T
    return matrix.reshape(math.prod(out) * o, h * w * c)


def svd_norm(matrix):
    """LAPACK's largest singular value and how far it may be off: backward stable, so a modest multiple of n u."""
    norm = np.linalg.norm(matrix, 2)
    return norm, 10 * max(matrix.shape) * EPS * norm


def exact_norm(matrix):
    """The norm at 40 digits, whatever the scale."""
    is_complex = np.iscomplexobj(matrix)
    with mpmath.workdps(40):
        exact = mpmath.matrix(
            [[mpmath.mpc(x) if is_complex else mpmath.mpf(x) for x in row] for row in matrix.tolist()]
        )
        return max((mpmath.svd_c if is_complex else mpmath.svd_r)(exact, compute_uv=False))


def random_orthogonal(n, rng):
    return np.linalg.qr(rng.normal(size=(n, n)))[0]


def hostile_matrices():
    rng = np.random.default_rng(7)
    q = random_orthogonal(6, rng)
    yield "random", rng.normal(size=(5, 7))
    yield "one entry", np.array([[-3.7]])
    yield "row", rng.normal(size=(1, 9))
    yield "column", rng.normal(size=(9, 1))
    yield "orthogonal", q
    yield "identity", np.eye(6)
    yield "clustered", q @ np.diag(1 + 1e-13 * np.arange(6)) @ random_orthogonal(6, rng)
    yield "ones", np.ones((6, 8))
    yield "rank one", np.outer(rng.normal(size=6), rng.normal(size=5))
    yield "graded", rng.normal(size=(6, 6)) * 10.0 ** -np.arange(0, 96, 16)[:, None]
    yield "Hilbert", 1 / (1 + np.add.outer(np.arange(6.0), np.arange(6.0)))
    yield "mixed with subnormals", np.where(rng.random((5, 5)) < 0.5, 1.0, 5e-324) * rng.normal(size=(5, 5))
    yield "complex", rng.normal(size=(5, 4)) + 1j * rng.normal(size=(5, 4))
    yield "complex wide", rng.normal(size=(3, 7)) + 1j * rng.normal(size=(3, 7))
    yield "imaginary", 1j * rng.normal(size=(4, 4))


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1.0, 1e150])
@pytest.mark.parametrize(("name", "matrix"), [pytest.param(n, m, id=n) for n, m in hostile_matrices()])
def test_matrix_bound_against_40_digits(name, matrix, scale):
    matrix = matrix * scale
    truth = exact_norm(matrix)
    bound = spectral.matrix_norm_bound(matrix).proved
    assert mpmath.mpf(bound) >= truth
    # Sides below 10: the first excess, 2^-40 of the squared norm, and rounding of about 10^2 u.
    assert mpmath.mpf(bound) <= truth * (1 + 1e-12)


@pytest.mark.parametrize("scale", [5e-324, 1e-310, 1e-300, 1e300])
def test_scales_at_the_ends_of_the_range(scale):
    matrix = np.array([[1.0, 2.0], [0.0, 3.0]]) * scale
    truth = exact_norm(matrix)
    bound = mpmath.mpf(spectral.matrix_norm_bound(matrix).proved)
    assert truth <= bound <= truth * (1 + 1e-12) + mpmath.mpf(5e-324)


@pytest.mark.parametrize("shape", [(64, 64), (300, 170), (170, 300), (1200, 1100)])
@pytest.mark.parametrize("kind", ["normal", "orthogonal", "near identity"])
def test_matrix_bound_slack(shape, kind):
    rng = np.random.default_rng(3)
    matrix = rng.normal(size=shape) * (1e-3 if kind == "near identity" else 1.0)
    if kind == "orthogonal":
        matrix = np.linalg.qr(matrix)[0] if shape[0] >= shape[1] else np.linalg.qr(matrix.T)[0].T
    elif kind == "near identity":
        matrix = matrix + np.eye(*shape)
    norm, error = svd_norm(matrix)
    assert norm - error <= spectral.matrix_norm_bound(matrix).proved <= norm * (1 + 1e-8)


def test_complex_matrix_of_512():
    rng = np.random.default_rng(4)
    matrix = rng.normal(size=(300, 200)) + 1j * rng.normal(size=(300, 200))
    norm, error = svd_norm(matrix)
    assert norm - error <= spectral.matrix_norm_bound(matrix).proved <= norm * (1 + 1e-9)


def test_a_shift_below_the_norm_is_refused():
    # The control of every test above: the verification fails where the claim would be false.
    rng = np.random.default_rng(5)
    for is_complex in (False, True):
        matrix = rng.normal(size=(40, 30)) + (1j * rng.normal(size=(40, 30)) if is_complex else 0)
        gram = matrix.conj().T @ matrix
        top = np.linalg.eigvalsh(gram)[-1]
        assert verified._verify(gram, top * (1 - 1e-12)) is None
        assert verified._verify(gram, top * (1 + 1e-12)) is not None
        assert verified._verify(gram[None].repeat(3, 0), top * (1 - 1e-12)) is None
    nan = np.eye(3)
    nan[2, 0] = np.nan
    assert verified._verify(nan, 2.0) is None


def test_a_poor_guess_still_gives_a_bound(monkeypatch):
    rng = np.random.default_rng(6)
    matrix = rng.normal(size=(60, 50))
    norm, _ = svd_norm(matrix)
    for factor in (0.5, 0.999, 1 - 1e-6, 1 - 1e-10):
        monkeypatch.setattr(verified, "_guess", lambda gram, f=factor: f * np.linalg.eigvalsh(gram)[-1])
        bound = spectral.matrix_norm_bound(matrix).proved
        # Growth by 16, then four bisections of the logarithm: the excess is at most 16^(1/16) = 1.19 times the gap.
        assert norm * (1 - 1e-13) <= bound <= norm * (1 + (1 / factor - 1) * 1.2 + 2e-8)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_entries_raise(bad):
    matrix = np.ones((3, 4))
    matrix[1, 2] = bad
    with pytest.raises(NotCertifiable, match="NaN or infinite"):
        spectral.matrix_norm_bound(matrix)
    imaginary = np.zeros((3, 4), complex)
    imaginary.imag = matrix
    with pytest.raises(NotCertifiable, match="NaN or infinite"):
        spectral.matrix_norm_bound(imaginary)
    kernel = np.ones((3, 3, 2, 2))
    kernel[0, 0, 0, 0] = bad
    with pytest.raises(NotCertifiable, match="NaN or infinite"):
        spectral.conv_norm_bound(kernel, (4, 4, 2), 1, "CIRCULAR")


def test_bad_input_raises():
    # Unwrapped, since jaxtyping would object first here, but not in a user's program.
    matrix_norm_bound = inspect.unwrap(spectral.matrix_norm_bound)
    conv_norm_bound = inspect.unwrap(spectral.conv_norm_bound)
    with pytest.raises(ValueError, match="none empty"):
        matrix_norm_bound(np.zeros((0, 3)))
    with pytest.raises(ValueError, match="expected 2 axes"):
        matrix_norm_bound(np.zeros(3))
    with pytest.raises(NotCertifiable, match="float64 range"):
        matrix_norm_bound(np.full((4, 4), 1e308))
    kernel = np.ones((3, 3, 2, 2))
    with pytest.raises(ValueError, match="in_shape"):
        conv_norm_bound(kernel, (4, 4, 3), 1, "CIRCULAR")
    with pytest.raises(ValueError, match="padding"):
        conv_norm_bound(kernel, (4, 4, 2), 1, "SAME")
    with pytest.raises(NotCertifiable, match="expected real numbers, got complex128"):
        conv_norm_bound(kernel * 1j, (4, 4, 2), 1, "CIRCULAR")
    with pytest.raises(ValueError, match="divisible"):
        conv_norm_bound(kernel, (5, 5, 2), 2, "CIRCULAR")


def test_zero_operators_are_zero():
    assert spectral.matrix_norm_bound(np.zeros((3, 5))).proved == 0.0
    assert spectral.conv_norm_bound(np.zeros((3, 3, 2, 2)), (4, 4, 2), 1, "CIRCULAR").proved == 0.0
    assert spectral.conv_norm_bound(np.zeros((3, 3, 2, 2)), (4, 4, 2), 1, ((1, 1), (1, 1))).proved == 0.0
    # A kernel of ones whose outputs (at 1 and -2, stride 3) never meet the only pixel.
    assert spectral.conv_norm_bound(np.ones((1, 1, 2, 2)), (1, 1, 2), 3, ((2, 2), (0, 0))).proved == 0.0


def test_details_are_json_and_results_repeat():
    rng = np.random.default_rng(9)
    kernel = rng.normal(size=(3, 3, 9, 9))
    arguments = (kernel, (24, 24, 9), 1, ((1, 1), (1, 1)))
    first, second = (spectral.conv_norm_bound(*arguments) for _ in range(2))
    assert first == second
    assert json.loads(json.dumps(first.details)) == first.details
    assert first.method == "Cholesky per frequency of a block circulant"


GEOMETRIES = [
    # kernel (k1, k2, c, o), size, strides, padding
    ((3, 3, 3, 2), (6, 6), (1, 1), ((1, 1), (1, 1))),
    ((3, 3, 2, 3), (7, 5), (1, 1), ((1, 1), (1, 1))),
    ((1, 1, 3, 4), (1, 1), (1, 1), ((0, 0), (0, 0))),
    ((1, 1, 3, 4), (5, 4), (2, 2), ((0, 0), (0, 0))),
    ((1, 3, 2, 2), (6, 5), (1, 1), ((0, 0), (1, 1))),
    ((3, 1, 2, 2), (6, 5), (1, 2), ((1, 1), (0, 0))),
    ((2, 2, 2, 2), (5, 6), (1, 1), ((0, 1), (1, 0))),
    ((4, 4, 2, 3), (8, 8), (2, 2), ((1, 1), (1, 1))),
    ((4, 4, 3, 2), (8, 8), (4, 4), ((0, 0), (0, 0))),
    ((5, 5, 2, 3), (9, 8), (2, 2), ((2, 2), (2, 2))),
    ((3, 3, 1, 5), (7, 8), (3, 3), ((0, 2), (2, 0))),
    ((3, 3, 2, 2), (7, 7), (4, 4), ((1, 1), (3, 0))),
    ((2, 2, 2, 2), (7, 7), (3, 4), ((0, 0), (0, 0))),
    ((7, 7, 1, 2), (3, 4), (1, 1), ((3, 3), (3, 3))),
    ((7, 7, 2, 1), (3, 3), (2, 2), ((4, 5), (5, 4))),
    ((3, 3, 2, 2), (1, 1), (1, 1), ((1, 1), (1, 1))),
    ((3, 3, 2, 2), (2, 3), (1, 1), ((4, 3), (3, 4))),
    ((1, 1, 2, 2), (3, 3), (1, 1), ((2, 2), (2, 2))),
    ((3, 3, 3, 2), (6, 5), (1, 1), "CIRCULAR"),
    ((2, 4, 2, 3), (6, 4), (2, 2), "CIRCULAR"),
    ((3, 3, 2, 2), (6, 8), (3, 4), "CIRCULAR"),
    ((5, 6, 2, 2), (2, 4), (1, 2), "CIRCULAR"),
    ((3, 3, 2, 2), (1, 1), (1, 1), "CIRCULAR"),
    ((4, 4, 2, 1), (1, 3), (1, 3), "CIRCULAR"),
]


def hostile_kernel(kind, shape):
    rng = np.random.default_rng(11)
    kernel = rng.normal(size=shape)
    if kind == "ones":
        return np.ones(shape)
    if kind == "rank one":
        return np.einsum("a,b,c,d->abcd", *(rng.normal(size=n) for n in shape))
    if kind == "near identity":
        kernel *= 1e-3
        for channel in range(min(shape[2:])):
            kernel[(shape[0] - 1) // 2, (shape[1] - 1) // 2, channel, channel] += 1
    if kind == "alternating":
        return np.ones(shape) * (-1.0) ** np.add.outer(np.arange(shape[0]), np.arange(shape[1]))[..., None, None]
    return kernel


def is_single_tap(shape, strides, padding):
    return padding == ((0, 0), (0, 0)) and shape[0] <= strides[0] and shape[1] <= strides[1]


@pytest.mark.parametrize("kind", ["random", "ones", "rank one", "near identity", "alternating"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_conv_bound_against_dense_svd(geometry, kind, monkeypatch):
    shape, size, strides, padding = geometry
    kernel = hostile_kernel(kind, shape)
    norm, error = svd_norm(dense_matrix(kernel, size, strides, padding))
    arguments = (kernel, (*size, shape[2]), strides, padding)
    tight = spectral.conv_norm_bound(*arguments).proved
    # Wrapped taps may cancel: rounding is relative to the sum of the taps' norms, not to the norm of their sum.
    total = np.linalg.norm(kernel, axis=(2, 3)).sum()
    assert norm - error <= tight <= math.sqrt(norm**2 * (1 + 1e-11) + 1e-13 * total**2)
    monkeypatch.setattr(norms, "_DENSE_SIDE", 0)
    embedded = spectral.conv_norm_bound(*arguments)
    assert norm - error <= embedded.proved
    # No embedding exceeds the triangle inequality over taps; circulants are exact.
    assert embedded.proved <= total * (1 + 1e-9)
    if padding == "CIRCULAR":
        assert embedded.proved == tight


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e150])
@pytest.mark.parametrize("padding", [((1, 1), (1, 1)), "CIRCULAR"])
def test_conv_bound_scales(scale, padding, monkeypatch):
    kernel = np.random.default_rng(12).normal(size=(3, 3, 2, 2))
    norm, error = svd_norm(dense_matrix(kernel, (5, 5), (1, 1), padding))
    for side in (4096, 0):
        monkeypatch.setattr(norms, "_DENSE_SIDE", side)
        value, plain = (spectral.conv_norm_bound(kernel * s, (5, 5, 2), 1, padding).proved for s in (scale, 1.0))
        assert norm * (1 - 1e-15) - error <= value / scale
        assert value / scale == pytest.approx(plain, rel=1e-11)


def test_idle_taps_do_not_hide_the_others():
    # On one pixel only the centre acts. Scaled together with its neighbours it would underflow, and the bound be 0.
    kernel = np.full((3, 3, 1, 1), 1e300)
    kernel[1, 1] = 1e-300
    bound = spectral.conv_norm_bound(kernel, (1, 1, 1), 1, ((1, 1), (1, 1))).proved
    assert 1e-300 <= bound <= 1e-300 * (1 + 1e-12)


def test_every_grid_and_twist_holds_and_grids_below_the_least_do_not():
    # [1, 0, -1] on two pixels swaps them up to a sign: norm 1. On the unpadded grid n = 2 its symbol vanishes.
    kernel = np.array([1.0, 0.0, -1.0]).reshape(1, 3, 1, 1)
    axes = norms._axes(kernel, (1, 2, 1), 1, ((0, 0), (1, 1)))
    polynomial = symbol.GramPolynomial(symbol.polyphase(kernel, axes))
    assert (axes[0].least_grid(), axes[1].least_grid()) == (1, 3)

    def symbol_bound(n, twist):
        family = polynomial.family((1, n), (0, twist))
        return math.sqrt(verified.largest_eigenvalue_bound(family, np.arange(family.count))[0])

    assert svd_norm(dense_matrix(kernel, (1, 2), (1, 1), ((0, 0), (1, 1))))[0] == pytest.approx(1)
    assert all(symbol_bound(n, twist) >= 1 for n in range(3, 9) for twist in (0, 1))
    assert symbol_bound(2, 0) < 1e-3  # the control
    # A twist suits zero padding only: the circular mean of ones has norm 1, which no twisted grid meets.
    mean = symbol.GramPolynomial(np.full((1, 4, 1, 1), 0.25)).family((1, 4), (0, 1))
    assert verified.largest_eigenvalue_bound(mean, np.arange(mean.count))[0] < 0.7**2


def test_twist_makes_a_smoothing_kernel_tight():
    # The tridiagonal matrix of ones has norm 1 + 2 cos(pi / (h + 1)): the twisted grid n = h + 1 meets that frequency.
    kernel, h = np.ones((3, 1, 1, 1)), 5000
    bound = spectral.conv_norm_bound(kernel, (h, 1, 1), 1, ((1, 1), (0, 0)))
    truth = 1 + 2 * math.cos(math.pi / (h + 1))
    assert truth * (1 - 1e-15) <= bound.proved <= truth * (1 + 1e-12)
    assert bound.details["twist"] == [1, 0]
    assert truth * (1 + 1e-12) < 3  # what the untwisted grid gives


def test_dense_gram_error_covers_the_exact_matrix():
    kernel, _ = verified.scale_to_unit(np.random.default_rng(14).normal(size=(3, 3, 2, 3)))
    padding = ((1, 1), (0, 2))
    gram, error = symbol.dense_gram(kernel, norms._axes(kernel, (4, 5, 2), (2, 1), padding))
    matrix = dense_matrix(kernel, (4, 5), (2, 1), padding)
    exact = [[sum(Fraction(x) * Fraction(y) for x, y in zip(a, b, strict=True)) for b in matrix.T] for a in matrix.T]
    differences = [Fraction(x) - y for a, b in zip(gram, exact, strict=True) for x, y in zip(a, b, strict=True)]
    assert 0 < math.sqrt(sum(d**2 for d in differences)) <= float(error)


def test_response_bound_against_the_spatial_operator():
    rng = np.random.default_rng(16)
    for h, w, o, i in [(4, 4, 2, 3), (5, 3, 3, 2), (4, 5, 2, 2), (3, 6, 1, 4), (1, 1, 2, 2), (2, 1, 1, 1)]:
        # Not Hermitian in the self-conjugate columns, so that the projection matters.
        response = rng.normal(size=(h, w // 2 + 1, o, i)) + 1j * rng.normal(size=(h, w // 2 + 1, o, i))
        columns = []
        for index in range(h * w * i):
            x = np.zeros(h * w * i)
            x[index] = 1
            transformed = np.fft.rfft2(x.reshape(h, w, i), axes=(0, 1))
            y = np.einsum("fgoi,fgi->fgo", response, transformed)
            full = np.fft.ifft(y, axis=0)  # irfft along the last axis drops the imaginary part: the projection
            columns.append(np.fft.irfft(full, n=w, axis=1).reshape(-1))
        norm, error = svd_norm(np.array(columns).T)
        bound = spectral.response_norm_bound(response, (h, w)).proved
        assert norm - error - 1e-14 <= bound <= norm * (1 + 1e-11)
        unprojected = max(np.linalg.norm(r, 2) for row in response for r in row)
        assert bound <= unprojected * (1 + 1e-11)
    with pytest.raises(ValueError, match="w // 2"):
        spectral.response_norm_bound(np.ones((4, 4, 1, 1), complex), (4, 4))
    assert spectral.response_norm_bound(np.zeros((4, 3, 1, 1), complex), (4, 4)).proved == 0.0


def test_norm_bound_and_estimate_dispatch():
    operator = types.SimpleNamespace(
        bound=lambda: spectral.NormBound(2.5, "test", {}), estimate=lambda v, num_iters: (num_iters * v.sum(), v)
    )
    assert spectral.norm_bound(operator) == 2.5
    sigma, v = spectral.norm_estimate(operator, jnp.ones(2), 7)
    assert sigma == 14 and v.shape == (2,)
    with pytest.raises(NotCertifiable, match="SimpleNamespace has no bound"):
        spectral.norm_bound(types.SimpleNamespace())


def test_conjugate_directions_converge_where_a_power_iteration_has_not():
    values = jnp.linspace(0.5, 1.0, 300)  # close to each other
    rng = np.random.default_rng(0)
    start = jnp.asarray(rng.normal(size=300))

    def apply(v):
        return values * v

    found = jax.jit(lambda v: spectral.largest_vector(apply, apply, v))(start)
    assert jnp.linalg.norm(found) == pytest.approx(1.0, abs=1e-12)
    assert 1 - 1e-5 < jnp.linalg.norm(apply(found)) <= 1 + 1e-12
    sigma, _ = spectral.power_iteration(apply, apply, start, 200)
    assert sigma < 1 - 1e-4  # the control: more steps than those took
    kept = spectral.largest_vector(jnp.zeros_like, jnp.zeros_like, start)
    np.testing.assert_allclose(kept, start / jnp.linalg.norm(start), rtol=1e-12)
