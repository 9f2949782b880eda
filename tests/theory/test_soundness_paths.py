"""Attempts to break the constants of potential steps and sandwiches, as test_soundness.py does those of norms."""

import numpy as np
from hypothesis import strategies as st
from soundness_helpers import (
    PATTERNS,
    array_of,
    conv_matrix,
    few_and_nightly_many,
    integers,
    looseness,
    power,
    scaled,
    search,
    squared_gain,
)

from lipjax import NotCertifiable, operators


@st.composite
def stored_maps(draw, least_columns):
    """Matrices and small convolutions, scaled; some of them orthogonal but for an ulp here and there; strides, kernels
    larger than the map."""
    noise, seed = draw(st.sampled_from([0.0, 2.0**-52, 2.0**-40])), draw(st.integers(0, 2**32))
    scale = draw(st.one_of(st.just(0), st.integers(-3, 3), st.integers(-40, 40), st.sampled_from([-500, 500])))
    pattern = draw(st.sampled_from(PATTERNS))

    def array(*shape):
        found = array_of(pattern, shape, seed)
        return scaled(found * (1 + noise * np.random.default_rng(seed).normal(size=shape)), scale)

    columns, rows = draw(st.integers(least_columns, 8)), draw(st.integers(1, 8))
    if draw(st.booleans()):
        return operators.Dense, (array(rows, columns),)
    kernel_size, strides = (tuple(draw(st.integers(1, n)) for _ in range(2)) for n in (4, 2))
    channels, outputs = draw(st.integers(least_columns, 3)), draw(st.integers(1, 3))
    size, padding = tuple(draw(st.integers(1, 4)) for _ in range(2)), "CIRCULAR"
    if draw(st.booleans()):
        padding = tuple((draw(st.integers(0, 3)), draw(st.integers(0, 3))) for _ in range(2))
        size = tuple(max(n, k - sum(p)) for n, k, p in zip(size, kernel_size, padding, strict=True))
    else:
        size = tuple(max(s, n // s * s) for n, s in zip(size, strides, strict=True))
    return operators.Conv, (array(*kernel_size, channels, outputs), (*size, channels), strides, padding)


@st.composite
def two_paths(draw, least_columns):
    """A stored map, slopes k/4 from 0 to 1, how many columns or channels are A's in a sandwich, and a start."""
    cls, fields = draw(stored_maps(least_columns))
    slopes = draw(st.sampled_from(["all", "none", "any"]))
    seed, outputs = draw(st.integers(0, 2**32)), draw(st.integers(1, 7))
    return lambda: (cls(*fields), slopes, seed, outputs)


def drawn_slopes(kind, rows, seed):
    """Four times the slopes, whole numbers."""
    drawn = np.random.default_rng(seed).integers(0, 5, rows)
    return {"all": np.full(rows, 4), "none": np.zeros(rows, int), "any": drawn}[kind].astype(object)


def gain(left, slopes, right, exponent, with_identity):
    """A lower bound of |I - left S right| or |left S right|^2, a fraction: at the float64 top singular vector.

    left, right: matrices of integers, times 2^exponent together. slopes: four times S.
    """
    exponent -= 2
    branch = (left * slopes) @ right
    least = min(exponent, 0)
    identity = np.eye(*branch.shape, dtype=int).astype(object) * 2**-least * with_identity
    matrix = branch * 2 ** (exponent - least)
    return squared_gain(identity - matrix), power(least)


def certified(op, matrix, exponent):
    """The proved bound; None where the square of the norm may be beyond float64, which is refused."""
    try:
        return op.bound().proved
    except NotCertifiable:  # the norm is at most 2^6 times the largest of up to 64 x 64 entries
        assert int(max(abs(matrix).ravel())) ** 2 * power(2 * exponent) > power(1000)
        return None


def matrix_of(linear):
    return integers(linear.matrix) if isinstance(linear, operators.Dense) else conv_matrix(linear)


@few_and_nightly_many
def test_constants_of_potential_steps_are_never_below(examples, record_testsuite_property):
    found = []

    def check(example):
        linear, kind, seed, _ = example
        matrix, exponent = matrix_of(linear)
        bias, activation = np.zeros(linear.out_shape[-1]), operators.ReLU(linear.out_shape)
        op = operators.PotentialStep(linear, bias, activation)
        squared, scale = gain(matrix.T * 2, drawn_slopes(kind, len(matrix), seed), matrix, 2 * exponent, True)
        proved = certified(op, matrix, exponent)
        if proved is not None:
            assert proved >= 1
            found.append(looseness(proved, squared, scale))

    search(check, two_paths(1), examples)
    record_testsuite_property("looseness, potential step, median", float(np.median(found)))
    assert np.median(found) < 1e-9  # with all slopes 0, or all 1, the bound is attained
    assert len(found) > 0.8 * examples


@few_and_nightly_many
def test_constants_of_sandwiches_are_never_below(examples, record_testsuite_property):
    found = []

    def check(example):
        linear, kind, seed, outputs = example
        columns = linear.in_shape[-1]
        outputs = min(outputs, columns - 1)
        matrix, exponent = matrix_of(linear)
        first = np.arange(matrix.shape[1]) % columns < outputs
        bias, activation = np.zeros(linear.out_shape[-1]), operators.ReLU(linear.out_shape)
        op = operators.Sandwich(linear, bias, activation, outputs)
        slopes = drawn_slopes(kind, len(matrix), seed)
        squared, scale = gain(matrix[:, first].T * 2, slopes, matrix[:, ~first], 2 * exponent, False)
        proved = certified(op, matrix, exponent)
        if proved is not None:
            found.append(looseness(proved, squared, scale))

    search(check, two_paths(2), examples)
    record_testsuite_property("looseness, sandwich, least", min(found))
    assert len(found) > 0.8 * examples and min(found) < 1
