"""What the base of all models takes for a layer, and what it says of anything else."""

from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import pytest

import lipjax.nn
from lipjax.nn import LipschitzModel


class Odd(LipschitzModel):
    """A model with something else in the place of a layer or the head."""

    layer: Any = lipjax.nn.Dense(4)
    head: Any = lipjax.nn.LinearHead(2)

    def layers(self):
        return [lipjax.nn.flatten, self.layer], self.head


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": flax.linen.Dense(4)}, "gives a flax.linen.linear.Dense, but expected are layers: called with"),
        ({"layer": flax.linen.Dropout(0.5)}, "A layer of Flax maps arrays to arrays"),
        ({"layer": lambda shape, train: jnp.ones(3)}, r"function that returned a .*, but expected are layers"),
        ({"layer": lambda shape, train: []}, "function that returned a list, but expected are layers"),
        ({"layer": 3}, "gives a builtins.int, but expected are layers"),
        ({"head": flax.linen.Dense(2)}, "linear.Dense, but expected are a head: .*LinearHead returns a Head"),
        ({"head": lipjax.nn.Dense(2)}, "Dense that returned a list, but expected are a head"),
    ],
)
def test_what_is_no_layer_is_told_what_a_layer_is(options, message):
    x = jnp.zeros((1, 2, 2, 1))
    with pytest.raises(ValueError, match=message):
        Odd((2, 2, 1), 2, **options).init(jax.random.key(0), x)


def test_what_is_a_layer_is_taken():
    assert Odd((2, 2, 1), 2).init_with_output(jax.random.key(0), jnp.zeros((1, 2, 2, 1)))[0].shape == (1, 2)
