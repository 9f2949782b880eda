"""Curvature of the logit differences of an MLP head, f = W2 softplus(W1 a + b1) + b2.

As 0 <= softplus'' <= 1/4, the Hessian of f_i - f_j is at least -m[i, j] I everywhere, for

    m[i, j] = lambda_max(W1^T diag(w^-) W1) / 4,  w^- = max(0, w_j - w_i),  w_i the rows of W2,

and at most m[j, i] I. `norm_table` is a cheap upper bound of m before rounding, `eigenvalue_table` is m, `estimate` is
m by a few steps of power iteration (perhaps low: for training), `bound` is proved.

Weights are (out, in): w1 (hidden, features), w2 (classes, hidden). Source: Singla & Feizi 2022, arXiv:2211.08453.
"""

import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lipjax import spectral
from lipjax.linalg.unit import of_peak_1, unit_of_peak_1
from lipjax.numerics import gamma
from lipjax.operators.heads import checked

Table = Float[Array, "k k"]
W1 = Float[Array, "h n"]
W2 = Float[Array, "k h"]

# Up to 2^300 no square in `bound` overflows.
_MAX_EXPONENT = 300


def _negative_part(w2, classes, rivals):
    # relu has gradient 0 at 0: where two rows share a weight, it adds to the curvature of neither side.
    return jax.nn.relu(w2[rivals] - w2[classes])


@jax.jit
def norm_table(sigma: Float[Array, ""], w2: W2) -> Table:
    """sigma^2 max(w^-) / 4 for all pairs: at least m if sigma is at least |W1|. Differentiable."""
    largest = jax.lax.map(lambda row: jnp.max(jax.nn.relu(w2 - row), axis=1), w2)
    return sigma**2 * largest / 4


