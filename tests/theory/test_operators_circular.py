"""Circular convolutions by frequency: against direct sums, dense norms and 40-digit arithmetic."""

import dataclasses
import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from tiers import everyday

from lipjax import _dft, conv, spectral
from lipjax.errors import NotCertifiable
from lipjax.operators.circular import CircularConv, CircularSeries

pytestmark = pytest.mark.usefixtures("one_blas_thread")

SIZES = [(1, 1), (2, 2), (1, 6), (3, 4), (4, 5), (8, 9), (10, 8)]


def normal(shape, seed=0, scale=1.0):
    return np.random.default_rng(seed).normal(size=shape) * scale


def random_blocks(size, channels=(3, 2), seed=0, scale=1.0):
    """Blocks of no small kernel: (fixed, paired), o x i."""
    grid, (i, o) = _dft.grid(size), channels
    return (
        normal((len(grid.fixed), o, i), seed, scale),
        normal((len(grid.paired), 2, o, i), seed + 1, scale),
    )


def orthogonal_blocks(size, m, rows=None, columns=None, seed=0):
    """Unitary m x m blocks up to rounding, cut to rows x columns."""
    grid, rng = _dft.grid(size), np.random.default_rng(seed)
    fixed = np.linalg.qr(rng.normal(size=(len(grid.fixed), m, m)))[0]
    shape = (len(grid.paired), m, m)
    unitary = (
        np.linalg.qr(rng.normal(size=shape) + 1j * rng.normal(size=shape))[0]
        if len(grid.paired)
        else 0j * np.ones(shape)
    )
    paired = np.stack([unitary.real, unitary.imag], 1)
    return fixed[:, :rows, :columns], paired[:, :, :rows, :columns]


def direct(x, kernel):
    """sum_t K[t]^T x[p + t - lo] with indices wrapped, term by term."""
    k1, k2 = kernel.shape[:2]
    lows = (k1 - 1) // 2, (k2 - 1) // 2
    return sum(np.roll(x, (lows[0] - a, lows[1] - b), axis=(1, 2)) @ kernel[a, b] for a, b in np.ndindex(k1, k2))


def to_matrix(op):
    size = int(np.prod(op.in_shape))
    return np.asarray(jax.jit(op)(jnp.eye(size).reshape(size, *op.in_shape))).reshape(size, -1).T


