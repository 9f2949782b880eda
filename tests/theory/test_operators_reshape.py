"""Reorderings, appended and left-out channels: what they do, that they never stretch, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lipjax import conv
from lipjax.operators.reshape import CropChannels, Flatten, PadChannels, SpaceToDepth

OPERATORS = [
    Flatten((4, 6, 3)),
    SpaceToDepth((4, 6, 3), 2),
    SpaceToDepth((4, 6, 3), 1),
    PadChannels((4, 6, 3), 5),
    PadChannels((4, 6, 3), 3),
    PadChannels((3,), 4),
    CropChannels((4, 6, 3), 2),
    CropChannels((4, 6, 3), 3),
]


@pytest.mark.parametrize("op", OPERATORS, ids=repr)
def test_shapes_and_lengths(op, key):
    x = jax.random.normal(key, (5, *op.in_shape))
    y = jax.jit(lambda op, x: op(x))(op, x)
    assert y.shape == (5, *op.out_shape) and y.dtype == x.dtype
    before, after = (np.linalg.norm(np.asarray(a).reshape(5, -1), axis=1) for a in (x, y))
    if isinstance(op, CropChannels) and op.channels < op.in_shape[-1]:
        assert (after < before).all()
        one = jnp.zeros((1, *op.in_shape)).at[..., 0].set(1.0)
        assert float(jnp.sum(op(one) ** 2)) == float(jnp.sum(one**2))  # 1 is attained
    else:
        np.testing.assert_allclose(after, before, rtol=1e-14)
    assert op.bound().proved == 1.0
    assert op.rounding_error(x).shape == (5,) and not np.asarray(op.rounding_error(x)).any()
    leaves, tree = jax.tree.flatten(op)
    assert leaves == [] and jax.tree.unflatten(tree, []).out_shape == op.out_shape


def test_values(key):
    x = jax.random.normal(key, (2, 4, 6, 3))
    np.testing.assert_array_equal(SpaceToDepth((4, 6, 3), 2)(x), conv.space_to_depth(x, 2))
    wide = np.asarray(PadChannels((4, 6, 3), 5)(x))
    np.testing.assert_array_equal(wide[..., :3], x)
    assert not wide[..., 3:].any()
    np.testing.assert_array_equal(CropChannels((4, 6, 3), 2)(x), x[..., :2])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SpaceToDepth((4, 6, 3), 4), "divides the size"),
        (lambda: SpaceToDepth((4, 6, 3), 0), "divides the size"),
        (lambda: SpaceToDepth((12,), 2), "images"),
        (lambda: PadChannels((4, 6, 3), 2), "at least 3"),
        (lambda: CropChannels((4, 6, 3), 4), "between 1 and 3"),
        (lambda: CropChannels((4, 6, 3), 0), "between 1 and 3"),
        (lambda: PadChannels((4, 6, 3), 4)(jnp.zeros((1, 4, 6, 4))), "expects a batch"),
    ],
)
def test_misuse_says_what_was_expected(make, message):
    with pytest.raises(ValueError, match=message):
        make()
