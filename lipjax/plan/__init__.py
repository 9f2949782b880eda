"""The needs of a training step on chips that are not here: memory, operations, traffic and time."""

from lipjax.errors import require_extra

require_extra("train", "flax", "ml_collections", "optax", "orbax", "rich")
