"""Composites of users: what every walk relies on is checked whether their classes do so or not."""

import numpy as np
import pytest

from lipjax import FrozenNetwork, operators
from lipjax.network import Network, make_network

pytestmark = pytest.mark.quick_compiles


@operators.operator("first", "second", static=("adds_input", "out_shape"))
class Careless(operators.Composite):
    """A composite of a user who checks nothing: shapes that do not chain, and sums that NumPy broadcasts."""

    first: operators.Leaf
    second: operators.Leaf
    adds_input: bool = True
    out_shape: tuple = (4,)

    @property
    def in_shape(self):
        return (4,)

    def check(self):
        pass

    def parts(self):
        return self.first, self.second

    def with_parts(self, parts):
        return Careless(*parts, self.adds_input, self.out_shape)

    def lipschitz_of(self, product):
        return product + 1 if self.adds_input else product


def dense(out, inputs):
    return operators.Dense(np.eye(out, inputs))


@pytest.mark.parametrize(
    ("composite", "message"),
    [
        (Careless(dense(3, 4), dense(1, 3)), r"operator 1 gives shape \(1,\), but the sum takes \(4,\)"),
        (Careless(dense(3, 4), dense(1, 3), False), r"operator 1 gives shape \(1,\), but the Careless gives \(4,\)"),
        (
            Careless(dense(3, 4), dense(4, 3), True, (5,)),
            r"operator 1 gives shape \(4,\), but the Careless gives \(5,\)",
        ),
        (Careless(dense(3, 4), dense(4, 1)), r"operator 0 gives shape \(3,\), but operator 1 takes \(1,\)"),
        (Careless(dense(3, 1), dense(4, 3)), r"the Careless takes shape \(4,\), but operator 0 takes \(1,\)"),
        (Careless(operators.Residual((dense(4, 4),)), dense(4, 4)), "operator 0: Residual cannot stand inside"),
        (Careless(np.eye(4), dense(4, 4)), "operator 0: ndarray cannot stand inside"),
    ],
)
def test_a_composite_whose_parts_do_not_chain_is_never_bounded(composite, message):
    head = operators.LinearHead(np.eye(composite.out_shape[0]), np.zeros(composite.out_shape[0]))
    with pytest.raises(ValueError, match=message):
        composite.bound()
    with pytest.raises(ValueError, match=f"block: {message}"):
        make_network([("block", composite)], head)
    network = Network((composite,), head, np.zeros(1), np.ones(1), ("block",))
    with pytest.raises(ValueError, match=message):
        FrozenNetwork(network)


def test_a_careless_composite_that_chains_is_taken():
    fine = Careless(dense(3, 4), dense(4, 3))
    assert fine.bound().proved >= 2
    head = operators.LinearHead(np.eye(4), np.zeros(4))
    assert FrozenNetwork(make_network([("block", fine)], head)).certify(np.full((1, 4), 0.5)).margins.shape == (1,)
