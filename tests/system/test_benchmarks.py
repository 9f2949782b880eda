"""What benchmarks compare with: bounds of norms of other papers, and the claims of published networks."""

import importlib
import pathlib

import numpy as np
import pytest

from lipjax import operators

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a benchmark as it is imported where it runs."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def dense(kernel, size):
    """The matrix of a 3 x 3 convolution with zeros around a map of size x size, by its definition."""
    channels, outputs = kernel.shape[2:]
    matrix = np.zeros((size, size, outputs, size, size, channels))
    for y, x, a, b in np.ndindex(size, size, 3, 3):
        if 0 <= y + a - 1 < size and 0 <= x + b - 1 < size:
            matrix[y, x, :, y + a - 1, x + b - 1, :] = kernel[a, b].T
    return matrix.reshape(size * size * outputs, -1)


def test_bounds_of_other_papers_are_bounds_and_tend_to_what_they_should(benchmark):
    bounds = benchmark("norm_bounds")
    for seed in range(3):
        kernel = np.random.default_rng(seed).normal(size=(3, 3, 2, 3))
        op = operators.Conv(kernel, (5, 5, 2))
        norm = np.linalg.norm(dense(kernel, 5), 2)
        grams, toeplitz = ([f(op, n) for n in (1, 2, 3)] for f in (bounds.gram_iteration, bounds.toeplitz))
        grid = np.linalg.norm(bounds.frequencies(kernel, 7), 2, axis=(1, 2)).max()  # of the circulant of 7 x 7 pixels
        assert grams == sorted(grams, reverse=True) and toeplitz == sorted(toeplitz, reverse=True)
        assert norm <= grid <= grams[-1] and abs(bounds.gram_iteration(op, 9) / grid - 1) < 1e-2
        assert norm < toeplitz[-1] and toeplitz[0] < 2 * norm
        tensor, four = bounds.tensor_norm(op, starts=3), bounds.fantastic_four(op)
        assert norm < tensor <= four < 3 * norm
        assert norm <= bounds.autocorrelation(op) and norm <= bounds.row_sums(op)
    flat = operators.Conv(np.ones((3, 3, 1, 1)), (40, 40, 1))  # every tap alike: the tensor norm's bound is 9
    assert abs(bounds.tensor_norm(flat, starts=1) - 9) < 1e-9 and abs(bounds.fantastic_four(flat) - 9) < 1e-9


def test_claims_of_networks_with_a_constant_of_1_are_what_is_proved(benchmark, tmp_path):
    recertify = benchmark("recertify")
    rng = np.random.default_rng(0)
    sizes = {1: (100, 784), 3: (100, 100), 5: (10, 100)}
    state = {}
    for place, (rows, columns) in sizes.items():
        state[f"{place}.weight"] = np.linalg.qr(rng.normal(size=(columns, rows)))[0].T
        state[f"{place}.bias"] = rng.normal(size=rows)
    np.savez(tmp_path / "net.npz", **state)
    published, images = recertify.NETWORKS["mlp_mnist_gnp_T05"], rng.uniform(size=(3, 28, 28, 1))
    frozen = recertify.frozen_network(published, tmp_path / "net.npz")
    y = images.reshape(3, -1)
    for place in sizes:
        y = y @ state[f"{place}.weight"].T + state[f"{place}.bias"]
        y = np.sort(y.reshape(3, -1, 2), 2).reshape(3, -1) if place < 5 else y
    certificate = frozen.certify(images)
    np.testing.assert_allclose(frozen(images), y, atol=1e-10)
    np.testing.assert_allclose(recertify.claimed_radii(y, 1.0), certificate.radii, rtol=1e-5)
    state["3.weight"] *= 2  # control: the claim does not look at the arrays
    np.savez(tmp_path / "net.npz", **state)
    proved = recertify.frozen_network(published, tmp_path / "net.npz").margin_lipschitz()
    assert 1.99 * 2**0.5 < proved[0, 1] < 2.01 * 2**0.5
