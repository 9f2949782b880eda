"""From a trained run to what is proved about it: freeze, certify, attack, report."""

import importlib.metadata
import json
import os
import pathlib
import platform

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import lipjax
from lipjax import attacks, certify, frozen
from lipjax.errors import UserError
from lipjax.training import report as reports
from lipjax.training.config import default_config, validate
from lipjax.training.data import StreamDataset
from lipjax.training.loop import Run, load_best, plain

VERSIONED = ("jax", "jaxlib", "numpy", "scipy", "flax", "optax", "orbax-checkpoint")


def load_config(workdir: str | os.PathLike):
    """The config and seed that a run's directory records.

    Raises: UserError if the directory holds no run, or the file is damaged.
    """
    path = pathlib.Path(workdir) / "config.json"
    try:
        document = json.loads(path.read_text())
        config, seed = document["config"], document["seed"]
        loaded = default_config()
        model = config.pop("model")
        loaded.model = type(loaded)({name: _tuples(value) for name, value in model.items()})
        _update(loaded, config)
    except FileNotFoundError as error:
        raise UserError(f"{workdir} holds no training run: {path.name} is missing. Give the --workdir of a run.") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged or of another version ({error}).") from error
    loaded.lock()
    validate(loaded)
    return loaded, seed


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _update(target, values: dict) -> None:
    for field, value in values.items():
        if isinstance(value, dict):
            _update(target[field], value)
        else:
            setattr(target, field, _tuples(value))


def test_images(dataset, count: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` test images (0: all) as float64 pixels, and their labels."""
    if isinstance(dataset, StreamDataset):
        parts, seen = [], 0
        wanted = count or dataset.size("test")
        for images, labels in dataset.eval_batches("test", batch_size):
            real = labels >= 0
            parts.append((images[real], labels[real]))
            seen += int(real.sum())
            if seen >= wanted:
                break
        images, labels = (np.concatenate(a)[:wanted] for a in zip(*parts, strict=True))
    else:
        part = dataset.split("test")
        images, labels = part.images[: count or None], part.labels[: count or None]
    return images / np.float64(dataset.pixel_max), labels


def certify_run(workdir: str | os.PathLike, config, seed: int, run: Run | None = None, console: Console | None = None):
    """Certifies the checkpoint of a run that its validation split liked best, and writes what is proved.

    Writes frozen/ (the network), certificate.json, report.json and certified_accuracy.png into workdir.
    Returns: the report. Raises: UserError without a usable checkpoint or data set; NotCertifiable if a layer has no proved bound.
    """
    workdir, console = pathlib.Path(workdir), console or Console()
    run = Run(config, seed) if run is None else run
    variables, state, step = load_best(workdir, run)
    network = lipjax.freeze(run.model, variables)
    network.save(workdir / "frozen")
    options = config.certify
    pixels, labels = test_images(run.dataset, options.num_images, options.batch_size)
    console.print(f"Certifying {len(labels)} test images with the checkpoint of step {step} ...")
    certificate = network.certify(pixels, options.batch_size)
    attacked = min(options.attack_images or len(labels), len(labels))
    console.print(f"Attacking {attacked} of them at {len(options.radii)} radii ...")
    # Attacks need not be exact: single precision, on whatever accelerator there is.
    deployed = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), network.network)
    attack = attacks.attack_l2(
        deployed,
        pixels[:attacked].astype(np.float32),
        labels[:attacked],
        options.radii,
        num_steps=options.attack_steps,
        seed=seed,
        batch_size=options.batch_size,
    )
    _check_not_broken(network, certificate, pixels[:attacked], attack, workdir)
    report = reports.make_report(certificate, labels, options.radii, attack, labels[:attacked])
    report |= {"seed": seed, "step": step, "frozen_sha256": network.sha256()}
    certify.write_json(
        workdir / "certificate.json", _document(network, certificate, labels, run, config, seed, step, state.vectors)
    )
    certify.write_json(workdir / "report.json", report)
    reports.plot_certified_accuracy(
        workdir / "certified_accuracy.png", certificate, labels, attack, list(options.radii), attacked
    )
    return report


def _check_not_broken(network, certificate, pixels, attack, workdir) -> None:
    """Raises: UserError if the attack moved an image inside its certified radius and changed its class in float64."""
    suspects = np.flatnonzero(attack.distances < np.inf)
    points = np.clip(attack.points[suspects].astype(np.float64), 0, 1)
    length = np.sqrt(((points - pixels[suspects]) ** 2).reshape(len(suspects), int(np.prod(pixels.shape[1:]))).sum(1))
    inside = length * (1 + 1e-9) < certificate.radii[suspects]
    if not inside.any():
        return
    suspects, points = suspects[inside], points[inside]
    broken = np.argmax(network(points), axis=1) != certificate.predictions[suspects]
    if broken.any():
        path = workdir / "counterexample.npz"
        np.savez(path, index=suspects[broken], image=pixels[suspects[broken]], point=points[broken])
        raise RuntimeError(
            f"A certificate is false: {broken.sum()} images change class inside their certified radius ({path}). Please report this."
        )


def _document(network, certificate, labels, run: Run, config, seed: int, step: int, vectors) -> dict:
    claim = (
        "For every x' with |x' - x|_2 < radius, the class that the frozen network computes in exact real arithmetic at x' is the "
        "class reported for x. Radii are l2, for pixels in [0, 1]."
    )
    constants = network.margin_lipschitz()
    return {
        "format": "lipjax-certificate",
        "schema": certify.SCHEMA,
        "claim": claim,
        "frozen_sha256": network.sha256(),
        "data": {
            "name": run.dataset.name,
            "split": "test",
            "num_images": len(labels),
            "pixel_max": run.dataset.pixel_max,
            "sha256": run.dataset.fingerprint("test"),
        },
        "config": plain(config),
        "seed": seed,
        "step": step,
        "precision": "bounds and margins: float64 on the host CPU, rounding errors bounded and included",
        "versions": {
            "lipjax": lipjax.__version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in VERSIONED},
        },
        "platform": f"{platform.system()} {platform.machine()}",
        "layers": certify.layer_rows(network.lipschitz_report(), network.norm_estimates(vectors)),
        "margin_lipschitz": constants.tolist(),
        "images": certify.image_rows(certificate, labels),
    }
