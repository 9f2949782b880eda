"""Proved norms of compositions against dense oracles: dense, banded, circular; underflow and overflow."""

import numpy as np
import pytest
from liplt_helpers import CHAINS, ONE, dense, host_maps, norm, off_diagonal, randomised
from tiers import everyday

from lipjax import bounds, spectral
from lipjax.bounds import chains
from lipjax.errors import NotCertifiable
from lipjax.operators import (
    Conv,
    Dense,
    Flatten,
)

pytestmark = pytest.mark.quick_compiles


@pytest.mark.parametrize("name", everyday(CHAINS, "strides", "circular", "reordered", "shifted"))
def test_host_maps_are_the_operators_and_their_adjoints(name):
    ops = randomised(CHAINS[name], 5)
    for op, host in zip(ops, host_maps(ops), strict=True):
        matrix, size = dense([op]), int(np.prod(op.in_shape))
        forward = host.apply(np.eye(size).reshape(size, *op.in_shape)).reshape(size, -1).T
        np.testing.assert_allclose(forward, matrix, atol=1e-14)
        count = len(matrix)
        backward = host.adjoint(np.eye(count).reshape(count, *op.out_shape)).reshape(count, -1)
        np.testing.assert_allclose(backward, matrix, atol=1e-14)
        assert host.in_shape == tuple(op.in_shape) and host.transposed.out_shape == tuple(op.in_shape)


@pytest.mark.parametrize("name", everyday(CHAINS, "mixed", "reordered", "padded"))
def test_compositions_are_bounded_by_what_they_are(name):
    ops = randomised(CHAINS[name], 6)
    exact = norm(dense(ops))
    found = chains.composition_bound(host_maps(ops))
    assert exact <= found.proved <= exact * (1 + 1e-8)
    backwards = chains.composition_bound([m.transposed for m in reversed(host_maps(ops))])
    assert backwards.proved == pytest.approx(exact, rel=1e-8)
    assert chains.lower_estimate(host_maps(ops), 400) == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("name", ["strides", "reordered"])
def test_banded_gram_matrices_give_the_same(name, monkeypatch):
    monkeypatch.setattr(chains, "_DENSE_ENTRIES", 0)
    ops = randomised(CHAINS[name], 7)
    exact = norm(dense(ops))
    found = chains.composition_bound(host_maps(ops))
    assert "banded" in found.method
    assert exact <= found.proved <= exact * (1 + 1e-4)


def test_banded_factorisations_refuse_a_shift_below_the_norm():
    tall = [Conv(np.ones((3, 3, 2, 2)), (12, 3, 2), 1, ONE), Conv(np.ones((3, 3, 2, 2)), (12, 3, 2), 1, ONE)]
    maps = host_maps(randomised(tall, 8))
    band = chains._half_band(maps)
    assert band == 4
    gram = dense(randomised(tall, 8))
    gram = gram @ gram.T
    side, top = 6, norm(gram)
    blocks = {
        (i, j): gram[i * side : (i + 1) * side, j * side : (j + 1) * side].copy()
        for j in range(12)
        for i in range(j, min(12, j + band + 1))
    }
    rest = gram.copy()
    for i, j in blocks:
        rest[i * side : (i + 1) * side, j * side : (j + 1) * side] = 0
    assert np.abs(np.tril(rest, -side)).max() < 1e-12  # nothing outside the band
    assert chains._verify_banded(blocks, 12, band, top * (1 - 1e-9)) is None
    assert 0 < chains._verify_banded(blocks, 12, band, top * (1 + 1e-9)) < 1e-9 * top


def test_composed_circular_kernels_give_the_norm():
    ops = randomised(CHAINS["circular"], 9)
    exact = norm(dense(ops))
    found = chains.circular_bound(ops)
    assert exact <= found.proved <= exact * (1 + 1e-6)
    chain = [*ops, Flatten((2, 2, 2)), Dense(np.eye(3, 8))]
    _, report = bounds.liplt_bound(chain)
    assert any("composed circular kernel" in row.method for row in report.chains)


def test_a_composed_zero_padded_chain_is_not_its_symbol():
    # the first takes the image apart to the right, the second to the left: around a circle they cancel
    right, left = np.zeros((1, 3, 1, 1)), np.zeros((1, 3, 1, 1))
    right[0, :, 0, 0], left[0, :, 0, 0] = (0, 1, 1), (1, -1, 0)
    ops = [Conv(right, (1, 6, 1)), Conv(left, (1, 6, 1))]
    exact = norm(dense(ops))
    symbol = spectral.conv_norm_bound(chains._composed(right, left, (1, 1)), (1, 6, 1), 1, "CIRCULAR").proved
    found = chains.composition_bound(host_maps(ops))
    assert exact <= found.proved <= exact * (1 + 1e-9)
    assert abs(symbol - exact) > 1e-3


