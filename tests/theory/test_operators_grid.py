"""The circulants of proofs, as operators with norm estimates: against dense matrices and the proved bound."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import everyday

from lipjax import bounds, conv, operators, spectral
from lipjax.network import make_network
from lipjax.operators.grid import Circulants, on_grid
from lipjax.spectral import norms

pytestmark = pytest.mark.quick_compiles


@pytest.fixture(autouse=True)
def no_dense_proofs(monkeypatch):
    """Small maps are then bounded as large ones are."""
    monkeypatch.setattr(norms, "_DENSE_SIDE", 0)


CASES = {
    "3x3": ((3, 3, 3, 2), (5, 4, 3), 1, "ZERO"),
    "5x5 stride 2": ((5, 5, 2, 3), (7, 6, 2), 2, ((2, 2), (2, 2))),
    "even, unequal strides": ((4, 2, 2, 2), (6, 5, 2), (1, 2), "ZERO"),
    "a column": ((3, 1, 2, 2), (6, 3, 2), 1, "ZERO"),
    "taps that meet only padding": ((5, 3, 2, 2), (2, 6, 2), 1, ((4, 0), (1, 1))),
}


def make(name):
    shape, in_shape, strides, padding = CASES[name]
    kernel = np.random.default_rng(len(name)).normal(size=shape)
    return operators.Conv(jnp.asarray(kernel), in_shape, strides, padding)


def norm_of(op, size, twist):
    """|y[p] = sum_t K[t] x[s p + t - lo]|, by its matrix; beyond `size` x is periodic up to the sign, or (None) 0."""
    kernel, strides = np.asarray(op.kernel), conv.stride_pair(op.strides)
    (k1, k2, c, o), (h, w) = kernel.shape, size
    low = [pad[0] for pad in conv.explicit_padding((k1, k2), op.padding)]
    out = op.out_shape[:2] if twist is None else [n // s for n, s in zip(size, strides, strict=True)]
    matrix = np.zeros((*out, o, h, w, c))
    for p, q, a, b in np.ndindex(*out, k1, k2):
        (i, m), (j, n) = divmod(strides[0] * p + a - low[0], h), divmod(strides[1] * q + b - low[1], w)
        if twist is not None:
            matrix[p, q, :, m, n] += (-1) ** (twist[0] * i + twist[1] * j) * kernel[a, b].T
        elif i == j == 0:
            matrix[p, q, :, m, n] += kernel[a, b].T
    return np.linalg.norm(matrix.reshape(-1, h * w * c), 2)


@pytest.mark.parametrize("name", everyday(CASES, "5x5 stride 2"))
def test_the_estimate_converges_to_the_proved_bound_from_below(name, key):
    op = make(name)
    grid, bound = on_grid(op), op.bound()
    assert isinstance(grid, Circulants) and "block circulant" in bound.method
    used = (tuple(bound.details["grid"]), tuple(bound.details["twist"]))
    assert used in grid.variants
    late, vectors = estimate(grid, jax.random.normal(key, grid.in_shape), 2000)
    # Taps that meet only padding are no part of the circulants. The least norm of all is what the proof states.
    kept = operators.Conv(grid.kernel, op.in_shape, op.strides, op.padding)
    norms = [norm_of(kept, size(grid, g), t) for g, t in grid.variants]
    assert float(late) <= min(norms) * (1 + 1e-12) and float(late) == pytest.approx(min(norms), rel=1e-5)
    assert min(norms) * (1 - 1e-12) <= bound.proved <= min(norms) * (1 + 1e-8)
    true = norm_of(op, op.in_shape[:2], None)
    assert all(true <= norm * (1 + 1e-12) for norm in norms)
    assert vectors.shape == grid.in_shape
    for v, (g, _) in zip(vectors, grid.variants, strict=True):
        h, w = size(grid, g)
        assert float(jnp.linalg.norm(v[:h, :w])) == pytest.approx(1) and float(jnp.linalg.norm(v)) == pytest.approx(1)


estimate = jax.jit(lambda op, v, n: op.estimate(v, n), static_argnums=2)


def size(grid, blocks):
    return tuple(n * s for n, s in zip(blocks, grid.strides, strict=True))


def test_the_zero_padded_estimate_stays_below_the_bound(key):
    """What the option closes: a control of the test above."""
    op = make("3x3")
    start = jax.random.normal(key, op.in_shape)
    sigma, _ = estimate(op, start, 2000)
    assert float(estimate(op, start, 1)[0]) < float(sigma) < 0.98 * op.bound().proved


def test_the_gradient_is_that_of_the_norm(key):
    op = make("5x5 stride 2")
    grid = on_grid(op)
    _, vectors = estimate(grid, jax.random.normal(key, grid.in_shape), 2000)
    direction = jnp.cos(jnp.arange(op.kernel.size, dtype=float)).reshape(op.kernel.shape)

    def value(kernel):
        return on_grid(operators.Conv(kernel, op.in_shape, op.strides, op.padding)).estimate(vectors, 0)[0]

    slope = float(jnp.vdot(jax.jit(jax.grad(value))(op.kernel), direction))
    step = 1e-4
    ends = [
        operators.Conv(op.kernel + t * direction, op.in_shape, op.strides, op.padding).bound().proved
        for t in (-step, step)
    ]
    assert slope == pytest.approx((ends[1] - ends[0]) / (2 * step), rel=1e-4)
    assert abs(slope) > 1e-2
    through = jax.jit(jax.grad(lambda v: jnp.sum(grid.estimate(v, 1)[1])))(vectors)
    assert not np.asarray(through).any()


def test_what_is_proved_as_it_is_stays_as_it_is(monkeypatch):
    circular = operators.Conv(jnp.ones((3, 3, 2, 2)), (4, 4, 2), 1, "CIRCULAR")
    patches = operators.Conv(jnp.ones((2, 2, 2, 2)), (4, 4, 2), 2, "VALID")
    dense = operators.Dense(jnp.eye(3))
    assert all(on_grid(op) is op for op in (circular, patches, dense))
    op = make("3x3")
    assert on_grid(op) is not op
    monkeypatch.setattr(norms, "_DENSE_SIDE", 4096)
    assert on_grid(op) is op


@pytest.mark.parametrize(("cheap", "dear", "count"), [(2e9, 2e11, 8), (0, 2e11, 4), (0, 0, 1)])
def test_as_many_circulants_as_the_proof_tries(monkeypatch, cheap, dear, count):
    monkeypatch.setattr(norms, "_CHEAP", cheap)
    monkeypatch.setattr(norms, "_DEAR", dear)
    op = make("3x3")
    assert len(on_grid(op).variants) == count
    assert tuple(op.bound().details["grid"]) in {grid for grid, _ in on_grid(op).variants}


def test_a_network_on_the_grid(key):
    """Blocks and centred maps, too; the product of estimates tends to the product of bounds."""
    rng = np.random.default_rng(0)
    kernels = [jnp.asarray(rng.normal(size=(3, 3, 2, 2)) / 4) for _ in range(3)]
    shape = (4, 4, 2)
    convs = [operators.Conv(kernel, shape) for kernel in kernels]
    ops = [
        ("block", operators.Residual((convs[0], operators.MaxMin(shape)))),
        ("centred", operators.Centered(convs[1])),
        ("conv", convs[2]),
        ("flat", operators.Flatten(shape)),
    ]
    network = make_network(ops, operators.LinearHead(jnp.eye(2, 32), jnp.zeros(2)), 0.0, 0.5)
    grid = dataclasses.replace(network, ops=tuple(map(on_grid, network.ops)))
    product = jax.jit(bounds.feature_lipschitz_estimate, static_argnums=2)
    vectors = bounds.init_vectors(grid, key)
    assert {name: v.shape[0] for name, v in vectors.items()} == {"block/0": 8, "centred": 8, "conv": 8}
    on, _ = product(grid, vectors, 1000)
    off, _ = product(network, bounds.init_vectors(network, key), 1000)
    proved = 2 * (1 + convs[0].bound().proved) * convs[1].bound().proved * convs[2].bound().proved
    assert float(off) < 0.97 * proved and float(on) <= proved < float(on) * (1 + 1e-4)


def test_shapes_of_embeddings_follow_from_the_kernel():
    used, found = spectral.embeddings((3, 3, 2, 2), (5, 4, 2), 1, conv.explicit_padding((3, 3), "ZERO"))
    assert used.all() and found[0] == ((6, 5), (0, 0)) and found[-1] == ((7, 6), (1, 1))
    used, _ = spectral.embeddings((5, 3, 2, 2), (2, 6, 2), 1, ((4, 0), (1, 1)))
    assert not used.all()


@pytest.mark.nightly
def test_converged_estimates_are_those_of_the_least_variant(key):
    op = make("3x3")
    grid = on_grid(op)
    _, start = estimate(grid, jax.random.normal(key, grid.in_shape), 2000)
    (sigma, vectors), gradient = jax.jit(jax.value_and_grad(lambda g: g.converge(start), has_aux=True, allow_int=True))(
        grid
    )
    least = min(float(norm_of(op, size, twist)) for size, twist in grid.variants)
    assert least * (1 - 1e-6) < sigma <= least * (1 + 1e-12)
    moved = np.flatnonzero(np.any(np.asarray(vectors != start), axis=(1, 2, 3)))
    assert len(moved) == 1 and float(norm_of(op, *grid.variants[moved[0]])) == pytest.approx(least, rel=1e-12)
    # The norm is homogeneous: its derivative along the kernel is itself.
    np.testing.assert_allclose(jnp.vdot(gradient.kernel, op.kernel), sigma, rtol=1e-12)
