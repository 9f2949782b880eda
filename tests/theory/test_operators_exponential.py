"""ConvExponential: spectrum and bound against dense matrices, rounding against exact fractions, hostile kernels."""

import dataclasses
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import everyday

from lipjax import conv
from lipjax.errors import NotCertifiable
from lipjax.operators.exponential import ConvExponential

GEOMETRIES = [  # size, kernel, padding
    ((5, 5), (3, 3), "ZERO"),
    ((5, 5), (3, 3), "CIRCULAR"),
    ((4, 6), (5, 3), "ZERO"),
    ((4, 5), (1, 3), "CIRCULAR"),
    ((3, 3), (1, 1), "ZERO"),
    ((1, 1), (3, 3), "ZERO"),
    ((1, 1), (3, 3), "CIRCULAR"),
    ((2, 2), (3, 3), "CIRCULAR"),
    ((2, 3), (5, 7), "CIRCULAR"),
    ((2, 3), (5, 7), "ZERO"),
]
SINGLE = [(geometry,) for geometry in GEOMETRIES]


def make(size, kernel, padding="ZERO", *, channels=2, num_terms=12, norm=2.0, seed=0, **options):
    """A random operator whose kernel, as (kh kw i, o), has the given norm over sqrt(kh kw)."""
    raw = np.random.default_rng(seed).normal(size=(*kernel, channels, channels))
    skew = np.asarray(conv.skew_kernel(jnp.asarray(raw)))
    skew = skew * (norm / math.sqrt(math.prod(kernel)) / np.linalg.norm(skew.reshape(-1, channels), 2))
    return ConvExponential(jnp.asarray(skew), (*size, channels), num_terms, padding, **options)


def dense(function, shape):
    """The matrix of a linear map of images, by applying it to the identity."""
    size = math.prod(shape)
    return np.asarray(jax.jit(lambda x: function(x))(np.eye(size).reshape(size, *shape))).reshape(size, -1).T


def generator(op, exact=False):
    """The matrix J of the convolution: J[(p, o), (q, i)] sums the taps that lead from q to p. exact: of fractions."""
    h, w, c = op.in_shape
    kernel = np.asarray(op.kernel)
    if exact:
        kernel = np.vectorize(Fraction, otypes=[object])(kernel)
    kh, kw = kernel.shape[:2]
    matrix = np.zeros((h, w, c, h, w, c), kernel.dtype)
    for i, j, a, b in np.ndindex(h, w, kh, kw):
        row, column = i + a - kh // 2, j + b - kw // 2
        if op.padding == "CIRCULAR":
            row, column = row % h, column % w
        if 0 <= row < h and 0 <= column < w:
            matrix[i, j, :, row, column, :] += kernel[a, b].T
    return matrix.reshape(h * w * c, h * w * c)


def series(matrix, num_terms):
    term = total = np.eye(len(matrix))
    for k in range(1, num_terms + 1):
        term = term @ matrix / k
        total = total + term
    return total


@pytest.mark.parametrize("num_terms", [5, 12])
@pytest.mark.parametrize(("geometry",), everyday(SINGLE, *SINGLE[:3], *SINGLE[-2:]), ids=str)
def test_spectrum_and_bound_against_dense_matrices(geometry, num_terms):
    op = make(*geometry, num_terms=num_terms)
    skew = generator(op)
    np.testing.assert_allclose(skew, -skew.T, atol=1e-15)  # exactly, but for the order of wrapped sums
    matrix = dense(op, op.in_shape)
    np.testing.assert_allclose(matrix, series(skew, num_terms), atol=1e-13)
    thetas = np.linalg.eigvalsh(1j * skew)
    moduli = np.abs(sum((1j * thetas) ** k / math.factorial(k) for k in range(num_terms + 1)))
    values = np.linalg.svd(matrix, compute_uv=False)
    np.testing.assert_allclose(values, np.sort(moduli)[::-1], atol=1e-13)
    found = op.bound()
    norm = np.abs(thetas).max()
    # The kernel has norm 2 / sqrt(kh kw) as a matrix: that bounds J, and nothing more was needed for p = 12.
    assert norm * (1 - 1e-13) <= found.details["skew_norm"] <= 2 * (1 + 1e-9)
    assert values[0] * (1 - 1e-13) <= found.proved
    if num_terms == 5:
        # J's own norm was bounded too, so that only its embedding is lost: the modulus at the true norm is close.
        assert found.proved <= 1.0048 and found.details["skew_norm"] <= norm * 1.5 + 1e-12
    else:
        assert found.proved == 1.0


