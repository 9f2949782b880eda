"""The layers with explicit orthogonal kernels as modules: what they keep, how they train, freeze and certify."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lipjax
from lipjax import NotCertifiable, bounds, losses
from lipjax.nn import AOC, BCOP, COLLECTION, RKO, LinearHead, LipschitzModel, OrthoLinear, flatten

SHAPE = (6, 6, 2)
U32 = 2.0**-24


class Net(LipschitzModel):
    """One of each kind, or another first layer."""

    first: object = None

    def layers(self):
        first = [self.first] if self.first is not None else []
        rest = [
            AOC(4, name="same"),
            AOC(8, 4, 2, name="strided"),
            AOC(4, 3, 1, padding="ZERO", order="scfac", name="separable"),
            BCOP(6, name="block"),
            RKO(4, 3, 1, name="overlapping"),
        ]
        dense = OrthoLinear(6, name="dense")
        return [*(first or rest), flatten, dense], LinearHead(3, name="head")


def initialised(model, seed=0):
    return jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, *model.input_shape)))


@functools.partial(jax.jit, static_argnums=(0, 2))
def built(model, variables, train):
    if not train:
        return model.apply(variables, method="build"), variables[COLLECTION]
    network, changed = model.apply(variables, True, method="build", mutable=[COLLECTION])
    return network, changed[COLLECTION]


def state_vectors(lip):
    return {layer: kept["vectors"] for layer, kept in lip.items() if layer != "vectors"}


def trained(model, steps, seed=0, rate=0.02):
    """A few steps of Adam on random images and labels."""
    variables = initialised(model, seed)
    rng = np.random.default_rng(seed)
    images = jnp.asarray(rng.uniform(size=(16, *SHAPE)), variables["params"]["head"]["bias"].dtype)
    labels = jnp.asarray(rng.integers(0, 3, 16))
    optimizer = optax.adam(rate)

    @jax.jit
    def step(params, lip, state):
        def loss(params):
            variables = {"params": params, COLLECTION: lip}
            network, changed = model.apply(variables, True, method="build", mutable=[COLLECTION])
            constants, _ = bounds.margin_lipschitz_estimate(network, lip["vectors"], 1)
            return losses.margin(network(images), labels, constants, 0.1).mean(), changed[COLLECTION]

        gradient, lip = jax.grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), lip, state, gradient

    params, lip, state = variables["params"], variables[COLLECTION], optimizer.init(variables["params"])
    for _ in range(steps):
        params, lip, state, gradient = step(params, lip, state)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradient) if g.ndim > 1)  # every raw array trains
    return {"params": params, COLLECTION: lip}


def test_a_training_step_advances_the_vectors_and_nothing_else_does():
    model = Net(SHAPE, 3)
    variables = initialised(model)
    start = state_vectors(variables[COLLECTION])
    assert set(start) == {"same", "strided", "separable", "block", "overlapping", "dense"}
    assert set(start["strided"]) == {"columns", "patch"} and set(start["separable"]) == {"columns", "squares"}
    moved = jax.tree.map(lambda a: a + 0.3 * jnp.cos(jnp.arange(a.size)).reshape(a.shape), variables["params"])
    variables = {**variables, "params": moved}
    _, kept = built(model, variables, False)
    jax.tree.map(np.testing.assert_array_equal, kept, variables[COLLECTION])
    network, advanced = built(model, variables, True)
    changed = jax.tree.map(lambda a, b: np.abs(a - b).max(), state_vectors(advanced), start)
    assert all(change > 1e-6 for change in jax.tree.leaves(changed))
    # Built with the advanced vectors: evaluation afterwards is the same function.
    after, _ = built(model, {**variables, COLLECTION: advanced}, False)
    x = jnp.asarray(np.random.default_rng(0).uniform(size=(2, *SHAPE)))
    np.testing.assert_allclose(after(x), network(x), atol=1e-12)
    before, _ = built(model, variables, False)
    assert np.abs(before(x) - network(x)).max() > 1e-9  # control: 12 steps do not forget the vectors


@pytest.mark.x64_off
def test_freezing_builds_in_float64_with_the_stored_vectors():
    model = Net(SHAPE, 3)
    variables = trained(model, 3)
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(variables))
    frozen, again = lipjax.freeze(model, variables), lipjax.freeze(model, variables)
    assert frozen.sha256() == again.sha256()
    other = {**variables, COLLECTION: built(model, variables, True)[1]}
    assert lipjax.freeze(model, other).sha256() != frozen.sha256()  # control: the vectors matter
    images = np.random.default_rng(1).uniform(size=(4, *SHAPE))
    logits = jax.jit(model.apply)(variables, jnp.asarray(images, jnp.float32))
    np.testing.assert_allclose(frozen(images), logits, atol=1000 * U32)
    for row in frozen.lipschitz_report():
        assert row.bound < 1 + 1e-8, row
    certificate = frozen.certify(images)
    assert certificate.radii.max() > 0


def test_a_training_network_counts_one_and_has_no_certificate():
    model = Net(SHAPE, 3)
    variables = initialised(model)
    network, _ = built(model, variables, True)
    assert bounds.norm_estimates(network, {}, 1)[0] == {}
    with pytest.raises(NotCertifiable, match="same/linear: .* Contraction"):
        bounds.operator_bounds(jax.tree.map(np.asarray, network))
    evaluated, _ = built(model, variables, False)
    assert network.names == evaluated.names
    sigmas, _ = bounds.norm_estimates(evaluated, variables[COLLECTION]["vectors"], 50)
    linear = {"same", "strided", "separable", "block", "overlapping", "dense"}
    assert set(sigmas) == {f"{name}/linear" for name in linear}
    assert all(float(sigma) < 1 + 1e-9 for sigma in sigmas.values())


LAYERS = [  # layer, and whether it preserves norms: more outputs than inputs (times strides^2), circular
    (AOC(4, name="layer"), True),
    (AOC(4, 5, rank=1, name="layer"), True),
    (AOC(8, 2, 2, name="layer"), True),
    (AOC(8, 3, 2, name="layer"), True),
    (AOC(4, method="qr", name="layer"), True),
    (AOC(4, order="scfac", name="layer"), True),
    (BCOP(4, name="layer"), True),
    (BCOP(8, 6, 2, name="layer"), True),
    (AOC(4, padding="ZERO", name="layer"), False),
    (AOC(4, method="exp", name="layer"), False),
    (AOC(4, method="cholesky", name="layer"), False),
    (RKO(4, name="layer"), False),
    (RKO(8, 2, 2, padding="ZERO", name="layer"), True),
]


@pytest.mark.parametrize(("layer", "isometric"), LAYERS)
def test_layers_stay_orthogonal_while_they_train(layer, isometric):
    layer = layer.clone(num_iters=30)
    model = Net(SHAPE, 3, first=layer)
    variables = trained(model, 4)
    frozen = lipjax.freeze(model, variables)
    ops = dict(zip(frozen.network.names, frozen.network.ops, strict=True))
    x = np.eye(int(np.prod(SHAPE))).reshape(-1, *SHAPE)
    for name in ("layer/spacetodepth", "layer/linear"):
        if name in ops:
            x = np.asarray(jax.tree.map(jnp.asarray, ops[name])(jnp.asarray(x)))
    values = np.linalg.svd(x.reshape(len(x), -1), compute_uv=False)
    assert values.max() < 1 + 1e-12
    assert (values.min() > 1 - 1e-7) == isometric
    row = next(row for row in frozen.lipschitz_report() if row.name == "layer/linear")
    assert values.max() * (1 - 1e-13) <= row.sigma <= max(values.max(), row.bound * isometric) * (1 + 1e-6)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (AOC(4, 2, 3, name="layer"), "kernel_size >= strides, got kernel_size 2 and strides 3"),
        (AOC(4, rank=4, name="layer"), "a rank from 1 to 3"),
        (
            BCOP(4, 3, 2, name="layer"),
            r"a kernel_size that strides divide, got kernel_size 3 and strides 2.*k \* stride",
        ),
        (BCOP(4, rank=0, name="layer"), "a rank from 1 to 3 .* got 0"),
        (RKO(4, 2, 3, name="layer"), "got strides 3 for 2 x 2 taps"),
        (AOC(5, name="layer"), r"MaxMin pairs channels: expected an even number of them, got shape \(6, 6, 5\)"),
        (AOC(4, 5, 4, name="layer"), "4"),  # circular maps must be divisible by the strides
        (AOC(4, method="svd", name="layer"), "a method out of bjorck, qr, exp, cholesky, got 'svd'"),
        (OrthoLinear(4, name="layer"), "Dense|shape"),
    ],
)
def test_misuse_says_what_was_expected(layer, message):
    model = Net(SHAPE, 3, first=layer)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *SHAPE)))


def test_odd_channels_work_without_pairs():
    layer = AOC(5, 3, activation=None, name="layer")
    values = np.asarray(
        built(Net(SHAPE, 3, first=layer), initialised(Net(SHAPE, 3, first=layer)), False)[0](jnp.zeros((1, *SHAPE)))
    )
    assert values.shape == (1, 3)


def test_the_state_survives_a_map_over_names():
    """Vectors are arrays of the raw arrays' type, under the layer's name; layers without an estimate keep none."""
    model = Net(SHAPE, 3, first=AOC(4, method="qr", name="layer"))
    lip = initialised(model)[COLLECTION]
    assert "layer" not in lip and set(lip) == {"vectors", "dense"}
    assert lip["dense"]["vectors"]["matrix"]["u"].shape == (6,)
