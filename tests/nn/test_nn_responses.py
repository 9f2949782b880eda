"""BRO and LOT as modules: their starts, the original's centring, training, freezing, proofs and misuse."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_helpers import load, nhwc, relative

import lipjax
from lipjax import NotCertifiable, bounds, losses, operators
from lipjax.nn import (
    COLLECTION,
    BROConv,
    BRODense,
    BROPatches,
    BROResidual,
    BROStack,
    LinearHead,
    LipschitzModel,
    LOTConv,
    advance_means,
    flatten,
)

SHAPE = (6, 6, 2)
PARITY = 1e-9
U32 = 2.0**-24


class Net(LipschitzModel):
    """One of each BRO layer, or another first layer."""

    first: Callable | None = None

    def layers(self):
        if self.first is not None:
            return [self.first(name="layer"), flatten], LinearHead(3, name="head")
        layers = [
            BROConv(4, name="up"),
            BROResidual(2, name="block"),
            BROPatches(4, 3, name="patches"),
            flatten,
            BRODense(8, constant_ridge=True, name="dense"),
            BROStack(2, name="stack"),
        ]
        return layers, LinearHead(3, name="head")


def initialised(model, seed=0):
    return jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, *model.input_shape)))


@partial(jax.jit, static_argnums=0)
def built(model, variables):
    return model.apply(variables, method="build")


def trained(model, steps, rate=0.02):
    """A few steps of Adam on random images and labels."""
    variables = initialised(model)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.uniform(size=(16, *model.input_shape)), variables["params"]["head"]["bias"].dtype)
    labels = jnp.asarray(rng.integers(0, 3, 16))
    optimizer = optax.adam(rate)

    @jax.jit
    def step(params, lip, state):
        def loss(params):
            variables = {"params": params, COLLECTION: lip}
            network, changed = model.apply(variables, True, method="build", mutable=[COLLECTION])
            features, means = network.features_and_means(images)
            constants, _ = bounds.margin_lipschitz_estimate(network, lip["vectors"], 1)
            return losses.margin(network.head(features), labels, constants, 0.1).mean(), (changed[COLLECTION], means)

        gradient, (lip, means) = jax.grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), advance_means(lip, means), state, gradient

    params, lip, state = variables["params"], variables[COLLECTION], optimizer.init(variables["params"])
    for _ in range(steps):
        params, lip, state, gradient = step(params, lip, state)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradient) if g.ndim > 1)  # every raw array trains
    return {"params": params, COLLECTION: lip}


def test_centring_is_the_originals():
    """Training subtracts the batch's means; evaluation the running ones, folded into the biases."""
    z, meta = load("bronet_backbone_bro")
    options = meta["constructor"]
    names = [f"block_{i}" for i in range(options["depth"])]
    # Kernels (layer, m, r, k, k) are reflected in space there.
    weights = np.flip(z["param/weights"].transpose(0, 3, 4, 2, 1), (1, 2)).copy()
    gammas = z["param/gamma"][:, :, 0, 0, 0]
    params = [{"weight": w, "gamma": g, "bias": b} for w, g, b in zip(weights, gammas, z["param/bias"], strict=True)]
    lip = {name: {"mean": jnp.asarray(mean)} for name, mean in zip(names, z["param/running_mean"], strict=True)}

    def apply(x, train):
        ops = []
        for name, values in zip(names, jax.tree.map(jnp.asarray, params), strict=True):
            block = BROResidual(len(names), rank=options["weight_rank_ratio"], name=name)
            ops += block.apply({"params": values, COLLECTION: lip[name]}, x.shape[1:], train)
        means = {}
        for name, op in ops:
            if isinstance(op, operators.Centers):
                x, means[name] = op.with_mean(x)
            else:
                x = op(x)
        return x, means

    x = nhwc(z["input/x"])
    evaluated, means = jax.jit(apply, static_argnums=1)(x, False)
    assert relative(evaluated, nhwc(z["output/y_eval"])) < PARITY and means == {}
    y, means = jax.jit(apply, static_argnums=1)(x, True)
    assert relative(y, nhwc(z["output/y"])) < PARITY
    assert set(means) == {f"{name}/centering" for name in names}
    moved = advance_means(lip, means)
    assert relative(np.stack([moved[name]["mean"] for name in names]), z["output/running_mean_after"]) < PARITY


def test_starts():
    """LipConvnet's reflects the first channels, at every frequency; LOT's is the identity, but for 1e-4."""
    model = Net(SHAPE, 3, first=partial(BROConv, 2, activation=None))
    variables = initialised(model)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, *SHAPE)))
    bias = np.asarray(variables["params"]["layer"]["bias"])
    assert 0 < np.abs(bias).max() < 1 / 3

    def layer(model, variables, x):
        for name, op in zip(*(lambda n: (n.names, n.ops))(built(model, variables)), strict=True):
            if name.startswith("layer"):
                x = op(x)
        return x

    np.testing.assert_allclose(layer(model, variables, x), np.asarray(x) * [-(1 - 2e-5), 1] + bias, atol=1e-9)
    model = Net(SHAPE, 3, first=partial(LOTConv, 2, use_bias=False, activation=None))
    np.testing.assert_allclose(layer(model, initialised(model), x), x / math.sqrt(1 + 1e-4), atol=1e-9)


