"""Optimisation of matrices with orthonormal columns or rows, which stay so: Adam on the Stiefel manifold, for optax.

`skew_adam` is an `optax.GradientTransformation` for parameters all of which are such matrices, or stacks of them;
`partition` is one for all parameters of a model, which moves by it those whose names begin with "orthogonal". The
mathematics is in `lipjax.linalg`: `tangent`, `geodesic_step`, `expm_truncated`, `polar`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from lipjax import _spread, linalg
from lipjax.errors import UserError, require_extra
from lipjax.linalg.orthogonal_steps import ORDERS, polar_step

try:
    import optax
except ModuleNotFoundError:
    require_extra("train", "optax")
    raise

PREFIX = "orthogonal"
"""The beginning of the names of parameters that `partition` keeps on the manifold."""

MOMENTS = {"skew": 0.999, "euclidean": 0.95}
"""Kinds of Adam's moments, and the decay of the second one that was published with each."""


class SkewAdamState(NamedTuple):
    """The state of `skew_adam`; trees are like the parameters.

    Attributes:
      count: updates made.
      mu, nu: means of directions and of their squares: coordinates as `linalg.tangent` gives them, or for "euclidean"
        moments arrays of the parameters' shapes.
      slow: the slow matrices of Lookahead; () without it.
      travelled: the sum of the steps since these were last moved, as coordinates; () without Lookahead.
    """

    count: Any
    mu: Any
    nu: Any
    slow: Any
    travelled: Any


def skew_adam(
    learning_rate: float | Callable[[Any], Any],
    b1: float = 0.9,
    b2: float | None = None,
    eps: float = 1e-8,
    *,
    moments: str = "skew",
    exponential: str | int = "taylor",
    retract_every: int = 100,
    lookahead_period: int = 0,
    lookahead_rate: float = 0.5,
) -> optax.GradientTransformation:
    """Adam among matrices with orthonormal columns or rows: its steps are rotations, so the matrices stay orthogonal.

    For a square X with gradient G, A = (X^T G - G^T X) / 2 is skew, and X A is the Riemannian gradient. With m and v
    Adam's means of A and of its squares, the step is
      D = -rate m' / (sqrt(v') + eps),  X <- X exp(D),
    where m' and v' are m and v without their bias. v is symmetric, so D is skew; and since D turns X from the right
    wherever X is, the moments need no transport. Matrices that are not square have coordinates for the directions out
    of their span, too, and go along geodesics (`linalg.tangent`, `linalg.geodesic_step`).

    Updates are X_new - X, so it is the last link of an `optax.chain`: clip before it, and scale nothing after it.

    Args:
      learning_rate: > 0, radians per step that an entry of D has in a steady direction; or a schedule, of the number of
        updates made. The norm of D grows with the side of X: lower it for wider layers.
      b1, b2: decay of the moments, in [0, 1). b2 None: 0.999, and 0.95 for "euclidean" moments.
      eps: > 0, in the denominator, beside the root.
      moments: "skew": as above. "euclidean": m and v are means of G and of its squares, and the tangent part of the
        update -rate m' / (sqrt(v') + eps) is the step. Such steps stop where G stops, or noise outweighs it, but not
        where G is steady and normal to the manifold, as at a constrained minimum without noise.
      exponential: "taylor": ends the series by the norm of the largest step of a stack; "exact": never;
        2, 3 or 4: at that power (`linalg.expm_truncated`).
      retract_every: updates after which the matrices are made orthonormal again (`linalg.polar`), m skew and v
        symmetric, and what Lookahead has summed up is used. Rounding and truncation add up in between.
      lookahead_period: k > 0: every k updates, X_slow <- X_slow exp(lookahead_rate sum of D), X <- X_slow. 0: never.
      lookahead_rate: in (0, 1].
    Returns: an `optax.GradientTransformation`; `update` needs the parameters.
      Its `init` takes a tree of arrays (..., n, p), float32 or float64; stacks are divided over the devices of a mesh.
    Raises: ValueError for arguments out of these ranges; `init`, for parameters that are no matrices, or that are known
      numbers and not orthonormal.
    Source: the optimiser of Hu, Hu & Fredrikson 2026, arXiv:2601.18513, which has no public code: after what others say
      about it and, for "euclidean" moments and shapes that are not square, after later public work of the first author.
    Example: the rotation nearest to a matrix, by gradient steps.
      >>> wanted = jnp.array([[0.0, -1.0], [1.0, 0.0]])
      >>> transform = lipjax.manifold.skew_adam(0.1)
      >>> x = jnp.eye(2)
      >>> state = transform.init(x)
      >>> for _ in range(100):
      ...     updates, state = jax.jit(transform.update)(x - wanted, state, x)
      ...     x = x + updates
      >>> float(jnp.abs(x - wanted).max()) < 0.05, float(jnp.abs(x.T @ x - jnp.eye(2)).max()) < 1e-5
      (True, True)
    """
    b2 = MOMENTS.get(moments, 0.0) if b2 is None else b2
    _check_arguments(learning_rate, b1, b2, eps, moments, exponential, retract_every, lookahead_period, lookahead_rate)
    on_skew = moments == "skew"

    def init(params):
        check_orthonormal(params)
        zeros = jax.tree.map(_no_direction, params)
        means = zeros if on_skew else jax.tree.map(jnp.zeros_like, params)
        slow, travelled = (jax.tree.map(jnp.copy, params), zeros) if lookahead_period else ((), ())
        return SkewAdamState(jnp.zeros((), jnp.int32), means, jax.tree.map(jnp.copy, means), slow, travelled)

    def update(updates, state, params: Any = None):
        if params is None:
            raise ValueError("skew_adam moves matrices among matrices: call update(gradients, state, params).")
        count = state.count + 1
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        retract = count % retract_every == 0

        def of_leaf(g, x, mu, nu, slow=None, travelled=None):
            # Whole, since products divide stacks among devices otherwise than a mesh on which they are stored in parts.
            g, x, mu, nu, slow, travelled = _spread.gathered((g, x, mu, nu, slow, travelled))
            g = linalg.tangent(x, g.astype(x.dtype)) if on_skew else g.astype(x.dtype)
            mu, nu = b1 * mu + (1 - b1) * g, b2 * nu + (1 - b2) * g**2
            step = jnp.asarray(-rate, x.dtype) * _unbiased(mu, b1, count)
            step = step / (jnp.sqrt(_unbiased(nu, b2, count)) + eps)
            step = step if on_skew else linalg.tangent(x, step)
            moved = linalg.geodesic_step(x, step, order=exponential)
            if slow is not None:
                synchronise = retract | (count % lookahead_period == 0)
                travelled = travelled + step
                part = lookahead_rate * travelled
                slow = slow + lax.cond(
                    synchronise,
                    lambda: linalg.geodesic_step(slow, part, order=exponential),
                    lambda: jnp.zeros_like(x),
                )
                travelled = jnp.where(synchronise, 0, travelled)
                moved = jnp.where(synchronise, slow - x, moved)
            end = x + moved
            moved = moved + lax.cond(retract, lambda: polar_step(end), lambda: jnp.zeros_like(x))
            if slow is not None:
                slow = jnp.where(retract, x + moved, slow)
            if on_skew:
                mu, nu = (jnp.where(retract, _symmetric_part(m, x, s), m) for m, s in ((mu, -1), (nu, 1)))
            return _spread.gathered((moved, mu, nu, slow, travelled))

        leaves, structure = jax.tree.flatten(updates)
        trees = [params, state.mu, state.nu, *([state.slow, state.travelled] if lookahead_period else [])]
        columns = [structure.flatten_up_to(tree) for tree in trees]
        found = [of_leaf(*of_one) for of_one in zip(leaves, *columns, strict=True)]
        moved, mu, nu, slow, travelled = (
            structure.unflatten([of_one[i] for of_one in found]) if i < 3 or lookahead_period else () for i in range(5)
        )
        return moved, SkewAdamState(count, mu, nu, slow, travelled)

    return optax.GradientTransformation(init, update)


