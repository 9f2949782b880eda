"""Memory of batches, written again as soon as nobody can read it any more."""

import math
import sys
from typing import Any

import numpy as np

_ALIGNMENT = 64  # bytes; JAX on a CPU reads arrays that begin so in place, and copies others


class KeptBuffers:
    """Arrays of one shape whose memory is used again once nothing refers to them.

    Fresh memory costs the clearing of its pages: of 1024 images of 224 x 224 pixels nearly as much as the copy.
    But a batch that was handed over may still be read: by a device to which it is on its way, by an array of JAX that
    shares its memory (on CPUs), by a caller who keeps it. All of these hold a reference to the array or to a view of
    it, and with that to what owns the memory. So memory is free if nothing but this object refers to its owner; until
    some is, there is more of it.

    Args: shape, dtype: of every array.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any = np.uint8):
        self._shape, self._dtype = shape, np.dtype(dtype)
        self._size = math.prod(shape) * self._dtype.itemsize
        self._owners: list[np.ndarray] = []

    def __len__(self) -> int:
        """How many arrays there is memory for."""
        return len(self._owners)

    def take(self) -> np.ndarray:
        """An array with anything in it, which nobody else reads or writes."""
        free = (i for i in range(len(self._owners)) if _references(self._owners, i) == _ALONE)
        index = next(free, None)
        if index is None:
            index = len(self._owners)
            self._owners.append(np.empty(self._size + _ALIGNMENT, np.uint8))
        owner = self._owners[index]
        start = -owner.ctypes.data % _ALIGNMENT
        return owner[start : start + self._size].view(self._dtype).reshape(self._shape)


def _references(owners: list[np.ndarray], index: int) -> int:
    return sys.getrefcount(owners[index])


_ALONE = _references([np.empty(0)], 0)  # of an array in a list that nothing else refers to
