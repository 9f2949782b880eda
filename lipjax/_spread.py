"""Shards batch-independent work (matrix functions, norm estimates) over the devices of the ambient mesh.

Under `jax.set_mesh(mesh)`, or within what `training.sharding.spread_over` decorates, batches of matrices are divided
by matrices, too few large ones by columns, and lists of equal tasks by tasks. Without a mesh, on one device, and inside
`jax.shard_map`, everything here does nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array

from lipjax import _precision

# Columns that a device holds at least, and by multiples of which it does: what eliminations take at a time.
PANEL = 32
# Matrices are divided by matrices while the busiest device has at most so many times its share.
_IMBALANCE = 1.25


def _mesh_axes() -> tuple[tuple[str, ...], int]:
    """The axes to divide over, and the number of devices; ((), 1) where there is nothing to divide over."""
    mesh = jax.sharding.get_abstract_mesh()
    # Explicit axes are for users who place every array themselves.
    if mesh.empty or mesh.size == 1 or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return (), 1
    return mesh.axis_names, mesh.size


def num_devices() -> int:
    """The number of devices that share the work; 1 if it is not divided."""
    return _mesh_axes()[1]


def by_columns(shape: tuple[int, ...]) -> bool:
    """True if matrices (b, ..., m, n) are divided by columns: there are too few, and n is large enough."""
    devices = num_devices()
    if devices == 1 or 0 in shape or shape[-1] % (PANEL * devices):
        return False
    return _busiest(shape, devices) > _IMBALANCE


def _busiest(shape: tuple[int, ...], devices: int) -> float:
    """The largest share of the matrices that a device has, in units of the mean share."""
    count = shape[0] if len(shape) > 2 else 1
    return -(-count // devices) * devices / count


def matrices(x: Array) -> Array:
    """Matrices (b, ..., m, n), divided over the devices: by the first axis, or by columns."""
    axes, devices = _mesh_axes()
    if devices == 1 or 0 in x.shape:
        return x
    if by_columns(x.shape):
        return lax.with_sharding_constraint(x, PartitionSpec(*[None] * (x.ndim - 1), axes))
    if x.ndim > 2 and x.shape[0] > 1:
        return lax.with_sharding_constraint(x, PartitionSpec(axes))
    return x


def product(x: Array, y: Array) -> Array:
    """x @ y as `_precision` says, divided as `matrices`: in bfloat16 or TF32 alone nothing would be orthogonal."""
    return matrices(_precision.product(x, y))


def gathered(tree: Any) -> Any:
    """Arrays whole on every device."""
    if num_devices() == 1:
        return tree
    return jax.tree.map(lambda x: lax.with_sharding_constraint(x, PartitionSpec()), tree)


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
    """function(columns, *arrays), which returns matrices, with `columns` to access their columns by.

    Where matrices of these shapes are divided by columns, the function is called with those of each device.
    """
    if not by_columns(arrays[0].shape):
        return function(Columns(), *arrays)
    axes, devices = _mesh_axes()
    spec = PartitionSpec(*[None] * (arrays[0].ndim - 1), axes)
    # Neither input is whole on any device: gradients, were there any, would have nothing to sum.
    divided = jax.shard_map(
        lambda *parts: function(Columns(axes, devices), *parts), in_specs=spec, out_specs=spec, check_vma=False
    )
    return divided(*arrays)


def each(function: Callable, items: Sequence[Any]) -> list:
    """[function(item) for item in items] for pytrees of the same structure and shapes, divided over the devices.

    A device calls the function for its items in turn. Results, and gradients of the items, are gathered; or, on so
    many devices that less is sent, summed over those that have none and those that have one. Differentiable.
    """
    axes, devices = _mesh_axes()
    count = len(items)
    if devices == 1 or count < 2:
        return [function(item) for item in items]
    if devices > 2 * count:  # a sum sends everything twice
        return _each_summed(function, items, axes)
    share = -(-count // devices)
    padded = [*items, *[items[-1]] * (share * devices - count)]
    stacked = gathered(_stack(padded))

    def of_share(part):
        return _stack([function(_at(part, i)) for i in range(share)])

    spec = PartitionSpec(axes)
    found = gathered(jax.shard_map(of_share, in_specs=spec, out_specs=spec, check_vma=False)(stacked))
    return [_at(found, i) for i in range(count)]


def _each_summed(function: Callable, items: Sequence[Any], axes: tuple[str, ...]) -> list:
    """`each` on more devices than items."""
    count = len(items)

    def of_one(stacked):
        device = lax.axis_index(axes)
        item = jnp.minimum(device, count - 1)
        found = function(jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, item, keepdims=False), stacked))

        def among_all(leaf):
            first = jnp.arange(count).reshape(-1, *[1] * jnp.ndim(leaf)) == device
            return lax.psum(jnp.where(first, leaf, 0), axes)

        return jax.tree.map(among_all, found)

    spec = PartitionSpec()
    found = jax.shard_map(of_one, in_specs=spec, out_specs=spec, check_vma=False)(gathered(_stack(items)))
    return [_at(found, i) for i in range(count)]


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _at(tree: Any, i: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[i], tree)