@pytest.mark.quick_compiles
@pytest.mark.parametrize(
    ("geometry",),
    everyday([(g,) for g in GEOMETRIES[:2] + GEOMETRIES[-2:]], (GEOMETRIES[0],), (GEOMETRIES[-2],)),
    ids=str,
)
def test_adjoint_and_estimate(geometry, key):
    op = make(*geometry, num_terms=5, norm=2.5)
    matrix = dense(op, op.in_shape)
    np.testing.assert_allclose(dense(op.adjoint, op.in_shape), matrix.T, atol=1e-13)
    sigma, v = jax.jit(lambda v: op.estimate(v, 300))(jax.random.normal(key, op.in_shape))
    norm = np.linalg.norm(matrix, 2)
    # All singular values are close to 1: the iteration has reached the largest ones, not the one.
    assert norm * 0.995 < float(sigma) <= norm * (1 + 1e-13) and v.shape == op.in_shape


def constant_kernel(norm):
    """Every tap is the same skew matrix: on constant images the convolution is 9 times it."""
    return jnp.asarray(np.full((3, 3, 1, 1), norm / 9) * np.array([[0.0, 1.0], [-1.0, 0.0]]))


@pytest.mark.parametrize(("norm", "stretches"), [(3.3, False), (3.4, True), (4.0, True)])
def test_a_constant_kernel_attains_the_factor_and_the_bound(norm, stretches):
    op = ConvExponential(constant_kernel(norm), (5, 5, 2), 12, "CIRCULAR")
    reshaped = np.linalg.norm(np.asarray(op.kernel).reshape(-1, 2), 2)
    true = np.linalg.norm(generator(op), 2)
    assert true == pytest.approx(3 * reshaped, rel=1e-13) and true == pytest.approx(norm, rel=1e-13)
    found = op.bound()
    assert true <= found.details["skew_norm"] <= true * (1 + 1e-9)
    gain = np.linalg.norm(dense(op, op.in_shape), 2)
    assert gain * (1 - 1e-13) <= found.proved <= max(gain, 1.0) * (1 + 1e-8)
    assert (found.proved > 1.0) == stretches == (gain > 1 + 1e-6)


def test_each_bound_of_the_generator_serves_where_it_is_least():
    # One pixel, zero padding: only the centre acts, which the norms of the reshaped kernel do not know.
    op = make((1, 1), (3, 3), num_terms=5, norm=9.0)
    centre = np.linalg.norm(np.asarray(op.kernel)[1, 1], 2)
    assert op.bound().details["skew_norm"] == pytest.approx(centre, rel=1e-9)
    # Otherwise the two reshapes, whose order varies with the kernel, and the convolution itself, least of all.
    for kernel in ((1, 5), (3, 3)):
        op = make((8, 8), kernel, channels=4)
        array, factor = np.asarray(op.kernel), math.sqrt(math.prod(kernel))
        found = [norm for norm, *_ in op._skew_norm_bounds(array)]
        matrices = array.reshape(-1, 4), array.transpose(0, 3, 1, 2).reshape(4 * kernel[0], 4 * kernel[1])
        for norm, matrix in zip(found, matrices, strict=False):
            assert norm == pytest.approx(factor * np.linalg.norm(matrix, 2), rel=1e-9)
        assert len(found) == 3 and np.linalg.norm(generator(op), 2) <= found[2] < min(found[:2])


def test_the_four_reshaped_norms_of_a_skew_kernel_are_two():
    kernel = np.asarray(make((5, 5), (5, 3), channels=4).kernel)
    kh, kw, c, _ = kernel.shape
    norms = [
        np.linalg.norm(kernel.transpose(order).reshape(shape), 2)
        for order, shape in [
            ((3, 0, 2, 1), (c * kh, c * kw)),
            ((3, 1, 2, 0), (c * kw, c * kh)),
            ((3, 2, 0, 1), (c, -1)),
            ((3, 0, 1, 2), (-1, c)),
        ]
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-13) and norms[2] == pytest.approx(norms[3], rel=1e-13)
    assert abs(norms[0] - norms[2]) > 1e-3


