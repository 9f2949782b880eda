"""A network as one pytree, and the only forward pass."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lipjax.operators import (
    Centered,
    Centers,
    Composite,
    Contraction,
    Leaf,
    Linear,
    Normalize,
    Operator,
    operator_class,
)

ACTIVATION_PRECISIONS = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Application:
    """The way a training step applies a network: what it keeps between layers. Nothing changes but rounding.

    A layer is a run of operators whose names agree up to the "/".

    Attributes:
      precision: of activations, one of ACTIVATION_PRECISIONS: "float32" keeps the precision of the network's arrays.
        With "bfloat16" linear maps multiply bfloat16 numbers and round their result once, and the other operators
        compute in the precision of the network's arrays and round once.
      remat: number of consecutive layers rematerialised as one group (only its input is stored); 0 stores every
        activation.
      scan: whether layers that differ in nothing but the numbers in their arrays, one after the other, are one loop.
      axes: of the mesh over which the batch is divided, inside `jax.shard_map`; () elsewhere.
    """

    precision: str = "float32"
    remat: int = 0
    scan: bool = False
    axes: tuple[str, ...] = ()


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
        """The features that the head sees, for pixels x."""
        return self.features_and_means(x)[0]

    def features_and_means(
        self, x: Float[Array, "b ..."], application: Application = Application()
    ) -> tuple[Float[Array, "b d"], dict[str, Array]]:
        """`features`, and the means of this batch that operators of a training step subtracted, by operator name.

        Both are in the precision of normalised pixels, whatever the application.
        """
        x, means = self.normalize(x), {}
        wide = x.dtype
        narrow = jnp.bfloat16 if application.precision == "bfloat16" else wide
        x = x.astype(narrow)
        apply = functools.partial(_apply, narrow=narrow, wide=wide, axes=application.axes)
        if application.remat:
            apply = jax.checkpoint(apply)
        for start, length, count in _pieces(self, application):
            groups = [self.ops[i : i + length] for i in range(start, start + length * count, length)]
            if count == 1:
                x, found = apply(x, groups[0])
                found = {i: mean[None] for i, mean in found.items()}
            else:
                x, found = jax.lax.scan(apply, x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *groups))
            for group, i in itertools.product(range(count), found):
                means[self.names[start + group * length + i]] = found[i][group]
        return x.astype(wide), means

    def __repr__(self) -> str:
        return table_of(self, "Network")

    def __call__(self, x: Float[Array, "b ..."]) -> Float[Array, "b k"]:
        """Logits (b, k) for pixels x: (b, *in_shape) in [0, 1]. Raises: ValueError for another shape."""
        if x.shape[1:] != self.in_shape:
            raise ValueError(f"The network expects images (b, {', '.join(map(str, self.in_shape))}), got {x.shape}.")
        return self.head(self.features(x))


# A table of a network shows this many rows; of more, the first and the last.
_ROWS = 24


def table_of(network: Network, title: str) -> str:
    """A network as a few lines, one operator a line; layers that repeat are shown once. Reads no array."""
    ops = network.ops if isinstance(network.ops, tuple) else ()
    layers = [
        [(name, repr(op)) for name, op in part]
        for _, part in itertools.groupby(zip(network.names, ops, strict=False), lambda item: item[0].split("/")[0])
    ]
    rows: list[tuple[str, str]] = []
    for _, equal in itertools.groupby(layers, lambda layer: [row[1] for row in layer]):
        run = list(equal)
        first, last = (layer[0][0].split("/")[0] for layer in (run[0], run[-1]))
        rows += run[0]
        if len(run) > 1:
            rows.append((f"... {last}", f"{len(run)} layers like {first}"))
    rows.append(("head", repr(network.head)))
    if len(rows) > _ROWS:
        left_out = len(rows) - _ROWS + 1
        rows = [*rows[: _ROWS // 2], ("...", f"{left_out} more"), *rows[left_out - len(rows) + _ROWS // 2 :]]
    width = max(len(name) for name, _ in rows)
    lines = [f"{title} of {len(ops)} operators and a head"]
    return "\n".join([*lines, *(f"  {name:<{width}}  {text}" for name, text in rows)])


def _apply(x, ops, *, narrow, wide, axes=()):
    """Applies operators in turn. Returns the result and the means that were subtracted, by the operator's place."""
    means = {}
    for i, op in enumerate(ops):
        if narrow != wide:
            if isinstance(op, Composite):
                y = _apply(x, op.parts(), narrow=narrow, wide=wide, axes=axes)[0]
                x = x + y if op.adds_input else y
                continue
            dtype = narrow if isinstance(op, Linear | Contraction | Centered) else wide
            x = x.astype(dtype)
            op = jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), op)
        if isinstance(op, Centers):
            x, means[i] = op.with_mean(x, axes)
        else:
            x = op(x)
        x = x.astype(narrow)
    return x, means