def labels(params: Any) -> Any:
    """Says for each parameter of a model whether it stays on the manifold: "orthogonal", or else "rest".

    Args:
      params: nested dicts. A parameter whose name, the last key, begins with "orthogonal" is a matrix with orthonormal
        columns or rows, or a stack of such matrices.
    Returns: a tree of the same structure, for `optax.partition`.
    Example:
      >>> lipjax.manifold.labels({"mix": {"orthogonal_in": jnp.eye(2), "bias": jnp.zeros(2)}})
      {'mix': {'bias': 'rest', 'orthogonal_in': 'orthogonal'}}
    """

    def label(path, leaf):
        del leaf
        return "orthogonal" if _name(path).startswith(PREFIX) else "rest"

    return jax.tree_util.tree_map_with_path(label, params)


def orthogonal_parameters(params: Any) -> Any:
    """The parameters of a model whose names begin with "orthogonal", with None in the place of the others.

    Args:
      params: nested dicts, as for `labels`.
    Returns: a tree of which the others are no leaves.
    Example:
      >>> lipjax.manifold.orthogonal_parameters({"orthogonal_mix": jnp.eye(1), "bias": jnp.zeros(2)})["bias"]
    """
    return jax.tree.map(lambda label, p: p if label == "orthogonal" else None, labels(params), params)


