"""The command `python -m lipjax attack`: attacks a certified run as its files are now."""

import json
import os
import pathlib

import numpy as np
from rich.console import Console

from lipjax.bounds import LayerBound
from lipjax.certify import Certificate, FrozenNetwork
from lipjax.certify.certificate import SCHEMA
from lipjax.errors import UserError
from lipjax.evaluation import falsify
from lipjax.evaluation.attack_files import Images, attack_images, write_attack
from lipjax.evaluation.evaluate import test_images
from lipjax.training import sharding
from lipjax.training.loop import Run


def read_claims(workdir: pathlib.Path) -> tuple[dict, Certificate, np.ndarray, list[LayerBound]]:
    """Claims of certificate.json: the document, the certificate, the (k, k) Lipschitz constants, the layers' bounds.

    Raises: UserError if the file is missing, damaged or of another format.
    """
    path = workdir / "certificate.json"
    again = f"Certify the run again: python -m lipjax certify {workdir}"
    try:
        document = json.loads(path.read_text())
        if document.get("format") != "lipjax-certificate" or document.get("schema") != SCHEMA:
            raise UserError(f"{path} is not a certificate of schema {SCHEMA}, but of another version. {again}")
        rows = document["images"]
        ints = [np.array([row[name] for row in rows]) for name in ("prediction", "rival", "label")]
        margins = np.array([-np.inf if row["margin"] is None else row["margin"] for row in rows], np.float64)
        radii = np.array([row["radius"] for row in rows], np.float64)
        lipschitz = np.array(document["margin_lipschitz"], np.float64)
        layers = [LayerBound.from_row(row) for row in document["layers"]]
        numbers = [row.claimed for row in layers]
        if not rows or any(a.dtype.kind != "i" or (a < 0).any() or (a >= len(lipschitz)).any() for a in ints):
            raise ValueError("expected images with classes")
        if not (radii >= 0).all() or not (lipschitz >= 0).all() or lipschitz.shape != (len(lipschitz),) * 2:
            raise ValueError("expected radii and a square table of constants, none negative")
        if not all(type(bound) is float and bound >= 0 for bound in numbers):
            raise ValueError("expected a bound of every layer")
        str(document["frozen_sha256"] + document["data"]["sha256"])
        places = document["data"].get("indices", list(range(len(rows))))
        integers = len(places) == len(rows) and all(type(place) is int for place in places)
        if not integers or (np.diff(places, prepend=-1) < 1).any():
            raise ValueError("expected the place of every image in the data set, ascending")
    except FileNotFoundError as error:
        raise UserError(f"{workdir} has no certificate ({path.name} is missing). {again}") from error
    except UserError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error!r}). {again}") from error
    return document, Certificate(ints[0], ints[1], margins, radii), lipschitz, layers


def attack_run(workdir: str | os.PathLike, config, seed: int, console: Console | None = None) -> dict:
    """Attacks the certified images of a run, of which config.certify.attack_images says how many, and its bounds.

    Writes attack.json, attack.npz and adversarial.npz into workdir: of each image the strongest attack so far.
    Returns: what attack.json holds.
    Raises: UserError for files that are missing, damaged or do not fit each other, and for other images than those
      that were certified; Refuted if a certificate or a bound is false, as `falsify.falsify`.
    """
    workdir, console = pathlib.Path(workdir), console or Console()
    document, certificate, lipschitz, layers = read_claims(workdir)
    network = FrozenNetwork.load(workdir / "frozen")
    if network.sha256() != document["frozen_sha256"] or network.num_classes != len(lipschitz):
        raise UserError(
            f"{workdir}: certificate.json is about another network than the one in frozen/. "
            f"Certify the run again: python -m lipjax certify {workdir}"
        )
    dataset = Run(config, seed, sharding.make_mesh(1, config.batch_size)).dataset
    if dataset.image_shape != network.in_shape:
        raise UserError(
            f"The frozen network in {workdir} takes images {network.in_shape}, but those of {dataset.name} are "
            f"{dataset.image_shape}: give the data set that was certified."
        )
    options, data, total = config.certify, document["data"], dataset.size("test")
    indices = np.array(data.get("indices", range(len(certificate.radii))), np.int64)
    if max(indices[-1], len(indices) - 1) >= total or dataset.fingerprint("test") != data["sha256"]:
        raise UserError(
            f"The test images of {dataset.name} are not those that certificate.json in {workdir} is about: give the "
            "data set that was certified, or certify the run again."
        )
    images, labels = test_images(dataset, indices, options.batch_size)
    settings = falsify.make_settings(options, seed)
    whole = falsify.whole_bound(network.network.head, layers)
    attackable = Images(images, labels, indices, total, dataset.pixel_max, data["sha256"])
    attacked = attack_images(
        workdir, network, certificate, lipschitz, whole, attackable, settings, options.attack_images, console
    )
    written = write_attack(workdir, network, attacked, lipschitz, whole)
    if written is None:
        raise UserError(
            "With 0 steps nothing is attacked, and no earlier attack is kept: give --steps=20, for example."
        )
    return written
