"""A learned factor of logits and Lipschitz constants in losses: what it does to a step, and to no certificate."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import everyday
from training_helpers import quick_compiles, tiny_config  # noqa: F401  quick_compiles is a fixture

import lipjax
from lipjax.models import MODELS
from lipjax.nn import LOG_SCALE
from lipjax.training.loop import Run
from lipjax.training.optimizer import decay_mask

CHANGES = {
    "optimizer.name": "sgd",
    "optimizer.clip_norm": 0.0,
    "optimizer.warmup_epochs": 0.0,
    "model.head_normalize": False,
}
SCHEDULE = {"epsilon": 0.1}
SCALE = 4.0


def stepped(params, **changes):
    """The state after one step from these parameters, and the step's metrics."""
    run = Run(tiny_config(**CHANGES, **changes), 0)
    state = run.fresh_state()
    start = params(jax.tree.map(np.asarray, state.params))
    moved, metrics = run.batch_runner(0)(
        dataclasses.replace(state, params=jax.tree.map(jnp.asarray, start)), 0, SCHEDULE
    )
    change = jax.tree.map(lambda new, old: np.asarray(new, np.float64) - old, moved.params, start)
    assert ("logit_scale" in metrics) == ("model.logit_scale" in changes)
    if "logit_scale" in metrics:
        np.testing.assert_allclose(metrics["logit_scale"], SCALE, rtol=1e-6)  # as the step met it
    return start, change, float(metrics["loss"])


@pytest.mark.nightly
@pytest.mark.x64_off
def test_a_scale_is_that_of_a_head():
    """With free rows: s in the loss is what rows and biases s times as long are, for the loss and all its gradients."""
    start, change, loss = stepped(lambda params: params, **{"model.logit_scale": SCALE})
    np.testing.assert_allclose(start[LOG_SCALE], math.log(SCALE), rtol=1e-6)

    def larger(params):
        return {**params, "head": jax.tree.map(lambda a: SCALE * a, start["head"])}

    other, expected, larger_loss = stepped(larger)
    assert LOG_SCALE not in other
    np.testing.assert_allclose(loss, larger_loss, rtol=1e-5)
    body = [name for name in start if name not in (LOG_SCALE, "head")]
    for name in body:
        for found, wanted in zip(*(jax.tree.leaves(c[name]) for c in (change, expected)), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())
    # d/d log s is the derivative along the head itself.
    products = [np.sum(d * a) for d, a in zip(*map(jax.tree.leaves, (expected["head"], other["head"])), strict=True)]
    np.testing.assert_allclose(change[LOG_SCALE], sum(products), rtol=1e-3)
    assert abs(change[LOG_SCALE]) > 1e-6
    plain = stepped(lambda params: params)[2]
    assert abs(plain - loss) > 1e-3  # control: the scale is seen


@pytest.mark.x64_off
def test_the_cross_entropy_of_validation_is_that_of_the_scaled_logits():
    run = Run(tiny_config(**{"model.logit_scale": SCALE}), 0)
    state, part = run.fresh_state(), run.dataset.split("validation")
    found = run.validator()(state)
    params = {name: value for name, value in state.params.items() if name != LOG_SCALE}
    variables = {"params": {**params, LOG_SCALE: jnp.zeros(())}, "lip": state.lip}
    logits = np.asarray(jax.jit(run.model.apply)(variables, jnp.asarray(part.images / np.float32(255))), np.float64)

    def cross_entropy(z):
        z = z - z.max(axis=1, keepdims=True)
        return np.mean(np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(z)), part.labels])

    np.testing.assert_allclose(found["cross_entropy"], cross_entropy(SCALE * logits), rtol=1e-5)
    assert abs(cross_entropy(SCALE * logits) - cross_entropy(logits)) > 1e-3  # control
    np.testing.assert_allclose(found["accuracy"], np.mean(logits.argmax(axis=1) == part.labels))


SIZES = {
    "lipconvnet": {"depth": 2, "num_blocks": 2, "width": 2},
    "lipnext": {"tokens": 4, "width": 8, "depth": 1, "shift": 1 / 8, "regions": 2, "neck_features": 4},
    "liresnet": {"depth": 1, "width": 4, "stem_strides": 1},
}


@pytest.mark.parametrize("name", everyday(SIZES, "liresnet"))
def test_no_certificate_sees_the_scale(name):
    options = {"input_shape": (8, 8, 1), "num_classes": 3, **SIZES[name]}
    model = MODELS[name](**options, logit_scale=SCALE)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    params = dict(variables["params"])
    assert params[LOG_SCALE].shape == ()
    frozen = lipjax.freeze(model, {**variables, "params": params | {LOG_SCALE: 7.0}})
    del params[LOG_SCALE]
    assert frozen.sha256() == lipjax.freeze(MODELS[name](**options), {**variables, "params": params}).sha256()


def test_weight_decay_leaves_the_scale_alone():
    params = {"head": {"matrix": jnp.ones((2, 2))}, LOG_SCALE: jnp.ones(())}
    assert decay_mask("all")(params) == {"head": {"matrix": True}, LOG_SCALE: False}
