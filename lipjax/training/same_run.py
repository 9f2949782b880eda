"""Checks that a work directory belongs to the requested run (same config, seed and data)."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from lipjax.errors import UserError
from lipjax.models import MODELS
from lipjax.training import objective
from lipjax.training import optimizer as optimizers
from lipjax.training.choices import CHOICES, OF_ALL_MODELS, without_others
from lipjax.training.config import defaults_for

# What may change when a run resumes: none of it alters what training computes. (A directory's seed is checked apart.)
# Where and in which pieces it computes may change the last bits; a path of other images is told by `data_identity`.
FREE_TO_CHANGE = (
    *("checkpoint.", "certify.", "mesh.", "seeds", "data.data_dir", "data.path", "data.download"),
    "data.generated.cache_dir",
    *("accumulation", "remat", "scan", "data.workers", "compilation_cache"),
)


def plain(config) -> dict:
    """A config as JSON data."""
    return json.loads(config.to_json_best_effort())


def flat(tree: dict, prefix: str = "") -> dict:
    """{"group.field": value} of nested dicts."""
    found = {}
    for field, value in tree.items():
        if isinstance(value, list) and len(value) == 1:  # 0.5 and (0.5,) are the same mean
            value = value[0]
        found |= flat(value, f"{prefix}{field}.") if isinstance(value, dict) else {f"{prefix}{field}": value}
    return found


def _complete(config: dict) -> dict:
    """A saved config as {"group.field": value}: of an older lipjax it lacks fields, whose defaults are what it did."""
    defaults = flat(plain(defaults_for(config)))
    for field in OF_ALL_MODELS:  # what a model takes that is given without them
        defaults[f"model.{field}"] = getattr(MODELS[config["model"]["name"]], field)
    return defaults | flat(without_others(config))


def check_same_run(
    directory, meta: dict, config, seed: int, data: dict | None = None, done: tuple[int, int] | None = None
) -> None:
    """Raises: UserError naming the first fields by which a run's saved config differs from the one asked for.

    A run may get more epochs, if with them it would have come to the same so far: then it goes on as if it had been
    asked for as many from the start.

    Args:
      meta: of a checkpoint. data: what of `Run.training_identity` is to be compared, as it is now; None: nothing.
      done: steps that the checkpoint has behind it, and steps of an epoch; None: no other number of epochs will do.
    """
    ours, theirs = _complete(plain(config)), _complete(meta["config"])
    choices = [choice.path for choice in CHOICES]
    names = sorted({*ours, *theirs}, key=lambda name: (name not in choices, name))
    names = [n for n in names if not n.startswith(FREE_TO_CHANGE)]
    differ = [
        f"config.{n}: {theirs.get(n)!r} there, {ours.get(n)!r} now" for n in names if ours.get(n) != theirs.get(n)
    ]
    epochs = theirs.get("num_epochs")
    if len(differ) == 1 and done is not None and isinstance(epochs, int) and config.num_epochs > epochs:
        if meta["seed"] == seed and _same_so_far(config, epochs, *done):
            differ = []
        elif meta["seed"] == seed:
            raise UserError(
                f"{directory} holds a run of {epochs} epochs, and {config.num_epochs} are asked for. With so many, the "
                f"learning rate (config.optimizer.schedule = {config.optimizer.schedule!r}) or the loss's schedule "
                f"would have been another in the {done[0]} steps that are done, so that the run cannot simply go on. "
                "To train on from its parameters, with a schedule of its own, take another --workdir and "
                f"--config.init_from={directory}."
            )
    if meta["seed"] != seed:
        differ.insert(0, f"config.seeds: {meta['seed']} there, {seed} now")
    # The same path may hold other images by now, and then a new split would put trained images into the test set.
    other = [part for part, now in (data or {}).items() if meta.get("data", data).get(part) != now]
    if other:
        differ.insert(0, f"the data set has other images or labels: {', '.join(other)}")
    if differ:
        raise UserError(
            f"{directory} holds a run with another config ({'; '.join(differ[:4])}): "
            "choose another --workdir, or the same values."
        )


def _same_so_far(config, num_epochs: int, steps: int, steps_per_epoch: int) -> bool:
    """True if a run of config would have taken the same first steps with num_epochs, on which schedules depend."""
    both = num_epochs, config.num_epochs
    rates = [optimizers.learning_rate_schedule(config.optimizer, steps_per_epoch, epochs) for epochs in both]
    taken = [np.asarray(jax.vmap(rate)(jnp.arange(steps))) for rate in rates]
    begun = range(-(-steps // steps_per_epoch))
    losses = [[objective.loss_schedule(config.loss, epoch, epochs) for epoch in begun] for epochs in both]
    return np.array_equal(taken[0], taken[1]) and losses[0] == losses[1]


def check_not_foreign(path: pathlib.Path) -> None:
    """Raises: UserError if there is a file in the place of a run's config that no run has written."""
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        return
    except (OSError, ValueError):
        document = None
    if not isinstance(document, dict) or not {"config", "seed"} <= set(document):
        raise UserError(f"{path} is not the config of a lipjax run and would be overwritten: choose another --workdir.")
