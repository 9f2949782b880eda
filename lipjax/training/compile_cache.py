"""Programs that XLA compiled, kept on disk for later starts: JAX's persistent compilation cache, without being asked.

JAX trusts what it finds there, and a program compiled for one processor may not run on another. So the directory is the
user's alone, with a folder for each kind of processor, and several processes share one or do without.
"""

import contextlib
import hashlib
import os
import pathlib
import platform
import re
import secrets
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.experimental.compilation_cache import compilation_cache

# Many programs compile within a second, and together they take longer than the large ones.
MIN_COMPILE_SECONDS = 0.1
MIN_FREE_BYTES = 2**30
MAX_BYTES = 4 * 2**30  # of all that is kept; then the oldest goes, until half is left
_TOKEN_BYTES = 16
_VISIBLE_SECONDS = 5.0  # what a file system that processes share may need until one sees what another wrote
_DIRECTORY, _MIN_SECONDS = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
_TROUBLE = re.compile(r"Error (reading|writing) persistent compilation cache entry for '([^']*)': (.*)", re.DOTALL)
_UNUSED, _GOOD, _BAD = range(3)  # what a process says about its directory


def default_directory() -> pathlib.Path:
    """The folder for programs of this machine's processor, in $XDG_CACHE_HOME/lipjax/jax or ~/.cache/lipjax/jax.

    Raises: RuntimeError if the user has no home directory.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    cache = pathlib.Path(given) if os.path.isabs(given) else pathlib.Path.home() / ".cache"
    kind = hashlib.sha256(_processor().encode()).hexdigest()[:12]
    return cache / "lipjax" / "jax" / f"{platform.machine() or 'cpu'}-{kind}"


def _processor() -> str:
    """The processor's name and features, for which XLA compiles."""
    names = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    found: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in names:
                found.setdefault(name.strip(), value.strip())
    return repr(sorted(found.items()) or (platform.machine(), platform.processor()))


@contextlib.contextmanager
def kept_programs(wanted: bool = True) -> Iterator[None]:
    """Inside, what compiles for `MIN_COMPILE_SECONDS` or longer is kept in `default_directory`, and found there again.

    Where the user has told JAX what to do (JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE), that holds. A
    directory that cannot be used costs one line on standard error, and all is compiled. Of several processes, which
    must all come here, either all use one directory or none does: on GPUs processes tune a program together, and one
    that had it already would let the others wait.

    Args: wanted: False: nothing is kept.
    """
    path, reason = None, ""
    if wanted and _undecided():
        try:
            path = default_directory()
            reason = _why_not(path)
        except RuntimeError as error:
            reason = f"there is no home directory ({error})"
    if jax.process_count() > 1:
        path, reason = _agreed(path, reason)
    if reason and jax.process_index() == 0:
        where = "" if path is None else f" in {path}"
        _say(f"compiled programs are not kept for later starts{where}: {reason}.")
    if path is None or reason:
        yield
        return
    if jax.process_index() == 0:
        _prune(path)
    before = {name: jax.config.values[name] for name in (_DIRECTORY, _MIN_SECONDS)}
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update(_MIN_SECONDS, MIN_COMPILE_SECONDS)
    jax.config.update(_DIRECTORY, str(path))
    compilation_cache.reset_cache()
    try:
        with _trouble_in_one_line(path):
            yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def _undecided() -> bool:
    given = jax.config.values[_DIRECTORY] is not None or "JAX_COMPILATION_CACHE_DIR" in os.environ
    return not given and bool(jax.config.values["jax_enable_compilation_cache"])


def _say(text: str) -> None:
    print(f"Warning: {text}", file=sys.stderr)


def _why_not(path: pathlib.Path) -> str:
    """Makes a directory that is the user's alone. Returns: why it cannot be used; "" if it can."""
    try:
        for folder in (*reversed(path.parents), path):
            if not folder.exists():
                folder.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
        state, free = path.stat(), shutil.disk_usage(path).free
    except OSError as error:
        return f"it cannot be written ({error.strerror or error})"
    if hasattr(os, "getuid") and (state.st_uid != os.getuid() or state.st_mode & 0o022):
        return "others may write there, and what lies there is executed (chmod go-w, or another XDG_CACHE_HOME)"
    if free < MIN_FREE_BYTES:
        return f"only {free / 2**20:.0f} MiB are free there"
    return ""


