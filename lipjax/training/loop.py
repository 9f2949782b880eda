"""One training run: batches in, checkpoints and metrics out. Resumes by itself from its directory."""

import json
import os
import pathlib

import jax
import numpy as np
from absl import logging

from lipjax.certify import write_json
from lipjax.errors import UserError
from lipjax.models import get_model
from lipjax.training import optimizer as optimizers
from lipjax.training import sharding
from lipjax.training import step as steps
from lipjax.training.checkpoint import Checkpointer
from lipjax.training.data import StreamDataset, load_dataset
from lipjax.training.metrics import MetricWriter

METRIC = "certified_accuracy_estimate"
# What may change between the runs that a directory holds: none of it alters the function that training follows.
FREE_TO_CHANGE = ("checkpoint", "certify", "mesh")


def plain(config) -> dict:
    """A config as JSON data."""
    return json.loads(config.to_json_best_effort())


def check_same_config(directory, saved: dict, config) -> None:
    """Raises: UserError naming the first fields by which a run's saved config differs from the one asked for."""

    def flat(tree, prefix=""):
        for field, value in tree.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{field}.")
            else:
                yield f"{prefix}{field}", value

    ours, theirs = dict(flat(plain(config))), dict(flat(saved))
    differ = [
        f"config.{name}: {theirs.get(name)!r} there, {ours.get(name)!r} now"
        for name in sorted({*ours, *theirs})
        if name.split(".")[0] not in FREE_TO_CHANGE and ours.get(name) != theirs.get(name)
    ]
    differ = [line for line in differ if not line.startswith(("config.data.data_dir", "config.data.download"))]
    if differ:
        raise UserError(
            f"{directory} holds a run with another config ({'; '.join(differ[:4])}): choose another --workdir, or go back."
        )


class Run:
    """Everything that one seed's training needs, made from the config: data, model, mesh, optimizer, jitted steps."""

    def __init__(self, config, seed: int):
        self.config, self.seed = config, seed
        self.mesh = sharding.make_mesh(config.mesh, config.batch_size)
        self.dataset = load_dataset(config.data, seed)
        self.streams = isinstance(self.dataset, StreamDataset)
        self.num_images = self.dataset.size("train")
        self.steps_per_epoch = self.num_images // config.batch_size
        if self.steps_per_epoch == 0:
            raise UserError(
                f"config.batch_size = {config.batch_size} exceeds the {self.num_images} training images: lower it."
            )
        self.total_steps = self.steps_per_epoch * config.num_epochs
        if not self.streams and max(self.dataset.split("train").labels.max(), 0) >= self.dataset.num_classes:
            raise UserError(f"The labels of {self.dataset.name} exceed its {self.dataset.num_classes} classes.")
        self.model = get_model(
            config.model, input_shape=self.dataset.image_shape, num_classes=self.dataset.num_classes
        )
        self.optimizer = optimizers.make_optimizer(config.optimizer, self.steps_per_epoch, config.num_epochs)
        self.pixel_max = self.dataset.pixel_max

        def initialise():
            return steps.init_state(self.model, self.optimizer, jax.random.key(seed))

        abstract = jax.eval_shape(initialise)
        self.shardings = sharding.state_shardings(abstract, self.mesh)
        self.abstract_state = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, self.shardings
        )
        self._initialise = jax.jit(initialise, out_shardings=self.shardings)

    def fresh_state(self) -> steps.TrainState:
        """The state before the first step."""
        return self._initialise()

    def batch_runner(self, first_step: int):
        """A function (state, step, epsilon) -> (state, metrics) that trains on the batch of that step."""
        train_step = steps.make_train_step(self.model, self.optimizer, self.config, self.mesh, self.pixel_max)
        if self.streams:
            return self._stream_runner(train_step, first_step)
        everywhere = sharding.replicated(self.mesh)
        part = self.dataset.split("train")
        images, labels = jax.device_put((part.images, part.labels), everywhere)
        jitted = steps.jit_array_step(train_step, self.mesh, self.config.batch_size)
        order_of = jax.jit(steps.epoch_order, static_argnums=2, out_shardings=everywhere)
        current = {"epoch": -1, "order": None}

        def run(state, step, epsilon):
            epoch, position = divmod(step, self.steps_per_epoch)
            if current["epoch"] != epoch:
                current.update(epoch=epoch, order=order_of(state.key, epoch, self.num_images))
            return jitted(state, images, labels, current["order"], position * self.config.batch_size, epsilon)

        return run

    def _stream_runner(self, train_step, first_step: int):
        jitted = steps.jit_stream_step(train_step, self.mesh)
        split = sharding.batch_sharded(self.mesh)
        batches = self.dataset.train_batches(
            self.config.batch_size, self.seed, first_step, jax.process_index(), jax.process_count()
        )

        def run(state, step, epsilon):
            del step  # the iterator started at first_step
            images, labels = next(batches)
            images = jax.make_array_from_process_local_data(split, images)
            return jitted(state, images, jax.make_array_from_process_local_data(split, labels), epsilon)

        return run

    def validator(self):
        """A function state -> metrics on the validation split, by norm estimates; {} if the split is empty."""
        prepare, evaluate = steps.make_eval_step(self.model, self.config, self.mesh, self.pixel_max)
        size, batch = self.dataset.size("validation"), self.config.batch_size
        split = sharding.batch_sharded(self.mesh)

        def batches():
            if self.streams:
                yield from self.dataset.eval_batches("validation", batch)
            else:
                part = self.dataset.split("validation")
                for start in range(0, size, batch):
                    yield part.images[start : start + batch], part.labels[start : start + batch]

        def validate(state) -> dict[str, float]:
            if size == 0:
                return {}
            network, lipschitz = prepare(state.params, state.vectors)
            totals: dict[str, float] = {}
            for images, labels in batches():
                missing = [(0, batch - len(labels))]
                images = np.pad(images, missing + [(0, 0)] * 3)
                labels = np.pad(labels, missing, constant_values=-1)
                inputs = jax.device_put((images, labels), split)
                for name, value in evaluate(network, lipschitz, *inputs).items():
                    totals[name] = totals.get(name, 0.0) + float(value)
            lipschitz = np.asarray(lipschitz)
            return {name: value / size for name, value in totals.items()} | {
                "lipschitz_estimate": float(lipschitz.max())
            }

        return validate


