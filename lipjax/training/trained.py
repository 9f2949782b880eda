"""Loads what a run has trained, as a model and its variables."""

import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from lipjax.errors import UserError
from lipjax.nn import COLLECTION, LipschitzModel
from lipjax.training import sharding
from lipjax.training.best import best_meta, restore_best
from lipjax.training.config import load_config
from lipjax.training.loop import Run, load_best


def load_trained(workdir: str | os.PathLike) -> tuple[LipschitzModel, dict[str, Any]]:
    """The model of a run and its variables, of the checkpoint that the validation split liked best.

    `model.apply(variables, pixels)` gives logits of pixels (b, h, w, c) in [0, 1], `lipjax.freeze(model, variables)` a
    network that certifies. The data set is not needed, but for runs of a lipjax that did not save the size of images.

    Args:
      workdir: of one run, so of several seeds WORKDIR/seed_0.
    Returns: (model, variables): a Flax module, and {"params": ..., "lip": ...} of JAX arrays in training's precision.
    Raises: UserError if there is no usable run.
    Example:
      >>> model, variables = lipjax.training.load_trained("runs/digits")  # doctest: +SKIP
      >>> lipjax.freeze(model, variables).certify(images).radii  # doctest: +SKIP
    """
    workdir = pathlib.Path(workdir).expanduser()
    seeds = sorted(folder.parent.name for folder in workdir.glob("seed_*/config.json"))
    if seeds and not (workdir / "config.json").exists():
        raise UserError(f"{workdir} holds several runs: give one of them, such as {workdir / seeds[0]}.")
    config, seed = load_config(workdir)
    shape = best_meta(workdir).get("shape")
    if shape is None:
        run = Run(config, seed, sharding.make_mesh(1, config.batch_size))
        return run.model, jax.tree.map(jnp.asarray, load_best(workdir, run)[0])
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    model, params, lip, _ = restore_best(workdir, tuple(shape["input_shape"]), shape["num_classes"], device)
    return model, {"params": params, COLLECTION: lip}
