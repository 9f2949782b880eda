"""Activations and pooling on pairs of channels (i with i + C/2): 1-Lipschitz by what they are."""

from lipjax import activations
from lipjax.operators._base import Isometric, check_input, operator


@operator(static=("in_shape",))
class MaxMin(Isometric):
    """`activations.maxmin` along the last axis."""

    in_shape: tuple[int, ...]
    _reason = "exact: sorts pairs of channels"

    def __post_init__(self):
        if self.in_shape[-1] % 2:
            raise ValueError(f"MaxMin pairs channels: expected an even number of them, got shape {self.in_shape}.")

    def __call__(self, x):
        check_input(self, x)
        return activations.maxmin(x)
