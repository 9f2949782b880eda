"""Shards batch-independent work (matrix functions, norm estimates) over the devices of the ambient mesh.

Under `jax.set_mesh(mesh)`, or within what `training.sharding.spread_over` decorates, batches of matrices are divided in
two dimensions, over groups of devices that are made of whole axes of the mesh: each group takes some of the matrices,
and each of its devices some columns of them. Lists of equal tasks are divided likewise: each group takes some tasks,
and each of its devices some channels. What takes less time than to send it about is not divided. Without a mesh, on
one device, and inside `jax.shard_map` over all axes, everything here does nothing.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array

from lipjax import _precision

# Columns that a device holds at least, and that eliminations take at a time at least and at most.
PANEL, _WIDEST_PANEL = 32, 128
# Channels of an operator that a device holds at least.
_CHANNELS = 16
# Groups of fewer devices are taken while the busiest device has at most so many times what it has at best.
_IMBALANCE = 1.25
# Operations of one product of all matrices (or one application of all tasks' maps) below which nothing is divided, and
# of a group's below which it does not divide them by columns or channels: every product then waits for a collective
# operation of some ten microseconds, in which an accelerator makes 3e8 to 1e9 at the highest precision.
SMALL, SMALL_IN_COLUMNS = 2**24, 2**28


class _Groups(NamedTuple):
    """A division: the axes of the mesh over which matrices are divided, and those over which columns are.

    count, parts: of devices along them.
    """

    over: tuple[str, ...] = ()
    across: tuple[str, ...] = ()
    count: int = 1
    parts: int = 1


_WHOLE = _Groups()


def _mesh_axes() -> tuple[tuple[str, int], ...]:
    """(name, size) of the axes to divide over; () where there is nothing to divide over."""
    mesh = jax.sharding.get_abstract_mesh()
    # Explicit axes are for users who place every array themselves.
    if mesh.empty or any(kind == AxisType.Explicit for kind in mesh.axis_types):
        return ()
    sizes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return tuple((name, size) for name, size, kind in sizes if kind == AxisType.Auto and size > 1)


def num_devices() -> int:
    """The number of devices that share the work; 1 if it is not divided."""
    return math.prod(size for _, size in _mesh_axes())


def panel(width: int) -> int:
    """The number of a device's columns that eliminations take at a time: divides their number."""
    return max(size for size in range(1, min(width, _WIDEST_PANEL) + 1) if width % size == 0)


