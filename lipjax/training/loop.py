"""One training run: batches in, checkpoints and metrics out. Resumes by itself from its directory."""

import dataclasses
import functools
import itertools
import os
import pathlib
from typing import NoReturn

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from lipjax.errors import NotCertifiable, UserError
from lipjax.files import write_json
from lipjax.models import get_model
from lipjax.nn import COLLECTION
from lipjax.training import cluster, guard, objective, sharding, stopping, warm_start
from lipjax.training import optimizer as optimizers
from lipjax.training import step as steps
from lipjax.training.accumulate import check_accumulation
from lipjax.training.checkpoint import Checkpointer
from lipjax.training.checks import check_augmentation, check_class_weights, check_loss, check_vectors
from lipjax.training.data import (
    ArrayDataset,
    GeneratedDataset,
    StreamDataset,
    load_dataset,
    num_generated,
    open_generated,
)
from lipjax.training.metrics import MetricWriter
from lipjax.training.restoring import restore_state
from lipjax.training.same_run import check_not_foreign, check_same_run, plain
from lipjax.training.step import METRIC
from lipjax.training.terminal import Terminal, progress_of


class Run:
    """Everything that one seed's training needs, made from the config: data, model, mesh, optimizer, jitted steps."""

    def __init__(
        self, config, seed: int, mesh: Mesh | None = None, dataset: ArrayDataset | StreamDataset | None = None
    ):
        self.config, self.seed = config, seed
        self.mesh = sharding.make_mesh(**config.mesh, batch_size=config.batch_size) if mesh is None else mesh
        check_accumulation(config, self.mesh)
        self.dataset = load_dataset(config.data, seed) if dataset is None else dataset
        self.num_images = self.dataset.size("train")
        self.num_generated = num_generated(config)
        self.num_real = config.batch_size - self.num_generated  # of a step; an epoch is one pass over the real images
        self.steps_per_epoch = self.num_images // self.num_real
        if self.steps_per_epoch == 0:
            less = f" less {self.num_generated} generated images" if self.num_generated else ""
            raise UserError(
                f"config.batch_size = {config.batch_size}{less} exceeds the {self.num_images} training images: "
                "lower it."
            )
        check_augmentation(config, self.dataset, self.mesh)
        check_class_weights(config, self.dataset)
        self.total_steps = self.steps_per_epoch * config.num_epochs
        self.model = get_model(
            config.model,
            input_shape=self.dataset.image_shape,
            num_classes=self.dataset.num_classes,
            batch_size=config.batch_size // self.mesh.devices.size,
        )
        check_loss(config.loss, self.model)
        self.optimizer = optimizers.make_optimizer(
            config.optimizer, self.steps_per_epoch, config.num_epochs, config.train_head_only
        )
        self.pixel_max = self.dataset.pixel_max

        def initialise():
            return steps.init_state(self.model, self.optimizer, jax.random.key(seed), config.lipschitz)

        try:
            abstract = jax.eval_shape(initialise)
        except NotCertifiable as error:
            raise UserError(
                f'config.lipschitz "{config.lipschitz}" does not fit config.model: {error} Set it to "product".'
            ) from error
        except UserError:
            raise
        except (
            TypeError,
            ValueError,
            ZeroDivisionError,
        ) as error:  # of operators that do not fit each other or the images
            raise UserError(f"config.model does not fit images {self.dataset.image_shape}: {error}") from error
        if config.lipschitz == "product":
            check_vectors(self.model, abstract)
        self.shardings = sharding.state_shardings(abstract, self.mesh)
        self.abstract_state = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, self.shardings
        )
        # Without config.init_from. Made whole and then divided, so that it is the same on any mesh, bit for bit.
        self.initial_state = jax.jit(lambda: sharding.gathered(initialise(), self.mesh), out_shardings=self.shardings)

    def __str__(self) -> str:
        """A line for people about what is trained."""
        count = sum(leaf.size for leaf in jax.tree.leaves(self.abstract_state.params))
        sizes = ", ".join(f"{self.dataset.size(split)} {split}" for split in ("train", "validation", "test"))
        devices = self.mesh.devices.flat
        generated = f", {self.num_generated} of them generated" if self.num_generated else ""
        return (
            f"{self.config.model.name} with {count:,} parameters on {self.dataset.name} ({sizes} images), seed "
            f"{self.seed}: {self.config.num_epochs} epochs of {self.steps_per_epoch} steps of "
            f"{self.config.batch_size} images{generated}, {len(devices)} x {devices[0].device_kind}"
        )

    @functools.cached_property
    def data_identity(self) -> dict:
        """The identity of a data set: fingerprints of its splits, or their sizes and seed if streamed."""
        if isinstance(self.dataset, StreamDataset):
            split = {split: [self.dataset.size(split), self.seed] for split in ("train", "validation")}
            return split | {"test": self.dataset.size("test")}
        return {split: self.dataset.fingerprint(split) for split in ("train", "validation", "test")}

    @functools.cached_property
    def generated(self) -> GeneratedDataset | None:
        """The generated images that are trained on beside the real ones. Neither validation nor certificates use them.

        Raises: UserError if they are not there or not as expected.
        """
        if self.num_generated == 0:
            return None
        dataset = self.dataset
        return open_generated(self.config, dataset.image_shape, dataset.num_classes, dataset.pixel_max)

    @functools.cached_property
    def class_weights(self) -> np.ndarray | None:
        """(k,), what an image of each class counts for in the loss and in validation; None if all count alike."""
        if self.config.loss.class_weights == "none" or isinstance(self.dataset, StreamDataset):
            return None  # of a stream `check_class_weights` refuses others
        return steps.balanced_weights(self.dataset.split("train").labels, self.dataset.num_classes)

    @property
    def training_identity(self) -> dict:
        """`data_identity`, and what identifies the generated images."""
        return self.data_identity | ({} if self.generated is None else {"generated": self.generated.identity})

    def fresh_state(self) -> steps.TrainState:
        """The state before the first step."""
        state = self.initial_state()
        if self.config.init_from:
            state = warm_start.state_from(self.config.init_from, state, self.model, self.mesh, self.data_identity)
            state = jax.jit(lambda whole: whole, out_shardings=self.shardings)(state)
        optimizers.check_start(self.config.optimizer, state.params)
        return state

    def batch_runner(self, first_step: int, diagnose: bool = False):
        """A function (state, step, schedule) -> (state, metrics) that trains on the batch of that step.

        diagnose: `guard.step_flags` in the place of metrics.
        """
        options = self.model, self.optimizer, self.config, self.mesh, self.pixel_max, self.class_weights
        train_step = steps.make_train_step(*options, diagnose=diagnose)
        if isinstance(self.dataset, StreamDataset):
            return self._stream_runner(train_step, self.dataset, first_step)
        everywhere = sharding.replicated(self.mesh)
        part = self.dataset.split("train")
        images, labels = (cluster.global_array(a, everywhere) for a in (part.images, part.labels))
        jitted = steps.jit_array_step(train_step, self.mesh, self.num_real, self.shardings)
        generated = self._generated_batches(first_step)
        order_of = jax.jit(steps.epoch_order, static_argnums=2, out_shardings=everywhere)
        current = {"epoch": -1, "order": None}

        def run(state, step, schedule):
            epoch, position = divmod(step, self.steps_per_epoch)
            if current["epoch"] != epoch:
                current.update(epoch=epoch, order=order_of(state.key, epoch, self.num_images))
            start = position * self.num_real
            return jitted(state, images, labels, current["order"], start, schedule, next(generated))

        return run

    def _stream_runner(self, train_step, dataset: StreamDataset, first_step: int):
        jitted = steps.jit_stream_step(train_step, self.mesh, self.shardings)
        shard = jax.process_index(), jax.process_count()
        batches = dataset.train_batches(self.num_real, self.seed, first_step, *shard)
        generated = self._generated_batches(first_step)

        def run(state, step, schedule):
            del step  # the iterators started at first_step
            return jitted(state, *self._sharded(next(batches)), schedule, next(generated))

        return run

    def _generated_batches(self, first_step: int):
        """Endless: of each step the generated (images, labels), on the devices; None where there are none."""
        if self.generated is None:
            return itertools.repeat(None)
        shard = jax.process_index(), jax.process_count()
        return map(self._sharded, self.generated.batches(self.num_generated, self.seed, first_step, *shard))

    def _sharded(self, batch):
        """(images, labels) of this process -> those of all processes, divided over the devices."""
        split = sharding.batch_sharded(self.mesh)
        images, labels = (jax.make_array_from_process_local_data(split, array) for array in batch)
        return images, labels

    def validator(self):
        """A function state -> metrics on the validation split, by norm estimates; {} if the split is empty.

        With class weights they are means by these weights, so that the checkpoint is kept that is best by them.
        """
        weights = self.class_weights
        prepare, evaluate = steps.make_eval_step(self.model, self.config, self.mesh, self.pixel_max, weights)
        size, batch = self.dataset.size("validation"), self.config.batch_size
        split = sharding.batch_sharded(self.mesh)

        def batches():
            if isinstance(self.dataset, StreamDataset):
                shard = jax.process_index(), jax.process_count()
                yield from map(self._sharded, self.dataset.eval_batches("validation", batch, *shard))
            else:
                part = self.dataset.split("validation")
                for start in range(0, size, batch):
                    labels = part.labels[start : start + batch]
                    missing = [(0, batch - len(labels))]
                    images = np.pad(part.images[start : start + batch], missing + [(0, 0)] * 3)
                    labels = np.pad(labels, missing, constant_values=-1)
                    yield [cluster.global_array(a, split) for a in (images, labels)]

        def validate(state) -> dict[str, float]:
            if size == 0:
                return {}
            network, constants = prepare(state.params, state.lip)
            totals: dict[str, float] = {}
            for inputs in batches():
                for name, value in evaluate(network, constants, *inputs).items():
                    totals[name] = totals.get(name, 0.0) + float(value)
            lipschitz = np.asarray(constants["lipschitz"])
            total = float(size)
            if weights is not None and isinstance(self.dataset, ArrayDataset):
                total = float(weights[self.dataset.validation.labels].sum(dtype=np.float64))
            return {name: value / total for name, value in totals.items()} | {
                "lipschitz_estimate": float(lipschitz.max())
            }

        return validate


