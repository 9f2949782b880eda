"""Operators on maps of tokens: what they do, that they never stretch, their rounding errors, what is refused."""

import decimal
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from soundness_helpers import FEW, search

from lipjax import FrozenNetwork, operators
from lipjax.network import make_network
from lipjax.numerics import UNDERFLOW_OF_OPERATOR
from lipjax.operators import L2Pool, PositionalBias, Shift


def test_shifts_are_those_of_five_groups():
    """Token by token; on a map of one row nothing moves up or down."""
    for h, w in ((3, 4), (1, 3), (3, 1), (1, 1), (2, 2)):
        x = np.random.default_rng(0).normal(size=(2, h, w, 11))
        y = np.asarray(Shift((h, w, 11), 2)(jnp.asarray(x)))
        for i, j in np.ndindex(h, w):
            sources = [((i + 1) % h, j), ((i - 1) % h, j), (i, (j + 1) % w), (i, (j - 1) % w)]
            for group, (p, q) in enumerate(sources):
                np.testing.assert_array_equal(
                    y[:, i, j, 2 * group : 2 * group + 2], x[:, p, q, 2 * group : 2 * group + 2]
                )
        np.testing.assert_array_equal(y[..., 8:], x[..., 8:])
    assert not np.array_equal(y[..., :8], x[..., :8])  # control


def exact_pool(op, x):
    """Numbers of 60 digits, of an array of float64."""
    with decimal.localcontext(prec=60):
        (h, w), (rows, columns) = op.in_shape[:2], op.regions
        found = np.full((len(x), *op.out_shape), decimal.Decimal(op.delta), dtype=object)
        for b, i, j, c in np.ndindex(x.shape):
            found[b, i * rows // h, j * columns // w, c] += decimal.Decimal(float(x[b, i, j, c])) ** 2
        return np.vectorize(decimal.Decimal.sqrt, otypes=[object])(found)


def length(array):
    with decimal.localcontext(prec=60):
        return sum(value * value for value in array.ravel()).sqrt()


POOLS = [
    L2Pool((4, 6, 3)),
    L2Pool((4, 6, 3), (2, 3)),
    L2Pool((4, 6, 3), (4, 6), 2.0**-64),
    L2Pool((4, 6, 3), (1, 2), 2.0**64),
    L2Pool((1, 1, 2)),
]


@pytest.mark.parametrize("op", POOLS, ids=repr)
def test_pools_are_lengths_and_round_as_little_as_stated(op):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(6, *op.in_shape)) * 10.0 ** np.array([0, 0, -9, 5, -150, -170]).reshape(6, 1, 1, 1)
    x[1] = 0
    x[2, 0] = 5e-324
    y, stated = (
        np.asarray(jax.jit(f)(op, jnp.asarray(x))) for f in (lambda o, x: o(x), lambda o, x: o.rounding_error(x))
    )
    exact = exact_pool(op, x)
    for got, wanted, bound in zip(y, exact, stated, strict=True):
        error = length(np.vectorize(decimal.Decimal)(got) - wanted)
        assert error <= decimal.Decimal(float(bound)) + decimal.Decimal(UNDERFLOW_OF_OPERATOR)
        assert bound <= 1e-13 * np.linalg.norm(got)
    np.testing.assert_array_equal(y[1], np.sqrt(op.delta))
    # Control: the oracle tells another delta, and another grid.
    assert (
        float(length(np.vectorize(decimal.Decimal)(y[0]) - exact_pool(L2Pool(op.in_shape, op.regions, 0.1), x)[0]))
        > 1e-6
    )


def test_gradients_of_pools_are_finite_at_zero():
    for dtype in (jnp.float64, jnp.float32):
        op = L2Pool((4, 6, 3), (2, 3), 2.0**-64)
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(op(x))))(jnp.zeros((1, 4, 6, 3), dtype))  # noqa: B023
        assert gradient.dtype == dtype and not np.asarray(gradient).any()
    x = jax.random.normal(jax.random.key(0), (1, 4, 6, 3))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(L2Pool((4, 6, 3), delta=1e-9)(x))))(x)
    np.testing.assert_allclose(gradient, x / jnp.linalg.norm(x, axis=(1, 2), keepdims=True), rtol=1e-8)


@st.composite
def pools(draw):
    rows, columns, size, channels = (draw(st.integers(1, 3)) for _ in range(4))
    seed, scale = draw(st.integers(0, 2**32)), draw(st.sampled_from([0, -3, -8, 6]))
    near, delta = draw(st.booleans()), draw(st.sampled_from([2.0**-64, 1e-6, 1.0]))

    def make():
        rng = np.random.default_rng(seed)
        op = L2Pool((rows * size, columns * size, channels), (rows, columns), delta)
        x = rng.normal(size=(1, *op.in_shape)) * 10.0**scale
        z = x * (1 + 1e-6) if near else rng.normal(size=x.shape) * 10.0**scale
        return op, x, z

    return make


def test_pools_never_stretch():
    """With 60 digits, at random pairs: the bound 1 is attained along x, and below it something would be false."""
    found = []

    def check(example):
        op, x, z = example
        with decimal.localcontext(prec=60):
            moved = length(exact_pool(op, x) - exact_pool(op, z))
            ratio = moved / length(np.vectorize(decimal.Decimal)(x) - np.vectorize(decimal.Decimal)(z))
        assert ratio <= decimal.Decimal(op.bound().proved)
        found.append(float(ratio))

    search(check, pools(), FEW)
    assert max(found) > 0.999


def test_what_is_far_too_large_is_not_certified():
    """Squares overflow: the error is infinite, so nothing is proved, and nothing fails."""
    ops = [("pool", L2Pool((2, 2, 1))), ("flat", operators.Flatten((1, 1, 1)))]
    head = operators.LinearHead(np.array([[1.0], [-1.0]]), np.array([0.0, 1e-3]))
    images = np.array([[0.5, 0.25, 0.1, 0.9]]).reshape(1, 2, 2, 1)
    radii = [FrozenNetwork(make_network(ops, head, 0.0, std)).certify(images).radii[0] for std in (1.0, 1e-200)]
    assert radii[0] > 0 and radii[1] == 0


def test_a_bias_by_position_is_a_translation(key):
    bias = jax.random.normal(key, (3, 4, 1))
    op = PositionalBias(bias, (3, 4, 5))
    x = jax.random.normal(jax.random.key(1), (2, 3, 4, 5))
    y = np.asarray(op(x))
    for i, j in np.ndindex(3, 4):
        np.testing.assert_array_equal(y[:, i, j], x[:, i, j] + bias[i, j, 0])
    assert op.bound().proved == 1.0
    error = np.asarray(op.rounding_error(x))
    exact = [
        sum((Fraction(float(a)) + Fraction(float(p)) - Fraction(float(b))) ** 2 for a, p, b in zip(*rows, strict=True))
        for rows in zip(
            np.asarray(x).reshape(2, -1),
            [np.broadcast_to(bias, x.shape[1:]).ravel()] * 2,
            y.reshape(2, -1),
            strict=True,
        )
    ]
    assert all(0 < e <= Fraction(float(bound)) ** 2 for e, bound in zip(exact, error, strict=True))
    with pytest.raises(ValueError, match="expects a batch"):
        op(x[:, :1])
