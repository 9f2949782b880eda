"""The results that a run ends with: the table in the terminal, report.json and certified_accuracy.png."""

import pathlib
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from lipjax.certify import certified_accuracy
from lipjax.certify.radius import radius_key, radius_label
from lipjax.evaluation.classes import print_classes
from lipjax.files import replacing

# The column of what is proved of the program that one runs, not of exact arithmetic alone.
FLOAT32, NOT_PROVED = "proved for the float32 program, too", "not proved"
NOT_ATTACKED = "not attacked"


def part_of(count: int, total: int | None) -> str:
    """The number of images that a line is about: "50 of 359", or "all 359"; total None: unknown, as in older files."""
    if total is None:
        return f"{count}"
    return f"all {total}" if count == total else f"{count} of {total}"


def make_report(certificate, labels, radii, rows, attack, total: int) -> dict:
    """Accuracies of one run.

    Args:
      certificate: of test images, whose labels are `labels`. radii: l2, pixel units. total: of all test images.
      rows: which of these images were attacked. attack: AttackResult of these, as `Attacked.of_labels`; None: none.
    Returns: clean_accuracy; certified_accuracy and attacked_accuracy by `radius_key`, of which the latter is empty
      without an attack; attacked_clean_accuracy, of the attacked images; the numbers of images behind.
    """
    correct = certificate.predictions == labels
    attacked = {} if attack is None else attacked_accuracy(attack.distances, radii)
    proved = certificate.predictions, labels, certificate.radii
    certified = {radius_key(r): certified_accuracy(*proved, r) for r in radii}
    return {
        "clean_accuracy": float(np.mean(correct)),
        "certified_accuracy": certified,
        "attacked_accuracy": attacked,
        "attacked_clean_accuracy": float(np.mean(correct[rows])) if len(rows) else None,
        "radii": list(radii),
        "num_images": len(labels),
        "of": total,
        "num_attacked_images": len(rows),
    }


def add_float32(report: dict, found: dict) -> dict:
    """The report with what is known about its network in float32, and in front what is proved of that program, too.

    Args: found: of `deployment.deployment_report` with labels, or {"error": why there is none}.
    Returns: float32_clean_accuracy, the fraction of images that every float32 evaluation classifies correctly, and
      float32_certified_accuracy, that of images on which it does so inside the radius, by `radius_key`; both None
      where nothing is proved. Never above the accuracies in exact arithmetic. float32: `found`.
    """
    headline: dict[str, Any] = {"float32_clean_accuracy": None, "float32_certified_accuracy": None}
    if "error" not in found:
        rows = {radius_key(row["radius"]): row["accuracy"] for row in found["ball"]["radii"]}
        headline = {"float32_clean_accuracy": found["point"]["accuracy"], "float32_certified_accuracy": rows}
    return {**report, **headline, "float32": found}


def attacked_accuracy(distances: np.ndarray, radii) -> dict[str, float]:
    """Fraction of images of which no point of another class is known within a radius, by `radius_key`.

    Args: distances: (n,), as `Attacked.of_labels`, of points that were found in single precision.
    """
    return {radius_key(r): float(np.mean(distances > r * (1 + 1e-6))) for r in radii}


def summarize(found: list[dict]) -> dict:
    """The report of several runs: means where one run has numbers, "summary" (mean and sd, ddof 1), and the runs."""

    def both(values):
        return {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0}

    numbers, maps, first = ("clean_accuracy",), ("certified_accuracy", "attacked_accuracy"), found[0]
    if all(r.get("float32_certified_accuracy") for r in found):
        numbers, maps = (*numbers, "float32_clean_accuracy"), (*maps, "float32_certified_accuracy")
    summary: dict[str, Any] = {field: both([r[field] for r in found]) for field in numbers}
    for field in maps:  # under attack only what all runs have
        keys = [key for key in first[field] if all(key in r[field] for r in found)]
        summary[field] = {key: both([r[field][key] for r in found]) for key in keys}
    return {
        **{field: summary[field]["mean"] for field in numbers},
        **{field: {key: value["mean"] for key, value in summary[field].items()} for field in maps},
        **{field: first[field] for field in ("radii", "num_images", "of", "num_attacked_images") if field in first},
        "summary": summary,
        "seeds": [r["seed"] for r in found],
        "runs": found,
    }


