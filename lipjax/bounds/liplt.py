"""LipLT, Lipschitz constants by loop transformation: estimates for losses, bounds for certificates."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from lipjax.bounds import liplt_path, liplt_proof, sweeps
from lipjax.bounds.liplt_proof import LipLTReport
from lipjax.bounds.product import Vectors
from lipjax.errors import NotCertifiable
from lipjax.network import Network
from lipjax.operators import Composite, Dense, LinearHead
from lipjax.spectral.arithmetic import check_rounding

# Rows of the output are carried back through the network for up to this many of them (Fazlyab et al.'s code: 101).
_MAX_ROWS = 100


class LipLTEstimate(NamedTuple):
    """Everything that `liplt_estimate` finds besides the pairwise constants; estimates, perhaps low.

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
    """Random unit start vectors for `liplt_estimate`, one per chain.

    Args:
      operators: as in `liplt_estimate`.
      key: typed PRNG key.
      slope: as in `liplt_estimate`.
    Returns: {"0": vectors of the chains from the input, "1": of those from after the first activation, ...}.
    Raises: as `liplt_estimate`.
    Example:
      >>> operators = [lipjax.operators.Dense(jnp.eye(2)), lipjax.operators.Dense(jnp.ones((3, 2)))]
      >>> sorted(lipjax.bounds.liplt_vectors(operators, jax.random.key(0)))
      ['0']
    """
    path = liplt_path.make_path(_named(operators), slope)
    return sweeps.init_vectors(path, key, _dtype(operators))


def _dtype(tree):
    return jnp.result_type(*jax.tree.leaves(tree))


def liplt_estimate(
    operators: Sequence, vectors: Vectors, num_iters: int, slope: Any = (0.0, 1.0), *, max_rows: int = _MAX_ROWS
) -> tuple[Float[Array, "k k"], LipLTEstimate]:
    """Estimate by loop transformation of the Lipschitz constants of all differences of outputs: for training.

    Args:
      operators: linear operators in order, and (i) nothing else: an activation of `slope` stands between every two of
        them; or (ii) their elementwise activations, and `operators.Residual` blocks made of such operators
        and one such activation. Biases may be among them.
      vectors: as from `liplt_vectors`, or the last call.
      num_iters: power iterations, >= 0.
      slope: (alpha, beta): all slopes of the activation; or one such pair for each place.
      max_rows: outputs up to which the differences of outputs are carried back through the network, exactly; beyond, L
        is `fallback`.
    Returns: ((k, k), in output units per input unit, diagonal 0; the rest). Differentiable, with the vectors constant.
    Raises: ValueError for alpha > beta and for shapes that do not chain; NotCertifiable for activations that are not
      elementwise. Both name the operator.
    Source: Fazlyab et al. 2023, arXiv:2310.00116 (LipLT).
    Example: x -> ReLU(x), whose outputs differ by at most sqrt(2) |x - y|.
      >>> operators = [lipjax.operators.Dense(jnp.eye(2)), lipjax.operators.Dense(jnp.eye(2))]
      >>> vectors = lipjax.bounds.liplt_vectors(operators, jax.random.key(0))
      >>> pairwise, rest = lipjax.bounds.liplt_estimate(operators, vectors, 20)
      >>> f"{pairwise[0, 1]:.3f}"
      '1.414'
    """
    return _path_estimate(liplt_path.make_path(_named(operators), slope), vectors, num_iters, max_rows)