def partition(
    orthogonal: optax.GradientTransformation, rest: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Moves the parameters of a model whose names begin with "orthogonal" by one optimiser, the rest by another.

    Args:
      orthogonal: such as `skew_adam`.
      rest: such as `optax.adam`.
    Returns: an `optax.GradientTransformation` for all parameters.
    Example:
      >>> import optax
      >>> transform = lipjax.manifold.partition(lipjax.manifold.skew_adam(1e-3), optax.adam(1e-3))
      >>> transform = optax.chain(optax.clip_by_global_norm(1.0), transform)
      >>> state = transform.init({"orthogonal_mix": jnp.eye(4), "bias": jnp.zeros(4)})
    """
    return optax.partition({"orthogonal": orthogonal, "rest": rest}, labels)


def _check_arguments(rate, b1, b2, eps, moments, exponential, retract_every, period, part) -> None:
    for good, name, expected, value in (
        (moments in MOMENTS, "moments", f"one of {tuple(MOMENTS)}", moments),
        (exponential in ORDERS, "exponential", f"one of {ORDERS}", exponential),
        (callable(rate) or rate > 0, "learning_rate", "a positive number or a schedule", rate),
        (0 <= b1 < 1, "b1", "in [0, 1)", b1),
        (0 <= b2 < 1, "b2", "in [0, 1)", b2),
        (eps > 0, "eps", "a positive number", eps),
        (retract_every >= 1, "retract_every", "a number of updates, at least 1", retract_every),
        (period >= 0, "lookahead_period", "a number of updates, or 0", period),
        (0 < part <= 1, "lookahead_rate", "a fraction in (0, 1]", part),
    ):
        if not good:
            raise ValueError(f"skew_adam: expected {name} to be {expected}, got {value!r}.")


def check_orthonormal(params: Any) -> None:
    """Checks that all parameters are stacks of matrices with orthonormal columns or rows, as far as numbers are known.

    Args:
      params: a tree of arrays (..., n, p); inside of `jit` only shapes and dtypes are checked.
    Returns: nothing.
    Raises: UserError, a ValueError, for a parameter with |X^T X - I| above 1e-4 sqrt(p) in Frobenius norm, where p <= n
      (rounding to float32 gives about 1e-7 sqrt(p), to bfloat16 0.003 sqrt(p)); for another shape or dtype.
    Example:
      >>> lipjax.manifold.check_orthonormal({"a": jnp.eye(3, 2)})
    """
    jax.tree_util.tree_map_with_path(_check_orthonormal, params)


def _name(path) -> str:
    key = path[-1] if path else ""
    return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))


def _check_orthonormal(path, x) -> None:
    name = f"the parameter {jax.tree_util.keystr(path) or 'given'}"
    if jnp.ndim(x) < 2 or str(x.dtype) not in ("float32", "float64"):
        raise UserError(
            f"skew_adam moves matrices (..., n, p) in float32 or float64, but {name} is {x.dtype} {jnp.shape(x)}: move "
            "it by another optimiser (lipjax.manifold.partition), or give it as a matrix."
        )
    if isinstance(x, Tracer | jax.ShapeDtypeStruct) or x.size == 0:
        return
    departure = float(_departure(jnp.asarray(x)))
    if not departure <= 1e-4 * min(x.shape[-2:]) ** 0.5:
        raise UserError(
            f"skew_adam expects matrices with orthonormal columns (or rows) X, but of {name} |X^T X - I| is "
            f"{departure:.3g} in Frobenius norm: lipjax.linalg.polar(X) is the nearest such matrix."
        )


@jax.jit
def _departure(x: jax.Array) -> jax.Array:
    """The largest |x^T x - I| in Frobenius norm."""
    x = jnp.swapaxes(x, -1, -2) if x.shape[-2] < x.shape[-1] else x
    gram = jnp.matmul(jnp.swapaxes(x, -1, -2), x, precision=lax.Precision.HIGHEST)
    return jnp.sqrt(jnp.max(jnp.sum((gram - jnp.eye(x.shape[-1], dtype=x.dtype)) ** 2, (-2, -1))))


def _no_direction(x: Any) -> jax.Array:
    """The zero of the coordinates at x."""
    n, p = max(x.shape[-2:]), min(x.shape[-2:])
    return jnp.zeros((*x.shape[:-2], n if n == p else n + p, p), x.dtype)


def _unbiased(mean, decay: float, count):
    if decay == 0:
        return mean
    # 1 - decay^count without cancellation.
    return mean / -jnp.expm1(jnp.asarray(count, mean.dtype) * math.log(decay))


def _symmetric_part(z: jax.Array, x: jax.Array, sign: int) -> jax.Array:
    """Coordinates with (A + sign A^T) / 2 for A."""
    a = z[..., : min(x.shape[-2:]), :]
    return z.at[..., : a.shape[-2], :].set((a + sign * jnp.swapaxes(a, -1, -2)) / 2)


__all__ = [
    "MOMENTS",
    "PREFIX",
    "SkewAdamState",
    "check_orthonormal",
    "labels",
    "orthogonal_parameters",
    "partition",
    "skew_adam",
]


def __dir__() -> list[str]:
    return __all__
