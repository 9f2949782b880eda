"""Training that starts from the parameters of another run."""

import dataclasses
import os
import pathlib

import jax

from lipjax.errors import UserError
from lipjax.nn import LOG_SCALE, LipschitzModel
from lipjax.training import sharding, step
from lipjax.training.best import restore_best
from lipjax.training.checkpoint import Checkpointer


def state_from(
    directory: str | os.PathLike, state: step.TrainState, model: LipschitzModel, mesh, data_identity: dict
) -> step.TrainState:
    """A fresh state with the layers of another run's best checkpoint, and its head too where it has the same shapes.

    Args: directory: of the other run. state, model, data_identity: what training starts with, and on what.
    Raises: UserError if there is no usable run, its layers are not those of the model, or its images or their split are
      others: what it was trained on could be among the images that validate or test here.
    """
    directory = pathlib.Path(directory).expanduser()
    everywhere = sharding.replicated(mesh)
    _, trained, trained_lip, meta = restore_best(directory, model.input_shape, model.num_classes, everywhere)
    _check_images(directory, meta, data_identity)
    params, lip = (
        _merged(ours, theirs, directory) for ours, theirs in ((state.params, trained), (state.lip, trained_lip))
    )
    return dataclasses.replace(state, params=params, lip=lip)


def check_images(directory: str | os.PathLike, data_identity: dict) -> None:
    """Raises: UserError as `state_from`, if the other run's images or their split are others."""
    directory = pathlib.Path(directory).expanduser()
    with Checkpointer(directory / "checkpoints", best_metric=step.METRIC, read_only=True) as checkpointer:
        _check_images(directory, checkpointer.meta(), data_identity)


def _check_images(directory, meta: dict, data_identity: dict) -> None:
    theirs = meta.get("data", {})  # and perhaps generated images, which neither validate nor test anything
    if any(theirs.get(split) != identity for split, identity in data_identity.items()):
        raise UserError(
            f"config.init_from = {directory} was trained on other images, or split them by another seed: what it has "
            "seen could be tested on here. Take the same config.data and config.seeds as that run."
        )


def _merged(ours: dict, theirs: dict, directory) -> dict:
    """The layers of theirs, which ours must have; of the head and of the estimates what fits."""
    free = ("head", "vectors", LOG_SCALE)
    shapes = {
        side: {name: jax.tree.map(lambda a: a.shape, tree) for name, tree in part.items()}
        for side, part in (("ours", ours), ("theirs", theirs))
    }
    differ = [n for n in sorted({*ours, *theirs}) if n not in free and shapes["ours"].get(n) != shapes["theirs"].get(n)]
    if differ:
        raise UserError(
            f"config.init_from = {directory} has other layers than config.model describes ({', '.join(differ[:4])}): "
            "only the head may differ."
        )
    return {
        name: theirs[name] if shapes["ours"][name] == shapes["theirs"].get(name) else tree
        for name, tree in ours.items()
    }
