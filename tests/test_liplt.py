"""LipLT against the papers' code, dense oracles and sampled slopes; its refusals."""

import functools
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import threadpoolctl

from lipjax import FrozenNetwork, _chains, _host_map, _liplt, _liplt_path, bounds, certify, network
from lipjax.bounds import ResidualBlock
from lipjax.errors import NotCertifiable
from lipjax.operators import (
    Bias,
    Conv,
    ConvExponential,
    CropChannels,
    Dense,
    Flatten,
    LeakyReLU,
    LinearHead,
    MaxMin,
    MLPHead,
    PadChannels,
    ReLU,
    SpaceToDepth,
    Tanh,
)

GOLDEN = pathlib.Path(__file__).parent / "golden" / "crm_liplt.npz"
ONE = ((1, 1), (1, 1))
estimate = jax.jit(bounds.liplt_estimate, static_argnums=(2, 3), static_argnames="max_rows")


@functools.cache
def golden():
    with np.load(GOLDEN) as file:
        return {name: file[name] for name in file.files if name != "meta"}


def golden_operators():
    found = golden()
    kernels = [jnp.asarray(found[f"param/linear.{n}.weight"].transpose(2, 3, 1, 0)) for n in (0, 2, 4)]
    shapes, strides = [(16, 16, 3), (16, 16, 4), (8, 8, 6)], (1, 2, 2)
    convs = [Conv(k, shape, s, ONE) for k, shape, s in zip(kernels, shapes, strides, strict=True)]
    first, last = (found[f"param/linear.{n}.weight"] for n in (7, 9))
    first = first.reshape(24, 8, 4, 4).transpose(0, 2, 3, 1).reshape(24, -1)  # flattened as (c, h, w) there
    return [*convs, Flatten((4, 4, 8)), Dense(jnp.asarray(first)), Dense(jnp.asarray(last))]


def golden_vectors(prefix):
    found = {}
    for s in range(4):
        v = golden()[f"input/{prefix}/{s}"]
        v = v.reshape(-1, 8, 4, 4) if s == 3 else v
        v = v.transpose(0, 2, 3, 1)
        found[str(s)] = jnp.asarray(v.reshape(1, -1) if s == 3 else v)
    return found


def off_diagonal(matrix):
    return np.asarray(matrix)[~np.eye(len(matrix), dtype=bool)]


def test_three_iterations_are_those_of_the_papers_code():
    pairwise, found = estimate(golden_operators(), golden_vectors("pi_start"), 3)
    np.testing.assert_allclose(found.constants, golden()["output/liplt_m_3it"], rtol=1e-12)
    np.testing.assert_allclose(off_diagonal(pairwise), off_diagonal(golden()["output/liplt_pairwise_3it"]), rtol=1e-12)
    # the start vectors matter: these are not the converged values
    assert abs(found.constants[-1] / golden()["output/liplt_m_exact"][-1] - 1) > 1e-3


def test_converged_constants_are_the_exact_ones():
    operators = golden_operators()
    pairwise, found = estimate(operators, golden_vectors("pi_start"), 4000)
    exact = golden()
    for value, name in (
        (found.constants, "m"),
        (found.per_class, "per_class"),
        (found.total, "global"),
        (off_diagonal(pairwise), "pairwise"),
        (off_diagonal(found.fallback), "pairwise_fallback"),
    ):
        wanted = exact[f"output/liplt_{name}_exact"]
        wanted = off_diagonal(wanted) if wanted.ndim == 2 else wanted
        np.testing.assert_allclose(value, wanted, rtol=2e-5)  # close singular values: from below
        assert (np.asarray(value) <= wanted * (1 + 1e-12)).all()
    few, _ = estimate(operators, golden_vectors("pi_start"), 4000, max_rows=9)
    np.testing.assert_allclose(few, found.fallback, rtol=1e-12)


