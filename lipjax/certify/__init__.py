"""Certificates: radii as plain arithmetic, frozen networks and their proofs, certificates on disk, float32."""

from lipjax.certify.certificate import Certificate
from lipjax.certify.freezing import freeze
from lipjax.certify.frozen import FrozenNetwork
from lipjax.certify.radius import certified_accuracy, certified_radius, mlp_radius

__all__ = ["Certificate", "FrozenNetwork", "certified_accuracy", "certified_radius", "freeze", "mlp_radius"]


def __dir__() -> list[str]:
    return __all__