def _check_finite(metrics: dict, step: int, epoch: int) -> None:
    """Raises: UserError saying where, if the step met a value that is not finite."""
    flags = {name: bool(value) for name, value in metrics.pop("finite").items()}
    bad = [name for name, good in flags.items() if not good]
    if bad:
        raise UserError(
            f"Training stopped at step {step + 1} (epoch {epoch + 1}): not finite were {', '.join(bad)}. Nothing of that step was "
            f"kept; the last checkpoint is intact. Lower config.optimizer.learning_rate or clip_norm, then start again."
        )


def train(config, workdir: str | os.PathLike, seed: int) -> Run:
    """Trains one seed to the end, or goes on where an earlier call on the same directory stopped.

    Args: config: validated. workdir: of this seed; gets config.json, checkpoints/, metrics.jsonl and tensorboard/.
    Raises: UserError for what the user can mend: config, data, a directory of another run, a full disk, NaN.
    """
    workdir = pathlib.Path(workdir)
    run = Run(config, seed)
    with Checkpointer(
        workdir / "checkpoints", keep=config.checkpoint.keep, best_metric=METRIC
    ) as checkpointer, jax.default_matmul_precision(config.matmul_precision):
        latest = checkpointer.latest_step()
        if latest is None:
            state = run.fresh_state()
        else:
            check_same_config(workdir, checkpointer.meta()["config"], config)
            state, _ = checkpointer.restore(run.abstract_state)
            logging.info("Resuming %s from step %d of %d.", workdir, latest, run.total_steps)
        if jax.process_index() == 0:
            write_json(workdir / "config.json", {"config": plain(config), "seed": seed})
        if (latest or 0) >= run.total_steps:
            return run
        with MetricWriter(workdir, resume_step=latest) as writer:
            _train_epochs(run, state, checkpointer, writer)
    return run


def _train_epochs(run: Run, state, checkpointer: Checkpointer, writer: MetricWriter) -> None:
    config, first = run.config, int(state.step)
    train_batch, validate = run.batch_runner(first), run.validator()
    rate = optimizers.learning_rate_schedule(config.optimizer, run.steps_per_epoch, config.num_epochs)
    meta = {"config": plain(config), "seed": run.seed}
    totals: dict[str, float] = {}
    counted, pending = 0, None

    def collect(found):
        nonlocal counted
        step, metrics = found
        metrics = jax.device_get(metrics)
        _check_finite(metrics, step, step // run.steps_per_epoch)
        for name, value in metrics.items():
            totals[name] = totals.get(name, 0.0) + float(value)
        counted += 1
        shown = {name: totals[name] / counted for name in ("loss", "accuracy", METRIC)}
        progress.step(step + 1, **shown)

    with writer.progress(run.total_steps, first) as progress:
        for step in range(first, run.total_steps):
            epoch = step // run.steps_per_epoch
            epsilon = optimizers.epsilon_at(config.loss, epoch, config.num_epochs)
            state, metrics = train_batch(state, step, epsilon)
            # One step behind, so that the device always has work while the host looks at numbers.
            if pending is not None:
                collect(pending)
            pending = (step, metrics)
            done = step + 1
            if done % run.steps_per_epoch and done != run.total_steps:
                if config.checkpoint.every_steps and done % config.checkpoint.every_steps == 0:
                    collect(pending)
                    pending = None
                    checkpointer.save(done, state, meta, None)
                continue
            collect(pending)
            pending = None
            averages = {name: value / counted for name, value in totals.items()}
            averages |= {"epsilon": epsilon, "learning_rate": float(rate(step))}
            writer.write(done, averages, "train")
            totals, counted = {}, 0
            if (epoch + 1) % config.checkpoint.every_epochs == 0 or done == run.total_steps:
                found = validate(state)
                if found:
                    writer.write(done, found, "validation")
                checkpointer.save(done, state, meta, found.get(METRIC))
                averages |= {f"val_{name}": found[name] for name in ("accuracy", METRIC) if name in found}
            shown = ("loss", "accuracy", METRIC, "val_accuracy", f"val_{METRIC}")
            progress.epoch(epoch + 1, config.num_epochs, {n: averages[n] for n in shown if n in averages})


def load_best(workdir: str | os.PathLike, run: Run):
    """The parameters and vectors that the validation split liked best, as model variables.

    Raises: UserError if there is no usable checkpoint.
    """
    with Checkpointer(pathlib.Path(workdir) / "checkpoints", best_metric=METRIC, read_only=True) as checkpointer:
        state, _ = checkpointer.restore_best(run.abstract_state)
        best = checkpointer.best_step()
        step = checkpointer.latest_step() if best is None else best
    return {"params": state.params}, state, step


__all__ = ["Run", "check_same_config", "load_best", "plain", "train"]
