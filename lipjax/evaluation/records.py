"""The numbers of a run in one record, from the files that it wrote; tables and pictures of many records."""

import bisect
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lipjax.certify.radius import certified_accuracy, radius_label
from lipjax.errors import UserError
from lipjax.files import replacing
from lipjax.training.clock import read_clock, read_rows
from lipjax.training.metrics import FILE_NAME

NOT_MEASURED = "–"
"""The cell of a table for what is not known."""

Record = Mapping[str, Any]
"""As `record` makes it. A benchmark may add fields, of which a table shows those that `columns` knows."""


def record(name: str, seed: int, epsilon: float | None, report: Mapping[str, Any], directory: pathlib.Path) -> dict:
    """The record of a certified run, for JSON.

    Args: name: for tables. epsilon: config.loss.epsilon, the radius that validation certifies at. report: report.json.
      directory: of the run, with metrics.jsonl and clock.jsonl, which may be missing.
    Returns: name, seed, step; radii; clean, proved, float32, attacked: fractions of images, the latter three as lists
      over the radii or None; images, of, attacked_images; training: minutes, processor_minutes, epochs, and the
      seconds of one epoch, or None; curve: of each validation [step, minutes, processor minutes, accuracy, certified
      accuracy by estimates]; frontier: as `frontier`; epsilon.
    Raises: UserError if the report lacks a number.
    """
    try:
        step, radii = int(report["step"]), [float(radius) for radius in report["radii"]]
        found = {
            "name": name,
            "seed": seed,
            "step": step,
            "radii": radii,
            "clean": report["clean_accuracy"],
            "proved": _over(report["certified_accuracy"], radii),
            "float32": _over(report.get("float32_certified_accuracy"), radii),
            "attacked": _over(report.get("attacked_accuracy"), radii),
            "images": report["num_images"],
            "of": report.get("of"),
            "attacked_images": report.get("num_attacked_images", 0),
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{directory}/report.json is damaged ({error!r}). Certify the run again.") from error
    clock, rows = read_clock(directory), _metrics(directory)
    ends = {row["step"] for row in rows}
    found |= {"training": training_time(clock, ends, step), "curve": curve(rows, clock)}
    return found | {"frontier": frontier(directory, 1.25 * max(radii, default=1.0)), "epsilon": epsilon}


def frontier(directory: pathlib.Path, last: float) -> list[list[float]]:
    """Certified accuracy over the radius, 65 pairs from 0 to the last, by a run's certificate.json; [] without one."""
    try:
        images = json.loads((directory / "certificate.json").read_text(encoding="utf-8"))["images"]
        predicted, labels, radii = (np.array([row[key] for row in images]) for key in ("prediction", "label", "radius"))
        places = np.linspace(0, last, 65).round(6).tolist()
        return [[place, certified_accuracy(predicted, labels, radii, place)] for place in places]
    except (OSError, ValueError, TypeError, LookupError):  # `lipjax check` says what is wrong with it
        return []


def _over(by_radius: Mapping[str, float] | None, radii: Sequence[float]) -> list[float] | None:
    """The values of a map of report.json, whose keys are in the order of the radii; None where there is none."""
    if not by_radius:
        return None
    if len(by_radius) != len(radii):
        raise ValueError(f"{len(by_radius)} values for {len(radii)} radii")
    return [float(value) for value in by_radius.values()]


def training_time(clock: Sequence[Record], ends: Iterable[int] = (), step: int = 0) -> dict[str, Any] | None:
    """The time of all training steps: the mean of those that were measured, in each epoch, for all of its steps.

    Args: clock: lines of clock.jsonl. ends: steps at which epochs ended, of which some may have no line. step: one
      that training reached.
    Returns: minutes, processor_minutes; epochs; epoch_seconds and epoch_processor_seconds, means over all steps; None
      without a line.
    """
    ends = {*ends, *(row["step"] for row in clock)}
    times = _times(clock, {*ends, step})
    if not times:
        return None
    last, seconds, processor = times[-1]
    epochs = last / math.gcd(*ends)
    return {
        "minutes": seconds / 60,
        "processor_minutes": processor / 60,
        "epochs": round(epochs),
        "epoch_seconds": seconds / epochs,
        "epoch_processor_seconds": processor / epochs,
    }


def _times(clock: Sequence[Record], steps: Iterable[int]) -> list[tuple[Any, Any, Any]]:
    """(step, seconds, processor seconds) from the start to each of the steps; [] without a line.

    Steps before the end of a line took what that line says, and those after the last one what the last one says.
    """
    if not clock:
        return []
    lines = [row["step"] for row in clock]
    before, spent, found = 0, (0.0, 0.0), []
    for step in sorted({*steps, *lines}):
        row = clock[min(bisect.bisect_left(lines, step), len(clock) - 1)]
        share = (step - before) / row["steps"]
        spent = spent[0] + share * row["seconds"], spent[1] + share * row["processor_seconds"]
        before = step
        found.append((before, *spent))
    return found


def _metrics(directory: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that have a step, each the end of an epoch; damaged ones are passed over."""
    rows = read_rows(pathlib.Path(directory) / FILE_NAME)
    return [row for row in rows if isinstance(row.get("step"), int)]


def curve(rows: Sequence[Record], clock: Sequence[Record]) -> list[list]:
    """[step, minutes, processor minutes, accuracy, certified accuracy by estimates] of each validation.

    Args: rows: lines of metrics.jsonl. clock: lines of clock.jsonl, without which there is no curve.
    """
    spent = _times(clock, [row["step"] for row in rows])
    times = {step: (seconds / 60, processor / 60) for step, seconds, processor in spent}
    found = []
    for row in rows:
        try:
            if row["split"] == "validation" and row["step"] in times:
                numbers = row["accuracy"], row["certified_accuracy_estimate"]
                found.append([row["step"], *times[row["step"]], *map(float, numbers)])
        except (ValueError, KeyError, TypeError):
            continue
    return found


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a table: its title, and the text of a record's cell."""

    title: str
    cell: Any  # Record -> str


def percent(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{100 * value:.2f}"


def _list(name: str):
    def cell(row: Record) -> str:
        values = row.get(name)
        return NOT_MEASURED if not values else " / ".join(percent(value) for value in values)

    return cell


def number(name: str, digits: int = 3, group: str | None = None):
    """The cell of a number: `digits` that count, all of an integer; a field of a record, or of a group in it."""

    def cell(row: Record) -> str:
        value = (row.get(group) or {}).get(name) if group else row.get(name)
        if not isinstance(value, int | float):
            return NOT_MEASURED
        if isinstance(value, int):
            return f"{value:,}"
        rounded = float(f"{value:.{digits}g}")
        return f"{rounded:,.0f}" if abs(rounded) >= 10 ** (digits - 1) else f"{rounded:g}"

    return cell


def radii_title(records: Sequence[Record]) -> str:
    """The radii of the records, which must be the same. Raises: UserError if they are not."""
    found = {tuple(row["radii"]) for row in records}
    if len(found) > 1:
        raise UserError(
            f"The runs are certified at different radii, {sorted(found)}: set config.certify.radii to the same ones "
            "and certify them again."
        )
    return ", ".join(radius_label(radius) for radius in next(iter(found), ()))


def _share(row: Record) -> str:
    value = (row.get("costs") or {}).get("parametrisation_share")
    return NOT_MEASURED if value is None else f"{100 * value:.0f}"


RUN = Column("run", lambda row: str(row["name"]))
COSTS = (
    RUN,
    Column("parameters", number("parameters", group="costs")),
    Column("processor s / epoch", number("epoch_processor_seconds", 3, "costs")),
    Column("parametrisation, % of a step", _share),
    Column("frozen: images / processor s", number("images_per_processor_second", 3, "costs")),
    Column("freezing, processor s", number("freezing_seconds", 2, "costs")),
    Column("proof of the norms, processor s", number("proof_seconds", 2, "costs")),
)
"""The columns of `benchmarks/costs.py`, in the group "costs" of a record."""


def columns(records: Sequence[Record]) -> list[Column]:
    """The columns of what runs reached, and of the time of their training."""
    radii = radii_title(records)
    known = [
        RUN,
        Column("seed", lambda row: str(row["seed"])),
        Column("clean, %", lambda row: percent(row["clean"])),
        Column(f"proved at {radii}", _list("proved")),
        Column("float32, too", _list("float32")),
        Column("attacked", _list("attacked")),
        Column("test images (attacked)", lambda row: f"{row['images']:,} ({row['attacked_images']:,})"),
        Column("epochs", number("epochs", group="training")),
        Column("processor min", number("processor_minutes", 3, "training")),
        Column("min", number("minutes", 3, "training")),
        Column("processor s / epoch", number("epoch_processor_seconds", 3, "training")),
    ]
    return known


def markdown(records: Sequence[Record], shown: Sequence[Column] | None = None) -> str:
    """The records as a table in Markdown, in their order; of no records, a sentence that says so.

    shown: the columns, of which those without any number are left out; default: `columns`.
    """
    if not records:
        return "Nothing is measured yet.\n"
    known = columns(records) if shown is None else shown
    shown = [c for c in known if any(c.cell(row) != NOT_MEASURED for row in records)]
    rows = [[c.title for c in shown], ["---"] * 1 + ["---:"] * (len(shown) - 1)]
    rows += [[c.cell(row) for c in shown] for row in records]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |\n" for row in rows)


def plot_radii(path: pathlib.Path, records: Sequence[Record], title: str = "") -> None:
    """Certified accuracy over the radius, a line for each record, and clean accuracy at radius 0, as a PNG."""
    figure, axes = _figure()
    shown = [row for row in records if row.get("proved")]
    for row, own in zip(shown, _styles(shown), strict=True):
        points = [(0.0, row["clean"]), *zip(row["radii"], row["proved"], strict=True)]
        points += [tuple(point) for point in row.get("frontier") or ()]
        points.sort(key=lambda point: (point[0], -point[1]))  # at 0 the accuracy, then what is certified
        marks = [i for i, (radius, _) in enumerate(points) if radius in row["radii"]]
        x, y = [radius for radius, _ in points], [100 * accuracy for _, accuracy in points]
        axes.plot(x, y, marker="o", markersize=3, markevery=marks, **own)
    axes.set(xlabel="l2 radius, pixels in [0, 1]", ylabel="certified accuracy, test images (%)", title=title)
    _save(figure, axes, path)


def plot_minutes(path: pathlib.Path, records: Sequence[Record], title: str = "", processor: bool = True) -> None:
    """Certified accuracy of the validation images, by estimates, over the minutes of training, as a PNG.

    processor: minutes of the processor; else of the clock. Raises: UserError if validations certified at other radii.
    """
    found = sorted({row["epsilon"] for row in records if row["curve"] and row.get("epsilon") is not None})
    if len(found) > 1:
        raise UserError(
            f"The runs validated at different radii, {found}, so that their curves cannot be compared: choose runs "
            "with the same config.loss.epsilon."
        )
    figure, axes = _figure()
    shown = [row for row in records if row["curve"]]
    for row, own in zip(shown, _styles(shown), strict=True):
        minutes = [point[2 if processor else 1] for point in row["curve"]]
        certified = [100 * point[4] for point in row["curve"]]
        axes.plot(minutes, certified, marker="o", markersize=3, **own)
    radius = f" at {radius_label(found[0])}" if found else ""
    unit = "processor minutes" if processor else "minutes"
    axes.set(xlabel=f"{unit} of training steps", ylabel=f"certified{radius}, validation, by estimates (%)", title=title)
    _save(figure, axes, path)


def _styles(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The look of each record's line: of a run's seeds the first has a label, the others are paler.

    Ten colours, then the same ones dashed, so that no two of twenty runs are alike.
    """
    seeds: dict[str, list[int]] = {}
    for row in records:
        seeds.setdefault(row["name"], []).append(row["seed"])
    styles = []
    for row in records:
        number, of_run = list(seeds).index(row["name"]), seeds[row["name"]]
        own: dict[str, Any] = {"color": f"C{number % 10}", "linestyle": ("-", "--")[number // 10 % 2]}
        if row["seed"] == of_run[0]:
            all_of_run = sorted(set(of_run))
            own["label"] = f"{row['name']}, seed{'s' * (len(all_of_run) > 1)} {', '.join(map(str, all_of_run))}"
        else:
            own["alpha"] = 0.4
        styles.append(own)
    return styles


def _figure():
    from matplotlib.figure import Figure  # here, because it takes half a second

    figure = Figure(figsize=(7.6, 4.8), layout="constrained")
    return figure, figure.add_subplot()


def _save(figure, axes, path: pathlib.Path) -> None:
    axes.set_ylim(bottom=0)
    axes.grid(color="0.9")
    if labels := axes.get_legend_handles_labels()[1]:
        figure.set_figheight(figure.get_figheight() + 0.09 * len(labels))
        figure.legend(loc="outside lower center", fontsize="x-small", ncols=2, handlelength=3)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
