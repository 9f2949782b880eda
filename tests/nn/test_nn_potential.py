"""SLL, CPL and sandwich layers as modules: what they keep, how they train, freeze and certify."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lipjax
from lipjax import bounds, losses, nn, operators
from lipjax.nn import COLLECTION, LipschitzModel, flatten

SHAPE = (4, 4, 3)


class Net(LipschitzModel):
    """One of each kind."""

    def layers(self):
        layers = [
            nn.SLLConv(5, name="sll"),
            nn.CPLConv(2, strides=2, name="cpl"),
            nn.SandwichConvSpatial(4, hidden=6, name="spatial"),
            nn.SandwichConv(5, strides=2, name="circular"),
            nn.SLLConv(activation=partial(operators.LeakyReLU, negative_slope=0.25), name="leaky"),
            flatten,
            nn.SLLDense(7, name="sll_dense"),
            nn.CPLDense(name="cpl_dense"),
            nn.SandwichDense(6, name="sandwich"),
        ]
        return layers, nn.SandwichHead(3, name="head")


def initialised(model, seed=0):
    return jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, *model.input_shape)))


@partial(jax.jit, static_argnums=0)
def built(model, variables):
    network, changed = model.apply(variables, True, method="build", mutable=[COLLECTION])
    return network, changed[COLLECTION]


@pytest.mark.nightly
@pytest.mark.x64_off
def test_a_network_of_all_kinds_trains_freezes_and_is_proved_to_be_a_contraction(tmp_path):
    model = Net(SHAPE, 3)
    variables = initialised(model)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.uniform(size=(16, *SHAPE)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 3, 16))
    optimizer = optax.adam(0.02)

    @jax.jit
    def step(params, lip, state):
        def loss(params):
            network, changed = model.apply(
                {"params": params, COLLECTION: lip}, True, method="build", mutable=[COLLECTION]
            )
            constants, _ = bounds.margin_lipschitz_estimate(network, lip["vectors"], 1)
            return losses.margin(network(images), labels, constants, 0.1).mean(), changed[COLLECTION]

        gradient, lip = jax.grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), lip, state, gradient

    params, lip, state = variables["params"], variables[COLLECTION], optimizer.init(variables["params"])
    for _ in range(3):
        params, lip, state, gradient = step(params, lip, state)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradient) if g.ndim > 1)  # every raw array trains
    frozen = lipjax.freeze(model, {"params": params, COLLECTION: lip})
    rows = {row.name: row for row in frozen.lipschitz_report() if row.type in ("PotentialStep", "Sandwich")}
    assert len(rows) == 8
    for name, row in rows.items():
        if row.type == "PotentialStep":
            assert row.claimed == 1.0, name
        else:
            assert row.claimed <= 1.0, name
    assert rows["circular/sandwich"].claimed > 1 - 1e-6 and rows["sandwich/sandwich"].claimed > 1 - 1e-6
    pixels = rng.uniform(size=(4, *SHAPE))
    logits = jax.jit(model.apply)({"params": params, COLLECTION: lip}, jnp.asarray(pixels, jnp.float32))
    np.testing.assert_allclose(frozen(pixels), logits, atol=1e-4)
    assert (frozen.certify(pixels).radii > 0).all()
    frozen.save(tmp_path)
    assert lipjax.FrozenNetwork.load(tmp_path).sha256() == frozen.sha256()


@pytest.mark.nightly
def test_a_training_step_advances_the_vectors_and_counts_the_constants_as_one():
    model = Net(SHAPE, 3)
    variables = initialised(model)
    network, advanced = built(model, variables)
    start = variables[COLLECTION]
    assert {"cpl", "cpl_dense", "vectors"} == set(start) == set(advanced)
    for layer in ("cpl", "cpl_dense"):
        change = np.abs(advanced[layer]["vector"] - start[layer]["vector"]).max()
        assert change < 0.5 and np.linalg.norm(advanced[layer]["vector"]) == pytest.approx(1)
    estimates = jax.jit(bounds.norm_estimates, static_argnums=2)
    assert estimates(network, start["vectors"], 1)[0] == {}
    evaluated: Any = jax.jit(lambda v: model.apply(v, method="build"))(variables)
    vectors = {name: v for name, v in start["vectors"].items() if name.startswith(("sll", "cpl", "leaky"))}
    assert set(vectors) == {f"{name}/step/0" for name in ("sll", "cpl", "leaky", "sll_dense", "cpl_dense")}
    sigmas, _ = estimates(evaluated, start["vectors"], 30)
    assert all(sigma <= 1 for sigma in sigmas.values()) and len(sigmas) == 8


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (nn.SLLDense(activation=operators.Tanh), (4,), "SLLDense takes an activation with f.c x. = c f.x."),
        (nn.CPLConv(4, activation=operators.MaxMin), SHAPE, r"got MaxMin\(in"),
        (nn.SLLConv(activation=partial(operators.LeakyReLU, negative_slope=-1.0)), SHAPE, "slopes between -1 and 1"),
        (nn.SLLConv(), (4,), r"SLLConv takes images: expected an input shape \(h, w, c\), got \(4,\)"),
        (nn.CPLDense(), SHAPE, "CPLDense takes vectors: .* Put `flatten` first"),
        (nn.SandwichDense(3), SHAPE, "SandwichDense takes vectors"),
        (nn.SandwichConv(3), (4,), "SandwichConv takes images"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(layer, shape, message):
    with pytest.raises(ValueError, match=message):
        layer.init(jax.random.key(0), shape)


class Stack(LipschitzModel):
    """Twelve sandwiches, one after the other."""

    identity_start: bool = False

    def layers(self):
        dense = [nn.SandwichDense(16, identity_start=self.identity_start, name=f"dense{i}") for i in range(12)]
        return [flatten, *dense], nn.SandwichHead(3, name="head")


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.SandwichDense(5, identity_start=True), (6,)),
        (nn.SandwichConv(5, identity_start=True), (6, 6, 3)),
        (nn.SandwichConv(12, strides=2, identity_start=True), (6, 6, 3)),
        (nn.SandwichConvSpatial(5, hidden=4, identity_start=True), (6, 6, 3)),
    ],
)
def test_a_sandwich_with_an_identity_start_is_nearly_its_activation(layer, shape, key):
    x = jax.random.normal(key, (4, *shape))

    @jax.jit
    def apply(x):
        y = x
        for _, op in layer.apply(layer.init(key, shape), shape):
            y = op(y)
        return y

    y = np.asarray(apply(x))
    if getattr(layer, "strides", 1) == 2:
        x = operators.SpaceToDepth(shape, 2)(x)
    few = min(layer.features, x.shape[-1], getattr(layer, "hidden", None) or layer.features)
    expected = np.zeros(y.shape)
    expected[..., :few] = np.maximum(x[..., :few], 0)
    off = np.linalg.norm(y - expected) / np.linalg.norm(expected)
    assert 0.001 < off < 0.3, off  # the noise


def test_sandwiches_that_start_at_random_lose_what_tells_images_apart(key):
    x = jax.random.uniform(key, (8, 4, 4, 1))

    def spread(identity_start):
        model = Stack((4, 4, 1), 3, identity_start=identity_start)
        logits = np.asarray(jax.jit(model.apply)(initialised(model), x))
        return np.linalg.norm(logits - logits.mean(0)) / np.linalg.norm(x - x.mean(0))

    assert spread(False) < 1e-3 < 1e-2 < spread(True)
