"""From operators to L, the Lipschitz constants of all logit differences: estimates, and bounds.

By the product of norms (`margin_lipschitz_*`), for any network; by loop transformation (`liplt_*`, `margin_liplt_*`)
for linear maps with elementwise activations between them.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from lipjax import _spread, spectral
from lipjax.errors import NotCertifiable
from lipjax.network import Network
from lipjax.numerics import check_terms
from lipjax.operators import Bounded, Composite, Elementwise, Estimated
from lipjax.spectral.arithmetic import check_rounding

Vectors = dict[str, Float[Array, "..."]]


def _needs_estimate(op) -> bool:
    """True if training estimates the operator's norm; a parametrisation may promise that it is at most 1."""
    return not op.nonexpansive and isinstance(op, Estimated)


def _estimated(name: str, op) -> list[tuple[str, Any]]:
    """The operators whose norms an operator's estimate is made of, and the names of their vectors."""
    if isinstance(op, Composite):
        parts = [] if op.nonexpansive else [(f"{name}/{i}", part) for i, part in enumerate(op.measured())]
    else:
        parts = [(name, op)]
    return [(label, part) for label, part in parts if _needs_estimate(part)]


def init_vectors(network: Network, key: PRNGKeyArray) -> Vectors:
    """Random unit start vectors of the power iterations, by operator name, for operators that need an `estimate`.

    Vectors of the parts of a composite are named after it and their place: "block/0".

    Args:
      network: a Network.
      key: typed PRNG key.
    Returns: name -> vector of the operator's in_shape, in the network's dtype; deterministic in the key and the place
      of the operator.
    Example:
      >>> head = lipjax.operators.LinearHead(jnp.eye(2), jnp.zeros(2))
      >>> network = lipjax.network.make_network([("dense", lipjax.operators.Dense(jnp.eye(2)))], head)
      >>> lipjax.bounds.init_vectors(network, jax.random.key(0))["dense"].shape
      (2,)
    """
    vectors = {}
    for i, (name, op) in enumerate(zip(network.names, network.ops, strict=True)):
        drawn = jax.random.fold_in(key, i)
        for j, (label, part) in enumerate(_estimated(name, op)):
            v = jax.random.normal(jax.random.fold_in(drawn, j) if j else drawn, part.in_shape, network.input_std.dtype)
            vectors[label] = v / jnp.linalg.norm(v)
    return vectors


def norm_estimates(network: Network, vectors: Vectors, num_iters: int) -> tuple[dict[str, Float[Array, ""]], Vectors]:
    """Differentiable estimates of the operators' norms, by name, and the vectors to start from next time.

    Operators that are made to have a norm of at most 1 are left out. That of a composite is
    what it makes of the product of the norms it measures: of a `Residual` 1 + the product of its parts'.

    Args: vectors: of `init_vectors`, or of the last call. num_iters: power iterations of each operator, >= 0.
    Returns: name -> scalar, not above the norm but for rounding, so that nothing may be certified with it; and the
      vectors, without gradient.
    Raises: KeyError if a vector is missing; ValueError if num_iters is negative.
    Source: Miyato et al. 2018, arXiv:1802.05957, with v detached.
    """
    parts = [_estimated(name, op) for name, op in zip(network.names, network.ops, strict=True)]
    tasks = {label: (part, vectors[label]) for label, part in itertools.chain(*parts)}
    results = {}
    for labels in _alike(tasks):
        alike = [tasks[label] for label in labels]
        operations, channels = _spread.operations(alike[0][0])
        of_labels = _spread.each(
            lambda task: task[0].estimate(task[1], num_iters),
            alike,
            work=len(alike) * operations,
            channels=channels,
        )
        results |= dict(zip(labels, of_labels, strict=True))
    sigmas = {}
    for name, op, estimated in zip(network.names, network.ops, parts, strict=True):
        found = [results[label][0] for label, _ in estimated]
        if isinstance(op, Composite):
            if not op.nonexpansive:
                product = math.prod(found) * _slopes(op.measured()) * jnp.ones((), network.input_std.dtype)
                sigmas[name] = op.lipschitz_of(product)
        elif found:
            sigmas[name] = found[0]
    return sigmas, {label: results[label][1] for label in tasks}


def _alike(tasks: dict[str, Any]) -> list[list[str]]:
    """Names of pytrees, together if they have the same structure (types and metadata), shapes and dtypes."""
    groups: dict[Any, list[str]] = {}
    for name, task in tasks.items():
        leaves, structure = jax.tree.flatten(task)
        kind = structure, tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
        groups.setdefault(kind, []).append(name)
    return list(groups.values())


def _slopes(ops: Sequence) -> float:
    """The product of the Lipschitz constants of elementwise activations."""
    return math.prod((max(map(abs, op.slope)) for op in ops if isinstance(op, Elementwise)), start=1.0)


def feature_lipschitz_estimate(network: Network, vectors: Vectors, num_iters: int) -> tuple[Float[Array, ""], Vectors]:
    """Estimate of the Lipschitz constant of pixels -> features, the head's input: the product of norms / min std.

    Args, returns: as `margin_lipschitz_estimate`, with a scalar.
    """
    sigmas, vectors = norm_estimates(network, vectors, num_iters)
    return math.prod(sigmas.values()) * _slopes(network.ops) / jnp.min(network.input_std), vectors


