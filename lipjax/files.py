"""Files that are written whole or not at all."""

import contextlib
import json
import os
import pathlib
import stat
from collections.abc import Iterator

import numpy as np
import safetensors
import safetensors.numpy

from lipjax.errors import UserError


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Gives a temporary path to write; what lies there then replaces `path`, or nothing does if the block raises.

    The old file or the whole new one is there, also after a power failure. Who may read it, the umask says.
    Raises: OSError, which names `path`, if it cannot be written: a full disk.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        yield temporary
        with open(temporary, "rb") as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) != mode:
                os.fchmod(file.fileno(), mode)  # a library has put a private file of its own in its place
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is None:  # of writing, which only knows a number of a file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, document: dict, indent: int | None = 1) -> None:
    """Writes JSON atomically. Floats keep all their digits; NaN raises ValueError. indent: None: all on one line."""
    with replacing(path) as temporary, open(temporary, "w") as file:
        json.dump(document, file, indent=indent, allow_nan=False)
        file.write("\n")


def write_arrays(
    path: str | os.PathLike, arrays: dict[str, np.ndarray], metadata: dict[str, str] | None = None
) -> None:
    """Writes a safetensors file; it appears whole or not at all. Raises: UserError if it cannot: a full disk."""
    with replacing(path) as temporary:
        try:
            safetensors.numpy.save_file(arrays, temporary, metadata)
        except safetensors.SafetensorError as error:
            raise UserError(f"{path} cannot be written ({error}): free some space or choose another place.") from error


def save_arrays(path: pathlib.Path, **arrays) -> None:
    """Writes an .npz file whole or not at all."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)
