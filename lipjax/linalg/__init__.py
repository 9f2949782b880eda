"""Matrix functions that make orthogonal matrices, such as the exponential of skew ones; steps from one to the next."""

from lipjax.linalg.functions import cayley, cayley_split, cholesky_orthogonalize, expm_skew, expm_skew_split
from lipjax.linalg.orthogonal_steps import expm_truncated, geodesic_step, polar, tangent
from lipjax.linalg.reflectors import block_reflector, block_reflector_split

__all__ = [
    "block_reflector",
    "block_reflector_split",
    "cayley",
    "cayley_split",
    "cholesky_orthogonalize",
    "expm_skew",
    "expm_skew_split",
    "expm_truncated",
    "geodesic_step",
    "polar",
    "tangent",
]


def __dir__() -> list[str]:
    return __all__
