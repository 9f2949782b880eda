"""The constants of the proofs: their values, and that each is defined once."""

import ast
import math
from fractions import Fraction
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lipjax import numerics
from lipjax.linalg.unit import of_peak_1, unit, unit_of_peak_1
from lipjax.spectral import power_iteration

LIPJAX = Path(numerics.__file__).parent
NAMES = {name for name in vars(numerics) if name.isupper()} | {"gamma", "exact_gamma", "gamma32"}
# What the constants were called where they were defined twice.
FORMER = {"COMPUTED", "FLOOR", "GUARD", "LEAST", "UNIT", "U"}


def defined(tree):
    """Names that a module binds by assignment or as a function, at its top level."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            yield from (part.id for part in ast.walk(target) if isinstance(part, ast.Name)) if target else ()


def test_each_constant_is_defined_once():
    again = {
        str(path.relative_to(LIPJAX)): found
        for path in sorted(LIPJAX.rglob("*.py"))
        if path.name not in ("numerics.py", "checker.py")  # which has its own
        and (found := (NAMES | FORMER) & set(defined(ast.parse(path.read_text()))))
    }
    assert again == {}
    assert {"UNIT_ROUNDOFF", "gamma"} <= set(defined(ast.parse(Path(numerics.__file__).read_text())))  # control


@pytest.mark.parametrize("n", [1, 8, 1000, 9_000_000])
def test_gamma_bounds_n_roundings(n):
    assert numerics.exact_gamma(n) == Fraction(n, 2**53 - n)
    assert numerics.exact_gamma(n) <= Fraction(numerics.gamma(n)) <= numerics.exact_gamma(n) * (1 + Fraction(1, 2**49))
    if n <= 2**22:
        assert numerics.gamma32(n) == pytest.approx(n / (2**24 - n), rel=1e-15)
    assert numerics.gamma32(2**23) == math.inf


def test_exact_constants_are_those_of_float64():
    assert numerics.EXACT_UNIT_ROUNDOFF == Fraction(1, 2**53) and numerics.EXACT_UNDERFLOW == Fraction(1, 2**900)
    # Several sums of TERMS terms in turn err by less than what error bounds are enlarged by.
    assert numerics.TERMS * numerics.UNIT_ROUNDOFF * 9 < numerics.ENLARGEMENT - 1


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e300])
def test_vectors_are_scaled_to_norm_1_wherever_they_lie(scale):
    v = jnp.array([[3.0, 4.0], [0.0, 0.0], [-5.0, 12.0]]) * scale
    rows = unit(v, 7.0, batched=True)
    np.testing.assert_allclose(rows, [[0.6, 0.8], [7, 7], [-5 / 13, 12 / 13]], rtol=1e-15)
    np.testing.assert_allclose(unit(v, v), v / scale / 194**0.5, rtol=1e-15)
    peaks = of_peak_1(v, 7.0, batched=True)
    np.testing.assert_allclose(peaks, [[0.75, 1], [7, 7], [-5 / 12, 1]], rtol=1e-15)
    np.testing.assert_allclose(unit_of_peak_1(peaks, 7.0, batched=True)[::2], rows[::2], rtol=1e-15)
    assert np.isnan(unit(jnp.array([np.inf, 1.0]), 7.0)).any()  # not taken for zero
    for peak in (1e38, 3e38):  # whose reciprocals are no normal float32 numbers
        found = jax.jit(of_peak_1)(jnp.array([0.75, 1.0, 0.0], jnp.float32) * jnp.float32(peak), 7.0)
        np.testing.assert_allclose(found, [0.75, 1, 0], rtol=1e-6)


@pytest.mark.parametrize(("dtype", "scale"), [(jnp.float32, 1e-30), (jnp.float32, 1e30), (jnp.bfloat16, 1e-30)])
def test_norms_are_estimated_wherever_they_lie_with_one_sum_a_step(dtype, scale):
    """Squares of 1e-30 and 1e30 are no float32 numbers, nor are A^T A v for |A| = 1e30: maps of 1e15 at most."""
    diagonal = jnp.array([3.0, 4.0, 0.0], dtype)
    start = jnp.full(3, scale, dtype)
    for size in (1.0, 1e-15, 1e15):
        apply = lambda v, size=size: dtype(size) * diagonal * v  # noqa: E731
        sigma, v = power_iteration(apply, apply, start, 12)
        eps = float(jnp.finfo(dtype).eps)
        # The other direction falls by (3 / 4)^2 a step; each of the roundings of a step errs by eps / 2.
        np.testing.assert_allclose(float(sigma) / size, 4.0, rtol=0.75**48 + 8 * eps)
        np.testing.assert_allclose(np.linalg.norm(np.float64(v)), 1, rtol=4 * eps)
    text = str(jax.make_jaxpr(lambda v: power_iteration(apply, apply, v, 12))(start))
    # One at the start and one a step, one of the image; and two sums of squares.
    assert (text.count("reduce_max["), text.count("reduce_sum[")) == (14, 2)
