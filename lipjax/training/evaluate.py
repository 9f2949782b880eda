"""From a trained run to what is proved about it: freeze, certify, attack, report."""

import importlib.metadata
import os
import pathlib
import platform

import jax
import numpy as np
from rich.console import Console
from rich.progress import track

import lipjax
from lipjax import certify
from lipjax._arithmetic import blas_libraries
from lipjax.deployment import deployment_report
from lipjax.document import write_certificate
from lipjax.errors import NotCertifiable
from lipjax.training import falsify, sharding
from lipjax.training import report as reports
from lipjax.training.classes import class_report
from lipjax.training.data import StreamDataset
from lipjax.training.loop import Run, load_best
from lipjax.training.metrics import validation_metrics
from lipjax.training.same_run import plain

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
    return certify.Certificate.join(parts)


def certify_run(workdir: str | os.PathLike, config, seed: int, run: Run | None = None, console: Console | None = None):
    """Certifies the checkpoint of a run that its validation split liked best, and writes what is proved.

    Writes frozen/ (the network), certificate.json with images.safetensors, report.json, attack.json, attack.npz
    and certified_accuracy.png.
    Of several processes, which must all call this, process 0 certifies and writes.

    Returns: the report; {} in other processes than 0.
    Raises: UserError without a usable checkpoint or data set; NotCertifiable if a layer has no proved bound;
      Refuted if the attack finds a certificate or a Lipschitz bound to be false, before any of the reports is
      written.
    """
    workdir, console = pathlib.Path(workdir), console or Console()
    # One device, so that a run of many can be certified anywhere.
    run = Run(config, seed, sharding.make_mesh(1, config.batch_size)) if run is None else run
    variables, state, step = load_best(workdir, run)
    if jax.process_index() != 0:
        return {}
    network = lipjax.freeze(run.model, variables, run.dataset.class_names)
    options, pixel_max = config.certify, run.dataset.pixel_max
    images, labels = test_images(run.dataset, options.num_images, options.batch_size)
    console.print(f"Certifying {len(labels)} test images with the checkpoint of step {step} ...")
    certificate = certify_images(network, images, pixel_max, options.batch_size, console)
    attacked = min(options.attack_images or len(labels), len(labels))
    if options.attack_steps:
        console.print(f"Attacking {attacked} of them at {len(options.radii)} radii and inside their own ...")
    settings = falsify.make_settings(options, seed)
    of_all_logits = falsify.whole_bound(network.network.head, network.lipschitz_report())
    claims = network, certificate, network.margin_lipschitz(), of_all_logits
    findings = falsify.falsify(*claims, images[:attacked], pixel_max, settings, workdir)
    attack = falsify.of_labels(findings, certificate.predictions, labels[:attacked])
    report = reports.make_report(certificate, labels, options.radii, attack, labels[:attacked])
    proved = certificate.predictions, labels, certificate.radii
    keys = {reports.radius_key(radius): radius for radius in options.radii}
    report |= class_report(*proved, keys, network.num_classes, network.class_names)
    report |= {"seed": seed, "step": step, "frozen_sha256": network.sha256()}
    report["validation"] = validation_metrics(workdir, step)  # to select by: test accuracies are not for that
    console.print("Bounding what float32 changes ...")
    report = reports.add_float32(report, _float32(network, certificate, images, labels, pixel_max, options))
    # Those of LipLT are of whole chains of layers.
    vectors = state.lip["vectors"] if config.lipschitz == "product" else None
    # Only what the attack has not refuted replaces an older network and its certificate.
    network.save(workdir / "frozen")
    whole = not isinstance(run.dataset, StreamDataset) and len(labels) == run.dataset.size("test")
    write_certificate(
        workdir,
        network,
        certificate,
        images,
        labels,
        _data(run.dataset, len(labels)),
        provenance=_provenance(config, seed, step),
        estimates=network.norm_estimates(vectors),
        holds_split=whole,
    )
    certify.write_json(workdir / "report.json", report)
    attacked_images = images[:attacked], labels[:attacked], pixel_max
    falsify.write_findings(workdir, *claims, *attacked_images, settings, findings)
    reports.plot_certified_accuracy(
        workdir / "certified_accuracy.png", certificate, labels, attack, list(options.radii), attacked
    )
    return report


def _float32(network: lipjax.FrozenNetwork, certificate: certify.Certificate, images, labels, pixel_max, options):
    """`deployment_report` of all images, or why there is none."""
    radii, batch_size = tuple(options.radii), options.batch_size
    try:
        return deployment_report(network, images, certificate, radii, batch_size, labels=labels, pixel_max=pixel_max)
    except NotCertifiable as error:
        return {"error": str(error)}


def _data(dataset, count: int) -> dict:
    """Which images a certificate is about: the first `count` of the test split."""
    return {
        "name": dataset.name,
        "split": "test",
        "num_images": count,
        "of": dataset.size("test"),
        "pixel_max": dataset.pixel_max,
        "sha256": dataset.fingerprint("test"),
    }


def _provenance(config, seed: int, step: int) -> dict:
    return {
        "config": plain(config),
        "seed": seed,
        "step": step,
        "precision": "bounds and margins: float64 on the host CPU, rounding errors bounded and included",
        "blas": blas_libraries(),
        "versions": {
            "lipjax": lipjax.__version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in VERSIONED},
        },
        "platform": f"{platform.system()} {platform.machine()}",
    }
