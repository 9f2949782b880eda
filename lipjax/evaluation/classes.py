"""Accuracies class by class, and which classes are taken for which others."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

# The terminal shows all classes up to so many; of more, the lowest few.
_SHOWN, _LOWEST = 10, 5


def class_report(
    predictions: np.ndarray,
    labels: np.ndarray,
    proved: np.ndarray,
    radii: Mapping[str, float],
    num_classes: int,
    names: Sequence[str] | None = None,
) -> dict:
    """The entry of report.json about classes.

    Args:
      predictions, labels, proved: (n,), of each image: classes, and the certified radius.
      radii: by their keys in report.json. names: of the classes.
    Returns:
      per_class: a row for each class: class, name, num_images, clean_accuracy, certified_accuracy by key; accuracies
        are None without an image.
      mean_over_classes: clean_accuracy and certified_accuracy, the means of these over the classes with an image.
      confusion: (k, k) integers, [i][j] the number of images of class i that are taken for class j.
    """
    right = predictions == labels
    rows: list[dict[str, Any]] = []
    for label in range(num_classes):
        own = labels == label

        def share(what, own=own):
            return float(np.mean(what[own])) if own.any() else None

        rows.append(
            {
                "class": label,
                "name": None if names is None else names[label],
                "num_images": int(own.sum()),
                "clean_accuracy": share(right),
                "certified_accuracy": {key: share(right & (proved > r)) for key, r in radii.items()},
            }
        )
    present = [row for row in rows if row["num_images"]]

    def mean(values):  # rounded once, so that a checker finds the same number
        return math.fsum(values) / len(present)

    means = {key: mean(row["certified_accuracy"][key] for row in present) for key in radii}
    clean = mean(row["clean_accuracy"] for row in present)
    return {
        "per_class": rows,
        "mean_over_classes": {"clean_accuracy": clean, "certified_accuracy": means},
        "confusion": confusion_matrix(predictions, labels, num_classes).tolist(),
    }


def confusion_matrix(predictions: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """(k, k) integers: [i, j] is the number of images of class i that are taken for class j."""
    flat = np.bincount(num_classes * np.asarray(labels, np.int64) + predictions, minlength=num_classes**2)
    return flat.reshape(num_classes, num_classes)


def shown_name(row: dict) -> str:
    """The name of a class for people; what could steer a terminal is spelled out."""
    name = f"class {row['class']}" if row["name"] is None else row["name"]
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in name)


def print_classes(report: dict, key: str, label: str, console: Console) -> None:
    """A row for each class, or for the lowest of many: accuracies, and what it is most often taken for.

    Args: report: with what `class_report` returns. key, label: of the radius that is shown.
    """
    rows, confusion = report["per_class"], np.array(report["confusion"])
    shown = rows
    if len(rows) > _SHOWN:
        with_images = [row for row in rows if row["num_images"]]
        shown = sorted(with_images, key=lambda row: (row["certified_accuracy"][key], row["clean_accuracy"]))[:_LOWEST]
    title = "Classes" if shown is rows else f"The lowest {len(shown)} of {len(rows)} classes (report.json has all)"
    table = Table(title=title)
    table.add_column("class")
    for column in ("images", "clean", f"certified at {label}"):
        table.add_column(column, justify="right")
    table.add_column("most often taken for")
    for row in shown:
        others = confusion[row["class"]].copy()
        others[row["class"]] = 0
        rival = int(np.argmax(others))
        values = (row["clean_accuracy"], row["certified_accuracy"][key])
        cells = ["-" if value is None else f"{100 * value:.2f} %" for value in values]
        taken = f"{shown_name(rows[rival])} ({others[rival]})" if others[rival] else ""
        table.add_row(*map(Text, (shown_name(row), str(row["num_images"]), *cells, taken)))
    console.print(table)