@pytest.mark.quick_compiles
@pytest.mark.parametrize("size", SIZES)
def test_every_form_is_the_wrapped_convolution(size):
    kernel, x = normal((3, 5, 3, 2)), normal((2, *size, 3), 1)
    expected = direct(x, kernel)
    assert np.abs(expected).max() > 1

    @jax.jit
    def forms(kernel, x):
        response = conv.frequency_response(kernel, size)
        op = CircularConv.from_blocks(*conv.packed_response(kernel, size), (*size, 3))
        of_response = CircularConv(response, (*size, 3))
        adjoint = op.adjoint(jnp.asarray(expected))
        return (op(x), of_response(x), conv.apply_response(response, x)), response, op, adjoint

    images, response, op, adjoint = forms(jnp.asarray(kernel), jnp.asarray(x))
    for y in images:
        np.testing.assert_allclose(np.asarray(y), expected, atol=1e-12)
    assert response.shape == (size[0], size[1] // 2 + 1, 2, 3)
    np.testing.assert_allclose(np.asarray(jax.tree.map(np.asarray, op).response), np.asarray(response), atol=1e-13)
    assert op.out_shape == (*size, 2) and op.in_shape == (*size, 3)
    np.testing.assert_allclose(np.sum(np.asarray(adjoint) * x), np.sum(expected**2), rtol=1e-12)


@pytest.mark.parametrize("size", [(4, 4), (3, 5), (2, 2)])
def test_a_response_that_is_not_hermitian_acts_as_the_inverse_transform_to_real_images_does(size):
    h, w = size
    response = normal((h, w // 2 + 1, 2, 3)) + 1j * normal((h, w // 2 + 1, 2, 3), 1)
    x = normal((2, h, w, 3), 2)
    y = np.einsum("fgoi,bfgi->bfgo", response, np.fft.rfft2(x, axes=(1, 2)))
    expected = np.fft.irfft(np.fft.ifft(y, axis=1), n=w, axis=2)  # drops what no real image has
    op = CircularConv(response, (h, w, 3))
    assert isinstance(op.fixed, np.ndarray) and isinstance(op.paired, np.ndarray)
    np.testing.assert_allclose(np.asarray(op(jnp.asarray(x))), expected, atol=1e-13)
    again = CircularConv(op.response, (h, w, 3))
    np.testing.assert_allclose(again.fixed, op.fixed, atol=1e-15)
    np.testing.assert_allclose(again.paired, op.paired, atol=1e-15)


def test_shapes_that_do_not_fit_are_refused():
    fixed, paired = random_blocks((4, 4))
    op = CircularConv.from_blocks(fixed, paired, (4, 4, 3))
    with pytest.raises(ValueError, match="expects a batch"):
        op(jnp.zeros((2, 4, 5, 3)))
    for wrong in ((fixed[:3], paired), (fixed, paired[:5]), (fixed[:, :1], paired), (fixed[0], paired)):
        with pytest.raises(ValueError, match=r"Expected blocks fixed \(4, o, 3\) and paired \(6, 2, o, 3\)"):
            CircularConv.from_blocks(*wrong, (4, 4, 3))
        with pytest.raises(ValueError, match="Expected blocks"):
            jax.tree.unflatten(jax.tree.structure(op), wrong).check()
    with pytest.raises(ValueError, match="in_shape"):
        CircularConv.from_blocks(fixed, paired, (4, 4))
    for shape in ((4, 4, 2, 3), (4, 3, 2, 2), (4, 3, 2)):
        with pytest.raises(ValueError, match="Expected"):
            CircularConv(np.zeros(shape, complex), (4, 4, 3))
    with pytest.raises(ValueError, match="Expected a response"):
        conv.apply_response(jnp.zeros((4, 4, 2, 3), complex), jnp.zeros((1, 4, 4, 3)))


def test_it_is_a_pytree_whose_leaves_may_be_anything_and_rebuilds_from_its_fields():
    op = CircularConv.from_blocks(*random_blocks((3, 4)), (3, 4, 3), nonexpansive=True)
    leaves, tree = jax.tree.flatten(op)
    assert [leaf.shape for leaf in leaves] == [op.fixed.shape, op.paired.shape]
    odd = jax.tree.unflatten(tree, ["a", None])
    assert odd.fixed == "a" and odd.in_shape == (3, 4, 3) and odd.nonexpansive
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(op)]
    assert paths == [".fixed", ".paired"]
    names = [field.name for field in dataclasses.fields(op)]
    assert names == ["fixed", "paired", "in_shape", "nonexpansive"]
    again = CircularConv.rebuild(**{name: getattr(op, name) for name in names})
    assert again.fixed is op.fixed and again.paired is op.paired
    assert jax.tree.structure(again) == tree
    with pytest.raises(dataclasses.FrozenInstanceError):
        op.fixed = None
    doubled = jax.jit(lambda o: jax.tree.map(lambda a: 2 * a, o))(op)
    x = jnp.asarray(normal((2, 3, 4, 3), 5))
    np.testing.assert_allclose(np.asarray(doubled(x)), 2 * np.asarray(op(x)), rtol=1e-13)


@pytest.mark.parametrize("size", SIZES)
def test_bound_against_the_dense_operator(size):
    op = CircularConv.from_blocks(*random_blocks(size), (*size, 3))
    norm = np.linalg.norm(to_matrix(op), 2)
    bound = op.bound()
    assert norm * (1 - 1e-12) <= bound.proved <= norm * (1 + 1e-9)
    assert bound.details["count"] == len(op.fixed) + len(op.paired) and "Cholesky" in bound.method
    half_grid = spectral.response_norm_bound(np.asarray(op.response), size).proved
    np.testing.assert_allclose(half_grid, bound.proved, rtol=1e-9)


def test_an_estimate_approaches_the_bound_from_below(key):
    op = CircularConv.from_blocks(*random_blocks((3, 4)), (3, 4, 3))
    v = jax.random.normal(key, op.in_shape)
    many, few = (float(jax.jit(lambda o, v, n=n: o.estimate(v, n))(op, v)[0]) for n in (300, 0))
    assert few < 0.95 * op.bound().proved and 0.99 * op.bound().proved < many <= op.bound().proved


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1.0, 1e150])
@pytest.mark.parametrize("kind", ["random", "ones", "orthogonal", "one large"])
def test_bound_of_hostile_blocks(kind, scale):
    fixed, paired = random_blocks((3, 4)) if kind != "orthogonal" else orthogonal_blocks((3, 4), 3, rows=2)
    if kind == "ones":
        fixed, paired = np.ones_like(fixed), np.ones_like(paired)
    elif kind == "one large":
        paired[-1] *= 1e9
    norms = [np.linalg.norm(b, 2) for b in fixed] + [np.linalg.norm(b[0] + 1j * b[1], 2) for b in paired]
    op = CircularConv.from_blocks(fixed * scale, paired * scale, (3, 4, 3))
    assert max(norms) * scale * (1 - 1e-14) <= op.bound().proved <= max(norms) * scale * (1 + 1e-9)


