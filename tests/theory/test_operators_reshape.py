"""Reorderings, appended and left-out channels: what they do, that they never stretch, and what they refuse."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lipjax import conv
from lipjax.operators import Shift
from lipjax.operators.reshape import ChannelShuffle, Crop, CropChannels, Flatten, PadChannels, SpaceToDepth, ZeroPad

run = jax.jit(lambda op, x: op(x))
run_back = jax.jit(lambda op, y: op.adjoint(y))


def draw(*shape):
    return np.random.default_rng(0).normal(size=shape)


OPERATORS = [
    Flatten((4, 6, 3)),
    SpaceToDepth((4, 6, 3), 2),
    SpaceToDepth((4, 6, 3), 1),
    PadChannels((4, 6, 3), 5),
    PadChannels((4, 6, 3), 3),
    PadChannels((3,), 4),
    CropChannels((4, 6, 3), 2),
    CropChannels((4, 6, 3), 3),
    ChannelShuffle((4, 6, 12), 3),
    ChannelShuffle((4, 6, 12), 3, paired=True),
    ChannelShuffle((6,), 1),
    ZeroPad((4, 6, 3), ((1, 2), (0, 3))),
    ZeroPad((4, 6, 3), ((0, 0), (0, 0))),
    Crop((4, 6, 3), ((1, 2), (0, 3))),
    Crop((4, 6, 3), ((0, 0), (0, 0))),
    Shift((3, 5, 9), 2),
    Shift((4, 1, 4), 1),
    Shift((1, 2, 5), 1),
]


@pytest.mark.parametrize("op", OPERATORS, ids=repr)
def test_shapes_and_lengths(op):
    x = draw(5, *op.in_shape)
    y = run(op, x)
    assert y.shape == (5, *op.out_shape) and y.dtype == x.dtype
    before, after = (np.linalg.norm(np.asarray(a).reshape(5, -1), axis=1) for a in (x, y))
    if math.prod(op.out_shape) < math.prod(op.in_shape):
        assert (after < before).all()
        one = np.zeros((5, *op.in_shape))
        one[:, 1, 1, 0] = 1.0
        assert np.sum(np.asarray(run(op, one)) ** 2) == np.sum(one**2)  # 1 is attained
    else:
        np.testing.assert_allclose(after, before, rtol=1e-14)
    assert op.bound().proved == 1.0
    assert op.rounding_error(x).shape == (5,) and not np.asarray(op.rounding_error(x)).any()
    leaves, tree = jax.tree.flatten(op)
    assert leaves == [] and jax.tree.unflatten(tree, []).out_shape == op.out_shape


@pytest.mark.parametrize("op", OPERATORS, ids=repr)
def test_adjoints_and_maps_of_the_host(op):
    """Against the transpose of the map's matrix; NumPy arrays are moved as JAX arrays are, bit for bit."""
    matrix = np.asarray(run(op, np.eye(math.prod(op.in_shape)).reshape(-1, *op.in_shape)))
    matrix = matrix.reshape(len(matrix), -1).T
    assert set(np.unique(matrix)) <= {0.0, 1.0} and matrix.sum(0).max() == matrix.sum(1).max() == 1
    x, y = draw(2, *op.in_shape), draw(2, *op.out_shape)
    back = np.asarray(run_back(op, y))
    np.testing.assert_array_equal(back.reshape(2, -1), y.reshape(2, -1) @ matrix)
    forward, adjoint = op.host_maps()
    for moved, expected in ((forward(x), run(op, x)), (adjoint(y), back)):
        assert isinstance(moved, np.ndarray)
        np.testing.assert_array_equal(moved, expected)


@pytest.mark.parametrize("op", [op for op in OPERATORS if op.window is not None], ids=repr)
def test_windows_are_the_rows_that_are_read(op):
    stride, low, size = op.window
    for row in range(op.in_shape[0]):
        x = np.zeros((1, *op.in_shape))
        x[:, row] = 1.0
        y = np.asarray(run(op, x))[0]
        reached = np.flatnonzero(y.reshape(len(y), -1).any(1))
        reading = [p for p in range(len(y)) if stride * p - low <= row < stride * p - low + size]
        np.testing.assert_array_equal(reached, reading)


def test_values(key):
    x = jax.random.normal(key, (2, 4, 6, 3))
    np.testing.assert_array_equal(SpaceToDepth((4, 6, 3), 2)(x), conv.space_to_depth(x, 2))
    wide = np.asarray(PadChannels((4, 6, 3), 5)(x))
    np.testing.assert_array_equal(wide[..., :3], x)
    assert not wide[..., 3:].any()
    np.testing.assert_array_equal(CropChannels((4, 6, 3), 2)(x), x[..., :2])
    margins = ((1, 2), (0, 3))
    np.testing.assert_array_equal(ZeroPad((4, 6, 3), margins)(x), np.pad(x, ((0, 0), *margins, (0, 0))))
    np.testing.assert_array_equal(Crop((4, 6, 3), margins)(x), x[:, 1:2, :3])


@pytest.mark.parametrize("paired", [False, True])
def test_channels_are_dealt_out_in_turn(paired, key):
    c, groups = 12, 3
    op = ChannelShuffle((2, 2, c), groups, paired)
    x = np.asarray(jax.random.normal(key, (2, 2, 2, c)))
    y, size = np.asarray(op(x)), 2 if paired else 1
    hands = c // size // groups
    for g, i, p in np.ndindex(groups, hands, size):
        np.testing.assert_array_equal(y[..., (g * hands + i) * size + p], x[..., (i * groups + g) * size + p])
    np.testing.assert_array_equal(op._move_back(y), x)
    assert (np.asarray(op(y)) != x).any()  # control: dealt out again, to as many


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SpaceToDepth((4, 6, 3), 4), "divides the size"),
        (lambda: SpaceToDepth((4, 6, 3), 0), "divides the size"),
        (lambda: SpaceToDepth((12,), 2), "images"),
        (lambda: PadChannels((4, 6, 3), 2), "at least 3"),
        (lambda: CropChannels((4, 6, 3), 4), "between 1 and 3"),
        (lambda: CropChannels((4, 6, 3), 0), "between 1 and 3"),
        (lambda: ZeroPad((12,), ((1, 1), (1, 1))), "images"),
        (lambda: ZeroPad((4, 6, 3), ((1, -1), (1, 1))), "whole numbers >= 0, got"),
        (lambda: Crop((4, 6, 3), ((1, 1), (3, 3))), r"at least one of \(4, 6\) pixels"),
        (lambda: Crop((6,), ((1, 1), (3, 3))), "images"),
        (lambda: Crop((4, 6, 3), ((-1, 1), (3, 2))), "whole numbers >= 0, got"),
        (lambda: Crop((4, 6, 3), ((1, 1), (1, 1)))(jnp.zeros((1, 2, 4, 3))), "expects a batch"),
        (lambda: PadChannels((4, 6, 3), 4)(jnp.zeros((1, 4, 6, 4))), "expects a batch"),
    ],
)
def test_misuse_says_what_was_expected(make, message):
    with pytest.raises(ValueError, match=message):
        make()
