"""The layers with explicit orthogonal kernels as modules: what they keep, how they train, freeze and certify."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lipjax
from lipjax import NotCertifiable, bounds, losses
from lipjax.nn import AOC, BCOP, COLLECTION, RKO, AOCTranspose, LinearHead, LipschitzModel, OrthoLinear, flatten

SHAPE = (6, 6, 2)
U32 = 2.0**-24


class Net(LipschitzModel):
    """One of each kind, the last of them, or another first layer."""

    first: Callable | None = None
    last: int = 5

    def layers(self):
        first = [self.first(name="layer")] if self.first is not None else []
        rest = [
            AOC(4, num_iters=30, name="same"),
            AOC(8, 3, 1, order="scfac", num_iters=30, name="separable"),
            BCOP(6, num_iters=30, name="block"),
            AOC(8, 4, 2, num_iters=30, name="strided"),
            RKO(4, 3, 1, name="overlapping"),
        ]
        return first + [flatten] if first else [*rest[-self.last :], flatten, OrthoLinear(6, name="dense")], LinearHead(
            3, name="head"
        )


def initialised(model, seed=0):
    return jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, *model.input_shape)))


@partial(jax.jit, static_argnums=(0, 2))
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
    images = jnp.asarray(rng.uniform(size=(16, *model.input_shape)), variables["params"]["head"]["bias"].dtype)
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


@pytest.mark.nightly
def test_a_training_step_advances_the_vectors_and_nothing_else_does():
    model = Net(SHAPE, 3, first=partial(AOC, 16, 4, 2))
    variables = initialised(model)
    start = state_vectors(variables[COLLECTION])
    assert set(start) == {"layer"} and set(start["layer"]) == {"columns", "patch"}
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
    for state, same in ((variables[COLLECTION], before), (advanced, network)):  # freezing takes them as they are
        frozen = lipjax.freeze(model, {**variables, COLLECTION: state})
        np.testing.assert_allclose(
            frozen.network.ops[0].kernel, getattr(same.ops[0], "map", same.ops[0]).kernel, atol=1e-14
        )


@pytest.mark.nightly
@pytest.mark.x64_off
@pytest.mark.parametrize("last", [3, 5])
def test_layers_that_have_trained_are_frozen_in_float64_and_orthogonal(last):
    model = Net(SHAPE, 3, last=last)
    start, variables = initialised(model), trained(model, 4)
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(variables))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), start["params"], variables["params"])
    assert all(change > 1e-3 for change in jax.tree.leaves(moved))
    frozen = lipjax.freeze(model, variables)
    images = np.random.default_rng(1).uniform(size=(4, *SHAPE))
    logits = jax.jit(model.apply)(variables, jnp.asarray(images, jnp.float32))
    np.testing.assert_allclose(frozen(images), logits, atol=1000 * U32)
    rows = {row.name: row for row in frozen.lipschitz_report()}
    with jax.enable_x64(True):
        for name, op in zip(frozen.network.names, frozen.network.ops, strict=True):
            if not name.endswith("linear"):
                continue
            x = jnp.eye(math.prod(op.in_shape)).reshape(-1, *op.in_shape)
            values = np.linalg.svd(np.asarray(jax.tree.map(jnp.asarray, op)(x)).reshape(len(x), -1), compute_uv=False)
            assert values.max() < 1 + 1e-12, name
            assert (values.min() > 1 - 1e-7) == (name != "overlapping/linear"), name
            assert values.max() * (1 - 1e-13) <= rows[name].proved <= values.max() * (1 + 1e-8), name
    assert frozen.certify(images).radii.max() > 0


def test_a_training_network_counts_one_and_has_no_certificate():
    model = Net(SHAPE, 3, first=partial(AOC, 16, 4, 2))
    variables = initialised(model)
    network, _ = built(model, variables, True)
    assert bounds.norm_estimates(network, {}, 1)[0] == {}
    with pytest.raises(NotCertifiable, match="layer/linear: .* Contraction"):
        bounds.operator_bounds(jax.tree.map(np.asarray, network))
    evaluated, _ = built(model, variables, False)
    assert network.names == evaluated.names
    sigmas, _ = bounds.norm_estimates(evaluated, variables[COLLECTION]["vectors"], 50)
    assert list(sigmas) == ["layer/linear"] and 0.9 < float(sigmas["layer/linear"]) < 1 + 1e-9


class Grouped(LipschitzModel):
    """Groups, dilation and back up again: the first of these layers."""

    length: int = 5

    def layers(self):
        layers = [
            AOC(8, 3, 1, num_iters=30, name="wide"),
            AOC(16, 2, 2, groups=2, dilation=3, num_iters=30, name="patches"),
            AOCTranspose(8, 4, 2, groups=2, num_iters=30, name="up"),
            AOCTranspose(6, 3, 2, padding="ZERO", output_padding=1, num_iters=30, name="further"),
            AOC(8, 3, order="scfac", groups=2, dilation=2, num_iters=30, name="separable"),
        ]
        return [*layers[: self.length], flatten], LinearHead(3, name="head")


@pytest.mark.nightly
@pytest.mark.parametrize("length", [3, 5])
def test_groups_dilation_and_transposition_train_and_are_orthogonal(length):
    model = Grouped((4, 4, 2), 3, length=length)
    start, variables = initialised(model), trained(model, 3)
    shapes = {name: {n: a.shape for n, a in layer.items()} for name, layer in variables["params"].items()}
    assert shapes["patches"]["patch"] == (2, 2, 2, 4, 8) and shapes["up"]["columns"] == (2, 6, 4, 2)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), start["params"], variables["params"])
    assert all(change > 1e-3 for change in jax.tree.leaves(moved))
    before, after = (state_vectors(v[COLLECTION])["up"]["columns"]["u"] for v in (start, variables))
    assert before.shape == after.shape == (2, 6, 4) and np.abs(before - after).max() > 1e-6
    frozen = lipjax.freeze(model, variables)
    rows = {row.name: row for row in frozen.lipschitz_report()}
    sizes = {name: op.out_shape for name, op in zip(frozen.network.names, frozen.network.ops, strict=True)}
    assert sizes["up/linear"] == (4, 4, 8) and sizes.get("further/linear", (8, 8, 6)) == (8, 8, 6)
    assert ("further/linear" in sizes) == (length == 5)
    for name, op in zip(frozen.network.names, frozen.network.ops, strict=True):
        if name.endswith("linear"):
            x = jnp.eye(math.prod(op.in_shape)).reshape(-1, *op.in_shape)
            values = np.linalg.svd(np.asarray(jax.tree.map(jnp.asarray, op)(x)).reshape(len(x), -1), compute_uv=False)
            assert values.max() * (1 - 1e-13) <= rows[name].proved <= values.max() * (1 + 1e-8), name
            assert values.max() < 1 + 1e-12, name
            assert (values.min() > 1 - 1e-6) == (name != "further/linear"), name  # zeros around lose some
    image = np.random.default_rng(0).uniform(size=(2, 4, 4, 2))
    assert frozen.certify(image).radii.max() > 0


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (partial(AOC, 4, 2, 3), "kernel_size >= strides, got kernel_size 2 and strides 3"),
        (partial(AOC, 4, rank=4), "a rank from 1 to 3"),
        (
            partial(BCOP, 4, 3, 2),
            r"a kernel_size that strides divide, got kernel_size 3 and strides 2.*k \* stride",
        ),
        (partial(AOC, 4, groups=3), "groups >= 1 that divide the channels, got 3 groups and 2 -> 4"),
        (partial(AOC, 4, 4, 2, dilation=4), "no factor in common with strides, got dilation 4 and strides 2"),
        (partial(AOCTranspose, 4, 3, 2, output_padding=1), "0 with circular padding, got 1"),
        (partial(AOCTranspose, 4, 3, 2, padding="ZERO", output_padding=2), "from 0 to strides - 1"),
        (partial(BCOP, 4, rank=0), "a rank from 1 to 3 .* got 0"),
        (partial(RKO, 4, 2, 3), "got strides 3 for 2 x 2 taps"),
        (partial(AOC, 5), r"MaxMin pairs channels: expected an even number of them, got shape \(6, 6, 5\)"),
        (partial(AOC, 4, 5, 4), "4"),  # circular maps must be divisible by the strides
        (partial(AOC, 4, method="svd"), "a method out of bjorck, qr, exp, cholesky, got 'svd'"),
        (partial(OrthoLinear, 4), r"takes vectors: expected an input shape \(n,\), got \(6, 6, 2\)"),
    ],
)
def test_misuse_says_what_was_expected(layer, message):
    model = Net(SHAPE, 3, first=layer)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *SHAPE)))


def test_odd_channels_work_without_pairs():
    model = Net(SHAPE, 3, first=partial(AOC, 5, activation=None))
    network, _ = built(model, initialised(model), False)
    assert network(jnp.zeros((1, *SHAPE))).shape == (1, 3)
    assert float(lipjax.spectral.norm_bound(network.ops[0])) < 1 + 1e-9


def test_the_state_survives_a_map_over_names():
    """Vectors are arrays of the raw arrays' type, under the layer's name; layers without an estimate keep none."""
    model = Net(SHAPE, 3, first=partial(AOC, 4, method="qr"))
    lip = initialised(model)[COLLECTION]
    assert set(lip) == {"vectors"}
    kept = initialised(Net(SHAPE, 3, first=partial(AOC, 6, 3)))[COLLECTION]["layer"]["vectors"]
    assert kept["columns"]["u"].shape == (6, 6) and kept["columns"]["v"].shape == (6, 3)