def test_bound_of_orthogonal_blocks_is_one_up_to_rounding_and_never_below_the_norm():
    for size, m, rows, columns in [((4, 4), 64, None, None), ((4, 4), 64, 32, None), ((2, 2), 300, None, 200)]:
        fixed, paired = orthogonal_blocks(size, m, rows, columns)
        op = CircularConv.from_blocks(fixed, paired, (*size, columns or m))
        bound = op.bound()
        assert "identity" in bound.method and 1 < bound.proved < 1 + 2e-11
        # Controls: a block a little longer must show, however little that is, and in whichever place.
        for longer in (2.0**-45, 2.0**-36, 2.0**-20):
            for place in (0, -1):
                stretched = fixed.copy()
                stretched[place] *= 1 + longer
                found = CircularConv.from_blocks(stretched, paired, op.in_shape).bound()
                assert 1 + longer * (1 - 1e-2) < found.proved < 1 + longer + 1e-9
                assert ("identity" in found.method) == (longer < 2.0**-30)


def test_bound_holds_exactly_where_the_norm_is_known_exactly():
    for excess in (0, 2.0**-52, 2.0**-40, 2.0**-31, 2.0**-10):
        fixed = np.zeros((1, 3, 3)) + np.diag([1 + excess, 1, 1])
        bound = CircularConv.from_blocks(fixed, np.zeros((0, 2, 3, 3)), (1, 1, 3)).bound().proved
        assert Fraction(bound) >= Fraction(1 + excess) and bound <= (1 + excess) * (1 + 1e-9)


def test_a_circular_shift_is_bounded_by_one_and_zero_by_zero():
    kernel = jnp.zeros((3, 3, 2, 2)).at[0, 2].set(jnp.eye(2))
    op = CircularConv(np.asarray(conv.frequency_response(kernel, (5, 6))), (5, 6, 2))
    assert 1 <= op.bound().proved < 1 + 1e-13
    zero = jax.tree.map(np.zeros_like, op)
    assert zero.bound().proved == 0.0
    with pytest.raises(NotCertifiable, match="NaN or infinite"):
        jax.tree.map(lambda a: np.full_like(a, np.nan), op).bound()


@pytest.mark.parametrize("promise", [False, True])
def test_the_promise_of_the_parametrisation_proves_nothing(promise):
    fixed, paired = random_blocks((3, 3), scale=5.0)
    values = [
        CircularConv.from_blocks(fixed, paired, (3, 3, 3), nonexpansive=p).bound().proved for p in (promise, False)
    ]
    assert values[0] == values[1] > 2


