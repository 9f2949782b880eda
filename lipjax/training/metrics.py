"""Writers for the numbers of a run: metrics.jsonl (the record), TensorBoard files, and the terminal."""

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.summary import scalar as scalar_summary

from lipjax.errors import UserError
from lipjax.files import replacing
from lipjax.training import damage
from lipjax.training.clock import Clock
from lipjax.training.terminal import progress_of

FILE_NAME = "metrics.jsonl"
_MANY = 100  # more epochs have no line each


class MetricWriter:
    """Writes scalars of one run; use it as a context manager. In a multi-process run only process 0 writes.

    A metric that rests on an estimate (of a norm, hence of a radius) carries the suffix "_estimate" in its name.
    """

    def __init__(
        self, workdir: str | os.PathLike[str], *, resume_step: int | None = None, console: Console | None = None
    ):
        """Opens the files under `workdir`.

        Args:
          workdir: created if it does not exist.
          resume_step: the step the run goes on from: what an earlier process wrote of later steps is dropped, since
            this run writes them again. None starts anew and drops everything.
          console: where progress is shown (default: the standard output).
        Raises: UserError if the files cannot be written.
        """
        self._active = jax.process_index() == 0
        self._clock = Clock(workdir if self._active else None, resume_step)
        self._console = Console() if console is None else console
        if not self._active:
            return
        self._path = Path(workdir) / FILE_NAME
        with self._writing():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _keep_until(self._path, -1 if resume_step is None else resume_step, self._console)
            self._file = self._path.open("a", encoding="utf-8")
            self._board = self._open_board(resume_step)

    def write(self, step: int, scalars: Mapping[str, Any], split: str = "train") -> None:
        """Appends one line {"step": ..., "split": ..., **scalars} and flushes it; a value that is not finite is null.

        Args:
          step: number of optimizer steps done.
          scalars: name → number (a scalar array is fetched from its device).
          split: "train", "validation" or "test"; TensorBoard shows "split/name".
        Raises: UserError if the file cannot be written (a full disk).
        """
        reserved = {"step", "split"} & set(scalars)
        if reserved:
            raise ValueError(f"{sorted(reserved)[0]!r} is a field of every line and cannot name a metric")
        if split == "train":
            self._clock.epoch(step)
        if not self._active:
            return
        values = {name: float(value) for name, value in scalars.items()}
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        line = dict.fromkeys(values) | finite
        with self._writing():
            self._file.write(json.dumps({"step": int(step), "split": split, **line}) + "\n")
            self._file.flush()
            for name, value in finite.items():
                summary = scalar_summary(f"{split}/{name}", value)
                self._board.write_event(Event(wall_time=time.time(), step=int(step), summary=summary))
            self._board.flush()

    @contextlib.contextmanager
    def progress(self, total_steps: int, first_step: int = 0) -> Iterator["TrainingProgress"]:
        """Shows a bar while training if the output is a terminal; elsewhere `TrainingProgress.epoch` prints lines."""
        console = progress_of(self._console)
        if not (self._active and console.is_terminal):
            yield TrainingProgress(console if self._active else None, None, None, self._clock)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        numbers = TextColumn("{task.fields[shown]}"), TextColumn("{task.fields[epoch]}")
        with Progress(*columns, *numbers, console=console) as bar:
            task = bar.add_task("training", total=total_steps, completed=first_step, shown="", epoch="")
            yield TrainingProgress(console, bar, task, self._clock)

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._active:
            with self._writing():
                self._file.close()
                self._board.close()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None):
        try:
            self.close()
        except UserError:
            if error is None:
                raise

    def _open_board(self, resume_step: int | None) -> EventsWriter:
        """Opens an event file without SummaryWriter, whose thread dies on a full disk and leaves the caller waiting."""
        directory = self._path.parent / "tensorboard"
        directory.mkdir(exist_ok=True)
        first_step = 0 if resume_step is None else resume_step + 1
        board = EventsWriter(str(directory / "events"), f".{os.getpid()}.{first_step}")
        # TensorBoard hides what earlier files hold from this step on.
        board.write_event(
            Event(wall_time=time.time(), step=first_step, session_log=SessionLog(status=SessionLog.START))
        )
        return board

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write {self._path} ({error.strerror or error}); free some space or choose another --workdir"
            ) from error