@functools.lru_cache(maxsize=4096)
def _groups(
    axes: tuple[tuple[str, int], ...], count: int, columns: int, work: float, least: int, even: bool, limits: tuple
) -> _Groups:
    """How `count` tasks of so many columns are divided. work: operations of one product; least: columns of a device."""
    small, small_in_columns = limits
    found: list[tuple[float, _Groups]] = []
    for i in range(len(axes) + 1):
        groups = math.prod(size for _, size in axes[:i])
        share = -(-count // groups) / count
        for j in range(i, len(axes) + 1):
            parts = math.prod(size for _, size in axes[i:j])
            width = -(-columns // parts)
            if parts > 1:
                if width < least or share * work < small_in_columns:
                    continue
                if even and (columns % parts or panel(width) < least):
                    continue
            over, across = (tuple(name for name, _ in part) for part in (axes[:i], axes[i:j]))
            found.append((share * width / columns, _Groups(over, across, groups, parts)))
    best = min(share for share, _ in found)
    if work < small or best == 1:
        return _WHOLE
    good = [groups for share, groups in found if share <= _IMBALANCE * best]
    return min(good, key=lambda groups: (groups.parts, groups.count))


def _groups_of(shape: tuple[int, ...], even: bool = False) -> _Groups:
    """How matrices (b, ..., m, n) are divided. even: all devices of a group get equally many columns, in whole panels.

    The axes between the first and the last two count as one: their matrices stay together.
    """
    axes = _mesh_axes()
    if not axes or 0 in shape or len(shape) < 2:
        return _WHOLE
    count, (m, n) = shape[0] if len(shape) > 2 else 1, shape[-2:]
    return _groups(axes, count, n, 2.0 * count * m * n * max(m, n), PANEL, even, (SMALL, SMALL_IN_COLUMNS))


def by_columns(shape: tuple[int, ...]) -> bool:
    """True if eliminations of matrices (b, ..., m, n) divide them by columns: there are too few, and they are large."""
    return _groups_of(shape, even=True).parts > 1


def _spec(ndim: int, groups: _Groups) -> PartitionSpec:
    if ndim == 2:
        return PartitionSpec(None, groups.across or None)
    return PartitionSpec(groups.over or None, *[None] * (ndim - 2), groups.across or None)


def _constrained(x: Array, spec: PartitionSpec) -> Array:
    return lax.with_sharding_constraint(x, spec)


def matrices(x: Array) -> Array:
    """Matrices (b, ..., m, n), divided over groups of devices by the first axis, and in a group by columns."""
    groups = _groups_of(x.shape)
    return x if groups == _WHOLE else _constrained(x, _spec(x.ndim, groups))


def in_groups(x: Array) -> Array:
    """Matrices whole on every device of the group that has them: of which several products need more than a part."""
    groups = _groups_of(x.shape)
    if groups.parts == 1:
        return x
    return _constrained(x, _spec(x.ndim, groups._replace(across=(), parts=1)))


def product(x: Array, y: Array) -> Array:
    """x @ y as `_precision` says, divided as `matrices`: in bfloat16 or TF32 alone nothing would be orthogonal."""
    return matrices(_precision.product(x, y))


def gathered(tree: Any) -> Any:
    """Matrices whole on every device. Their gradients go on as the matrices are divided."""
    if num_devices() == 1:
        return tree
    return jax.tree.map(_gathered, tree)


@jax.custom_vjp
def _gathered(x: Array) -> Array:
    return _constrained(x, PartitionSpec())


# First whole: or what gradients of slices are put together by would be divided, too, and its parts travel.
_gathered.defvjp(lambda x: (_gathered(x), None), lambda _, g: (matrices(_gathered(g)),))


class Columns:
    """Access by column numbers of the whole to matrices, of which a device may hold its share of the columns alone."""

    def __init__(self, axes: tuple[str, ...] = (), devices: int = 1):
        self._axes, self._devices = axes, devices

    def _place(self, x: Array, start: Any) -> tuple[Any, Any]:
        """(whether this device holds column `start`, its number among those held)."""
        width = x.shape[-1]
        return lax.axis_index(self._axes) == start // width, start % width

    def take(self, x: Array, start: Any, size: int) -> Array:
        """Columns start, ..., start + size - 1, on every device. They must not cross from one device to the next."""
        if self._devices == 1:
            return lax.dynamic_slice_in_dim(x, start, size, -1)
        here, offset = self._place(x, start)
        return lax.psum(jnp.where(here, lax.dynamic_slice_in_dim(x, offset, size, -1), 0), self._axes)

    def put(self, x: Array, value: Array, start: Any) -> Array:
        """x with the columns from `start` on replaced by value (which every device has), where they are held."""
        if self._devices == 1:
            return lax.dynamic_update_slice_in_dim(x, value, start, -1)
        here, offset = self._place(x, start)
        kept = lax.dynamic_slice_in_dim(x, offset, value.shape[-1], -1)
        return lax.dynamic_update_slice_in_dim(x, jnp.where(here, value, kept), offset, -1)

    def diagonal(self, x: Array) -> Array:
        """The diagonal of square matrices, on every device."""
        found = jnp.sum(jnp.where(self.own(jnp.eye(x.shape[-2], dtype=bool)), x, 0), -1)
        return found if self._devices == 1 else lax.psum(found, self._axes)

    def own(self, x: Array) -> Array:
        """Of matrices that every device has whole, the columns that it holds a share of."""
        if self._devices == 1:
            return x
        width = x.shape[-1] // self._devices
        return lax.dynamic_slice_in_dim(x, lax.axis_index(self._axes) * width, width, -1)


def with_columns(function: Callable, *arrays: Array) -> Any:
    """function(columns, *arrays), which returns matrices like the first, with `columns` to access their columns by.

    Where matrices of these shapes are divided by columns, the function is called with those of each device.
    """
    groups = _groups_of(arrays[0].shape, even=True)
    if groups.parts == 1:
        return function(Columns(), *arrays)
    count = arrays[0].shape[0] if arrays[0].ndim > 2 else 1
    missing = -count % groups.count
    if missing:  # what is computed for them is thrown away
        arrays = tuple(jnp.concatenate([x, *[x[-1:]] * missing]) for x in arrays)
    spec = _spec(arrays[0].ndim, groups)
    # No input is whole on any device: gradients, were there any, would have nothing to sum.
    divided = jax.shard_map(
        lambda *parts: function(Columns(groups.across, groups.parts), *parts),
        in_specs=spec,
        out_specs=spec,
        axis_names=frozenset(groups.over + groups.across),
        check_vma=False,
    )
    found = divided(*arrays)
    return jax.tree.map(lambda x: x[:count], found) if missing else found


def each(function: Callable, items: Sequence[Any], *, work: float = math.inf, channels: int = 1) -> list:
    """[function(item) for item in items] for pytrees of the same structure and shapes, divided over the devices.

    A group of devices calls the function for its items in turn. Where there are fewer items than devices, each of a
    group's has a part of the items' arrays, by their last axes, and XLA divides what is made of them likewise.
    Results, and gradients of the items, are gathered. Differentiable.

    Args: work: operations of one application of all items' maps. channels: along the last axes of their large arrays.
    """
    count = len(items)
    groups = _groups(_mesh_axes(), count, channels, work, _CHANNELS, False, (SMALL, SMALL_IN_COLUMNS))
    if groups == _WHOLE:
        return [function(item) for item in items]

    def part_of(leaf: Array) -> Array:
        if groups.parts == 1 or leaf.ndim < 2 or leaf.shape[-1] < _CHANNELS * groups.parts:
            return leaf
        return _constrained(leaf, _spec(leaf.ndim, groups._replace(over=(), count=1)))

    def of_item(item):
        return function(jax.tree.map(part_of, item))

    if groups.count == 1:
        return [whole(of_item(item)) for item in items]
    share = -(-count // groups.count)
    padded = [*items, *[items[-1]] * (share * groups.count - count)]

    def of_share(part):
        return _stack([of_item(_at(part, i)) for i in range(share)])

    spec = PartitionSpec(groups.over)
    # Over the other axes XLA divides.
    divided = jax.shard_map(of_share, in_specs=spec, out_specs=spec, axis_names=frozenset(groups.over), check_vma=False)
    found = whole(divided(whole(_stack(padded))))
    return [_at(found, i) for i in range(count)]


def row_groups(count: int, work: float) -> int:
    """The number of groups of devices that share the rows of a batch; 1 if they are not divided."""
    return _groups(_mesh_axes(), count, 1, work, 1, False, (SMALL, SMALL_IN_COLUMNS)).count


def rows(x: Array, work: float) -> Array:
    """A batch, divided by its first axis over `row_groups` of devices."""
    groups = _groups(_mesh_axes(), x.shape[0], 1, work, 1, False, (SMALL, SMALL_IN_COLUMNS))
    return x if groups == _WHOLE else _constrained(x, PartitionSpec(groups.over))


def whole(tree: Any) -> Any:
    """Arrays whole on every device, as are their gradients."""
    return jax.tree.map(lambda leaf: _constrained(leaf, PartitionSpec()), tree) if num_devices() > 1 else tree


def operations(operator: Any) -> tuple[float, int]:
    """Operations of one application of a linear operator, roughly, and the length of its largest array's last axis."""
    largest = max(jax.tree.leaves(operator), key=jnp.size, default=jnp.zeros(()))
    if jnp.ndim(largest) < 2:
        return 0.0, 1
    positions = math.prod(operator.out_shape[:-1])
    # An array with a matrix for each position, or frequency, is applied once.
    applied = 1 if jnp.size(largest) >= positions * operator.in_shape[-1] * operator.out_shape[-1] else positions
    return 2.0 * jnp.size(largest) * applied, jnp.shape(largest)[-1]


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _at(tree: Any, i: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[i], tree)
