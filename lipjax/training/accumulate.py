"""Gradient accumulation: the batch of a step in micro-batches, through a network that is built once."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lipjax.errors import UserError
from lipjax.training import sharding


def accumulate(value_and_grad, built, batch, config):
    """Applies value_and_grad(built, *batch), of a mean over images, to config.accumulation micro-batches in turn.

    Image i is in micro-batch i modulo their number, on every device of its own images.

    Args: value_and_grad: returns ((mean, (logits, radii, means)), gradient). batch: arrays (b, ...), of one device.
    Returns: the same for the whole batch, its images in order.
    Raises: UserError if operators subtracted means: those of a micro-batch are not those of the batch.
    """
    count = config.accumulation
    if count == 1:
        return value_and_grad(built, *batch)

    def add(total, part):
        (mean, (logits, radii, means)), gradient = value_and_grad(built, *part)
        if means:
            raise UserError(centering_refused(count))
        return jax.tree.map(jnp.add, total, gradient), (mean, logits, radii)

    parts = jax.tree.map(lambda a: jnp.swapaxes(a.reshape(-1, count, *a.shape[1:]), 0, 1), batch)
    total = jax.tree.map(jnp.zeros_like, built)
    if config.scan:
        total, found = jax.lax.scan(add, total, parts)
    else:
        found = []
        for i in range(count):
            total, results = add(total, _after(total, jax.tree.map(lambda a, i=i: a[i], parts)))
            found.append(results)
        found = jax.tree.map(lambda *results: jnp.stack(results), *found)
    means, *per_image = found
    logits, radii = (jnp.swapaxes(a, 0, 1).reshape(-1, *a.shape[2:]) for a in per_image)
    return (jnp.mean(means), (logits, radii, {})), jax.tree.map(lambda g: g / count, total)


def _after(total, part):
    """Returns `part` with an artificial dependency on `total`.

    So XLA cannot start (and allocate) the next micro-batch before the last one is summed; XLA for CPU drops
    optimization barriers. Where `total` has NaN, and the step is lost anyway, the result may be zeros.
    """
    token = sum(leaf.ravel()[0] for leaf in jax.tree.leaves(total) if leaf.size)
    return jax.tree.map(lambda a: jnp.where(jnp.isnan(token), jnp.zeros_like(a), a), part)


def check_accumulation(config, mesh: Mesh) -> None:
    """Raises: UserError unless every micro-batch divides over the devices."""
    size = config.batch_size // config.accumulation
    shards = config.batch_size // sharding.batch_sharded(mesh).shard_shape((config.batch_size,))[0]
    if size % shards:
        raise UserError(
            f"config.accumulation = {config.accumulation} leaves micro-batches of {size} images, which do not divide "
            f"over {shards} devices: lower it, or change config.batch_size or config.mesh."
        )


def centering_refused(count: int) -> str:
    """Says why config.accumulation and config.model.centering exclude each other."""
    return (
        f"config.accumulation = {count} needs config.model.centering = False: every centred block subtracts its mean "
        "over the whole batch, which the blocks after it depend on. Set config.accumulation to 1; config.remat also "
        "saves memory."
    )