def _path_estimate(path, vectors: Vectors, num_iters: int, max_rows: int):
    norms, vectors = sweeps.chain_norms(path, vectors, num_iters)
    factors = sweeps.gains(path)
    constants = sweeps.recursion(norms, factors)
    count, dtype = math.prod(path[-1].out_shape), _dtype([step.op for step in path] + [step.block for step in path])
    all_starts = count <= max_rows
    rows = sweeps.output_rows(path, jnp.eye(count, dtype=dtype), all_starts)

    def summed(measure):
        """The recursion at the output, for what a start's rows contribute."""
        return sweeps.recursion_at_output([measure(u) for u in rows], factors, constants)

    infinite = jnp.full(count, jnp.inf, dtype)
    reach = sweeps.reach(path, constants, dtype)
    fallback = reach * sweeps.root(sweeps.squared_distances(rows[-1]))
    pairwise = summed(lambda u: sweeps.root(sweeps.squared_distances(u))) if all_starts else fallback
    per_class = summed(lambda u: sweeps.root(jnp.sum(u**2, axis=1))) if all_starts else infinite
    total = summed(sweeps.largest_singular_value) if all_starts else infinite[0]
    found = jnp.stack([jnp.asarray(m, dtype) for m in constants]) if constants else jnp.zeros(0, dtype)
    return pairwise, LipLTEstimate(found, tuple(norms), per_class, total, fallback, vectors)


def liplt_bound(
    operators: Sequence, slope: Any = (0.0, 1.0), *, max_rows: int = _MAX_ROWS
) -> tuple[np.ndarray, LipLTReport]:
    """Proved upper bounds of what `liplt_estimate` estimates: never above the product of norms, up to rounding.

    Norms of chains are those of the dense composition where it fits memory, of the composed kernel where all padding is
    circular, and otherwise the least product of proved norms of their parts: the report says which. Every constant is
    the least of what loop transformation and products prove.

    Args:
      operators: as in `liplt_estimate`, their arrays of at most float64.
      slope: as in `liplt_estimate`.
      max_rows: as in `liplt_estimate`.
    Returns: ((k, k) float64, in output units per input unit, diagonal 0; the report).
    Raises: as `liplt_estimate`; NotCertifiable for operators without a proved norm.
    Source: Fazlyab et al. 2023, arXiv:2310.00116; docs/soundness.md, section 12.
    Example: x -> ReLU(x), whose outputs differ by at most sqrt(2) |x - y|.
      >>> operators = [lipjax.operators.Dense(np.eye(2)), lipjax.operators.Dense(np.eye(2))]
      >>> pairwise, report = lipjax.bounds.liplt_bound(operators)
      >>> bool(2**0.5 <= pairwise[0, 1] < 1.4143)
      True
    """
    return liplt_proof.LipLTBound(liplt_path.make_path(_named(operators), slope)).outputs(max_rows)


def _network_path(network: Network) -> tuple[liplt_path.Step, ...]:
    if not isinstance(network.head, LinearHead):
        raise NotCertifiable(
            f"head ({type(network.head).__name__}): LipLT takes a linear head. Use the product of norms, "
            "bounds.margin_lipschitz_bound or margin_lipschitz_estimate."
        )
    for name, op in zip(network.names, network.ops, strict=True):
        if isinstance(op, Composite):  # a certificate's chains have no form for blocks yet
            raise liplt_path.refusal(name, op)
    ops = [*zip(network.names, network.ops, strict=True), ("head", Dense(network.head.matrix))]
    return liplt_path.make_path(ops, None)


def has_liplt(network: Network) -> bool:
    """True if LipLT applies: linear operators, elementwise activations, at least one, and a linear head."""
    try:
        return any(step.block is not None for step in _network_path(network))
    except ValueError:
        return False


def init_liplt_vectors(network: Network, key: PRNGKeyArray) -> Vectors:
    """Start vectors for `margin_liplt_estimate`. Raises: NotCertifiable naming the layer that LipLT does not take."""
    return sweeps.init_vectors(_network_path(network), key, network.input_std.dtype)


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
    pairwise, report = liplt_proof.LipLTBound(_network_path(network)).outputs(max_rows)
    with np.errstate(over="ignore"):
        scale = network.normalize.bound().proved
        return np.where(pairwise == 0, 0.0, np.nextafter(pairwise * scale, np.inf)), report
