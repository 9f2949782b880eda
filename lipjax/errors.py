"""The errors that users meet: a mistake in what they gave, a claim that cannot be proved, and one that is false."""

import importlib.util
import sys
from collections.abc import Callable

from lipjax import streams


class UserError(ValueError):
    """Bad input (a config value, a data set, a checkpoint, images): the command line prints it and exits with code 2.

    The message says what was expected, what came and what to do.
    """


class NotCertifiable(ValueError):
    """A layer or network has no proved bound; the message names the layer and the reason."""


class MissingExtra(ModuleNotFoundError, UserError):
    """A package that a bare `pip install lipjax` leaves out, and the extra that brings it."""


def require_extra(extra: str, *packages: str) -> None:
    """Raises: MissingExtra naming `extra` unless all `packages` that it brings are installed. Imports none."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise MissingExtra(
            f"This part of lipjax needs {', '.join(missing)}, which a bare installation leaves out: "
            f"pip install 'lipjax[{extra}]', or in a clone pip install '.[{extra}]'.",
            name=missing[0],
        )


class Refuted(RuntimeError):
    """A claim that was thought to be proved is false: a mistake in lipjax. The command line exits with code 1."""


def run_command(command: Callable[[], object], interrupted: str) -> int:
    """Runs a command of the command line; what the user can mend ends as one message on stderr.

    Args: command: without arguments. interrupted: the message after Ctrl-C.
    A standard output that cannot be written any more does not end it, nor does a letter that it has no code for.
    Returns: the exit code: 0, 1 for a refuted claim, 2 for a user's error or a claim without proof, 130 after Ctrl-C.
      Other errors pass.
    """
    with streams.guarded():
        try:
            command()
        except Refuted as error:
            print(f"Error: {error}", file=sys.stderr)
            return 1
        except (UserError, NotCertifiable, OSError) as error:  # OSError: a full disk, a directory without permission
            print(f"Error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print(interrupted, file=sys.stderr)
            return 130
        return 0


__all__ = ["MissingExtra", "NotCertifiable", "Refuted", "UserError", "require_extra", "run_command"]


def __dir__() -> list[str]:
    return __all__
