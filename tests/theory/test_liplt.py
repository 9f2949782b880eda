"""LipLT against dense oracles and sampled slopes; its refusals."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import threadpoolctl
from liplt_helpers import CHAINS, dense, estimate, norm, off_diagonal, on_host, randomised
from tiers import everyday

from lipjax import FrozenNetwork, bounds, network
from lipjax.bounds import chains, liplt_path, sweeps
from lipjax.bounds.liplt_path import Block
from lipjax.certify import certificate
from lipjax.errors import NotCertifiable
from lipjax.operators import (
    Bias,
    Conv,
    ConvExponential,
    Dense,
    Flatten,
    LeakyReLU,
    LinearHead,
    MaxMin,
    MLPHead,
    ReLU,
    Tanh,
)

pytestmark = pytest.mark.quick_compiles


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


@pytest.mark.parametrize(("slope",), everyday([(slope,) for slope in SLOPES], (SLOPES[2],)))
def test_dense_networks_have_the_constants_of_the_definition(slope):
    operators = random_mlp(1, (7, 9, 8, 6, 4))
    wanted = oracle([op.matrix for op in operators], [slope] * 3)
    pairwise, report = bounds.liplt_bound(operators, slope)
    naive = np.cumprod([norm(op.matrix) for op in operators]) * max(map(abs, slope)) ** np.arange(4)
    for row, m, product in zip(report.layers, wanted, naive, strict=False):
        assert -1e-13 <= row.claimed / min(m, product) - 1 < 1e-6
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


def test_chains_that_no_constant_reads_are_not_composed(monkeypatch):
    """Slopes between -b and b have the linear part 0: of the chains across such an activation nothing is needed."""
    composed, original = [], chains.composition_bound
    monkeypatch.setattr(chains, "composition_bound", lambda maps: composed.append(len(maps)) or original(maps))
    operators, counts = random_mlp(2, (6,) * 5), {}
    for slope in ((-1.0, 1.0), (-1.0, 0.5)):
        composed.clear()
        _, report = bounds.liplt_bound(operators, slope)
        counts[slope] = len(composed)
        wanted = oracle([op.matrix for op in operators], [slope] * 3)
        np.testing.assert_allclose([row.claimed for row in report.layers], wanted[:-1], rtol=1e-6)
        assert len(report.chains) == 6  # all of them are stated, and bound what they are of
        norms = np.cumprod([norm(op.matrix) for op in operators[:3]])
        assert all(row.claimed <= norms[-1] * (1 + 1e-6) for row in report.chains if row.start == "input")
    assert counts == {(-1.0, 1.0): 0, (-1.0, 0.5): 3}


def test_slopes_may_differ_from_place_to_place():
    operators, slopes = random_mlp(3, (5, 6, 7, 4)), [(0.0, 1.0), (0.2, 0.9)]
    wanted = oracle([op.matrix for op in operators], slopes)
    _, report = bounds.liplt_bound(operators, slopes)
    assert report.layers[1].claimed == pytest.approx(wanted[1], rel=1e-6)
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


def test_whole_networks_with_convolutions(key):
    ops = randomised(CHAINS["strides"], 10)
    ops = [*ops, Flatten(ops[-1].out_shape), Dense(np.random.default_rng(1).normal(size=(4, 8)))]
    stages = [[ops[0]], [ops[1]], [ops[2], ops[3]], [ops[4]]]
    wanted = oracle([dense(stage) for stage in stages], [(0.0, 1.0)] * 3)
    pairwise, report = bounds.liplt_bound(ops)
    naive = np.cumprod([norm(dense(stage)) for stage in stages])
    for row, m, product in zip(report.layers, wanted, naive, strict=False):
        assert -1e-13 <= row.claimed / min(m, product) - 1 < 1e-6
    assert report.total == pytest.approx(min(wanted[-1], naive[-1]), rel=1e-6)
    jax_ops = jax.tree.map(jnp.asarray, ops)
    low, found = estimate(jax_ops, bounds.liplt_vectors(jax_ops, key), 800)
    np.testing.assert_allclose(found.constants, wanted[:-1], rtol=1e-4)
    rows = ops[-1].matrix
    products = naive[-2] * np.linalg.norm(rows[:, None] - rows, axis=2)
    assert (off_diagonal(np.minimum(low, products)) <= off_diagonal(pairwise) * (1 + 1e-9)).all()


def test_too_large_compositions_fall_back_to_products_and_say_how_loose(monkeypatch):
    monkeypatch.setattr(chains, "_DENSE_ENTRIES", 0)
    monkeypatch.setattr(chains, "_BANDED_ENTRIES", 0)
    operators = random_mlp(11, (6, 7, 8, 5))
    _, report = bounds.liplt_bound(operators)
    loose = [row for row in report.chains if row.method.startswith("product")]
    assert loose
    for row in loose:
        first = 0 if row.start == "input" else 1
        count = [layer.name for layer in report.layers].index(row.end) + 1
        exact = norm(functools.reduce(lambda m, op: op.matrix @ m, operators[first:count], np.eye(6 + first)))
        assert row.details["estimate"] == pytest.approx(exact, rel=1e-2) and exact <= row.claimed
    assert report.total <= report.product * (1 + 1e-9)


def test_operators_that_are_not_composed_count_by_their_bounds():
    rng = np.random.default_rng(12)
    kernel = rng.normal(size=(3, 3, 2, 2)) / 8
    kernel = (kernel - np.flip(kernel, (0, 1)).swapaxes(2, 3)) / 2
    ops = [ConvExponential(kernel, (4, 4, 2), 5), ReLU((4, 4, 2)), Flatten((4, 4, 2)), Dense(rng.normal(size=(3, 32)))]
    pairwise, report = bounds.liplt_bound(ops)
    assert report.total == pytest.approx(norm(ops[-1].matrix) * ops[0].bound().proved, rel=1e-6)
    assert np.isfinite(pairwise).all() and pairwise[0, 1] > 0


def test_huge_and_tiny_entries_are_not_composed_but_bounded():
    operators = random_mlp(13, (4, 5, 3))
    scaled = [Dense(operators[0].matrix * 2.0**300), Dense(operators[1].matrix * 2.0**-290)]
    _, report = bounds.liplt_bound(scaled)
    _, plain = bounds.liplt_bound(operators)
    assert plain.total * 2.0**10 <= report.total <= plain.product * 2.0**10 * (1 + 1e-6)


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
        bounds.liplt_bound([Block((first,), (second,), ())])
    with pytest.raises(ValueError, match="at least one linear operator"):
        bounds.liplt_bound([Block((), (), ())])
    with pytest.raises(NotCertifiable, match=r"operators\[1\] \(Dense\).*NaN"):
        bounds.liplt_bound([first, Dense(np.full((3, 6), np.nan))])
    with pytest.raises(ValueError, match="num_iters >= 0"):
        jax_ops = jax.tree.map(jnp.asarray, [first, second])
        bounds.liplt_estimate(jax_ops, bounds.liplt_vectors(jax_ops, jax.random.key(0)), -1)


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
    path = liplt_path.make_path([(str(i), op) for i, op in enumerate(operators)])
    vectors = sweeps.init_vectors(path, jax.random.key(0), jnp.float64)
    sweep = jax.make_jaxpr(lambda v: sweeps._chain_images(path, v))([vectors[str(s)] for s in range(3)])
    assert str(sweep).count("dot_general") == 3  # the last operator's rows are exact


def test_frozen_networks_certify_by_the_least_of_both():
    frozen = FrozenNetwork(on_host(relu_network()))
    product = bounds.margin_lipschitz_bound(frozen.network)
    liplt, _ = bounds.margin_liplt_bound(frozen.network)
    assert np.array_equal(frozen.margin_lipschitz(), np.minimum(product, liplt))
    assert (off_diagonal(frozen.margin_lipschitz()) < 0.9 * off_diagonal(product)).all()
    images = np.random.default_rng(0).uniform(size=(20, 6))
    found = frozen.certify(images)
    by_product = certificate.radius_of(found.margins, product[found.predictions, found.rivals])
    assert (found.radii > 1.1 * by_product).all()
    document = json.loads(json.dumps(certificate.liplt_rows(frozen.liplt_report())))
    assert [row["name"] for row in document["layers"]] == ["one/relu", "two/relu"]
    assert len(document["chains"]) == 3 and len(frozen.liplt_report().per_class) == 4
    pairs = network.make_network([("maxmin", MaxMin((6,)))], LinearHead(jnp.ones((2, 6)), jnp.zeros(2)))
    assert FrozenNetwork(on_host(pairs)).liplt_report() is None and certificate.liplt_rows(None) is None


def test_blas_keeps_its_threads():
    limits = [library["num_threads"] for library in threadpoolctl.threadpool_info()]
    for _ in range(3):
        bounds.liplt_bound(random_mlp(22, (30,) * 6))
    assert [library["num_threads"] for library in threadpoolctl.threadpool_info()] == limits


def test_bad_parts_are_named():
    good, image = Dense(np.ones((2, 3))), Conv(np.ones((3, 3, 1, 1)), (4, 4, 1))

    def past_the_constructor(op, array):
        return jax.tree.map(lambda _: array, op)

    for bad, message in (
        (past_the_constructor(good, np.ones(3)), "matrix"),
        (past_the_constructor(Conv(np.ones((3, 3, 1, 1)), (4, 4, 1), 1, "VALID"), np.ones((9, 9, 1, 1))), "not fit"),
        (past_the_constructor(image, np.ones((3, 3, 2, 1))), "HWIO"),
        (past_the_constructor(Bias(np.ones(2), (2,)), np.ones(7)), "bias"),
        (Dense(1j * np.ones((2, 2))), "complex128"),
        (Dense(np.ones((2, 2), np.longdouble)), "at most 64 bits"),
        (np.ones((2, 2)), r"plain ndarray of shape \(2, 2\).*operators\.Dense"),
        (jnp.ones((2, 2)), r"plain .* of shape \(2, 2\).*operators\.Dense"),
        ([[1.0, 2.0], [3.0, 4.0]], r"plain list of shape \(2, 2\)"),
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