def test_gradient_is_that_of_the_papers_code():
    keep = jnp.asarray(golden()["input/pairwise_cotangent"] * (1 - np.eye(10)))
    vectors = golden_vectors("pairwise_grad_vectors")

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient(operators):
        pairwise, _ = bounds.liplt_estimate(operators, vectors, 0)
        return jnp.sum(pairwise * keep), pairwise

    grads, pairwise = gradient(golden_operators())
    np.testing.assert_allclose(off_diagonal(pairwise), off_diagonal(golden()["output/pairwise_value"]), rtol=1e-12)
    for i, n in ((0, 0), (1, 2), (2, 4)):
        wanted = golden()[f"output/pairwise_grad/linear.{n}.weight"].transpose(2, 3, 1, 0)
        np.testing.assert_allclose(grads[i].kernel, wanted, rtol=1e-9, atol=1e-9 * np.abs(wanted).max())
    first = golden()["output/pairwise_grad/linear.7.weight"].reshape(24, 8, 4, 4).transpose(0, 2, 3, 1)
    for i, wanted in ((4, first.reshape(24, -1)), (5, golden()["output/pairwise_grad/linear.9.weight"])):
        np.testing.assert_allclose(grads[i].matrix, wanted, rtol=1e-9, atol=1e-9 * np.abs(wanted).max())


def on_host(tree):
    return jax.tree.map(np.asarray, tree)


def test_proved_constants_of_the_golden_network():
    pairwise, report = bounds.liplt_bound(on_host(golden_operators()))
    exact = golden()
    excess = off_diagonal(pairwise) / off_diagonal(exact["output/liplt_pairwise_exact"]) - 1
    assert (excess >= 0).all() and (excess < 1e-6).all()
    rows = np.array([row.bound for row in report.layers]) / exact["output/liplt_m_exact"] - 1
    assert (rows > -1e-13).all() and (rows < 1e-6).all()
    assert 0 <= report.total / exact["output/liplt_global_exact"] - 1 < 1e-6
    assert 0 <= report.product / exact["output/naive_global_exact"] - 1 < 1e-6
    excess = report.per_class / exact["output/liplt_per_class_exact"] - 1
    assert (excess > -1e-13).all() and (excess < 1e-6).all()
    assert len(report.chains) == 10 and all(row.bound <= row.product for row in report.layers)
    assert (np.diag(pairwise) == 0).all() and (pairwise == pairwise.T).all()


# --- dense oracles ---


def dense(ops):
    """The matrix of operators in turn, from the images of unit vectors."""
    ops = jax.tree.map(jnp.asarray, ops)
    size = int(np.prod(ops[0].in_shape))
    x = jnp.eye(size).reshape(size, *ops[0].in_shape)
    for op in ops:
        x = op(x)
    return np.asarray(x).reshape(size, -1).T


def norm(matrix):
    return np.linalg.norm(matrix, 2)


def oracle(matrices, slopes):
    """m_1, ..., m_L of W_1, phi, W_2, ..., W_L by its definition: specs of LipLT, dense."""
    a = [abs(sum(s)) / 2 for s in slopes]
    b = [(s[1] - s[0]) / 2 for s in slopes]
    constants = []
    for k in range(len(matrices)):
        chain = lambda j, k=k: functools.reduce(lambda m, w: w @ m, matrices[j : k + 1])  # noqa: E731
        total = np.prod(a[:k]) * norm(chain(0))
        for j in range(1, k + 1):
            total += b[j - 1] * np.prod(a[j:k]) * norm(chain(j)) * constants[j - 1]
        constants.append(total)
    return constants


def random_mlp(seed, widths):
    rng = np.random.default_rng(seed)
    return [Dense(rng.normal(size=(n, m)) / np.sqrt(m)) for m, n in itertools.pairwise(widths)]


SLOPES = [(0.0, 1.0), (0.1, 1.0), (-0.5, 1.5), (0.0, 0.25), (-1.0, 0.5), (0.7, 0.7)]


@pytest.mark.parametrize("slope", SLOPES)
def test_dense_networks_have_the_constants_of_the_definition(slope):
    operators = random_mlp(1, (7, 9, 8, 6, 4))
    wanted = oracle([op.matrix for op in operators], [slope] * 3)
    pairwise, report = bounds.liplt_bound(operators, slope)
    naive = np.cumprod([norm(op.matrix) for op in operators]) * max(map(abs, slope)) ** np.arange(4)
    for row, m, product in zip(report.layers, wanted, naive, strict=False):
        assert -1e-13 <= row.bound / min(m, product) - 1 < 1e-6
    # the outputs' constants are also bounded by the last layer's norms alone, and never exceed the product
    assert report.total <= min(wanted[-1], naive[-1]) * (1 + 1e-6)
    jax_ops = jax.tree.map(jnp.asarray, operators)
    vectors = bounds.liplt_vectors(jax_ops, jax.random.key(0), slope)
    low, found = estimate(jax_ops, vectors, 500, slope)
    np.testing.assert_allclose(found.constants, wanted[:-1], rtol=1e-6)
    np.testing.assert_allclose(found.total, wanted[-1], rtol=1e-6)
    assert (off_diagonal(pairwise) <= off_diagonal(low) * (1 + 1e-5)).all()


