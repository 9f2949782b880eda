"""Files that attacks leave in a run's directory: the strongest attack on each image, from one attack to the next."""

import dataclasses
import json
import pathlib
import zipfile
import zlib
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from lipjax.attacks import AttackResult, LipschitzSearch
from lipjax.certify import Certificate, FrozenNetwork
from lipjax.certify.document import draw
from lipjax.certify.radius import radius_key, radius_label
from lipjax.evaluation import falsify
from lipjax.evaluation.falsify import EXAMPLES, Findings, Known, Settings
from lipjax.evaluation.progress import shown
from lipjax.evaluation.table import attacked_accuracy, part_of
from lipjax.files import save_arrays, write_json
from lipjax.training.terminal import progress_of

FORMAT, SCHEMA = "lipjax-attack", 1
NOTES, SHOWN, KEPT = "attack.json", "attack.npz", "adversarial.npz"
_DAMAGES = OSError, ValueError, LookupError, TypeError, EOFError, RecursionError, zipfile.BadZipFile, zlib.error
_ARRAYS = ("frozen_sha256", "data_sha256", "index", "inside", "found", "point", "found_by", "ways", "attacks")


@dataclasses.dataclass(frozen=True)
class Images:
    """Certified test images.

    Attributes:
      pixels: (n, ...) uint8, of which pixels / pixel_max is the image. labels: (n,).
      indices: (n,), their places among the `total` images of the data set, of which `sha256` is the hash.
    """

    pixels: np.ndarray
    labels: np.ndarray
    indices: np.ndarray
    total: int
    pixel_max: int
    sha256: str

    def take(self, rows: np.ndarray) -> "Images":
        pixels, labels, indices = (a[rows] for a in (self.pixels, self.labels, self.indices))
        return dataclasses.replace(self, pixels=pixels, labels=labels, indices=indices)


@dataclasses.dataclass(frozen=True)
class Kept:
    """The contents of adversarial.npz, about one frozen network and one data set.

    Attributes:
      index: (n,), places in the data set of all images that were ever attacked, ascending.
      inside: (n,), as `Findings.inside`.
      found: (m,), places in `index` of images with a point of another class. point: (m, ...), float32 pixels.
      found_by: (m,), places in `ways`, which say how: JSON. attacks: what was run, oldest first: JSON.
    """

    index: np.ndarray
    inside: np.ndarray
    found: np.ndarray
    point: np.ndarray
    found_by: np.ndarray
    ways: list[str]
    attacks: list[str]

    def known(self, part: Images) -> Known:
        """About these images; of those that were never attacked, nothing."""
        pixels = part.pixels / np.float32(part.pixel_max)
        place = np.searchsorted(self.index, part.indices).clip(max=len(self.index) - 1)
        there = self.index[place] == part.indices
        row = np.full(len(self.index), -1)
        row[self.found] = np.arange(len(self.found))
        own = np.where(there, row[place], -1)
        points = pixels.copy()
        points[own >= 0] = self.point[own[own >= 0]]
        found_by = np.full(len(own), -1)
        found_by[own >= 0] = self.found_by[own[own >= 0]]
        result = AttackResult(
            np.where(own >= 0, 0.0, np.inf), points, found_by, tuple(json.loads(way) for way in self.ways)
        )
        return Known(result, np.where(there, self.inside[place], 0.0))


