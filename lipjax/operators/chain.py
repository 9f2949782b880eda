"""Operators inside of a composite: shapes that follow from each other, and bounds as certificates state them."""

from collections.abc import Sequence
from typing import Any

from lipjax import spectral
from lipjax.errors import NotCertifiable
from lipjax.spectral.arguments import Bounded


def check_chain(
    kind: str,
    in_shape: Sequence[int],
    out_shape: Sequence[int],
    shapes: Sequence[tuple[Sequence[int], Sequence[int]]],
    adds_input: bool,
) -> None:
    """Checks that parts take just what the ones before them give, so that nothing broadcasts.

    Args:
      kind: of the composite, for messages; in_shape, out_shape: its own.
      shapes: of each part what it takes and what it gives.
      adds_input: whether the input is added to what the last part gives.
    Raises: ValueError naming the two that do not fit.
    """
    given = [(f"operator {i} gives", gives) for i, (_, gives) in enumerate(shapes)]
    taken = [(f"operator {i} takes", takes) for i, (takes, _) in enumerate(shapes)]
    taken.append((f"the {kind} gives", out_shape))
    wanted = [*zip([(f"the {kind} takes", in_shape), *given], taken, strict=True)]
    if adds_input:
        wanted.insert(-1, (given[-1], ("the sum takes", in_shape)))
    for (first, shape), (then, expected) in wanted:
        if tuple(shape) != tuple(expected):
            raise ValueError(f"{first} shape {tuple(shape)}, but {then} {tuple(expected)}.")


def bound_row(place: str, op, found: spectral.NormBound | None = None) -> dict[str, Any]:
    """The proved bound of an operator inside another, as a certificate states it. Raises: NotCertifiable if none is.

    found: one that is at hand, else the operator's `bound`.
    """
    kind = type(op).__name__
    if not isinstance(op, Bounded):
        raise NotCertifiable(f"{place}: no proved Lipschitz bound is known for one of type {kind}.")
    proof: spectral.NormBound = op.bound() if found is None else found
    claims = {"type": kind, "bound": float(proof.claimed), "sigma": float(proof.proved)}
    return {**claims, "method": proof.method, "details": proof.details}
