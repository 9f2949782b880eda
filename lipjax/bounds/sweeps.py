"""LipLT: Lipschitz constants by loop transformation. Norms of chains, and the recursion of constants.

An activation phi of slopes in [alpha, beta] is a t + psi(t) with a = (alpha + beta) / 2 and psi of Lipschitz constant
b = (beta - alpha) / 2. What the network computes is then a sum of linear *chains*: maps from the input, or from after
an activation, to before a later one, or to the output (docs/soundness.md, section 12).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from lipjax import _spread
from lipjax.bounds.liplt_path import Step, slope_parts
from lipjax.linalg.unit import of_peak_1, unit, unit_of_peak_1
from lipjax.operators.base import Linear

Vectors = dict[str, Float[Array, "..."]]


def _apply(ops: Sequence, x):
    for op in ops:
        x = op._map(x, jax.lax.Precision.HIGHEST) if isinstance(op, Linear) else op(x)
    return x


def _through(step: Step, x, image=None):
    """The linear part of a piece: an operator's map, x itself for a plain activation, H x + a G W x for a block.

    image: W x, where it is known.
    """
    if step.block is None:
        return _apply((step.op,), x)
    if step.is_plain:
        return x
    block = step.block
    image = _apply(block.inner, x) if image is None else image
    through = slope_parts(block)[0] * _apply(block.outer, image)
    return through if block.skip is None else through + _apply(block.skip, x)


def _on_batches(function: Callable, groups: dict[int, Array]) -> dict[int, Array]:
    """Applies a function of a batch to all groups at once."""
    if not groups:
        return {}
    sizes = [x.shape[0] for x in groups.values()]
    image = function(jnp.concatenate(list(groups.values())))
    parts = jnp.split(image, [sum(sizes[:i]) for i in range(1, len(sizes))])
    return dict(zip(groups, parts, strict=True))


def _activations(path: Sequence[Step]) -> list[int]:
    return [i for i, step in enumerate(path) if step.block is not None]


def _chain_images(path: Sequence[Step], vectors: list[Array]) -> list[Array]:
    """The image of every start vector under its chain: one sweep over the path, one batched call per operator.

    vectors: entry s holds, for the chains from the input (s = 0) or from after activation s, a vector (shape where
    they start) per later activation, the nearest first. Returns: by activation, images in the order of the starts.
    """
    groups, images, count = {0: vectors[0]}, [], 0
    last = len(_activations(path))
    for step in path:
        if count == last:
            break
        if step.block is None:
            groups = _on_batches(lambda x, step=step: _through(step, x), groups)
            continue
        count += 1
        inner = step.block.inner
        arrived = _on_batches(lambda x, inner=inner: _apply(inner, x), groups) if inner else groups
        images.append(jnp.stack([part[0] for part in arrived.values()]))
        rest = {s: x[1:] for s, x in groups.items() if x.shape[0] > 1}
        if not step.is_plain and rest:
            known = jnp.concatenate([arrived[s][1:] for s in rest])
            rest = _on_batches(lambda x, step=step, known=known: _through(step, x, known), rest)
        groups = rest
        if count < last:
            groups[count] = _apply(step.block.outer, vectors[count])
    return images


def _images_by_end(path: Sequence[Step], vectors: list[Array]) -> list[Array]:
    """`_chain_images` on several devices: each carries the chains to its own ends from all starts, and sends nothing.

    vectors: entry s is (ends, *shape), row e of it for the chain from start s to activation e + 1: of each start a row
    for every end, which is zero where there is no such chain. Returns: by activation k (ends, k, *shape), of which the
    rows of other ends are zero.
    """
    x, images, count, last = vectors[0][:, None], [], 0, len(_activations(path))
    ends = jnp.arange(x.shape[0])

    def on_batch(function: Callable, x: Array, *more: Array) -> Array:
        flat = [a.reshape(-1, *a.shape[2:]) for a in (x, *more)]
        image = function(*flat)
        return image.reshape(*x.shape[:2], *image.shape[1:])

    for step in path:
        if step.block is None:
            x = on_batch(lambda x, step=step: _through(step, x), x)
            continue
        count += 1
        inner = step.block.inner
        arrived = on_batch(lambda x, inner=inner: _apply(inner, x), x) if inner else x
        here = (ends == count - 1).reshape(-1, *[1] * (arrived.ndim - 1))
        images.append(jnp.where(here, arrived, 0))
        if count == last:
            break
        if not step.is_plain:
            x = on_batch(lambda x, known, step=step: _through(step, x, known), x, arrived)
        x = jnp.concatenate([x, _apply(step.block.outer, vectors[count])[:, None]], axis=1)
    return images


def _work(path: Sequence[Step]) -> float:
    """Operations of a path's linear maps on one vector, roughly."""
    parts = [
        (*step.block.inner, *step.block.outer, *(step.block.skip or ())) if step.block else (step.op,) for step in path
    ]
    return sum(_spread.operations(op)[0] for ops in parts for op in ops)


