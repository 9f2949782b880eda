"""From a trained run to what is proved about it: freeze, certify, attack, report."""

import importlib.metadata
import os
import pathlib
import platform

import jax
import numpy as np
from rich.console import Console

import lipjax
from lipjax import certify
from lipjax.certify.deployment import deployment_report
from lipjax.certify.document import draw, write_certificate
from lipjax.errors import NotCertifiable
from lipjax.evaluation import falsify
from lipjax.evaluation import table as reports
from lipjax.evaluation.attack_files import Images, attack_images, write_attack
from lipjax.evaluation.classes import class_report
from lipjax.evaluation.progress import shown
from lipjax.files import write_json
from lipjax.spectral.arithmetic import blas_libraries
from lipjax.training import sharding
from lipjax.training.data import StreamDataset
from lipjax.training.loop import Run, load_best
from lipjax.training.metrics import validation_metrics
from lipjax.training.same_run import plain
from lipjax.training.terminal import progress_of

VERSIONED = ("jax", "jaxlib", "numpy", "scipy", "flax", "optax", "orbax-checkpoint")


def drawn_indices(dataset, count: int) -> np.ndarray:
    """Places of the test images to certify, ascending: all (count 0), or so many, drawn by hash (`document.draw`)."""
    everything = np.arange(dataset.size("test"))
    return everything[draw(everything, count or len(everything))]


def test_images(dataset, indices: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The test images at these places, uint8, and their labels."""
    if isinstance(dataset, StreamDataset):
        return dataset.images("test", indices, batch_size)
    part = dataset.split("test")
    if len(indices) == len(part):  # all, ascending: not copied
        return part.images, part.labels
    return part.images[indices], part.labels[indices]


def certify_images(network: lipjax.FrozenNetwork, images, pixel_max: int, batch_size: int, console: Console):
    """`network.certify` of uint8 images, batch by batch, so that few of them are held in float64 at a time."""
    parts = []
    with shown(console) as watch:
        for start in range(0, len(images), batch_size):
            watch("certifying", start / len(images))
            parts.append(network.certify(images[start : start + batch_size] / np.float64(pixel_max), batch_size))
    return certify.Certificate.join(parts)


def certify_run(workdir: str | os.PathLike, config, seed: int, run: Run | None = None, console: Console | None = None):
    """Certifies the checkpoint of a run that its validation split liked best, and writes what is proved.

    Writes frozen/ (the network), certificate.json with images.safetensors, report.json, certified_accuracy.png, and
    of an attack attack.json, attack.npz and adversarial.npz.
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
    options, pixel_max = config.certify, run.dataset.pixel_max
    network = lipjax.freeze(run.model, variables, run.dataset.class_names, options.dtype)
    indices, total = drawn_indices(run.dataset, options.num_images), run.dataset.size("test")
    images, labels = test_images(run.dataset, indices, options.batch_size)
    which = reports.part_of(len(labels), total)
    progress_of(console).print(f"Certifying {which} test images with the checkpoint of step {step} ...")
    certificate = certify_images(network, images, pixel_max, options.batch_size, console)
    data = _data(run.dataset, indices)
    settings = falsify.make_settings(options, seed)
    constants = network.margin_lipschitz(), falsify.whole_bound(network.network.head, network.lipschitz_report())
    attackable = Images(images, labels, indices, total, pixel_max, data["sha256"])
    attacked = attack_images(
        workdir, network, certificate, *constants, attackable, settings, options.attack_images, console
    )
    report = reports.make_report(certificate, labels, options.radii, attacked.rows, attacked.of_labels(), total)
    proved = certificate.predictions, labels, certificate.radii
    keys = {reports.radius_key(radius): radius for radius in options.radii}
    report |= class_report(*proved, keys, network.num_classes, network.class_names)
    report |= {"seed": seed, "step": step, "frozen_sha256": network.sha256()}
    report["validation"] = validation_metrics(workdir, step)  # to select by: test accuracies are not for that
    progress_of(console).print("Bounding what float32 changes ...")
    float32 = _float32(network, certificate, images, labels, pixel_max, options)
    report = reports.add_float32(report, float32 | {"of": total})
    # Those of LipLT are of whole chains of layers.
    vectors = state.lip["vectors"] if config.lipschitz == "product" else None
    # Only what the attack has not refuted replaces an older network and its certificate.
    network.save(workdir / "frozen")
    whole = not isinstance(run.dataset, StreamDataset) and len(labels) == total
    write_certificate(
        workdir,
        network,
        certificate,
        images,
        labels,
        data,
        provenance=_provenance(config, seed, step),
        estimates=network.norm_estimates(vectors),
        holds_split=whole,
    )
    write_json(workdir / "report.json", report)
    write_attack(workdir, network, attacked, *constants)
    reports.plot_certified_accuracy(
        workdir / "certified_accuracy.png", certificate, labels, attacked.of_labels(), list(options.radii), total
    )
    return report


def _float32(network: lipjax.FrozenNetwork, certificate: certify.Certificate, images, labels, pixel_max, options):
    """`deployment_report` of all images, or why there is none."""
    radii, batch_size = tuple(options.radii), options.batch_size
    try:
        return deployment_report(network, images, certificate, radii, batch_size, labels=labels, pixel_max=pixel_max)
    except NotCertifiable as error:
        return {"error": str(error)}


def _data(dataset, indices: np.ndarray) -> dict:
    """Describes the images that a certificate is about: those at `indices` of the test split."""
    total = dataset.size("test")
    found = {
        "name": dataset.name,
        "split": "test",
        "num_images": len(indices),
        "of": total,
        "pixel_max": dataset.pixel_max,
        "sha256": dataset.fingerprint("test"),
    }
    return found if len(indices) == total else found | {"indices": indices.tolist()}


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
