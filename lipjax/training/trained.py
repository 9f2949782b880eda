"""What a run has trained, as a model and its variables."""

import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from lipjax.errors import UserError
from lipjax.models import get_model
from lipjax.nn import COLLECTION, LipschitzModel
from lipjax.training import optimizer as optimizers
from lipjax.training import sharding, step
from lipjax.training.checkpoint import Checkpointer
from lipjax.training.config import load_config


def load_trained(workdir: str | os.PathLike) -> tuple[LipschitzModel, dict[str, Any]]:
    """The model of a run and its variables, of the checkpoint that the validation split liked best.

    `model.apply(variables, pixels)` gives logits of pixels (b, h, w, c) in [0, 1], `lipjax.freeze(model, variables)` a
    network that certifies. The data set is not needed, but for runs of a lipjax that did not save the size of images.

    Args: workdir: of one run, so of several seeds WORKDIR/seed_0.
    Returns: (model, variables): a Flax module, and {"params": ..., "lip": ...} of JAX arrays in training's precision.
    Raises: UserError if there is no usable run.
    Example: model, variables = lipjax.training.load_trained("runs/digits")
    """
    workdir = pathlib.Path(workdir).expanduser()
    seeds = sorted(folder.parent.name for folder in workdir.glob("seed_*/config.json"))
    if seeds and not (workdir / "config.json").exists():
        raise UserError(f"{workdir} holds several runs: give one of them, such as {workdir / seeds[0]}.")
    config, seed = load_config(workdir)
    shape = best_meta(workdir).get("shape")
    if shape is None:
        from lipjax.training.loop import Run, load_best  # which loads the data set

        run = Run(config, seed, sharding.make_mesh(1, config.batch_size))
        return run.model, jax.tree.map(jnp.asarray, load_best(workdir, run)[0])
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    model, params, lip, _ = restore_best(workdir, tuple(shape["input_shape"]), shape["num_classes"], device)
    return model, {"params": params, COLLECTION: lip}


def best_meta(directory: str | os.PathLike) -> dict:
    """What the best checkpoint of a run says about itself. Raises: UserError if there is none."""
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
    abstract = jax.eval_shape(lambda: step.init_state(model, optimizer, jax.random.key(0), config.lipschitz))
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=placed), abstract)
    with _checkpointer(directory) as checkpointer:
        found, meta = checkpointer.restore_best(abstract)
    return model, optimizers.slow_parameters(found.params, found.opt_state), found.lip, meta


def _checkpointer(directory: str | os.PathLike) -> Checkpointer:
    return Checkpointer(pathlib.Path(directory) / "checkpoints", best_metric=step.METRIC, read_only=True)
