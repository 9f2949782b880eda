"""A train state restored from a checkpoint, also one of an older lipjax that estimated fewer norms."""

import dataclasses
from collections.abc import Callable
from typing import Any

from lipjax.training.checkpoint import Checkpointer
from lipjax.training.step import TrainState


def restore_state(
    checkpointer: Checkpointer, abstract_state: TrainState, fresh: Callable[[], TrainState], step: int | None = None
) -> tuple[TrainState, dict[str, Any]]:
    """`Checkpointer.restore` of a train state; vectors of layers whose norms were not estimated then begin anew.

    The estimate of a norm starts from such a vector, and is as good a few steps later, whatever it was.

    Args:
      abstract_state: as of `Checkpointer.restore`.
      fresh: gives a state of the same structure from before the first step; called only where vectors are missing.
      step: as of `Checkpointer.restore`.
    Returns: (state, meta). Raises: UserError as `Checkpointer.restore`, if anything else differs.
    """
    lacking = checkpointer.lacking(abstract_state, step)
    vectors = abstract_state.lip["vectors"]
    new = {name for name in vectors if any(f"{leaf}.".startswith(f"lip.vectors.{name}.") for leaf in lacking)}
    if not new:
        return checkpointer.restore(abstract_state, step)

    def with_vectors(state, found):
        return dataclasses.replace(state, lip={**state.lip, "vectors": found})

    known = with_vectors(abstract_state, {name: vectors[name] for name in vectors if name not in new})
    state, meta = checkpointer.restore(known, step)
    begun = fresh().lip["vectors"]
    return with_vectors(state, {**state.lip["vectors"], **{name: begun[name] for name in new}}), meta
