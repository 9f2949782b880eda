"""From a checkpoint to a certificate: certification, attacks, tables and the HTML report."""

from lipjax.errors import require_extra

require_extra("train", "flax", "matplotlib", "ml_collections", "optax", "orbax", "rich")
