"""Networks: the forward pass against a plain loop, what does not fit together, and L from norms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lipjax import bounds, operators
from lipjax.certify import certificate
from lipjax.network import make_network

pytestmark = pytest.mark.quick_compiles


def named_ops(seed=0):
    rng = np.random.default_rng(seed)
    return [
        ("conv", operators.Conv(jnp.asarray(rng.normal(size=(3, 3, 2, 4))), (5, 5, 2), 2)),
        ("bias", operators.Bias(jnp.asarray(rng.normal(size=4)), (3, 3, 4))),
        ("act", operators.MaxMin((3, 3, 4))),
        ("flat", operators.Flatten((3, 3, 4))),
        ("dense", operators.Dense(jnp.asarray(rng.normal(size=(6, 36))))),
    ]


def head(seed=1, classes=4):
    rng = np.random.default_rng(seed)
    return operators.LinearHead(jnp.asarray(rng.normal(size=(classes, 6))), jnp.asarray(rng.normal(size=classes)))


def test_forward_pass(key):
    network = make_network(named_ops(), head(), (0.5, 0.25), (2.0, 4.0))
    assert network.in_shape == (5, 5, 2) and network.num_classes == 4
    x = jax.random.uniform(key, (3, 5, 5, 2))
    y = (np.asarray(x) - np.array([0.5, 0.25])) / np.array([2.0, 4.0])
    conv, bias, _, _, dense = network.ops
    maps = np.asarray(conv(jnp.asarray(y))) + np.asarray(bias.bias)
    maps = np.concatenate([np.maximum(maps[..., :2], maps[..., 2:]), np.minimum(maps[..., :2], maps[..., 2:])], -1)
    logits = maps.reshape(3, -1) @ np.asarray(dense.matrix).T @ np.asarray(network.head.matrix).T
    np.testing.assert_allclose(np.asarray(network(x)), logits + np.asarray(network.head.bias), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(5, 5, 2), (3, 5, 5, 3), (3, 5, 2)])
def test_images_of_another_shape(shape):
    with pytest.raises(ValueError, match="expects images"):
        make_network(named_ops(), head())(jnp.zeros(shape))


def test_parts_that_do_not_fit_are_named():
    ops = named_ops()
    with pytest.raises(ValueError, match="conv gives shape .* but act expects"):
        make_network([ops[0], ("act", operators.MaxMin((3, 3, 6))), *ops[3:]], head())
    with pytest.raises(ValueError, match="unique names"):
        make_network([*ops[:3], ("act", ops[3][1]), ops[4]], head())
    with pytest.raises(ValueError, match="unique names|at least one"):
        make_network([], head())
    with pytest.raises(ValueError, match="input_std"):
        make_network(ops, head(), 0.0, (1.0, 1.0, 1.0))


def dense_norms(network):
    norms = []
    for op in network.ops:
        if hasattr(op, "estimate"):
            size = math.prod(op.in_shape)
            images = op(jnp.eye(size).reshape(size, *op.in_shape))
            norms.append(np.linalg.norm(np.asarray(images).reshape(size, -1), 2))
    return norms


def true_product(network):
    matrix = np.asarray(network.head.matrix)
    distances = np.linalg.norm(matrix[:, None] - matrix[None], axis=2)
    return math.prod(dense_norms(network)) / float(np.min(np.asarray(network.input_std))) * distances


def test_estimate_and_bound_enclose_the_product_of_dense_norms(key):
    network = make_network(named_ops(), head(), 0.0, (0.5, 0.25))
    exact = true_product(network)
    vectors = bounds.init_vectors(network, key)
    assert set(vectors) == {"conv", "dense"}
    assert all(abs(float(jnp.linalg.norm(v)) - 1) < 1e-12 for v in vectors.values())
    low, vectors = bounds.margin_lipschitz_estimate(network, vectors, 1)
    converged, _ = bounds.margin_lipschitz_estimate(network, vectors, 3000)
    proved = bounds.margin_lipschitz_bound(network)
    off = ~np.eye(4, dtype=bool)
    assert (np.asarray(low)[off] < exact[off] * 0.999).all()  # control: an estimate is no bound
    np.testing.assert_allclose(np.asarray(converged)[off], exact[off], rtol=1e-9)
    assert (proved[off] >= exact[off] * (1 - 1e-14)).all() and (proved[off] <= exact[off] * (1 + 1e-9)).all()
    assert (np.diag(proved) == 0).all()


def test_the_gradient_of_the_estimate_is_that_of_the_norms(key):
    """At convergence d sigma / dW = u v^T: against finite differences of the dense SVDs."""
    network = make_network(named_ops(), head())
    _, vectors = bounds.margin_lipschitz_estimate(network, bounds.init_vectors(network, key), 3000)
    direction = jax.tree.map(lambda a: jnp.asarray(np.random.default_rng(a.size).normal(size=a.shape)), network)

    def moved(t):
        return jax.tree.map(lambda a, d: a + t * d, network, direction)

    slope = jax.jvp(lambda t: bounds.margin_lipschitz_estimate(moved(t), vectors, 1)[0][0, 1], (0.0,), (1.0,))[1]
    step = 1e-5
    expected = (true_product(moved(step))[0, 1] - true_product(moved(-step))[0, 1]) / (2 * step)
    assert abs(float(slope) / expected - 1) < 1e-6


def test_vectors_go_without_gradient(key):
    network = make_network(named_ops(), head())
    vectors = bounds.init_vectors(network, key)

    def through_vectors(net):
        return sum(jnp.sum(v) for v in bounds.margin_lipschitz_estimate(net, vectors, 2)[1].values())

    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(jax.grad(through_vectors)(network)))


def test_product_bound_is_rounded_up():
    rows = [bounds.LayerBound(str(i), "Dense", 1 + 2.0**-52, "", {}) for i in range(3)]
    product = bounds.product_bound(rows)
    assert product > 1 + 3 * 2.0**-52 and product <= 1 + 8 * 2.0**-52
    assert bounds.product_bound([bounds.LayerBound("a", "Bias", 1.0, "", {})] * 5) == 1.0
    assert bounds.product_bound([bounds.LayerBound("a", "Dense", 0.0, "", {}), *rows]) == 0.0


def test_rows_in_files_keep_their_keys():
    part = {"type": "Dense", "bound": 2.5, "sigma": 2.0, "method": "m", "details": {}}
    row = bounds.LayerBound("block", "Residual", 3.5, "sum", {"parts": [part]}, 3.0)
    (stated,) = certificate.layer_rows([row], {"block": 1.75})
    assert list(stated) == ["name", "type", "bound", "method", "details", "sigma", "estimate", "gap"]
    assert (stated["bound"], stated["sigma"], stated["gap"]) == (3.5, 3.0, 1.0)
    assert bounds.LayerBound.from_row(stated) == row and row.norms == (3.5, (2.5,)) and row.parts[0].proved == 2.0
    chain = bounds.ChainBound("input", "act", 1.25, "m", {})
    report = bounds.LipLTReport((bounds.LayerConstant("act", 1.5, 2.0),), (chain,), np.ones(2), 1.0, 1.0, "rows")
    assert certificate.liplt_rows(report) == {
        "layers": [{"name": "act", "bound": 1.5, "product": 2.0}],
        "chains": [{"start": "input", "end": "act", "bound": 1.25, "method": "m", "details": {}}],
    }