def margin_lipschitz_estimate(
    network: Network, vectors: Vectors, num_iters: int
) -> tuple[Float[Array, "k k"], Vectors]:
    """Estimate of the Lipschitz constant of every logit_i - logit_j: a training quantity, possibly low.

    Args:
      network: a Network.
      vectors: as from `init_vectors` or the last call.
      num_iters: power iterations per operator, >= 0.
    Returns: ((k, k) in logits per pixel unit, the advanced vectors, constants under differentiation).
    Source: Hu et al. 2023, arXiv:2301.12549: the product of norms times |w_i - w_j|.
    Example: norm 3, and rows of the head sqrt(2) apart.
      >>> head = lipjax.operators.LinearHead(jnp.eye(2), jnp.zeros(2))
      >>> network = lipjax.network.make_network([("dense", lipjax.operators.Dense(3 * jnp.eye(2)))], head)
      >>> vectors = lipjax.bounds.init_vectors(network, jax.random.key(0))
      >>> f"{lipjax.bounds.margin_lipschitz_estimate(network, vectors, 5)[0][0, 1]:.3f}"
      '4.243'
    """
    product, vectors = feature_lipschitz_estimate(network, vectors, num_iters)
    return product * network.head.pairwise_lipschitz(), vectors


@dataclasses.dataclass(frozen=True)
class LayerBound:
    """Proved Lipschitz bound of one operator: its name, type, value, the method of proof and the method's details.

    Attributes:
      claimed: what certificates state, everything is computed from and `checker` proves again: `proved`, with room
        for the rounding of that proof. "bound" in files.
      proved: the bound as it was proved; None if unknown. "sigma" in files.
    """

    name: str
    type: str
    claimed: float
    method: str
    details: dict
    proved: float | None = None

    @staticmethod
    def from_row(row: dict) -> "LayerBound":
        """The bound that a row of a certificate states: a dict with name, type, bound, method, details and sigma."""
        return LayerBound(row["name"], row["type"], row["bound"], row["method"], row["details"], row.get("sigma"))

    @property
    def parts(self) -> "list[LayerBound]":
        """Those of a composite's parts, in order; none for other operators."""
        parts = enumerate(self.details.get("parts", ()))
        return [LayerBound.from_row({"name": f"{self.name}/{i}", **part}) for i, part in parts]

    @property
    def norms(self) -> float | tuple[float, tuple[float, ...]]:
        """`claimed`; of a composite that and those of its parts, with which errors pass through them."""
        return (self.claimed, tuple(p.claimed for p in self.parts)) if "parts" in self.details else self.claimed


def operator_bounds(network: Network) -> list[LayerBound]:
    """Proved bounds of all operators, in order; the input normalisation is the first row.

    Raises: NotCertifiable naming the layer whose operator has no bound or whose arrays admit none.
    """
    check_rounding()
    rows = []
    for name, op in [("input", network.normalize), *zip(network.names, network.ops, strict=True)]:
        kind = type(op).__name__
        for shape in (op.in_shape, op.out_shape):
            check_terms(math.prod(shape), f"{name} ({kind})")
        if not isinstance(op, Bounded):
            raise NotCertifiable(f"{name}: no proved Lipschitz bound is known for an operator of type {kind}.")
        try:
            found = op.bound()
            if not isinstance(found, spectral.NormBound) or not np.isfinite(found.proved):
                raise NotCertifiable(f"expected a finite proved bound, got {found!r}.")
            claimed = float(found.claimed)
        except ValueError as error:
            raise NotCertifiable(f"{name} ({kind}): {error}") from error
        rows.append(LayerBound(name, kind, claimed, found.method, found.details, float(found.proved)))
    return rows


def product_bound(rows: list[LayerBound]) -> float:
    """Upper bound of the product of proved bounds: rounded up at every multiplication that is not by 0 or 1."""
    factors = [row.claimed for row in rows if row.claimed != 1.0]
    if 0.0 in factors:
        return 0.0
    total = 1.0
    for factor in factors:
        total = factor if total == 1.0 else math.nextafter(total * factor, math.inf)
    return total


def margin_lipschitz_bound(network: Network, rows: list[LayerBound] | None = None) -> np.ndarray:
    """Proved upper bound of the Lipschitz constant of every logit_i - logit_j, by the product of norms.

    Args:
      network: a Network, its arrays of at most float64.
      rows: the result of `operator_bounds`, if it is at hand.
    Returns: (k, k) float64, logits per pixel unit.
    Raises: NotCertifiable as `operator_bounds`.
    Example: norm 3, and rows of the head sqrt(2) apart.
      >>> head = lipjax.operators.LinearHead(np.eye(2), np.zeros(2))
      >>> network = lipjax.network.make_network([("dense", lipjax.operators.Dense(3 * np.eye(2)))], head)
      >>> bool(3 * 2**0.5 <= lipjax.bounds.margin_lipschitz_bound(network)[0, 1] < 4.243)
      True
    """
    check_rounding()
    product = product_bound(operator_bounds(network) if rows is None else rows)
    head = network.head.pairwise_bound()
    with np.errstate(over="ignore", invalid="ignore"):  # an infinite constant proves radius 0
        return np.where(head > 0, np.nextafter(product * head, np.inf), 0.0)