def train(config, workdir: str | os.PathLike, seed: int, writable: bool = True, console: Console | None = None) -> Run:
    """Trains one seed to the end, or goes on where an earlier call on the same directory stopped.

    Args: config: validated. workdir: of this seed; gets config.json, checkpoints/, metrics.jsonl and tensorboard/.
      writable: whether that is possible; if not, the run must be trained already. console: where process 0 prints.
    Raises: UserError for what the user can mend: config, data, a directory of another run, a full disk, NaN.
      `stopping.Preempted` after a signal that asks for it, when the state is saved.
    """
    workdir = pathlib.Path(workdir)
    run = Run(config, seed)
    cluster.check_agreement({"the images or labels": run.training_identity})
    identity = run.training_identity
    if console is None or jax.process_index() != 0:
        console = Terminal(silent=jax.process_index() != 0)
    progress = progress_of(console)
    with (
        Checkpointer(
            workdir / "checkpoints",
            keep=config.checkpoint.keep,
            best_metric=METRIC,
            read_only=not writable,
            repaired=console.print if writable else None,
        ) as checkpointer,
        jax.default_matmul_precision(config.matmul_precision),
    ):
        latest, meta = checkpointer.latest_step(), {}
        cluster.check_agreement({"the last checkpoint that is seen": latest})
        if latest is not None:
            meta = checkpointer.meta()
            check_same_run(workdir, meta, config, seed, identity, done=(latest, run.steps_per_epoch))
        else:
            check_not_foreign(workdir / "config.json")
        if not writable and (latest is None or latest < run.total_steps):
            raise UserError(
                f"{workdir} cannot be written, and holds step {latest or 0} of {run.total_steps}: make it writable, or "
                "copy it to where it can be written."
            )
        if writable and jax.process_index() == 0:
            write_json(workdir / "config.json", {"config": plain(config), "seed": seed})
        if latest is not None and latest >= run.total_steps:
            progress.print(f"{workdir} is trained already, to step {latest} of {run.total_steps}.")
            return run
        progress.print(f"Training {run}.")
        for note in run.dataset.notes:
            console.print(note, markup=False)
        if latest is None:
            state = run.fresh_state()
        else:
            state, _ = restore_state(checkpointer, run.abstract_state, run.initial_state)
            progress.print(f"Resuming {workdir} from step {latest} of {run.total_steps}.")
        with MetricWriter(workdir, resume_step=latest, console=console) as writer:
            _train_epochs(run, state, checkpointer, writer, meta.get("epoch_totals", {}))
    return run


