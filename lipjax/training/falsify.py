"""The falsifier of a run: it attacks images, certificates and Lipschitz bounds, and fails if one of these is false."""

import dataclasses
import math
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from lipjax import attacks, bounds, spectral
from lipjax.attacks import AttackResult, LipschitzSearch
from lipjax.certify import Certificate, replacing, write_json
from lipjax.errors import Refuted
from lipjax.frozen import FrozenNetwork
from lipjax.operators import LinearHead, MLPHead
from lipjax.training.report import radius_key, radius_label

FORMAT, SCHEMA = "lipjax-attack", 1
# So many images are kept in attack.npz. Their batch is attacked at these multiples of the largest radius, too.
EXAMPLES = 16
_FURTHER = (2.0, 4.0, 8.0)
# The search is within this part of a radius; what it finds is moved to within the other one where float32 left it.
_WITHIN, _CONFIRMED = 1 - 1e-6, 1 - 1e-9
# Only images whose float32 margin came this near to zero, as a part of their own and of the largest one, are confirmed.
_NEAR_OWN, _NEAR_LARGEST = 1e-2, 1e-4
_LIPSCHITZ_STEPS, _LIPSCHITZ_BATCH = 30, 128


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a run is attacked: `attacks.attack_l2` explains the fields."""

    radii: tuple[float, ...]
    steps: int
    method: str = "apgd"
    restarts: int = 1
    objective: str = "margin"
    batch_size: int = 250
    seed: int = 0

    def options(self) -> dict[str, Any]:
        names = ("method", "restarts", "objective", "batch_size", "seed")
        return {"num_steps": self.steps, **{name: getattr(self, name) for name in names}}


def make_settings(options, seed: int, objective: str = "margin") -> Settings:
    """The attack that config.certify asks for."""
    return Settings(
        radii=tuple(options.radii),
        steps=options.attack_steps,
        method=options.attack,
        restarts=options.attack_restarts,
        objective=objective,
        batch_size=options.batch_size,
        seed=seed,
    )


@dataclasses.dataclass(frozen=True)
class Findings:
    """What an attack found that did not refute anything.

    Attributes:
      attack: the nearest image of another class than the reported one, as found at the radii, in float32.
      num_inside: images that were attacked inside their own certified radius; not those that overflow in float32.
      closest: the least distance / radius of an image of another class, confirmed in float64, and its index; None
        if none was found.
      search: lower bounds of the Lipschitz constants; None without steps.
    """

    attack: AttackResult
    num_inside: int
    closest: tuple[float, int] | None
    search: LipschitzSearch | None


def whole_bound(head, rows: list[bounds.LayerBound]) -> float | None:
    """Proved bound of |logits(x) - logits(y)| / |x - y|: the layers' bounds times the head's; None for other heads."""
    if isinstance(head, LinearHead):
        factors = [head.matrix]
    elif isinstance(head, MLPHead):  # softplus is 1-Lipschitz
        factors = [head.w1, head.w2]
    else:
        return None
    total = bounds.product_bound(rows)
    for matrix in factors:
        total = math.nextafter(total * spectral.matrix_norm_bound(np.asarray(matrix)).value, math.inf)
    return total


def logits_and_errors(network: FrozenNetwork, points: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits (n, k) in float64 for pixels of any value, and bounds (n, k) of their errors (docs/soundness.md, 7)."""
    head, rows = network.network.head, network.lipschitz_report()
    logits, _, error, own = network._run(points, tuple(row.norms for row in rows), batch_size)
    if isinstance(head, LinearHead):
        constants = np.linalg.norm(head.matrix, axis=1)
    else:  # softplus is 1-Lipschitz
        constants = np.linalg.norm(head.w2, axis=1) * spectral.matrix_norm_bound(np.asarray(head.w1)).value
    return logits, (constants * (1 + 1e-9) * error[:, None] + own) * (1 + 1e-9)


