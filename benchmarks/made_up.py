"""Runs on made-up images of the shapes of a config's data set, so that benchmarks need none of them."""

from typing import Any

import jax
import numpy as np

from lipjax.plan.plan import planned_dataset
from lipjax.training import objective, sharding, step
from lipjax.training.config import default_config
from lipjax.training.loop import Run


def sizes(name: str) -> tuple[tuple[int, int, int], int]:
    """(image shape, number of classes) of a data set."""
    config = default_config().data
    config.name = name
    dataset = planned_dataset(config, 0)
    return dataset.image_shape, dataset.num_classes


def made_up_run(config) -> Run:
    """The run that `train.py` would make of the config, with images of zeros, on all devices."""
    return Run(config, 0, dataset=planned_dataset(config.data, 0))


def random_batch(run: Run) -> tuple[jax.Array, jax.Array]:
    """Images and labels of one step, divided over the devices."""
    rng, count = np.random.default_rng(0), run.config.batch_size
    images = rng.integers(0, run.pixel_max + 1, (count, *run.dataset.image_shape)).astype(np.uint8)
    labels = rng.integers(0, run.dataset.num_classes, count).astype(np.int32)
    images, labels = jax.device_put((images, labels), sharding.batch_sharded(run.mesh))
    return images, labels


def abstract_batch(run: Run) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """The shapes of `random_batch`."""
    split, count = sharding.batch_sharded(run.mesh), run.config.batch_size
    images = jax.ShapeDtypeStruct((count, *run.dataset.image_shape), np.uint8, sharding=split)
    return images, jax.ShapeDtypeStruct((count,), np.int32, sharding=split)


def batch_step(run: Run) -> tuple[Any, Any]:
    """(jitted step (state, images, labels, schedule) -> (state, metrics), schedule of the second epoch)."""
    config = run.config
    train_step = step.make_train_step(run.model, run.optimizer, config, run.mesh, run.pixel_max)
    schedule = objective.loss_schedule(config.loss, 1, config.num_epochs)
    return step.jit_stream_step(train_step, run.mesh, run.shardings), schedule
