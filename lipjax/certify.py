"""Certified radii and accuracies, and the certificate as a document."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import stat
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lipjax import curvature as curvatures
from lipjax.operators.heads import MLPHead
from lipjax.operators.softplus import sigmoid, softplus

SCHEMA = 3
CLAIM = (
    "For every x' with |x' - x|_2 < radius, the class that the frozen network computes in exact real arithmetic at x' "
    "is the class reported for x. Radii are l2, for pixels in [0, 1]."
)

# `mlp_radius` takes eigenvalues for its curvatures up to this many classes.
_MAX_EXACT_CLASSES = 20
# The search keeps this far from the multiplier 1/m, where the minorant's ball is centred at the point itself.
_MAX_MULTIPLIER = 0.999


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


def minorant_radius(value, gradient, step, curvature, xp: Any):
    """How far around a function is positive, by its quadratic minorant at another point.

    If D has second derivatives above -m in every direction, then D(y) >= Q(y) = D(b) + g.(y - b) - m/2 |y - b|^2, with
    g = grad D(b). Q is positive in a ball around b + g/m, and a = b - s is as far from its boundary as

        r = 2 Q(a) / (|g + m s| + sqrt(|g|^2 + 2 m D(b))),

    if Q(a) > 0. For s = 0 this is the closed form 2d / (g + sqrt(g^2 + 2md)) of arXiv:2211.08453, written so that
    nothing cancels; for other s it is the largest lower bound that a multiplier gives in that paper's dual problem
    (docs/soundness.md).

    Args: value (b,), gradient (b, n): D and grad D at the points a + step; step (b, n); curvature (b,): m >= 0; xp: the
    arrays' module, numpy or jax.numpy. Returns: (b,), 0 where Q(a) is not positive, infinite where D is constant.
    """

    def length(squared):  # with gradient 0 at 0
        positive = squared > 0
        return xp.where(positive, xp.sqrt(xp.where(positive, squared, 1.0)), 0.0)

    level = value - xp.sum(gradient * step, axis=1) - curvature / 2 * xp.sum(step**2, axis=1)
    inner = length(xp.sum((gradient + curvature[:, None] * step) ** 2, axis=1))
    total = inner + length(xp.sum(gradient**2, axis=1) + 2 * curvature * value)
    radius = xp.where(total > 0, 2 * level / xp.where(total > 0, total, 1.0), xp.inf)
    return xp.where(level > 0, radius, 0.0)


def best_minorant(evaluate: Callable, points, curvature, num_steps: int, xp: Any):
    """Searches the minorant that gives the largest `minorant_radius` around each point.

    Starts at the points themselves (the closed form) and moves towards the nearest zero of D, at which the step is
    parallel to the gradient; steps are halved where they have made the radius smaller.

    Args: evaluate: (b, n) -> D (b,) and its gradient (b, n). points (b, n). curvature (b,). num_steps: evaluations, at
    least 1. xp: the arrays' module; with numpy the search ends early once it has stopped to gain.
    Returns: the radii (b,) and where they come from, (b, n).
    """

    def advance(state):
        step, best_step, best, last, damping = state
        value, gradient = evaluate(points + step)
        radius = minorant_radius(value, gradient, step, curvature, xp)
        damping = xp.where(radius < last, damping / 2, damping)
        best_step = xp.where((radius > best)[:, None], step, best_step)
        squared = xp.sum(gradient**2, axis=1)
        # The multiplier at which the linearised problem has its solution, as far as the minorants have a ball for it.
        multiplier = (value - xp.sum(gradient * step, axis=1)) / xp.where(squared > 0, squared, 1.0)
        end = xp.where(curvature > 0, _MAX_MULTIPLIER / xp.where(curvature > 0, curvature, 1.0), xp.inf)
        multiplier = xp.minimum(xp.maximum(multiplier, 0.0), end)
        step = step - damping[:, None] * (multiplier[:, None] * gradient + step)
        return step, best_step, xp.maximum(radius, best), radius, damping

    nowhere, zero = xp.zeros_like(points), xp.zeros_like(curvature)
    state = advance((nowhere, nowhere, zero, zero, xp.ones_like(curvature)))
    if xp is np:
        idle = 0
        for _ in range(num_steps - 1):
            before, state = state[2], advance(state)
            idle = 0 if (state[2] > before * (1 + 1e-3)).any() else idle + 1
            if idle == 3:
                break
    elif num_steps > 1:
        state = jax.lax.fori_loop(1, num_steps, lambda _, state: advance(state), state)
    return state[2], points + state[1]


def mlp_radius(
    features: Float[Array, "b n"],
    w1: Float[Array, "h i"],
    b1: Float[Array, " j"],
    w2: Float[Array, "k l"],
    b2: Float[Array, " o"],
    method: str = "closed_form",
    curvature: Float[Array, "p q"] | None = None,
    *,
    num_steps: int = 32,
) -> Float[Array, " b"]:
    """Radius in feature units around each a inside which W2 softplus(W1 a + b1) + b2 keeps its argmax: all rivals.

    Plain arithmetic in the inputs' precision; `FrozenNetwork.certify` is the proof. A network with this head keeps its
    class within the radius divided by the Lipschitz constant of its features.

    Args:
      features: (b, n). w1, b1, w2, b2: as in `operators.MLPHead`.
      method: "closed_form", by the gradient at a; "dual", at least that, by the gradients at up to num_steps points.
      curvature: (k, k), [i, j] the curvature from below of logit_i - logit_j or more, such as
        `curvature.eigenvalue_table`. By default `curvature.norm_table` with the SVD's |W1|, and for "dual" with up to
        20 classes `eigenvalue_table`; both are expensive, so inside a training step give a table.
    Returns: (b,), >= 0; 0 on ties and where a value is NaN; infinite if no rival can be reached.
    Raises: ValueError for another method, shapes that do not fit, or num_steps below 1.
    Source: Singla & Feizi 2022, arXiv:2211.08453, with all rivals.
    """
    head = MLPHead(w1, b1, w2, b2)
    head.check()
    num_classes = w2.shape[0]
    if method not in ("closed_form", "dual") or num_steps < 1:
        raise ValueError(f"Expected method 'closed_form' or 'dual' and num_steps >= 1, got {method!r} and {num_steps}.")
    if curvature is not None:
        table = curvature
    elif method == "dual" and num_classes <= _MAX_EXACT_CLASSES:
        table = curvatures.eigenvalue_table(w1, w2)
    else:
        table = curvatures.norm_table(jnp.linalg.norm(w1, 2), w2)
    if table.shape != (num_classes, num_classes):
        raise ValueError(f"Expected curvature of shape ({num_classes}, {num_classes}), got {table.shape}.")
    return _mlp_radius(head, features, table, num_steps if method == "dual" else 1)


@functools.partial(jax.jit, static_argnums=3)
def _mlp_radius(head: MLPHead, features, curvature, num_steps: int):
    w1, b1, w2, b2 = head.w1, head.b1, head.w2, head.b2
    predicted = jnp.argmax(head(features), axis=1)

    def to_rival(rival):
        row, offset = w2[predicted] - w2[rival], b2[predicted] - b2[rival]

        def evaluate(points):
            hidden = points @ w1.T + b1
            return jnp.sum(row * softplus(hidden), axis=1) + offset, (row * sigmoid(hidden)) @ w1

        radius, _ = best_minorant(evaluate, features, curvature[predicted, rival], num_steps, jnp)
        return jnp.where(rival == predicted, jnp.inf, radius)

    return jnp.min(jax.lax.map(to_rival, jnp.arange(w2.shape[0])), axis=0)


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
    """What is proved for each of n images.

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
        """What is proved for some of the images, without minorants."""
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