def exact_map(fixed, paired, size, x):
    """The operator at 40 digits, by complex Fourier sums over all frequencies: x (h, w, i) -> (h w o) of mpf."""
    (h, w), grid, n = size, _dft.grid(size), size[0] * size[1]
    roots = [mpmath.expjpi(mpmath.mpf(2 * a) / n) for a in range(n)]
    pixels = list(np.ndindex(h, w))
    values = np.array([[mpmath.mpf(float(v)) for v in x[p]] for p in pixels], dtype=object)
    total = np.full((n, fixed.shape[1]), mpmath.mpf(0), dtype=object)
    # Real frequencies once; of the pairs +-f twice the real part.
    blocks = [(f, block, 0 * block, 1) for f, block in zip(grid.fixed.tolist(), fixed, strict=True)]
    blocks += [(f, block[0], block[1], 2) for f, block in zip(grid.paired.tolist(), paired, strict=True)]
    to_mp = np.vectorize(lambda v: mpmath.mpf(float(v)), otypes=[object])
    for f, real, imaginary, weight in blocks:
        waves = np.array([roots[(f[0] * p * w + f[1] * q * h) % n] for p, q in pixels], dtype=object)
        conjugate = np.array([mpmath.conj(v) for v in waves], dtype=object)
        y = (to_mp(real) + mpmath.mpc(0, 1) * to_mp(imaginary)) @ (conjugate @ values)
        product = waves[:, None] * y[None]
        total += np.array([[weight * v.real for v in row] for row in product], dtype=object)
    return (total / n).reshape(-1)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 7), (3, 4), (8, 9), (9, 8)])
def test_rounding_error_covers_the_distance_to_exact_arithmetic(size):
    fixed, paired = random_blocks(size, seed=3)
    rng = np.random.default_rng(4)
    # Blocks and images of many magnitudes: few terms dominate, and others cancel.
    paired = paired * 10.0 ** rng.integers(-6, 1, paired.shape)
    op = CircularConv.from_blocks(jnp.asarray(fixed), jnp.asarray(paired), (*size, 3))
    x = rng.normal(size=(2, *size, 3))
    x[1] *= 10.0 ** rng.integers(-8, 8, x[1].shape)
    computed = np.asarray(jax.jit(op)(jnp.asarray(x))).reshape(2, -1)
    claimed = np.asarray(jax.jit(op.rounding_error)(x))
    ratios = []
    with mpmath.workdps(40):
        for row, got, limit in zip(x, computed, claimed, strict=True):
            difference = exact_map(fixed, paired, size, row) - np.array(
                [mpmath.mpf(float(v)) for v in got], dtype=object
            )
            ratios.append(float(mpmath.sqrt(difference @ difference) / mpmath.mpf(float(limit))))
    assert max(ratios) <= 1
    assert max(ratios) > 1e-4  # control: rounding happens, and the bound is not vacuous


def test_rounding_error_is_small_at_the_sizes_of_networks():
    for size, m in [((32, 32), 32), ((8, 8), 256)]:
        grid = _dft.grid(size)
        fixed = np.broadcast_to(np.eye(m), (len(grid.fixed), m, m))
        paired = np.zeros((len(grid.paired), 2, m, m))
        paired[:, 0] = np.eye(m)
        op = CircularConv.from_blocks(jnp.asarray(fixed), jnp.asarray(paired), (*size, m))
        x = jnp.asarray(normal((2, *size, m)))
        relative = np.asarray(op.rounding_error(x)) / np.linalg.norm(np.asarray(x).reshape(2, -1), axis=1)
        assert (0 < relative).all() and (relative < 1e-11).all()


def skew_blocks(size, m, seed=0):
    kernel = conv.skew_kernel(jnp.asarray(normal((3, 3, m, m), seed, 0.3)))
    return kernel, conv.packed_response(kernel, size)


