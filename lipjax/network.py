"""A network as one pytree, and the only forward pass."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lipjax.operators import Leaf, Normalize


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """Operators applied in turn to normalised pixels, then a head.

    Attributes:
      ops: operators and activations of lipjax.operators, in order; each one's in_shape is the out_shape of the one
      before.
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

    @property
    def normalize(self) -> Normalize:
        """The operator pixels -> (pixels - input_mean) / input_std."""
        return Normalize(self.input_mean, self.input_std, self.in_shape)

    def features(self, x: Float[Array, "b ..."]) -> Float[Array, "b d"]:
        """What the head sees, for pixels x."""
        return self.features_and_means(x)[0]

    def features_and_means(self, x: Float[Array, "b ..."]) -> tuple[Float[Array, "b d"], dict[str, Array]]:
        """`features`, and the means of this batch that operators of a training step subtracted, by operator name."""
        x, means = self.normalize(x), {}
        for name, op in zip(self.names, self.ops, strict=True):
            if hasattr(op, "with_mean"):
                x, means[name] = op.with_mean(x)
            else:
                x = op(x)
        return x, means

    def __call__(self, x: Float[Array, "b ..."]) -> Float[Array, "b k"]:
        """Logits (b, k) for pixels x: (b, *in_shape) in [0, 1]. Raises: ValueError for another shape."""
        if x.shape[1:] != self.in_shape:
            raise ValueError(f"The network expects images (b, {', '.join(map(str, self.in_shape))}), got {x.shape}.")
        return self.head(self.features(x))


def make_network(named_ops, head, input_mean: Any = 0.0, input_std: Any = 1.0) -> Network:
    """Makes a `Network` of parts that fit together.

    Args:
      named_ops: (name, operator) pairs in order. head: the last map.
      input_mean, input_std: numbers or one per channel, pixel units; std > 0.
    Raises: ValueError as `check_network`.
    """
    named_ops = list(named_ops)
    dtype = jnp.result_type(*jax.tree.leaves(head))
    mean, std = (jnp.atleast_1d(jnp.asarray(a, dtype)) for a in (input_mean, input_std))
    network = Network(tuple(op for _, op in named_ops), head, mean, std, tuple(name for name, _ in named_ops))
    check_network(network)
    return network


def check_network(network: Network) -> None:
    """Raises: ValueError unless names are unique, arrays have their shapes, and each shape follows from the last."""
    names, ops = network.names, network.ops
    if not ops or len(set(names)) != len(names) or len(names) != len(ops):
        raise ValueError(f"Expected at least one operator and unique names, one for each, got {names}.")
    chain = [*zip(names, ops, strict=True), ("head", network.head)]
    for name, part in chain:
        _check_part(name, part)
    _check_part("input", network.normalize)
    for (name, part), (after, following) in zip(chain[:-1], chain[1:], strict=True):
        if tuple(part.out_shape) != tuple(following.in_shape):
            raise ValueError(f"{name} gives shape {part.out_shape}, but {after} expects {following.in_shape}.")


def _check_part(name: str, part) -> None:
    try:
        getattr(part, "check", lambda: None)()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