def test_gains_over_products_for_relu_and_none_for_abs():
    gains = {}
    for slope in ((0.0, 1.0), (-1.0, 1.0)):
        _, report = bounds.liplt_bound(random_mlp(2, (20,) * 9), slope)
        gains[slope] = report.product / report.total
    assert gains[0.0, 1.0] > 3
    assert gains[-1.0, 1.0] == pytest.approx(1, abs=1e-6)


def test_slopes_may_differ_from_place_to_place():
    operators, slopes = random_mlp(3, (5, 6, 7, 4)), [(0.0, 1.0), (0.2, 0.9)]
    wanted = oracle([op.matrix for op in operators], slopes)
    _, report = bounds.liplt_bound(operators, slopes)
    assert report.layers[1].bound == pytest.approx(wanted[1], rel=1e-6)
    activations = [LeakyReLU((6,), 0.0), Tanh((7,))]
    _, other = bounds.liplt_bound([operators[0], activations[0], operators[1], activations[1], operators[2]])
    _, same = bounds.liplt_bound(operators)
    assert other.total == same.total < report.total * 2


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_sampled_slopes_stay_below_and_products_above(activation):
    operators = jax.tree.map(jnp.asarray, random_mlp(4, (6, 10, 10, 5)))
    function = {"relu": jax.nn.relu, "tanh": jnp.tanh}[activation]

    def apply(x):
        for op in operators[:-1]:
            x = function(op.matrix @ x)
        return operators[-1].matrix @ x

    points = 3 * jax.random.normal(jax.random.key(0), (300, 6))
    jacobians = np.asarray(jax.jit(jax.vmap(jax.jacobian(apply)))(points))
    pairwise, report = bounds.liplt_bound(on_host(operators))
    sampled = np.linalg.norm(jacobians, axis=(1, 2), ord=2).max()
    assert 0.1 * report.total < sampled <= report.total < report.product
    differences = np.linalg.norm(jacobians[:, :, None] - jacobians[:, None], axis=3).max(axis=0)
    assert (off_diagonal(differences) <= off_diagonal(pairwise)).all()
    assert (pairwise <= report.per_class[:, None] + report.per_class + 1e-6).all()


# --- convolutions: every kind of composition ---

CHAINS = {
    "strides": [
        Conv(np.ones((3, 3, 2, 3)), (8, 7, 2), 1, ONE),
        Conv(np.ones((4, 4, 3, 4)), (8, 7, 3), (2, 1), ONE),
        Conv(np.ones((2, 3, 4, 2)), (4, 6, 4), 2, "VALID"),
    ],
    "circular": [
        Conv(np.ones((3, 3, 2, 3)), (8, 8, 2), 2, "CIRCULAR"),
        Conv(np.ones((5, 3, 3, 3)), (4, 4, 3), 1, "CIRCULAR"),
        Conv(np.ones((3, 2, 3, 2)), (4, 4, 3), 2, "CIRCULAR"),
    ],
    "mixed": [
        Conv(np.ones((3, 3, 2, 3)), (8, 8, 2), 1, "CIRCULAR"),
        Conv(np.ones((3, 3, 3, 2)), (8, 8, 3), 2, "ZERO"),
        Conv(np.ones((5, 5, 2, 2)), (4, 4, 2), 1, "CIRCULAR"),
    ],
    "reordered": [
        Conv(np.ones((3, 3, 2, 3)), (4, 6, 2), 1, ONE),
        SpaceToDepth((4, 6, 3), 2),
        PadChannels((2, 3, 12), 14),
        Conv(np.ones((1, 3, 14, 5)), (2, 3, 14), 1, "ZERO"),
        CropChannels((2, 3, 5), 3),
    ],
}


