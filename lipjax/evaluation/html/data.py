"""The data of an HTML report: the files that certify and attack leave in a run's directory, read and checked."""

import dataclasses
import json
import math
import pathlib
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np

from lipjax import operators
from lipjax.certify import FrozenNetwork
from lipjax.certify.radius import radius_key
from lipjax.errors import UserError
from lipjax.evaluation.html.parts import down
from lipjax.training.data.prepared import PREPARED, find_prepared, resolve_data_dir

FORMAT, ATTACK_FORMAT = "lipjax-certificate", "lipjax-attack"

# Singular values of a layer are computed up to this many multiplications: one dense matrix of side 2048.
_MOST_PRODUCTS = 2048**3
# What attacks of earlier versions do not say: -1 and "" stand for that.
_ATTACK_NEWER = ("taken_for", "found_by")
_ATTACK_ARRAYS = ("index", "image", "label", "prediction", "radius", "point", "distance")


@dataclasses.dataclass(frozen=True)
class CertifiedRun:
    """One run, its fields those that a page shows.

    Attributes:
      certificate: certificate.json. report: report.json. metrics: the lines of metrics.jsonl.
      labels, predictions, radii: (n,) of all certified images. indices: (n,), their places in the data set.
      attack: the arrays of attack.npz, None without one. attack_notes: attack.json, None without one.
      smallest: the least singular value of layers by name, as text, where something is known about it.
      class_names: empty where they are not known. in_shape: of an image, None without the network.
    """

    certificate: dict
    report: dict
    metrics: list[dict]
    labels: np.ndarray
    predictions: np.ndarray
    radii: np.ndarray
    indices: np.ndarray
    attack: dict[str, np.ndarray] | None
    attack_notes: dict | None
    smallest: dict[str, str]
    class_names: tuple[str, ...]
    in_shape: tuple[int, ...] | None

    def class_name(self, label: int) -> str:
        return self.class_names[label] if 0 <= label < len(self.class_names) else f"class {label}"


def read_run(directory: pathlib.Path) -> CertifiedRun:
    """Reads the directory of a certified run; metrics.jsonl, frozen/ and the files of an attack may be missing.

    Raises: UserError if another file is missing, or one is damaged, of another format or of another certificate.
    """
    certify = f"Certify the run again: python -m lipjax certify {directory}"
    certificate, report = (_read_json(directory / name, certify) for name in ("certificate.json", "report.json"))
    if certificate.get("format") != FORMAT:
        raise UserError(
            f"{directory / 'certificate.json'}: expected the format {FORMAT!r}, got {certificate.get('format')!r}. "
            f"{certify}"
        )
    try:
        labels, predictions, radii = _check_certificate(certificate)
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{directory / 'certificate.json'} lacks what a report shows ({error!r}). {certify}") from error
    try:
        _check_report(report, certificate, labels == predictions, radii)
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{directory / 'report.json'} does not fit the certificate ({error}). {certify}") from error
    attack = f"Attack the run again: python -m lipjax attack {directory}"
    notes = _read_notes(directory / "attack.json", certificate, len(labels), attack)
    report = report if notes is None else _with_attack(report, notes)
    indices = np.array(certificate["data"].get("indices", range(len(labels))), np.int64)
    frozen = _frozen(directory / "frozen", certificate, certify)
    return CertifiedRun(
        certificate,
        report,
        _read_metrics(directory / "metrics.jsonl"),
        labels,
        predictions,
        radii,
        indices,
        _read_attack(directory / "attack.npz", indices, predictions, radii, attack),
        notes,
        _smallest_singular_values(frozen, certificate),
        _class_names(frozen, certificate, 1 + int(max(labels.max(), predictions.max()))),
        None if frozen is None else frozen.in_shape,
    )


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def _read_json(path: pathlib.Path, remedy: str) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing. {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}). {remedy}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged (expected a JSON object, got {type(found).__name__}). {remedy}")
    return found


def _numbers(values, kinds: str) -> np.ndarray:
    """A list of numbers as an array. Raises: ValueError for other things, or a dtype whose kind is not in `kinds`."""
    array = np.array(values)
    if array.dtype.kind not in kinds or not np.isfinite(array).all():
        raise ValueError(f"expected finite numbers, got {array.dtype}")
    return array


