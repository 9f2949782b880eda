"""From operators to L, the Lipschitz constants of all logit differences: estimates, and bounds.

By the product of norms (`margin_lipschitz_*`), for any network; by loop transformation (`liplt_*`, `margin_liplt_*`)
for linear maps with elementwise activations between them.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from lipjax import _liplt, _liplt_bound, _liplt_path, _spread, spectral
from lipjax._arithmetic import check_rounding, check_terms
from lipjax._liplt_bound import ChainBound, LayerConstant, LipLTReport
from lipjax._liplt_path import ResidualBlock
from lipjax.errors import NotCertifiable
from lipjax.network import Network
from lipjax.operators import Dense, LinearHead, Residual

Vectors = dict[str, Float[Array, "..."]]


def _needs_estimate(op) -> bool:
    """Whether training estimates the operator's norm; a parametrisation may promise that it is at most 1."""
    return hasattr(op, "estimate") and not getattr(op, "nonexpansive", False)


def _estimated(name: str, op) -> list[tuple[str, Any]]:
    """The operators whose norms an operator's estimate is made of, and the names of their vectors."""
    parts = [(f"{name}/{i}", part) for i, part in enumerate(op.ops)] if isinstance(op, Residual) else [(name, op)]
    return [(label, part) for label, part in parts if _needs_estimate(part)]


def init_vectors(network: Network, key: PRNGKeyArray) -> Vectors:
    """Random unit start vectors of the power iterations, by operator name, for operators that need an `estimate`.

    Those of the operators of a `Residual` are named after it and their place: "block/0".

    Returns: name -> vector of the operator's in_shape, in the network's dtype; deterministic in the key and the place
      of the operator.
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

    Operators that are made to have a norm of at most 1 are left out. That of a `Residual` is 1 + the product of its
    operators' norms.

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
        of_labels = _spread.each(lambda task: task[0].estimate(task[1], num_iters), [tasks[label] for label in labels])
        results |= dict(zip(labels, of_labels, strict=True))
    sigmas = {}
    for name, op, estimated in zip(network.names, network.ops, parts, strict=True):
        found = [results[label][0] for label, _ in estimated]
        if isinstance(op, Residual):
            sigmas[name] = 1 + math.prod(found) * _slopes(op.ops) * jnp.ones((), network.input_std.dtype)
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
    return math.prod((max(map(abs, op.slope)) for op in ops if hasattr(op, "slope")), start=1.0)


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

    Args: vectors: as from `init_vectors` or the last call. num_iters: power iterations per operator.
    Returns: ((k, k) in logits per pixel unit, the advanced vectors, constants under differentiation).
    Source: Hu et al. 2023, arXiv:2301.12549: the product of norms times |w_i - w_j|.
    """
    product, vectors = feature_lipschitz_estimate(network, vectors, num_iters)
    return product * network.head.pairwise_lipschitz(), vectors


@dataclasses.dataclass(frozen=True)
class LayerBound:
    """Proved Lipschitz bound of one operator: its name, type, value, the method of proof and the method's details.

    Attributes:
      bound: what everything is computed from, and `checker` proves again: sigma, with room for that proof's rounding.
      sigma: what was proved; None if unknown.
    """

    name: str
    type: str
    bound: float
    method: str
    details: dict
    sigma: float | None = None

    @property
    def parts(self) -> "list[LayerBound]":
        """Those of a `Residual`'s operators, in order; none for other operators."""
        return [LayerBound(f"{self.name}/{i}", **part) for i, part in enumerate(self.details.get("parts", ()))]

    @property
    def norms(self) -> float | tuple[float, ...]:
        """`bound`; of a `Residual` those of its operators, with which errors pass through them."""
        return tuple(part.bound for part in self.parts) if "parts" in self.details else self.bound


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
        if not hasattr(op, "bound"):
            raise NotCertifiable(f"{name}: no proved Lipschitz bound is known for an operator of type {kind}.")
        try:
            found = op.bound()
            if not isinstance(found, spectral.NormBound) or not np.isfinite(found.value):
                raise NotCertifiable(f"expected a finite proved bound, got {found!r}.")
            claim = float(found.claim)
        except ValueError as error:
            raise NotCertifiable(f"{name} ({kind}): {error}") from error
        rows.append(LayerBound(name, kind, claim, found.method, found.details, float(found.value)))
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
    check_rounding()
    product = product_bound(operator_bounds(network) if rows is None else rows)
    head = network.head.pairwise_bound()
    with np.errstate(over="ignore", invalid="ignore"):  # an infinite constant proves radius 0
        return np.where(head > 0, np.nextafter(product * head, np.inf), 0.0)


