"""Output of commands to a terminal: results and warnings always, progress unless it is to be quiet."""

from typing import Any

from rich.console import Console


class Terminal(Console):
    """The console of a command, and a second one that `progress_of` gives for what only shows how far work has come.

    Args: quiet: progress is not shown. silent: nothing is, in processes whose output nobody is to read.
    """

    def __init__(self, *, quiet: bool = False, silent: bool = False, **options: Any):
        super().__init__(quiet=silent, soft_wrap=True, highlight=False, **options)
        self.progress = Console(quiet=True) if quiet else self


def progress_of(console: Console) -> Console:
    """The console for progress of work whose results go to a console: the same one, unless its command is quiet."""
    return console.progress if isinstance(console, Terminal) else console