def randomised(ops, seed):
    rng = np.random.default_rng(seed)
    return [
        Conv(rng.normal(size=op.kernel.shape), op.in_shape, op.strides, op.padding) if isinstance(op, Conv) else op
        for op in ops
    ]


def host_maps(ops):
    return [_host_map.host_map(op, op.bound().value) for op in ops]


@pytest.mark.parametrize("name", CHAINS)
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


@pytest.mark.parametrize("name", CHAINS)
def test_compositions_are_bounded_by_what_they_are(name):
    ops = randomised(CHAINS[name], 6)
    exact = norm(dense(ops))
    found = _chains.composition_bound(host_maps(ops))
    assert exact <= found.value <= exact * (1 + 1e-8)
    backwards = _chains.composition_bound([m.transposed for m in reversed(host_maps(ops))])
    assert backwards.value == pytest.approx(exact, rel=1e-8)
    assert _chains.lower_estimate(host_maps(ops), 400) == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("name", ["strides", "reordered"])
def test_banded_gram_matrices_give_the_same(name, monkeypatch):
    monkeypatch.setattr(_chains, "_DENSE_ENTRIES", 0)
    ops = randomised(CHAINS[name], 7)
    exact = norm(dense(ops))
    found = _chains.composition_bound(host_maps(ops))
    assert "banded" in found.method
    assert exact <= found.value <= exact * (1 + 1e-4)


def test_banded_factorisations_refuse_a_shift_below_the_norm():
    tall = [Conv(np.ones((3, 3, 2, 2)), (12, 3, 2), 1, ONE), Conv(np.ones((3, 3, 2, 2)), (12, 3, 2), 1, ONE)]
    maps = host_maps(randomised(tall, 8))
    band = _chains._half_band(maps)
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
    assert _chains._verify_banded(blocks, 12, band, top * (1 - 1e-9)) is None
    assert 0 < _chains._verify_banded(blocks, 12, band, top * (1 + 1e-9)) < 1e-9 * top


def test_composed_circular_kernels_give_the_norm():
    ops = randomised(CHAINS["circular"], 9)
    exact = norm(dense(ops))
    found = _chains.circular_bound(ops)
    assert exact <= found.value <= exact * (1 + 1e-6)
    chain = [*ops, Flatten((2, 2, 2)), Dense(np.eye(3, 8))]
    _, report = bounds.liplt_bound(chain)
    assert any("composed circular kernel" in row.method for row in report.chains)


def test_a_composed_zero_padded_chain_is_not_its_symbol():
    # the first takes the image apart to the right, the second to the left: around a circle they cancel
    right, left = np.zeros((1, 3, 1, 1)), np.zeros((1, 3, 1, 1))
    right[0, :, 0, 0], left[0, :, 0, 0] = (0, 1, 1), (1, -1, 0)
    ops = [Conv(right, (1, 6, 1)), Conv(left, (1, 6, 1))]
    exact = norm(dense(ops))
    symbol = bounds.spectral.conv_norm_bound(_chains._composed(right, left, (1, 1)), (1, 6, 1), 1, "CIRCULAR").value
    found = _chains.composition_bound(host_maps(ops))
    assert exact <= found.value <= exact * (1 + 1e-9)
    assert abs(symbol - exact) > 1e-3


def test_whole_networks_with_convolutions(key):
    ops = randomised(CHAINS["strides"], 10)
    ops = [*ops, Flatten(ops[-1].out_shape), Dense(np.random.default_rng(1).normal(size=(4, 8)))]
    stages = [[ops[0]], [ops[1]], [ops[2], ops[3]], [ops[4]]]
    wanted = oracle([dense(stage) for stage in stages], [(0.0, 1.0)] * 3)
    pairwise, report = bounds.liplt_bound(ops)
    naive = np.cumprod([norm(dense(stage)) for stage in stages])
    for row, m, product in zip(report.layers, wanted, naive, strict=False):
        assert -1e-13 <= row.bound / min(m, product) - 1 < 1e-6
    assert report.total == pytest.approx(min(wanted[-1], naive[-1]), rel=1e-6)
    jax_ops = jax.tree.map(jnp.asarray, ops)
    low, found = estimate(jax_ops, bounds.liplt_vectors(jax_ops, key), 800)
    np.testing.assert_allclose(found.constants, wanted[:-1], rtol=1e-4)
    rows = ops[-1].matrix
    products = naive[-2] * np.linalg.norm(rows[:, None] - rows, axis=2)
    assert (off_diagonal(np.minimum(low, products)) <= off_diagonal(pairwise) * (1 + 1e-9)).all()