def _column(values: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Values of which there is one per image, shaped so that they broadcast over images."""
    return values.reshape(-1, *(1,) * (images.ndim - 1))


def falsify(
    network: FrozenNetwork,
    certificate: Certificate,
    lipschitz: np.ndarray,
    whole: float | None,
    images: np.ndarray,
    pixel_max: int,
    settings: Settings,
    workdir: str | os.PathLike,
) -> Findings:
    """Attacks images at fixed radii and inside their own certified radius, and searches the Lipschitz constants.

    Args:
      certificate: of these images and perhaps more. lipschitz: (k, k), the proved constants of logit differences.
      whole: the proved constant of all logits, as `whole_bound`. images: (n, ...) uint8. workdir: where
        counterexample.npz goes.
    Raises: Refuted if a certificate or a Lipschitz bound is false, after writing counterexample.npz and nothing
      else.
    """
    # Searches need not be exact: single precision, on whatever accelerator there is.
    deployed = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), network.network)
    subject = _Subject(network, deployed, certificate, images, pixel_max, settings)
    attack = subject.attack()
    points, inside = subject.attack_inside()
    _check_certificates(subject, attack, points, inside, pathlib.Path(workdir))
    search = None
    if settings.steps:
        search = attacks.lipschitz_lower_bound(
            deployed,
            subject.pixels,
            num_steps=min(settings.steps, _LIPSCHITZ_STEPS),
            seed=settings.seed,
            batch_size=max(2, min(settings.batch_size, _LIPSCHITZ_BATCH)),
            evaluate=lambda z: logits_and_errors(network, z, settings.batch_size),
        )
        _check_lipschitz(search, lipschitz, whole, pathlib.Path(workdir))
    return Findings(attack, subject.num_inside, subject.closest(attack), search)


class _Subject:
    """A frozen network with the images that are attacked, and what is certified about these."""

    def __init__(self, network, deployed, certificate, images, pixel_max, settings: Settings):
        self.network, self.deployed, self.settings = network, deployed, settings
        count = len(images)
        self.pixels = images / np.float32(pixel_max)
        self.images, self.pixel_max = images, pixel_max
        self.predictions, self.rivals = (
            a[:count].astype(np.int32) for a in (certificate.predictions, certificate.rivals)
        )
        self.margins, self.radii = certificate.margins[:count], certificate.radii[:count]
        self.num_inside = int((self.radii > 0).sum()) if settings.steps else 0

    def exact(self, rows: np.ndarray) -> np.ndarray:
        """Images in float64, as they were certified."""
        return self.images[rows] / np.float64(self.pixel_max)

    def attack(self) -> AttackResult:
        """At the radii; the first batch, from which examples are kept, also further out."""
        options = self.settings.options()
        found = attacks.attack_l2(self.deployed, self.pixels, self.predictions, self.settings.radii, **options)
        if not self.settings.steps or np.isfinite(found.distances[:EXAMPLES]).all():
            return found
        first = slice(0, self.settings.batch_size)
        radii = [factor * max(self.settings.radii) for factor in _FURTHER]
        further = attacks.attack_l2(self.deployed, self.pixels[first], self.predictions[first], radii, **options)
        nearer = np.flatnonzero(further.distances < found.distances[first])
        found.distances[nearer], found.points[nearer] = further.distances[nearer], further.points[nearer]
        return found

    def attack_inside(self) -> tuple[np.ndarray, np.ndarray]:
        """Points inside the radii where the reported class is weakest, and which of them need a look in float64."""
        if not self.num_inside:
            return self.pixels, np.zeros(len(self.pixels), bool)
        diameter = math.sqrt(math.prod(self.pixels.shape[1:]))  # of the box
        radii = _WITHIN * np.minimum(self.radii, diameter)
        subject, options = (self.deployed, self.pixels, self.predictions, radii), self.settings.options()
        points, margins = attacks.attack_within(*subject, **options)
        # Towards the largest logit another search ends in local maxima; the nearest class is the certificate's rival.
        options |= {"objective": "targeted_margin", "targets": self.rivals}
        towards, other_margins = attacks.attack_within(*subject, **options)
        larger = (other_margins > margins) | np.isnan(margins)
        points, margins = np.where(_column(larger, points), towards, points), np.where(larger, other_margins, margins)
        # Where the network overflows in float32, nothing has been searched.
        self.num_inside = int(np.sum((self.radii > 0) & np.isfinite(margins)))
        own = np.where(np.isfinite(self.margins), np.abs(self.margins), 0.0)
        far = margins < -(_NEAR_OWN * own + _NEAR_LARGEST * own.max())
        return points, ~far & (self.radii > 0)

    def confirm(self, rows, points, pull_in: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """In float64: the points, if asked for moved inside the radii; their distances; which have another class."""
        exact, radii = self.exact(rows), self.radii[rows]
        delta = points.astype(np.float64) - self.pixels[rows]
        if pull_in:  # from where the rounding of float32 left them
            size = attacks.lengths(points, self.pixels[rows].astype(np.float64))
            shrink = np.minimum(1.0, _CONFIRMED * radii / np.where(size > 0, size, 1.0))
            delta *= _column(shrink, delta)
        moved = np.clip(exact + delta, 0.0, 1.0)
        logits, errors = logits_and_errors(self.network, moved, self.settings.batch_size)
        place = np.arange(len(rows)), self.predictions[rows]
        changed = (logits - errors).max(axis=1, initial=-np.inf) > logits[place] + errors[place]
        return moved, attacks.lengths(moved, exact), changed

    def closest(self, attack: AttackResult) -> tuple[float, int] | None:
        """The least distance / radius at which float64 sees another class, among one batch of the most promising."""
        certified = np.flatnonzero(np.isfinite(attack.distances) & (self.radii > 0))
        with np.errstate(over="ignore"):
            order = np.argsort(attack.distances[certified] / self.radii[certified], kind="stable")
            rows = certified[order[: self.settings.batch_size]]
            _, distances, changed = self.confirm(rows, attack.points[rows], pull_in=False)
            ratios = np.where(changed, distances / self.radii[rows], np.inf)
        if not np.isfinite(ratios).any():
            return None
        return float(ratios.min()), int(rows[np.argmin(ratios)])


def _check_certificates(subject: _Subject, attack: AttackResult, points, inside, workdir: pathlib.Path) -> None:
    """Raises: Refuted if an image has another class in float64 at a distance below its certified radius."""
    near = np.flatnonzero(attack.distances < subject.radii)
    rows = np.concatenate([np.flatnonzero(inside), near])
    points = np.concatenate([points[inside], attack.points[near]])
    moved, distances, changed = subject.confirm(rows, points, pull_in=True)
    broken = changed & (distances * (1 + 1e-12) < subject.radii[rows])
    if broken.any():
        index, first = np.unique(rows[broken], return_index=True)
        path = workdir / "counterexample.npz"
        save_arrays(path, index=index, image=subject.exact(index), point=moved[broken][first])
        raise Refuted(
            f"A certificate is false: {len(index)} images change class inside their certified radius ({path}). "
            "Please report this."
        )


def _check_lipschitz(search: LipschitzSearch, lipschitz, whole: float | None, workdir: pathlib.Path) -> None:
    """Raises: Refuted if two points are mapped further apart than a proved constant allows."""
    proved = lipschitz[search.pairs[:, 0], search.pairs[:, 1]]
    path = workdir / "counterexample.npz"
    broken = np.flatnonzero(search.lower > proved)
    if len(broken):
        found = {"pairs": search.pairs[broken], "lower": search.lower[broken], "proved": proved[broken]}
        save_arrays(path, x=search.points[broken, 0], y=search.points[broken, 1], **found)
    elif whole is not None and search.whole > whole:
        save_arrays(path, x=search.whole_points[0], y=search.whole_points[1], lower=search.whole, proved=whole)
    else:
        return
    what = f"{len(broken)} of logit differences" if len(broken) else "that of all logits"
    raise Refuted(
        f"A Lipschitz bound is false: {what}; two points are mapped further apart ({path}). Please report this."
    )


def save_arrays(path: pathlib.Path, **arrays) -> None:
    """Writes an .npz file whole or not at all."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def of_labels(findings: Findings, predictions: np.ndarray, labels: np.ndarray) -> AttackResult:
    """The attack with distance 0 where the image itself is misclassified: what attacked accuracy counts."""
    attack = findings.attack
    return AttackResult(np.where(predictions[: len(labels)] == labels, attack.distances, 0.0), attack.points)


def write_findings(
    workdir, network, certificate, lipschitz, whole, images, labels, pixel_max, settings, findings
) -> dict:
    """Writes attack.npz and attack.json (docs/attacks.md), each whole or not at all. Returns: the JSON document."""
    workdir, count = pathlib.Path(workdir), min(EXAMPLES, len(images))
    subject = _Subject(network, None, certificate, images[:count], pixel_max, settings)
    attack, rows = findings.attack, np.arange(count)
    logits = network(attack.points[:count], settings.batch_size)
    found = np.isfinite(attack.distances[:count]) & (np.argmax(logits, axis=1) != subject.predictions)
    save_arrays(
        workdir / "attack.npz",
        index=rows,
        image=subject.pixels,
        label=np.asarray(labels[:count], np.int64),
        prediction=subject.predictions.astype(np.int64),
        radius=subject.radii,
        point=np.where(_column(found, images), attack.points[:count], np.float32(np.nan)),
        distance=np.where(found, attack.distances[:count], np.nan),
    )
    correct = of_labels(findings, certificate.predictions, labels)
    document = {
        "format": FORMAT,
        "schema": SCHEMA,
        "frozen_sha256": network.sha256(),
        "method": settings.method,
        "objective": settings.objective,
        "steps": settings.steps,
        "restarts": settings.restarts,
        "seed": settings.seed,
        "num_images": len(images),
        "clean_accuracy": float(np.mean(certificate.predictions[: len(labels)] == labels)),
        "attacked_accuracy": {
            radius_key(r): float(np.mean(correct.distances > r * (1 + 1e-6))) for r in settings.radii
        },
        "radii": list(settings.radii),
        "gate": {
            "num_images": findings.num_inside,
            "violations": 0,
            "closest_ratio": None if findings.closest is None else findings.closest[0],
            "closest_index": None if findings.closest is None else findings.closest[1],
        },
        "lipschitz": _lipschitz_rows(findings.search, lipschitz, whole),
    }
    write_json(workdir / "attack.json", document)
    return document


def _lipschitz_rows(search: LipschitzSearch | None, lipschitz, whole: float | None) -> dict | None:
    if search is None:
        return None
    proved = lipschitz[search.pairs[:, 0], search.pairs[:, 1]]
    ratios = search.lower / np.where(proved > 0, proved, np.inf)
    rows = zip(search.pairs.tolist(), search.lower.tolist(), proved.tolist(), strict=True)
    known = len(ratios) > 0
    return {
        "violations": 0,
        "num_pairs": len(ratios),
        "of": len(lipschitz) * (len(lipschitz) - 1) // 2,
        "largest_ratio": float(ratios.max()) if known else None,
        "mean_ratio": float(ratios.mean()) if known else None,
        "whole_lower": search.whole,
        "whole_proved": whole,
        "pairs": [{"classes": classes, "lower": lower, "proved": bound} for classes, lower, bound in rows],
    }


def print_findings(document: dict, console: Console) -> None:
    """attack.json as a table."""
    gate, lipschitz = document["gate"], document["lipschitz"]
    how = f"{document['method']}, {document['objective']}, {document['steps']} steps, {document['restarts']} restarts"
    table = Table(title=f"Attack on {document['num_images']} test images ({how})")
    table.add_column("")
    table.add_column("found", justify="right")
    table.add_row("clean accuracy", f"{100 * document['clean_accuracy']:.2f} %")
    for radius in document["radii"]:
        value = f"{100 * document['attacked_accuracy'][radius_key(radius)]:.2f} %"
        table.add_row(f"accuracy under attack at {radius_label(radius)} (upper bound)", value)
    table.add_row("images attacked inside their certified radius", f"{gate['num_images']}")
    table.add_row("of these, certificates found false", f"{gate['violations']}")
    closest = gate["closest_ratio"]
    table.add_row("nearest change of class / certified radius", "none found" if closest is None else f"{closest:.4f}")
    if lipschitz is not None:
        known = lipschitz["largest_ratio"] is not None
        name = f"Lipschitz constant found / proved, best of {lipschitz['num_pairs']} pairs of logits"
        table.add_row(name, f"{lipschitz['largest_ratio']:.4f}" if known else "-")
        whole = lipschitz["whole_proved"]
        if whole is not None:
            table.add_row("Lipschitz constant of all logits, found", f"{lipschitz['whole_lower']:.6g}")
            table.add_row("Lipschitz constant of all logits, proved", f"{whole:.6g}")
    console.print(table)
