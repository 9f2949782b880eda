"""The falsifier of a run: it attacks images, certificates and Lipschitz bounds, and fails if one of these is false."""

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lipjax import attacks, bounds, spectral
from lipjax.attacks import AttackResult, LipschitzSearch
from lipjax.certify import Certificate, FrozenNetwork
from lipjax.certify.document import draw
from lipjax.errors import Refuted
from lipjax.files import save_arrays
from lipjax.operators import LinearHead, MLPHead

# So many images are shown in a report. They are attacked at these multiples of the largest radius, too.
EXAMPLES = 16
_FURTHER = (2.0, 4.0, 8.0)
# The search is within this part of a radius; what it finds is moved to within the other one where float32 left it.
_WITHIN, _CONFIRMED = 1 - 1e-6, 1 - 1e-9
# Only images whose float32 margin came this near to zero, as a part of their own and of the largest one, are confirmed.
_NEAR_OWN, _NEAR_LARGEST = 1e-2, 1e-4
_LIPSCHITZ_STEPS, _LIPSCHITZ_BATCH = 30, 128


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the attacks on a run: `attacks.attack_l2` explains the fields."""

    radii: tuple[float, ...]
    steps: int
    method: str = "ensemble"
    restarts: int = 1
    objective: str = "cross_entropy"
    targets: int = 9
    queries: int = 1000
    batch_size: int = 250
    seed: int = 0

    def options(self) -> dict[str, Any]:
        """Arguments of `attacks.attack_l2` and `attacks.attack_within`."""
        renamed = {"num_steps": self.steps, "num_targets": self.targets, "num_queries": self.queries}
        names = ("method", "restarts", "objective", "batch_size", "seed")
        return renamed | {name: getattr(self, name) for name in names}

    def described(self) -> dict[str, Any]:
        """The settings that were used, for files and for people who read them."""
        found: dict[str, Any] = {"method": self.method}
        if self.method in ("apgd", "pgd"):
            found["objective"] = self.objective
        found |= {"steps": self.steps, "restarts": self.restarts}
        if self.method == "ensemble" or self.objective in attacks.TARGETED:
            found["targets"] = self.targets
        if self.method in ("ensemble", "square"):
            found["queries"] = self.queries
        return found | {"seed": self.seed}


def make_settings(options, seed: int) -> Settings:
    """The attack that config.certify asks for."""
    return Settings(
        radii=tuple(options.radii),
        steps=options.attack_steps,
        method=options.attack,
        restarts=options.attack_restarts,
        objective=options.attack_objective,
        targets=options.attack_targets,
        queries=options.attack_queries,
        batch_size=options.batch_size,
        seed=seed,
    )


@dataclasses.dataclass(frozen=True)
class Findings:
    """The findings of an attack that refuted nothing.

    Attributes:
      attack: the nearest image of another class than the reported one, in float32: found now, or known before.
      inside: (n,), the largest radius within which each image was attacked, now or before, for its certificate's sake;
        0 for none, and where it overflows in float32.
      num_inside: images of which that is the certified radius.
      closest: the least distance / radius of an image of another class, confirmed in float64, and its index; None
        if none was found.
      search: lower bounds of the Lipschitz constants; None without steps.
    """

    attack: AttackResult
    inside: np.ndarray
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
        total = math.nextafter(total * spectral.matrix_norm_bound(np.asarray(matrix)).proved, math.inf)
    return total


def logits_and_errors(network: FrozenNetwork, points: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits (n, k) in float64 for pixels of any value, and bounds (n, k) of their errors (docs/soundness.md, 7)."""
    head, rows = network.network.head, network.lipschitz_report()
    logits, _, error, own = network.evaluate(points, tuple(row.norms for row in rows), batch_size)
    if isinstance(head, LinearHead):
        constants = np.linalg.norm(head.matrix, axis=1)
    else:  # softplus is 1-Lipschitz
        constants = np.linalg.norm(head.w2, axis=1) * spectral.matrix_norm_bound(np.asarray(head.w1)).proved
    return logits, (constants * (1 + 1e-9) * error[:, None] + own) * (1 + 1e-9)


