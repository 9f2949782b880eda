"""A search for two points that are mapped far apart: lower bounds of Lipschitz constants. `lipjax.attacks` has it."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lipjax.attacks.input_gradient import of_images
from lipjax.linalg.unit import unit as unit_vectors

# All pairs of up to ten classes are searched; of more, as many.
_MAX_PAIRS = 45
# Images among which the search starts.
_POOL = 32
# Distances of the two points: of the first step, if it starts at a single image, and of the last one.
_FIRST, _LAST = 1.0, 1e-2
# Distances at which the quotient is evaluated: near, it is the gradient's norm; far, less is lost to rounding.
_CONFIRMED = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
# Where nothing is known of the errors of computed logits, they are taken to be this much of the largest one.
_ROUNDING = 1e-13


def unit(x: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
    """Each row scaled to l2 norm 1, also where squares would underflow; zeros stay zero."""
    return unit_vectors(x, 0.0, batched=True)


@dataclasses.dataclass(frozen=True)
class LipschitzSearch:
    """Lower bounds of Lipschitz constants, each the float64 quotient at two explicit points, less its rounding error.

    They are bounds if that error was: see `lipschitz_lower_bound`, `evaluate`.

    Attributes:
      pairs: (p, 2), the classes i < j that were searched.
      lower: (p,), of logit_i - logit_j, per pixel unit. points: (p, 2, *in_shape), where the quotient is this.
      whole: of all logits, in the l2 norm. whole_points: (2, *in_shape).
    """

    pairs: np.ndarray
    lower: np.ndarray
    points: np.ndarray
    whole: float
    whole_points: np.ndarray

    def table(self, num_classes: int) -> np.ndarray:
        """(k, k), symmetric, as the proved constants; NaN where no search was made, 0 on the diagonal."""
        table = np.full((num_classes, num_classes), np.nan)
        np.fill_diagonal(table, 0.0)
        i, j = self.pairs.T
        table[i, j] = table[j, i] = self.lower
        return table


def lipschitz_lower_bound(
    network,
    images: np.ndarray,
    *,
    num_steps: int = 20,
    num_starts: int = 4,
    pairs: np.ndarray | None = None,
    seed: int = 0,
    batch_size: int = 128,
    evaluate: Callable[[np.ndarray], Any] | None = None,
) -> LipschitzSearch:
    """Searches |d(x) - d(y)| / |x - y| for large values, d = logit_i - logit_j, and likewise of all logits.

    Two points move apart along the sum of the gradients at both and together towards where the gradient has grown,
    closer to each other from step to step; where the gradient was largest, the quotient is evaluated at several
    distances along it. Half the searches start at the images with the largest gradients, the others between the two
    images with the largest quotients. For all logits, d is what the last quotient suggests (a power iteration of the
    Jacobian). Pixels may take any value.

    Args:
      network: a pytree that is called on pixels (b, ...), differentiable, such as a Network in float32.
      images: (n, ...), of which up to 32 are used, evenly spread.
      num_steps: of each search, at least 1.
      num_starts: searches of each pair.
      pairs: (p, 2), i < j. Default: all of up to 10 classes; of more the 45 that are most often the two largest logits.
      evaluate: (b, ...) float64 pixels -> (b, k) float64 logits, for the quotients, or these and bounds (b, k) of
        their errors, which are subtracted; by default the network itself, which then must be float64. Without bounds
        1e-13 of the largest logit is subtracted, which may be too little where large numbers cancel.
      seed: of the directions in which searches start.
      batch_size: points evaluated at a time.
    Returns: a `LipschitzSearch`: the largest quotients found and where; lower bounds of Lipschitz constants.
    Raises: ValueError if there is no image, for counts below 1, and for logits that are not float64.
    Example: logits that are the two pixels: their difference changes by up to sqrt(2) per unit.
      >>> frozen = lipjax.freeze(lipjax.network.make_network(
      ...     [("dense", lipjax.operators.Dense(np.eye(2)))], lipjax.operators.LinearHead(np.eye(2), np.zeros(2))))
      >>> network = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), frozen.network)
      >>> found = lipjax.attacks.lipschitz_lower_bound(
      ...     network, np.full((1, 2), 0.5), num_steps=3, num_starts=1, evaluate=frozen)
      >>> round(float(found.lower[0]), 4)
      1.4142
    """
    if len(images) == 0 or num_steps < 1 or num_starts < 1 or batch_size < 2:
        raise ValueError(
            "Expected images, at least one step and start and a batch_size of at least 2, "
            f"got {len(images)}, {num_steps}, {num_starts} and {batch_size}."
        )
    dtype = jax.tree.leaves(network)[0].dtype
    pool = np.asarray(images)[np.unique(np.linspace(0, len(images) - 1, _POOL).astype(int))].astype(dtype)
    logits = np.asarray(_logits(network, jnp.asarray(pool)))
    num_classes = logits.shape[1]
    pairs = _likely_pairs(logits) if pairs is None else np.asarray(pairs, int).reshape(-1, 2)
    directions = np.zeros((len(pairs) + 1, num_classes), dtype)
    rows = np.arange(len(pairs))
    directions[rows, pairs[:, 0]], directions[rows, pairs[:, 1]] = 1, -1
    directions[-1] = np.random.default_rng(seed).normal(size=num_classes)
    directions[-1] /= np.linalg.norm(directions[-1])

    x, y = _starts(network, pool, logits, directions, num_starts)
    free = np.zeros(len(directions), bool)
    free[-1] = True
    repeated = [np.repeat(a, num_starts, axis=0) for a in (directions, free)]
    half = batch_size // 2
    parts = []
    for start in range(0, len(x), half):
        part = [a[start : start + half] for a in (x, y, *repeated)]
        filling = half - len(part[0]) if start else 0
        part = [np.concatenate([a, np.repeat(a[:1], filling, axis=0)]) for a in part]
        found = _search(network, *map(jnp.asarray, part), num_steps=num_steps)
        parts.append([np.asarray(a)[: len(a) - filling] for a in found])
    points, gradients, sizes = (np.concatenate(a) for a in zip(*parts, strict=True))

    sizes = np.where(np.isfinite(sizes), sizes, -np.inf).reshape(-1, num_starts)
    best = np.argmax(sizes, axis=1) + num_starts * np.arange(len(directions))
    return _confirm(points[best], gradients[best], pairs, batch_size, evaluate or (lambda z: _logits(network, z)))


def _likely_pairs(logits: np.ndarray) -> np.ndarray:
    num_classes = logits.shape[1]
    if num_classes * (num_classes - 1) // 2 <= _MAX_PAIRS:
        return np.array(list(itertools.combinations(range(num_classes), 2)), int).reshape(-1, 2)
    found, counts = np.unique(np.sort(np.argsort(-logits, axis=1)[:, :2], axis=1), axis=0, return_counts=True)
    return found[np.argsort(-counts, kind="stable")][:_MAX_PAIRS]


def _starts(network, pool, logits, directions, num_starts: int) -> tuple[np.ndarray, np.ndarray]:
    """Two points for each start of each direction: one image twice, or two images."""
    singles = min(len(pool), (num_starts + 1) // 2)
    sizes = np.asarray(_gradient_sizes(network, jnp.asarray(pool), jnp.asarray(directions)))
    flat = pool.reshape(len(pool), -1).astype(np.float64)
    squared = (flat**2).sum(1)
    distances = np.sqrt(np.maximum(squared[:, None] + squared - 2 * flat @ flat.T, 0.0))
    x, y = [], []
    for direction, size in zip(directions, sizes, strict=True):
        values = logits @ direction
        quotients = np.abs(values[:, None] - values) / np.where(distances > 1e-3, distances, np.inf)
        first, second = np.unravel_index(np.argsort(-np.triu(quotients), axis=None)[:num_starts], quotients.shape)
        order = np.argsort(-size)[:singles]
        # A pool of a single image has no two images; its starts repeat.
        x.append(pool[np.resize(np.concatenate([order, first]), num_starts)])
        y.append(pool[np.resize(np.concatenate([order, second]), num_starts)])
    return np.concatenate(x), np.concatenate(y)


@jax.jit
def _logits(network, x):
    return network(x)


@jax.jit
def _gradient_sizes(network, x, directions):
    network = of_images(network)

    def sizes(direction):
        gradient = jax.grad(lambda z: jnp.sum(network(z) @ direction))(x)
        return jnp.sqrt(jnp.sum(gradient**2, axis=tuple(range(1, x.ndim))))

    return jax.lax.map(sizes, directions)


@functools.partial(jax.jit, static_argnames="num_steps")
def _search(network, x, y, directions, free, *, num_steps):
    """The point of largest gradient met from each start, that gradient, and its norm."""
    axes, count, network = tuple(range(1, x.ndim)), x.shape[0], of_images(network)

    def column(values):
        return values.reshape(-1, *(1,) * (x.ndim - 1))

    def norm(values):
        return jnp.sqrt(jnp.sum(values**2, axis=axes))

    def values(points, directions):
        out = network(points)
        return jnp.sum(out * directions), out

    first = norm(x - y)
    single = first == 0
    lengths = jnp.where(single, _FIRST, first)

    def body(step, state):
        centre, along, directions, best, best_gradient, best_size = state
        length = column(lengths * (_LAST / lengths) ** jnp.asarray(step / max(num_steps - 1, 1), x.dtype))
        ends = jnp.concatenate([centre + length / 2 * along, centre - length / 2 * along])
        gradient, out = jax.grad(values, has_aux=True)(ends, jnp.tile(directions, (2, 1)))
        sizes = norm(gradient)
        for rows in (slice(count), slice(count, None)):
            larger = sizes[rows] > best_size
            best = jnp.where(column(larger), ends[rows], best)
            best_gradient = jnp.where(column(larger), gradient[rows], best_gradient)
            best_size = jnp.where(larger, sizes[rows], best_size)
        change = unit(out[:count] - out[count:])
        moves = free[:, None] & jnp.any(change != 0, axis=1, keepdims=True)
        directions = jnp.where(moves, change, directions)
        total = unit(gradient[:count] + gradient[count:])
        along = jnp.where(column(norm(total) > 0), total, along)
        centre = best + length / 2 * unit(gradient[:count] - gradient[count:])
        return centre, along, directions, best, best_gradient, best_size

    middle, zero = (x + y) / 2, jnp.zeros_like(x)
    state = (middle, unit(x - y), directions, middle, zero, jnp.full(count, -jnp.inf, x.dtype))
    return jax.lax.fori_loop(0, num_steps, body, state)[3:]


def _confirm(points, gradients, pairs, batch_size: int, evaluate) -> LipschitzSearch:
    """The largest quotients across the points along the gradients; the last point is that of all logits."""
    points, gradients = points.astype(np.float64), gradients.astype(np.float64)
    shape = (-1, *(1,) * (points.ndim - 1))
    along = gradients / np.abs(gradients).reshape(len(points), -1).max(1, initial=np.finfo(float).tiny).reshape(shape)
    along /= np.maximum(np.sqrt((along**2).reshape(len(points), -1).sum(1)), np.finfo(float).tiny).reshape(shape)
    lower, witness = np.full(len(points), -np.inf), np.stack([points, points], axis=1)
    for distance in _CONFIRMED:
        ends = np.stack([points + distance / 2 * along, points - distance / 2 * along], axis=1)
        quotient = _quotients(ends, pairs, batch_size, evaluate)
        larger = quotient > lower
        witness[larger], lower[larger] = ends[larger], quotient[larger]
    lower = np.maximum(lower, 0.0)
    return LipschitzSearch(pairs, lower[:-1], witness[:-1], float(lower[-1]), witness[-1])


def _quotients(ends: np.ndarray, pairs: np.ndarray, batch_size: int, evaluate) -> np.ndarray:
    """|d(x) - d(y)| / |x - y| of all ends (q + 1, 2, ...), less what rounding may have added: (q + 1,)."""
    flat = ends.reshape(-1, *ends.shape[2:])
    parts = []
    for start in range(0, len(flat), batch_size):
        part = flat[start : start + batch_size]
        filled = np.pad(part, [(0, batch_size - len(part) if start else 0)] + [(0, 0)] * (flat.ndim - 1))
        found = evaluate(filled)
        logits, errors = (np.asarray(a) for a in (found if isinstance(found, tuple) else (found, 0.0)))
        if not isinstance(found, tuple):
            errors = np.broadcast_to(_ROUNDING * np.abs(logits).max(axis=1, keepdims=True), logits.shape)
        parts.append((logits[: len(part)], errors[: len(part)]))
    logits, errors = (np.concatenate(column) for column in zip(*parts, strict=True))
    if logits.dtype != np.float64:
        raise ValueError(f"Expected float64 logits for the quotients, got {logits.dtype}: give `evaluate`.")
    logits, errors = (a.reshape(len(ends), 2, -1) for a in (logits, errors))
    # Subtracting two logits, and two changes, rounds, too.
    change, error = logits[:, 0] - logits[:, 1], errors.sum(axis=1) + 2.0**-51 * np.abs(logits).sum(axis=1)
    rows, (i, j) = np.arange(len(pairs)), pairs.T
    apart = np.empty(len(ends))
    apart[:-1] = np.abs(change[rows, i] - change[rows, j]) - error[rows, i] - error[rows, j]
    apart[-1] = np.sqrt((change[-1] ** 2).sum()) - np.sqrt((error[-1] ** 2).sum()) * (1 + 1e-9)
    distance = np.sqrt(((ends[:, 0] - ends[:, 1]) ** 2).reshape(len(ends), -1).sum(1))
    found = apart / np.where(distance > 0, distance, np.inf) * (1 - 1e-12)
    return np.where(np.isfinite(found), found, -np.inf)
