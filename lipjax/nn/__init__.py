"""Flax Linen modules that own parameters and build operators; no maths of their own."""

from lipjax.nn.layers import (
    COLLECTION,
    ELEMENTWISE,
    Conv,
    Dense,
    LinearHead,
    LinearResidual,
    flatten,
    torch_bias,
    torch_conv,
    torch_linear,
)
from lipjax.nn.model import LipschitzModel
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

__all__ = [
    "ACTIVATIONS",
    "COLLECTION",
    "ELEMENTWISE",
    "POOLINGS",
    "SOC",
    "Cayley",
    "CayleyHead",
    "Conv",
    "Dense",
    "Householder",
    "Householder2",
    "LinearHead",
    "LinearResidual",
    "LipschitzModel",
    "MLPHead",
    "ProjectionPool",
    "SOCHead",
    "flatten",
    "torch_bias",
    "torch_conv",
    "torch_linear",
]
