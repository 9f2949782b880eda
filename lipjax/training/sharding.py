"""Placement of arrays on devices: the one file that names mesh axes.

Images are divided over all devices; what is trained is stored in parts over the axis "model" and gathered whole at the
start of a step; what does not depend on images (`lipjax._spread`) is computed once, in parts over all devices.
"""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lipjax.errors import UserError

# What the names of the mesh's axes begin with. Each is as many axes as its number of devices has prime factors: of
# whole axes any group of devices can be made whose number divides theirs, over which `lipjax._spread` divides work.
DATA, MODEL = "data", "model"

# Arrays with fewer entries are stored whole on every device: fetching their parts would take longer than it saves.
MIN_SIZE = 2**14


def make_mesh(data: int, batch_size: int, model: int = 1, devices: list | None = None) -> Mesh:
    """A mesh of data x model devices (data = -1: as many as there are), over all of which the batch is divided.

    Args: devices: out of these; None: out of those that JAX sees.
    Raises: UserError if the devices are too few, do not divide by `model`, are not all used by several processes, or
      the batch size does not divide over them.
    """
    devices = jax.devices() if devices is None else devices
    if data == -1 and len(devices) % model:
        raise UserError(
            f"config.mesh.model = {model} does not divide the {len(devices)} devices that JAX sees: take a divisor, "
            "or set config.mesh.data to say how many of them to use."
        )
    data = len(devices) // model if data == -1 else data
    count = data * model
    if count > len(devices):
        raise UserError(
            f"config.mesh: data x model = {data} x {model} = {count} devices, but JAX sees {len(devices)}: lower one "
            "of them, or set config.mesh.data to -1."
        )
    if jax.process_count() > 1 and count < len(devices):
        raise UserError(
            f"config.mesh: data x model = {data} x {model} = {count} devices, but the {jax.process_count()} processes "
            f"have {len(devices)}, of which none may be left out: set config.mesh.data to -1."
        )
    if batch_size % count:
        raise UserError(
            f"config.batch_size = {batch_size} does not divide over {count} devices: take a multiple of {count}, "
            f"or set config.mesh.data so that data x model divides it."
        )
    # In JAX's order, process by process, not by jax.make_mesh, which may permute a TPU's: the i-th part of a batch is
    # then the i-th process's, and what is drawn for an image does not depend on the topology.
    sizes, names = [], []
    for name, number in ((DATA, data), (MODEL, model)):
        factors = _prime_factors(number) or ((1,) if name == DATA else ())
        sizes += factors
        names += [f"{name}{i}" for i in range(len(factors))]
    return Mesh(np.array(devices[:count]).reshape(sizes), names, axis_types=(AxisType.Auto,) * len(sizes))


def _prime_factors(n: int) -> tuple[int, ...]:
    """In descending order."""
    found, factor = [], 2
    while n > 1:
        while n % factor == 0:
            found.append(factor)
            n //= factor
        factor += 1
    return tuple(reversed(found))


def axes(mesh: Mesh, name: str) -> tuple[str, ...]:
    """The axes of the mesh that are DATA's or MODEL's."""
    return tuple(axis for axis in mesh.axis_names if axis.startswith(name))


def size(mesh: Mesh, name: str) -> int:
    """The number of devices along DATA or MODEL."""
    return math.prod(mesh.shape[axis] for axis in axes(mesh, name))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """The leading axis divided over all devices."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def spec_of(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The sharding of an array of a train state: its largest axis that the axis "model" divides, if it is large.

    Parameters and what optimizers keep for them have the same shapes, hence the same parts.
    """
    parts = size(mesh, MODEL)
    divisible = [axis for axis, side in enumerate(shape) if side % parts == 0]
    if parts == 1 or math.prod(shape) < MIN_SIZE or not divisible:
        return PartitionSpec()
    largest = max(divisible, key=lambda axis: shape[axis])
    return PartitionSpec(*[axes(mesh, MODEL) if axis == largest else None for axis in range(len(shape))])