def _train_epochs(run: Run, state, checkpointer: Checkpointer, writer: MetricWriter, totals: dict[str, float]) -> None:
    """Trains to the end. totals: sums of the metrics over the steps already done in this epoch, and their "count"."""
    config, first = run.config, int(state.step)
    train_batch, validate = run.batch_runner(first), run.validator()
    data = run.training_identity
    rate = optimizers.learning_rate_schedule(config.optimizer, run.steps_per_epoch, config.num_epochs)
    pending, check_state = None, guard.state_checker(run.mesh)

    shape = {"input_shape": list(run.model.input_shape), "num_classes": run.model.num_classes}

    def save(step, metric):
        meta = {"config": plain(config), "seed": run.seed, "data": data, "shape": shape, "epoch_totals": dict(totals)}
        checkpointer.save(step, state, meta, metric)

    def averages():
        return {name: value / totals["count"] for name, value in totals.items() if name != "count"}

    def collect(found):
        step, metrics = found
        metrics = jax.device_get(metrics)
        if not metrics.pop("finite"):
            with progress.compiling("that step once more, to say which value is not finite"):
                guard.stop(run, state, step)
        for name, value in {**metrics, "count": 1}.items():
            totals[name] = totals.get(name, 0.0) + float(value)
        means = averages()
        progress.step(step + 1, **{name: means[name] for name in ("loss", "accuracy", METRIC)})

    with writer.progress(run.total_steps, first) as progress, stopping.preemption(cluster.leave) as preempted:
        for step in range(first, run.total_steps):
            epoch, done = step // run.steps_per_epoch, step + 1
            schedule = objective.loss_schedule(config.loss, epoch, config.num_epochs)
            with progress.training(first=step == first):
                state, metrics = train_batch(state, step, schedule)
            # One step behind, so that the device always has work while the host looks at numbers.
            if pending is not None:
                collect(pending)
            pending = (step, metrics)
            ends_epoch = done % run.steps_per_epoch == 0
            stop = preempted(done) and done < run.total_steps
            saves = stop or config.checkpoint.every_steps and done % config.checkpoint.every_steps == 0
            if not ends_epoch and not saves:
                continue
            collect(pending)
            check_state(state, step, epoch)  # before anything is saved, so that a state is saved only if it is good
            pending = None
            if not ends_epoch:
                save(done, None)
                if stop:
                    _stopped(run, checkpointer, done, preempted)
                continue
            shown = averages() | schedule | {"learning_rate": np.asarray(rate(step)).item()}
            writer.write(done, shown, "train")
            totals.clear()
            if (epoch + 1) % config.checkpoint.every_epochs == 0 or done == run.total_steps:
                found = validate(state)
                if found:
                    writer.write(done, found, "validation")
                save(done, found.get(METRIC))
                shown |= {f"val_{name}": found[name] for name in ("accuracy", METRIC) if name in found}
            elif saves:
                save(done, None)
            names = ("loss", "accuracy", METRIC, "val_accuracy", f"val_{METRIC}")
            progress.epoch(epoch + 1, config.num_epochs, {n: shown[n] for n in names if n in shown})
            if stop:
                _stopped(run, checkpointer, done, preempted)
        if preempted(run.total_steps):
            _stopped(run, checkpointer, run.total_steps, preempted)