def _pieces(network: Network, application: Application) -> list[tuple[int, int, int]]:
    """Pieces applied one at a time: (first operator, operators in a group, groups); several equal groups are a loop."""
    layers = [
        [i for i, _ in part]
        for _, part in itertools.groupby(enumerate(network.names), lambda item: item[1].split("/")[0])
    ]

    def kind(layer):
        leaves, structure = jax.tree.flatten([network.ops[i] for i in layer])
        return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]

    pieces, single, size = [], [], max(application.remat, 1)

    def close():
        for i in range(0, len(single), size):
            pieces.append((single[i][0], sum(map(len, single[i : i + size])), 1))
        single.clear()

    for _, equal in itertools.groupby(layers, kind):
        run = list(equal)
        count = len(run) // size if application.scan else 0
        if count > 1:
            close()
            pieces.append((run[0][0], len(run[0]) * size, count))
            run = run[count * size :]
        single += run
    close()
    return pieces


def make_network(named_ops, head, input_mean: Any = 0.0, input_std: Any = 1.0) -> Network:
    """Makes a `Network` of parts that fit together.

    Args:
      named_ops: (name, operator) pairs in order.
      head: the last map, features to logits.
      input_mean, input_std: numbers or one per channel, pixel units; std > 0. They become arrays of the head's type,
        NumPy's where the head's are.
    Returns: the Network; called on pixels (b, *in_shape) it gives logits (b, k).
    Raises: ValueError as `check_network`.
    Example:
      >>> head = lipjax.operators.LinearHead(jnp.eye(2), jnp.zeros(2))
      >>> network = lipjax.network.make_network([("dense", lipjax.operators.Dense(2 * jnp.eye(2)))], head)
      >>> network(jnp.ones((1, 2))).tolist()
      [[2.0, 2.0]]
    """
    named_ops = list(named_ops)
    mean, std = (_pixel_numbers(a, jax.tree.leaves(head)) for a in (input_mean, input_std))
    network = Network(tuple(op for _, op in named_ops), head, mean, std, tuple(name for name, _ in named_ops))
    check_network(network)
    return network


def _pixel_numbers(value, leaves):
    """input_mean or input_std as an array of the head's kind and floating-point type, (c,) or (1,)."""
    if not any(isinstance(a, jax.Array) for a in (value, *leaves)):
        # JAX would shorten float64 to float32 where jax_enable_x64 is off.
        dtype = np.result_type(*leaves)
        return np.atleast_1d(np.asarray(value, dtype if jnp.issubdtype(dtype, jnp.floating) else np.float64))
    dtype = jnp.result_type(*leaves)
    return jnp.atleast_1d(jnp.asarray(value, dtype if jnp.issubdtype(dtype, jnp.floating) else float))


def check_network(network: Network) -> None:
    """Raises: ValueError unless names, also of parts of a composite, are unique, arrays have their shapes, and each
    shape follows from the last.
    """
    names, ops = network.names, network.ops
    if not ops or len(set(names)) != len(names) or len(names) != len(ops):
        raise ValueError(f"Expected at least one operator and unique names, one for each, got {names}.")
    chain = [*zip(names, ops, strict=True), ("head", network.head)]
    for name, part in chain:
        _check_part(name, part)
        if isinstance(part, Composite):
            kind = operator_class(part).__name__
            if type(part) is not operator_class(part):
                raise ValueError(f"{name}: expected a {kind}, not a subclass, got {type(part).__name__}.")
            taken = {f"{name}/{place}" for place in range(len(part.parts()))} & set(names)
            if taken:
                raise ValueError(f"{sorted(taken)[0]} names an operator and a part of the {kind} {name}: rename one.")
    _check_part("input", network.normalize)
    for (name, part), (after, following) in zip(chain[:-1], chain[1:], strict=True):
        if tuple(part.out_shape) != tuple(following.in_shape):
            raise ValueError(f"{name} gives shape {part.out_shape}, but {after} expects {following.in_shape}.")


def _check_part(name: str, part) -> None:
    if not isinstance(part, Operator):
        raise ValueError(
            f"{name}: expected an operator, a subclass of lipjax.operators.Operator, got a {type(part).__name__}."
        )
    try:
        part.check()
        if isinstance(part, Composite):
            part.check_parts()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


__all__ = ["Application", "Network", "check_network", "make_network", "table_of"]


def __dir__() -> list[str]:
    return __all__