def scalings(*exponents, padding="ZERO"):
    return [Conv(np.full((1, 1, 1, 1), 2.0**e), (4, 4, 1), 1, padding) for e in exponents]


@pytest.mark.parametrize("entries", [chains._DENSE_ENTRIES, 0], ids=["dense", "banded"])
@pytest.mark.parametrize(
    ("exponents",),
    everyday(
        [((-100,) * 6,), ((-100,) * 5 + (-35,),), ((-99,) * 11,), ((-100,) * 11 + (100,) * 3,)],
        ((-100,) * 5 + (-35,),),
    ),
)
def test_numbers_that_underflow_on_the_way_are_covered(entries, exponents, monkeypatch):
    monkeypatch.setattr(chains, "_DENSE_ENTRIES", entries)
    found = chains.composition_bound(host_maps(scalings(*exponents)))
    assert found.proved >= 2.0 ** max(sum(exponents), -1074)
    assert chains.circular_bound(scalings(*exponents, padding="CIRCULAR")).proved >= 2.0 ** max(sum(exponents), -1074)
    _, report = bounds.liplt_bound([Dense(np.full((1, 1), 2.0**e)) for e in exponents], (1.0, 1.0))
    assert report.total >= 2.0 ** max(sum(exponents), -1074)


@pytest.mark.parametrize("entries", [chains._DENSE_ENTRIES, 0], ids=["dense", "banded"])
def test_numbers_that_overflow_on_the_way_have_no_proof(entries, monkeypatch):
    monkeypatch.setattr(chains, "_DENSE_ENTRIES", entries)
    for exponents in ((99,) * 6, (99,) * 11):
        try:
            assert chains.composition_bound(host_maps(scalings(*exponents))).proved >= 2.0 ** sum(exponents)
        except (NotCertifiable, OverflowError) as error:
            assert isinstance(error, NotCertifiable)
    rng = np.random.default_rng(21)
    convolution = Conv(rng.normal(size=(1, 1, 1, 1)), (2, 2, 1))
    huge = [Dense(rng.normal(size=(4, 4)) * 2.0**95) for _ in range(6)]
    pairwise, report = bounds.liplt_bound([convolution, Flatten((2, 2, 1)), *huge])  # |row|^2 overflows
    assert (off_diagonal(pairwise) > 1e150).all() and 1e150 < report.total <= report.product


GEOMETRIES = [
    # (kernel, strides, padding) of two convolutions on (9, 3, 1)
    (((1, 2), (3, 1), "VALID"), ((2, 1), (1, 1), ((2, 3), (0, 1)))),
    (((2, 1), (4, 2), ((3, 2), (0, 1))), ((3, 1), (2, 1), ((3, 3), (1, 1)))),  # strides > kernel, windows in zeros
    (((5, 3), (1, 1), ((0, 4), (2, 0))), ((4, 2), (3, 1), ((4, 0), (1, 1)))),
    (((3, 3), (2, 1), "ZERO"), ((4, 4), (1, 3), ((3, 3), (3, 3)))),
    (((1, 1), (1, 1), ((6, 6), (1, 1))), ((2, 2), (5, 1), "VALID")),
]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_bands_of_any_geometry(geometry, monkeypatch):
    monkeypatch.setattr(chains, "_DENSE_ENTRIES", 0)
    rng, shape, ops = np.random.default_rng(23), (9, 3, 1), []
    for kernel, strides, padding in geometry:
        ops.append(Conv(rng.normal(size=(*kernel, shape[2], 2)), shape, strides, padding))
        shape = ops[-1].out_shape
    maps = host_maps(ops)
    x = np.eye(27).reshape(27, 9, 3, 1)
    for m in maps:
        x = m.apply(x)
    exact = norm(x.reshape(27, -1))
    found = chains.composition_bound(maps)
    assert "banded" in found.method and exact <= found.proved <= exact * (1 + 1e-4)
    # nothing outside of the band
    matrix = x.reshape(27, -1).T
    if matrix.shape[0] > matrix.shape[1]:
        maps, matrix = [m.transposed for m in reversed(maps)], matrix.T
    rows = maps[-1].out_shape[0]
    gram = np.abs(matrix @ matrix.T).reshape(rows, len(matrix) // rows, rows, -1).max(axis=(1, 3))
    assert max(abs(i - j) for i, j in np.argwhere(gram > 0)) <= chains._half_band(maps)