def _stopped(run: Run, checkpointer: Checkpointer, done: int, stop: stopping.Stop) -> NoReturn:
    """Raises: `stopping.Preempted`, as soon as the last save is on disk."""
    checkpointer.wait()
    raise stopping.Preempted(
        f"Stopped by {stop.by} after step {done} of {run.total_steps}, which is saved in {checkpointer.directory}. The "
        "same command goes on from there.",
        stop.code,
        agreed=True,
    )


def load_best(workdir: str | os.PathLike, run: Run):
    """The parameters and state that the validation split liked best, as model variables.

    Raises: UserError if there is no usable checkpoint.
    """
    with Checkpointer(pathlib.Path(workdir) / "checkpoints", best_metric=METRIC, read_only=True) as checkpointer:
        # Whole on every device, whatever the parts that the run stores it in: it is going to be frozen.
        whole = sharding.replicated(run.mesh)
        target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), run.abstract_state)
        state, meta = restore_state(checkpointer, target, run.initial_state, checkpointer.best_step())
    step = int(state.step)
    check_same_run(workdir, meta, run.config, run.seed, run.data_identity, done=(step, run.steps_per_epoch))
    params = optimizers.slow_parameters(state.params, state.opt_state)
    state = dataclasses.replace(state, lip=jax.tree.map(np.asarray, state.lip))
    return {"params": jax.tree.map(np.asarray, params), COLLECTION: state.lip}, state, step


__all__ = ["Run", "load_best", "train"]