# Rows of the output are carried back through the network for up to this many of them (Fazlyab et al.'s code: 101).
_MAX_ROWS = 100


class LipLTEstimate(NamedTuple):
    """What `liplt_estimate` finds besides the pairwise constants; estimates, perhaps low.

    Attributes:
      constants: (n,) m_k, from the input to what activation k acts on.
      norms: for every activation k: (k,) norms of the chains from the input and from after activations 1 to k - 1.
      per_class: (k,) constants of the outputs one by one. total: () of the whole output. (k,) of infinities where there
        are more outputs than rows are carried back for.
      fallback: (k, k) by the last layer alone: constant of the last features times |w_i - w_j|.
      vectors: start vectors for the next call.
    """

    constants: Float[Array, " n"]
    norms: tuple[Float[Array, " m"], ...]
    per_class: Float[Array, " k"]
    total: Float[Array, ""]
    fallback: Float[Array, "k k"]
    vectors: Vectors


def _named(operators: Any) -> list[tuple[str, Any]]:
    if not isinstance(operators, Iterable):
        raise ValueError(
            f"Expected a list of operators, in order, got one {type(operators).__name__}: put it into a list."
        )
    return [(f"operators[{i}] ({type(op).__name__})", op) for i, op in enumerate(operators)]


def liplt_vectors(operators: Sequence, key: PRNGKeyArray, slope: Any = (0.0, 1.0)) -> Vectors:
    """Random unit start vectors for `liplt_estimate`, one per chain: {"0": of those from the input, "1": ...}.

    Args, raises: as `liplt_estimate`.
    """
    path = _liplt_path.make_path(_named(operators), slope)
    return _liplt.init_vectors(path, key, _dtype(operators))


def _dtype(tree):
    return jnp.result_type(*jax.tree.leaves(tree))


def liplt_estimate(
    operators: Sequence, vectors: Vectors, num_iters: int, slope: Any = (0.0, 1.0), *, max_rows: int = _MAX_ROWS
) -> tuple[Float[Array, "k k"], LipLTEstimate]:
    """Estimate by loop transformation of the Lipschitz constants of all differences of outputs: for training.

    Args:
      operators: linear operators in order, and (i) nothing else: an activation of `slope` stands between every two of
        them; or (ii) their activations, which have a `slope`, and `ResidualBlock`s. Biases may be among them.
      vectors: as from `liplt_vectors`, or the last call. num_iters: power iterations.
      slope: (alpha, beta): all slopes of the activation; or one such pair for each place.
      max_rows: outputs up to which the differences of outputs are carried back through the network, exactly; beyond, L
        is `fallback`.
    Returns: ((k, k), in output units per input unit, diagonal 0; the rest). Differentiable, with the vectors constant.
    Raises: ValueError for alpha > beta and for shapes that do not chain; NotCertifiable for activations that are not
      elementwise. Both name the operator.
    Source: Fazlyab et al. 2023, arXiv:2310.00116 (LipLT).
    """
    return _path_estimate(_liplt_path.make_path(_named(operators), slope), vectors, num_iters, max_rows)


def _path_estimate(path, vectors: Vectors, num_iters: int, max_rows: int):
    norms, vectors = _liplt.chain_norms(path, vectors, num_iters)
    factors = _liplt.gains(path)
    constants = _liplt.recursion(norms, factors)
    count, dtype = math.prod(path[-1].out_shape), _dtype([step.op for step in path] + [step.block for step in path])
    all_starts = count <= max_rows
    rows = _liplt.output_rows(path, jnp.eye(count, dtype=dtype), all_starts)

    def summed(measure):
        """The recursion at the output, for what a start's rows contribute."""
        return _liplt.recursion_at_output([measure(u) for u in rows], factors, constants)

    infinite = jnp.full(count, jnp.inf, dtype)
    reach = _liplt.reach(path, constants, dtype)
    fallback = reach * _liplt.root(_liplt.squared_distances(rows[-1]))
    pairwise = summed(lambda u: _liplt.root(_liplt.squared_distances(u))) if all_starts else fallback
    per_class = summed(lambda u: _liplt.root(jnp.sum(u**2, axis=1))) if all_starts else infinite
    total = summed(_liplt.largest_singular_value) if all_starts else infinite[0]
    found = jnp.stack([jnp.asarray(m, dtype) for m in constants]) if constants else jnp.zeros(0, dtype)
    return pairwise, LipLTEstimate(found, tuple(norms), per_class, total, fallback, vectors)


