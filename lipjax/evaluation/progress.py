"""Progress of long work and the time left: a bar in a terminal, elsewhere a few lines."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lipjax.training.terminal import progress_of

Watch = Callable[[str, float], None]
# Without a terminal, so many lines for each kind of work at most, and only if so many seconds have passed.
_LINES, _SECONDS = 4, 60.0


def duration(seconds: float) -> str:
    """A time for people: "40 s", "3 min", "2 h 5 min"."""
    if seconds < 60:
        return f"{round(seconds)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


@contextlib.contextmanager
def shown(console: Console, clock: Callable[[], float] = time.monotonic) -> Iterator[Watch]:
    """Gives a function that is told what is being done, and which fraction of it is done.

    In a terminal each kind of work has a bar, which goes away in the end. Elsewhere, in a pipe or a file, a line says
    what is left when another quarter is done, if the last line was a minute ago.

    Nothing is shown if the command is quiet (`terminal.progress_of`).
    """
    console = progress_of(console)
    if not console.is_terminal:
        yield _lines(console, clock)
        return
    columns = TextColumn("{task.description}"), BarColumn(bar_width=20), TaskProgressColumn()
    times = TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()
    # Batches may take minutes: the speed is that of the last ten.
    with Progress(*columns, *times, console=console, transient=True, speed_estimate_period=600) as bar:
        tasks = {}

        def watch(what: str, done: float) -> None:
            if what not in tasks:
                for task in tasks.values():
                    bar.update(task, visible=False)
                tasks[what] = bar.add_task(what, total=1.0)
            bar.update(tasks[what], completed=done)

        yield watch


def _lines(console: Console, clock: Callable[[], float]) -> Watch:
    started: dict[str, float] = {}
    printed: dict[str, int] = {}
    last = clock()

    def watch(what: str, done: float) -> None:
        nonlocal last
        now = clock()
        begin = started.setdefault(what, now)
        quarter = int(_LINES * done)
        if done >= 1 or quarter <= printed.get(what, 0) or now - last < _SECONDS:
            return
        printed[what], last = quarter, now
        left = duration((now - begin) * (1 - done) / done)
        console.print(f"{what}: {100 * done:.0f} %, about {left} left", markup=False, highlight=False)

    return watch
