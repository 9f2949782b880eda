"""The rows of comparisons (compare.py), kept in files of benchmarks/results/, and the pages of docs/ that show them."""

import collections
import contextlib
import fcntl
import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from lipjax.errors import UserError
from lipjax.evaluation import records
from lipjax.files import write_json

ROOT = pathlib.Path(__file__).resolve().parents[1]
LAYERS = "plain aoc n_activation cholesky bcop cayley soc_frequency aol sll cpl sandwich lot bro soc"
LOSSES = "emma emma_small margin logit_annealing offset_36 offset_108 offset_255 cll_low cll_high crm hkr"
STUDIES = {
    "layers": [f"compared:xs,1x1,{name}" for name in LAYERS.split()],
    "layers_3x3": [f"compared:xs,{name}" for name in LAYERS.split()],
    "losses": [f"losses:{name}" for name in LOSSES.split()],
}
"""Lists of configs by name; the results of each are benchmarks/results/<name>.json."""

PAGES = ("docs/layers.md", "docs/losses.md")
_SECTION = re.compile(r"(<!-- table: (?P<file>\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """Waits until no other comparison is inside with the same path, beside which a lock file stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f"{path.name}.lock"), "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)  # gone with the process, however that ends
        yield


class Results:
    """The rows of a results file, to which other processes may add, too: it is read and written anew with each row.

    A row is `records.record`, with config, fields, budget, costs and `provenance`; or "failed" in the place of numbers.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.rows: list[dict[str, Any]] = self._read()

    def _read(self) -> list[dict[str, Any]]:
        try:
            return json.loads(self.path.read_text(encoding="utf-8"))["rows"]
        except FileNotFoundError:
            return []
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path} is damaged ({error}): take it from the repository again.") from error

    def find(self, key: dict[str, Any], having: str | None = None) -> dict[str, Any] | None:
        """The first row that agrees with the key, and has the field `having`."""
        agree = (row for row in self.rows if all(row.get(name) == value for name, value in key.items()))
        return next((row for row in agree if having is None or having in row), None)

    def put(self, key: dict[str, Any], row: dict[str, Any]) -> None:
        """Writes a row in the place of the one with the same key."""
        with locked(self.path):
            self.rows = self._read()
            old = self.find(key)
            self.rows = [other for other in self.rows if other is not old] + [row]
            write_json(self.path, {"rows": self.rows})


def write_pages(pages: Iterable[pathlib.Path]) -> None:
    """Writes the tables of pages anew, with their pictures beside them."""
    for page in pages:
        text = page.read_text(encoding="utf-8")
        page.write_text(with_tables(text), encoding="utf-8")
        for found in _SECTION.finditer(text):
            write_pictures(page.parent, ROOT / found["file"])
        print(f"Written to {page}")


def with_tables(text: str, root: pathlib.Path = ROOT) -> str:
    """The text of a page with its tables written anew. root: what the names of results files are relative to."""
    return _SECTION.sub(lambda found: f"{found[1]}{section(root / found['file'])}{found[3]}", text)


def _groups(results: Results) -> list[tuple[str, list[dict[str, Any]], list[dict[str, Any]]]]:
    """(what is equal, in words; rows; those that did not fail, the best one first) for each budget.

    Rows with other fields than most say so in their names.
    """
    found = []
    for budget in dict.fromkeys(row["budget"] for row in results.rows):
        rows = [row for row in results.rows if row["budget"] == budget]
        fields, _ = collections.Counter(tuple(row["fields"]) for row in rows).most_common(1)[0]
        named = [{**row, "name": _named(row, fields)} for row in rows if "failed" not in row]
        good = sorted(named, key=lambda row: -row["proved"][0])
        changed = f", {', '.join(f'`{field}`' for field in fields)}" if fields else ""
        found.append((f"{budget} of training each{changed}", rows, good))
    return found


def _named(row: dict[str, Any], usual: Sequence[str]) -> str:
    """The name of a row, with the fields that the others do not have, or the names of those that it lacks."""
    own = [field.removeprefix("--config.") for field in row["fields"] if field not in usual]
    set_there = {field.partition("=")[0] for field in row["fields"]}
    lacking = [field.partition("=")[0] for field in usual if field.partition("=")[0] not in set_there]
    own += [f"{name.removeprefix('--config.')} of the config" for name in lacking]
    return f"{row['name']} ({', '.join(own)})" if own else row["name"]


def _on_one_axis(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether the validations of several rows certified at one radius."""
    return len(rows) > 1 and len({row["epsilon"] for row in rows}) == 1