def test_the_promise_does_not_reach_the_bound():
    op = make((4, 4), (3, 3), norm=15.0, nonexpansive=True)
    assert op.bound().proved == dataclasses.replace(op, nonexpansive=False).bound().proved > 1.1


@pytest.mark.parametrize("scale", [1e-200, 1e-310, 0.0])
def test_tiny_kernels(scale):
    op = make((4, 4), (3, 3), num_terms=12)
    tiny = dataclasses.replace(op, kernel=jnp.asarray(np.asarray(op.kernel) * scale))
    x = jnp.ones((1, 4, 4, 2))
    assert tiny.bound().proved == 1.0
    five = dataclasses.replace(tiny, num_terms=5).bound().proved
    assert five == (1.0 if scale == 0 else math.nextafter(1, 2))
    assert 0 < float(tiny.rounding_error(x)[0]) < 1e-12
    np.testing.assert_array_equal(np.asarray(tiny(x)), np.asarray(x))


def test_kernels_without_a_proof_are_refused():
    op = make((4, 4), (3, 3))
    kernel = np.array(op.kernel)
    for bad in (kernel * 1e200, np.full_like(kernel, np.nan)):
        with pytest.raises(NotCertifiable, match="range|NaN"):
            dataclasses.replace(op, kernel=bad).bound()
    kernel[0, 1, 1, 0] = np.nextafter(kernel[0, 1, 1, 0], 9)
    with pytest.raises(NotCertifiable, match="bit for bit skew"):
        dataclasses.replace(op, kernel=kernel).bound()
    assert op.bound().proved == 1.0  # control


def exact_series(matrix, x, num_terms):
    """S_p(J) x without any rounding, J a matrix of fractions."""
    term = total = np.vectorize(Fraction, otypes=[object])(x)
    for k in range(1, num_terms + 1):
        term = matrix @ term / k
        total = total + term
    return total


@pytest.mark.parametrize("fast_gradient", [False, True])
@pytest.mark.parametrize(
    ("size", "kernel", "padding", "num_terms", "norm"),
    [
        ((3, 3), (3, 3), "ZERO", 5, 2.1),
        ((3, 2), (3, 3), "CIRCULAR", 5, 3.0),
        ((3, 3), (1, 1), "ZERO", 12, 1.0),
        ((2, 2), (3, 5), "ZERO", 12, 9.0),
        ((3, 2), (3, 1), "ZERO", 8, 1e-3),
    ],
)
def test_rounding_error_covers_the_distance_to_exact_arithmetic(size, kernel, padding, num_terms, norm, fast_gradient):
    op = make(size, kernel, padding, num_terms=num_terms, norm=norm, fast_gradient=fast_gradient)
    rng = np.random.default_rng(5)
    x = rng.normal(size=(3, *op.in_shape)) * 10.0 ** rng.integers(-8, 8, (3, *op.in_shape))
    x[2] = rng.normal(size=op.in_shape)
    compiled = jax.jit(lambda op, x: (op(x), op.rounding_error(x)))
    computed, claimed = (np.asarray(a) for a in compiled(op, jnp.asarray(x)))
    matrix = generator(op, exact=True)
    assert (matrix == -matrix.T).all()
    distances = []
    for row, got, limit in zip(x.reshape(3, -1), computed.reshape(3, -1), claimed, strict=True):
        exact = exact_series(matrix, row, num_terms)
        distance = sum((e - Fraction(float(g))) ** 2 for e, g in zip(exact, got, strict=True))
        assert distance <= Fraction(float(limit)) ** 2
        distances.append(float(distance) ** 0.5 / limit)
    assert 0 < max(distances)  # control: rounding does happen
    # And the bound is of use: some hundred roundings, amplified by the exponentials of the norm twice at most.
    assert (claimed <= 1e-13 * math.exp(2 * norm) * np.linalg.norm(x.reshape(3, -1), axis=1)).all()


