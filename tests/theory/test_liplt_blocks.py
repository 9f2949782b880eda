"""LipLT of residual blocks against the recursion by dense matrices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from liplt_helpers import dense, estimate, norm, off_diagonal
from tiers import everyday

from lipjax import bounds
from lipjax.bounds.liplt_path import Block
from lipjax.errors import NotCertifiable
from lipjax.operators import (
    Bias,
    Conv,
    Dense,
    Flatten,
    LeakyReLU,
    MaxMin,
    ReLU,
    Residual,
)

pytestmark = pytest.mark.quick_compiles


def random_blocks(seed, count, width, skip=True):
    rng = np.random.default_rng(seed)
    make = lambda m, n: Dense(rng.normal(size=(n, m)) / np.sqrt(m))  # noqa: E731
    return [
        Block((make(width, width + 1),), (make(width + 1, width),), (make(width, width),) if skip else None)
        for _ in range(count)
    ]


def residual_oracle(blocks, slope=(0.0, 1.0)):
    """n_k and the constant of the output, dense: H_k, G_k, W_k as matrices."""
    a, b = sum(slope) / 2, (slope[1] - slope[0]) / 2
    h, g, w = (
        [dense(getattr(block, name)) if getattr(block, name) else None for block in blocks]
        for name in ("skip", "outer", "inner")
    )
    size = len(g[0])
    h = [
        np.eye(size) if block.skip == () else (np.zeros((size, size)) if m is None else m)
        for m, block in zip(h, blocks, strict=True)
    ]
    linear = [h[k] + a * g[k] @ w[k] for k in range(len(blocks))]
    chain = lambda j, k: functools.reduce(lambda m, i: linear[i] @ m, range(j, k), np.eye(size))  # noqa: E731
    found = []
    for k in range(len(blocks) + 1):
        end = w[k] if k < len(blocks) else np.eye(size)
        total = norm(end @ chain(0, k))
        for j in range(k):
            total += b * norm(end @ chain(j + 1, k) @ g[j]) * found[j]
        found.append(total)
    return found


@pytest.mark.parametrize("skip", everyday([True, False], True))
def test_residual_blocks_have_the_constants_of_the_definition(skip):
    blocks = random_blocks(14, 4, 6, skip)
    wanted = residual_oracle(blocks)
    _, report = bounds.liplt_bound(blocks)
    for row, n in zip(report.layers, wanted, strict=False):
        assert row.claimed <= n * (1 + 1e-6)
        assert row.claimed <= row.product * (1 + 1e-12)
    assert report.layers[0].claimed == pytest.approx(wanted[0], rel=1e-6)
    assert report.total == pytest.approx(wanted[-1], rel=1e-6)
    blockwise = np.prod(
        [
            norm(dense(b.skip) if b.skip else np.zeros((6, 6))) + norm(dense(b.outer)) * norm(dense(b.inner))
            for b in blocks
        ]
    )
    assert report.total < report.product == pytest.approx(blockwise, rel=1e-6)
    jax_blocks = jax.tree.map(jnp.asarray, blocks)
    _, found = estimate(jax_blocks, bounds.liplt_vectors(jax_blocks, jax.random.key(1)), 1000)
    np.testing.assert_allclose(found.constants, wanted[:-1], rtol=1e-4)
    np.testing.assert_allclose(found.total, wanted[-1], rtol=1e-4)


def test_one_block_with_an_identity_beside_it():
    rng = np.random.default_rng(15)
    w, g = rng.normal(size=(5, 4)), rng.normal(size=(4, 5))
    block = Block((Dense(w),), (Dense(g),), (), (0.0, 1.0))
    _, report = bounds.liplt_bound([block])
    assert report.total == pytest.approx(norm(np.eye(4) + g @ w / 2) + norm(g) * norm(w) / 2, rel=1e-6)


def test_the_operator_of_networks_is_the_block():
    """`operators.Residual`, biases and reorderings included, has the constants of x + G phi(W x) of its arrays."""
    rng = np.random.default_rng(20)
    w, g, last = rng.normal(size=(5, 4)) / 2, rng.normal(size=(4, 5)) / 2, Dense(rng.normal(size=(3, 4)))
    branch = (Dense(w), Bias(rng.normal(size=5), (5,)), LeakyReLU((5,), 0.25), Dense(g), Bias(np.ones(4), (4,)))
    residual, block = Residual(branch), Block((Dense(w),), (Dense(g),), (), (0.25, 1.0))
    (pairwise, report), (wanted, of_block) = (bounds.liplt_bound([op, last]) for op in (residual, block))
    np.testing.assert_array_equal(pairwise, wanted)
    assert report.total == of_block.total < report.product == of_block.product
    # Sampled slopes of the operator itself stay below.
    x, y = rng.normal(size=(2, 500, 4)) * 3
    ratios = np.linalg.norm((residual(x) - residual(y)) @ last.matrix.T, axis=1) / np.linalg.norm(x - y, axis=1)
    assert 0.3 * report.total < ratios.max() <= report.total
    ops = jax.tree.map(jnp.asarray, [residual, last])
    low, _ = estimate(ops, bounds.liplt_vectors(ops, jax.random.key(3)), 300)
    np.testing.assert_allclose(off_diagonal(low), off_diagonal(pairwise), rtol=1e-4)
    for odd in ((Dense(np.eye(4)),), (ReLU((4,)), ReLU((4,))), (MaxMin((4,)), ReLU((4,)))):
        with pytest.raises(NotCertifiable, match=r"operators\[0\] .*\(Residual\): LipLT takes residual blocks"):
            bounds.liplt_bound([Residual(odd), last])


def test_maps_between_blocks_and_convolutions_in_them():
    rng = np.random.default_rng(16)
    first = Conv(rng.normal(size=(3, 3, 1, 2)) / 3, (4, 4, 1))
    inner, outer = (Conv(rng.normal(size=(3, 3, 2, 2)) / 4, (4, 4, 2)) for _ in range(2))
    ops = [first, Block((inner,), (outer,)), Flatten((4, 4, 2)), Dense(rng.normal(size=(3, 32)) / 6)]
    linear = np.eye(32) + dense([inner, outer]) / 2
    m = norm(dense([first, inner]))
    wanted = norm(ops[3].matrix @ linear @ dense([first])) + norm(ops[3].matrix @ dense([outer])) * m / 2
    pairwise, report = bounds.liplt_bound(ops)
    assert report.total == pytest.approx(wanted, rel=1e-6)
    jax_ops = jax.tree.map(jnp.asarray, ops)
    low, found = estimate(jax_ops, bounds.liplt_vectors(jax_ops, jax.random.key(2)), 1000)
    assert found.total == pytest.approx(wanted, rel=1e-4)
    np.testing.assert_allclose(off_diagonal(low), off_diagonal(pairwise), rtol=1e-4)


@pytest.mark.parametrize("max_rows", [100, 0])
@pytest.mark.parametrize("after", [0, 1])
def test_a_block_at_the_end_with_a_small_outer_map(max_rows, after):
    # x + relu(x) / 10: the rows at the block's output count, not those at its activation
    block = Block((Dense(np.eye(2)),), (Dense(np.eye(2) / 10),), ())
    pairwise, report = bounds.liplt_bound([block] + [Dense(np.eye(2))] * after, max_rows=max_rows)
    assert 1.1 <= report.total <= 1.1 * (1 + 1e-9)
    assert 1.1 * np.sqrt(2) * (1 - 1e-15) <= pairwise[0, 1] <= 1.1 * np.sqrt(2) * (1 + 1e-7)
    assert (report.per_class >= 1.1 - 1e-15).all()
