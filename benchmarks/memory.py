"""Memory of the process, for benchmarks."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # the numbers of glibc's mallopt


def keep_freed_memory() -> bool:
    """Makes glibc keep what the process frees, instead of giving it back and clearing pages again at the next step.

    XLA on the CPU allocates its temporary arrays anew at every call, and glibc gives blocks beyond 32 MB back at once:
    a third of the training step of a layer was spent in page faults. Call it before JAX starts its threads.

    Returns: whether it did; False without glibc, where nothing is changed.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(
        mallopt(name, value) for name, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_ARENA_MAX, 1))
    )