class TrainingProgress:
    """The terminal's view of one training; `MetricWriter.progress` makes it."""

    def __init__(self, console: Console | None, bar: Progress | None, task: TaskID | None, clock: Clock | None = None):
        self._console, self._bar, self._task = console, bar, task
        self._clock = Clock(None) if clock is None else clock
        self._epochs = 0

    def step(self, step: int, **shown: float) -> None:
        """Moves the bar to `step` optimizer steps and shows the given numbers beside it, e.g. loss and accuracy.

        Must be called when that step has ended, for the clock.
        """
        self._clock.step()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step)
            if shown:
                self._bar.update(self._task, shown=_numbers(shown))

    def training(self, first: bool) -> contextlib.AbstractContextManager[None]:
        """The context in which a step begins; the first one of a process says that it is compiled."""
        self._clock.begin()
        return self.compiling("the training step") if first else contextlib.nullcontext()

    @contextlib.contextmanager
    def compiling(self, what: str) -> Iterator[None]:
        """Says that something is compiled, as long as it takes, and then how long it took: in one line."""
        if self._console is None:
            yield
            return
        start, line = time.perf_counter(), f"Compiling {what} ..."
        if self._bar is not None and self._task is not None:  # the line moves below until it is complete
            self._bar.update(self._task, shown=line)
        else:
            self._console.print(line, end="", markup=False)
        try:
            yield
        except BaseException:
            if self._bar is None:
                self._console.print()
            raise
        took = f" {time.perf_counter() - start:.1f} s"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, shown="")
            took = line + took
        self._console.print(took, markup=False)

    def epoch(self, epoch: int, num_epochs: int, scalars: Mapping[str, Any]) -> None:
        """Shows the numbers of a finished epoch (1 to num_epochs): beside the bar, or as a line where there is none.

        Of more than 100 epochs each tenth has a line, and the first and the last one that this process trains.
        metrics.jsonl holds all of them.
        """
        self._epochs += 1
        if self._bar is not None and self._task is not None:
            validated = {name.removeprefix("val_"): value for name, value in scalars.items() if name.startswith("val_")}
            said = f"  validation: {_numbers(validated)}" if validated else ""
            self._bar.update(self._task, epoch=f"epoch {epoch}/{num_epochs}{said}")
        elif self._console is not None:
            if num_epochs <= _MANY or epoch % 10 == 0 or epoch == num_epochs or self._epochs == 1:
                text = f"epoch {epoch}/{num_epochs}  {_numbers(scalars)}"
                self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _keep_until(path: Path, last_step: int, console: Console) -> None:
    """Drops the lines of steps after `last_step`, and a last line that a killed process left half-written.

    Other lines that cannot be read are dropped, too; then the file as it was is kept, and the console says where.
    """
    if not path.exists():
        return
    kept, unreadable = [], []
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line.rstrip(b"\r\n") + b"\n")
        except (ValueError, KeyError, TypeError):
            if line.endswith(b"\n"):
                unreadable.append(number)
    if unreadable:
        copy = damage.place_aside(path.parent, path.name)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
        which = ", ".join(map(str, unreadable[:5])) + (", ..." if len(unreadable) > 5 else "")
        console.print(f"{path} is damaged in line {which}, left out from here on; the whole file is kept as {copy}.")
    with replacing(path) as temporary:
        temporary.write_bytes(b"".join(kept))


def validation_metrics(workdir: str | os.PathLike[str], step: int) -> dict[str, float] | None:
    """The entry of metrics.jsonl about the validation split at a step; None if it says nothing, or is not there.

    Lines that are no JSON are passed over: this number is for people, and no claim rests on it.
    """
    found = None
    try:
        lines = (Path(workdir) / FILE_NAME).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and (row.get("step"), row.get("split")) == (step, "validation"):
            found = {name: value for name, value in row.items() if name not in ("step", "split")}
    return found


def _numbers(scalars: Mapping[str, Any]) -> str:
    return "  ".join(f"{name} {float(value):.4g}" for name, value in scalars.items())