def write_pictures(folder: pathlib.Path, path: pathlib.Path) -> None:
    """Writes the pictures that the section of a results file shows."""
    if path.stem.endswith("_costs"):
        return
    for number, (_, _, good) in enumerate(_groups(Results(path))):
        if len(good) > 1:
            records.plot_radii(folder / f"{path.stem}_{number}_radii.png", good)
        if _on_one_axis(good):
            records.plot_minutes(folder / f"{path.stem}_{number}_minutes.png", good)


def section(path: pathlib.Path) -> str:
    """Tables and pictures of a results file, a table for each budget, and what is missing."""
    results = Results(path)
    if path.stem.endswith("_costs"):
        study = path.stem.removesuffix("_costs")
        return _costs_section(study, _with_trained(results.rows, Results(path.with_name(f"{study}.json")).rows))
    parts = []
    for number, (words, rows, good) in enumerate(_groups(results)):
        parts.append(f"**{words}.** {_where(rows)}\n\n{records.markdown(good)}")
        bad = [row for row in rows if "failed" in row]
        parts += [f"\nFailed: {row['config']}, seed {row['seed']}: {row['failed']}\n" for row in bad]
        stem = f"{path.stem}_{number}"
        if len(good) > 1:
            parts.append(f"\n![Certified accuracy over the radius]({stem}_radii.png)\n")
        if _on_one_axis(good):
            parts.append(f"\n![Certified accuracy over the minutes of training]({stem}_minutes.png)\n")
        parts.append(_missing(path.stem, rows) + "\n")
    if not parts:
        parts.append(records.markdown([]) + _missing(path.stem, []) + "\n")
    return "\n" + "".join(parts)


def _with_trained(rows: Sequence[dict[str, Any]], trained: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of costs, and what the first run of a config that has none of them has cost."""
    found: dict[str, dict[str, Any]] = {}
    for row in trained:
        if "failed" not in row:
            found.setdefault(row["config"], row)
    measured = {row["config"] for row in rows}
    return [*rows, *(row for config, row in found.items() if config not in measured)]


def _costs_section(study: str, rows: Sequence[dict[str, Any]]) -> str:
    good = [row for row in rows if "failed" not in row]
    parts = [f"{_where(rows)}\n\n" if rows else "", records.markdown(good, records.COSTS)]
    parts += [f"\nFailed: {row['config']}: {row['failed']}\n" for row in rows if "failed" in row]
    return "\n" + "".join(parts) + _missing(study, rows) + "\n"


def _missing(study: str, rows: Sequence[dict[str, Any]]) -> str:
    missing = [config for config in STUDIES.get(study, []) if config not in {row["config"] for row in rows}]
    return f"\nNot measured yet: {', '.join(f'`{config}`' for config in missing)}.\n" if missing else ""


def _where(rows: Sequence[dict[str, Any]]) -> str:
    commits = ", ".join(dict.fromkeys(c for row in rows for c in row["commit"].split(", ")))
    hardware = "; ".join(dict.fromkeys(row["hardware"] for row in rows))
    loads = sorted(row["load"] for row in rows)
    return (
        f"Commit {commits}; {hardware}; load average when a run began: {loads[0]:g} to {loads[-1]:g}; all numbers "
        "are in the results file."
    )
