"""Convolutions given by their response on a padded map: BRO and LOT; and BRO's dense layers.

Padding kernel_size // 2 zeros on each side, circular convolution, cropping: each has norm 1 at most, so the layer has,
and a training step counts 1. Certification proves the norm of the blocks. Such a layer belongs to one size of maps.
Of kernels of one tap it is an ordinary convolution (`operators.conv_of_blocks`), proved as such.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from lipjax import operators
from lipjax.nn.layers import (
    COLLECTION,
    NamedOperators,
    contraction,
    named,
    symmetric_uniform,
    torch_bias,
    torch_conv,
    with_bias,
)
from lipjax.parametrize import bro, lot

METHODS = ("bro", "lot")


def _unit_columns(key, shape, dtype=float):
    del key
    return bro.unit_columns(shape, dtype)


def _reordered(kind: str, in_shape: tuple[int, ...], kernel_size: int, strides: int) -> tuple[list, tuple[int, ...]]:
    """The reordering of a strided layer, and the shape after it. Raises: ValueError for sizes that do not fit."""
    if len(in_shape) != 3 or kernel_size < 1 or strides < 1:
        raise ValueError(
            f"{kind} takes images (h, w, c) with kernel_size and strides of at least 1, got an input shape "
            f"{tuple(in_shape)}, kernel_size {kernel_size} and strides {strides}."
        )
    if strides == 1:
        return [], tuple(in_shape)
    reordering = operators.SpaceToDepth(tuple(in_shape), strides)
    return [reordering], reordering.out_shape


def _padded(shape: tuple[int, ...], kernel_size: int, crop: bool, blocks: Callable, train: bool) -> list:
    """The padding, the convolution with blocks((h, w) of the padded map), and the cropping."""
    side = kernel_size // 2
    margins = (side, side), (side, side)
    pad = operators.ZeroPad(shape, margins)
    response = operators.conv_of_blocks(blocks, kernel_size, pad.out_shape, nonexpansive=True, train=train)
    if kernel_size == 1:
        return [response]
    return [pad, response, operators.Crop(response.out_shape, margins)] if crop else [pad, response]


class BROConv(nn.Module):
    """Block reflector convolution, bias and activation: orthogonal on the padded map, a contraction once cropped.

    rank: level of `bro.rank`, the share of channels that are reflected, for layers that keep their number. ridge: e of
    `bro.packed_response`. strides by space-to-depth, kernel size unchanged. crop=False leaves the margin on: the layer
    is an isometry but for e, and the map grows by 2 (kernel_size // 2).

    Source: Lai et al. 2025, arXiv:2505.15174, its layer for LipConvnet; without crop the paper's for ImageNet.
    """

    features: int
    kernel_size: int = 3
    strides: int = 1
    rank: float = 0.5
    ridge: float = bro.RIDGE
    crop: bool = True
    use_bias: bool = True
    activation: Callable | None = operators.MaxMin

    @nn.compact
    def __call__(self, in_shape: tuple[int, ...], train: bool = False) -> NamedOperators:
        k = self.kernel_size
        ops, shape = _reordered("BROConv", in_shape, k, self.strides)
        rank = bro.rank(shape[-1], self.features, self.rank)
        kernel = self.param("kernel", _unit_columns, (k, k, rank, max(shape[-1], self.features)))

        def blocks(size):
            return bro.packed_response(kernel, size, shape[-1], self.features, ridge=self.ridge)

        ops += _padded(shape, k, self.crop, blocks, train)
        return with_bias(self, ops, self.use_bias, self.activation, symmetric_uniform((k**2 * rank) ** -0.5))


class LOTConv(nn.Module):
    """Convolution with an approximate inverse square root per frequency (`lot.packed_response`), bias and activation.

    num_iters: steps of its iteration. strides, crop: as `BROConv`. It costs far more than BRO.

    Source: Xu, Li & Li 2022, arXiv:2210.11620.
    """

    features: int
    kernel_size: int = 3
    strides: int = 1
    num_iters: int = lot.NUM_ITERS
    crop: bool = True
    use_bias: bool = True
    activation: Callable | None = operators.MaxMin

    @nn.compact
    def __call__(self, in_shape: tuple[int, ...], train: bool = False) -> NamedOperators:
        k = self.kernel_size
        ops, shape = _reordered("LOTConv", in_shape, k, self.strides)
        start = _unit_columns if shape[-1] == self.features else torch_conv
        kernel = self.param("kernel", start, (k, k, shape[-1], self.features))

        def blocks(size):
            return lot.packed_response(kernel, size, num_iters=self.num_iters)

        ops += _padded(shape, k, self.crop, blocks, train)
        return with_bias(self, ops, self.use_bias, self.activation, torch_bias(k**2 * shape[-1]))


class BROResidual(nn.Module):
    """One block of BRONet: the reflector (or LOT's matrix) of E + L^(-1/2) gamma * W, centring, bias, activation.

    num_layers: L, the depth of its stack. rank: level of `bro.rank`. centering: a training step subtracts the mean over
    batch and pixels of what the convolution gives, of which the state keeps a running mean; evaluation subtracts that,
    as part of the bias. crop=False: as of `BROConv`, the second version of the paper's code. method: "bro", or "lot",
    which the paper compares with (rank and ridge are not used then).

    Source: Lai et al. 2025, arXiv:2505.15174.
    """

    num_layers: int
    kernel_size: int = 3
    rank: float = 0.5
    ridge: float = bro.BACKBONE_RIDGE
    centering: bool = True
    crop: bool = True
    method: str = "bro"
    activation: Callable | None = operators.MaxMin

    @nn.compact
    def __call__(self, in_shape: tuple[int, ...], train: bool = False) -> NamedOperators:
        if self.method not in METHODS:
            raise ValueError(f"BROResidual expects a method out of {', '.join(METHODS)}, got {self.method!r}.")
        k = self.kernel_size
        ops, shape = _reordered("BROResidual", in_shape, k, 1)
        channels = shape[-1]
        rank = channels if self.method == "lot" else bro.rank(channels, channels, self.rank, "bronet")
        weight = self.param("weight", nn.initializers.normal(1 / (k**2 * channels)), (k, k, rank, channels))
        gamma = self.param("gamma", nn.initializers.ones, (channels,))
        kernel = bro.residual(weight, gamma, num_layers=self.num_layers)

        def blocks(size):
            if self.method == "lot":  # which divides by the root of the pixels; those of a kernel of one tap are one
                over = kernel if k > 1 else kernel / math.sqrt(shape[0] * shape[1])
                return lot.packed_response(over, size, backbone=True)
            return bro.packed_response(kernel, size, ridge=self.ridge)

        ops = _padded(shape, k, self.crop, blocks, train)
        shift: Any = 0.0
        if self.centering:
            mean = self.variable(COLLECTION, "mean", jnp.zeros, (channels,), weight.dtype)
            if train:
                ops.append(operators.Centering(ops[-1].out_shape))
            else:
                shift = mean.value
        return with_bias(self, ops, True, self.activation, shift=shift)


class BROPatches(nn.Module):
    """Convolution of patches that do not overlap (strides = kernel_size, no padding), without bias or activation.

    The first rows of a block reflector of all numbers of a patch: it starts near taking some of them and losing the
    others. BRONet's first map behind its backbone, instead of `CholeskyConv`.

    Source: Lai et al. 2025, arXiv:2505.15174.
    """

    features: int
    kernel_size: int
    ridge: float = bro.RIDGE

    @nn.compact
    def __call__(self, in_shape: tuple[int, ...], train: bool = False) -> NamedOperators:
        side, channels = self.kernel_size, in_shape[-1]
        init = nn.initializers.normal((side**2 * channels) ** -0.5)
        kernel = self.param("kernel", init, (side, side, channels, self.features))
        op = operators.Conv(bro.patches(kernel, ridge=self.ridge), tuple(in_shape), side, "VALID")
        return named(self, [contraction(op, train)])


class BRODense(nn.Module):
    """Dense layer by a block reflector (cut where it changes the width), bias and activation.

    rank, ridge: as of `BROConv`; constant_ridge: as in BRONet's neck, e is a constant for the gradient.

    Source: Lai et al. 2025, arXiv:2505.15174.
    """

    features: int
    rank: float = 0.5
    ridge: float = bro.RIDGE
    constant_ridge: bool = False
    use_bias: bool = True
    activation: Callable | None = operators.MaxMin

    @nn.compact
    def __call__(self, in_shape: tuple[int, ...], train: bool = False) -> NamedOperators:
        if len(in_shape) != 1:
            raise ValueError(
                f"BRODense takes vectors: expected an input shape (n,), got {tuple(in_shape)}. Put `flatten` first."
            )
        width, options = in_shape[0], {"ridge": self.ridge, "constant_ridge": self.constant_ridge}
        rank = bro.rank(width, self.features, self.rank)
        matrix = self.param("matrix", nn.initializers.normal(width**-0.5), (max(width, self.features), rank))
        op = operators.Dense(bro.dense(matrix, width, self.features, **options))
        return with_bias(self, [contraction(op, train)], self.use_bias, self.activation)


class BROStack(nn.Module):
    """num_layers times the block reflector of E + L^(-1/2) gamma * W, bias, activation, named <stack>_01/linear and on.

    One array holds the weights of all layers, whose reflectors are made together.

    Source: Lai et al. 2025, arXiv:2505.15174.
    """

    num_layers: int
    rank: float = 0.5
    ridge: float = bro.BACKBONE_RIDGE
    activation: Callable = operators.MaxMin

    @nn.compact
    def __call__(self, in_shape: tuple[int, ...], train: bool = False) -> NamedOperators:
        layers, width = self.num_layers, in_shape[-1]
        rank = bro.rank(width, width, self.rank, "bronet")
        weight = self.param("weight", nn.initializers.normal(1 / width), (layers, width, rank))
        gamma = self.param("gamma", nn.initializers.ones, (layers, width))
        bias = self.param("bias", nn.initializers.zeros, (layers, width))
        matrices = bro.dense(bro.dense_residual(weight, gamma, num_layers=layers), ridge=self.ridge)
        ops: NamedOperators = []
        for i in range(layers):
            name, shape = f"{self.name}_{i + 1:02d}", (width,)
            ops.append((f"{name}/linear", contraction(operators.Dense(matrices[i]), train)))
            ops.append((f"{name}/bias", operators.Bias(bias[i], shape)))
            ops.append((f"{name}/activation", self.activation(shape)))
        return ops
