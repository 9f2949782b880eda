"""Golden files, and comparisons with what they hold: arrays of the original implementations, NCHW and OIHW."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


def load(name):
    """The arrays of a golden file by name, and its metadata."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        arrays = dict(file)
    return arrays, json.loads(str(arrays.pop("meta")))


def nhwc(a):
    """Images (b, c, h, w) as (b, h, w, c)."""
    return jnp.asarray(np.moveaxis(a, 1, -1))


def hwio(a):
    """Kernels (..., o, i, h, w) as (..., h, w, i, o)."""
    return jnp.asarray(np.moveaxis(a, (-4, -3, -2, -1), (-1, -2, -4, -3)))


def relative(ours, theirs):
    """The largest difference by the largest modulus of theirs, or itself where they are all zero."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / (np.abs(theirs).max() or 1.0)
