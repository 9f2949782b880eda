"""Shapes of operators in turn."""

from collections.abc import Sequence


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
