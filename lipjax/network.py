"""A network as one pytree, and the only forward pass."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lipjax.operators import Leaf, LinearHead


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """Operators applied in turn to normalised pixels, then a head.

    Attributes:
      ops: operators and activations of lipjax.operators, in order; each one's in_shape is the out_shape of the one before.
      head: makes logits (b, k) of the last features.
      input_mean, input_std: (c,) or (1,), in pixel units: the network sees (pixels - mean) / std.
      names: one unique name per operator, for reports and errors.
    """

    ops: tuple
    head: Any
    input_mean: Leaf
    input_std: Leaf
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    @property
    def in_shape(self) -> tuple[int, ...]:
        return tuple(self.ops[0].in_shape)

    @property
    def num_classes(self) -> int:
        return self.head.out_shape[0]

    def normalize(self, x: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
        """(x - input_mean) / input_std along the last axis."""
        return (x - self.input_mean) / self.input_std

    def features(self, x: Float[Array, "b ..."]) -> Float[Array, "b d"]:
        """What the head sees, for pixels x."""
        x = self.normalize(x)
        for op in self.ops:
            x = op(x)
        return x

    def __call__(self, x: Float[Array, "b ..."]) -> Float[Array, "b k"]:
        """Logits (b, k) for pixels x: (b, *in_shape) in [0, 1]. Raises: ValueError for another shape."""
        if x.shape[1:] != self.in_shape:
            raise ValueError(f"The network expects images (b, {', '.join(map(str, self.in_shape))}), got {x.shape}.")
        return self.head(self.features(x))


def make_network(named_ops, head: LinearHead, input_mean=0.0, input_std=1.0) -> Network:
    """Checks that the parts fit together and makes a `Network`.

    Args:
      named_ops: (name, operator) pairs in order. head: the last map.
      input_mean, input_std: numbers or one per channel, pixel units; std > 0.
    Raises: ValueError for shapes that do not follow each other, names that repeat or a std that is not positive.
    """
    named_ops = list(named_ops)
    names, ops = tuple(n for n, _ in named_ops), tuple(op for _, op in named_ops)
    if not ops or len(set(names)) != len(names):
        raise ValueError(f"Expected at least one operator and unique names, got {names}.")
    for (name, op), (after, following) in zip(named_ops, [*named_ops[1:], ("head", head)], strict=True):
        if tuple(op.out_shape) != tuple(following.in_shape):
            raise ValueError(f"{name} gives shape {op.out_shape}, but {after} expects {following.in_shape}.")
    dtype = jnp.result_type(head.matrix)
    mean, std = (jnp.atleast_1d(jnp.asarray(a, dtype)) for a in (input_mean, input_std))
    channels = ops[0].in_shape[-1]
    for label, value in (("input_mean", mean), ("input_std", std)):
        if value.shape not in ((1,), (channels,)):
            raise ValueError(f"Expected {label} to be a number or {channels} numbers, got shape {value.shape}.")
    return Network(ops, head, mean, std, names)
