"""Bounds of float32 errors where a compiler merges operators: numbers in several versions (docs/soundness.md, 13.2)."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from lipjax import operators
from lipjax.certify.float32_sums import MOST_JOINED, SUMS
from lipjax.numerics import ENLARGEMENT32

# What the rounding of an operator's input may be multiplied by if it is computed twice, with other roundings: for both
# numbers that depend on a pair, or for a comparison and for what it chooses between (docs/soundness.md, 13.2).
_PAIR, _CHOICE = math.sqrt(2) * ENLARGEMENT32, 3.0
_FOLDS = operators.Householder, operators.Householder2, operators.ProjectionPool
_PIECES = operators.LeakyReLU, operators.LinearSpline, operators.NActivation, operators.PartialAbs
_COPIES = {**dict.fromkeys(_FOLDS, _PAIR * _CHOICE), **dict.fromkeys(_PIECES, _CHOICE)}


def sum_before(ops: Sequence, i: int) -> int | None:
    """The place of the sum whose values operator i gets, or a part of; None if it gets others."""
    i -= 1
    while i >= 0 and isinstance(ops[i], operators.Crop | operators.CropChannels):
        i -= 1
    return i if i >= 0 and isinstance(ops[i], SUMS) else None


class Factors(NamedTuple):
    """By what the operators behind one enlarge what it adds: at most, and if they only meet numbers of it that are as
    large at one channel as at its partner, in the other half of the channels.
    """

    most: float = 1.0
    in_pairs: float = 1.0

    def before(self, op) -> "Factors":
        """The factors in front of an operator that is neither a sum nor a composite, from those behind it."""
        if type(op) is operators.MaxMin:  # afterwards they are as large at both channels, and stay so at the next
            return Factors(_PAIR * self.in_pairs, self.in_pairs)
        factor = _COPIES.get(type(op), 1.0)
        alone = isinstance(op, operators.Elementwise | operators.Translation)  # each channel by itself
        return Factors(factor * self.most, factor * (self.in_pairs if alone else self.most))

    def around(self, block: Any, inner: "Factors", adds_input: bool) -> "Factors":
        """The factors in front of a composite, from those behind it and those in front of its parts."""
        beside, through = block.shares
        if adds_input:  # g and the sum may read different versions, whose errors do not cancel
            ways = zip(self, inner, strict=True)
            return Factors(*((beside * own + through * of_g) * ENLARGEMENT32 for own, of_g in ways))
        if inner.most <= 1:  # of one input, of which the composite's own constant speaks
            return inner
        return Factors(*(max(through, 1.0) * factor * ENLARGEMENT32 for factor in inner))


_ALONE = Factors()


def merged(
    ops: Sequence, found: Sequence[Any], copies: Factors = _ALONE, joining: int = 0
) -> tuple[list[Any], Factors, int]:
    """The rounding of merged operators: both numbers of a pair may be computed twice, with other roundings each time,
    and what follows a sum may join it.

    copies: the factors by which what follows enlarges what the last operator adds. joining: how many biases and inputs
      of blocks behind all operators may join a sum that ends them. Where more than `MOST_JOINED` may join one sum,
      nothing is claimed. Returns: the bounds, and both of what lies before all operators.
    """
    enlarged = []
    for i, (op, local) in reversed(list(enumerate(zip(ops, found, strict=True)))):
        if isinstance(op, SUMS):
            copies, local = _ALONE, dataclasses.replace(local, whole=not joining)
            if joining + (local.bias is not None) > MOST_JOINED:
                local = dataclasses.replace(local, absolute=math.inf)
            joining = 0
        absolute, relative, parts = local.absolute * copies.most, local.relative * copies.most, ()
        if isinstance(op, operators.Composite):
            parts, inner, joining = merged(op.parts(), local.parts, copies, joining + op.adds_input)
            copies = copies.around(local, inner, op.adds_input)
        else:
            copies = copies.before(op)
            if isinstance(op, operators.Translation):  # a Bias right behind a sum is counted there
                joining += not isinstance(op, operators.Bias) or sum_before(ops, i) is None
            elif local.terms is not None:
                joining = 0
        enlarged.append(dataclasses.replace(local, absolute=absolute, relative=relative, parts=tuple(parts)))
    return enlarged[::-1], copies, joining
