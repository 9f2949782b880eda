"""Layers with rescaled channels (AOL) as modules: how they start, train, freeze and certify."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lipjax
from lipjax import NotCertifiable, bounds, losses, operators
from lipjax.nn import AOLConv, AOLDense, LinearHead, LipschitzModel, flatten

SHAPE = (6, 6, 2)


class Net(LipschitzModel):
    """One of each kind."""

    def layers(self):
        rest = [
            AOLConv(4, name="same"),
            AOLConv(6, (1, 3), padding="ZERO", rows="outputs", name="flat_kernel"),
            AOLConv(6, strides=2, padding="ZERO", iterations=2, name="strided"),
        ]
        dense = [AOLDense(8, name="dense"), AOLDense(8, rows="outputs", iterations=2, name="outputs")]
        return [*rest, flatten, *dense], LinearHead(3, name="head")


def build(model, variables, train):
    return model.apply(variables, train, method="build", mutable=["lip"])[0]


@pytest.mark.nightly
@pytest.mark.x64_off
def test_layers_start_as_identities_train_and_are_certified_with_norms_of_at_most_one():
    model = Net(SHAPE, 3)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *SHAPE)))
    first = build(model, variables, False).ops[0]
    x = jnp.asarray(np.random.default_rng(0).uniform(size=(2, *SHAPE)), jnp.float32)
    # One tap of 1 / sqrt(1 + 1e-6), on the channels that there are.
    np.testing.assert_allclose(first(x), np.concatenate([x, 0 * x], axis=-1), atol=1e-6)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.uniform(size=(16, *SHAPE)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 3, 16))
    optimizer = optax.adam(0.02)

    @jax.jit
    def step(params, state):
        def loss(params):
            network = build(model, {"params": params, "lip": variables["lip"]}, True)
            return losses.offset_cross_entropy(network(images), labels, offset=0.3, temperature=0.25).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value, gradient

    params, state, values = variables["params"], optimizer.init(variables["params"]), []
    for _ in range(5):
        params, state, value, gradient = step(params, state)
        values.append(float(value))
    assert values[-1] < values[0]
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(gradient))
    frozen = lipjax.freeze(model, {**variables, "params": params})
    np.testing.assert_allclose(
        frozen(np.asarray(x, np.float64)), model.apply({**variables, "params": params}, x), atol=1e-4
    )
    rows = [row for row in frozen.lipschitz_report() if row.name.endswith("linear")]
    assert len(rows) == 5 and all(0.1 < row.claimed < 1 + 1e-9 for row in rows)
    assert min(row.claimed for row in rows) < 1 - 1e-3  # what a promise would give away
    certificate = frozen.certify(np.asarray(x, np.float64))
    assert certificate.radii.shape == (2,)


def test_a_training_network_counts_one_and_has_no_certificate():
    model = Net(SHAPE, 3)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *SHAPE)))
    network = build(model, variables, True)
    assert bounds.norm_estimates(network, {}, 1)[0] == {}
    with pytest.raises(NotCertifiable, match="same/linear: .* Contraction"):
        bounds.operator_bounds(jax.tree.map(np.asarray, network))
    assert network.names == build(model, variables, False).names
    assert isinstance(network.ops[0], operators.Contraction)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (partial(AOLDense, 4), "AOLDense takes vectors"),
        (partial(AOLConv, 4, rows="both"), "Expected rows to be one of"),
        (partial(AOLConv, 4, iterations=0), "iterations >= 1"),
    ],
)
def test_what_does_not_fit_is_refused(layer, message):
    class Wrong(LipschitzModel):
        def layers(self):
            return [layer(name="layer"), flatten], LinearHead(3, name="head")

    with pytest.raises(ValueError, match=message):
        Wrong(SHAPE, 3).init(jax.random.key(0), jnp.zeros((1, *SHAPE)))