def init_vectors(path: Sequence[Step], key: PRNGKeyArray, dtype) -> Vectors:
    """Random unit start vectors of all chains that end before an activation.

    Returns: {"s": (number of later activations, *shape)} for the chains from the input (s = 0) and from after
    activation s; the nearest end first.
    """
    acts, vectors = _activations(path), {}
    for s in range(len(acts)):
        shape = path[0].shape if s == 0 else path[acts[s - 1]].inner_shape
        v = jax.random.normal(jax.random.fold_in(key, s), (len(acts) - s, *shape), dtype)
        vectors[str(s)] = unit(v, v, batched=True)
    return vectors


def _lengths(x: Array) -> Array:
    """Norms of the rows, with gradient 0 at 0, and no overflow."""
    rows = x.reshape(x.shape[0], -1)
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(rows), axis=1))
    safe = jnp.where(largest > 0, largest, 1)
    squares = jnp.sum((rows / safe[:, None]) ** 2, axis=1)
    return jnp.where(largest > 0, safe * jnp.sqrt(jnp.where(largest > 0, squares, 1)), 0)


def chain_norms(path: Sequence[Step], vectors: Vectors, num_iters: int) -> tuple[list[Array], Vectors]:
    """Estimates, never above the norm before rounding, of all chains that end before an activation.

    Power iteration on all chains at once: per step one sweep and its transpose. The last images are differentiable,
    with the vectors held constant.

    Returns: (by activation k = 1, 2, ...: (k,) norms of the chains from start 0, ..., k - 1; advanced vectors).
    """
    if num_iters < 0:
        raise ValueError(f"Expected num_iters >= 0, got {num_iters}.")
    if not vectors:  # no activation
        return [], {}
    kept = [jax.lax.stop_gradient(vectors[str(s)]) for s in range(len(vectors))]
    kept = [of_peak_1(v, v, batched=True) for v in kept]
    fixed = jax.tree.map(lambda a: jax.lax.stop_gradient(a) if isinstance(a, jax.Array) else a, tuple(path))

    # One group of devices is one device, or all of them where each does everything.
    count, groups = len(kept), _spread.row_groups(len(kept), len(kept) * _work(path))
    images_of = _chain_images if groups == 1 else _images_by_end
    if groups > 1:
        rows = groups * -(-count // groups)
        kept = [jnp.pad(v, [(s, rows - count), *[(0, 0)] * (v.ndim - 1)]) for s, v in enumerate(kept)]
        kept = [_spread.rows(v, math.inf) for v in kept]

    def sweep(vs):
        return images_of(fixed, vs)

    def advance(_, vs):
        images = sweep(vs)
        (back,) = jax.linear_transpose(sweep, vs)(images)
        return [of_peak_1(new, old, batched=True) for new, old in zip(back, vs, strict=True)]

    if num_iters <= 16:
        for i in range(num_iters):
            kept = advance(i, kept)
    else:
        kept = jax.lax.fori_loop(0, num_iters, advance, kept)
    kept = [jax.lax.stop_gradient(unit_of_peak_1(v, v, batched=True)) for v in kept]
    images = images_of(path, kept)
    if groups > 1:  # one row of each start is not zero
        norms = [jnp.sum(_lengths(x.reshape(-1, *x.shape[2:])).reshape(x.shape[:2]), axis=0) for x in images]
        kept = [v[s:count] for s, v in enumerate(kept)]
        norms, kept = _spread.whole((norms, kept))
    else:
        norms = [_lengths(image) for image in images]
    return norms, {str(s): v for s, v in enumerate(kept)}


def gains(path: Sequence[Step]) -> list[tuple[Any, Any]]:
    """For every activation the factors (|a|, b): what a chain through it, and one that starts at it, is multiplied by.

    a of a block is inside of its linear part, so its factor is 1.
    """
    found = []
    for step in path:
        if step.block is not None:
            a, b = slope_parts(step.block)
            found.append((abs(a) if step.is_plain else 1.0, b))
    return found


def recursion(norms: Sequence, factors: Sequence[tuple[Any, Any]]) -> list:
    """m_k, the Lipschitz constants of what the activations act on, one by one.

    m_k = (prod_{i<k} a_i) norm_{0k} + sum_{j<k} b_j (prod_{j<i<k} a_i) norm_{jk} m_j.
    """
    constants: list[Any] = []
    for row in norms:
        constants.append(recursion_at_output(row, factors, constants))
    return constants


def recursion_at_output(row: Any, factors: Sequence[tuple[Any, Any]], constants: Sequence):
    """The same for the next place, whose chains have the norms row[s], from start s = 0, 1, ..., len(constants)."""
    total, gain = 0.0, 1.0
    for j in range(len(constants), 0, -1):
        a, b = factors[j - 1]
        total = total + b * gain * row[j] * constants[j - 1]
        gain = gain * a
    return total + gain * row[0]


def reach(path: Sequence[Step], constants: Sequence, dtype):
    """The Lipschitz constant from the input to after the last activation, by the last layer's own norms."""
    blocks = [step.block for step in path if step.block is not None]
    if not blocks:
        return jnp.ones((), dtype)
    if path[_activations(path)[-1]].is_plain:
        return max(map(abs, blocks[-1].slope)) * constants[-1]
    return jnp.full((), jnp.inf, dtype)  # no norm of a block's own parts is estimated


def output_rows(path: Sequence[Step], rows: Array, all_starts: bool) -> list[Array]:
    """Rows of the output, carried back to every start: entry s is (k, n_s), what the chain from start s does to them.

    Exact up to rounding: no iteration. all_starts: False for the last start alone.
    """
    found: list[Array] = []
    shape, dtype = path[-1].out_shape, rows.dtype
    x = _spread.rows(rows.reshape(rows.shape[0], *shape), rows.shape[0] * _work(path))

    def transposed(function, in_shape, y):
        like = jax.ShapeDtypeStruct((y.shape[0], *in_shape), dtype)
        return jax.linear_transpose(function, like)(y)[0]

    for step in reversed(path):
        if step.block is not None:
            outer = step.block.outer
            back = transposed(lambda v, o=outer: _apply(o, v), step.inner_shape, x) if outer else x
            found.append(back.reshape(rows.shape[0], -1))
            if not all_starts:
                return _spread.whole(found)
        if not step.is_plain:
            x = transposed(lambda v, step=step: _through(step, v), step.shape, x)
    found.append(x.reshape(rows.shape[0], -1))
    return _spread.whole(found[::-1])


def squared_distances(rows: Array) -> Array:
    """|r_i - r_j|^2 of all pairs of rows (k, n), from the Gram matrix of the centred rows."""
    centred = rows - jnp.mean(rows, axis=0)
    gram = jnp.matmul(centred, centred.T, precision=jax.lax.Precision.HIGHEST)
    lengths = jnp.diagonal(gram)
    return jnp.maximum(lengths[:, None] + lengths - 2 * gram, 0)


def root(squares: Array) -> Array:
    """Square roots with gradient 0 at 0."""
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1)), 0)


def largest_singular_value(rows: Array) -> Array:
    """Of (k, n) rows with few k, by the eigenvalues of their Gram matrix."""
    gram = jnp.matmul(rows, rows.T, precision=jax.lax.Precision.HIGHEST)
    return root(jnp.maximum(jnp.linalg.eigvalsh(gram)[-1], 0))
