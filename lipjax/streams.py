"""Standard streams that may fail (a reader that is gone, a full device, ASCII) without failing the program."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


class _Guarded:
    """A standard stream that, when it cannot be written, turns to os.devnull with one word on the standard error."""

    def __init__(self, stream: Any, name: str):
        self._stream, self._name, self._lost = stream, name, False

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._stream, attribute)

    def write(self, text: str) -> int:
        try:
            return len(text) if self._lost else self._stream.write(text)
        except UnicodeEncodeError:  # of a locale without these letters: "?" in their places
            encoding = self._stream.encoding or "ascii"
            return self.write(text.encode(encoding, "replace").decode(encoding))
        except OSError as error:
            self._lose(error)
            return len(text)

    def writelines(self, lines) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        if self._lost:
            return
        self._lost = True
        with contextlib.suppress(OSError):
            # What the stream still holds is written when it is closed, and must not fail then; nor may other code that
            # writes to its number.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        if self._name == "output":
            print(
                f"The standard output cannot be written any more ({error.strerror or error}): the command goes on "
                "without it and writes its files.",
                file=sys.stderr,
                flush=True,
            )


@contextlib.contextmanager
def guarded(*, silent: bool = False) -> Iterator[None]:
    """While it is open, neither a failing standard output nor a failing standard error ends the program.

    Args: silent: not a word where the output fails, as for a help text, of which `head` reads no more than it wants.
    """
    before = sys.stdout, sys.stderr
    names = ("help" if silent else "output", "error")
    guards = [
        stream if stream is None or isinstance(stream, _Guarded) else _Guarded(stream, name)
        for stream, name in zip(before, names, strict=True)
    ]
    sys.stdout, sys.stderr = guards
    try:
        yield
    finally:
        for guard in guards:
            if guard is not None:
                guard.flush()
        if (sys.stdout, sys.stderr) == tuple(guards):  # nobody has put others in their places
            sys.stdout, sys.stderr = before
