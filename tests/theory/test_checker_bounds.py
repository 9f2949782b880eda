"""The checker's own bounds against norms: neither below nor far above."""

import math
from fractions import Fraction

import numpy as np
import pytest
from checker_helpers import draw

from lipjax import checker, conv, operators


def test_bounds_by_cholesky_are_neither_below_nor_far_above_the_norm():
    rng = np.random.default_rng(0)
    for shape in ((5, 5), (40, 9), (9, 40), (1, 1), (64, 64)):
        for scale in (1e-200, 1.0, 1e150):
            matrix = scale * rng.normal(size=shape)
            norm = np.linalg.norm(matrix, 2)
            assert checker.matrix_below(matrix, Fraction(norm * (1 + 1e-10)))
            assert not checker.matrix_below(matrix, Fraction(norm * (1 - 1e-12)))
    ones = np.ones((256, 256))
    assert not checker.matrix_below(ones, Fraction(256) * (1 - Fraction(1, 2**53)))
    assert checker.matrix_below(ones, Fraction(256 * (1 + 1e-9)))


def test_tables_of_the_circle_are_rounded_correctly():
    import mpmath

    with mpmath.workdps(40):
        for n in (1, 3, 7, 12):
            cosines, sines = checker.circle(n)
            assert cosines.tolist() == [float(mpmath.cospi(mpmath.mpf(a) / n)) for a in range(2 * n)]
            assert sines.tolist() == [float(mpmath.sinpi(mpmath.mpf(a) / n)) for a in range(2 * n)]


@pytest.mark.parametrize("num_terms", [1, 3, 4, 5, 6, 12])
def test_the_supremum_of_the_series_is_decided(num_terms):
    theta = np.linspace(0, 2.5, 20001)
    values = sum((1j * theta) ** j / math.factorial(j) for j in range(num_terms + 1))
    supremum = np.abs(values).max()
    assert checker.series_below(num_terms, Fraction(2.5), Fraction(supremum * (1 + 1e-9)))
    assert not checker.series_below(num_terms, Fraction(2.5), Fraction(supremum * (1 - 1e-7)))
    assert checker.series_below(num_terms, Fraction(0), Fraction(1))  # of zero: the identity
    assert not checker.series_below(num_terms, Fraction(0), Fraction(1 - 2**-53))


def checked(operator):
    """The checker's operator, with a claim a little above its norm."""
    fields = {f: getattr(operator, f) for f in ("kernel", "matrix", "padding") if hasattr(operator, f)}
    if "kernel" in fields:
        fields["in_shape"] = list(operator.in_shape)
        fields["strides"] = list(conv.stride_pair(operator.strides))
    found = checker.OPERATORS[type(operator).__name__](fields)
    found.claim = Fraction(operator.bound().claimed)
    return found


def dense(ops):
    x = np.eye(math.prod(ops[0].in_shape)).reshape(-1, *ops[0].in_shape)
    for op in ops:
        x = op.apply(x)
    return x.reshape(len(x), -1).T


def chains():
    rng = np.random.default_rng(7)
    zero = [
        operators.Conv(draw(rng, 3, 3, 2, 3), (12, 5, 2)),
        operators.Conv(draw(rng, 2, 3, 3, 2), (12, 5, 3), (2, 1)),
    ]
    growing = [operators.Conv(draw(rng, 3, 3, 1, 2), (9, 4, 1)), operators.Conv(draw(rng, 1, 3, 2, 4), (9, 4, 2))]
    around = [
        operators.Conv(draw(rng, 3, 2, 2, 3), (6, 8, 2), 1, "CIRCULAR"),
        operators.Conv(draw(rng, 3, 3, 3, 2), (6, 8, 3), (3, 2), "CIRCULAR"),
    ]
    return {"zero": zero, "growing": growing, "around": around}


