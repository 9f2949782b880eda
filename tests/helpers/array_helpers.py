"""Norms of batches."""

import numpy as np


def norms(delta):
    """l2 norms (b,) of a batch, in float64."""
    return np.sqrt((np.asarray(delta, np.float64) ** 2).reshape(len(delta), -1).sum(1))
