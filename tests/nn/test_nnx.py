"""Models in Flax NNX: a training step under nnx.jit, and what is certified of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from model_helpers import tiny

import lipjax
from lipjax import bounds, losses
from lipjax.nn import COLLECTION, from_nnx

NUM_ITERS, EPSILON = 2, 0.1


def batch():
    return jax.random.uniform(jax.random.key(1), (16, 8, 8, 1), jnp.float32), jnp.arange(16) % 3


def objective(network, vectors, images, labels):
    """The mean EMMA loss, and the vectors of norm estimates, advanced."""
    constants, vectors = bounds.margin_lipschitz_estimate(network, vectors, NUM_ITERS)
    return losses.emma(network(images), labels, constants, EPSILON).mean(), vectors


@nnx.jit
def step_of_nnx(module, optimizer, images, labels):
    def loss(module):
        network = module(True, method="build", mutable=[COLLECTION])
        return objective(network, {name: v[...] for name, v in module.vectors.items()}, images, labels)

    (value, vectors), gradients = nnx.value_and_grad(loss, has_aux=True)(module)
    optimizer.update(module, gradients)
    for name, vector in vectors.items():
        module.vectors[name][...] = vector
    return value


@functools.partial(jax.jit, static_argnums=0)
def step_of_linen(model, variables, state, images, labels):
    def loss(params):
        given = {**variables, "params": params}
        network, advanced = model.apply(given, True, method="build", mutable=[COLLECTION])
        lip = {**variables[COLLECTION], **advanced.get(COLLECTION, {})}
        value, vectors = objective(network, variables[COLLECTION]["vectors"], images, labels)
        return value, {**lip, "vectors": vectors}

    (value, lip), gradients = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    updates, state = optax.adam(0.01).update(gradients, state)
    return {"params": optax.apply_updates(variables["params"], updates), COLLECTION: lip}, state, value


@pytest.mark.slow  # compiles both steps and two certificates
@pytest.mark.x64_off
def test_a_step_in_nnx_is_one_in_linen_and_is_certified_alike():
    model, (images, labels) = tiny(), batch()
    module = nnx.bridge.ToNNX(model, rngs=nnx.Rngs(0)).lazy_init(images[:1])
    wrapped, start = from_nnx(module)
    assert wrapped is model and set(start) == {"params", COLLECTION}
    optimizer = nnx.Optimizer(module, optax.adam(0.01), wrt=nnx.Param)
    value = step_of_nnx(module, optimizer, images, labels)
    ours, _, expected = step_of_linen(model, start, optax.adam(0.01).init(start["params"]), images, labels)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    _, found = from_nnx(module)
    moved = [
        np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (found["params"], start["params"])), strict=True)
    ]
    assert min(moved) > 1e-4  # control: every parameter was trained
    assert jax.tree.structure(found) == jax.tree.structure(ours)
    # Adam's first step is +-0.01 where a gradient is not tiny; sums of float32 differ in their last bits.
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(ours), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)
    pixels = np.asarray(images, np.float64)
    radii = [lipjax.freeze(model, variables).certify(pixels).radii for variables in (found, ours)]
    assert radii[0].max() > 1e-3
    np.testing.assert_allclose(radii[0], radii[1], atol=1e-4 * radii[0].max())


def test_other_modules_are_refused():
    with pytest.raises(ValueError, match="around a model of lipjax, got a Linear"):
        from_nnx(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="call its lazy_init"):
        from_nnx(nnx.bridge.ToNNX(tiny(), rngs=nnx.Rngs(0)))
