"""The arrays of a state dict, one by one: where each goes, and how it is laid out there."""

import dataclasses
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Entry:
    """One array of a state dict: its name there, the collection and path here, and how it is transformed.

    back: the shape here to the shape there. part: (i, n) if it is the i-th of n arrays that are stacked there.
    further: names of arrays there that transform takes behind the first, as they are.
    """

    name: str
    collection: str
    path: tuple[str | int, ...]
    transform: Callable[..., np.ndarray]
    back: Callable[[tuple[int, ...]], tuple[int, ...]]
    part: tuple[int, int] | None = None
    further: tuple[str, ...] = ()


def plain(name: str, *path) -> Entry:
    """An array whose layout is the same on both sides."""
    return Entry(name, "params", path, lambda a: a, lambda shape: shape)


def conv_kernel(name: str, *path, keep: int | None = None) -> Entry:
    """A convolution kernel, OIHW there; keep: taps from here on are zero."""

    def transform(array):
        kernel = np.transpose(array, (2, 3, 1, 0)).copy()
        if keep is not None:
            kernel[keep:] = 0
            kernel[:, keep:] = 0
        return kernel

    return Entry(name, "params", path, transform, lambda s: (s[3], s[2], s[0], s[1]))


def vector(name: str, array, *path) -> Entry:
    """A vector, which may have axes of length 1 there."""
    there = np.shape(array)

    def back(shape):
        return there if int(np.prod(there)) == shape[0] and max(there, default=1) == shape[0] else shape

    return Entry(name, "params", path, lambda a: a.reshape(-1), back)


def choose(options: dict, name: str, known: dict[str, str]) -> str:
    value = options.pop(name)
    if value not in known:
        raise ValueError(f"{name}: expected one of {sorted(known)}, got {value!r}.")
    return known[value]


def known_options(family: str, options: dict, defaults: dict) -> dict:
    unknown = sorted(set(options) - set(defaults))
    if unknown:
        raise ValueError(f"{family!r} networks have the options {sorted(defaults)}, got {unknown}.")
    return {**defaults, **options}


def dense_matrix(name: str, unflattened: tuple[int, ...] | None, *path) -> Entry:
    """A dense matrix; unflattened: the shape (c, h, w), or (n,), whose flattening it takes there, as (h, w, c) here."""

    def transform(array):
        if unflattened is None or len(unflattened) == 1:
            return array
        return np.transpose(array.reshape(-1, *unflattened), (0, 2, 3, 1)).reshape(array.shape)

    return Entry(name, "params", path, transform, lambda shape: shape)


def patch_kernel(matrix: np.ndarray) -> np.ndarray:
    """(out, in 4 4) -> HWIO."""
    return np.transpose(matrix.reshape(len(matrix), -1, 4, 4), (2, 3, 1, 0))
