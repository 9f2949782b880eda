"""lipjax compare: runs side by side: by what their configs differ, what validation and what test images say.

What it writes is made by `records`, as the tables of benchmarks/compare.py are.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lipjax.certify.radius import radius_label
from lipjax.errors import UserError
from lipjax.evaluation import records
from lipjax.files import replacing, write_json
from lipjax.training.config import load_config
from lipjax.training.metrics import validation_metrics
from lipjax.training.same_run import flat, plain

ADVICE = "Choose by the rows of the validation images: who chooses by test images has none left to test on."
_NONE = "-"


@dataclasses.dataclass(frozen=True)
class ComparedRun:
    """A run: its name and directory, config by "group.field", seed, and report.json; {} before it is certified."""

    name: str
    directory: pathlib.Path
    config: dict[str, Any]
    seed: int
    report: dict


def read_compared(directory: pathlib.Path, name: str | None = None) -> ComparedRun:
    """Reads a run. name: what tables call it; None: its directory.

    Raises: UserError if the directory holds no run, or a file in it is damaged.
    """
    config, seed = load_config(directory)
    path = directory / "report.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(report, dict):
            raise ValueError(f"expected an object, got {type(report).__name__}")
    except FileNotFoundError:
        report = {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}). Certify the run again: lipjax certify {directory}") from error
    if report.get("validation") is None and isinstance(report.get("step"), int):  # of an older lipjax
        report["validation"] = validation_metrics(directory, report["step"])
    return ComparedRun(name or str(directory), directory, flat(plain(config)), seed, report)


def rows(runs: Sequence[ComparedRun]) -> dict[str, list[tuple[str, list[str]]]]:
    """(label, a text for each run) by section: "config", "validation", "test"."""

    def row(values) -> list[str]:
        return [_NONE if value is None else value for value in values]

    fields = [name for run in runs for name in run.config if name != "seeds"]
    config = []
    for field in dict.fromkeys(fields):
        values = [run.config.get(field, _NONE) for run in runs]
        if any(value != values[0] for value in values):
            config.append((field, [value if value is _NONE else json.dumps(value) for value in values]))
    if len({run.seed for run in runs}) > 1:
        config.append(("seed", [str(run.seed) for run in runs]))

    measured = [run.report.get("validation") or {} for run in runs]
    validation = [("step", row(_whole(run.report.get("step")) for run in runs))]
    for name in dict.fromkeys(name for found in measured for name in found):
        validation.append((name, row(_metric(name, found.get(name)) for found in measured)))

    test = [
        ("images", row(_whole(run.report.get("num_images")) for run in runs)),
        ("accuracy", row(_percent(run.report.get("clean_accuracy")) for run in runs)),
    ]
    by_radius = [_by_radius(run) for run in runs]
    for radius in sorted({radius for found in by_radius for radius in found}):
        for kind in ("proved", "proved for float32, too"):
            values = row(_percent(found.get(radius, {}).get(kind)) for found in by_radius)
            if set(values) != {_NONE}:
                test.append((f"{kind}, at {radius_label(radius)}", values))
    return {"config": config, "validation": validation, "test": test}


def _by_radius(run: ComparedRun) -> dict[float, dict[str, float | None]]:
    """{radius: {"proved": ..., "proved for float32, too": ...}} of a report."""
    try:
        radii, proved = run.report.get("radii", []), run.report.get("certified_accuracy", {}).values()
        found = {float(r): {"proved": value} for r, value in zip(radii, proved, strict=True)}
        for radius, value in zip(radii, (run.report.get("float32_certified_accuracy") or {}).values(), strict=False):
            found[float(radius)]["proved for float32, too"] = value
        return found
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        raise UserError(f"{run.name}/report.json is damaged ({error}). Certify the run again.") from error


def _percent(value) -> str | None:
    return f"{100 * value:.2f} %" if isinstance(value, int | float) else None


def _whole(value) -> str | None:
    return f"{value:,}" if isinstance(value, int) else None


def _metric(name: str, value) -> str | None:
    if not isinstance(value, int | float):
        return None
    return _percent(value) if "accuracy" in name else f"{value:.4g}"


def print_comparison(runs: Sequence[ComparedRun], console: Console) -> None:
    """One column for each run, and how to read it."""
    table = Table()
    table.add_column("", no_wrap=True)
    for run in runs:
        table.add_column(Text(run.name), justify="right", overflow="fold")
    titles = {"config": "config", "validation": "validation images (select by these)", "test": "test images"}
    for section, found in rows(runs).items():
        table.add_section()
        table.add_row(Text(titles[section], style="bold"))
        for label, values in found or [("no difference", [""] * len(runs))]:
            table.add_row(Text(f"  {label}"), *map(Text, values))
    if not console.is_terminal:  # a file has no edge
        console.width = max(console.width, 40 + 30 * len(runs))
    console.print(table)
    console.print(ADVICE)


def write_comparison(runs: Sequence[ComparedRun], stem: pathlib.Path) -> list[pathlib.Path]:
    """Writes STEM.md, STEM.json, STEM_radii.png and, if all runs validated at one radius, STEM_minutes.png.

    Returns: the paths. Raises: UserError if a run is not certified, or they are certified at different radii.
    """
    missing = [run.name for run in runs if not run.report]
    if missing:
        raise UserError(f"{missing[0]} is not certified, which --write needs: lipjax certify {missing[0]}")
    found = []
    for run in runs:
        row = records.record(run.name, run.seed, run.config["loss.epsilon"], run.report, run.directory)
        found.append(row)
    table = records.markdown(found)
    paths = [stem.with_name(f"{stem.name}{end}") for end in (".md", ".json", "_radii.png", "_minutes.png")]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    with replacing(paths[0]) as temporary:
        temporary.write_text(table, encoding="utf-8")
    write_json(paths[1], {"rows": found})
    records.plot_radii(paths[2], found)
    if len({row["epsilon"] for row in found}) > 1:
        return paths[:3]
    records.plot_minutes(paths[3], found)
    return paths
