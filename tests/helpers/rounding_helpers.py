"""Rounding modes other than to nearest."""

import contextlib
import ctypes
import ctypes.util
import platform

# What <fenv.h> calls FE_DOWNWARD, FE_UPWARD and FE_TOWARDZERO. To nearest is 0 on both.
MODES = {"x86_64": (0x400, 0x800, 0xC00), "aarch64": (0x800000, 0x400000, 0xC00000)}.get(platform.machine(), ())


@contextlib.contextmanager
def rounding(mode):
    """The block computes in another rounding mode; afterwards to nearest again, whatever happens in it."""
    library = ctypes.CDLL(ctypes.util.find_library("m"))
    assert library.fesetround(mode) == 0
    try:
        yield
    finally:
        assert library.fesetround(0) == 0