def _column(values: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Values of which there is one per image, shaped so that they broadcast over images."""
    return values.reshape(-1, *(1,) * (images.ndim - 1))


@dataclasses.dataclass(frozen=True)
class Known:
    """The findings of earlier attacks about images: the nearest points of other classes, and `Findings.inside`."""

    attack: AttackResult
    inside: np.ndarray


def falsify(
    network: FrozenNetwork,
    certificate: Certificate,
    lipschitz: np.ndarray,
    whole: float | None,
    images: np.ndarray,
    pixel_max: int,
    settings: Settings,
    workdir: str | os.PathLike,
    *,
    indices: np.ndarray | None = None,
    now: np.ndarray | None = None,
    known: Known | None = None,
    watch: Callable[[str, float], None] = lambda what, done: None,
) -> Findings:
    """Attacks images at fixed radii and inside their own certified radius, and searches the Lipschitz constants.

    Args:
      certificate: of these images. lipschitz: (k, k), the proved constants of logit differences.
      whole: the proved constant of all logits, as `whole_bound`. images: (n, ...) uint8. workdir: where
        counterexample.npz goes.
      indices: (n,), the images' places in their data set; default: 0 to n - 1.
      now: (n,) bool, which images are attacked; default: all. known: about all of them; it is looked at again.
      watch: told what is done, and which fraction of it, now and then.
    Raises: Refuted if a certificate or a Lipschitz bound is false, after writing counterexample.npz and nothing
      else.
    """
    # Searches need not be exact: single precision, on whatever accelerator there is.
    deployed = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), network.network)
    indices = np.arange(len(images)) if indices is None else indices
    now = np.ones(len(images), bool) if now is None else now
    subject = _Subject(network, deployed, certificate, images, indices, pixel_max, settings)
    attack = subject.attack(now, watch)
    points, inside, near = subject.attack_inside(now, watch)
    if known is not None:
        attack = subject.again(known.attack).nearer(attack)
        inside = np.maximum(inside, known.inside)
    _check_certificates(subject, attack, points, near, pathlib.Path(workdir))
    search = None
    if settings.steps and now.any():
        watch("searching for Lipschitz constants", 0.0)
        search = attacks.lipschitz_lower_bound(
            deployed,
            subject.pixels,
            num_steps=min(settings.steps, _LIPSCHITZ_STEPS),
            seed=settings.seed,
            batch_size=max(2, min(settings.batch_size, _LIPSCHITZ_BATCH)),
            evaluate=lambda z: logits_and_errors(network, z, settings.batch_size),
        )
        _check_lipschitz(search, lipschitz, whole, pathlib.Path(workdir))
    return Findings(attack, inside, subject.num_inside(inside), subject.closest(attack), search)


class _Subject:
    """A frozen network with the images that are attacked, and what is certified about these."""

    def __init__(self, network, deployed, certificate, images, indices, pixel_max, settings: Settings):
        self.network, self.deployed, self.settings, self.indices = network, deployed, settings, indices
        self.pixels = images / np.float32(pixel_max)
        self.images, self.pixel_max = images, pixel_max
        self.predictions, self.rivals = (a.astype(np.int32) for a in (certificate.predictions, certificate.rivals))
        self.margins, self.radii = certificate.margins, certificate.radii
        diameter = math.sqrt(math.prod(self.pixels.shape[1:]))  # of the box
        self.reach = np.minimum(self.radii, diameter)

    def exact(self, rows: np.ndarray) -> np.ndarray:
        """Images in float64, as they were certified."""
        return self.images[rows] / np.float64(self.pixel_max)

    def none(self) -> AttackResult:
        """Nothing found."""
        return AttackResult(np.full(len(self.pixels), np.inf), self.pixels, np.full(len(self.pixels), -1))

    def again(self, known: AttackResult) -> AttackResult:
        """The earlier findings that the network still confirms: files are not believed."""
        distances = np.full(len(self.pixels), np.inf)
        rows = np.flatnonzero(known.found_by >= 0)
        if len(rows):
            part = self.pixels[rows], self.predictions[rows], known.points[rows], self.settings.batch_size
            distances[rows] = attacks.evaluate_points(self.deployed, *part)
        axes = tuple(range(1, self.pixels.ndim))
        found = np.isfinite(distances) & ((known.points >= 0) & (known.points <= 1)).all(axis=axes)
        distances = np.where(found, distances, np.inf)
        points = np.where(_column(found, self.pixels), known.points, self.pixels)
        return AttackResult(distances, points, np.where(found, known.found_by, -1), known.ways)

    def attack(self, now: np.ndarray, watch) -> AttackResult:
        """At the radii; images that are shown also further out."""
        nothing, rows = self.none(), np.flatnonzero(now)
        if not self.settings.steps or not len(rows):
            return nothing
        what = "attacking"
        found = nothing.nearer(self._attack(rows, self.settings.radii, lambda done: watch(what, done)))
        shown = rows[draw(self.indices[rows], EXAMPLES)]
        shown = shown[~np.isfinite(found.distances[shown])]
        if not len(shown):
            return found
        further = [factor * max(self.settings.radii) for factor in _FURTHER]
        return found.nearer(self._attack(shown, further, lambda done: watch("attacking examples further out", done)))

    def _attack(self, rows: np.ndarray, radii, watch) -> AttackResult:
        options = self.settings.options() | {"numbers": self.indices[rows], "watch": watch}
        found = attacks.attack_l2(self.deployed, self.pixels[rows], self.predictions[rows], radii, **options)
        whole = self.none()
        points = self.pixels.copy()
        whole.distances[rows], points[rows], whole.found_by[rows] = found.distances, found.points, found.found_by
        return AttackResult(whole.distances, points, whole.found_by, found.ways)

    def attack_inside(self, now: np.ndarray, watch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Points inside the radii where the class is weakest, `Findings.inside`, and which points to look at again."""
        points, inside, near = self.pixels.copy(), np.zeros(len(self.pixels)), np.zeros(len(self.pixels), bool)
        rows = np.flatnonzero(now & (self.radii > 0))
        if not self.settings.steps or not len(rows):
            return points, inside, near
        options = self.settings.options() | {"numbers": self.indices[rows]}
        if self.settings.method == "ensemble":  # the largest margin is wanted, not the first that suffices
            options |= {"method": "apgd", "objective": "cross_entropy"}
        subject = self.deployed, self.pixels[rows], self.predictions[rows], _WITHIN * self.reach[rows]
        what = "attacking inside certified radii"
        found, margins = attacks.attack_within(*subject, **options, watch=lambda done: watch(what, done / 2))
        # Towards the largest logit another search ends in local maxima; the nearest class is the certificate's rival.
        options |= {"objective": "targeted_margin", "targets": self.rivals[rows]}
        options |= {} if options["method"] == "pgd" else {"method": "apgd"}
        towards, other_margins = attacks.attack_within(
            *subject, **options, watch=lambda done: watch(what, (1 + done) / 2)
        )
        larger = (other_margins > margins) | np.isnan(margins)
        found, margins = np.where(_column(larger, found), towards, found), np.where(larger, other_margins, margins)
        # Where the network overflows in float32, nothing has been searched.
        points[rows], inside[rows] = found, np.where(np.isfinite(margins), self.reach[rows], 0.0)
        own = np.where(np.isfinite(self.margins), np.abs(self.margins), 0.0)
        near[rows] = ~(margins < -(_NEAR_OWN * own[rows] + _NEAR_LARGEST * own.max()))
        return points, inside, near

    def num_inside(self, inside: np.ndarray) -> int:
        return int(np.sum((self.radii > 0) & (inside >= (1 - 1e-9) * self.reach)))

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
        return float(ratios.min()), int(self.indices[rows[np.argmin(ratios)]])


def _check_certificates(subject: _Subject, attack: AttackResult, points, inside, workdir: pathlib.Path) -> None:
    """Raises: Refuted if an image has another class in float64 at a distance below its certified radius."""
    near = np.flatnonzero(attack.distances < subject.radii)
    rows = np.concatenate([np.flatnonzero(inside), near])
    points = np.concatenate([points[inside], attack.points[near]])
    moved, distances, changed = subject.confirm(rows, points, pull_in=True)
    broken = changed & (distances * (1 + 1e-12) < subject.radii[rows])
    if broken.any():
        found, first = np.unique(rows[broken], return_index=True)
        path = workdir / "counterexample.npz"
        save_arrays(path, index=subject.indices[found], image=subject.exact(found), point=moved[broken][first])
        raise Refuted(
            f"A certificate is false: {len(found)} images change class inside their certified radius ({path}). "
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
