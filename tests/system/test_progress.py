"""Progress of long work: a bar with the time left in a terminal, a few lines elsewhere."""

import io
import re

from rich.console import Console

from lipjax.evaluation import progress


class Clock:
    """Every image takes a second."""

    now = 0.0

    def __call__(self):
        return self.now


def work(console, seconds):
    clock = Clock()
    with progress.shown(console, clock) as watch:
        for what in ("certifying", "attacking"):
            for done in range(seconds + 1):
                watch(what, done / seconds)
                clock.now += 1


def test_a_pipe_gets_a_few_lines_with_the_time_left():
    out = io.StringIO()
    work(Console(file=out, width=100), 4000)
    lines = out.getvalue().splitlines()
    assert lines == [
        f"{what}: {share} %, about {left} left"
        for what in ("certifying", "attacking")
        for share, left in ((25, "50 min"), (50, "33 min"), (75, "17 min"))
    ]


def test_what_is_done_in_a_minute_prints_nothing():
    out = io.StringIO()
    work(Console(file=out), 25)
    assert out.getvalue() == ""
    work(Console(file=out), 140)  # control: at most one line a minute
    assert 1 <= len(out.getvalue().splitlines()) <= 4


def test_a_terminal_gets_a_bar_that_goes_away():
    out = io.StringIO()
    work(Console(file=out, width=100, force_terminal=True), 3)
    text = out.getvalue()
    assert "certifying" in text and "attacking" in text and "left" in text and "100%" in text
    assert re.search(r"\d:\d\d:\d\d", text)
    assert text.endswith("\x1b[2K")  # the last line is erased


def test_times_are_said_in_few_words():
    said = [progress.duration(seconds) for seconds in (0.4, 59.0, 61.0, 3540.0, 7500.0)]
    assert said == ["0 s", "59 s", "1 min", "59 min", "2 h 5 min"]
