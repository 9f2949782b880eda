"""Activations with parameters per channel as modules: how they start, train, freeze and certify."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lipjax
from lipjax import losses
from lipjax.nn import AOLConv, AOLDense, LinearHead, LinearSpline, LipschitzModel, NActivation, flatten

SHAPE = (4, 4, 2)


class Net(LipschitzModel):
    def layers(self):
        thresholds = lambda shape: NActivation(4.0, name="activation")(shape)  # noqa: E731
        spline = lambda shape: LinearSpline(9, 0.5, name="activation")(shape)  # noqa: E731
        first = AOLConv(4, activation=thresholds, name="first")
        return [first, flatten, AOLDense(6, activation=spline, name="second")], LinearHead(3, name="head")


@pytest.mark.x64_off
def test_they_start_as_they_say_train_and_are_certified():
    model = Net(SHAPE, 3)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *SHAPE)))
    network = jax.jit(lambda v: model.apply(v, method="build"))(variables)
    ops = dict(zip(network.names, network.ops, strict=True))
    x = jnp.linspace(-3.0, 3.0, 13)[:, None]
    first = ops["first/activation"](jnp.broadcast_to(x[:, None, None], (13, 4, 4, 4)))[:, 0, 0]
    shifted = np.where(x < -1, x + 2, np.where(x < 0, -x, x))
    np.testing.assert_allclose(first, np.concatenate([shifted, x, shifted, x], 1), atol=1e-6)
    second = ops["second/activation"](jnp.broadcast_to(x, (13, 6)))
    np.testing.assert_allclose(second, np.concatenate([np.abs(x), x] * 3, 1), atol=1e-6)
    rng = np.random.default_rng(0)
    images, labels = jnp.asarray(rng.uniform(size=(16, *SHAPE)), jnp.float32), jnp.asarray(rng.integers(0, 3, 16))
    optimizer = optax.adam(0.05)

    @jax.jit
    def step(params, state):
        def loss(params):
            network, _ = model.apply({"params": params, "lip": variables["lip"]}, True, method="build", mutable=["lip"])
            return losses.offset_cross_entropy(network(images), labels, offset=0.2, temperature=0.25).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value, gradient

    params, state, values = variables["params"], optimizer.init(variables["params"]), []
    for _ in range(6):
        params, state, value, gradient = step(params, state)
        values.append(float(value))
    assert values[-1] < values[0]
    for name in (
        ("first", "activation", "theta"),
        ("second", "activation", "values"),
        ("second", "activation", "scale"),
    ):
        found = gradient
        for part in name:
            found = found[part]
        assert np.isfinite(found).all() and np.abs(found).max() > 0, name
    frozen = lipjax.freeze(model, {**variables, "params": params})
    rows = {row.name: row for row in frozen.lipschitz_report()}
    assert rows["first/activation"].claimed == 1.0 and rows["second/activation"].claimed < 1 + 1e-12
    x = np.asarray(images, np.float64)
    np.testing.assert_allclose(frozen(x), jax.jit(model.apply)({**variables, "params": params}, images), atol=1e-4)
    assert frozen.certify(x).radii.max() > 0


def test_another_start_is_refused_by_name():
    with pytest.raises(ValueError, match="start to be one of .*'alternating'.*, got 'tanh'"):
        LinearSpline(start="tanh").init(jax.random.key(0), (4,))
    for start, expected in (("relu", [0.0, 0.0, 0.5]), ("identity", [-0.5, 0.0, 0.5])):
        variables = LinearSpline(3, 0.5, start, use_scale=False).init(jax.random.key(0), (2,))
        assert set(variables["params"]) == {"values"}
        np.testing.assert_array_equal(variables["params"]["values"], [expected] * 2)
