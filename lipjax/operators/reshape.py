"""Reorderings of pixels and channels."""

import math

from lipjax.operators._base import Isometric, check_input, operator


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
