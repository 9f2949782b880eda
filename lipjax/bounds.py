"""From the norms of operators to L, the Lipschitz constants of all logit differences: an estimate, and a bound."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from lipjax import spectral
from lipjax.errors import NotCertifiable
from lipjax.network import Network

Vectors = dict[str, Float[Array, "..."]]


def _needs_estimate(op) -> bool:
    """Whether training estimates the operator's norm; a parametrisation may promise that it is at most 1."""
    return hasattr(op, "estimate") and not getattr(op, "nonexpansive", False)


def init_vectors(network: Network, key: PRNGKeyArray) -> Vectors:
    """Random unit start vectors of the power iterations, by operator name, for operators that need an `estimate`."""
    vectors = {}
    for i, (name, op) in enumerate(zip(network.names, network.ops, strict=True)):
        if _needs_estimate(op):
            v = jax.random.normal(jax.random.fold_in(key, i), op.in_shape, network.input_std.dtype)
            vectors[name] = v / jnp.linalg.norm(v)
    return vectors


def norm_estimates(network: Network, vectors: Vectors, num_iters: int) -> tuple[dict[str, Float[Array, ""]], Vectors]:
    """Differentiable estimates of the operators' norms, by name, and the vectors to start from next time.

    Operators that are made to have a norm of at most 1 are left out.
    """
    sigmas, advanced = {}, {}
    for name, op in zip(network.names, network.ops, strict=True):
        if _needs_estimate(op):
            sigmas[name], advanced[name] = op.estimate(vectors[name], num_iters)
    return sigmas, advanced


def feature_lipschitz_estimate(network: Network, vectors: Vectors, num_iters: int) -> tuple[Float[Array, ""], Vectors]:
    """Estimate of the Lipschitz constant of pixels -> features, the head's input: the product of norms / min std.

    Args, returns: as `margin_lipschitz_estimate`, with a scalar.
    """
    sigmas, vectors = norm_estimates(network, vectors, num_iters)
    return math.prod(sigmas.values()) / jnp.min(network.input_std), vectors


def margin_lipschitz_estimate(
    network: Network, vectors: Vectors, num_iters: int
) -> tuple[Float[Array, "k k"], Vectors]:
    """Estimate of the Lipschitz constant of every logit_i - logit_j: a training quantity, possibly low.

    Args: vectors: as from `init_vectors` or the last call. num_iters: power iterations per operator.
    Returns: ((k, k) in logits per pixel unit, the advanced vectors, constants under differentiation).
    Source: Hu et al. 2023, arXiv:2301.12549: the product of norms times |w_i - w_j|.
    """
    product, vectors = feature_lipschitz_estimate(network, vectors, num_iters)
    return product * network.head.pairwise_lipschitz(), vectors


@dataclasses.dataclass(frozen=True)
class LayerBound:
    """Proved Lipschitz bound of one operator: its name, type, value, the method of proof and the method's details."""

    name: str
    type: str
    bound: float
    method: str
    details: dict


def operator_bounds(network: Network) -> list[LayerBound]:
    """Proved bounds of all operators, in order; the input normalisation is the first row.

    Raises: NotCertifiable naming the layer whose operator has no bound or whose arrays admit none.
    """
    rows = []
    for name, op in [("input", network.normalize), *zip(network.names, network.ops, strict=True)]:
        kind = type(op).__name__
        if not hasattr(op, "bound"):
            raise NotCertifiable(f"{name}: no proved Lipschitz bound is known for an operator of type {kind}.")
        try:
            found = op.bound()
        except ValueError as error:
            raise NotCertifiable(f"{name} ({kind}): {error}") from error
        if not isinstance(found, spectral.NormBound) or not np.isfinite(found.value):
            raise NotCertifiable(f"{name} ({kind}): expected a finite proved bound, got {found!r}.")
        rows.append(LayerBound(name, kind, float(found.value), found.method, found.details))
    return rows


def product_bound(rows: list[LayerBound]) -> float:
    """Upper bound of the product of proved bounds: rounded up at every multiplication that is not by 0 or 1."""
    factors = [row.bound for row in rows if row.bound != 1.0]
    if 0.0 in factors:
        return 0.0
    total = 1.0
    for factor in factors:
        total = factor if total == 1.0 else math.nextafter(total * factor, math.inf)
    return total


def margin_lipschitz_bound(network: Network, rows: list[LayerBound] | None = None) -> np.ndarray:
    """Proved upper bound of the Lipschitz constant of every logit_i - logit_j: (k, k) float64, logits per pixel unit.

    Args: rows: the result of `operator_bounds`, if it is at hand.
    Raises: NotCertifiable as `operator_bounds`.
    """
    product = product_bound(operator_bounds(network) if rows is None else rows)
    head = network.head.pairwise_bound()
    with np.errstate(over="ignore", invalid="ignore"):  # an infinite constant proves radius 0
        return np.where(head > 0, np.nextafter(product * head, np.inf), 0.0)
