"""Norms of linear maps given by arrays: estimates (power iteration, in JAX) and proved upper bounds (NumPy, float64).

An estimate may be low and is for training; only a bound reaches a certificate. The proofs are in docs/soundness.md.
"""

from lipjax.spectral.estimates import largest_vector, norm_estimate, power_iteration
from lipjax.spectral.norms import (
    EVERYWHERE,
    GROUPS,
    ROW_SUMS,
    SUPREMUM,
    NormBound,
    blocks_norm_bound,
    conv_norm_bound,
    embeddings,
    largest_of_groups,
    matrix_norm_bound,
    norm_bound,
    response_norm_bound,
    row_sum_bound,
    with_room,
)

__all__ = [
    "EVERYWHERE",
    "GROUPS",
    "ROW_SUMS",
    "SUPREMUM",
    "NormBound",
    "blocks_norm_bound",
    "conv_norm_bound",
    "embeddings",
    "largest_of_groups",
    "largest_vector",
    "matrix_norm_bound",
    "norm_bound",
    "norm_estimate",
    "power_iteration",
    "response_norm_bound",
    "row_sum_bound",
    "with_room",
]


def __dir__() -> list[str]:
    return __all__
