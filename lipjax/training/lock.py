"""A directory belongs to one run at a time."""

import contextlib
import errno
import fcntl
import os
import pathlib
import socket
import time
import uuid
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from lipjax.errors import UserError
from lipjax.training import cluster

LOCK = ".lock"
# What file systems need at most until a file written on one machine is seen on another.
_VISIBLE_SECONDS = 60.0
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


@contextlib.contextmanager
def exclusive(workdir: pathlib.Path) -> Iterator[bool]:
    """Keeps other runs out of a directory (process 0 holds the lock), which is made if it does not exist.

    Gives whether it can be written; one that cannot is not locked, since no run changes it.
    Raises: UserError if another process holds it, if it is no directory or its name cannot be written, or if not all
      processes see the same one.
    """
    try:
        str(workdir).encode()
    except UnicodeEncodeError as error:  # letters that Python could not read from the command line
        shown = str(workdir).encode("ascii", "replace").decode()
        raise UserError(
            f"--workdir: {shown} has letters that this locale has no code for, and could not be written: set "
            "PYTHONUTF8=1 or another locale, or choose a directory of ASCII letters."
        ) from error
    token = np.frombuffer(uuid.uuid4().bytes, np.uint8)
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0 and not stack.enter_context(_locked(workdir / LOCK, token.tobytes().hex())):
            token = np.zeros_like(token)
        if jax.process_count() > 1:
            token = multihost_utils.broadcast_one_to_all(token)
            deadline = time.monotonic() + _VISIBLE_SECONDS
            while jax.process_index() and token.any() and token.tobytes().hex() not in _text(workdir / LOCK):
                if time.monotonic() > deadline:
                    raise UserError(
                        f"this process does not see the directory {workdir} of process 0: give a --workdir on a file "
                        "system that all processes share."
                    )
                time.sleep(0.5)
        yield bool(token.any())
        cluster.wait(f"release {workdir} {token.tobytes().hex()}")


@contextlib.contextmanager
def _locked(path: pathlib.Path, token: str) -> Iterator[bool]:
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+")
        except (FileExistsError, NotADirectoryError) as error:
            raise UserError(f"--workdir: {path.parent} is, or lies in, a file: choose a directory.") from error
        except OSError as error:
            if error.errno in _READ_ONLY and path.parent.is_dir():
                yield False
                return
            raise _cannot_write(path, error) from error
        with file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process, however that ends
            except (BlockingIOError, PermissionError) as error:
                raise UserError(
                    f"{path.parent} is in use by another training ({' '.join(_text(path).split()[:4]) or 'unknown'}): "
                    "wait for it to end, or choose another --workdir."
                ) from error
            except OSError as error:  # a file system without locks
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                    raise
            if not path.exists() or path.stat().st_ino != os.fstat(file.fileno()).st_ino:
                continue  # its last holder has just removed it
            try:
                try:
                    file.truncate(0)
                    file.write(f"process {os.getpid()} on {socket.gethostname()} {token}\n")
                    file.flush()
                    os.fsync(file.fileno())
                except OSError as error:
                    raise _cannot_write(path, error) from error
                yield True
                return
            finally:
                path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    path.parent.rmdir()  # if nothing else was written


def _cannot_write(path: pathlib.Path, error: OSError) -> UserError:
    return UserError(f"cannot write {path} ({error.strerror or error}): free some space or choose another --workdir.")


def _text(path: pathlib.Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""
