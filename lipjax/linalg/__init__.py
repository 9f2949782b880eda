"""Matrix functions that make orthogonal matrices: the exponential of skew matrices, Cayley, Cholesky."""

from lipjax.linalg.functions import cayley, cayley_split, cholesky_orthogonalize, expm_skew, expm_skew_split

__all__ = ["cayley", "cayley_split", "cholesky_orthogonalize", "expm_skew", "expm_skew_split"]


def __dir__() -> list[str]:
    return __all__
