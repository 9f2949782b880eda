"""Chains of linear operators, and what they are as matrices."""

import jax
import numpy as np

from lipjax import bounds
from lipjax.bounds import host_map
from lipjax.operators import (
    Conv,
    Crop,
    CropChannels,
    PadChannels,
    Shift,
    SpaceToDepth,
    ZeroPad,
)

ONE = ((1, 1), (1, 1))


estimate = jax.jit(bounds.liplt_estimate, static_argnums=(2, 3), static_argnames="max_rows")


def on_host(tree):
    return jax.tree.map(np.asarray, tree)


def off_diagonal(matrix):
    return np.asarray(matrix)[~np.eye(len(matrix), dtype=bool)]


def dense(ops):
    """The matrix of operators in turn, from the images of unit vectors."""
    size = int(np.prod(ops[0].in_shape))
    x = np.eye(size).reshape(size, *ops[0].in_shape)
    return np.asarray(_in_turn(tuple(ops), x)).reshape(size, -1).T


@jax.jit
def _in_turn(ops, x):
    for op in ops:
        x = op(x)
    return x


def norm(matrix):
    return np.linalg.norm(matrix, 2)


CHAINS = {
    "strides": [
        Conv(np.ones((3, 3, 2, 3)), (8, 7, 2), 1, ONE),
        Conv(np.ones((4, 4, 3, 4)), (8, 7, 3), (2, 1), ONE),
        Conv(np.ones((2, 3, 4, 2)), (4, 6, 4), 2, "VALID"),
    ],
    "circular": [
        Conv(np.ones((3, 3, 2, 3)), (8, 8, 2), 2, "CIRCULAR"),
        Conv(np.ones((5, 3, 3, 3)), (4, 4, 3), 1, "CIRCULAR"),
        Conv(np.ones((3, 2, 3, 2)), (4, 4, 3), 2, "CIRCULAR"),
    ],
    "mixed": [
        Conv(np.ones((3, 3, 2, 3)), (8, 8, 2), 1, "CIRCULAR"),
        Conv(np.ones((3, 3, 3, 2)), (8, 8, 3), 2, "ZERO"),
        Conv(np.ones((5, 5, 2, 2)), (4, 4, 2), 1, "CIRCULAR"),
    ],
    "reordered": [
        Conv(np.ones((3, 3, 2, 3)), (4, 6, 2), 1, ONE),
        SpaceToDepth((4, 6, 3), 2),
        PadChannels((2, 3, 12), 14),
        Conv(np.ones((1, 3, 14, 5)), (2, 3, 14), 1, "ZERO"),
        CropChannels((2, 3, 5), 3),
    ],
    "shifted": [
        Conv(np.ones((1, 1, 2, 5)), (4, 6, 2), 1, ONE),
        Shift((6, 8, 5), 1),
        Conv(np.ones((3, 3, 5, 3)), (6, 8, 5), 2, ONE),
    ],
    "padded": [
        ZeroPad((3, 5, 2), ((2, 0), (0, 1))),
        Conv(np.ones((3, 2, 2, 3)), (5, 6, 2), 1, "CIRCULAR"),
        Crop((5, 6, 3), ((2, 0), (1, 0))),
        Conv(np.ones((3, 3, 3, 2)), (3, 5, 3), 1, ONE),
    ],
}


def randomised(ops, seed):
    rng = np.random.default_rng(seed)
    return [
        Conv(rng.normal(size=op.kernel.shape), op.in_shape, op.strides, op.padding) if isinstance(op, Conv) else op
        for op in ops
    ]


def host_maps(ops):
    return [host_map.host_map(op, op.bound().proved) for op in ops]
