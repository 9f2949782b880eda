"""Paths: a network's operators as what loop transformation sees, linear maps and activations in turn (LipLT)."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lipjax.errors import NotCertifiable
from lipjax.operators import (
    Composite,
    Elementwise,
    Linear,
    Reordering,
    Translation,
    operator,
)


@operator("inner", "outer", "skip", static=("slope",))
class Block:
    """x -> H x + G phi(W x + bias): a piece of a path, what LipLT makes of a residual block and of an activation.

    Attributes:
      inner, outer, skip: W, G and H, tuples of linear operators in the order in which they are applied; () is the
        identity, and skip None no H at all.
      slope: (alpha, beta), the interval of the slopes of phi, which acts elementwise.
    """

    inner: tuple
    outer: tuple = ()
    skip: tuple | None = ()
    slope: tuple[float, float] = (0.0, 1.0)

    @property
    def in_shape(self):
        return tuple((*self.inner, *(self.skip or ()), *self.outer)[0].in_shape)

    @property
    def out_shape(self):
        return tuple((*(self.skip or ()), *self.outer)[-1].out_shape) if self.outer or self.skip else self.in_shape


class Step(NamedTuple):
    """One piece of a path: a linear operator (`block` None) or an activation with what surrounds it.

    shape, out_shape: of the piece's input and output; inner_shape: of what the activation acts on.
    """

    name: str
    op: Any
    block: Block | None
    shape: tuple[int, ...]
    inner_shape: tuple[int, ...]
    out_shape: tuple[int, ...]

    @property
    def is_plain(self) -> bool:
        """True if the piece is an activation and nothing else: then a and b are factors of norms."""
        block = self.block
        return block is not None and block.inner == () and block.outer == () and block.skip is None


def check_slope(slope, name: str) -> tuple[float, float]:
    """The interval as two floats. Raises: ValueError naming the layer unless alpha <= beta, both finite."""
    try:
        low, high = (float(s) for s in slope)
    except (TypeError, ValueError):
        low, high = 1.0, 0.0
    if not (low <= high and abs(low) < float("inf") and abs(high) < float("inf")):
        raise ValueError(f"{name}: expected slopes (alpha, beta), finite with alpha <= beta, got {slope!r}.")
    return low, high


def is_linear(op) -> bool:
    """True if LipLT may take the operator as a linear map."""
    return isinstance(op, Linear | Reordering)


def _end_shape(ops: Sequence, shape: tuple[int, ...], name: str) -> tuple[int, ...]:
    for op in ops:
        if not is_linear(op):
            raise refusal(name, op)
        if tuple(op.in_shape) != shape:
            raise ValueError(f"{name}: {type(op).__name__} expects shape {tuple(op.in_shape)}, but gets {shape}.")
        shape = tuple(op.out_shape)
    return shape


def refusal(name: str, op) -> NotCertifiable:
    """The error that names a layer which LipLT does not take."""
    return NotCertifiable(
        f"{name} ({type(op).__name__}): LipLT takes linear operators and elementwise activations of bounded slopes. "
        "For others use the product of norms, bounds.margin_lipschitz_bound or margin_lipschitz_estimate."
    )


def _check_not_empty(block: Block, name: str) -> None:
    if not (block.inner or block.outer or block.skip):
        raise ValueError(f"{name}: expected a block with at least one linear operator; an activation is its own layer.")


def _check_parts(name: str, op) -> None:
    """Raises: ValueError naming the layer if arrays do not have their shapes, or these do not fit the images, and for
    plain arrays in the place of operators.
    """
    for part in (*op.inner, *op.outer, *(op.skip or ())) if isinstance(op, Block) else (op,):
        if isinstance(part, (np.ndarray, jax.Array, list, tuple, float, int)):
            raise ValueError(
                f"{name}: expected an operator, got a plain {type(part).__name__} of shape {np.shape(part)}: make "
                "one of it, such as operators.Dense(matrix) or operators.Conv(kernel, in_shape)."
            )
        if isinstance(part, Translation) or is_linear(part):
            try:
                part.check()
                _ = part.in_shape, part.out_shape
            except ValueError as error:
                raise ValueError(f"{name} ({type(part).__name__}): {error}") from error


def _piece(name: str, op) -> Any:
    """The operator, or the `Block` that a residual block is. Raises: NotCertifiable for one of another form."""
    if not isinstance(op, Composite):
        return op
    if not op.taken_apart:
        raise refusal(name, op)
    parts = [part for part in op.parts() if not isinstance(part, Translation)]
    places = [i for i, part in enumerate(parts) if isinstance(part, Elementwise)]
    if not op.adds_input or len(places) != 1 or not all(map(is_linear, parts[: places[0]] + parts[places[0] + 1 :])):
        raise NotCertifiable(
            f"{name} ({type(op).__name__}): LipLT takes residual blocks of linear operators and one elementwise "
            "activation among them. For others use the product of norms, bounds.margin_lipschitz_bound or "
            "margin_lipschitz_estimate."
        )
    return Block(tuple(parts[: places[0]]), tuple(parts[places[0] + 1 :]), (), parts[places[0]].slope)


def make_path(named_ops: Sequence[tuple[str, Any]], slope: Any = (0.0, 1.0)) -> tuple[Step, ...]:
    """The pieces that LipLT works on.

    Args:
      named_ops: (name, operator) in order: linear operators, biases (which no constant depends on), elementwise
        activations, residual blocks (`operators.Residual` of such operators and one such activation). Where there is
        neither an activation nor a block, one with `slope` stands between every two maps; reorderings such as Flatten
        stay with the map before.
      slope: (alpha, beta), or a sequence of them, one for each place; None if all activations are given.
    Raises: ValueError for alpha > beta, too many or few slopes, and shapes that do not chain; NotCertifiable for an
      activation that is not elementwise. Both name the layer.
    """
    named_ops = list(named_ops)
    for name, op in named_ops:
        _check_parts(name, op)
    named_ops = [(name, _piece(name, op)) for name, op in named_ops if not isinstance(op, Translation)]
    if not named_ops:
        raise ValueError("Expected at least one operator, got none.")
    if slope is not None and not any(isinstance(op, Block | Elementwise) for _, op in named_ops):
        named_ops = _with_activations(named_ops, slope)
    steps: list[Step] = []
    shape = None
    for name, op in named_ops:
        if isinstance(op, Block):
            _check_not_empty(op, name)
        elif not (isinstance(op, Elementwise | _Activation) or is_linear(op)):
            raise refusal(name, op)
        if tuple(op.in_shape) != (shape := shape or tuple(op.in_shape)):
            raise ValueError(f"{name}: expected an operator on shape {shape}, got one on {tuple(op.in_shape)}.")
        before, shape = shape, tuple(op.out_shape)
        if isinstance(op, Block):
            check_slope(op.slope, name)
            inner = _end_shape(op.inner, before, name)
            out = _end_shape(op.outer, inner, name)
            if op.skip is not None and _end_shape(op.skip, before, name) != out:
                raise ValueError(f"{name}: the skip connection gives another shape than the activation's side, {out}.")
            steps.append(Step(name, None, op, before, inner, out))
            shape = out
        elif isinstance(op, Elementwise | _Activation):
            block = Block((), (), None, check_slope(op.slope, name))
            steps.append(Step(name, None, block, before, before, shape))
        else:
            steps.append(Step(name, op, None, before, before, shape))
    return tuple(steps)


class _Activation(NamedTuple):
    """An activation of a given slope between two maps."""

    in_shape: tuple[int, ...]
    slope: Any

    @property
    def out_shape(self):
        return self.in_shape


def _with_activations(named_ops, slope) -> list:
    """Puts an activation between every two maps; reorderings stay with the map before, or with the first one."""
    maps = [i for i, (_, op) in enumerate(named_ops) if not isinstance(op, Reordering)]
    slopes = list(slope) if isinstance(slope, Iterable) else [slope]
    if not any(isinstance(s, (tuple, list)) for s in slopes):
        slopes = [slope] * len(maps[1:])
    if len(slopes) != len(maps[1:]):
        raise ValueError(f"Expected a slope (alpha, beta) or {len(maps[1:])}, one between every two maps: {slope!r}.")
    found = list(named_ops)
    for i, between in reversed(list(zip(maps[1:], slopes, strict=True))):
        shape = tuple(named_ops[i - 1][1].out_shape)
        found.insert(i, (f"the activation before {named_ops[i][0]}", _Activation(shape, between)))
    return found


def slope_parts(block: Block) -> tuple[float, float]:
    """a and b of the block's activation."""
    low, high = block.slope
    return (low + high) / 2, (high - low) / 2
