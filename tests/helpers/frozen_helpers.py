"""Small networks to freeze."""

import jax
import jax.numpy as jnp
import numpy as np

from lipjax import operators
from lipjax.certify import FrozenNetwork
from lipjax.models import LiResNet
from lipjax.network import make_network


def small_network(scale=1.0, seed=0, mean=0.3, std=0.7):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) * scale)  # noqa: E731
    ops = [
        ("conv", operators.Conv(draw(3, 3, 1, 2), (3, 3, 1))),
        ("bias", operators.Bias(draw(2), (3, 3, 2))),
        ("act", operators.MaxMin((3, 3, 2))),
        ("flat", operators.Flatten((3, 3, 2))),
        ("dense", operators.Dense(draw(4, 18))),
        ("act2", operators.MaxMin((4,))),
    ]
    return make_network(ops, operators.LinearHead(draw(3, 4), draw(3)), mean, std)


def frozen_network(**kwargs):
    return FrozenNetwork(jax.tree.map(np.asarray, small_network(**kwargs)))


def small_model():
    """A LiResNet and its variables, which are float32."""
    model = LiResNet(
        input_shape=(8, 8, 1), num_classes=3, depth=2, width=4, stem_kernel=3, stem_strides=1, stem_padding=1
    )
    jax.config.update("jax_enable_x64", False)
    try:
        variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1), jnp.float32))
    finally:
        jax.config.update("jax_enable_x64", True)
    return model, variables
