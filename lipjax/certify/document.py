"""The certificate of a frozen network on disk: certificate.json and images.safetensors. docs/certificates.md."""

import hashlib
import json
import os
import pathlib
from typing import Any

import numpy as np

from lipjax.certify.certificate import CLAIM, SCHEMA, Certificate, image_rows, layer_rows, liplt_rows
from lipjax.certify.frozen import FrozenNetwork
from lipjax.files import write_arrays, write_json

FORMAT = "lipjax-certificate"
# Of so many images, or all if there are no more, the pixels lie beside a certificate.
SAMPLE = 1000
IMAGES = "images.safetensors"


def sample_indices(frozen_sha256: str, data_sha256: str, rows: list[dict]) -> np.ndarray:
    """Rows of the images whose pixels lie beside a certificate, ascending: all of at most SAMPLE, otherwise so many.

    Drawn by SHA-256 from the frozen network, the data and every row of the certificate: a change of any row draws anew.
    """
    if len(rows) <= SAMPLE:
        return np.arange(len(rows))
    text = "\n".join(["lipjax-sample", frozen_sha256, data_sha256, json.dumps(rows, sort_keys=True)])
    seed = hashlib.sha256(text.encode()).digest()
    keys = [hashlib.sha256(seed + index.to_bytes(8, "little")).digest() for index in range(len(rows))]
    return np.sort(np.array(sorted(range(len(rows)), key=keys.__getitem__)[:SAMPLE]))


def draw(indices: np.ndarray, count: int) -> np.ndarray:
    """Places of the images that stand for a data set: a draw that its order has no part in, and that nobody chooses.

    Images with the least SHA-256("lipjax-subset", index as 8 bytes, little-endian) are taken, so that a smaller draw is
    a part of a larger one. The first images of a set sorted by class would all be of one class.

    Args: indices: (n,) of images in their data set, in any order. count: how many of them; at least n: all.
    Returns: (min(n, count),) places in `indices`, ascending.
    """
    if count >= len(indices):
        return np.arange(len(indices))
    keys = [hashlib.sha256(b"lipjax-subset" + int(index).to_bytes(8, "little")).digest() for index in indices]
    return np.sort(np.array(sorted(range(len(indices)), key=keys.__getitem__)[:count], np.int64))


def sample_arrays(certificate: Certificate, indices: np.ndarray, pixels: np.ndarray, labels) -> dict[str, np.ndarray]:
    """Arrays of images.safetensors: `indices` of rows, their uint8 pixels, labels, and minorants of an MLP head."""
    arrays = {
        "indices": np.asarray(indices, np.int64),
        "pixels": np.ascontiguousarray(pixels[indices]),
        "labels": np.asarray(labels, np.int64)[indices],
    }
    found = certificate.minorants
    if found is not None:
        chosen = np.flatnonzero(np.isin(found.images, indices))
        arrays["minorant_images"] = np.asarray(found.images[chosen], np.int64)
        arrays["minorant_rivals"] = np.asarray(found.rivals[chosen], np.int64)
        arrays["minorant_points"] = np.ascontiguousarray(found.points[chosen])
    return arrays


def write_certificate(
    directory: str | os.PathLike,
    network: FrozenNetwork,
    certificate: Certificate,
    pixels: np.ndarray,
    labels: np.ndarray,
    data: dict[str, Any],
    *,
    provenance: dict[str, Any] | None = None,
    estimates: dict[str, float] | None = None,
    holds_split: bool = False,
) -> dict:
    """Writes images.safetensors, then certificate.json, each whole or not at all, beside the saved network.

    Args:
      certificate: of the images pixels / pixel_max, pixels uint8 (n, *in_shape); labels (n,).
      data: "name", "split", "pixel_max"; "sha256" of the whole split, "of" how many images; "num_images" of this
        certificate, and if that is not all of them, "indices", their places in the split, ascending.
      provenance: what else to record. estimates: of operators' norms, by name.
      holds_split: whether "sha256" is that of these pixels and labels, as `ArrayDataset.fingerprint` takes it.
    Returns: the document.
    """
    directory = pathlib.Path(directory)
    rows = image_rows(certificate, labels)
    digest = network.sha256()
    indices = sample_indices(digest, data["sha256"], rows)
    path = directory / IMAGES
    write_arrays(path, sample_arrays(certificate, indices, pixels, labels))
    document = {
        "format": FORMAT,
        "schema": SCHEMA,
        "claim": CLAIM,
        "frozen_sha256": digest,
        "arrays": network.array_hashes(),
        "data": data,
        "sample": {
            "file": IMAGES,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "num_images": len(indices),
            "is_split": holds_split and len(indices) == len(rows),
        },
        **(provenance or {}),
        "layers": layer_rows(network.lipschitz_report(), estimates or {}),
        "head": network.head_report(),
        "liplt": liplt_rows(network.liplt_report()),
        "margin_lipschitz": network.margin_lipschitz().tolist(),
        "images": rows,
    }
    write_json(directory / "certificate.json", document)
    return document
