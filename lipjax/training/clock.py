"""The time that training steps take, without compilation and validation: clock.jsonl, a line an epoch."""

import json
import os
import pathlib
import time
from typing import Any

from lipjax.errors import UserError

FILE_NAME = "clock.jsonl"


class Clock:
    """Measures the steps of one process, from the end of one to the end of the next, and writes a line an epoch.

    Saves within an epoch, which go on beside the steps, count with them. The first step of a process is left out, since
    it is compiled; so are steps of an epoch that an earlier process did not finish. What counts is therefore the mean
    of the steps that were measured.

    workdir: of the run; None: nothing is written. resume_step: lines of later steps are dropped, since they come again.
    """

    def __init__(self, workdir: str | os.PathLike[str] | None, resume_step: int | None = None):
        self._path = None if workdir is None else pathlib.Path(workdir) / FILE_NAME
        if self._path is not None and self._path.exists():
            kept = [row for row in read_clock(self._path.parent) if row["step"] <= (resume_step or 0)]
            _write(self._path, kept, "w")
        self._mark: tuple[float, float] | None = None
        self._warm, self._steps, self._spent = False, 0, (0.0, 0.0)

    def begin(self) -> None:
        """Must be called before each step: begins to measure, if nothing is measured since the end of an epoch."""
        if self._warm and self._mark is None:
            self._mark = _now()

    def step(self) -> None:
        """A step has ended, and the next one runs already."""
        now = _now()
        if self._mark is not None:
            self._steps += 1
            self._spent = self._spent[0] + now[0] - self._mark[0], self._spent[1] + now[1] - self._mark[1]
        self._warm, self._mark = True, now

    def epoch(self, step: int) -> None:
        """Writes the line of an epoch that has ended with this step, if one of its steps was measured.

        What follows counts again from the next `begin` on: validation and saving do not.
        """
        if self._steps and self._path is not None:
            seconds, processor = self._spent
            row = {"step": step, "steps": self._steps, "seconds": seconds, "processor_seconds": processor}
            _write(self._path, [row], "a")
        self._mark, self._steps, self._spent = None, 0, (0.0, 0.0)


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _write(path: pathlib.Path, rows: list[dict[str, Any]], mode: str) -> None:
    try:
        with path.open(mode, encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror or error}); free some space.") from error


def read_clock(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of clock.jsonl: "step" at the end of an epoch, "steps" that were measured, and their time in seconds.

    "seconds" are of the clock, "processor_seconds" of all threads of the process. Lines that are damaged are passed
    over: no claim rests on them. [] without a file.
    """
    names = ("step", "steps", "seconds", "processor_seconds")
    return [
        {name: row[name] for name in names}
        for row in read_rows(pathlib.Path(workdir) / FILE_NAME)
        if all(isinstance(row.get(name), int | float) for name in names) and row["steps"] > 0
    ]


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """The objects that the lines of a file hold; damaged lines are passed over. [] without the file."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            found.append(row)
    return found