def test_too_large_compositions_fall_back_to_products_and_say_how_loose(monkeypatch):
    monkeypatch.setattr(_chains, "_DENSE_ENTRIES", 0)
    monkeypatch.setattr(_chains, "_BANDED_ENTRIES", 0)
    operators = random_mlp(11, (6, 7, 8, 5))
    _, report = bounds.liplt_bound(operators)
    loose = [row for row in report.chains if row.method.startswith("product")]
    assert loose
    for row in loose:
        first = 0 if row.start == "input" else 1
        count = [layer.name for layer in report.layers].index(row.end) + 1
        exact = norm(functools.reduce(lambda m, op: op.matrix @ m, operators[first:count], np.eye(6 + first)))
        assert row.details["estimate"] == pytest.approx(exact, rel=1e-2) and exact <= row.bound
    assert report.total <= report.product * (1 + 1e-9)


def test_operators_that_are_not_composed_count_by_their_bounds():
    rng = np.random.default_rng(12)
    kernel = rng.normal(size=(3, 3, 2, 2)) / 8
    kernel = (kernel - np.flip(kernel, (0, 1)).swapaxes(2, 3)) / 2
    ops = [ConvExponential(kernel, (4, 4, 2), 5), ReLU((4, 4, 2)), Flatten((4, 4, 2)), Dense(rng.normal(size=(3, 32)))]
    pairwise, report = bounds.liplt_bound(ops)
    assert report.total == pytest.approx(norm(ops[-1].matrix) * ops[0].bound().value, rel=1e-6)
    assert np.isfinite(pairwise).all() and pairwise[0, 1] > 0


def test_huge_and_tiny_entries_are_not_composed_but_bounded():
    operators = random_mlp(13, (4, 5, 3))
    scaled = [Dense(operators[0].matrix * 2.0**300), Dense(operators[1].matrix * 2.0**-290)]
    _, report = bounds.liplt_bound(scaled)
    _, plain = bounds.liplt_bound(operators)
    assert plain.total * 2.0**10 <= report.total <= plain.product * 2.0**10 * (1 + 1e-6)


# --- residual blocks ---


