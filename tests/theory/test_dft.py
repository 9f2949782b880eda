"""The real discrete Fourier transform by matrices: against NumPy's FFT, and its error against 40-digit arithmetic."""

import decimal
import itertools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from tiers import everyday

from lipjax import _dft

# One product with the whole matrix, products in turn (even widths), and special columns apart (odd widths, 1 x n).
DENSE = [(1, 1), (2, 2), (1, 5), (3, 4), (4, 3), (8, 8)]
STAGED = [(9, 8), (10, 10)]
APART = [(8, 9), (66, 1), (1, 66), (1, 67)]
SIZES = DENSE + STAGED + APART


def random(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def exact_rows(size):
    """The rows of the transform at 40 digits, from the definition: (h w, h w) of mpf, in the order of `_dft.grid`."""
    (h, w), grid = size, _dft.grid(size)
    rows = []
    with mpmath.workdps(40):

        def row(f, wave, squared):
            scale = mpmath.sqrt(mpmath.mpf(squared) / (h * w))
            angles = [2 * mpmath.mpf((f[0] * p * w + f[1] * q * h) % (h * w)) / (h * w) for p, q in np.ndindex(h, w)]
            return [scale * wave(angle) for angle in angles]

        rows += [row(f.tolist(), mpmath.cospi, 1) for f in grid.fixed]
        for f in grid.paired.tolist():
            rows += [row(f, mpmath.cospi, 2), [-v for v in row(f, mpmath.sinpi, 2)]]
        return np.array(rows, dtype=object)


def test_the_sizes_reach_every_way_of_computing():
    assert {len(_dft._tables(size)) for size in DENSE} == {1}
    assert {len(_dft._tables(size)) for size in STAGED} == {2}
    assert [len(_dft._tables(size)) for size in APART] == [3, 3, 2, 3]


@pytest.mark.parametrize("size", SIZES)
def test_frequencies_are_one_of_each_pair(size):
    (h, w), grid = size, _dft.grid(size)
    opposite = {(-f1 % h, -f2 % w) for f1, f2 in grid.paired.tolist()}
    here = {tuple(f) for f in grid.paired.tolist()}
    fixed = {tuple(f) for f in grid.fixed.tolist()}
    assert len(here) + len(opposite) + len(fixed) == h * w == len(here | opposite | fixed)
    assert all((2 * f1 % h, 2 * f2 % w) == (0, 0) for f1, f2 in fixed)
    assert max(f2 for _, f2 in here | fixed) <= w // 2
    mirrored = [f2 for _, f2 in grid.paired[: grid.num_mirrored].tolist()]
    assert all(2 * f2 % w == 0 for f2 in mirrored) and all(2 * f2 % w for _, f2 in grid.paired[grid.num_mirrored :])


@pytest.mark.quick_compiles
@pytest.mark.parametrize("size", SIZES)
def test_spectrum_is_the_fourier_transform_and_image_its_inverse(size):
    x = random((2, *size, 3))
    z = jax.jit(_dft.spectrum)(x)
    grid, r = _dft.grid(size), len(_dft.grid(size).fixed)
    fourier = np.moveaxis(np.fft.fft2(np.asarray(x), axes=(1, 2)) / np.sqrt(size[0] * size[1]), 0, 2)
    np.testing.assert_allclose(np.asarray(z[:r]), fourier[tuple(grid.fixed.T)].real, atol=1e-13)
    pairs = np.asarray(z[r:]).reshape(-1, 2, 2, 3)
    expected = np.sqrt(2) * fourier[tuple(grid.paired.T)]
    np.testing.assert_allclose(pairs[:, 0] + 1j * pairs[:, 1], expected, atol=1e-13)
    image = jax.jit(_dft.image, static_argnums=1)
    np.testing.assert_allclose(np.asarray(image(z, size)), np.asarray(x), atol=1e-13)
    # The inverse is the adjoint: <F x, y> = <x, F^-1 y>.
    y = random(z.shape, 1)
    np.testing.assert_allclose(float(jnp.sum(z * y)), float(jnp.sum(x * image(y, size))), atol=1e-11)


@pytest.mark.parametrize("size", [(1, 1), (3, 4), (8, 8), (9, 8), (8, 9), (1, 66), (1, 67), (66, 1)])
def test_transform_error_covers_the_distance_to_exact_arithmetic(size):
    exact = exact_rows(size)
    rng = np.random.default_rng(2)
    claimed, largest = _dft.transform_error(size), 0.0
    n = size[0] * size[1]
    # Signs that agree with a row's make the sums large; magnitudes of many orders make single terms dominate.
    inputs = [
        rng.normal(size=n),
        np.sign(exact[n // 2].astype(float)),
        rng.normal(size=n) * 10.0 ** rng.integers(-9, 9, n),
    ]
    with mpmath.workdps(40):
        for values in inputs:
            vector = np.array([mpmath.mpf(float(v)) for v in values], dtype=object)
            forward = np.asarray(_dft.spectrum(jnp.asarray(values).reshape(1, *size, 1))).reshape(-1)
            backward = np.asarray(_dft.image(jnp.asarray(values).reshape(n, 1, 1), size)).reshape(-1)
            norm = mpmath.sqrt(vector @ vector)
            for got, matrix in ((forward, exact), (backward, exact.T)):
                difference = matrix @ vector - np.array([mpmath.mpf(float(v)) for v in got], dtype=object)
                ratio = mpmath.sqrt(difference @ difference) / norm
                assert ratio <= claimed
                largest = max(largest, float(ratio) / claimed)
    assert largest > 1e-3 or n == 1  # control: the bound is not vacuous
    assert claimed < 2e-13


@pytest.mark.parametrize("size", [(3, 4), (8, 8), (9, 8), (8, 9), (1, 67)])
def test_every_entry_is_rounded_once(size):
    tables = _dft._tables(size)
    if len(tables) == 1:
        cases = [(tables[0], exact_rows(size))]
    else:
        cases = [(tables[0], exact_rows((1, size[1])))]
        special = tables[1][0] if tables[1].ndim == 3 else tables[1]
        line, h = exact_rows((size[0], 1)), size[0]
        # The special columns, one after the other, each by the transform of a single column.
        for s in range(len(special) // h):
            block = special[:, s * h : (s + 1) * h]
            block = block[np.abs(block).sum(1) > 0]
            cases.append((block, line))
    with mpmath.workdps(40):
        for table, exact in cases:
            for got, true in zip(table.ravel(), exact.ravel(), strict=True):
                assert abs(mpmath.mpf(float(got)) - true) <= abs(true) * 2**-53 * (1 + mpmath.mpf(10) ** -15)
    # The other columns: entries (cos, sin; -sin, cos) / sqrt(h), square and orthogonal to rounding.
    for table in tables:
        stack = table if table.ndim == 3 else table[None]
        gram = stack @ stack.swapaxes(1, 2)
        np.testing.assert_allclose(gram, np.broadcast_to(np.eye(gram.shape[-1]), gram.shape), atol=1e-14)


# One product for all parts; few channels in. Each kind of size with one of them every day.
@pytest.mark.quick_compiles
@pytest.mark.parametrize(
    ("size", "channels"),
    everyday(
        itertools.product(SIZES, [(3, 4), (2, 4)]),
        *[((3, 4), (3, 4)), ((8, 8), (2, 4)), ((9, 8), (3, 4)), ((8, 9), (2, 4)), ((1, 67), (3, 4))],
    ),
)
def test_blocks_act_as_the_complex_response(size, channels):
    h, w = size
    i, o = channels
    rng = np.random.default_rng(3)
    # The transform of a real kernel is Hermitian: packing loses nothing.
    response = np.fft.rfft2(rng.normal(size=(h, w, o, i)), axes=(0, 1))
    fixed, paired = _dft.pack(response, size)
    assert isinstance(fixed, np.ndarray) and isinstance(paired, np.ndarray)
    np.testing.assert_allclose(_dft.unpack(fixed, paired, size), response, atol=1e-13)
    x = rng.normal(size=(2, h, w, i))
    y = np.einsum("hwoi,bhwi->bhwo", response, np.fft.rfft2(x, axes=(1, 2)))
    expected = np.fft.irfft2(y, s=size, axes=(1, 2))
    found = jax.jit(lambda x, *blocks: _dft.image(_dft.apply_blocks(_dft.spectrum(x), *blocks), size))
    np.testing.assert_allclose(np.asarray(found(x, fixed, paired)), expected, atol=1e-11)
    adjoint = jax.jit(_dft.adjoint_blocks)(fixed, paired)
    back = _dft.unpack(*(np.asarray(a) for a in adjoint), size)
    np.testing.assert_allclose(back, response.conj().swapaxes(2, 3), atol=1e-13)


@pytest.mark.quick_compiles
@pytest.mark.parametrize("size", [(4, 3), (9, 8), (8, 9)])
def test_spectrum_and_image_are_each_others_adjoint_to_every_transformation_of_jax(size):
    x, z = random((2, *size, 3)), random((size[0] * size[1], 2, 3), 1)

    @jax.jit
    def check(x, z):
        back = jax.vjp(_dft.spectrum, x)[1](z)[0], jax.linear_transpose(lambda x: _dft.spectrum(x), x)(z)[0]
        forth = jax.vjp(lambda z: _dft.image(z, size), z)[1](x)[0], jax.jvp(_dft.spectrum, (x,), (x,))[1]
        twice = jax.vjp(lambda z: jax.vjp(_dft.spectrum, x)[1](z)[0], z)[1](x)[0]
        mapped = jax.vmap(_dft.spectrum)(jnp.stack([x, 2 * x])), jax.vmap(_dft.spectrum, 3, 2)(x[..., None, :])
        return back, (*forth, twice), mapped, _dft.spectrum(x), _dft.image(z, size)

    back, forth, (stacked, inner), expected, image = check(x, z)
    for found in back:
        np.testing.assert_allclose(np.asarray(found), np.asarray(image), atol=1e-13)
    for found in (*forth, stacked[0], stacked[1] / 2, inner[:, :, 0]):
        np.testing.assert_allclose(np.asarray(found), np.asarray(expected), atol=1e-13)
    eager = np.asarray(_dft.spectrum(x))
    np.testing.assert_allclose(eager, np.asarray(expected), atol=1e-13)


@pytest.mark.parametrize("size", [(4, 4), (5, 6), (4, 3), (1, 1)])
def test_packing_takes_the_hermitian_part_of_columns_that_mirror_themselves(size):
    h, w = size
    rng = np.random.default_rng(4)
    response = rng.normal(size=(h, w // 2 + 1, 2, 2)) + 1j * rng.normal(size=(h, w // 2 + 1, 2, 2))
    projected = response.copy()
    for column in {0, w // 2} if w % 2 == 0 else {0}:
        for row in range(h):
            projected[row, column] = (response[row, column] + response[-row % h, column].conj()) / 2
    for pack in (_dft.pack, jax.jit(_dft.pack, static_argnums=1)):
        unpacked = np.asarray(_dft.unpack(*pack(response, size), size))
        np.testing.assert_allclose(unpacked, projected, atol=1e-15)
    assert np.abs(unpacked - response).max() > 0.1  # control: the projection changes something


@pytest.mark.x64_off
def test_single_precision_stays_single():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 3)), jnp.float32)
    z = jax.jit(_dft.spectrum)(x)
    assert z.dtype == jnp.float32
    back = _dft.image(z, (16, 16))
    np.testing.assert_allclose(np.asarray(back), np.asarray(x), atol=16 * np.finfo(np.float32).eps)
    assert "c64" not in jax.jit(_dft.spectrum).lower(x).compile().as_text()


def test_a_batch_that_is_spread_over_devices_is_not_gathered():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    size, spread = (10, 8), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    blocks = [random((4, 3, 2)), random((38, 2, 3, 2), 1)]

    def loss(x, fixed, paired):
        return jnp.sum(_dft.image(_dft.apply_blocks(_dft.spectrum(x), fixed, paired), size) ** 2)

    x = random((8, *size, 2), 2)
    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    expected = step(x, *blocks)
    with jax.set_mesh(mesh):
        x = jax.device_put(x, spread)
        text = step.lower(x, *blocks).compile().as_text()
        found = step(x, *blocks)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-12, atol=1e-12)
    # The sums of gradients cross devices, the images do not.
    assert "all-reduce" in text and "all-gather" not in text and "all-to-all" not in text and "permute" not in text
    assert found[1][0].sharding.is_equivalent_to(spread, 4)


def test_twiddles_do_not_depend_on_the_callers_decimal_context():
    expected = [table.copy() for table in _dft.twiddles(7)]
    _dft.twiddles.cache_clear()
    with decimal.localcontext(decimal.Context(prec=5, rounding=decimal.ROUND_UP)):
        found = _dft.twiddles(7)
    _dft.twiddles.cache_clear()
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
