"""Saved steps that are not any more what was written: how they are noticed, and how a run goes on without them."""

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from lipjax.errors import UserError

DIGESTS = "digests.json"
STEP = re.compile(r"\d+")
DAMAGED = "damaged"
# Of reading: the disk or the directory is damaged. All else (no permission, too many open files) says nothing of it.
_LOST = (errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EUCLEAN)


def write_digests(step: Path) -> None:
    """Completes a step of which all files are written."""
    (step / DIGESTS).write_text(json.dumps(_digests(step)))


def damage_of(step: Path) -> str | None:
    """A sentence about what is wrong with a saved step, by its digests; None if nothing is.

    Raises: UserError if its files cannot be read for a reason that lies elsewhere.
    """
    try:
        if not step.is_dir():
            return "it is no directory"
        if not (step / DIGESTS).is_file():
            return f"it is incomplete or was not written by lipjax: no {DIGESTS} in it"
        expected, came = json.loads((step / DIGESTS).read_bytes()), _digests(step)
    except ValueError as error:
        return f"{DIGESTS}: {_short(error)}"
    except OSError as error:
        if error.errno in _LOST:
            return _short(error)
        raise UserError(f"checkpoint {step} cannot be read ({_short(error)}): mend that and start again") from error
    if not isinstance(expected, dict):
        return f"{DIGESTS} holds no digests"
    wrong = sorted(name for name in {*expected, *came} if came.get(name) != expected.get(name))
    if wrong:
        return f"{wrong[0]} " + ("has other content than was written" if wrong[0] in came else "is missing")
    return None


def set_aside(directory: Path, say: Callable[[str], object]) -> set[int]:
    """Moves damaged steps out of a directory of checkpoints, to `damaged/` beside it, if a good one is left.

    Args: directory: of the steps; it need not exist. say: gets one line for each step that is moved.
    Returns: the steps that are good.
    Raises: UserError if all steps are damaged, which are then left where they are, or one cannot be moved.
    """
    if not directory.is_dir():
        return set()
    steps = sorted(int(path.name) for path in directory.iterdir() if STEP.fullmatch(path.name))
    found = {step: damage_of(directory / str(step)) for step in steps}
    good = {step for step, what in found.items() if what is None}
    if steps and not good:
        raise UserError(
            f"checkpoint {directory / str(steps[-1])} is damaged ({found[steps[-1]]}), and there is no other good one: "
            f"bring one back from a copy, or start anew in another --workdir"
        )
    for step, what in found.items():
        if what is not None:
            target = place_aside(directory.parent, str(step))
            try:
                target.parent.mkdir(exist_ok=True)
                shutil.move(directory / str(step), target)
            except OSError as error:
                raise UserError(
                    f"checkpoint {directory / str(step)} is damaged ({what}) and cannot be moved to {target} "
                    f"({_short(error)}): move it yourself to go on from step {max(good)}"
                ) from error
            say(f"Checkpoint {step} is damaged ({what}) and was moved to {target}: {_instead(step, good)}.")
    return good


def _instead(step: int, good: set[int]) -> str:
    latest = max(good)
    return f"the run goes on from step {latest}" if step > latest else f"step {latest} is the latest"


def place_aside(workdir: Path, name: str) -> Path:
    """A path that is free, `damaged/<name>-<time>`, for what is damaged in the directory of a run."""
    path = workdir / DAMAGED / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    found, number = path, 2
    while found.exists():
        found, number = path.with_name(f"{path.name}-{number}"), number + 1
    return found


def _digests(step: Path) -> dict[str, str]:
    """Relative path → digest of the files with content, without Orbax's commit marks, which come later."""
    result = {}
    for item in ("state", "meta", "metrics"):
        for path in sorted((step / item).rglob("[!.]*")):
            if path.is_file() and path.name != "commit_success.txt":
                with path.open("rb") as file:
                    result[path.relative_to(step).as_posix()] = hashlib.file_digest(file, "blake2b").hexdigest()
    return result


def _short(error: BaseException) -> str:
    text = str(error).strip().split("\n")[0]
    return os.fsencode(f"{type(error).__name__}: {text[:200]}").decode("utf-8", "replace")
