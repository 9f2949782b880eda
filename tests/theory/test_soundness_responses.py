"""Attempts to break the bounds of BRO and LOT: blocks from hostile kernels, as `test_soundness.py` does."""

import functools
from fractions import Fraction

import jax
import numpy as np
from hypothesis import strategies as st
from soundness_helpers import (
    PATTERNS,
    array_of,
    few_and_nightly_many,
    integers,
    looseness,
    power,
    scaled,
    search,
    squared_gain,
)

from lipjax import checker, operators
from lipjax.parametrize import bro, lot

KINDS = ("float64", "float32", "lot")


@functools.partial(jax.jit, static_argnums=(1, 2))
def response(kernel, size, kind):
    if kind == "lot":
        return lot.packed_response(kernel, size)
    return bro.packed_response(kernel.astype(kind), size, 2, 3, ridge=bro.RIDGE if kind == "float64" else 1e-7)


@st.composite
def response_layers(draw):
    """BRO, in both precisions, and LOT from hostile kernels: zero, of dependent columns, nearly so, beyond the map."""
    size, kind = draw(st.sampled_from([(1, 1), (3, 4)])), draw(st.sampled_from(KINDS))
    kernel = array_of(draw(st.sampled_from(PATTERNS)), (3, 3, 2, 3), draw(st.integers(0, 2**32)))
    kernel = np.array(scaled(kernel, draw(st.integers(-20, 20))))
    change = draw(st.sampled_from([None, 0.0, 1.0, 1 + 2.0**-24, 1 + 2.0**-40]))
    if change is not None:
        kernel[:, :, 1] = change * kernel[:, :, 0]
    if draw(st.booleans()):
        kernel[:, :, 0] *= 0
    return lambda: (response(kernel, size, kind), size, kind)


@few_and_nightly_many
def test_responses_contract_and_their_bounds_are_never_below(examples, record_testsuite_property):
    found, methods = {kind: [0.0] for kind in KINDS}, set()

    def check(example):
        blocks, size, kind = example
        fixed, paired = (np.asarray(part, np.float64) for part in blocks)
        op = operators.CircularConv.from_blocks(fixed, paired, (*size, 2))
        bound = op.bound()
        methods.add(bound.method)
        found[kind].append(bound.proved)
        for real, imaginary in [*((part, 0 * part) for part in fixed), *(tuple(pair) for pair in paired)]:
            matrix, exponent = integers(np.block([[real, -imaginary], [imaginary, real]]))
            looseness(bound.proved, squared_gain(matrix), power(exponent))
        fields = {"fixed": fixed, "paired": paired, "in_shape": list(op.in_shape), "nonexpansive": True}
        assert checker.CircularConv(fields).proves(Fraction(bound.claimed), bound.method, {})

    search(check, response_layers(), examples)
    largest = {kind: max(values) for kind, values in found.items()}
    record_testsuite_property("norms of responses", str(largest))
    # As made they contract, but for rounding, which may be u (m + r) / ridge for BRO.
    assert largest["lot"] < 1 + 1e-12 and largest["float64"] < 1 + 1e-10 and largest["float32"] < 1 + 1e-5
    assert len(methods) > 1 and min(largest.values()) > 0.99
