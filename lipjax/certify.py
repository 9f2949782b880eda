"""Certified radii and accuracies, and the certificate as a document."""

import dataclasses
import json
import math
import os
import pathlib
import sys

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

SCHEMA = 1


def certified_radius(logits: Float[Array, "b k"], lipschitz: Float[Array, "i j"]) -> Float[Array, " b"]:
    """min over rivals i != j of (y_j - y_i) / lipschitz[j, i], j the predicted class.

    Plain arithmetic in the inputs' precision: with a proved `lipschitz` and exact logits a certificate, otherwise a
    number. `FrozenNetwork.certify` is the proof.

    Args: logits (b, k); lipschitz (k, k), per pixel unit, its diagonal ignored.
    Returns: (b,), >= 0, in pixel units; 0 on ties and where a value is NaN; infinite if no rival can be reached.
    Raises: ValueError if the shapes do not fit.
    Source: Tsuzuku, Sato & Sugiyama 2018, arXiv:1802.04034; all rivals as in arXiv:2108.04062.
    """
    k = logits.shape[-1]
    if lipschitz.shape != (k, k):
        raise ValueError(f"Expected lipschitz of shape ({k}, {k}) for logits {logits.shape}, got {lipschitz.shape}.")
    predicted = jnp.argmax(logits, axis=1)
    own = predicted[:, None] == jnp.arange(k)
    gaps = jnp.take_along_axis(logits, predicted[:, None], axis=1) - logits
    constants = lipschitz[predicted]
    reachable = constants > 0
    ratios = jnp.where(reachable, gaps / jnp.where(reachable, constants, 1.0), jnp.where(gaps > 0, jnp.inf, 0.0))
    radius = jnp.min(jnp.where(own, jnp.inf, ratios), axis=1)
    invalid = jnp.isnan(logits).any(axis=1) | jnp.where(own, False, ~(constants >= 0) | ~(gaps > 0)).any(axis=1)
    return jnp.where(invalid, 0.0, radius)


def certified_accuracy(predictions, labels, radii, epsilon: float) -> float:
    """Fraction of images that are classified correctly with a radius above epsilon (the papers' VRA or CRA).

    Args: predictions, labels, radii: (n,). epsilon: l2, pixel units; strict, so that the closed ball is covered.
    Raises: ValueError if the lengths differ or there is no image.
    """
    predictions, labels, radii = (np.asarray(a) for a in (predictions, labels, radii))
    if not (predictions.shape == labels.shape == radii.shape and radii.size):
        raise ValueError(
            "Expected equally long predictions, labels and radii, at least one, "
            f"got {predictions.shape}, {labels.shape}, {radii.shape}."
        )
    return float(np.mean((predictions == labels) & (radii > epsilon)))


@dataclasses.dataclass(frozen=True)
class Certificate:
    """What is proved for each of n images.

    Attributes:
      predictions: (n,) the class reported.
      rivals: (n,) the class that limits the radius.
      margins: (n,) proved lower bound of logit[prediction] - logit[rival] in exact arithmetic; -inf where nothing is
      known.
      radii: (n,) `radius_of(margins, L[prediction, rival])`, pixel units: inside, the class cannot change.
    """

    predictions: np.ndarray
    rivals: np.ndarray
    margins: np.ndarray
    radii: np.ndarray


def radius_of(margins: np.ndarray, lipschitz: np.ndarray) -> np.ndarray:
    """A radius that a margin proves: the float64 quotient, one step toward 0; 0 for a margin that is not positive.

    Args: margins: lower bounds; lipschitz: upper bounds, of the same shape. Both float64.
    Returns: the shape of margins; the largest finite float64 where lipschitz is 0.
    """
    positive = (margins > 0) & (lipschitz >= 0)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        quotient = np.where(lipschitz > 0, np.nextafter(margins / np.where(lipschitz > 0, lipschitz, 1.0), 0.0), np.inf)
    return np.where(positive, np.minimum(quotient, sys.float_info.max), 0.0)


def certify_margins(predictions: np.ndarray, margins: np.ndarray, lipschitz: np.ndarray) -> Certificate:
    """The certificate that lower bounds of all margins prove.

    Args:
      predictions: (n,). margins: (n, k), lower bounds of logit[prediction] - logit[i], the column of the prediction
      ignored.
      lipschitz: (k, k) proved.
    """
    margins = np.where(np.isnan(margins), -np.inf, margins)
    radii = radius_of(margins, lipschitz[predictions])
    rows = np.arange(len(predictions))
    radii[rows, predictions] = np.inf
    # Among rivals of radius 0 the smallest margin says most, so it is the one shown.
    smallest = np.where(radii == radii.min(axis=1, keepdims=True), margins, np.inf)
    smallest[rows, predictions] = np.inf
    rivals = np.argmin(smallest, axis=1)
    # With a single class nothing limits the radius.
    return Certificate(predictions, rivals, margins[rows, rivals], np.minimum(radii[rows, rivals], sys.float_info.max))


def layer_rows(rows, estimates: dict[str, float]) -> list[dict]:
    """The per-layer table of a certificate: bound, method, details, and gap = bound / estimate - 1 where known."""
    table = []
    for row in rows:
        entry = dataclasses.asdict(row)
        if row.name in estimates:
            entry["estimate"] = estimates[row.name]
            entry["gap"] = row.bound / estimates[row.name] - 1 if estimates[row.name] > 0 else None
        table.append(entry)
    return table


def image_rows(certificate: Certificate, labels=None) -> list[dict]:
    """One JSON-ready row per image; what is infinite becomes the nearest finite float64 or null."""
    rows = []
    for i, prediction in enumerate(certificate.predictions.tolist()):
        margin = float(certificate.margins[i])
        row = {
            "prediction": prediction,
            "rival": int(certificate.rivals[i]),
            "margin": margin if math.isfinite(margin) else None,
            "radius": float(certificate.radii[i]),
        }
        rows.append(row if labels is None else {"label": int(labels[i]), **row})
    return rows


def write_json(path: str | os.PathLike, document: dict) -> None:
    """Writes JSON atomically: the old file or the whole new one is there. Floats keep all their digits; NaN raises."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w") as file:
            json.dump(document, file, indent=1, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
