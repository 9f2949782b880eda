"""From operators to L, the Lipschitz constants of all logit differences: estimates for losses, bounds for certificates.

By the product of norms (`margin_lipschitz_*`), for any network; by loop transformation (`liplt_*`, `margin_liplt_*`)
for linear maps with elementwise activations between them.
"""

from lipjax.bounds.liplt import (
    LipLTEstimate,
    has_liplt,
    init_liplt_vectors,
    liplt_bound,
    liplt_estimate,
    liplt_vectors,
    margin_liplt_bound,
    margin_liplt_estimate,
)
from lipjax.bounds.liplt_proof import ChainBound, LayerConstant, LipLTReport
from lipjax.bounds.product import (
    LayerBound,
    feature_lipschitz_estimate,
    init_vectors,
    margin_lipschitz_bound,
    margin_lipschitz_estimate,
    norm_estimates,
    operator_bounds,
    product_bound,
)

__all__ = [
    "ChainBound",
    "LayerBound",
    "LayerConstant",
    "LipLTEstimate",
    "LipLTReport",
    "feature_lipschitz_estimate",
    "has_liplt",
    "init_liplt_vectors",
    "init_vectors",
    "liplt_bound",
    "liplt_estimate",
    "liplt_vectors",
    "margin_liplt_bound",
    "margin_liplt_estimate",
    "margin_lipschitz_bound",
    "margin_lipschitz_estimate",
    "norm_estimates",
    "operator_bounds",
    "product_bound",
]


def __dir__() -> list[str]:
    return __all__