def liplt_rows(report) -> dict | None:
    """The JSON-ready part of a certificate about LipLT: constants of layers, norms of chains and how they were proved.

    report: `bounds.LipLTReport`; None for None. What the report has beyond is not stated: `checker` could not prove it.
    """
    if report is None:
        return None
    return {name: [dataclasses.asdict(row) for row in getattr(report, name)] for name in ("layers", "chains")}


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


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Gives a temporary path to write; what lies there then replaces `path`, or nothing does if the block raises.

    The old file or the whole new one is there, also after a power failure. Who may read it, the umask says.
    Raises: OSError, which names `path`, if it cannot be written: a full disk.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        yield temporary
        with open(temporary, "rb") as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) != mode:
                os.fchmod(file.fileno(), mode)  # a library has put a private file of its own in its place
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is None:  # of writing, which only knows a number of a file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, document: dict) -> None:
    """Writes JSON atomically. Floats keep all their digits; NaN raises ValueError."""
    with replacing(path) as temporary, open(temporary, "w") as file:
        json.dump(document, file, indent=1, allow_nan=False)
        file.write("\n")


__all__ = [
    "CLAIM",
    "Certificate",
    "Minorants",
    "best_minorant",
    "certified_accuracy",
    "certified_radius",
    "certify_margins",
    "certify_radii",
    "minorant_radius",
    "mlp_radius",
    "radius_of",
]


def __dir__() -> list[str]:
    return __all__