def state_shardings(abstract_state, mesh: Mesh) -> Any:
    """Shardings of a train state, leaf by leaf: those of `spec_of`, but all of the model's state whole.

    Its vectors are images, and small. Of images divided by rows XLA (that of JAX 0.10.2) gets the weight gradient of a
    strided convolution wrong where a mesh has another axis, and it would divide what they are computed from likewise.
    """

    def of_leaf(path, leaf):
        whole = jax.tree_util.keystr(path).startswith(".lip")
        return NamedSharding(mesh, PartitionSpec() if whole else spec_of(leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(of_leaf, abstract_state)


def describe(abstract_state, mesh: Mesh) -> dict[str, PartitionSpec]:
    """{path of the leaf: how it is stored}, for tests and for people."""
    leaves = jax.tree_util.tree_leaves_with_path(state_shardings(abstract_state, mesh))
    return {jax.tree_util.keystr(path): sharding.spec for path, sharding in leaves}


def stored(tree, mesh: Mesh) -> Any:
    """Parameters or their gradients inside jit, in the parts that they are stored in."""
    if mesh.size == 1:
        return tree
    return jax.tree.map(
        lambda leaf: jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec_of(leaf.shape, mesh))), tree
    )


def gathered(tree, mesh: Mesh) -> Any:
    """Arrays inside jit, whole on every device. Their gradients are summed over the devices."""
    return tree if mesh.size == 1 else jax.lax.with_sharding_constraint(tree, replicated(mesh))


def averaged(value_and_grad: Callable, mesh: Mesh) -> Callable:
    """Makes of a function of some images the same function of a batch that is divided over the devices, inside jit.

    Each device calls it for its own images, and the means and gradients are averaged once, at the end: XLA alone would
    add up the devices' parts at each use of an array that is used several times (the terms of a series, micro-batches).

    Args: value_and_grad: (whole, *batch) -> ((mean, (arrays of images, ..., other means)), gradient): means over its
      images, all together equally many on each device, and the gradient of the first. What it averages over images on
      its way has to be averaged over the axes of the mesh (`Application.axes`).
    Returns: that function of `whole`, the same on every device, and batch-sharded arrays.
    """
    if mesh.size == 1:
        return value_and_grad

    def of_shard(whole, *batch):
        (mean, (*per_image, means)), gradient = value_and_grad(whole, *batch)
        # In the precision of the network's arrays; each apart, so that one may be sent while another is computed.
        mean, gradient = jax.tree.map(lambda leaf: jax.lax.pmean(leaf, mesh.axis_names), (mean, gradient))
        return (mean, (tuple(per_image), means)), gradient

    def of_batch(whole, *batch):
        each, same = PartitionSpec(mesh.axis_names), PartitionSpec()
        # Not check_vma, under which differentiation itself would add up, at each use. Without it the gradient of a
        # device is that of the sum of all devices' means, with respect to its own copy of `whole`.
        divided = jax.shard_map(
            of_shard,
            mesh=mesh,
            in_specs=(same, *[each] * len(batch)),
            out_specs=((same, (each, same)), same),
            check_vma=False,
        )
        (mean, (per_image, means)), gradient = divided(whole, *batch)
        return (mean, (*per_image, means)), gradient

    return of_batch


def side_by_side(arrays, mesh: Mesh) -> Any:
    """Joins batch-sharded arrays along the batch, inside jit: each device puts together its own parts of them."""
    parts = [a.reshape(mesh.size, -1, *a.shape[1:]) for a in arrays]
    joined = jnp.concatenate(parts, axis=1)
    return joined.reshape(-1, *joined.shape[2:])


@contextlib.contextmanager
def spread_over(mesh: Mesh):
    """A context in which a program is traced: its matrix functions and norm estimates are divided over the devices.

    A context, or the decorator of a function. On one device it changes nothing.
    """
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh) if mesh.size > 1 else contextlib.nullcontext():
        yield
