"""Certified radii and accuracies, and the certificate as a document."""

import dataclasses
import math
import sys
from typing import Any

import numpy as np

SCHEMA = 3
CLAIM = (
    "For every x' with |x' - x|_2 < radius, the class that the frozen network computes in exact real arithmetic at x' "
    "is the class reported for x. Radii are l2, for pixels in [0, 1]."
)


@dataclasses.dataclass(frozen=True)
class Minorants:
    """Points whose minorants prove radii of an MLP head (docs/soundness.md, section 11.2).

    Attributes: images (m,), places in the batch; rivals (m,); points (m, d), in feature units, float32.
    """

    images: np.ndarray
    rivals: np.ndarray
    points: np.ndarray

    @staticmethod
    def join(parts: "list[Minorants]", width: int) -> "Minorants":
        """All of them. width: d, for an empty list."""
        none = Minorants(np.empty(0, np.int64), np.empty(0, np.int64), np.empty((0, width), np.float32))
        fields = ([getattr(part, name) for part in (none, *parts)] for name in ("images", "rivals", "points"))
        return Minorants(*map(np.concatenate, fields))


@dataclasses.dataclass(frozen=True)
class Certificate:
    """Predictions, margins and radii that are proved for n images.

    Attributes:
      predictions: (n,) the class reported.
      rivals: (n,) the class that limits the radius.
      margins: (n,) proved lower bound of logit[prediction] - logit[rival] in exact arithmetic; -inf where nothing is
      known.
      radii: (n,) pixel units: inside, the class cannot change. `radius_of(margins, L[prediction, rival])`, or for an
      MLP head at least that.
      minorants: for an MLP head, what the radii may rest on.
    """

    predictions: np.ndarray
    rivals: np.ndarray
    margins: np.ndarray
    radii: np.ndarray
    minorants: Minorants | None = None

    def take(self, rows: np.ndarray) -> "Certificate":
        """The certificate of some of the images, without minorants."""
        return Certificate(self.predictions[rows], self.rivals[rows], self.margins[rows], self.radii[rows])

    @staticmethod
    def join(parts: "list[Certificate]") -> "Certificate":
        """The certificate of several batches, in order."""
        arrays = ("predictions", "rivals", "margins", "radii")
        joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in arrays}
        found, start = [], 0
        for part in parts:
            if part.minorants is not None:
                found.append(dataclasses.replace(part.minorants, images=part.minorants.images + start))
            start += len(part.predictions)
        minorants = Minorants.join(found, found[0].points.shape[1]) if found else None
        return Certificate(**joined, minorants=minorants)


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
    return certify_radii(predictions, margins, radius_of(margins, lipschitz[predictions]))


def certify_radii(predictions: np.ndarray, margins: np.ndarray, radii: np.ndarray) -> Certificate:
    """The certificate that radii (n, k) against all rivals prove; margins as in `certify_margins`.

    The column of the prediction is ignored.
    """
    margins, radii = np.where(np.isnan(margins), -np.inf, margins), np.array(radii)
    rows = np.arange(len(predictions))
    radii[rows, predictions] = np.inf
    # Among rivals of radius 0 the smallest margin says most, so it is the one shown.
    smallest = np.where(radii == radii.min(axis=1, keepdims=True), margins, np.inf)
    smallest[rows, predictions] = np.inf
    rivals = np.argmin(smallest, axis=1)
    # With a single class nothing limits the radius.
    return Certificate(predictions, rivals, margins[rows, rivals], np.minimum(radii[rows, rivals], sys.float_info.max))


def _file_row(row: Any) -> dict:
    """A proved number as files hold it: "bound" is what `claimed` is in Python, "sigma" what `proved` is."""
    keys = {"claimed": "bound", "proved": "sigma"}
    return {keys.get(name, name): value for name, value in dataclasses.asdict(row).items()}


def layer_rows(rows, estimates: dict[str, float]) -> list[dict]:
    """The per-layer table of a certificate: bound, method, details, and gap = bound / estimate - 1 where known."""
    table = []
    for row in rows:
        entry = _file_row(row)
        if row.name in estimates:
            entry["estimate"] = estimates[row.name]
            entry["gap"] = row.claimed / estimates[row.name] - 1 if estimates[row.name] > 0 else None
        table.append(entry)
    return table


def liplt_rows(report) -> dict | None:
    """The JSON-ready part of a certificate about LipLT: constants of layers, norms of chains and how they were proved.

    report: `bounds.LipLTReport`; None for None. What the report has beyond is not stated: `checker` could not prove it.
    """
    if report is None:
        return None
    return {name: [_file_row(row) for row in getattr(report, name)] for name in ("layers", "chains")}


def image_rows(certificate: Certificate, labels=None) -> list[dict]:
    """One JSON-ready row per image; what is infinite becomes the nearest finite float64 or null."""
    rows = []
    for i, prediction in enumerate(certificate.predictions.tolist()):
        margin = float(certificate.margins[i])
        if certificate.rivals[i] == prediction:  # the only class: there is no difference to bound
            margin = math.inf
        row = {
            "prediction": prediction,
            "rival": int(certificate.rivals[i]),
            "margin": margin if math.isfinite(margin) else None,
            "radius": float(certificate.radii[i]),
        }
        rows.append(row if labels is None else {"label": int(labels[i]), **row})
    return rows