def _agreed(path: pathlib.Path | None, reason: str) -> tuple[pathlib.Path | None, str]:
    """What all processes do, of what each would do alone: a directory that all of them see, or none."""
    ours = _BAD if reason else _UNUSED if path is None else _GOOD
    token = secrets.token_bytes(_TOKEN_BYTES)
    first, left = jax.process_index() == 0, None
    if first and path is not None and ours == _GOOD:
        left = path / f"seen-{token.hex()}"
        with contextlib.suppress(OSError):
            left.touch()
    said = multihost_utils.process_allgather(np.frombuffer(bytes([ours]) + token, np.uint8))
    states = said[:, 0]
    name = f"seen-{bytes(said[0, 1:]).hex()}"
    seen, deadline = False, time.monotonic() + (_VISIBLE_SECONDS if (states == _GOOD).all() else 0)
    while path is not None and ours == _GOOD and not (seen := os.path.exists(path / name)):
        if time.monotonic() > deadline:
            break
        time.sleep(0.5)
    everyone = multihost_utils.process_allgather(np.array([seen]))
    if left is not None:
        left.unlink(missing_ok=True)
    if (states == _UNUSED).any():
        return None, ""
    if (states == _BAD).any():
        which = int(np.flatnonzero(states == _BAD)[0])
        return path, reason or f"process {which} cannot use its directory"
    if not everyone.all():
        return path, "the processes do not share this directory (JAX_COMPILATION_CACHE_DIR names one that they do)"
    return path, ""


def _entries(path: pathlib.Path) -> Iterator[tuple[float, int, pathlib.Path]]:
    """(when it was last read or written, bytes, file) of what is kept."""
    for file in path.rglob("*"):
        with contextlib.suppress(OSError):
            state = file.stat()
            if file.is_file():
                yield max(state.st_atime, state.st_mtime), state.st_size, file


def _prune(path: pathlib.Path) -> None:
    """Removes what was not used for longest, if more than `MAX_BYTES` lie in the folders of all processors."""
    entries = sorted(_entries(path.parent))
    total = sum(size for _, size, _ in entries)
    if total <= MAX_BYTES:
        return
    for _, size, file in entries:
        with contextlib.suppress(OSError):
            file.unlink()
        total -= size
        if total <= MAX_BYTES // 2:
            return


@contextlib.contextmanager
def _trouble_in_one_line(path: pathlib.Path) -> Iterator[None]:
    """Inside, JAX's warnings about this directory mend it: a disk that fills up, a program that was cut short."""
    show, start = warnings.showwarning, time.time()

    def showwarning(message, category, filename, lineno, file=None, line=None):
        found = _TROUBLE.match(str(message))
        if found is None:
            show(message, category, filename, lineno, file, line)
            return
        action, module, cause = found.groups()
        # JAX leaves what is there, so that half a program would be compiled again at each start from now on.
        for _, _, entry in [found for found in _entries(path) if found[2].name.startswith(f"{module}-")]:
            with contextlib.suppress(OSError):
                if action == "reading" or entry.stat().st_mtime >= start - 1:
                    entry.unlink()
        if (
            action == "writing"
            and jax.config.values[_MIN_SECONDS] != np.inf
            and jax.config.values[_DIRECTORY] is not None
        ):
            if jax.process_count() > 1:  # the others go on reading, and so must this one: it stops writing alone
                jax.config.update(_MIN_SECONDS, np.inf)
            else:
                jax.config.update(_DIRECTORY, None)
                compilation_cache.reset_cache()
            _say(f"compiled programs are no longer kept in {path} ({cause.splitlines()[0]}).")

    with warnings.catch_warnings():
        warnings.filterwarnings("always", message="Error (reading|writing) persistent compilation cache entry")
        warnings.showwarning = showwarning
        yield