@pytest.mark.parametrize(("channels", "scale"), [(1, 1.0), (3, 1e150), (3, 1e-150), (16, 1.0)])
def test_norms_behind_the_rounding_error(channels, scale):
    op = make((4, 4), (3, 3), channels=channels)
    op = dataclasses.replace(op, kernel=op.kernel * scale)
    norm, size = (float(a) / scale for a in jax.jit(ConvExponential._norms)(op))
    matrix = generator(op) / scale
    reshaped = 3 * np.linalg.norm(np.asarray(op.kernel).reshape(-1, channels), 2) / scale
    assert np.linalg.norm(matrix, 2) <= reshaped * (1 + 1e-13) <= norm * (1 + 1e-13)
    assert norm <= reshaped * channels ** (1 / 16) * (1 + 1e-6)
    assert np.linalg.norm(np.abs(matrix), 2) <= size * (1 + 1e-13)


def test_fast_gradient_is_exact_for_images_and_approximate_for_the_kernel(key):
    op = make((4, 4), (3, 3), num_terms=5)
    fast = dataclasses.replace(op, fast_gradient=True)
    x, g = jax.random.normal(key, (2, 2, 4, 4, 2))

    def gradients(op):
        y, pullback = jax.vjp(lambda op, x: op(x), op, x)
        found, grad_x = pullback(g)
        return np.asarray(y), np.asarray(grad_x), np.asarray(found.kernel)

    (y, gx, gk), (fy, fx, fk) = gradients(op), gradients(fast)
    np.testing.assert_array_equal(y, fy)
    np.testing.assert_allclose(gx, fx, atol=1e-14)
    cosine = np.vdot(gk, fk) / np.linalg.norm(gk) / np.linalg.norm(fk)
    assert 0.98 < cosine < 1 - 1e-6
    # The estimate of the norm is differentiated exactly, whatever the operator is told.
    slopes = [jax.grad(lambda o: o.estimate(x[0], 3)[0])(o).kernel for o in (op, fast)]
    np.testing.assert_array_equal(np.asarray(slopes[0]), np.asarray(slopes[1]))


def test_a_pytree_with_static_metadata():
    op = make((4, 4), (3, 3), fast_gradient=True)
    leaves, tree = jax.tree.flatten(op)
    assert len(leaves) == 1
    doubled = jax.tree.unflatten(tree, [2 * leaves[0]])
    assert (doubled.in_shape, doubled.out_shape, doubled.num_terms) == ((4, 4, 2), (4, 4, 2), 12)
    x = jnp.ones((1, 4, 4, 2))
    np.testing.assert_allclose(jax.jit(lambda o, a: o(a))(doubled, x), doubled(x), rtol=1e-13)
    assert np.abs(np.asarray(doubled(x) - op(x))).max() > 1e-3


def test_misuse_says_what_was_expected():
    kernel = jnp.zeros((3, 3, 2, 2))
    with pytest.raises(ValueError, match="num_terms in 1 ... 64"):
        ConvExponential(kernel, (4, 4, 2), 0)
    with pytest.raises(ValueError, match="'CIRCULAR'"):
        ConvExponential(kernel, (4, 4, 2), 5, "VALID")
    with pytest.raises(ValueError, match="expects a batch"):
        ConvExponential(kernel, (4, 4, 2), 5)(jnp.zeros((1, 4, 5, 2)))
    for shape, in_shape in [
        ((3, 3, 2, 3), (4, 4, 2)),
        ((2, 2, 2, 2), (4, 4, 2)),
        ((3, 3, 2, 2), (4, 4, 3)),
        ((3, 3, 2, 2), (8,)),
        ((2, 2), (4, 4, 2)),
        ((), (4, 4, 2)),
    ]:
        with pytest.raises(ValueError, match="odd sides"):
            ConvExponential(jnp.zeros(shape), in_shape, 5).check()
    assert ConvExponential(kernel, (4, 4, 2), 5).check() is None


@pytest.mark.x64_off
def test_single_precision(key):
    op = make((4, 4), (3, 3), num_terms=5, fast_gradient=True)
    x = jax.random.normal(key, (2, 4, 4, 2))
    loss, (grad, slope) = jax.jit(jax.value_and_grad(lambda o, x: jnp.sum(o(x) ** 2), (0, 1)))(op, x)
    assert {a.dtype for a in (loss, grad.kernel, slope)} == {jnp.dtype("float32")}
    # Nearly orthogonal: |S_5(i theta)| is within 5 % of 1 up to 2.
    assert float(loss) == pytest.approx(float(jnp.sum(x**2)), rel=0.1)
    assert np.isfinite(np.asarray(grad.kernel)).all()
