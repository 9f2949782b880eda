"""From a trained run to what is proved about it: freeze, certify, attack, report."""

import dataclasses
import importlib.metadata
import os
import pathlib
import platform

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

import lipjax
from lipjax import attacks, certify
from lipjax.training import report as reports
from lipjax.training import sharding
from lipjax.training.data import StreamDataset
from lipjax.training.loop import Run, load_best, plain

VERSIONED = ("jax", "jaxlib", "numpy", "scipy", "flax", "optax", "orbax-checkpoint")


def test_images(dataset, count: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` test images (0: all), uint8, and their labels."""
    if not isinstance(dataset, StreamDataset):
        part = dataset.split("test")
        return part.images[: count or None], part.labels[: count or None]
    parts, seen, wanted = [], 0, count or dataset.size("test")
    for images, labels in dataset.eval_batches("test", batch_size):
        real = labels >= 0
        parts.append((images[real], labels[real]))
        seen += int(real.sum())
        if seen >= wanted:
            break
    images, labels = (np.concatenate(a)[:wanted] for a in zip(*parts, strict=True))
    return images, labels


def certify_images(network: lipjax.FrozenNetwork, images, pixel_max: int, batch_size: int, console: Console):
    """`network.certify` of uint8 images, batch by batch, so that few of them are held in float64 at a time."""
    starts = range(0, len(images), batch_size)
    parts = []
    for start in track(starts, "certifying", console=console, transient=True, disable=not console.is_terminal):
        parts.append(network.certify(images[start : start + batch_size] / np.float64(pixel_max), batch_size))
    fields = [field.name for field in dataclasses.fields(certify.Certificate)]
    return certify.Certificate(*(np.concatenate([getattr(part, name) for part in parts]) for name in fields))


def certify_run(workdir: str | os.PathLike, config, seed: int, run: Run | None = None, console: Console | None = None):
    """Certifies the checkpoint of a run that its validation split liked best, and writes what is proved.

    Writes frozen/ (the network), certificate.json, report.json and certified_accuracy.png into workdir.
    Returns: the report.
    Raises: UserError without a usable checkpoint or data set; NotCertifiable if a layer has no proved bound;
      RuntimeError if the attack finds a certificate to be false, before any of the reports is written.
    """
    workdir, console = pathlib.Path(workdir), console or Console()
    # One device, so that a run of many can be certified anywhere.
    run = Run(config, seed, sharding.make_mesh(1, config.batch_size)) if run is None else run
    variables, state, step = load_best(workdir, run)
    network = lipjax.freeze(run.model, variables)
    network.save(workdir / "frozen")
    options, pixel_max = config.certify, run.dataset.pixel_max
    images, labels = test_images(run.dataset, options.num_images, options.batch_size)
    console.print(f"Certifying {len(labels)} test images with the checkpoint of step {step} ...")
    certificate = certify_images(network, images, pixel_max, options.batch_size, console)
    attacked = min(options.attack_images or len(labels), len(labels))
    console.print(f"Attacking {attacked} of them at {len(options.radii)} radii ...")
    # Attacks need not be exact: single precision, on whatever accelerator there is.
    deployed = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), network.network)
    attack = attacks.attack_l2(
        deployed,
        images[:attacked] / np.float32(pixel_max),
        labels[:attacked],
        options.radii,
        num_steps=options.attack_steps,
        seed=seed,
        batch_size=options.batch_size,
    )
    _check_not_broken(network, certificate, images, pixel_max, attack, workdir)
    report = reports.make_report(certificate, labels, options.radii, attack, labels[:attacked])
    report |= {"seed": seed, "step": step, "frozen_sha256": network.sha256()}
    # Those of LipLT are of whole chains of layers.
    vectors = state.lip["vectors"] if config.lipschitz == "product" else None
    document = _document(network, certificate, labels, run, config, seed, step, vectors)
    certify.write_json(workdir / "certificate.json", document)
    certify.write_json(workdir / "report.json", report)
    reports.plot_certified_accuracy(
        workdir / "certified_accuracy.png", certificate, labels, attack, list(options.radii), attacked
    )
    return report


def _check_not_broken(network, certificate, images, pixel_max: int, attack, workdir) -> None:
    """Raises: RuntimeError if an attacked image lies within its certified radius but has another class in float64."""
    suspects = np.flatnonzero(attack.distances < np.inf)
    pixels = images[suspects] / np.float64(pixel_max)
    points = np.clip(attack.points[suspects].astype(np.float64), 0, 1)
    length = np.sqrt(((points - pixels) ** 2).sum(axis=(1, 2, 3)))
    inside = length * (1 + 1e-9) < certificate.radii[suspects]
    if not inside.any():
        return
    suspects, pixels, points = suspects[inside], pixels[inside], points[inside]
    broken = np.argmax(network(points), axis=1) != certificate.predictions[suspects]
    if broken.any():
        path = workdir / "counterexample.npz"
        np.savez(path, index=suspects[broken], image=pixels[broken], point=points[broken])
        raise RuntimeError(
            f"A certificate is false: {broken.sum()} images change class inside their certified radius ({path}). "
            "Please report this."
        )


def _document(network, certificate, labels, run: Run, config, seed: int, step: int, vectors) -> dict:
    claim = (
        "For every x' with |x' - x|_2 < radius, the class that the frozen network computes in exact real arithmetic at "
        "x' is the class reported for x. Radii are l2, for pixels in [0, 1]."
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
            "of": run.dataset.size("test"),
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
        "liplt": certify.liplt_rows(network.liplt_report()),
        "margin_lipschitz": constants.tolist(),
        "images": certify.image_rows(certificate, labels),
    }
