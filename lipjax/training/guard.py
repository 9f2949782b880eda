"""Values that are not finite: the sign that a step leaves of one, and the search afterwards for where they were.

A step tests a few numbers that it has before it updates anything: its loss, logits, constants and the norm of its
gradient. If one is not finite it changes nothing, and neither does any step after it, so that the host, which looks
one step later, finds the state as it was and runs that step again with a flag for every part.
"""

import collections
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lipjax.errors import UserError
from lipjax.training import objective, sharding

_MEND = (
    "Nothing of that step was kept, and the checkpoints are intact. Lower config.optimizer.learning_rate or "
    "config.optimizer.clip_norm and train into another --workdir."
)


def finite(tree) -> jax.Array:
    """() bool: all numbers of all arrays are finite."""
    return jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def batches_seen(step: jax.Array) -> jax.Array:
    """The number of batches that a state has seen, of its field `step`: k, or -1 - k once batch k gave no numbers."""
    return jnp.maximum(step, -1 - step)


def after(step: jax.Array, good: jax.Array) -> jax.Array:
    """The field `step` of a state after one more batch, which was good or not. Once negative, it stays as it is."""
    seen = batches_seen(step)
    return jnp.where(good & (step >= 0), seen + 1, -1 - seen)


def state_flags(state, prefix: str) -> dict[str, jax.Array]:
    """Flags of a train state's parts, True for those that are finite, by name. prefix: of the names."""
    flags = collections.OrderedDict(
        (f"{prefix}parameters of {name}", finite(state.params[name])) for name in state.params
    )
    flags[f"{prefix}state of the model"] = finite(state.lip)
    flags[f"{prefix}state of the optimizer"] = finite(state.opt_state)
    return flags


def step_flags(state, constants, lip, logits, loss, grads, norm, fresh) -> dict[str, dict[str, jax.Array]]:
    """Flags by name: {"before": of the state, "during": of all that the step computes, in that order}.

    Args: state: before the step. fresh: what it would be after it. The others are of the step.
    """
    flags = collections.OrderedDict({"norm estimates": finite((constants, lip))})
    flags["logits"] = finite(logits)
    flags["loss"] = finite(loss)
    flags |= {f"gradient of {name}": finite(grads[name]) for name in grads}
    flags["sum of the gradients' squares"] = finite(norm)
    return {"before": state_flags(state, ""), "during": flags | state_flags(fresh, "updated ")}


def state_checker(mesh: Mesh) -> Callable[[Any, int, int], None]:
    """A function (state, step, epoch) that raises a UserError if the state after that step, from 0, is not finite.

    No step looks at what it leaves: so this is for states that are saved or validated, a pass over their arrays.
    """
    jitted = jax.jit(lambda state: state_flags(state, "updated "), out_shardings=sharding.replicated(mesh))

    def check(state, step: int, epoch: int) -> None:
        bad = _bad(jax.device_get(jitted(state)))
        if bad:
            raise UserError(_message(step, epoch, ", ".join(bad)))

    return check


def stop(run, state, step: int) -> NoReturn:
    """Runs a step again that met a value that is not finite, on the state before it, and says where that was.

    Args: run: a `loop.Run`. state: after the step, or after later ones, which is the same; used up. step: from 0.
    Raises: UserError, always.
    """
    epoch = step // run.steps_per_epoch
    schedule = objective.loss_schedule(run.config.loss, epoch, run.config.num_epochs)
    _, flags = run.batch_runner(step, diagnose=True)(state, step, schedule)
    flags = jax.device_get(flags)
    before, during = _bad(flags["before"]), _bad(flags["during"])
    if before:
        left = f"as step {step} left them" if step else "at the start"
        raise UserError(_message(step, epoch, f"{', '.join(before)}, {left}"))
    if during:
        raise UserError(_message(step, epoch, ", ".join(during)))
    raise UserError(
        f"Training stopped at step {step + 1} (epoch {epoch + 1}): a value was not finite, but none was when the step "
        "ran once more: a device may be faulty, or a number just within float32. The checkpoints are intact: start "
        "again to go on from the last."
    )


def _bad(flags: dict[str, Any]) -> list[str]:
    return [name for name, good in flags.items() if not good]


def _message(step: int, epoch: int, what: str) -> str:
    return f"Training stopped at step {step + 1} (epoch {epoch + 1}): not finite were {what}. {_MEND}"
