"""Attempts to break bounds: random hostile operators against lower bounds of their norms in exact rational arithmetic.

A quotient |A v| / |v| of rationals is computed without any rounding, so that a bound below one is a false proof and
never a false alarm. `pytest -m nightly` of this file and of test_soundness_networks.py tries more than 10,000; with
--junitxml=FILE it records how far bounds are above the quotients.
"""

import dataclasses
import functools
import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import strategies as st
from soundness_helpers import (
    PATTERNS,
    array_of,
    arrays,
    conv_matrix,
    few_and_nightly_many,
    floats,
    integers,
    looseness,
    power,
    scaled,
    search,
    squared_gain,
    strided,
)

from benchmarks import power_iteration
from lipjax import NotCertifiable, checker, conv, operators
from lipjax.certify.layout import entry_of
from lipjax.spectral import EVERYWHERE, norms


@st.composite
def dense_operators(draw):
    side = st.one_of(st.integers(1, 9), st.integers(10, 24))
    return functools.partial(operators.Dense, draw(arrays(draw(side), draw(side))))


@st.composite
def convolutions(draw):
    """Zero-padded, unpadded and circular ones; kernels of any side, also beyond the map; strides, groups, dilation."""
    h, w, c, o = (draw(st.integers(1, n)) for n in (9, 9, 3, 3))
    kernel_size = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    strides = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    groups, dilation = draw(st.sampled_from([1, 1, 2, 3])), (1, 1)
    if draw(st.booleans()):
        kernel_size = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        dilation = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    window = [d * (k - 1) + 1 for d, k in zip(dilation, kernel_size, strict=True)]
    kind = draw(st.sampled_from(["CIRCULAR", "ZERO", "explicit"]))
    if kind == "CIRCULAR":
        h, w = (max(s, n // s * s) for n, s in zip((h, w), strides, strict=True))
        padding = kind
    else:
        low = st.integers(0, 3)
        padding = ((draw(low), draw(low)), (draw(low), draw(low))) if kind == "explicit" else "ZERO"
        pads = [(2 * ((k - 1) // 2), 0) for k in window] if padding == "ZERO" else padding
        # An output needs a padded map that is no smaller than the window.
        h, w = (max(n, k - sum(p)) for n, k, p in zip((h, w), window, pads, strict=True))
    kernel, in_shape = draw(arrays(*kernel_size, c, o * groups)), (h, w, c * groups)
    return functools.partial(operators.Conv, kernel, in_shape, strides, padding, groups, dilation)


@few_and_nightly_many
def test_dense_bounds_are_never_below(examples, record_testsuite_property):
    found = []

    def check(op):
        matrix, exponent = integers(op.matrix)
        found.append(looseness(op.bound().proved, squared_gain(matrix), power(exponent)))

    search(check, dense_operators(), examples)
    record_testsuite_property("looseness, dense", max(found))
    assert max(found) < 1e-11


@few_and_nightly_many
def test_convolution_bounds_are_never_below(examples, record_testsuite_property):
    found = []

    def check(op):
        matrix, exponent = conv_matrix(op)
        found.append(looseness(op.bound().proved, squared_gain(matrix), power(exponent)))
        transposed = operators.ConvTranspose(op).bound().proved
        looseness(transposed, squared_gain(matrix.T), power(exponent))

    search(check, convolutions(), examples)
    record_testsuite_property("looseness, convolution", max(found))
    assert max(found) < 1e-6  # maps this small are bounded as dense matrices or exactly by frequency


@few_and_nightly_many
def test_row_sums_are_never_below(examples):
    """Of any kernel, those whose channels are scaled by row sums included, in `spectral` and in the checker."""

    def check(op):
        if op.kernel.any() and len(op.kernel) % 2:
            unit = np.ldexp(op.kernel, -math.frexp(np.abs(op.kernel).max())[1])
            size = np.abs(unit).sum(axis=(0, 1))
            op = dataclasses.replace(op, kernel=unit / np.sqrt(size @ size.sum(axis=0) + 1e-6)[:, None])
        bound, (matrix, exponent) = op.row_sum_bound(), conv_matrix(op)
        squared = squared_gain(matrix) * power(2 * exponent)
        looseness(bound.proved, squared)
        if bound.proved > 0:
            claim = Fraction(math.sqrt(float(squared / Fraction(bound.proved) ** 2))) * Fraction(bound.proved)
            steps = conv.stride_pair(op.strides)
            full = conv.without_groups(op.kernel, op.groups, op.dilation)
            for rows in ("inputs", "outputs"):
                assert not checker.row_sums_below(full, steps, {"rows": rows}, claim * (1 - Fraction(1, 2**50)))

    search(check, convolutions(), examples)


def checked(op):
    """The checker's operator for a convolution."""
    fields = json.loads(json.dumps(entry_of(op)))
    return checker.Conv(fields | {"kernel": op.kernel})


@few_and_nightly_many
def test_the_checker_proves_convolutions_and_nothing_below(examples, monkeypatch):
    monkeypatch.setattr(norms, "_DENSE_SIDE", 0)  # frequencies are looked at for small maps, too
    kinds = []

    def check(op):
        bound, (matrix, exponent) = op.bound(), conv_matrix(op)
        made, method = checked(op), bound.method
        assert made.proves(Fraction(bound.claimed), made.named(method), bound.details)
        kinds.append((op.groups > 1, op.dilation != (1, 1)))
        if bound.proved < 2.0**-900:
            return
        squared = squared_gain(matrix) * power(exponent) ** 2 / Fraction(bound.proved) ** 2
        below = Fraction(bound.proved) * Fraction(math.sqrt(squared)) * (1 - Fraction(1, 2**30))
        assert not made.proves(below, method, bound.details)

    search(check, convolutions(), examples)
    assert {*kinds} == {(False, False), (False, True), (True, False), (True, True)}  # control: all were met


@st.composite
def splines(draw):
    """Values of all kinds, scales of either sign, and points near knots and far beyond them."""
    channels, knots = draw(st.integers(1, 4)), 2 * draw(st.integers(1, 4)) + 1
    values = draw(arrays(channels, knots))
    spacing = 2.0 ** draw(st.integers(-8, 8))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    scale = rng.choice([-1.0, 1.0, 0.3, 7.0], channels) * 2.0 ** rng.integers(-20, 20, channels)
    points = spacing * np.concatenate([rng.integers(-6, 7, 8), rng.normal(size=8) * 10.0 ** rng.integers(-3, 3, 8)])
    points = np.concatenate([points, np.nextafter(points, np.inf)])[:, None] / scale
    return lambda: (values, scale, spacing, np.sort(points, axis=0))


@few_and_nightly_many
def test_splines_are_never_steeper_and_err_by_no_more(examples):
    """In `operators` and in the checker, against the interpolant of the stored values in exact rationals."""
    refused = []

    def exact(values, scale, spacing, x):
        t, middle = scale * x, len(values) // 2
        first = min(max(math.floor(t / spacing), -middle), middle - 1)
        left, right = values[first + middle : first + middle + 2]
        return (left + (t / spacing - first) * (right - left)) / scale

    def check(made):
        values, scale, spacing, x = made
        op = operators.LinearSpline(values, scale, (len(values),), spacing)
        fields = {"values": values, "scale": scale, "in_shape": [len(values)], "spacing": spacing}
        if not np.abs(values).max() <= 2.0**100:
            refused.append(op)
            for refuse in (op.bound, lambda: checker.LinearSpline(fields)):
                with pytest.raises((NotCertifiable, checker.Unproved), match="beyond 2.100"):
                    refuse()
            return
        bound, theirs = op.bound(), checker.LinearSpline(fields)
        assert theirs.proves(Fraction(bound.claimed), bound.method, {})
        rows = [[Fraction(v) for v in row] for row in values.tolist()]
        truth = [
            [
                exact(row, Fraction(float(a)), Fraction(spacing), Fraction(float(v)))
                for row, a, v in zip(rows, scale, image, strict=True)
            ]
            for image in x
        ]
        y, local = theirs.evaluate(x)
        for image, found, allowed, before in zip(x, y, local, truth, strict=True):
            floor = Fraction(checker.FLOOR) * Fraction(1 + float(np.linalg.norm(image)))
            error = sum((Fraction(float(v)) - t) ** 2 for v, t in zip(found, before, strict=True))
            assert error <= (Fraction(float(allowed)) + floor) ** 2
        for first, second, before, after in zip(x, x[1:], truth, truth[1:], strict=False):
            for a, b, f, g in zip(first, second, before, after, strict=True):
                assert abs(f - g) <= Fraction(bound.proved) * abs(Fraction(float(a)) - Fraction(float(b)))

    search(check, splines(), examples)
    assert len(refused) < examples / 2


@st.composite
def orthogonal_convolutions(draw):
    """Kernels with an orthogonal symbol but for rounding, and somewhat further off; strides, any padding, any map."""
    block, pairs, seed = draw(st.integers(1, 2)), draw(st.integers(0, 2)), draw(st.integers(0, 2**32))
    c, o = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    kernel = strided(c, o, block, pairs, seed)
    noise = draw(st.sampled_from([0.0, 2.0**-52, 2.0**-45, 2.0**-36]))
    kernel = kernel * (1 + noise * np.random.default_rng(seed).normal(size=kernel.shape))
    kernel = scaled(kernel, draw(st.one_of(st.just(0), st.integers(-100, 100), st.sampled_from([-900, 900]))))
    h, w = (block * draw(st.integers(1, n)) for n in (5, 5))
    low = st.integers(0, 3)
    padding = draw(st.sampled_from(["CIRCULAR", "explicit"]))
    if padding == "explicit":
        padding = ((draw(low), draw(low)), (draw(low), draw(low)))
        h, w = (max(n, len(kernel) - sum(p)) for n, p in zip((h, w), padding, strict=True))
    return functools.partial(operators.Conv, kernel, (h, w, c), block, padding)


@few_and_nightly_many
def test_bounds_for_all_sizes_are_never_below(examples, monkeypatch, record_testsuite_property):
    monkeypatch.setattr(norms, "_TINY_SIDE", 0)
    found, methods = [], []

    def check(op):
        bound, (matrix, exponent) = op.bound(), conv_matrix(op)
        squared = squared_gain(matrix)
        looseness(bound.proved, squared, power(exponent))
        methods.append(bound.method)
        if bound.method != EVERYWHERE:
            return
        found.append(bound.proved)
        axes = checked(op).axes
        assert checker.conv_below(op.kernel, axes, bound.method, bound.details, Fraction(bound.claimed))
        ratio = math.sqrt(float(squared * power(exponent) ** 2 / Fraction(bound.proved) ** 2))
        below = Fraction(bound.proved) * Fraction(ratio) * (1 - Fraction(1, 2**30))
        assert not checker.conv_below(op.kernel, axes, bound.method, bound.details, below)

    search(check, orthogonal_convolutions(), examples)
    record_testsuite_property("bounds for all sizes", len(found))
    assert len(found) > len(methods) / 3  # control: the method is met


@st.composite
def frequency_operators(draw):
    h, w, i, o = (draw(st.integers(1, n)) for n in (7, 7, 3, 3))
    fixed = (2 - h % 2) * (2 - w % 2)
    paired = draw(arrays((h * w - fixed) // 2, 2, o, i)) if h * w > fixed else np.zeros((0, 2, o, i))
    return functools.partial(operators.CircularConv.from_blocks, draw(arrays(fixed, o, i)), paired, (h, w, i))


@few_and_nightly_many
def test_frequency_bounds_are_never_below(examples, record_testsuite_property):
    """The map is block diagonal in an orthonormal basis (test_dft.py): its norm is that of the largest block."""
    found = []

    def check(op):
        bound = op.bound().proved
        blocks = [(block, np.zeros_like(block)) for block in op.fixed] + [tuple(pair) for pair in op.paired]
        slack = []
        for real, imaginary in blocks:
            matrix, exponent = integers(np.block([[real, -imaginary], [imaginary, real]]))
            slack.append(looseness(bound, squared_gain(matrix), power(exponent)))
        found.append(min(slack))

    search(check, frequency_operators(), examples)
    record_testsuite_property("looseness, frequency", max(found))
    assert max(found) < 1e-11


@st.composite
def exponentials(draw):
    h, w, c = (draw(st.integers(1, n)) for n in (5, 5, 3))
    side, groups = st.sampled_from([1, 3, 5]), draw(st.sampled_from([1, 1, 2]))
    shape = draw(side), draw(side), c, c
    parts = [array_of(draw(st.sampled_from(PATTERNS)), shape, draw(st.integers(0, 2**32))) for _ in range(groups)]
    kernel = np.concatenate([part - np.flip(part, (0, 1)).swapaxes(2, 3) for part in parts], 3) / 2
    kernel = scaled(kernel, draw(st.integers(-12, 3)))
    options = {"padding": draw(st.sampled_from(["ZERO", "CIRCULAR"])), "groups": groups}
    return functools.partial(operators.ConvExponential, kernel, (h, w, c * groups), draw(st.integers(1, 7)), **options)


@few_and_nightly_many
def test_truncated_exponentials_are_never_below(examples, record_testsuite_property):
    found = []

    def check(op):
        skew, exponent = conv_matrix(operators.Conv(op.kernel, op.in_shape, 1, op.padding, op.groups))
        rough = floats(skew)
        matrix = np.ldexp(rough[0], min(rough[1] + exponent, 900))
        term = total = np.eye(len(matrix))
        for j in range(1, op.num_terms + 1):
            term = matrix @ term / j
            total = total + term
        if not np.isfinite(total).all():
            return
        v, _ = integers(np.linalg.svd(total)[2][0])
        # sum_j A^j v / j!, times p! 2^(-p e): integers, e < 0.
        assert exponent < 0
        p = op.num_terms
        images = [v]
        for _ in range(p):
            images.append(skew @ images[-1])
        image = sum(images[j] * (math.factorial(p) // math.factorial(j) << (j - p) * exponent) for j in range(p + 1))
        gain = Fraction(int(sum(image * image)), int(sum(v * v)))
        found.append(looseness(op.bound().proved, gain, power(p * exponent) / math.factorial(p)))

    search(check, exponentials(), examples)
    record_testsuite_property("looseness, exponential", max(found))
    assert min(found) < 1e-6  # where the series does not amplify the bound is 1; elsewhere it is that of |J|


@st.composite
def residuals(draw):
    """x + B D A x: D, of diagonal entries k/4 from 0 to 1, is an activation that the bound of ReLU speaks of."""
    outer, inner = draw(st.integers(1, 9)), draw(st.integers(1, 6))
    first, second = (
        scaled(array_of(draw(st.sampled_from(PATTERNS)), shape, draw(st.integers(0, 2**32))), draw(st.integers(-9, 9)))
        for shape in ((inner, outer), (outer, inner))
    )
    slopes = np.array(draw(st.lists(st.integers(0, 4), min_size=inner, max_size=inner)), dtype=object)

    def make():
        parts = operators.Dense(first), operators.ReLU((inner,)), operators.Dense(second)
        return operators.Residual(parts), first, second, slopes

    return make


@few_and_nightly_many
def test_residual_bounds_are_never_below(examples, record_testsuite_property):
    found = []

    def check(example):
        op, first, second, slopes = example
        (a, e1), (b, e2) = integers(first), integers(second)
        exponent = e1 + e2 - 2
        branch = (b * slopes) @ a
        least = min(exponent, 0)
        matrix = branch * 2 ** (exponent - least) + np.eye(len(branch), dtype=int).astype(object) * 2**-least
        found.append(looseness(op.bound().proved, squared_gain(matrix), power(least)))

    search(check, residuals(), examples)
    record_testsuite_property("looseness, residual, median", float(np.median(found)))
    assert min(found) < 1e-6  # a branch that is small, or points the same way


def test_a_certificate_by_power_iteration_is_broken_where_the_proof_holds():
    found = power_iteration.break_one(10)
    assert found["exact"] and found["estimate"] < found["proved"]
    assert found["certified"] < found["distance"] < found["claimed"]
    assert found["certified"] > 0.29


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_parameters_that_are_no_numbers_are_never_bounded(bad):
    kernel = np.zeros((3, 3, 2, 2))
    fixed, paired = np.ones((4, 2, 2)), np.ones((6, 2, 2, 2))
    cases = [
        (operators.Dense(np.ones((2, 3))), "matrix"),
        (operators.Conv(np.ones((3, 3, 2, 2)), (4, 4, 2)), "kernel"),
        (operators.Conv(np.ones((3, 3, 2, 2)), (4, 4, 2), 1, "CIRCULAR"), "kernel"),
        (operators.ConvExponential(kernel, (4, 4, 2), 3), "kernel"),
        (operators.CircularConv.from_blocks(fixed, paired, (4, 4, 2)), "fixed"),
        (operators.CircularConv.from_blocks(fixed, paired, (4, 4, 2)), "paired"),
        (operators.Householder(np.ones((2, 1)), (2,)), "direction"),
        (operators.Householder2(np.ones((3, 2, 1)), (2,)), "directions"),
        (operators.ProjectionPool(np.ones((2, 1)), (2,)), "direction"),
    ]
    for op, field in cases:
        assert math.isfinite(op.bound().proved)
        broken = np.array(getattr(op, field))
        broken.flat[0] = bad
        object.__setattr__(op, field, broken)
        with pytest.raises(NotCertifiable):
            op.bound()
    for head, field in (
        (operators.LinearHead(np.ones((2, 3)), np.ones(2)), "matrix"),
        (operators.MLPHead(np.ones((2, 3)), np.ones(2), np.ones((2, 2)), np.ones(2)), "w1"),
        (operators.MLPHead(np.ones((2, 3)), np.ones(2), np.ones((2, 2)), np.ones(2)), "w2"),
    ):
        broken = np.array(getattr(head, field))
        broken.flat[0] = bad
        object.__setattr__(head, field, broken)
        with pytest.raises(NotCertifiable):
            head.pairwise_bound()
