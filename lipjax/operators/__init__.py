"""The pieces of a network as small pytrees: arrays as data, shapes as static metadata; `base` has their protocol.

Every operator has static `in_shape` and `out_shape` (without the batch axis), `__call__(x)` on a batch, `bound()`
(proved, NumPy float64), `rounding_error(x)` (float64) and, where its norm is not known beforehand, `adjoint` and
`estimate`; a composite leaves the last three to the operators that it is made of. A rounding error is a bound, one
value per image, on the l2 distance between the computed and the exact value of the operator at the stored x, with
conventional summation in any order, the operator compiled apart from its neighbours, and but for underflow, which
FrozenNetwork adds (docs/soundness.md). `check()`, where there is one, raises ValueError for arrays of the wrong shape.
"""

from lipjax.operators.base import (
    Bounded,
    Composite,
    Elementwise,
    Estimated,
    Factor,
    Head,
    Isometric,
    Leaf,
    Linear,
    Operator,
    Reordering,
    norm_per_image,
    operator,
    operator_class,
)
from lipjax.operators.channelwise import LinearSpline, NActivation, PartialAbs
from lipjax.operators.circular import CircularConv, CircularSeries
from lipjax.operators.elementwise import LeakyReLU, ReLU, Sigmoid, Softplus, Tanh
from lipjax.operators.exponential import ConvExponential
from lipjax.operators.heads import LinearHead, MLPHead
from lipjax.operators.linear import Bias, Conv, ConvTranspose, Dense, Normalize, Translation
from lipjax.operators.one_tap import conv_of_blocks
from lipjax.operators.pairs import Householder, Householder2, MaxMin, MaxPoolPairs, ProjectionPool
from lipjax.operators.potential import PotentialStep, Sandwich
from lipjax.operators.reshape import ChannelShuffle, Crop, CropChannels, Flatten, PadChannels, SpaceToDepth, ZeroPad
from lipjax.operators.residual import Residual
from lipjax.operators.tokens import L2Pool, PositionalBias, Shift
from lipjax.operators.training_only import Centered, Centering, Centers, Contraction

OPERATORS = {
    cls.__name__: cls
    for cls in (
        Bias,
        ChannelShuffle,
        CircularConv,
        Conv,
        ConvExponential,
        ConvTranspose,
        Crop,
        CropChannels,
        Dense,
        Flatten,
        Householder,
        Householder2,
        L2Pool,
        LeakyReLU,
        LinearSpline,
        MaxMin,
        MaxPoolPairs,
        NActivation,
        PadChannels,
        PartialAbs,
        PositionalBias,
        PotentialStep,
        ProjectionPool,
        ReLU,
        Residual,
        Sandwich,
        Shift,
        Sigmoid,
        Softplus,
        SpaceToDepth,
        Tanh,
        ZeroPad,
    )
}
"""The operators that a frozen network may be made of, by type name: a saved one is rebuilt from them."""

HEADS = {cls.__name__: cls for cls in (LinearHead, MLPHead)}

__all__ = [
    "HEADS",
    "OPERATORS",
    "Bias",
    "Bounded",
    "Centered",
    "Centering",
    "Centers",
    "ChannelShuffle",
    "CircularConv",
    "CircularSeries",
    "Composite",
    "Contraction",
    "Conv",
    "ConvExponential",
    "ConvTranspose",
    "Crop",
    "CropChannels",
    "Dense",
    "Elementwise",
    "Estimated",
    "Factor",
    "Flatten",
    "Head",
    "Householder",
    "Householder2",
    "Isometric",
    "L2Pool",
    "Leaf",
    "LeakyReLU",
    "Linear",
    "LinearHead",
    "LinearSpline",
    "MLPHead",
    "MaxMin",
    "MaxPoolPairs",
    "NActivation",
    "Normalize",
    "Operator",
    "PadChannels",
    "PartialAbs",
    "PositionalBias",
    "PotentialStep",
    "ProjectionPool",
    "ReLU",
    "Reordering",
    "Residual",
    "Sandwich",
    "Shift",
    "Sigmoid",
    "Softplus",
    "SpaceToDepth",
    "Tanh",
    "Translation",
    "ZeroPad",
    "conv_of_blocks",
    "norm_per_image",
    "operator",
    "operator_class",
]


def __dir__() -> list[str]:
    return __all__
