"""Signals: which of them stop a run, where it saves before it stops, and with which exit code it ends."""

import contextlib
import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax._src import distributed  # for its preemption service, which takes over SIGTERM
from jax.experimental import multihost_utils

# What schedulers, container runtimes, terminals that are closed and `sbatch --signal` send before they kill.
REQUESTS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
WORK_LEFT, INTERRUPTED = os.EX_TEMPFAIL, 130

_calls = itertools.count(1)  # of all trainings of this process: their numbers must never fall
_trained = threading.Event()  # nothing is left to save


class Preempted(BaseException):
    """A signal stopped the run; the message says how far it came. No Exception, so that nothing takes it for damage.

    Attributes: code: the exit code. agreed: whether all processes of the run stop so.
    """

    def __init__(self, message: str, code: int = WORK_LEFT, agreed: bool = False):
        super().__init__(message)
        self.code, self.agreed = code, agreed


class Stop:
    """Answers, after each training step, whether to save and stop.

    Attributes: by: the name of the signal. code: the exit code.
    """

    def __init__(self, reached: Callable[[], bool], received: list[int]):
        self._reached, self._received, self.asked = reached, received, 0

    def __call__(self, step: int) -> bool:
        """Must be called after every step, and once more after the last.

        In a run of several processes it is true in all of them from the same call on, one that none has made when the
        signal has become known.
        """
        del step  # JAX asks for the call after the latest one, which is another step in a run that resumes
        self.asked = len(self._received)
        return self._reached()

    @property
    def by(self) -> str:
        # Of several processes another one may have got it.
        return _name(self._received[0]) if self._received else "a signal"

    @property
    def code(self) -> int:
        return INTERRUPTED if signal.SIGINT in self._received else WORK_LEFT


def _name(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


@contextlib.contextmanager
def _installed(handlers: Mapping[int, Callable[[int, Any], object]]) -> Iterator[None]:
    """Handles signals, but none that this process was started to ignore (`nohup`, `&` in a script)."""
    if threading.current_thread() is not threading.main_thread():  # which has no say about signals
        yield
        return
    before = {}
    try:
        for number, handler in handlers.items():
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _service() -> bool:
    """True if JAX's preemption service has taken over SIGTERM, which all processes heed in their next training step."""
    return distributed.global_state.preemption_sync_manager is not None and not _trained.is_set()


def _end(number: int, frame: Any) -> None:
    del frame
    if number != signal.SIGTERM and _service():
        os.kill(os.getpid(), signal.SIGTERM)
        return
    raise Preempted(f"Stopped by {_name(number)}. The same command goes on from the last checkpoint, if there is one.")


def outside_training() -> contextlib.AbstractContextManager[None]:
    """A context without anything to save, in which the REQUESTS end the command with `Preempted`.

    In a run of several processes they wait for its first step, until `end_of_training`.
    """
    _trained.clear()
    return _installed(dict.fromkeys(REQUESTS, _end))


def end_of_training() -> None:
    """From here on a request ends this process: there is nothing to save any more."""
    _trained.set()
    if jax.distributed.is_initialized() and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _end)  # which JAX had taken over


@contextlib.contextmanager
def preemption(leave: Callable[[int], Any]) -> Iterator[Stop]:
    """While training, the REQUESTS and the first Ctrl-C ask to save and stop; the second Ctrl-C stops at once.

    Args: leave: ends this process with an exit code.
    """
    received: list[int] = []
    several = jax.distributed.is_initialized()

    def ask(number: int, frame: Any) -> None:
        del frame
        if number == signal.SIGINT:
            if number in received:
                _say("Stopped at once. The same command goes on from the last checkpoint.")
                leave(INTERRUPTED)
            _say("Ctrl-C: the run stops after this step and saves it. Ctrl-C again stops at once.")
        received.append(number)
        if several:
            os.kill(os.getpid(), signal.SIGTERM)  # to JAX's service

    agreed = False

    def reached() -> bool:
        nonlocal agreed
        if several:
            agreed = multihost_utils.reached_preemption_sync_point(next(_calls)) or agreed
            return agreed
        return bool(received)

    stop = Stop(reached, received)
    handled = [number for number in (*REQUESTS, signal.SIGINT) if not (several and number == signal.SIGTERM)]
    with _installed(dict.fromkeys(handled, ask)):
        yield stop
    if not several and len(received) > stop.asked:  # too late for the training: let it count for what follows
        os.kill(os.getpid(), received[-1])


def _say(text: str) -> None:
    """Writes a line, in a handler: what `print` uses may be in the middle of something."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if sys.__stdout__.isatty():  # pyright: ignore[reportOptionalMemberAccess]
            os.write(1, b"\x1b[?25h\n")  # below the progress bar, and with a cursor again
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())


def ignore_in_reader(*_: Any) -> None:
    """Makes a process that reads for a run ignore signals sent to all of them: the run needs it until it has saved."""
    for number in (*REQUESTS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