@jax.jit
def eigenvalue_table(w1: W1, w2: W2) -> Table:
    """m for all pairs: eigenvalue problems of side min(hidden, features), minutes for 10 classes of width 2048.

    Not rounded upwards: `bound` proves.
    """
    num_classes = w2.shape[0]

    def one(pair):
        rows = jnp.sqrt(_negative_part(w2, pair // num_classes, pair % num_classes))[:, None] * w1
        gram = rows.T @ rows if w1.shape[0] >= w1.shape[1] else rows @ rows.T
        return jnp.maximum(jnp.linalg.eigvalsh(gram)[-1], 0) / 4

    return jax.lax.map(one, jnp.arange(num_classes**2)).reshape(num_classes, num_classes)


def estimate(
    w1: W1, w2: W2, classes: Int[Array, "*s"], rivals: Int[Array, "*s"], v: Float[Array, " n"], num_iters: int
) -> Float[Array, "*s"]:
    """m[class, rival] by power iteration from v: at most m before rounding, differentiable with the vectors constant.

    Args:
      w1: (hidden, n).
      w2: (k, hidden).
      classes, rivals: the pairs, of one shape. m[rival, class] is the curvature from above of the same difference.
      v: any nonzero vector; the papers' code warm-starts it with the top right singular vector of W1, as
        `spectral.power_iteration` on W1 keeps it.
      num_iters: steps, each two products with W1 per pair.
    Returns: curvatures of the shape of the pairs, >= 0.
    Raises: ValueError if num_iters is negative or the shapes of classes and rivals differ.
    Example: one unit of weight -4 between the classes: 4 / 4 times the square of its row's length.
      >>> w1, w2 = jnp.array([[3.0, 4.0]]), jnp.array([[0.0], [4.0]])
      >>> m = lipjax.curvature.estimate(w1, w2, jnp.array([0]), jnp.array([1]), jnp.array([1.0, 0.0]), 3)
      >>> round(float(m[0]), 3)
      25.0
    """
    if num_iters < 0 or classes.shape != rivals.shape:
        raise ValueError(
            f"Expected num_iters >= 0 and classes and rivals of one shape, got {num_iters}, {classes.shape} and "
            f"{rivals.shape}."
        )
    negative = _negative_part(w2, classes.reshape(-1), rivals.reshape(-1))
    constant_w1, constant_negative = jax.lax.stop_gradient((w1, negative))

    def advance(_, vectors):
        image = ((vectors @ constant_w1.T) * constant_negative) @ constant_w1
        # Where the curvature is 0 any vector will do.
        return of_peak_1(image, vectors, batched=True)

    vectors = jnp.broadcast_to(of_peak_1(jax.lax.stop_gradient(v), 0.0), (negative.shape[0], v.size))
    vectors = jax.lax.fori_loop(0, num_iters, advance, vectors)
    vectors = unit_of_peak_1(vectors, vectors, batched=True)
    return (jnp.sum(negative * (vectors @ w1.T) ** 2, axis=1) / 4).reshape(classes.shape)


def estimate_table(w1: W1, w2: W2, v: Float[Array, " n"], num_iters: int) -> Table:
    """`estimate` of all pairs, class by class: 4 num_iters + 2 products of k^2 vectors with W1.

    Args:
      w1: (hidden, n).
      w2: (k, hidden).
      v: (n,), nonzero, to start from.
      num_iters: steps.
    Returns: (k, k), 0 on the diagonal.
    Example:
      >>> w1, w2 = jnp.array([[3.0, 4.0]]), jnp.array([[0.0], [4.0]])
      >>> lipjax.curvature.estimate_table(w1, w2, jnp.array([1.0, 0.0]), 3).round().astype(int).tolist()
      [[0, 25], [0, 0]]
    """
    others = jnp.arange(w2.shape[0])
    one = jax.checkpoint(lambda i: estimate(w1, w2, jnp.full_like(others, i), others, v, num_iters))
    return jax.lax.map(one, others)


def top_rivals(logits: Float[Array, "b k"], labels: Int[Array, " b"], num_rivals: int) -> Int[Array, "b r"]:
    """The num_rivals classes with the largest logits beside the label, by decreasing logit.

    Args:
      logits: (b, k).
      labels: (b,).
      num_rivals: at most k - 1.
    Returns: (b, num_rivals) classes.
    Raises: ValueError unless 1 <= num_rivals < k.
    Example:
      >>> lipjax.curvature.top_rivals(jnp.array([[0.1, 0.9, 0.5]]), jnp.array([1]), 2).tolist()
      [[2, 0]]
    """
    if not 1 <= num_rivals < logits.shape[1]:
        raise ValueError(f"Expected 1 to {logits.shape[1] - 1} rivals of {logits.shape[1]} classes, got {num_rivals}.")
    own = labels[:, None] == jnp.arange(logits.shape[1], dtype=labels.dtype)
    return jax.lax.top_k(jnp.where(own, -jnp.inf, logits), num_rivals)[1]


def bound(w1: np.ndarray | Array, w2: np.ndarray | Array, class_: int, rival: int) -> float:
    """Proved upper bound of m[class, rival], in NumPy float64 whatever the type of the weights; usually 1e-9 above it.

    Args:
      w1, w2: finite, with entries below 2^300, of a type whose numbers float64 holds.
      class_, rival: 0 to k - 1, one the other or not.
    Returns: at least m[class, rival] for the stored weights; 0.0 if no weight adds to it, so also for class_ == rival.
    Raises: NotCertifiable naming the weights for entries that are not finite, too large, complex, long doubles or
      traced by JAX; ValueError for shapes that do not fit and for class numbers that do not exist.
    Source: docs/soundness.md, section 11.2.
    Example: 1, or slightly more.
      >>> found = lipjax.curvature.bound(np.eye(2), np.array([[0.0, 0.0], [4.0, 0.0]]), 0, 1)
      >>> bool(1 <= found < 1 + 1e-8)
      True
    """
    w1, w2 = checked(w1, "w1", _MAX_EXPONENT), checked(w2, "w2", _MAX_EXPONENT)
    if w1.ndim != 2 or w2.ndim != 2 or w1.shape[0] != w2.shape[1]:
        raise ValueError(f"Expected w1 (hidden, features) and w2 (classes, hidden), got {w1.shape} and {w2.shape}.")
    for name, number in (("class_", class_), ("rival", rival)):
        if not isinstance(number, numbers.Integral) or not 0 <= number < len(w2):
            raise ValueError(f"Expected {name} to be an integer from 0 to {len(w2) - 1}, got {number!r}.")
    negative = np.maximum(w2[rival] - w2[class_], 0.0)
    used = negative > 0
    if not used.any():
        return 0.0
    rows = np.sqrt(negative[used])[:, None] * w1[used]
    # Each entry of diag(sqrt(w^-)) W1 is rounded three times; 2^-500 covers what underflows.
    frobenius = math.sqrt(float(np.sum(rows**2)))
    norm = (spectral.matrix_norm_bound(rows).proved + gamma(8) * frobenius) * (1 + gamma(8)) + 2.0**-500
    return math.nextafter(norm * norm / 4, math.inf)


__all__ = ["bound", "eigenvalue_table", "estimate", "estimate_table", "norm_table", "top_rivals"]


def __dir__() -> list[str]:
    return __all__
