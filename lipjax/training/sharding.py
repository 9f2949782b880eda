"""Where arrays live: the one file that names mesh axes."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lipjax.errors import UserError

DATA = "data"


def make_mesh(num_devices: int, batch_size: int) -> Mesh:
    """A mesh over num_devices devices (-1: all), whose axis "data" divides the batch.

    Raises: UserError if there are fewer devices, or the batch size does not divide over them.
    """
    devices = jax.devices()
    count = len(devices) if num_devices == -1 else num_devices
    if count > len(devices):
        raise UserError(f"config.mesh.data = {count} devices, but JAX sees {len(devices)}: lower it, or set it to -1.")
    if batch_size % count:
        raise UserError(
            f"config.batch_size = {batch_size} does not divide over {count} devices: take a multiple of {count}, "
            f"or set config.mesh.data to a divisor of the batch size."
        )
    return Mesh(np.array(devices[:count]), (DATA,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """The leading axis divided over the devices."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def state_shardings(abstract_state, mesh: Mesh):
    """Shardings of a train state, leaf by leaf: parameters, optimizer and state are replicated."""
    return jax.tree.map(lambda _: replicated(mesh), abstract_state)
