"""Norms bounded by row sums, in spectral and in the checker: never below, attained, and refused where forged."""

import math
import re
import shutil
from fractions import Fraction

import numpy as np
import pytest
from checker_helpers import Forger, linear_head, write_run
from soundness_helpers import PATTERNS, array_of

from lipjax import checker, conv, operators, spectral
from lipjax.network import make_network
from lipjax.operators import Linear
from lipjax.spectral import row_sums, verified


def gram_moduli(kernel, rows, strides=(1, 1)):
    """N, from its definition, tap by tap."""
    taps = kernel if rows == "inputs" else kernel.swapaxes(2, 3)
    kh, kw, n, _ = taps.shape
    products = {}
    for t1, t2, r1, r2 in np.ndindex(kh, kw, kh, kw):
        d = r1 - t1, r2 - t2
        if rows == "inputs" or (d[0] % strides[0] == 0 and d[1] % strides[1] == 0):
            products[d] = products.get(d, np.zeros((n, n))) + taps[t1, t2] @ taps[r1, r2].T
    return np.sum([np.abs(product) for product in products.values()], axis=0)


def radius(moduli):
    return np.abs(np.linalg.eigvals(moduli)).max()


def dense_norm(kernel, size, strides, padding):
    """Tap by tap."""
    op = operators.Conv(kernel, (*size, kernel.shape[2]), strides, padding)
    (h, w, c), (out_h, out_w, o), (k1, k2) = op.in_shape, op.out_shape, kernel.shape[:2]
    s1, s2 = conv.stride_pair(strides)
    circular = padding == "CIRCULAR"
    low = ((k1 - 1) // 2, (k2 - 1) // 2) if circular else [p[0] for p in conv.explicit_padding((k1, k2), padding)]
    matrix = np.zeros((out_h, out_w, o, h, w, c))
    for p1, p2, t1, t2 in np.ndindex(out_h, out_w, k1, k2):
        x1, x2 = s1 * p1 + t1 - low[0], s2 * p2 + t2 - low[1]
        if circular or (0 <= x1 < h and 0 <= x2 < w):
            matrix[p1, p2, :, x1 % h, x2 % w, :] += kernel[t1, t2].T
    return np.linalg.norm(matrix.reshape(out_h * out_w * o, -1), 2)


SHAPES = [(3, 3, 2, 3), (1, 4, 2, 2), (2, 1, 3, 1), (2, 2, 1, 1), (1, 1, 4, 6)]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_lesser_spectral_radius_and_above_all_norms(shape, pattern):
    kernel = array_of(pattern, shape, seed=3)
    for strides in ((1, 1), (2, 1)):
        bound = spectral.row_sum_bound(kernel, strides)
        radii = {rows: radius(gram_moduli(kernel, rows, strides)) for rows in ("inputs", "outputs")}
        assert bound.method == spectral.ROW_SUMS
        # Weights are cut off at 2^-60 of the largest, and a Perron vector of a graded kernel may go lower.
        room = 1e-9 if pattern not in ("graded", "sparse") else 0.5
        assert min(radii.values()) * (1 - 1e-12) <= bound.proved**2 <= min(radii.values()) * (1 + room)
    for size, padding in (((4, 6), "CIRCULAR"), ((4, 4), "ZERO"), ((2, 2), ((3, 3), (4, 2)))):
        assert spectral.row_sum_bound(kernel).proved >= dense_norm(kernel, size, 1, padding) * (1 - 1e-14)
        assert bound.proved >= dense_norm(kernel, size, (2, 1), padding) * (1 - 1e-14)


def scaled_by(kernel, rows, q=None):
    """AOL (inputs) and its twin (outputs), with the weights q of SLL."""
    moduli = gram_moduli(kernel, rows)
    q = np.ones(len(moduli)) if q is None else q
    scale = 1 / np.sqrt(moduli @ q / q)
    return kernel * (scale[:, None] if rows == "inputs" else scale)


@pytest.mark.parametrize("rows", ["inputs", "outputs"])
@pytest.mark.parametrize("shape", [(3, 3, 6, 6), (5, 1, 4, 9), (1, 1, 30, 7)])
def test_what_was_scaled_by_row_sums_has_a_bound_of_one(shape, rows):
    rng = np.random.default_rng(1)
    for q in (None, np.exp(2 * rng.normal(size=shape[2 if rows == "inputs" else 3]))):
        kernel = scaled_by(rng.normal(size=shape), rows, q)
        assert radius(gram_moduli(kernel, rows)) == pytest.approx(1, abs=1e-12)
        bound = spectral.row_sum_bound(kernel)
        assert bound.proved <= 1 + 1e-12
        assert spectral.row_sum_bound((1 - 2.0**-26) * kernel).claimed < 1
    with pytest.MonkeyPatch.context() as patch:  # control: without weights it is another number
        patch.setattr(row_sums, "_STEPS", 0)
        taps = kernel if rows == "inputs" else kernel.swapaxes(2, 3)
        assert row_sums.squared_bound(taps, (1, 1)) > 1.05


def test_it_is_attained_on_every_map_with_circular_padding():
    kernel = np.random.default_rng(0).random((3, 3, 2, 4))  # no negative entry: the frequency 0 has all of it
    bound = spectral.row_sum_bound(kernel)
    assert dense_norm(kernel, (4, 4), 1, "CIRCULAR") <= bound.proved
    assert bound.proved <= np.linalg.norm(kernel.sum(axis=(0, 1)), 2) * (1 + 1e-9)


def test_the_rounding_of_products_counts():
    """Of rows whose squares add up to 1 + 2^-54 exactly, and to 1 in float64."""
    row = np.array([[1.0, 2.0**-27]])
    assert (row @ row.T).item() == 1.0
    taps, exponent = verified.scale_to_unit(row[None, None])
    squared = row_sums.squared_bound(taps, (1, 1)) * Fraction(4) ** exponent
    assert squared >= 1 + Fraction(1, 2**54)
    assert Fraction(spectral.row_sum_bound(row.T[None, None]).proved) ** 2 >= 1 + Fraction(1, 2**54)


def test_the_kernel_as_a_matrix_bounds_nothing():
    """Control: row sums of the reshaped kernel, without displacements, are below the norm of the convolution."""
    kernel = np.ones((3, 3, 1, 1))
    reshaped = np.abs(kernel.reshape(-1, 1).T @ kernel.reshape(-1, 1)).max() ** 0.5
    assert reshaped == 3 < dense_norm(kernel, (6, 6), 1, "CIRCULAR") <= spectral.row_sum_bound(kernel).proved
    # And of a strided map, rows of inputs that count fewer outputs may be larger.
    assert spectral.row_sum_bound(np.zeros((2, 2, 1, 1))).proved == 0.0


def test_operators_give_it():
    rng = np.random.default_rng(2)
    matrix, kernel = rng.normal(size=(4, 7)), rng.normal(size=(3, 3, 2, 4))
    found = operators.Dense(matrix).row_sum_bound()
    assert found.proved == spectral.row_sum_bound(matrix.T[None, None]).proved >= np.linalg.norm(matrix, 2)
    op = operators.Conv(kernel, (9, 9, 2), 2)
    assert op.row_sum_bound().proved == spectral.row_sum_bound(kernel, 2).proved
    blocks = operators.CircularConv.from_blocks(np.ones((1, 2, 2)), np.ones((4, 2, 2, 2)), (3, 3, 2))
    assert isinstance(blocks, Linear) and blocks.row_sum_bound() is None
    with pytest.raises(ValueError, match="none empty, got shape"):
        spectral.row_sum_bound(np.zeros((1, 0, 2, 2)))


# -- the checker ------------------------------------------------------------------------------------------------------


def proves(kernel, strides, rows, claim):
    return checker.row_sums_below(kernel, conv.stride_pair(strides), {"rows": rows}, Fraction(claim))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_checker_proves_these_claims_and_none_below(shape, pattern):
    kernel = array_of(pattern, shape, seed=4)
    for strides in ((1, 1), (2, 1)):
        bound = spectral.row_sum_bound(kernel, strides)
        rows = bound.details["rows"]
        assert proves(kernel, strides, rows, bound.claimed)
        lowest = math.sqrt(radius(gram_moduli(kernel, rows, strides)))
        assert not proves(kernel, strides, rows, lowest * (1 - 1e-9))
        assert not proves(kernel, strides, rows, 0.0)
    with pytest.raises(checker.Unproved, match="neither those of inputs nor of outputs"):
        checker.row_sums_below(kernel, (1, 1), {}, Fraction(100))


def test_a_chain_of_scales():
    kernel = scaled_by(np.random.default_rng(3).normal(size=(3, 3, 4, 4)), "outputs")
    for exponent in (-600, 0, 600):
        scaled = np.ldexp(kernel, exponent)
        bound = spectral.row_sum_bound(scaled)
        assert bound.proved == math.ldexp(spectral.row_sum_bound(kernel).proved, exponent)
        assert proves(scaled, 1, bound.details["rows"], bound.claimed)


def frozen_and_reported(directory, network):
    frozen = write_run(directory, network)
    return {row.name: row for row in frozen.lipschitz_report()}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    rng = np.random.default_rng(0)
    shape = (5, 6, 3)
    inner = scaled_by(rng.normal(size=(3, 3, 3, 4)), "outputs")
    matrix = scaled_by(rng.normal(size=(1, 1, 48, 10)), "inputs")[0, 0].T
    ops = [
        ("conv", operators.Conv(inner, shape, (2, 2), "ZERO")),
        ("act", operators.MaxMin((3, 3, 4))),
        ("pad", operators.PadChannels((3, 3, 4), 5)),
        ("flat", operators.Flatten((3, 3, 5))),
        ("dense", operators.Dense(matrix[:, :45])),
    ]
    network = make_network(ops, linear_head(rng, 3, 10), 0.3, 0.5)
    directory = tmp_path_factory.mktemp("row_sums") / "run"
    with pytest.MonkeyPatch.context() as patch:  # as potential steps bound their linear part
        for kind in (operators.Conv, operators.Dense):
            patch.setattr(kind, "bound", kind.row_sum_bound)
        return directory, frozen_and_reported(directory, network)


def test_the_certificate_is_proved(run):
    directory, rows = run
    for name in ("conv", "dense"):
        assert rows[name].method == spectral.ROW_SUMS == checker.ROW_SUMS and rows[name].claimed < 1 + 1e-9
    code, lines = checker.check(directory)
    assert code == 0, lines


def lower_bound(f):
    f.layer("dense")["bound"] *= 1 - 1e-9


def larger_kernel(f):
    f.arrays["ops/conv/kernel"] = f.arrays["ops/conv/kernel"] * (1 + 1e-6)


def other_rows(f):
    f.layer("conv")["details"]["rows"] = "taps"


def other_operator(f):
    f.layer("act")["method"] = spectral.ROW_SUMS


def other_strides(f):
    f.op("conv")["strides"] = [1, 1]


@pytest.mark.parametrize(
    ("forge", "message"),
    [
        (lower_bound, r"dense \(Dense\): the bound .* cannot be proved"),
        (larger_kernel, r"conv \(Conv\): the bound .* cannot be proved"),
        (other_rows, "rows 'taps' are neither"),
        (other_operator, "the method 'row sums .* is none for it"),
        (other_strides, "."),
    ],
)
def test_forged_statements_are_refused(run, tmp_path, forge, message):
    shutil.copytree(run[0], tmp_path / "run")
    f = Forger(tmp_path / "run")
    forge(f)
    f.write()
    code, lines = checker.check(tmp_path / "run")
    assert code == 1 and any(re.search(message, line) for line in lines), lines