@pytest.mark.quick_compiles
@pytest.mark.parametrize(
    ("channels", "out", "num_terms"),
    everyday(
        ((i, o, n) for (i, o), n in itertools.product([(4, 4), (3, 4), (4, 2), (2, 3)], [1, 2, 5])),
        *[(4, 4, 1), (2, 3, 5)],
    ),
)
def test_series_is_the_truncated_exponential_of_the_padded_convolution(channels, out, num_terms):
    size, m = (4, 3), 4
    kernel, blocks = skew_blocks(size, m)
    op = CircularSeries(*blocks, (*size, channels), out, num_terms)
    op.check()
    x = jnp.asarray(normal((2, *size, channels), 1))
    padded = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, m - channels)))
    expected = conv.series_exponential(padded, kernel, num_terms=num_terms, padding="CIRCULAR")[..., :out]
    np.testing.assert_allclose(np.asarray(op(x)), np.asarray(expected), atol=1e-12)
    assert op.out_shape == (*size, out)
    y = jnp.asarray(normal((2, *size, out), 2))
    np.testing.assert_allclose(float(jnp.sum(op(x) * y)), float(jnp.sum(x * op.adjoint(y))), rtol=1e-11)


def test_series_has_no_bound_and_refuses_what_does_not_fit():
    _, (fixed, paired) = skew_blocks((4, 3), 4)
    op = CircularSeries(fixed, paired, (4, 3, 4), 4, 5)
    with pytest.raises(NotCertifiable, match="CircularSeries has no bound"):
        spectral.norm_bound(op)
    with pytest.raises(ValueError, match="num_terms >= 1"):
        dataclasses.replace(op, num_terms=0)
    for wrong in ({"out_channels": 5}, {"in_shape": (4, 3, 5)}, {"in_shape": (4, 4, 4)}, {"fixed": fixed[:, :3]}):
        with pytest.raises(ValueError, match="Expected"):
            dataclasses.replace(op, **wrong).check()
    leaves, tree = jax.tree.flatten(op)
    assert len(leaves) == 2 and jax.tree.unflatten(tree, leaves).num_terms == 5


@pytest.mark.quick_compiles
@pytest.mark.parametrize("precision", everyday(["x64", "x32"], "x32"), indirect=True)
def test_both_run_in_either_precision_under_jit_grad_and_vmap(precision):
    dtype = jnp.float64 if precision == "x64" else jnp.float32
    kernel = conv.skew_kernel(jnp.asarray(normal((3, 3, 4, 4), 0, 0.3), dtype))
    x = jnp.asarray(normal((2, 4, 4, 4), 1), dtype)

    def loss(kernel, x, series):
        blocks = conv.packed_response(kernel, (4, 4))
        op = CircularSeries(*blocks, (4, 4, 4), 4, 5) if series else CircularConv.from_blocks(*blocks, (4, 4, 4))
        return jnp.sum(jnp.sin(op(x)))

    def spatial(kernel, x, series):
        if series:
            return jnp.sum(jnp.sin(conv.series_exponential(x, kernel, num_terms=5, padding="CIRCULAR")))
        return jnp.sum(jnp.sin(conv.conv2d(x, kernel, padding="CIRCULAR")))

    @jax.jit
    def everything(kernel, x):
        found = []
        for series in (True, False):
            gradients = [jax.grad(f, (0, 1))(kernel, x, series) for f in (loss, spatial)]
            each = jax.vmap(lambda k, series=series: loss(k, x, series))(jnp.stack([kernel, 2 * kernel]))
            found.append((gradients, each[1], loss(2 * kernel, x, series)))
        return found

    tolerance = 1e-12 if precision == "x64" else 1e-4
    for (got, expected), batched, single in everything(kernel, x):
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == dtype and float(jnp.abs(a - b).max()) < tolerance * float(jnp.abs(b).max() + 1)
        np.testing.assert_allclose(float(batched), float(single), rtol=tolerance)
    if precision == "x32":
        response = conv.frequency_response(kernel, (4, 4))
        assert response.dtype == jnp.complex64 and CircularConv(response, (4, 4, 4)).paired.dtype == jnp.float32
