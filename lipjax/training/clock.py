"""The time that training steps take, without compilation, validation and saving: clock.jsonl, a line an epoch."""

import json
import os
import pathlib
import time
from typing import Any

from lipjax.errors import UserError

FILE_NAME = "clock.jsonl"


class Clock:
    """Measures the steps of one process, from the end of one to the end of the next, and writes a line an epoch.

    The first step of a process is left out, since it is compiled; so are steps of an epoch that an earlier process
    did not finish. What counts is therefore the mean of the steps that were measured.

    workdir: of the run; None: nothing is written. resume_step: lines of later steps are dropped, since they come again.
    """

    def __init__(self, workdir: str | os.PathLike[str] | None, resume_step: int | None = None):
        self._path = None if workdir is None else pathlib.Path(workdir) / FILE_NAME
        if self._path is not None and self._path.exists():
            kept = [row for row in read_clock(self._path.parent) if row["step"] <= (resume_step or 0)]
            _write(self._path, kept, "w")
        self._mark: tuple[float, float] | None = None
        self._steps, self._spent = 0, [0.0, 0.0]

    def start(self) -> None:
        """Begins to measure: nothing is running that was begun before."""
        self._mark = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        """Leaves out what follows, until the next `start`."""
        self._mark = None

    def step(self) -> None:
        """A step has ended, and the next one runs already."""
        now = time.perf_counter(), time.process_time()
        if self._mark is not None:
            self._steps += 1
            self._spent = [spent + end - begin for spent, end, begin in zip(self._spent, now, self._mark, strict=True)]
        self._mark = now

    def epoch(self, step: int) -> None:
        """Writes the line of an epoch that ends with this step, if one of its steps was measured."""
        if self._steps and self._path is not None:
            seconds, processor = self._spent
            row = {"step": step, "steps": self._steps, "seconds": seconds, "processor_seconds": processor}
            _write(self._path, [row], "a")
        self._steps, self._spent = 0, [0.0, 0.0]


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
    try:
        lines = (pathlib.Path(workdir) / FILE_NAME).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and all(isinstance(row.get(name), int | float) for name in names) and row["steps"] > 0:
            found.append({name: row[name] for name in names})
    return found