def liplt_bound(
    operators: Sequence, slope: Any = (0.0, 1.0), *, max_rows: int = _MAX_ROWS
) -> tuple[np.ndarray, LipLTReport]:
    """Proved upper bounds of what `liplt_estimate` estimates: never above the product of norms, rounding apart.

    Norms of chains are those of the dense composition where it fits memory, of the composed kernel where all padding is
    circular, and otherwise the least product of proved norms of their parts: the report says which. Every constant is
    the least of what loop transformation and products prove.

    Args: as `liplt_estimate`; arrays of at most float64.
    Returns: ((k, k) float64, diagonal 0; the report).
    Raises: as `liplt_estimate`; NotCertifiable for operators without a proved norm.
    Source: Fazlyab et al. 2023, arXiv:2310.00116; docs/soundness.md, section 12.
    """
    return _liplt_bound.LipLTBound(_liplt_path.make_path(_named(operators), slope)).outputs(max_rows)


def _network_path(network: Network) -> tuple[_liplt_path.Step, ...]:
    if not isinstance(network.head, LinearHead):
        raise NotCertifiable(
            f"head ({type(network.head).__name__}): LipLT takes a linear head. Use the product of norms, "
            "bounds.margin_lipschitz_bound or margin_lipschitz_estimate."
        )
    ops = [*zip(network.names, network.ops, strict=True), ("head", Dense(network.head.matrix))]
    return _liplt_path.make_path(ops, None)


def has_liplt(network: Network) -> bool:
    """Whether LipLT applies: linear operators, elementwise activations, at least one, and a linear head."""
    try:
        return any(step.block is not None for step in _network_path(network))
    except ValueError:
        return False


def init_liplt_vectors(network: Network, key: PRNGKeyArray) -> Vectors:
    """Start vectors for `margin_liplt_estimate`. Raises: NotCertifiable naming the layer that LipLT does not take."""
    return _liplt.init_vectors(_network_path(network), key, network.input_std.dtype)


def margin_liplt_estimate(
    network: Network, vectors: Vectors, num_iters: int, *, max_rows: int = _MAX_ROWS
) -> tuple[Float[Array, "k k"], Vectors]:
    """`margin_lipschitz_estimate` by loop transformation: lower where activations are elementwise.

    Args: as `liplt_estimate`. Returns: ((k, k), logits per pixel unit; advanced vectors).
    Raises: NotCertifiable naming the layer for other activations and heads.
    """
    pairwise, found = _path_estimate(_network_path(network), vectors, num_iters, max_rows)
    return pairwise / jnp.min(network.input_std), found.vectors


def margin_liplt_bound(network: Network, *, max_rows: int = _MAX_ROWS) -> tuple[np.ndarray, LipLTReport]:
    """`margin_lipschitz_bound` by loop transformation: proved, never above it, rounding apart.

    Returns: ((k, k) float64, logits per pixel unit; the report, whose constants are per unit of the normalised input).
    Raises: NotCertifiable naming the layer for other activations and heads, and as `liplt_bound`.
    """
    check_rounding()
    pairwise, report = _liplt_bound.LipLTBound(_network_path(network)).outputs(max_rows)
    with np.errstate(over="ignore"):
        scale = network.normalize.bound().value
        return np.where(pairwise == 0, 0.0, np.nextafter(pairwise * scale, np.inf)), report


__all__ = [
    "ChainBound",
    "LayerBound",
    "LayerConstant",
    "LipLTEstimate",
    "LipLTReport",
    "ResidualBlock",
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