def random_blocks(seed, count, width, skip=True):
    rng = np.random.default_rng(seed)
    make = lambda m, n: Dense(rng.normal(size=(n, m)) / np.sqrt(m))  # noqa: E731
    return [
        ResidualBlock((make(width, width + 1),), (make(width + 1, width),), (make(width, width),) if skip else None)
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


@pytest.mark.parametrize("skip", [True, False])
def test_residual_blocks_have_the_constants_of_the_definition(skip):
    blocks = random_blocks(14, 4, 6, skip)
    wanted = residual_oracle(blocks)
    _, report = bounds.liplt_bound(blocks)
    for row, n in zip(report.layers, wanted, strict=False):
        assert row.bound <= n * (1 + 1e-6)
        assert row.bound <= row.product * (1 + 1e-12)
    assert report.layers[0].bound == pytest.approx(wanted[0], rel=1e-6)
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
    block = ResidualBlock((Dense(w),), (Dense(g),), (), (0.0, 1.0))
    _, report = bounds.liplt_bound([block])
    assert report.total == pytest.approx(norm(np.eye(4) + g @ w / 2) + norm(g) * norm(w) / 2, rel=1e-6)


def test_maps_between_blocks_and_convolutions_in_them():
    rng = np.random.default_rng(16)
    first = Conv(rng.normal(size=(3, 3, 1, 2)) / 3, (4, 4, 1))
    inner, outer = (Conv(rng.normal(size=(3, 3, 2, 2)) / 4, (4, 4, 2)) for _ in range(2))
    ops = [first, ResidualBlock((inner,), (outer,)), Flatten((4, 4, 2)), Dense(rng.normal(size=(3, 32)) / 6)]
    linear = np.eye(32) + dense([inner, outer]) / 2
    m = norm(dense([first, inner]))
    wanted = norm(ops[3].matrix @ linear @ dense([first])) + norm(ops[3].matrix @ dense([outer])) * m / 2
    pairwise, report = bounds.liplt_bound(ops)
    assert report.total == pytest.approx(wanted, rel=1e-6)
    jax_ops = jax.tree.map(jnp.asarray, ops)
    low, found = estimate(jax_ops, bounds.liplt_vectors(jax_ops, jax.random.key(2)), 1000)
    assert found.total == pytest.approx(wanted, rel=1e-4)
    np.testing.assert_allclose(off_diagonal(low), off_diagonal(pairwise), rtol=1e-4)


# --- refusals ---


def test_what_is_refused_is_named():
    first, second = random_mlp(17, (4, 6, 3))
    with pytest.raises(NotCertifiable, match=r"operators\[1\] \(MaxMin\).*product of norms"):
        bounds.liplt_bound([first, MaxMin((6,)), second])
    with pytest.raises(ValueError, match=r"before operators\[1\].*alpha <= beta, got \(1.0, 0.0\)"):
        bounds.liplt_bound([first, second], (1.0, 0.0))
    with pytest.raises(ValueError, match="alpha <= beta"):
        bounds.liplt_bound([first, second], (0.0, np.inf))
    with pytest.raises(ValueError, match=r"operators\[1\] \(Dense\).*shape \(6,\), got one on \(5,\)"):
        bounds.liplt_bound([first, Dense(np.ones((3, 5)))])
    with pytest.raises(ValueError, match="got none"):
        bounds.liplt_bound([])
    with pytest.raises(ValueError, match="one between every two maps"):
        bounds.liplt_bound([first, second], [(0.0, 1.0), (0.0, 1.0)])
    with pytest.raises(ValueError, match="the skip connection gives another shape"):
        bounds.liplt_bound([ResidualBlock((first,), (second,), ())])
    with pytest.raises(ValueError, match="at least one linear operator"):
        bounds.liplt_bound([ResidualBlock((), (), ())])
    with pytest.raises(NotCertifiable, match=r"operators\[1\] \(Dense\).*NaN"):
        bounds.liplt_bound([first, Dense(np.full((3, 6), np.nan))])
    with pytest.raises(ValueError, match="num_iters >= 0"):
        jax_ops = jax.tree.map(jnp.asarray, [first, second])
        bounds.liplt_estimate(jax_ops, bounds.liplt_vectors(jax_ops, jax.random.key(0)), -1)


# --- networks ---


def relu_network(std=1.0, head=None):
    first, second, third = jax.tree.map(jnp.asarray, random_mlp(18, (6, 8, 7, 4)))
    named = [
        ("one", first),
        ("one/bias", Bias(jnp.ones(8), (8,))),
        ("one/relu", ReLU((8,))),
        ("two", second),
        ("two/relu", ReLU((7,))),
    ]
    return network.make_network(named, head or LinearHead(third.matrix, jnp.zeros(4)), input_std=std)


def test_networks_take_their_own_activations_and_normalisation(key):
    net = relu_network(0.5)
    assert bounds.has_liplt(net)
    low, vectors = jax.jit(bounds.margin_liplt_estimate, static_argnums=2)(
        net, bounds.init_liplt_vectors(net, key), 500
    )
    proved, report = bounds.margin_liplt_bound(on_host(net))
    product = bounds.margin_lipschitz_bound(on_host(net))
    np.testing.assert_allclose(off_diagonal(proved), off_diagonal(low), rtol=1e-6)
    assert (off_diagonal(proved) >= off_diagonal(low)).all()
    assert (off_diagonal(proved) < 0.9 * off_diagonal(product)).all()
    assert [row.name for row in report.layers] == ["one/relu", "two/relu"]
    plain, _ = bounds.liplt_bound(random_mlp(18, (6, 8, 7, 4)))
    np.testing.assert_allclose(off_diagonal(proved), 2 * off_diagonal(plain), rtol=1e-12)
    assert set(vectors) == {"0", "1"}


def test_networks_that_liplt_does_not_take(key):
    first, second = jax.tree.map(jnp.asarray, random_mlp(19, (6, 8, 4)))
    pairs = network.make_network([("one", first), ("maxmin", MaxMin((8,)))], LinearHead(second.matrix, jnp.zeros(4)))
    assert not bounds.has_liplt(pairs)
    with pytest.raises(NotCertifiable, match="maxmin"):
        bounds.init_liplt_vectors(pairs, key)
    mlp = MLPHead(jnp.ones((5, 7)), jnp.zeros(5), jnp.ones((3, 5)), jnp.zeros(3))
    assert not bounds.has_liplt(relu_network(head=mlp))
    with pytest.raises(NotCertifiable, match="head"):
        bounds.margin_liplt_bound(relu_network(head=mlp))
    linear = network.make_network([("one", first)], LinearHead(second.matrix, jnp.zeros(4)))
    assert not bounds.has_liplt(linear)


def test_sweeps_cost_as_many_operator_calls_as_there_are_operators():
    operators = jax.tree.map(jnp.asarray, random_mlp(20, (5, 6, 7, 8, 4)))
    path = _liplt_path.make_path([(str(i), op) for i, op in enumerate(operators)])
    vectors = _liplt.init_vectors(path, jax.random.key(0), jnp.float64)
    sweep = jax.make_jaxpr(lambda v: _liplt._chain_images(path, v))([vectors[str(s)] for s in range(3)])
    assert str(sweep).count("dot_general") == 3  # the last operator's rows are exact


def test_frozen_networks_certify_by_the_least_of_both():
    frozen = FrozenNetwork(on_host(relu_network()))
    product = bounds.margin_lipschitz_bound(frozen.network)
    liplt, _ = bounds.margin_liplt_bound(frozen.network)
    assert np.array_equal(frozen.margin_lipschitz(), np.minimum(product, liplt))
    assert (off_diagonal(frozen.margin_lipschitz()) < 0.9 * off_diagonal(product)).all()
    images = np.random.default_rng(0).uniform(size=(20, 6))
    found = frozen.certify(images)
    by_product = certify.radius_of(found.margins, product[found.predictions, found.rivals])
    assert (found.radii > 1.1 * by_product).all()
    document = json.loads(json.dumps(certify.liplt_rows(frozen.liplt_report())))
    assert [row["name"] for row in document["layers"]] == ["one/relu", "two/relu"]
    assert len(document["chains"]) == 3 and len(document["per_class"]) == 4
    pairs = network.make_network([("maxmin", MaxMin((6,)))], LinearHead(jnp.ones((2, 6)), jnp.zeros(2)))
    assert FrozenNetwork(on_host(pairs)).liplt_report() is None and certify.liplt_rows(None) is None


# --- what a review found ---


@pytest.mark.parametrize("max_rows", [100, 0])
@pytest.mark.parametrize("after", [0, 1])
def test_a_block_at_the_end_with_a_small_outer_map(max_rows, after):
    # x + relu(x) / 10: the rows at the block's output count, not those at its activation
    block = ResidualBlock((Dense(np.eye(2)),), (Dense(np.eye(2) / 10),), ())
    pairwise, report = bounds.liplt_bound([block] + [Dense(np.eye(2))] * after, max_rows=max_rows)
    assert 1.1 <= report.total <= 1.1 * (1 + 1e-9)
    assert 1.1 * np.sqrt(2) * (1 - 1e-15) <= pairwise[0, 1] <= 1.1 * np.sqrt(2) * (1 + 1e-7)
    assert (report.per_class >= 1.1 - 1e-15).all()


def scalings(*exponents, padding="ZERO"):
    return [Conv(np.full((1, 1, 1, 1), 2.0**e), (4, 4, 1), 1, padding) for e in exponents]


@pytest.mark.parametrize("entries", [_chains._DENSE_ENTRIES, 0], ids=["dense", "banded"])
@pytest.mark.parametrize("exponents", [(-100,) * 6, (-100,) * 5 + (-35,), (-99,) * 11, (-100,) * 11 + (100,) * 3])
def test_numbers_that_underflow_on_the_way_are_covered(entries, exponents, monkeypatch):
    monkeypatch.setattr(_chains, "_DENSE_ENTRIES", entries)
    found = _chains.composition_bound(host_maps(scalings(*exponents)))
    assert found.value >= 2.0 ** max(sum(exponents), -1074)
    assert _chains.circular_bound(scalings(*exponents, padding="CIRCULAR")).value >= 2.0 ** max(sum(exponents), -1074)
    _, report = bounds.liplt_bound([Dense(np.full((1, 1), 2.0**e)) for e in exponents], (1.0, 1.0))
    assert report.total >= 2.0 ** max(sum(exponents), -1074)


@pytest.mark.parametrize("entries", [_chains._DENSE_ENTRIES, 0], ids=["dense", "banded"])
def test_numbers_that_overflow_on_the_way_have_no_proof(entries, monkeypatch):
    monkeypatch.setattr(_chains, "_DENSE_ENTRIES", entries)
    for exponents in ((99,) * 6, (99,) * 11):
        try:
            assert _chains.composition_bound(host_maps(scalings(*exponents))).value >= 2.0 ** sum(exponents)
        except (NotCertifiable, OverflowError) as error:
            assert isinstance(error, NotCertifiable)
    rng = np.random.default_rng(21)
    convolution = Conv(rng.normal(size=(1, 1, 1, 1)), (2, 2, 1))
    huge = [Dense(rng.normal(size=(4, 4)) * 2.0**95) for _ in range(6)]
    pairwise, report = bounds.liplt_bound([convolution, Flatten((2, 2, 1)), *huge])  # |row|^2 overflows
    assert (off_diagonal(pairwise) > 1e150).all() and 1e150 < report.total <= report.product


def test_blas_keeps_its_threads():
    limits = [library["num_threads"] for library in threadpoolctl.threadpool_info()]
    for _ in range(3):
        bounds.liplt_bound(random_mlp(22, (30,) * 6))
    assert [library["num_threads"] for library in threadpoolctl.threadpool_info()] == limits


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
    monkeypatch.setattr(_chains, "_DENSE_ENTRIES", 0)
    rng, shape, ops = np.random.default_rng(23), (9, 3, 1), []
    for kernel, strides, padding in geometry:
        ops.append(Conv(rng.normal(size=(*kernel, shape[2], 2)), shape, strides, padding))
        shape = ops[-1].out_shape
    maps = host_maps(ops)
    x = np.eye(27).reshape(27, 9, 3, 1)
    for m in maps:
        x = m.apply(x)
    exact = norm(x.reshape(27, -1))
    found = _chains.composition_bound(maps)
    assert "banded" in found.method and exact <= found.value <= exact * (1 + 1e-4)
    # nothing outside of the band
    matrix = x.reshape(27, -1).T
    if matrix.shape[0] > matrix.shape[1]:
        maps, matrix = [m.transposed for m in reversed(maps)], matrix.T
    rows = maps[-1].out_shape[0]
    gram = np.abs(matrix @ matrix.T).reshape(rows, len(matrix) // rows, rows, -1).max(axis=(1, 3))
    assert max(abs(i - j) for i, j in np.argwhere(gram > 0)) <= _chains._half_band(maps)


def test_bad_parts_are_named():
    good = Dense(np.ones((2, 3)))
    for bad, message in (
        (Dense(np.ones(3)), "matrix"),
        (Conv(np.ones((9, 9, 1, 1)), (4, 4, 1), 1, "VALID"), "does not fit"),
        (Conv(np.ones((3, 3, 1, 1)), (4, 4, 1), 1, "SAME"), "padding"),
        (Bias(np.ones(7), (2,)), "bias"),
        (Dense(1j * np.ones((2, 2))), "complex128"),
        (Dense(np.ones((2, 2), np.longdouble)), "at most 64 bits"),
    ):
        with pytest.raises(ValueError, match=rf"operators\[1\] \({type(bad).__name__}\).*{message}"):
            bounds.liplt_bound([good, bad])
    with pytest.raises(ValueError, match="expected slopes|Expected a slope"):
        bounds.liplt_bound([good, Dense(np.ones((2, 2)))], 0.5)


def test_linear_networks_are_bounded_by_their_rows(key):
    operators = random_mlp(24, (4, 3))
    jax_ops = jax.tree.map(jnp.asarray, operators)
    low, found = estimate(jax_ops, bounds.liplt_vectors(jax_ops, key), 2)
    pairwise, report = bounds.liplt_bound(operators)
    np.testing.assert_allclose(off_diagonal(low), off_diagonal(pairwise), rtol=1e-7)
    assert report.total == pytest.approx(norm(operators[0].matrix), rel=1e-9) == found.total
