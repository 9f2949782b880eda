"""Matrix functions that make orthogonal matrices: the exponential of skew matrices, Cayley, Cholesky, reflectors."""

from lipjax.linalg.functions import cayley, cayley_split, cholesky_orthogonalize, expm_skew, expm_skew_split
from lipjax.linalg.reflectors import block_reflector, block_reflector_split

__all__ = [
    "block_reflector",
    "block_reflector_split",
    "cayley",
    "cayley_split",
    "cholesky_orthogonalize",
    "expm_skew",
    "expm_skew_split",
]


def __dir__() -> list[str]:
    return __all__
