"""Arrays for PyTorch: its own layers, written down here by XLA's convolutions of images with channels first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from deployment_helpers import frozen_network

from lipjax import UserError, freeze, operators
from lipjax.network import make_network

ORDER = ("NCHW", "OIHW", "NCHW")


def conv2d(x, weight, bias, stride, padding, groups):
    """torch.nn.functional.conv2d."""
    pads = [(padding, padding)] * 2
    y = jax.lax.conv_general_dilated(
        x, weight, (stride,) * 2, pads, dimension_numbers=ORDER, feature_group_count=groups
    )
    return y + bias[:, None, None]


def conv_transpose2d(y, weight, bias, shape, stride, padding):
    """torch.nn.functional.conv_transpose2d: the gradient of conv2d with respect to its input, of this shape."""
    x = jnp.zeros((len(y), *shape))
    return (
        jax.vjp(lambda x: conv2d(x, weight, jnp.zeros(len(weight)), stride, padding, 1), x)[1](y)[0]
        + bias[:, None, None]
    )


def logits_of(frozen, images):
    return jax.tree.map(jnp.asarray, frozen.network)(jnp.asarray(images))


def some_network(rng):
    up = operators.Conv(rng.normal(size=(3, 3, 3, 4)), (8, 6, 3), 2, "ZERO")
    return [
        ("stem/linear", operators.Conv(rng.normal(size=(3, 3, 2, 4)), (8, 6, 4), 2, "ZERO", 2)),
        ("stem/bias", operators.Bias(rng.normal(size=4), (4, 3, 4))),
        ("stem/activation", operators.MaxMin((4, 3, 4))),
        ("up", operators.ConvTranspose(up)),
        ("up_bias", operators.Bias(rng.normal(size=3), (8, 6, 3))),
        ("flat", operators.Flatten((8, 6, 3))),
        ("relu", operators.ReLU((144,))),
        ("block", operators.Residual((operators.Dense(rng.normal(size=(144, 144)) / 12), operators.ReLU((144,))))),
    ]


def test_pytorch_computes_the_same_of_its_arrays():
    rng = np.random.default_rng(0)
    ops = some_network(rng)[:-1] + [("dense", operators.Dense(rng.normal(size=(5, 144))))]
    ops.append(("dense_bias", operators.Bias(rng.normal(size=5), (5,))))
    head = operators.LinearHead(rng.normal(size=(3, 5)), rng.normal(size=3))
    frozen = freeze(make_network(ops, head, 0.3, (0.5, 1.0, 2.0, 4.0)))
    images = rng.uniform(size=(3, 8, 6, 4))
    state = frozen.to_torch_state()
    weights = [name for name in state if name.endswith("weight")]
    assert weights == ["stem.linear.weight", "up.weight", "dense.weight", "head.weight"]

    x = images.transpose(0, 3, 1, 2)
    x = (x - state["input_mean"][:, None, None]) / state["input_std"][:, None, None]
    x = conv2d(x, state["stem.linear.weight"], state["stem.linear.bias"], 2, 1, 2)
    a, b = jnp.split(x, 2, axis=1)
    x = jnp.concatenate([jnp.maximum(a, b), jnp.minimum(a, b)], axis=1)
    x = conv_transpose2d(x, state["up.weight"], state["up.bias"], (3, 8, 6), 2, 1)
    x = jax.nn.relu(x.reshape(len(x), -1))  # torch.flatten(x, 1)
    x = x @ state["dense.weight"].T + state["dense.bias"]
    logits = x @ state["head.weight"].T + state["head.bias"]
    np.testing.assert_allclose(logits, logits_of(frozen, images), rtol=1e-12, atol=1e-12)


def test_heads_behind_a_flattening_and_parts_of_blocks():
    rng = np.random.default_rng(0)
    head = operators.MLPHead(*(rng.normal(size=shape) for shape in ((5, 12), (5,), (3, 5), (3,))))
    frozen = freeze(make_network([("flat", operators.Flatten((2, 3, 2)))], head))
    images, state = rng.uniform(size=(4, 2, 3, 2)), frozen.to_torch_state()
    x = jax.nn.softplus(images.transpose(0, 3, 1, 2).reshape(4, -1) @ state["head.0.weight"].T + state["head.0.bias"])
    logits = x @ state["head.2.weight"].T + state["head.2.bias"]
    np.testing.assert_allclose(logits, logits_of(frozen, images), rtol=1e-10)
    dense = operators.Residual((operators.Dense(rng.normal(size=(4, 4))), operators.ReLU((4,))))
    frozen = freeze(make_network([("block", dense)], operators.LinearHead(np.eye(4), np.zeros(4))))
    np.testing.assert_array_equal(frozen.to_torch_state()["block.0.weight"], dense.ops[0].matrix)


def refused(*ops):
    last = ops[-1][1].out_shape
    if len(last) > 1:
        ops = (*ops, ("flat", operators.Flatten(last)))
        last = ops[-1][1].out_shape
    return freeze(make_network(ops, operators.LinearHead(np.eye(*2 * last), np.zeros(last)))).to_torch_state()


def test_what_pytorch_has_no_layer_for_is_refused_by_name():
    with pytest.raises(UserError, match="op3: no plain layer of PyTorch holds the arrays of a ConvExponential"):
        frozen_network("convolutional").to_torch_state()
    with pytest.raises(UserError, match="bias: no plain layer of PyTorch holds the arrays of a Bias in this place"):
        refused(("act", operators.ReLU((2,))), ("bias", operators.Bias(np.ones(2), (2,))))
    with pytest.raises(UserError, match="pairs: a MaxMin between a Flatten and the next dense layer"):
        refused(("flat", operators.Flatten((2, 2, 2))), ("pairs", operators.MaxMin((8,))))


def _added(kind):
    linear, relu = operators.Dense(np.eye(8)), operators.ReLU((8,))
    return {
        "residual": operators.Residual((linear, relu)),
        "later": operators.Residual((relu, linear)),
        "step": operators.PotentialStep(linear, np.zeros(8), relu),
    }[kind]


@pytest.mark.parametrize("kind", ["residual", "later", "step"])
def test_sums_with_numbers_in_two_orders_are_refused(kind):
    with pytest.raises(UserError, match="block/0: what it is a part of adds numbers in the order"):
        refused(("flat", operators.Flatten((2, 2, 2))), ("relu", operators.ReLU((8,))), ("block", _added(kind)))
    for shape in ((2, 4, 1), (1, 1, 8)):  # control: one order
        refused(("flat", operators.Flatten(shape)), ("block", _added(kind)))
    fixed = ("dense", operators.Dense(np.eye(8)))  # control: the order is the network's own again
    refused(("flat", operators.Flatten((2, 2, 2))), fixed, ("block", _added(kind)))


@pytest.mark.parametrize(("fraction", "allowed"), [(0.0, True), (0.5, False), (1.0, True)])
def test_a_modulus_of_the_first_places_is_refused_in_another_order(fraction, allowed):
    ops = ("flat", operators.Flatten((2, 2, 2))), ("first", operators.PartialAbs((8,), fraction))
    if allowed:
        assert refused(*ops)["head.weight"].shape == (8, 8)
    else:
        with pytest.raises(UserError, match="first: a PartialAbs between a Flatten and the next dense layer"):
            refused(*ops)