def print_table(report: dict, console: Console | None = None) -> None:
    """One row per radius: proved below, attacked above; mean ± sd for the report of several runs."""
    summary: Any = report.get("summary")

    def cell(value, spread=None):
        text = f"{100 * value:.2f} %"
        return text if spread is None else f"{text} ± {100 * spread:.2f}"

    def entry(field, key=None):
        if report.get(field) is None:
            return NOT_PROVED
        found = report[field] if key is None else report[field][key]
        if summary is None:
            return cell(found)
        stats = summary[field] if key is None else summary[field][key]
        return cell(stats["mean"], stats["sd"])

    runs = f", mean ± sd of {len(report['seeds'])} runs" if summary else ""
    total = report.get("of")
    table = Table(title=f"Accuracy on {part_of(report['num_images'], total)} test images{runs}")
    table.add_column("l2 radius")
    for name in ("certified (proved)", FLOAT32, "under attack (upper bound)"):
        table.add_column(name, justify="right")
    clean = report.get("attacked_clean_accuracy")
    if clean is not None:
        attacked = cell(clean)
    else:  # an older report, or several runs
        attacked = entry("clean_accuracy") if report["num_attacked_images"] else NOT_ATTACKED
    table.add_row("0 (clean)", *map(entry, ("clean_accuracy", "float32_clean_accuracy")), attacked)
    for radius in report["radii"]:
        key = radius_key(radius)
        proved = (entry(field, key) for field in ("certified_accuracy", "float32_certified_accuracy"))
        attacked = entry("attacked_accuracy", key) if key in report["attacked_accuracy"] else NOT_ATTACKED
        table.add_row(radius_label(radius), *proved, attacked)
    console = console or Console()
    console.print(table)
    if report["num_attacked_images"] not in (0, report["num_images"]):
        console.print(f"The attack ran on {part_of(report['num_attacked_images'], total)} test images, drawn by hash.")
    if "per_class" in report:
        print_classes(report, radius_key(report["radii"][0]), radius_label(report["radii"][0]), console)
    found = report.get("float32")
    if found:
        console.print(float32_line(found), markup=False)


def float32_line(found: dict) -> str:
    """A sentence about what `deployment.deployment_report` found, or why it found nothing."""
    if "error" in found:
        return f"Nothing is proved for the float32 program: {found['error']}"
    bound, gap, ball = found["bound"]["largest"], found["gap"]["largest"], found["ball"]
    # 5 % more, so that rounding to two digits does not go below.
    proved = "no error bound" if bound is None else f"proved below {1.05 * bound:.2g}"
    measured = "logits that are not finite" if gap is None else f"logits {gap:.2g} off at most"
    kept = "" if ball["median_ratio"] is None else f", the median at {100 * ball['median_ratio']:.1f} % of its length"
    return (
        f"In float32 ({part_of(found['num_images'], found.get('of'))} images): {measured}, {proved}; "
        f"{ball['float32']} of {ball['certified']} radii are proved for float32, too{kept}."
    )


def plot_certified_accuracy(path: pathlib.Path, certificate, labels, attack, radii, total: int) -> None:
    """Certified accuracy over the radius, the attack's upper bound, and the radii of the table, as a PNG."""
    correct = certificate.predictions == labels
    shown = np.sort(np.where(correct, certificate.radii, 0.0))
    limit = 1.6 * max(radii)
    grid = np.linspace(0, limit, 400)
    proved = 1 - np.searchsorted(shown, grid, side="right") / len(shown)
    proved[0] = np.mean(correct)
    from matplotlib.figure import Figure  # here, because it takes half a second

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(grid, 100 * proved, label="certified (proved)")
    marks = np.array([0.0, *sorted(radii)])
    if attack is not None:
        upper = [100 * np.mean(attack.distances > r * (1 + 1e-6)) for r in marks]
        attacked = len(attack.distances)
        of = "" if attacked == len(labels) else f", {part_of(attacked, total)} images"
        axes.plot(marks, upper, "v--", label=f"under attack (upper bound{of})")
    for r in radii:
        axes.axvline(r, color="0.85", zorder=0)
    axes.set(xlabel="l2 radius, pixels in [0, 1]", ylabel=f"accuracy on {part_of(len(labels), total)} test images (%)")
    axes.set(xlim=(0, limit), ylim=(0, 101))
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
