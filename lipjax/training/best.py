"""The best checkpoint of a run, restored without its data set."""

import os
import pathlib

import jax

from lipjax.models import get_model
from lipjax.training import optimizer as optimizers
from lipjax.training import step
from lipjax.training.checkpoint import Checkpointer
from lipjax.training.config import load_config
from lipjax.training.restoring import restore_state


def best_meta(directory: str | os.PathLike) -> dict:
    """The metadata of the best checkpoint of a run. Raises: UserError if there is none."""
    with _checkpointer(directory) as checkpointer:
        return checkpointer.meta(checkpointer.best_step())


def restore_best(directory: str | os.PathLike, input_shape: tuple[int, ...], num_classes: int, placed):
    """The model of a run, and parameters, state ("lip") and meta of its best checkpoint.

    Args: placed: the sharding that every array gets.
    Raises: UserError if there is no usable checkpoint, or it holds another model.
    """
    config, _ = load_config(directory)
    model = get_model(config.model, input_shape=input_shape, num_classes=num_classes)  # pyright: ignore[reportArgumentType]
    optimizer = optimizers.make_optimizer(config.optimizer, 1, config.num_epochs, config.train_head_only)

    def fresh():
        return step.init_state(model, optimizer, jax.random.key(0), config.lipschitz)

    abstract = jax.eval_shape(fresh)
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=placed), abstract)
    with _checkpointer(directory) as checkpointer:
        found, meta = restore_state(checkpointer, abstract, jax.jit(fresh), checkpointer.best_step())
    return model, optimizers.slow_parameters(found.params, found.opt_state), found.lip, meta


def _checkpointer(directory: str | os.PathLike) -> Checkpointer:
    return Checkpointer(pathlib.Path(directory) / "checkpoints", best_metric=step.METRIC, read_only=True)