def read_kept(workdir: pathlib.Path, frozen_sha256: str, data_sha256: str, in_shape, console: Console) -> Kept | None:
    """Findings of earlier attacks; None without a file, or if it is about another network, other data, or damaged."""
    path = workdir / KEPT
    if not path.exists():
        return None
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            if str(file["frozen_sha256"]) != frozen_sha256 or str(file["data_sha256"]) != data_sha256:
                return None
            arrays = {name: file[name] for name in _ARRAYS}
        texts = {name: arrays[name].tolist() for name in ("ways", "attacks")}
        kept = Kept(**{field.name: arrays[field.name] for field in dataclasses.fields(Kept)} | texts)
        n, m = len(kept.index), len(kept.found)
        integers = kept.index.dtype.kind + kept.found.dtype.kind + kept.found_by.dtype.kind
        fits = (
            integers == "iii"
            and (kept.inside.shape, kept.found.shape, kept.found_by.shape) == ((n,), (m,), (m,))
            and (kept.point.dtype, kept.point.shape) == (np.float32, (m, *in_shape))
            and n > 0
            and (np.diff(kept.index, prepend=-1) > 0).all()
            and (np.diff(kept.found, prepend=-1, append=n) > 0).all()
            and ((kept.found_by >= 0) & (kept.found_by < len(kept.ways))).all()
            and (kept.inside >= 0).all()
        )
        described = [json.loads(text) for text in (*kept.ways, *kept.attacks)]
        if not fits or not all(isinstance(entry, dict) for entry in described):
            raise ValueError("arrays that do not fit each other")
    except _DAMAGES as error:
        console.print(f"{path} is damaged ({error}): what earlier attacks found is lost.", markup=False)
        return None
    return kept


@dataclasses.dataclass(frozen=True)
class Attacked:
    """The findings after an attack. Nothing of it is on disk yet.

    Attributes:
      rows: (n,), which of the certified images were attacked, now or before. images, certificate: of these.
      findings: about these; None if there are none. settings: of this attack. kept: what is to be kept.
    """

    rows: np.ndarray
    images: Images
    certificate: Certificate
    findings: Findings | None
    settings: Settings
    kept: Kept | None

    def of_labels(self) -> AttackResult | None:
        """The attack with distance 0 where the image itself is misclassified: what attacked accuracy counts."""
        if self.findings is None:
            return None
        attack, right = self.findings.attack, self.certificate.predictions == self.images.labels
        return dataclasses.replace(attack, distances=np.where(right, attack.distances, 0.0))


def attack_images(
    workdir: pathlib.Path,
    network: FrozenNetwork,
    certificate: Certificate,
    lipschitz: np.ndarray,
    whole: float | None,
    images: Images,
    settings: Settings,
    count: int,
    console: Console,
) -> Attacked:
    """Attacks `count` of the images, drawn by hash (0: all), as `falsify.falsify`, and adds what is known of others.

    Raises: Refuted as `falsify.falsify`.
    """
    kept = read_kept(workdir, network.sha256(), images.sha256, network.in_shape, console)
    now = draw(images.indices, count or len(images.labels)) if settings.steps else np.empty(0, np.int64)
    earlier = np.empty(0, np.int64) if kept is None else np.flatnonzero(np.isin(images.indices, kept.index))
    rows = np.union1d(now, earlier)
    part, claims = images.take(rows), certificate.take(rows)
    if not len(rows):
        return Attacked(rows, part, claims, None, settings, None)
    if len(now):
        progress_of(console).print(
            f"Attacking {part_of(len(now), images.total)} test images at {len(settings.radii)} radii and inside "
            "their own ..."
        )
    with shown(console) as watch:
        findings = falsify.falsify(
            network,
            claims,
            lipschitz,
            whole,
            part.pixels,
            part.pixel_max,
            settings,
            workdir,
            indices=part.indices,
            now=np.isin(rows, now),
            known=None if kept is None else kept.known(part),
            watch=watch,
        )
    description = settings.described() | {"num_images": len(now)} if len(now) else None
    return Attacked(rows, part, claims, findings, settings, _keep(kept, part, findings, description))


