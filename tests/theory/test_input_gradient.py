"""Gradients to images through the adjoints of operators: those of automatic differentiation, fast inside loops."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from deployment_helpers import NETWORKS, draw, frozen_network, pixels
from tiers import everyday

from lipjax import attacks, operators
from lipjax.attacks.input_gradient import of_images
from lipjax.certify.frozen import float64_on_cpu
from lipjax.network import make_network


@pytest.mark.quick_compiles
@pytest.mark.parametrize("name", everyday(NETWORKS, "potential"))
def test_gradients_are_those_of_automatic_differentiation(name):
    frozen = frozen_network(name)
    with float64_on_cpu():
        network = jax.tree.map(jnp.asarray, frozen.network)
        x = jnp.asarray(pixels(frozen, 3))
        weights = jnp.asarray(np.random.default_rng(0).normal(size=(3, frozen.num_classes)))
        assert np.array_equal(jax.jit(of_images(network))(x), jax.jit(lambda x: network(x))(x))
        wanted, found = (
            jax.jit(jax.grad(lambda x, f=f: jnp.sum(f(x) * weights)))(x) for f in (network, of_images(network))
        )
        assert np.abs(wanted).max() > 0
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12 * float(np.abs(wanted).max()))


@pytest.mark.nightly
@pytest.mark.quick_compiles
def test_attacks_are_constants_of_adversarial_training():
    frozen = frozen_network("convolutional")
    network = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), frozen.network)
    x, y = jnp.asarray(pixels(frozen, 2), jnp.float32), jnp.zeros(2, int)

    def loss(network, through):
        moved = attacks.pgd_l2(network, x, y, 0.1, jax.random.key(0), num_steps=2)
        return jnp.sum(network(moved if through else jax.lax.stop_gradient(moved))[:, 0])

    ours, constant = (jax.jit(jax.grad(loss), static_argnums=1)(network, through) for through in (True, False))
    assert max(float(jnp.abs(a).max()) for a in jax.tree.leaves(ours)) > 0
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(constant), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_other_functions_and_wrong_images():
    function = lambda x: x  # noqa: E731
    assert of_images(function) is function
    network = frozen_network("convolutional").network
    with pytest.raises(ValueError, match="The network expects images"):
        of_images(network)(jnp.zeros((1, 2, 3)))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="how XLA's CPU compiler lays out convolutions")
@pytest.mark.parametrize("method", everyday([attacks.pgd_l2, attacks.apgd_l2], attacks.apgd_l2))
def test_no_convolution_in_the_loop_has_operands_in_another_order(method):
    rng = np.random.default_rng(0)
    ops = [
        ("strided", operators.Conv(draw(rng, 3, 3, 2, 4), (12, 12, 2), 2)),
        ("act", operators.MaxMin((6, 6, 4))),
        ("conv", operators.Conv(draw(rng, 3, 3, 4, 4), (6, 6, 4))),
        ("flat", operators.Flatten((6, 6, 4))),
    ]
    network = make_network(ops, operators.LinearHead(draw(rng, 3, 144), np.zeros(3)))
    network = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), network)
    x, y = jnp.full((8, 12, 12, 2), 0.5, jnp.float32), jnp.zeros(8, int)

    def orders(function):
        run = jax.jit(lambda x: method(function, x, y, 0.1, jax.random.key(0), num_steps=7))
        return set(re.findall(r"convolution\(.*dim_labels=(\w+->\w+)", run.lower(x).compile().as_text()))

    assert orders(network) == {"b01f_01io->b01f"}
    assert orders(lambda x: network(x)) - {"b01f_01io->b01f"}  # control: automatic differentiation
