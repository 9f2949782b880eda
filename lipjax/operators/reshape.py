"""Reorderings of pixels and channels, channels of zeros appended, channels left out."""

import math

import jax.numpy as jnp

from lipjax import conv
from lipjax.operators.base import Isometric, check_input, operator


@operator(static=("in_shape",))
class Flatten(Isometric):
    """(h, w, c) -> (h w c,), row major."""

    in_shape: tuple[int, ...]
    _reason = "exact: a reordering"

    @property
    def out_shape(self):
        return (math.prod(self.in_shape),)

    def __call__(self, x):
        check_input(self, x)
        return x.reshape(x.shape[0], -1)


@operator(static=("in_shape", "block"))
class SpaceToDepth(Isometric):
    """`conv.space_to_depth`: (h, w, c) -> (h / block, w / block, c block^2)."""

    in_shape: tuple[int, ...]
    block: int
    _reason = "exact: a reordering"

    def __post_init__(self):
        if len(self.in_shape) != 3:
            raise ValueError(f"SpaceToDepth expects images: an in_shape (h, w, c), got {self.in_shape}.")
        h, w, _ = self.in_shape
        if self.block < 1 or h % self.block or w % self.block:
            raise ValueError(f"SpaceToDepth expects a block >= 1 that divides the size {(h, w)}, got {self.block}.")

    @property
    def out_shape(self):
        h, w, c = self.in_shape
        return (h // self.block, w // self.block, c * self.block**2)

    def __call__(self, x):
        check_input(self, x)
        return conv.space_to_depth(x, self.block)


@operator(static=("in_shape", "channels"))
class PadChannels(Isometric):
    """(..., c) -> (..., channels): zeros appended to the last axis."""

    in_shape: tuple[int, ...]
    channels: int
    _reason = "exact: zeros appended"

    def __post_init__(self):
        if self.channels < self.in_shape[-1]:
            raise ValueError(f"PadChannels expects at least {self.in_shape[-1]} channels, got {self.channels}.")

    @property
    def out_shape(self):
        return (*self.in_shape[:-1], self.channels)

    def __call__(self, x):
        check_input(self, x)
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, self.channels - x.shape[-1])])


@operator(static=("in_shape", "channels"))
class CropChannels(Isometric):
    """(..., c) -> (..., channels): the first ones of the last axis. A contraction that leaves some images as long."""

    in_shape: tuple[int, ...]
    channels: int
    _reason = "exact: a projection"

    def __post_init__(self):
        if not 1 <= self.channels <= self.in_shape[-1]:
            raise ValueError(f"CropChannels expects between 1 and {self.in_shape[-1]} channels, got {self.channels}.")

    @property
    def out_shape(self):
        return (*self.in_shape[:-1], self.channels)

    def __call__(self, x):
        check_input(self, x)
        return x[..., : self.channels]