def _keep(kept: Kept | None, part: Images, findings: Findings, description: dict | None) -> Kept:
    """Everything that is to be kept: the findings, and what was kept of images that are not certified now."""
    attack = findings.attack
    found = np.flatnonzero(attack.found_by >= 0)
    texts = [json.dumps(way, sort_keys=True) for way in attack.ways]
    parts = [(part.indices, findings.inside, found, attack.points[found], [texts[i] for i in attack.found_by[found]])]
    attacks = [json.dumps(description)] if description else []
    if kept is not None:
        attacks = [*kept.attacks, *(text for text in attacks if text not in kept.attacks)]
        others = np.flatnonzero(~np.isin(kept.index, part.indices))
        rest = np.flatnonzero(np.isin(kept.found, others))
        own = np.searchsorted(others, kept.found[rest]), kept.point[rest], [kept.ways[i] for i in kept.found_by[rest]]
        parts.append((kept.index[others], kept.inside[others], *own))
    index, inside = (np.concatenate([p[i] for p in parts]) for i in (0, 1))
    starts = np.cumsum([0, *(len(p[0]) for p in parts)])
    places = np.concatenate([p[2] + start for p, start in zip(parts, starts, strict=False)]).astype(np.int64)
    points, by = np.concatenate([p[3] for p in parts]), [text for p in parts for text in p[4]]
    order = np.argsort(index)
    rank = np.argsort(order)[places]
    inner = np.argsort(rank)
    ways = sorted(set(by))
    found_by = np.array([ways.index(by[i]) for i in inner], np.int64)
    points = points[inner].astype(np.float32)
    return Kept(index[order].astype(np.int64), inside[order], rank[inner], points, found_by, ways, attacks)


def write_attack(
    workdir: pathlib.Path, network: FrozenNetwork, attacked: Attacked, lipschitz: np.ndarray, whole: float | None
) -> dict | None:
    """Writes adversarial.npz, attack.npz and attack.json (docs/attacks.md), each whole or not at all.

    What lies there about another network is removed.
    Returns: the JSON document; None if nothing was ever attacked.
    """
    digest, notes = network.sha256(), workdir / NOTES
    old = _old_notes(notes, digest)
    if attacked.findings is None or attacked.kept is None:
        if notes.exists() and old is None:
            for name in (NOTES, SHOWN, KEPT):
                (workdir / name).unlink(missing_ok=True)
        return None
    images, findings, certificate, kept = attacked.images, attacked.findings, attacked.certificate, attacked.kept
    texts = {"ways": np.array(kept.ways, np.str_), "attacks": np.array(kept.attacks, np.str_)}
    arrays = {name: getattr(kept, name) for name in ("index", "inside", "found", "point", "found_by")}
    save_arrays(workdir / KEPT, frozen_sha256=np.str_(digest), data_sha256=np.str_(images.sha256), **arrays, **texts)

    rows = draw(images.indices, EXAMPLES)
    attack, pixels = findings.attack, images.pixels[rows] / np.float32(images.pixel_max)
    logits = network(attack.points[rows], attacked.settings.batch_size)
    taken = np.argmax(logits, axis=1)
    found = np.isfinite(attack.distances[rows]) & (taken != certificate.predictions[rows])
    by = [_name(attack.ways[attack.found_by[row]]) if there else "" for row, there in zip(rows, found, strict=True)]
    column = found.reshape(-1, *(1,) * (pixels.ndim - 1))
    save_arrays(
        workdir / SHOWN,
        index=images.indices[rows],
        image=pixels,
        label=np.asarray(images.labels[rows], np.int64),
        prediction=certificate.predictions[rows].astype(np.int64),
        radius=certificate.radii[rows],
        point=np.where(column, attack.points[rows], np.float32(np.nan)),
        distance=np.where(found, attack.distances[rows], np.nan),
        taken_for=np.where(found, taken, -1),
        found_by=np.array(by, np.str_),
    )
    document = _document(digest, attacked, lipschitz, whole, old)
    write_json(notes, document)
    return document


def _name(way: dict) -> str:
    """The name of an attack that found a point: "apgd targeted_dlr"."""
    return " ".join(str(way[field]) for field in ("method", "objective") if field in way)


