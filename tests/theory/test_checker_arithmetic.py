"""The checker proves nothing in a thread that does not round to nearest, or that flushes subnormal numbers."""

import math
from fractions import Fraction

import numpy as np
import pytest
from checker_helpers import write_run
from rounding_helpers import MODES, rounding

from lipjax import checker, operators
from lipjax.network import make_network


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    matrix = np.random.default_rng(0).normal(size=(3, 4))
    ops = [("flat", operators.Flatten((2, 2, 1))), ("dense", operators.Dense(matrix))]
    write_run(directory, make_network(ops, operators.LinearHead(np.eye(2, 3), np.zeros(2))))
    return directory


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_proved_in_another_rounding_mode(honest, mode):
    assert checker.check(honest)[0] == 0  # control
    with rounding(mode):
        code, lines = checker.check(honest)
    assert code == 2 and len(lines) == 1 and "does not round to nearest" in lines[0]
    assert checker.check(honest)[0] == 0


@pytest.mark.parametrize("mode", MODES)
def test_each_operation_alone_tells_every_mode_apart(mode, monkeypatch):
    a, b, nearest = checker.arithmetic_cases()
    with rounding(mode):
        signed = np.copysign(b, a)
        directed = {"+": a + signed, "*": a * b, "/": a / b, "sqrt": np.sqrt(np.abs(a))}

    def refused(expected):
        monkeypatch.setattr(checker, "arithmetic_cases", lambda: (a, b, expected))
        with rounding(mode):
            return checker.arithmetic_problem() is not None

    for kept in directed:  # what is expected of all others is what this mode gives: one operation is left to see it
        assert refused({**directed, kept: nearest[kept]}), kept
    assert not refused(directed)  # control: with all of them so, nothing is left


def test_expected_results_are_the_nearest_doubles():
    """By an oracle in exact numbers: no double is nearer, and of two as near the even one is taken."""
    a, b, nearest = checker.arithmetic_cases()
    pairs = [(Fraction(x), Fraction(y)) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    exact = {
        "+": [x + (y if x > 0 else -y) for x, y in pairs],
        "*": [x * y for x, y in pairs],
        "/": [x / y for x, y in pairs],
    }
    for name, values in exact.items():
        for value, found in zip(values, nearest[name].tolist(), strict=True):
            distance = abs(Fraction(found) - value)
            for other in (math.nextafter(found, -math.inf), math.nextafter(found, math.inf)):
                away = abs(Fraction(other) - value)
                even = int(Fraction(found) / Fraction(math.ulp(found))) % 2 == 0
                assert distance < away or distance == away and even, (name, value)
    for value, root in zip(a.tolist(), nearest["sqrt"].tolist(), strict=True):
        half = Fraction(math.ulp(root)) / 2
        assert (Fraction(root) - half) ** 2 < abs(Fraction(value)) < (Fraction(root) + half) ** 2


@pytest.mark.parametrize("flushed", ["results", "operands"])
def test_flushed_subnormals_are_noticed(honest, monkeypatch, flushed):
    """A machine that takes them for zero cannot be had here: NumPy's arrays are replaced by such as do."""

    class Flushing(np.ndarray):
        def __mul__(self, other):
            least = 2.0**-1022
            x = np.asarray(self)
            x = np.where(np.abs(x) < least, 0.0, x) if flushed == "operands" else x
            product = x * np.asarray(other)
            return np.where(np.abs(product) < least, 0.0, product) if flushed == "results" else product

    class Module:
        def __getattr__(self, name):
            return getattr(np, name)

        def array(self, values):
            return np.array(values).view(Flushing)

    a, b, nearest = checker.arithmetic_cases()  # by NumPy's own arrays
    assert checker.arithmetic_problem() is None  # control
    monkeypatch.setattr(checker, "np", Module())
    assert "subnormal" in checker.arithmetic_problem()
    code, lines = checker.check(honest)
    assert code == 2 and "subnormal" in lines[0]
