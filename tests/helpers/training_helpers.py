"""Shared by the tests of training: made-up data, a tiny config, one trained run, quick compiles."""

import atexit
import functools
import json
import os
import pathlib
import shutil
import tempfile

import compiles
import jax
import numpy as np
import pytest

from lipjax.training import config_file
from lipjax.training.checkpoint import Checkpointer
from lipjax.training.choices import update
from lipjax.training.config import default_config
from lipjax.training.loop import METRIC, Run, train


def shipped_configs() -> list[str]:
    """What --config may name of the configs that are shipped, each variant of a family included."""
    found = []
    for path in sorted(config_file.shipped().glob("*.py")):
        known = config_file.variants(path)
        found += [f"{path.stem}:{variant}" for variant in known] if known else [path.stem]
    return found


@functools.cache
def scratch() -> pathlib.Path:
    """A directory of this process: made-up data, compiled programs, the run of `trained`."""
    path = pathlib.Path(tempfile.mkdtemp(prefix="lipjax-tests-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@pytest.fixture(autouse=True)
def quick_compiles():
    """A training compiles for seconds and runs for milliseconds: compile with less optimisation, each program once."""
    with compiles.quickly(scratch() / "compiled"):
        yield


def made_up_images(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Three classes that a small network separates: a bright stripe in one of three places, and noise."""
    labels = np.arange(count) % 3
    images = np.random.default_rng(seed).integers(0, 40, (count, 8, 8, 1))
    for image, label in zip(images, labels, strict=True):
        image[2 * label : 2 * label + 3] += 200
    return images.astype(np.uint8), labels


def npz_file(name: str = "data", **changes) -> pathlib.Path:
    """60 images for training and validation, 15 for test; `changes` replace or add arrays (None: leave out)."""
    path = scratch() / f"{name}.npz"
    images, labels = made_up_images(60)
    test_images, test_labels = made_up_images(15, seed=1)
    arrays = {"images": images, "labels": labels, "test_images": test_images, "test_labels": test_labels, **changes}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def tiny_config(**changes):
    """Nine steps on one device; `changes` are keyed by "group.field"."""
    config = default_config()
    config.update_from_flattened_dict(
        {
            "batch_size": 16,
            "num_epochs": 3,
            "power_iterations": 1,
            "power_iterations_eval": 5,
            "data.name": "npz",
            "data.path": str(npz_file()),
            "data.validation_fraction": 0.2,
            "data.crop_padding": 1,
            "model.depth": 1,
            "model.width": 4,
            "model.stem_kernel": 3,
            "model.stem_padding": 1,
            "model.neck_features": 6,
            "optimizer.learning_rate": 0.03,
            "loss.epsilon_end": 1.0,
            "checkpoint.every_steps": 2,
            "certify.radii": (0.1, 0.25),
            "certify.batch_size": 8,
            "certify.attack_steps": 5,
            "certify.attack_queries": 20,
            "mesh.data": 1,
        }
    )
    update(config, changes)
    return config.lock()


@functools.cache
def trained() -> pathlib.Path:
    """The directory of a finished run of `tiny_config()`, seed 0. Copy it before changing anything in it."""
    assert not jax.config.read("jax_enable_x64"), "the shared run is one with x64 off"
    directory = scratch() / "trained"
    train(tiny_config(), directory, 0)
    return directory


def read(path: pathlib.Path):
    """What a JSON file holds."""
    return json.loads(path.read_text())


def metric_lines(directory: pathlib.Path) -> list[str]:
    return (directory / "metrics.jsonl").read_text().splitlines()


def latest_step(directory: pathlib.Path) -> int | None:
    """The last step of which a run has a checkpoint."""
    with Checkpointer(directory / "checkpoints", read_only=True) as checkpointer:
        return checkpointer.latest_step()


def final_state(directory, config, seed: int = 0):
    """The last state that a run saved."""
    run = Run(config, seed)
    with Checkpointer(directory / "checkpoints", best_metric=METRIC, read_only=True) as checkpointer:
        return checkpointer.restore(run.abstract_state)[0]


def differing(left, right) -> list[str]:
    """Names of the leaves of two states that are not equal bit for bit."""

    def plain(leaf):
        return np.asarray(jax.random.key_data(leaf) if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)

    left, right = (jax.tree_util.tree_leaves_with_path(tree) for tree in (left, right))
    assert [path for path, _ in left] == [path for path, _ in right]
    pairs = [(path, plain(a), plain(b)) for (path, a), (_, b) in zip(left, right, strict=True)]
    return [jax.tree_util.keystr(p) for p, a, b in pairs if a.dtype != b.dtype or a.tobytes() != b.tobytes()]


def interrupt_at(monkeypatch, step, error=KeyboardInterrupt):
    """Makes training raise instead of running the given step (counted from 0)."""
    original = Run.batch_runner

    def batch_runner(self, first_step):
        train_batch = original(self, first_step)

        def interrupted(state, at, epsilon):
            if at == step:
                raise error
            return train_batch(state, at, epsilon)

        return interrupted

    monkeypatch.setattr(Run, "batch_runner", batch_runner)


def signal_in(monkeypatch, step, number):
    """A signal for this process while it runs a step, counted from 0."""
    original = Run.batch_runner

    def batch_runner(self, first_step):
        train_batch = original(self, first_step)

        def signalled(state, at, schedule):
            if at == step:
                os.kill(os.getpid(), number)
            return train_batch(state, at, schedule)

        return signalled

    monkeypatch.setattr(Run, "batch_runner", batch_runner)


def equations(jaxpr):
    """All equations of a jaxpr, those of the jaxprs inside it included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)
