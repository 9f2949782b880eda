"""Flax Linen modules that own parameters and build operators; no maths of their own."""

from lipjax.nn.layers import Conv, Dense, LinearHead, LinearResidual
from lipjax.nn.model import LipschitzModel

__all__ = ["Conv", "Dense", "LinearHead", "LinearResidual", "LipschitzModel"]
