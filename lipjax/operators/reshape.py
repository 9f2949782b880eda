"""Reorderings of pixels and channels, zeros appended, pixels and channels left out."""

import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np

from lipjax import conv
from lipjax.operators.base import Reordering, operator


@operator(static=("in_shape",))
class Flatten(Reordering):
    """(h, w, c) -> (h w c,), row major."""

    in_shape: tuple[int, ...]
    _reason = "exact: a reordering"

    @property
    def out_shape(self):
        return (math.prod(self.in_shape),)

    def _move(self, x):
        return x.reshape(x.shape[0], -1)

    def _move_back(self, y):
        return y.reshape(y.shape[0], *self.in_shape)


@operator(static=("in_shape", "block"))
class SpaceToDepth(Reordering):
    """`conv.space_to_depth`: (h, w, c) -> (h / block, w / block, c block^2)."""

    in_shape: tuple[int, ...]
    block: int
    _reason = "exact: a reordering"

    def __post_init__(self):
        if len(self.in_shape) != 3:
            raise ValueError(f"SpaceToDepth expects images: an in_shape (h, w, c), got {self.in_shape}.")
        h, w, _ = self.in_shape
        if not _is_count(self.block) or self.block < 1 or h % self.block or w % self.block:
            raise ValueError(f"SpaceToDepth expects a block >= 1 that divides the size {(h, w)}, got {self.block!r}.")

    @property
    def out_shape(self):
        h, w, c = self.in_shape
        return (h // self.block, w // self.block, c * self.block**2)

    @property
    def window(self):
        return (self.block, 0, self.block)

    def _move(self, x):
        if isinstance(x, jax.Array):
            return conv.space_to_depth(x, self.block)
        (h, w, _), k = self.out_shape, self.block
        return x.reshape(len(x), h, k, w, k, -1).transpose(0, 1, 3, 5, 2, 4).reshape(len(x), *self.out_shape)

    def _move_back(self, y):
        if isinstance(y, jax.Array):
            return conv.depth_to_space(y, self.block)
        (h, w, _), k = self.out_shape, self.block
        return y.reshape(len(y), h, w, -1, k, k).transpose(0, 1, 4, 2, 5, 3).reshape(len(y), *self.in_shape)


@operator(static=("in_shape", "groups", "paired"))
class ChannelShuffle(Reordering):
    """Channels dealt out to groups in turn: output g c / groups + i takes input i groups + g, c channels in all.

    Attributes:
      in_shape: (..., c).
      groups: how many, a divisor of c.
      paired: pairs of neighbouring channels stay together: c / 2 pairs are dealt out.
    Source: Zhang et al. 2018, arXiv:1707.01083; Gorbunov, Yudin, Soboleva, Alanov, Naumov & Rakhuba 2024,
      arXiv:2406.10019 (with grouped orthogonal layers).
    Example:
      >>> lipjax.operators.ChannelShuffle((6,), groups=2)(jnp.arange(6.0)[None])[0].tolist()
      [0.0, 2.0, 4.0, 1.0, 3.0, 5.0]
    """

    in_shape: tuple[int, ...]
    groups: int
    paired: bool = False
    _reason = "exact: a reordering"

    def __post_init__(self):
        if not isinstance(self.paired, bool):
            raise ValueError(f"ChannelShuffle expects paired to be True or False, got {self.paired!r}.")
        together, channels = 2 if self.paired else 1, self.in_shape[-1]
        if not _is_count(self.groups) or self.groups < 1 or channels % (together * self.groups):
            what = f"pairs of the {channels} channels" if self.paired else f"{channels} channels"
            raise ValueError(f"ChannelShuffle expects groups >= 1 that divide the {what}, got {self.groups!r}.")

    @property
    def window(self):
        return (1, 0, 1) if len(self.in_shape) == 3 else None

    def _move(self, x):
        return self._deal(x, self.groups)

    def _move_back(self, y):
        return self._deal(y, self.in_shape[-1] // (2 if self.paired else 1) // self.groups)

    def _deal(self, x, hands: int):
        dealt = x.reshape(*x.shape[:-1], -1, hands, 2 if self.paired else 1)
        return dealt.swapaxes(-3, -2).reshape(x.shape)


@operator(static=("in_shape", "channels"))
class PadChannels(Reordering):
    """(..., c) -> (..., channels): zeros appended to the last axis."""

    in_shape: tuple[int, ...]
    channels: int
    _reason = "exact: zeros appended"

    def __post_init__(self):
        if not _is_count(self.channels) or self.channels < self.in_shape[-1]:
            raise ValueError(f"PadChannels expects at least {self.in_shape[-1]} channels, got {self.channels!r}.")

    @property
    def out_shape(self):
        return (*self.in_shape[:-1], self.channels)

    @property
    def window(self):
        return (1, 0, 1) if len(self.in_shape) == 3 else None

    def _move(self, x):
        return _padded(x, [(0, 0)] * (x.ndim - 1) + [(0, self.channels - x.shape[-1])])

    def _move_back(self, y):
        return y[..., : self.in_shape[-1]]


@operator(static=("in_shape", "channels"))
class CropChannels(Reordering):
    """(..., c) -> (..., channels): the first ones of the last axis. A contraction that leaves some images as long."""

    in_shape: tuple[int, ...]
    channels: int
    _reason = "exact: a projection"

    def __post_init__(self):
        if not _is_count(self.channels) or not 1 <= self.channels <= self.in_shape[-1]:
            raise ValueError(f"CropChannels expects between 1 and {self.in_shape[-1]} channels, got {self.channels!r}.")

    @property
    def out_shape(self):
        return (*self.in_shape[:-1], self.channels)

    @property
    def window(self):
        return (1, 0, 1) if len(self.in_shape) == 3 else None

    def _move(self, x):
        return x[..., : self.channels]

    def _move_back(self, y):
        return _padded(y, [(0, 0)] * (y.ndim - 1) + [(0, self.in_shape[-1] - y.shape[-1])])


@operator(static=("in_shape", "pads"))
class ZeroPad(Reordering):
    """(h, w, c) -> (top + h + bottom, left + w + right, c): an image with zeros around it.

    Attributes:
      in_shape: (h, w, c).
      pads: ((top, bottom), (left, right)), rows and columns of zeros.
    Example: a convolution that wraps around no longer reaches the other side.
      >>> pad = lipjax.operators.ZeroPad((4, 4, 3), ((1, 1), (1, 1)))
      >>> pad.out_shape, float(lipjax.spectral.norm_bound(pad))
      ((6, 6, 3), 1.0)
    """

    in_shape: tuple[int, ...]
    pads: tuple[tuple[int, int], tuple[int, int]]
    _reason = "exact: zeros appended"

    def __post_init__(self):
        _check_margins(self, "pads")

    @property
    def out_shape(self):
        (h, w, c), (rows, columns) = self.in_shape, self.pads
        return (h + sum(rows), w + sum(columns), c)

    @property
    def window(self):
        return (1, self.pads[0][0], 1)

    def _move(self, x):
        return _padded(x, [(0, 0), *self.pads, (0, 0)])

    def _move_back(self, y):
        return _cropped(y, self.pads)


@operator(static=("in_shape", "crops"))
class Crop(Reordering):
    """(h, w, c) -> (h - top - bottom, w - left - right, c): an image without its margin; the adjoint of `ZeroPad`.

    Attributes:
      in_shape: (h, w, c).
      crops: ((top, bottom), (left, right)), rows and columns left out. At least one pixel stays.
    Example:
      >>> lipjax.operators.Crop((6, 6, 3), ((1, 1), (1, 1))).out_shape
      (4, 4, 3)
    """

    in_shape: tuple[int, ...]
    crops: tuple[tuple[int, int], tuple[int, int]]
    _reason = "exact: a projection"

    def __post_init__(self):
        _check_margins(self, "crops")
        if min(self.out_shape) < 1:
            raise ValueError(f"Crop expects to leave at least one of {self.in_shape[:2]} pixels, got {self.crops}.")

    @property
    def out_shape(self):
        (h, w, c), (rows, columns) = self.in_shape, self.crops
        return (h - sum(rows), w - sum(columns), c)

    @property
    def window(self):
        return (1, -self.crops[0][0], 1)

    def _move(self, x):
        return _cropped(x, self.crops)

    def _move_back(self, y):
        return _padded(y, [(0, 0), *self.crops, (0, 0)])


def _check_margins(op, name: str) -> None:
    """Makes tuples of them. Raises: ValueError for other images or margins."""
    kind, value = type(op).__name__, getattr(op, name)
    if len(op.in_shape) != 3:
        raise ValueError(f"{kind} expects images: an in_shape (h, w, c), got {op.in_shape}.")
    if not _is_pair(value) or not all(_is_pair(pair) and all(map(_is_count, pair)) for pair in value):
        raise ValueError(f"{kind} expects {name} ((top, bottom), (left, right)) of whole numbers >= 0, got {value!r}.")
    object.__setattr__(op, name, tuple((int(low), int(high)) for low, high in value))


def _is_pair(value) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2


def _is_count(n) -> bool:
    return isinstance(n, numbers.Integral) and not isinstance(n, bool) and int(n) >= 0


def _padded(x, widths):
    return jnp.pad(x, widths) if isinstance(x, jax.Array) else np.pad(x, widths)


def _cropped(x, margins):
    (top, bottom), (left, right) = margins
    return x[:, top : x.shape[1] - bottom, left : x.shape[2] - right]
