"""Tests of what every proof takes for granted: rounding to nearest, and numbers that float64 holds.

Docs: docs/soundness.md, section 0.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from threadpoolctl import threadpool_info

from lipjax.errors import NotCertifiable


def _doubles(*digits: str) -> np.ndarray:
    """Doubles from hexadecimal digits, which no rounding mode changes."""
    return np.array([float.fromhex(text) for text in digits])


# Operands and the results to nearest. In every other direction, upward, downward and toward zero, some result is
# another, for each operation; so is the second sum where registers are longer than a double.
_HALF, _MORE, _LONG = "0x1p-53", "0x1.8p-53", "0x1.00008p-53"
_ONE, _NEXT, _BOTH = "0x1p0", "0x1.0000000000001p0", "0x1.8p0"
_SUMS = (
    _doubles(_ONE, _ONE, _ONE, f"-{_ONE}", f"-{_ONE}", f"-{_ONE}", _NEXT),
    _doubles(_HALF, _LONG, _MORE, f"-{_HALF}", f"-{_LONG}", f"-{_MORE}", "-0x1p-106"),
    _doubles(_ONE, _NEXT, _NEXT, f"-{_ONE}", f"-{_NEXT}", f"-{_NEXT}", _NEXT),
)
_PRODUCTS = (
    _doubles(_NEXT, f"-{_NEXT}", _NEXT, f"-{_NEXT}"),
    _doubles(_NEXT, _NEXT, _BOTH, _BOTH),
    _doubles("0x1.0000000000002p0", "-0x1.0000000000002p0", "0x1.8000000000002p0", "-0x1.8000000000002p0"),
)
_QUOTIENTS = (
    _doubles("1", "-1", "1", "-1"),
    _doubles("0x3", "0x3", "0xa", "0xa"),
    _doubles("0x1.5555555555555p-2", "-0x1.5555555555555p-2", "0x1.999999999999ap-4", "-0x1.999999999999ap-4"),
)
# Through BLAS, by rows: the third sum, and the first.
_MATRIX = np.stack([_doubles(_ONE, _MORE), _doubles(_ONE, _HALF)])
_ROW_SUMS = np.stack([_doubles(_NEXT, _NEXT), _doubles(_ONE, _ONE)])
_ROOTS = _doubles("0x2", "0x3"), _doubles("0x1.6a09e667f3bcdp0", "0x1.bb67ae8584caap0")
# The least normal number and the least number of all: halved and doubled, they meet results and operands below normal.
_SMALL = _doubles("0x1p-1022", "0x1p-1073", "0x1p-1074"), _doubles("0x0.8p0", "0x0.8p0", "0x2p0")
_SMALL_PRODUCTS = _doubles("0x1p-1023", "0x1p-1074", "0x1p-1073")


def rounds_to_nearest(sums: Any, products: Any) -> bool:
    """True if these are what `operands` add up and multiply to when rounded to nearest."""
    return np.array_equal(sums, _SUMS[2]) and np.array_equal(products, _PRODUCTS[2])


def operands() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Four arrays a, b, c, d for `rounds_to_nearest`(a + b, c d)."""
    return *_SUMS[:2], *_PRODUCTS[:2]


def check_rounding() -> None:
    """Some twenty operations whose results tell rounding to nearest from all other modes; a few microseconds.

    Only the calling thread is looked at, in which NumPy and, limited to one thread, its BLAS compute.

    Raises: NotCertifiable if NumPy does not compute in this thread as docs/soundness.md, section 0, assumes.
    """
    nearest = (
        rounds_to_nearest(_SUMS[0] + _SUMS[1], _PRODUCTS[0] * _PRODUCTS[1])
        and np.array_equal(_QUOTIENTS[0] / _QUOTIENTS[1], _QUOTIENTS[2])
        and np.array_equal(np.sqrt(_ROOTS[0]), _ROOTS[1])
        and np.array_equal(_MATRIX @ np.ones((2, 2)), _ROW_SUMS)
    )
    if not nearest:
        raise NotCertifiable(
            "NumPy does not round to nearest in this thread: something in this process has set another rounding mode "
            "(fesetround) and not set it back. Nothing can be proved that way; start a new process."
        )
    with np.errstate(under="ignore"):
        if not np.array_equal(_SMALL[0] * _SMALL[1], _SMALL_PRODUCTS):
            raise NotCertifiable(
                "This process flushes subnormal numbers to zero (a library was built with fast math?). Nothing can be "
                "proved that way; start a new process without that library."
            )


def exact_float64(array: Any, name: str, *, or_complex: bool = False) -> np.ndarray:
    """The very numbers of an array, as contiguous float64: the one way from a user's array into a proof.

    Args: name: of the array, for messages. or_complex: whether complex numbers pass, as complex128.
    Raises: NotCertifiable naming the array for what float64 does not hold exactly: complex numbers, long doubles,
      integers beyond 2^53, objects; and for arrays that JAX traces, whose numbers are not known.
    """
    if isinstance(array, Tracer):
        raise NotCertifiable(
            f"{name}: a proof needs the numbers themselves, and JAX is tracing the array (in jit, grad, vmap or scan): "
            "call it outside of the traced function. Inside, use an estimate."
        )
    values = np.asarray(array)
    kind, dtype = values.dtype.kind, values.dtype
    if kind == "c" and or_complex and dtype.itemsize <= 16:
        return np.ascontiguousarray(values, np.complex128)
    if kind == "c":
        raise NotCertifiable(f"{name}: expected real numbers, got {dtype}: a proof would ignore the imaginary parts.")
    if kind == "b" or jnp.issubdtype(dtype, jnp.integer):  # of which some types have a kind of their own
        if values.size and max(abs(int(values.max())), abs(int(values.min()))) > 2**53:
            raise NotCertifiable(f"{name}: expected integers up to 2^53, which float64 holds exactly, got larger ones.")
    elif not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize > 8:
        raise NotCertifiable(
            f"{name}: expected numbers that float64 holds exactly (floating-point of at most 64 bits, or integers), "
            f"got dtype {dtype}. Round it yourself, so that what is proved is what you use."
        )
    return np.ascontiguousarray(values, np.float64)


def blas_libraries() -> list[str]:
    """Names and versions of the BLAS libraries in this process, as `threadpoolctl` reports them, and NumPy's own."""
    loaded = [entry for entry in threadpool_info() if entry["user_api"] == "blas"]
    found = {f"{entry['internal_api']} {entry['version']}" for entry in loaded}
    built: Any = np.show_config(mode="dicts")
    own = built.get("Build Dependencies", {}).get("blas", {})
    return sorted(found | {f"NumPy's: {own.get('name', 'unknown')} {own.get('version', '')}".strip()})
