"""Convolution of NHWC images with HWIO kernels as a linear map: padding, adjoint, skew part, series, responses."""

from lipjax.conv.blocks import depth_to_space, space_to_depth
from lipjax.conv.maps import (
    Padding,
    adjoint_kernel,
    check_groups,
    conv2d,
    conv2d_adjoint,
    dilation_pair,
    explicit_padding,
    output_size,
    skew_kernel,
    stride_pair,
    window,
    without_groups,
)
from lipjax.conv.response import apply_response, frequency_response, packed_response, tap_blocks
from lipjax.conv.series import series_exponential, series_exponential_fast_gradient

__all__ = [
    "Padding",
    "adjoint_kernel",
    "apply_response",
    "check_groups",
    "conv2d",
    "conv2d_adjoint",
    "depth_to_space",
    "dilation_pair",
    "explicit_padding",
    "frequency_response",
    "output_size",
    "packed_response",
    "series_exponential",
    "series_exponential_fast_gradient",
    "skew_kernel",
    "space_to_depth",
    "stride_pair",
    "tap_blocks",
    "window",
    "without_groups",
]


def __dir__() -> list[str]:
    return __all__