@pytest.mark.nightly
@pytest.mark.x64_off
def test_layers_that_have_trained_are_frozen_in_float64_and_contract(tmp_path):
    model = Net(SHAPE, 3)
    variables = trained(model, 3)
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(variables))
    assert np.abs(variables[COLLECTION]["block"]["mean"]).max() > 0
    frozen = lipjax.freeze(model, variables)
    images = np.random.default_rng(1).uniform(size=(4, *SHAPE))
    logits = jax.jit(model.apply)(variables, jnp.asarray(images, jnp.float32))
    np.testing.assert_allclose(frozen(images), logits, atol=1e4 * U32)
    rows = {row.name: row for row in frozen.lipschitz_report()}
    assert {name: rows[f"block/{name}"].proved for name in ("zeropad", "crop")} == {"zeropad": 1.0, "crop": 1.0}
    with jax.enable_x64(True):
        for name, op in zip(frozen.network.names, frozen.network.ops, strict=True):
            if not name.endswith("linear"):
                continue
            x = jnp.eye(math.prod(op.in_shape)).reshape(-1, *op.in_shape)
            values = np.linalg.svd(np.asarray(jax.tree.map(jnp.asarray, op)(x)).reshape(len(x), -1), compute_uv=False)
            assert values.max() < 1 + 1e-12, name
            assert values.max() * (1 - 1e-13) <= rows[name].proved <= max(values.max(), 1e-3) * (1 + 1e-10), name
            if name.split("/")[0] in ("block", "stack_01"):
                assert values.min() > 1 - 1e-3, name
    assert frozen.certify(images).radii.max() > 0
    frozen.save(str(tmp_path / "frozen"))
    again = lipjax.FrozenNetwork.load(str(tmp_path / "frozen"))
    np.testing.assert_array_equal(again.certify(images).radii, frozen.certify(images).radii)


def test_strides_growing_maps_odd_channels_and_lot_as_the_backbone():
    """The shapes, and norms that are not above 1."""
    for layer, shape in (
        (partial(BROConv, 4, 3, 2, activation=None), (3, 3, 4)),
        (partial(BROConv, 3, 2, crop=False, activation=None), (8, 8, 3)),
        (partial(LOTConv, 4, 1, 3), (2, 2, 4)),
        (partial(BROResidual, 2, method="lot", centering=False), (6, 6, 2)),
    ):
        model = Net(SHAPE, 3, first=layer)
        network = built(model, initialised(model))
        assert network.ops[-2].out_shape == shape
        rows = bounds.operator_bounds(jax.tree.map(np.asarray, network))
        assert all(row.proved <= 1 + 1e-12 for row in rows[1:])


def test_a_training_network_counts_one_and_has_no_certificate():
    model = Net(SHAPE, 3, first=partial(BROResidual, 4))
    variables = initialised(model)
    network, _ = model.apply(variables, True, method="build", mutable=[COLLECTION])
    assert bounds.norm_estimates(network, {}, 1)[0] == {}
    with pytest.raises(NotCertifiable, match="layer/centering: .* Centering"):
        bounds.operator_bounds(jax.tree.map(np.asarray, network))
    evaluated = model.apply(variables, method="build")
    assert [n for n in network.names if n != "layer/centering"] == list(evaluated.names)
    with pytest.raises(ValueError, match="Centering cannot stand inside a residual block"):
        operators.Residual((operators.Centering((4,)),))
    with pytest.raises(ValueError, match="Centering expects a batch"):
        operators.Centering((4, 4, 2))(jnp.zeros((1, 4, 4, 3)))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (partial(BROConv, 4, 0), r"BROConv takes images .* got an input shape \(6, 6, 2\), kernel_size 0"),
        (partial(LOTConv, 4, 3, 0), "LOTConv takes images .* strides 0"),
        (partial(BROConv, 4, 3, 4), r"a block >= 1 that divides the size \(6, 6\), got 4"),
        (partial(BROConv, 2, rank=0.2), "a rank from 1 to 2, but level 0.2 gives 0"),
        (partial(BROConv, 2, rank=2.0), "Expected a level from 0 to 1"),
        (partial(BROConv, 5), r"MaxMin pairs channels: expected an even number of them, got shape \(6, 6, 5\)"),
        (partial(BROResidual, 0), "num_layers >= 1, got 0"),
        (partial(BROResidual, 2, method="svd"), "a method out of bro, lot, got 'svd'"),
        (partial(BRODense, 4), r"takes vectors: expected an input shape \(n,\), got \(6, 6, 2\)"),
        (partial(BROPatches, 40, 3), r"Expected v \(\.\.\., m, r\) with r <= m"),
        (partial(BROPatches, 4, 7), "does not fit"),
    ],
)
def test_misuse_says_what_was_expected(layer, message):
    model = Net(SHAPE, 3, first=layer)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *SHAPE)))
