"""LipLT: Lipschitz constants by loop transformation. Paths of linear maps and activations, norms of chains, recursion.

An activation phi of slopes in [alpha, beta] is a t + psi(t) with a = (alpha + beta) / 2 and psi of Lipschitz constant
b = (beta - alpha) / 2. What the network computes is then a sum of linear *chains*: maps from the input, or from after
an activation, to before a later one, or to the output (docs/soundness.md, section 12).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from lipjax.errors import NotCertifiable
from lipjax.operators import Bias, CropChannels, Flatten, PadChannels, SpaceToDepth
from lipjax.operators._base import Linear, operator

Vectors = dict[str, Float[Array, "..."]]

REORDERINGS = (Flatten, SpaceToDepth, PadChannels, CropChannels)


@operator("inner", "outer", "skip", static=("slope",))
class ResidualBlock:
    """x -> H x + G phi(W x + bias): a piece of a path for LipLT, not an operator of networks.

    Attributes:
      inner, outer, skip: W, G and H, tuples of linear operators in the order in which they are applied; () is the
        identity, and skip None no H at all.
      slope: (alpha, beta), the interval of the slopes of phi, which acts elementwise.
    """

    inner: tuple
    outer: tuple = ()
    skip: tuple | None = ()
    slope: tuple[float, float] = (0.0, 1.0)

    @property
    def in_shape(self):
        return tuple((*self.inner, *(self.skip or ()), *self.outer)[0].in_shape)

    @property
    def out_shape(self):
        return tuple((*(self.skip or ()), *self.outer)[-1].out_shape) if self.outer or self.skip else self.in_shape


class Step(NamedTuple):
    """One piece of a path: a linear operator (`block` None) or an activation with what surrounds it.

    shape, out_shape: of the piece's input and output; inner_shape: of what the activation acts on.
    """

    name: str
    op: Any
    block: ResidualBlock | None
    shape: tuple[int, ...]
    inner_shape: tuple[int, ...]
    out_shape: tuple[int, ...]

    @property
    def is_plain(self) -> bool:
        """Whether the piece is an activation and nothing else: then a and b are factors of norms."""
        block = self.block
        return block is not None and block.inner == () and block.outer == () and block.skip is None


def check_slope(slope, name: str) -> tuple[float, float]:
    """The interval as two floats. Raises: ValueError naming the layer unless alpha <= beta, both finite."""
    try:
        low, high = (float(s) for s in slope)
    except (TypeError, ValueError):
        low, high = 1.0, 0.0
    if not (low <= high and abs(low) < float("inf") and abs(high) < float("inf")):
        raise ValueError(f"{name}: expected slopes (alpha, beta), finite with alpha <= beta, got {slope!r}.")
    return low, high


def is_linear(op) -> bool:
    """Whether LipLT may take the operator as a linear map."""
    return isinstance(op, (Linear, *REORDERINGS))


def _end_shape(ops: Sequence, shape: tuple[int, ...], name: str) -> tuple[int, ...]:
    for op in ops:
        if not is_linear(op):
            raise _refusal(name, op)
        if tuple(op.in_shape) != shape:
            raise ValueError(f"{name}: {type(op).__name__} expects shape {tuple(op.in_shape)}, but gets {shape}.")
        shape = tuple(op.out_shape)
    return shape


def _refusal(name: str, op) -> NotCertifiable:
    return NotCertifiable(
        f"{name} ({type(op).__name__}): LipLT takes linear operators and elementwise activations of bounded slopes. "
        "For others use the product of norms, bounds.margin_lipschitz_bound or margin_lipschitz_estimate."
    )


def _check_not_empty(block: ResidualBlock, name: str) -> None:
    if not (block.inner or block.outer or block.skip):
        raise ValueError(f"{name}: expected a block with at least one linear operator; an activation is its own layer.")


def _check_parts(name: str, op) -> None:
    """Raises: ValueError naming the layer if arrays do not have their shapes, or these do not fit the images."""
    for part in (*op.inner, *op.outer, *(op.skip or ())) if isinstance(op, ResidualBlock) else (op,):
        if isinstance(part, Bias) or is_linear(part):
            try:
                getattr(part, "check", tuple)()
                _ = part.in_shape, part.out_shape
            except ValueError as error:
                raise ValueError(f"{name} ({type(part).__name__}): {error}") from error


def make_path(named_ops: Sequence[tuple[str, Any]], slope: Any = (0.0, 1.0)) -> tuple[Step, ...]:
    """The pieces that LipLT works on.

    Args:
      named_ops: (name, operator) in order: linear operators, biases (which no constant depends on), activations with a
        `slope`, residual blocks. Where there is neither an activation nor a block, one with `slope` stands between
        every two maps; reorderings such as Flatten stay with the map before.
      slope: (alpha, beta), or a sequence of them, one for each place; None if all activations are given.
    Raises: ValueError for alpha > beta, too many or few slopes, and shapes that do not chain; NotCertifiable for an
      activation that is not elementwise. Both name the layer.
    """
    named_ops = list(named_ops)
    for name, op in named_ops:
        _check_parts(name, op)
    named_ops = [(name, op) for name, op in named_ops if not isinstance(op, Bias)]
    if not named_ops:
        raise ValueError("Expected at least one operator, got none.")
    if slope is not None and not any(hasattr(op, "slope") for _, op in named_ops):
        named_ops = _with_activations(named_ops, slope)
    steps: list[Step] = []
    shape = None
    for name, op in named_ops:
        if isinstance(op, ResidualBlock):
            _check_not_empty(op, name)
        elif not (hasattr(op, "slope") or is_linear(op)):
            raise _refusal(name, op)
        if tuple(op.in_shape) != (shape := shape or tuple(op.in_shape)):
            raise ValueError(f"{name}: expected an operator on shape {shape}, got one on {tuple(op.in_shape)}.")
        before, shape = shape, tuple(op.out_shape)
        if isinstance(op, ResidualBlock):
            check_slope(op.slope, name)
            inner = _end_shape(op.inner, before, name)
            out = _end_shape(op.outer, inner, name)
            if op.skip is not None and _end_shape(op.skip, before, name) != out:
                raise ValueError(f"{name}: the skip connection gives another shape than the activation's side, {out}.")
            steps.append(Step(name, None, op, before, inner, out))
            shape = out
        elif hasattr(op, "slope"):
            block = ResidualBlock((), (), None, check_slope(op.slope, name))
            steps.append(Step(name, None, block, before, before, shape))
        else:
            steps.append(Step(name, op, None, before, before, shape))
    return tuple(steps)


class _Activation(NamedTuple):
    """An activation of a given slope between two maps."""

    in_shape: tuple[int, ...]
    slope: Any

    @property
    def out_shape(self):
        return self.in_shape


def _with_activations(named_ops, slope) -> list:
    """Puts an activation between every two maps; reorderings stay with the map before, or with the first one."""
    maps = [i for i, (_, op) in enumerate(named_ops) if not isinstance(op, REORDERINGS)]
    slopes = list(slope) if isinstance(slope, Iterable) else [slope]
    if not any(isinstance(s, (tuple, list)) for s in slopes):
        slopes = [slope] * len(maps[1:])
    if len(slopes) != len(maps[1:]):
        raise ValueError(f"Expected a slope (alpha, beta) or {len(maps[1:])}, one between every two maps: {slope!r}.")
    found = list(named_ops)
    for i, between in reversed(list(zip(maps[1:], slopes, strict=True))):
        shape = tuple(named_ops[i - 1][1].out_shape)
        found.insert(i, (f"the activation before {named_ops[i][0]}", _Activation(shape, between)))
    return found


def _apply(ops: Sequence, x):
    for op in ops:
        x = op._map(x, jax.lax.Precision.HIGHEST) if isinstance(op, Linear) else op(x)
    return x


def slope_parts(block: ResidualBlock) -> tuple[float, float]:
    """a and b of the block's activation."""
    low, high = block.slope
    return (low + high) / 2, (high - low) / 2


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


