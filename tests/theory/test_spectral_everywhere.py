"""Bounds of orthogonal kernels that hold for maps of all sizes, in spectral and in the checker."""

import math
import re
import shutil
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from checker_helpers import Forger, linear_head, write_run
from soundness_helpers import PATTERNS, array_of, orthonormal, paraunitary, strided

from lipjax import checker, conv, operators, spectral
from lipjax.network import make_network
from lipjax.spectral import norms, symbol, verified

ZERO = ((1, 1), (1, 1))


def dense_norm(op):
    """Tap by tap."""
    (h, w, c), (out_h, out_w, o) = op.in_shape, op.out_shape
    k1, k2 = op.kernel.shape[:2]
    s1, s2 = conv.stride_pair(op.strides)
    circular = op.padding == "CIRCULAR"
    low = ((k1 - 1) // 2, (k2 - 1) // 2) if circular else [p[0] for p in conv.explicit_padding((k1, k2), op.padding)]
    matrix = np.zeros((out_h, out_w, o, h, w, c))
    for p1, p2, t1, t2 in np.ndindex(out_h, out_w, k1, k2):
        x1, x2 = s1 * p1 + t1 - low[0], s2 * p2 + t2 - low[1]
        if circular:
            x1, x2 = x1 % h, x2 % w
        if 0 <= x1 < h and 0 <= x2 < w:
            matrix[p1, p2, :, x1, x2, :] += op.kernel[t1, t2].T
    return np.linalg.norm(matrix.reshape(out_h * out_w * o, -1), 2)


def symbol_norms(kernel, count=400, seed=1):
    """Of stride 1, at random frequencies and at those of multiples of pi / 2."""
    angles = np.concatenate(
        [
            np.random.default_rng(seed).uniform(0, 2 * np.pi, (count, 2)),
            np.pi / 2 * np.stack(np.meshgrid(range(4), range(4)), -1).reshape(-1, 2),
        ]
    )
    rows, columns = (np.exp(1j * np.outer(angles[:, a], np.arange(kernel.shape[a]))) for a in range(2))
    return np.linalg.norm(np.einsum("fy,fx,yxio->foi", rows, columns, kernel), 2, axis=(1, 2))


def of_taps(taps):
    found = symbol.GramPolynomial(taps).bound_everywhere(math.inf)
    assert found is not None
    return found


KERNELS = {  # kernel, strides
    "square": (paraunitary(3, 3, 2), 1),
    "up": (paraunitary(2, 5, 1), 1),
    "down": (paraunitary(5, 2, 3), 1),
    "one tap": (orthonormal(np.random.default_rng(0), 4, 3)[None, None], 1),
    "patches": (strided(1, 4, 2, 0), 2),
    "strided": (strided(2, 6, 2, 1), 2),
    "a scale": (1e-200 * paraunitary(3, 3, 2), 1),
    "another": (1e150 * paraunitary(3, 3, 2), 1),
}


@pytest.mark.parametrize("name", KERNELS)
def test_one_bound_holds_for_all_maps(name, monkeypatch):
    kernel, strides = KERNELS[name]
    scale = {"a scale": 1e-200, "another": 1e150}.get(name, 1.0)
    monkeypatch.setattr(norms, "_TINY_SIDE", 0)
    found = []
    for size in ((2, 4), (6, 6), (4, 2), (40, 60)):
        for padding in ("CIRCULAR", "ZERO", ((3, 0), (1, 5))):
            op = operators.Conv(kernel, (*size, kernel.shape[2]), strides, padding)
            pads = padding if padding == "CIRCULAR" else conv.explicit_padding(kernel.shape[:2], padding)
            axes = norms._axes(kernel, op.in_shape, strides, pads)
            if not np.array_equal(symbol.without_idle_taps(kernel, axes), kernel):
                continue  # on so small a map some taps meet nothing but padding
            bound = op.bound()
            assert bound.method == spectral.EVERYWHERE and "every size" in bound.method
            found.append(bound.proved)
            if size != (40, 60):
                assert bound.proved >= dense_norm(op) * (1 - 1e-14)
    # Another low padding may spread the pixels of a window over more blocks, which rounds otherwise.
    assert len(found) >= 6 and max(found) <= min(found) * (1 + 1e-12)
    assert scale <= found[0] <= scale * (1 + 1e-11)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", [(3, 3, 2, 3), (1, 4, 2, 2), (2, 1, 3, 1), (2, 2, 1, 1), (1, 1, 3, 2)])
def test_the_inequality_holds_for_any_kernel(shape, pattern):
    """Close to an isometry or not: the sum of norms is an upper bound at every frequency."""
    kernel, _ = verified.scale_to_unit(array_of(pattern, shape, seed=3))
    taps = kernel.swapaxes(2, 3)
    squared, details = of_taps(np.ascontiguousarray(taps))
    top = symbol_norms(kernel).max()
    assert math.sqrt(squared) >= top * (1 - 1e-13)
    assert Fraction(details["centre"]) + Fraction(details["residual"]) >= squared
    places = np.argwhere(taps.any(axis=(2, 3)))  # lags at which no two taps meet add nothing, and are left out
    apart = {tuple(b - a) for a in places for b in places}
    assert details["lags"] == (len(apart) + 1) // 2 <= (math.prod(2 * k - 1 for k in shape[:2]) + 1) // 2
    # The exact residual, in rationals: the computed one is above, by rounding alone.
    whole = np.array([[Fraction(x) for x in row] for row in taps.reshape(-1, shape[2]).tolist()]).reshape(taps.shape)
    total = Fraction(0)
    for down in range(shape[0]):
        for right in range(1 - shape[1], shape[1]):
            if (down, right) < (0, 0):
                continue
            product: Any = np.zeros((shape[2],) * 2, int)
            for y, x in np.ndindex(shape[0], shape[1]):
                if 0 <= y + down < shape[0] and 0 <= x + right < shape[1]:
                    product = product + whole[y, x].T.dot(whole[y + down, x + right])
            parts = [product - Fraction(details["centre"]) * np.eye(shape[2], dtype=int)]
            if (down, right) != (0, 0):
                parts = [product + product.T, product - product.T]
            total += Fraction(math.sqrt(max(sum(part.ravel() ** 2) for part in parts))) * (1 - Fraction(1, 2**50))
    assert Fraction(details["centre"]) + total <= squared
    assert float(squared) - details["centre"] - float(total) <= 1e-12 * float(symbol.sum_of_norms_squared_up(taps))


def test_it_is_attained_and_every_part_of_it_is_needed():
    scalars = np.array([0.75, 0.5]).reshape(1, 2, 1, 1)
    squared, _ = of_taps(scalars)
    assert 1.25**2 <= squared <= 1.25**2 * (1 + 1e-13)  # at the frequency 0
    # Skew lags: I + J z with J a rotation by 90 degrees has norm 2 where i sin counts, and the even part vanishes.
    rotation = np.array([[0.0, -1.0], [1.0, 0.0]])
    taps = np.stack([np.eye(2), rotation])[None] / 2
    assert not symbol.GramPolynomial(taps).even[1:].any()
    squared, details = of_taps(taps)
    top = symbol_norms(taps.swapaxes(2, 3)).max() ** 2
    assert top == pytest.approx(1) and details["centre"] == pytest.approx(0.5)  # control: c and even parts give 0.5
    assert squared >= top
    # A diagonal that differs: |C_0 - c I| is needed.
    squared, _ = of_taps(np.diag([1.0, 0.5])[None, None])
    assert squared >= 1


@pytest.mark.parametrize("noise", [0.0, 1e-12, 1e-10, 3e-10, 1e-9, 1e-7, 1e-2])
def test_what_is_not_close_enough_is_bounded_as_before(noise):
    rng = np.random.default_rng(5)
    kernel = paraunitary(6, 6, 2)
    kernel = kernel + noise * rng.normal(size=kernel.shape)
    bound = spectral.conv_norm_bound(kernel, (12, 16, 6), 1, ZERO)
    around = spectral.conv_norm_bound(kernel, (12, 16, 6), 1, "CIRCULAR")
    if noise in (0.0, 1e-12):
        assert bound.method == around.method == spectral.EVERYWHERE
    if noise >= 1e-9:
        assert spectral.EVERYWHERE not in (bound.method, around.method)
    top = symbol_norms(kernel).max()
    assert around.proved >= np.linalg.norm(np.fft.fft2(kernel, (12, 16), axes=(0, 1)), 2, axis=(2, 3)).max() * (
        1 - 1e-14
    )
    assert bound.proved <= max(top * (1 + 1e-6), 1 + 2.0**-30)


def test_kernels_of_single_precision_and_tiny_maps_are_bounded_as_before():
    kernel = paraunitary(4, 4, 2)
    rounded = kernel.astype(np.float32).astype(np.float64)
    assert spectral.conv_norm_bound(rounded, (20, 20, 4), 1, ZERO).method != spectral.EVERYWHERE
    # The border takes a part of the norm away; a dense operator of 16 inputs costs nothing.
    tiny = spectral.conv_norm_bound(kernel, (2, 2, 4), 1, ZERO)
    assert "dense" in tiny.method and tiny.proved <= 1 + 1e-11
    one = spectral.conv_norm_bound(kernel, (1, 1, 4), 1, ZERO)
    assert "only block tap" in one.method and one.proved < 1 - 1e-2
    # Nor is a kernel as a whole looked at where the map meets only some of its taps.
    wide = np.zeros((9, 1, 4, 4))
    wide[0], wide[4] = 5.0, np.eye(4)
    bound = spectral.conv_norm_bound(wide, (2, 400, 4), 1, ((4, 4), (0, 0)))
    assert bound.method != spectral.EVERYWHERE and 1 <= bound.proved < 1 + 1e-9


# -- the checker ------------------------------------------------------------------------------------------------------


def axes_of(op):
    padding = op.padding if isinstance(op.padding, str) else [list(pair) for pair in op.padding]
    fields = {"kernel": op.kernel, "in_shape": list(op.in_shape), "padding": padding}
    fields["strides"] = list(conv.stride_pair(op.strides))
    return checker.Conv(fields).axes


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("padding", ["ZERO", "CIRCULAR"])
def test_the_checker_proves_these_claims_and_none_below(name, padding):
    kernel, strides = KERNELS[name]
    op = operators.Conv(kernel, (40, 32, kernel.shape[2]), strides, padding)
    bound, axes = op.bound(), axes_of(op)
    assert bound.method == spectral.EVERYWHERE == checker.EVERYWHERE
    norm = symbol_norms(kernel).max() if strides == 1 else 1.0
    for claim, proved in ((bound.claimed, True), (norm * (1 - 1e-12), False), (0.0, False), (-1.0, False)):
        assert checker.conv_below(kernel, axes, bound.method, bound.details, Fraction(claim)) == proved
    assert bound.claimed <= norm * (1 + 1e-9)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", [(3, 3, 2, 3), (1, 4, 2, 2), (2, 2, 1, 1)])
def test_the_checker_is_never_below_for_any_kernel(shape, pattern):
    kernel = array_of(pattern, shape, seed=4)
    op = operators.Conv(kernel, (30, 30, shape[2]), 1, "CIRCULAR")
    top = symbol_norms(kernel).max()
    assert not checker.autocorrelation_below(kernel, axes_of(op), Fraction(top * (1 - 1e-12)))
    # The triangle inequality over lags is at most that over taps, times the root of the side.
    total = np.linalg.norm(kernel, axis=(2, 3)).sum()
    assert checker.autocorrelation_below(kernel, axes_of(op), Fraction(2 * math.sqrt(shape[3]) * total))


def test_the_checker_needs_every_part_of_the_inequality():
    """As of `test_it_is_attained_and_every_part_of_it_is_needed`: skew lags, symmetric lags, an uneven diagonal."""
    rotation = np.array([[0.0, -1.0], [1.0, 0.0]])
    for taps in ([np.eye(2), rotation], [np.eye(2), np.eye(2)], [2 * np.diag([1.0, 0.5])]):
        kernel = np.stack(taps)[None] / 2
        op = operators.Conv(kernel, (8, 30, 2), 1, "CIRCULAR")
        assert symbol_norms(kernel).max() == pytest.approx(1)
        for claim, proved in ((1.2, True), (1 - 1e-12, False), (0.85, False)):
            assert checker.autocorrelation_below(kernel, axes_of(op), Fraction(claim)) == proved


def test_the_checker_looks_at_all_taps():
    """The statement is about every size, so a tap that this map does not meet counts."""
    kernel = np.zeros((9, 1, 4, 4))
    kernel[4] = np.eye(4)
    op = operators.Conv(kernel, (2, 400, 4), 1, ((4, 4), (0, 0)))
    assert checker.conv_below(kernel, axes_of(op), checker.EVERYWHERE, {}, Fraction(1 + 1e-9))
    kernel[0, 0, 0, 0] = 1e-3
    assert not checker.conv_below(kernel, axes_of(op), checker.EVERYWHERE, {}, Fraction(1 + 1e-9))


def test_chains_of_circular_convolutions():
    first = operators.Conv(paraunitary(3, 5, 1), (24, 24, 3), 1, "CIRCULAR")
    second = operators.Conv(paraunitary(5, 5, 2, seed=1), (24, 24, 5), 1, "CIRCULAR")

    def of(op, claim):
        fields = {"kernel": op.kernel, "in_shape": list(op.in_shape), "padding": op.padding, "strides": [1, 1]}
        found = checker.Conv(fields)
        found.claim = Fraction(claim)
        return found

    chain = checker.Chain([of(first, 1.0), of(second, 1.0)])
    assert chain.circular_below(checker.EVERYWHERE, {}, Fraction(1 + 1e-9))
    assert not chain.circular_below(checker.EVERYWHERE, {}, Fraction(1 - 1e-9))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    rng = np.random.default_rng(0)
    shape = (16, 16, 3)
    skew = np.zeros((1, 1, 4, 4))
    skew[0, 0, 0, 1], skew[0, 0, 2, 3] = 0.5, 0.5
    skew = skew - skew.swapaxes(2, 3)
    ops = [
        ("same", operators.Conv(paraunitary(3, 4, 2), shape)),
        ("act", operators.MaxMin((16, 16, 4))),
        ("exponential", operators.ConvExponential(skew, (16, 16, 4), 5)),
        ("strided", operators.Conv(strided(4, 4, 4, 1), (16, 16, 4), 4, "CIRCULAR")),
        ("flat", operators.Flatten((4, 4, 4))),
    ]
    network = make_network(ops, linear_head(rng, 3, 64), 0.3, 0.5)
    directory = tmp_path_factory.mktemp("everywhere") / "run"
    return directory, write_run(directory, network)


def test_a_report_says_so_and_the_certificate_is_proved(run):
    directory, frozen = run
    rows = {row.name: row for row in frozen.lipschitz_report()}
    for name in ("same", "strided"):
        assert rows[name].method == spectral.EVERYWHERE and 1 <= rows[name].claimed < 1 + 1e-9
    assert rows["exponential"].details["skew_norm_method"] == spectral.EVERYWHERE
    code, lines = checker.check(directory)
    assert code == 0, lines


def lower_bound(f):
    f.layer("same")["bound"] = 1 - 1e-9


def larger_kernel(f):
    f.arrays["ops/same/kernel"] = f.arrays["ops/same/kernel"] * (1 + 1e-6)


def another_kernel(f):
    f.arrays["ops/strided/kernel"] = f.arrays["ops/strided/kernel"][::-1] + 1e-3


def other_operator(f):
    f.layer("act")["method"] = spectral.EVERYWHERE


@pytest.mark.parametrize(
    ("forge", "message"),
    [
        (lower_bound, r"same \(Conv\): the bound .* cannot be proved"),
        (larger_kernel, r"same \(Conv\): the bound .* cannot be proved"),
        (another_kernel, r"strided \(Conv\): the bound .* cannot be proved"),
        (other_operator, "the method 'autocorrelation .* is none for it"),
    ],
)
def test_forged_statements_are_refused(run, tmp_path, forge, message):
    shutil.copytree(run[0], tmp_path / "run")
    f = Forger(tmp_path / "run")
    forge(f)
    f.write()
    code, lines = checker.check(tmp_path / "run")
    assert code == 1 and any(re.search(message, line) for line in lines), lines
