"""Flax Linen modules that own parameters and build operators; no maths of their own."""

from lipjax.errors import require_extra

try:
    import flax  # noqa: F401
except ModuleNotFoundError:
    require_extra("train", "flax")

from lipjax.nn.by_name import ALL_ACTIVATIONS, LAYERS, Field, layer_fields
from lipjax.nn.channelwise import LinearSpline, NActivation
from lipjax.nn.cholesky import CholeskyConv, CholeskyDense, CholeskyStack
from lipjax.nn.explicit import AOC, BCOP, RKO, AOCTranspose, OrthoHead, OrthoLinear
from lipjax.nn.group_shuffle import GroupAndShuffle
from lipjax.nn.layered import LayeredModel
from lipjax.nn.layers import (
    COLLECTION,
    ELEMENTWISE,
    Conv,
    ConventionalResidual,
    Dense,
    FirstFeatures,
    LinearHead,
    LinearResidual,
    advance_means,
    flatten,
    torch_bias,
    torch_conv,
    torch_linear,
)
from lipjax.nn.model import LOG_SCALE, LipschitzModel
from lipjax.nn.nnx import from_nnx
from lipjax.nn.orthogonal import (
    ACTIVATIONS,
    POOLINGS,
    SOC,
    Cayley,
    CayleyHead,
    Householder,
    Householder2,
    MLPHead,
    ProjectionPool,
    SOCHead,
)
from lipjax.nn.potential import (
    CPLConv,
    CPLDense,
    SandwichConv,
    SandwichConvSpatial,
    SandwichDense,
    SandwichHead,
    SLLConv,
    SLLDense,
)
from lipjax.nn.responses import BROConv, BRODense, BROPatches, BROResidual, BROStack, LOTConv
from lipjax.nn.scaled import AOLConv, AOLDense
from lipjax.nn.tokens import ShiftBlocks

__all__ = [
    "CPLConv",
    "CPLDense",
    "SLLConv",
    "SLLDense",
    "SandwichConv",
    "SandwichConvSpatial",
    "SandwichDense",
    "SandwichHead",
    "ACTIVATIONS",
    "ALL_ACTIVATIONS",
    "AOC",
    "AOCTranspose",
    "AOLConv",
    "AOLDense",
    "BCOP",
    "BROConv",
    "BRODense",
    "BROPatches",
    "BROResidual",
    "BROStack",
    "COLLECTION",
    "ELEMENTWISE",
    "LAYERS",
    "LOTConv",
    "LOG_SCALE",
    "POOLINGS",
    "RKO",
    "SOC",
    "Cayley",
    "CayleyHead",
    "CholeskyConv",
    "CholeskyDense",
    "CholeskyStack",
    "Conv",
    "ConventionalResidual",
    "Dense",
    "Field",
    "FirstFeatures",
    "GroupAndShuffle",
    "Householder",
    "Householder2",
    "LayeredModel",
    "LinearHead",
    "LinearResidual",
    "LinearSpline",
    "LipschitzModel",
    "MLPHead",
    "NActivation",
    "OrthoHead",
    "OrthoLinear",
    "ProjectionPool",
    "SOCHead",
    "ShiftBlocks",
    "advance_means",
    "flatten",
    "from_nnx",
    "layer_fields",
    "torch_bias",
    "torch_conv",
    "torch_linear",
]


def __dir__() -> list[str]:
    return __all__