def _old_notes(path: pathlib.Path, frozen_sha256: str) -> dict | None:
    """attack.json if it is about this network."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and found.get("frozen_sha256") == frozen_sha256 else None


def _document(digest: str, attacked: Attacked, lipschitz, whole, old: dict | None) -> dict:
    findings, kept, correct = attacked.findings, attacked.kept, attacked.of_labels()
    assert findings is not None and kept is not None and correct is not None
    labels, predictions = attacked.images.labels, attacked.certificate.predictions
    counted: dict[str, int] = {}
    for place in findings.attack.found_by[(findings.attack.found_by >= 0) & (predictions == labels)]:
        name = _name(findings.attack.ways[place])
        counted[name] = counted.get(name, 0) + 1
    attacks = [json.loads(text) for text in kept.attacks]
    return {
        "format": FORMAT,
        "schema": SCHEMA,
        "frozen_sha256": digest,
        **{name: value for name, value in attacks[-1].items() if name != "num_images"},
        "attacks": attacks,
        "num_images": len(labels),
        "of": attacked.images.total,
        "clean_accuracy": float(np.mean(predictions == labels)),
        "attacked_accuracy": attacked_accuracy(correct.distances, attacked.settings.radii),
        "found_by": dict(sorted(counted.items())),
        "radii": list(attacked.settings.radii),
        "gate": {
            "num_images": findings.num_inside,
            "violations": 0,
            "closest_ratio": None if findings.closest is None else findings.closest[0],
            "closest_index": None if findings.closest is None else findings.closest[1],
        },
        "lipschitz": _lipschitz_rows(findings.search, lipschitz, whole, (old or {}).get("lipschitz")),
    }


def _lipschitz_rows(search: LipschitzSearch | None, lipschitz, whole: float | None, old: Any) -> dict | None:
    """The largest quotients of two logits and of all, found now or stated by an older attack.json of this network."""
    lower: dict[tuple[int, int], float] = {}
    of_all = 0.0
    if search is not None:
        of_all = search.whole
        lower = {(int(i), int(j)): float(low) for (i, j), low in zip(search.pairs, search.lower, strict=True)}
    try:  # what is not as it was written says nothing; nor does what is above the proved constant, without its points
        for row in old["pairs"]:
            (i, j), low = row["classes"], float(row["lower"])
            if low <= lipschitz[i, j]:
                lower[i, j] = max(low, lower.get((i, j), 0.0))
        if whole is not None and float(old["whole_lower"]) <= whole:
            of_all = max(of_all, float(old["whole_lower"]))
    except (LookupError, TypeError, ValueError):
        pass
    if search is None and not lower:
        return None
    rows = [
        {"classes": [i, j], "lower": low, "proved": float(lipschitz[i, j])} for (i, j), low in sorted(lower.items())
    ]
    ratios = [row["lower"] / row["proved"] if row["proved"] > 0 else 0.0 for row in rows]
    return {
        "violations": 0,
        "num_pairs": len(rows),
        "of": len(lipschitz) * (len(lipschitz) - 1) // 2,
        "largest_ratio": max(ratios, default=None),
        "mean_ratio": float(np.mean(ratios)) if ratios else None,
        "whole_lower": of_all,
        "whole_proved": whole,
        "pairs": rows,
    }


def described(settings: dict) -> str:
    """An attack in words: "ensemble, 20 steps, 1 restart, 3 rivals, 100 queries"."""
    found = [settings["method"], *([settings["objective"]] if "objective" in settings else [])]
    words = {"steps": "step", "restarts": "restart", "targets": "rival", "queries": "query"}
    for field, word in words.items():
        if field in settings:
            number = settings[field]
            several = "queries" if field == "queries" else f"{word}s"
            found.append(f"{number} {word if number == 1 else several}")
    return ", ".join(found)


def print_findings(document: dict, console: Console) -> None:
    """attack.json as a table."""
    gate, lipschitz, attacks = document["gate"], document["lipschitz"], document["attacks"]
    which = part_of(document["num_images"], document["of"])
    how = described(attacks[0]) if len(attacks) == 1 else f"of each image the strongest of {len(attacks)} attacks"
    table = Table(title=f"Attack on {which} test images ({how})")
    table.add_column("")
    table.add_column("found", justify="right")
    table.add_row("clean accuracy", f"{100 * document['clean_accuracy']:.2f} %")
    for radius in document["radii"]:
        value = f"{100 * document['attacked_accuracy'][radius_key(radius)]:.2f} %"
        table.add_row(f"accuracy under attack at {radius_label(radius)} (upper bound)", value)
    for name, count in document["found_by"].items():
        table.add_row(f"nearest points of another class found by {name}", f"{count}")
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
    if len(attacks) > 1:
        console.print("The attacks so far:")
        for one in attacks:
            console.print(f"  {described(one)}, on {part_of(one['num_images'], document['of'])} images", markup=False)