def init_vectors(path: Sequence[Step], key: PRNGKeyArray, dtype) -> Vectors:
    """Random unit start vectors of all chains that end before an activation.

    Returns: {"s": (number of later activations, *shape)} for the chains from the input (s = 0) and from after
    activation s; the nearest end first.
    """
    acts, vectors = _activations(path), {}
    for s in range(len(acts)):
        shape = path[0].shape if s == 0 else path[acts[s - 1]].inner_shape
        v = jax.random.normal(jax.random.fold_in(key, s), (len(acts) - s, *shape), dtype)
        vectors[str(s)] = v / jnp.sqrt(jnp.sum(v**2, axis=tuple(range(1, v.ndim)), keepdims=True))
    return vectors


def _lengths(x: Array) -> Array:
    """Norms of the rows, with gradient 0 at 0, and no overflow."""
    rows = x.reshape(x.shape[0], -1)
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(rows), axis=1))
    safe = jnp.where(largest > 0, largest, 1)
    squares = jnp.sum((rows / safe[:, None]) ** 2, axis=1)
    return jnp.where(largest > 0, safe * jnp.sqrt(jnp.where(largest > 0, squares, 1)), 0)


def _normalised(x: Array, fallback: Array) -> Array:
    lengths = _lengths(x).reshape(-1, *[1] * (x.ndim - 1))
    return jnp.where(lengths > 0, x / jnp.where(lengths > 0, lengths, 1), fallback)


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
    kept = [_normalised(v, v) for v in kept]
    fixed = jax.tree.map(lambda a: jax.lax.stop_gradient(a) if isinstance(a, jax.Array) else a, tuple(path))

    def sweep(vs):
        return _chain_images(fixed, vs)

    def advance(_, vs):
        images = sweep(vs)
        (back,) = jax.linear_transpose(sweep, vs)(images)
        return [_normalised(new, old) for new, old in zip(back, vs, strict=True)]

    if num_iters <= 16:
        for i in range(num_iters):
            kept = advance(i, kept)
    else:
        kept = jax.lax.fori_loop(0, num_iters, advance, kept)
    kept = jax.lax.stop_gradient(kept)
    norms = [_lengths(image) for image in _chain_images(path, kept)]
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

    Exact but for rounding: no iteration. all_starts: False for the last start alone.
    """
    found: list[Array] = []
    shape, dtype = path[-1].out_shape, rows.dtype
    x = rows.reshape(rows.shape[0], *shape)

    def transposed(function, in_shape, y):
        like = jax.ShapeDtypeStruct((y.shape[0], *in_shape), dtype)
        return jax.linear_transpose(function, like)(y)[0]

    for step in reversed(path):
        if step.block is not None:
            outer = step.block.outer
            back = transposed(lambda v, o=outer: _apply(o, v), step.inner_shape, x) if outer else x
            found.append(back.reshape(rows.shape[0], -1))
            if not all_starts:
                return found
        if not step.is_plain:
            x = transposed(lambda v, step=step: _through(step, v), step.shape, x)
    found.append(x.reshape(rows.shape[0], -1))
    return found[::-1]


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