def _check_certificate(certificate: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, predictions and radii of the images; raises what a missing or misshapen field leads to."""
    rows = certificate["images"]
    if not rows:
        raise ValueError("no image")
    labels, predictions = (_numbers([row[name] for row in rows], "i") for name in ("label", "prediction"))
    radii = _numbers([row["radius"] for row in rows], "if").astype(np.float64)
    expected = {
        **dict.fromkeys(("claim", "frozen_sha256", "precision", "platform"), str),
        **dict.fromkeys(("seed", "step"), int),
        **dict.fromkeys(("data", "config", "versions"), dict),
        "layers": list,
    }
    for name, kind in expected.items():
        if not isinstance(certificate[name], kind):
            raise TypeError(f"{name}: expected {kind.__name__}, got {type(certificate[name]).__name__}")
    _check_row(certificate["data"], ("name", "sha256"), ("num_images", "of"))
    indices = certificate["data"].get("indices")
    if indices is not None and (len(indices) != len(rows) or (np.diff(_numbers(indices, "i"), prepend=-1) < 1).any()):
        raise ValueError("data.indices: expected the place of every image, ascending")
    for name, group in certificate["config"].items():
        if name in ("data", "loss", "model", "optimizer") and not isinstance(group, dict):
            raise TypeError(f"config.{name}: expected a group of fields, got {type(group).__name__}")
    for row in certificate["layers"]:
        known = [name for name in ("estimate", "gap") if name in row]
        _check_row(row, ("name", "type", "method"), ("bound",), known)
    liplt = certificate.get("liplt")
    if liplt is not None:
        for row in liplt["layers"]:
            _check_row(row, ("name",), ("bound", "product"))
        for row in liplt["chains"]:
            _check_row(row, ("start", "end", "method"), ("bound",))
    return labels, predictions, radii


def _check_row(row: dict, texts: Sequence[str], numbers: Sequence[str], optional: Sequence[str] = ()) -> None:
    """Raises: what missing or misshapen fields lead to; an optional one may also be null."""
    _numbers([row[name] for name in (*numbers, *(n for n in optional if row[n] is not None))], "if")
    for name in texts:
        if not isinstance(row[name], str):
            raise TypeError(f"{name}: expected a text, got {type(row[name]).__name__}")


def _check_report(report: dict, certificate: dict, correct: np.ndarray, proved: np.ndarray) -> None:
    """Raises: what a missing or misshapen field leads to, or ValueError if the report is not of this certificate."""
    num_images = len(correct)
    if (report["frozen_sha256"], report["num_images"]) != (certificate["frozen_sha256"], num_images):
        raise ValueError("it is about another network or other images")
    radii = _numbers(report["radii"], "if")
    if radii.ndim != 1 or not radii.size or not (radii > 0).all():
        raise ValueError("expected positive radii")
    attacked, keys = report["num_attacked_images"], [radius_key(r) for r in radii]
    fields = ("certified_accuracy", "attacked_accuracy") if attacked else ("certified_accuracy",)
    unnamed = [r for r in radii if not {*report["certified_accuracy"], *report["attacked_accuracy"]} >= {radius_key(r)}]
    if unnamed:
        raise ValueError(
            f"no accuracy at {radius_key(unnamed[0])!r}, the name of its radius {unnamed[0]}: keys of earlier versions "
            "could round up"
        )
    maps = [report[field][key] for key in keys for field in fields]
    maps += [report["attacked_clean_accuracy"]] if attacked and "attacked_clean_accuracy" in report else []
    fractions = _numbers([report["clean_accuracy"], *maps], "if")
    if not ((fractions >= 0).all() and (fractions <= 1).all() and attacked in range(num_images + 1)):
        raise ValueError("expected accuracies from 0 to 1, under attack of some of the images")
    counted = {radius_key(r): float(np.mean(correct & (proved > r))) for r in radii}
    stated = {key: report["certified_accuracy"][key] for key in counted}
    if (report["clean_accuracy"], stated) != (float(np.mean(correct)), counted):
        raise ValueError("its accuracies are not those of the certificate's rows")
    single: Any = report.get("float32_certified_accuracy")
    if single is not None:  # of an older version, or where nothing is proved for float32
        shares = _numbers([report["float32_clean_accuracy"], *(single[key] for key in counted)], "if")
        if not ((shares >= 0).all() and (shares <= [report["clean_accuracy"], *counted.values()]).all()):
            raise ValueError("it proves more for float32 than for exact arithmetic")
    for radius, share in float32_curve(report):
        if not 0 <= share <= float(np.mean(correct & (proved > radius))):
            raise ValueError("its curve proves more for float32 than for exact arithmetic")
    if type(report["seed"]) is not int:
        raise TypeError("expected a seed")


def float32_curve(report: dict) -> list[tuple[float, float]]:
    """Ascending radii above 0, and the fraction of images proved at them for float32, too: of all that a report says.

    Raises: ValueError, LookupError or TypeError for fields of another form.
    """
    single, found = report.get("float32_certified_accuracy"), {}
    if single is None:
        return []
    ball: Any = report.get("float32", {}).get("ball", {})
    for row in ball.get("curve", ()):  # of no older version
        found[float(row["radius"])] = row["accuracy"]
    found |= {float(radius): single[radius_key(radius)] for radius in report["radii"]}
    _numbers([value for pair in found.items() for value in pair], "if")
    return sorted((radius, float(share)) for radius, share in found.items() if radius > 0)


def _read_metrics(path: pathlib.Path) -> list[dict]:
    """The lines of metrics.jsonl, none without the file; a last line that is half written is left out."""
    if not path.exists():
        return []
    lines, found = path.read_text(encoding="utf-8", errors="replace").splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line, parse_constant=_refuse)
            if type(row["step"]) is not int or not isinstance(row["split"], str):
                raise ValueError("expected a step and a split")
            found.append(row)
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            if number < len(lines):
                raise UserError(
                    f"{path} is damaged in line {number} ({error}). Mend the line, or move the file away for a report "
                    "without training curves."
                ) from error
    return found


def _read_notes(path: pathlib.Path, certificate: dict, num_images: int, remedy: str) -> dict | None:
    """attack.json, None if there is none."""
    if not path.exists():
        return None
    notes = _read_json(path, remedy)
    if notes.get("format") != ATTACK_FORMAT:
        raise UserError(f"{path}: expected the format {ATTACK_FORMAT!r}, got {notes.get('format')!r}. {remedy}")
    if notes.get("frozen_sha256") != certificate["frozen_sha256"]:
        raise UserError(f"{path} is of another network than the certificate. {remedy}")
    try:
        gate, search = notes["gate"], notes["lipschitz"]
        _check_row(notes, (), ("num_images",))
        fractions = _numbers([0, notes.get("clean_accuracy", 0), *notes["attacked_accuracy"].values()], "if")
        if not ((fractions >= 0).all() and (fractions <= 1).all() and notes["num_images"] <= num_images):
            raise ValueError("expected accuracies from 0 to 1, of some of the images")
        _check_row(gate, (), ("num_images", "violations"), ("closest_ratio",))
        if search is not None:
            known = ("largest_ratio", "whole_lower", "whole_proved")
            _check_row(search, (), ("num_pairs", "violations"), known)
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{path} lacks what a report shows ({error!r}). {remedy}") from error
    return notes


def _with_attack(report: dict, notes: dict) -> dict:
    """The report with the accuracies of a later attack, where they say more: on more images, or lower ones."""
    own, other = report["attacked_accuracy"], notes["attacked_accuracy"]
    if notes.get("steps") == 0:  # nothing was attacked
        return report
    keys = [radius_key(radius) for radius in report["radii"]]
    if not set(keys) <= other.keys() or notes["num_images"] < report["num_attacked_images"]:
        return report
    same = notes["num_images"] == report["num_attacked_images"]
    found = {key: min(own[key], other[key]) if same else other[key] for key in keys}
    clean = {"attacked_clean_accuracy": notes["clean_accuracy"]} if "clean_accuracy" in notes else {}
    return report | {"attacked_accuracy": found, "num_attacked_images": notes["num_images"]} | clean


def _read_attack(path: pathlib.Path, indices, predictions, radii, remedy: str) -> dict[str, np.ndarray] | None:
    """attack.npz with "row", the rows of the certificate that its images have; None if there is none."""
    if not path.exists():
        return None
    try:
        # np.load leaves a file open that it opened itself and finds damaged.
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in _ATTACK_ARRAYS}
            arrays |= {"taken_for": np.full(len(arrays["index"]), -1), "found_by": np.full(len(arrays["index"]), "")}
            arrays |= {name: file[name] for name in _ATTACK_NEWER if name in file}
        index, images = arrays["index"].astype(np.int64), arrays["image"]
        if images.ndim != 4 or arrays["point"].shape != images.shape or 0 in images.shape[1:]:
            raise ValueError(f"images {images.shape} and points {arrays['point'].shape}")
        if any(array.shape != (len(images),) for name, array in arrays.items() if name not in ("image", "point")):
            raise ValueError("expected one number per image")
        if (arrays["taken_for"].dtype.kind, arrays["found_by"].dtype.kind) != ("i", "U"):
            raise ValueError("expected classes as numbers, and attacks by name")
        row = np.searchsorted(indices, index).clip(max=len(indices) - 1)
        fits = np.array_equal(indices[row], index) and (
            np.array_equal(arrays["prediction"], predictions[row])
            and np.allclose(arrays["radius"].astype(np.float64), radii[row], rtol=1e-6, atol=0)
        )
    except (ValueError, LookupError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}). {remedy}") from error
    if not fits:
        raise UserError(f"{path} is of another certificate: its predictions or radii differ. {remedy}")
    return arrays | {"row": row}


def _frozen(directory: pathlib.Path, certificate: dict, remedy: str) -> FrozenNetwork | None:
    """The network that was certified, None if it is not there."""
    if not (directory / "network.json").exists():
        return None
    frozen = FrozenNetwork.load(directory)
    if frozen.sha256() != certificate["frozen_sha256"]:
        raise UserError(f"{directory} holds another network than the one that was certified. {remedy}")
    return frozen


def _smallest_singular_values(frozen: FrozenNetwork | None, certificate: dict) -> dict[str, str]:
    """Least singular values by layer: of dense matrices, frequency blocks and reorderings by the SVD in float64.

    A truncated exponential of a skew map J has at least 1 - |J|^(p+1) / (p+1)!, by its remainder.
    """
    found = {}
    for row in certificate["layers"]:
        details = row.get("details") or {}
        norm, terms = details.get("skew_norm"), details.get("num_terms")
        if row["type"] == "ConvExponential" and finite(norm) and norm > 0 and type(terms) is int and terms >= 1:
            remainder = math.exp(min(0.0, (terms + 1) * math.log(norm) - math.lgamma(terms + 2)))
            if remainder < 1:
                found[row["name"]] = f"≥ {down(1 - remainder)}"
    if frozen is None:
        return found
    network = frozen.network
    found["input"] = f"{1 / float(np.max(network.input_std)):.6g}"
    for name, op in zip(network.names, network.ops, strict=True):
        exact = isinstance(op, operators.Translation | operators.Reordering)
        if exact and math.prod(op.out_shape) >= math.prod(op.in_shape):  # nothing is left out
            found[name] = "1"
            continue
        blocks = []
        if isinstance(op, operators.Dense):
            blocks = [np.asarray(op.matrix)[None]]
        elif isinstance(op, operators.CircularConv):
            paired = np.asarray(op.paired)
            blocks = [np.asarray(op.fixed), paired[:, 0] + 1j * paired[:, 1]]
        products = sum(block.size * min(block.shape[1:]) for block in blocks)
        if 0 < products <= _MOST_PRODUCTS:
            least = min(np.linalg.svd(block, compute_uv=False).min() for block in blocks if len(block))
            found[name] = f"{least:.6g}"
    return found


def _class_names(frozen: FrozenNetwork | None, certificate: dict, at_least: int) -> tuple[str, ...]:
    """Names of the classes: those saved with the network, else what the data set's own files say, if those are here.

    at_least: how many there must be.
    """
    if frozen is not None and frozen.class_names is not None:
        return frozen.class_names if len(frozen.class_names) >= at_least else ()
    name: Any = certificate["data"]["name"]
    config = certificate["config"].get("data", {})
    try:
        if name in PREPARED:
            folder = find_prepared(name, resolve_data_dir(config.get("data_dir", "")))
            return tuple((folder / "label.labels.txt").read_text().splitlines()) if folder else ()
        if config.get("name") == "folder":
            folders = pathlib.Path(config["path"]).expanduser().iterdir()
            return tuple(sorted(f.name for f in folders if f.is_dir() and not f.name.startswith(".")))
    except (OSError, ValueError, LookupError, TypeError):
        pass
    return ()


def finite(value: Any) -> TypeGuard[float]:
    """True for a JSON value that is a number."""
    return isinstance(value, int | float) and math.isfinite(value)