@pytest.mark.parametrize("name", ["zero", "growing", "around"])
def test_norms_of_chains_are_neither_below_nor_far_above(name):
    ops = [checked(op) for op in chains()[name]]
    chain, norm = checker.Chain(ops), np.linalg.norm(dense(ops), 2)
    above, below = Fraction(norm * (1 + 1e-6)), Fraction(norm * (1 - 1e-9))
    assert chain.dense_below(above) and not chain.dense_below(below)
    assert chain.banded_below(above) and not chain.banded_below(below)
    details = {"grid": [2, 4], "twist": [0, 0]}
    method = "Cholesky per frequency of a block circulant"
    if name == "around":
        assert chain.circular_below(method, details, above) and not chain.circular_below(method, details, below)
    else:
        with pytest.raises(checker.Unproved, match="circular"):
            chain.circular_below(method, details, above)
    x, y = (np.random.default_rng(8).normal(size=(1, *shape)) for shape in (ops[0].in_shape, ops[0].out_shape))
    assert np.sum(ops[0].apply(x) * y) == pytest.approx(np.sum(x * ops[0].back(y)))


class Difference(checker.Composite):
    """A composite that has a list of parts, and a field for one more."""

    settings, single = ("ops", "last"), ("last",)
    called = "a difference"
    arrays = ("scale",)

    def prepare(self):
        self.in_shape = self.ops[0].in_shape

    def combined(self, claims):
        return sum(claims)

    def evaluate(self, x):
        y, error = checker.evaluate_in_turn(self.ops, x, np.zeros(len(x)))
        return y - self.scale * self.last.apply(x), error


def test_composites_are_made_of_fields_and_of_lists(monkeypatch):
    monkeypatch.setitem(checker.OPERATORS, "Difference", Difference)
    rng = np.random.default_rng(3)
    first, second, last = rng.normal(size=(4, 3)), rng.normal(size=(3, 4)), rng.normal(size=(3, 3))
    named = {"a/0/matrix": first, "a/1/matrix": second, "a/last/matrix": last, "a/scale": np.ones(1)}
    dense = {"type": "Dense"}
    entry = {"type": "Difference", "ops": [dense, dense], "last": dense}

    def make(entry, arrays):
        return checker.make_operator(entry, "a", arrays)

    arrays = checker.Arrays(named)
    made = make(entry, arrays)
    assert arrays.used == set(named) and [op.matrix.shape for op in made.parts()] == [(4, 3), (3, 4), (3, 3)]
    x = rng.normal(size=(2, 3))
    np.testing.assert_allclose(made.evaluate(x)[0], x @ (second @ first - last).T, rtol=1e-13)
    norms = [float(np.linalg.norm(m, 2)) * (1 + 1e-9) for m in (first, second, last)]
    row = {"type": "Dense", "method": "Cholesky of the Gram matrix", "details": {}}
    rows = [{**row, "bound": norm} for norm in norms]
    assert made.proves(sum(map(Fraction, norms)), "", {"parts": rows})
    assert not made.proves(sum(map(Fraction, norms)) * (1 - Fraction(1, 2**60)), "", {"parts": rows})
    with pytest.raises(checker.Unproved, match="operator 2 .*cannot be proved"):
        made.proves(Fraction(100), "", {"parts": [*rows[:2], {**row, "bound": norms[2] * (1 - 1e-6)}]})
    for wrong, message in (
        ({**entry, "last": entry}, "cannot stand in a difference"),
        ({**entry, "ops": [dense, {"type": "Residual", "ops": [dense]}]}, "cannot stand in a difference"),
        ({**entry, "last": [dense]}, "cannot stand in a difference"),
        ({**entry, "ops": dense}, "ops is no list of operators"),
        ({**entry, "last": {"type": ["Dense"]}}, "cannot be checked"),
        ({key: value for key, value in entry.items() if key != "last"}, "expected the fields"),
    ):
        with pytest.raises(checker.Unproved, match=message):
            make(wrong, checker.Arrays(named))
    with pytest.raises(checker.Unproved, match="is missing"):
        make(entry, checker.Arrays({name: value for name, value in named.items() if name != "a/last/matrix"}))
