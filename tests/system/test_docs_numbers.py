"""Measured numbers in docs/ that code can measure again: shares of error bounds, bounds of an example, a formula."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lipjax
from lipjax import activations, bounds, operators, pooling
from lipjax.models import LipConvnet
from lipjax.numerics import gamma

DOCS = pathlib.Path(__file__).parents[2] / "docs"
COUNT = 200_000


def largest_share(name, rng):
    """The largest error at random points, in units of the bound (b, 2): long doubles serve as exact numbers."""
    angle, length = rng.uniform(0, np.pi / 2, COUNT), rng.uniform(0.5, 2, COUNT)
    direction = np.abs([np.cos(angle), np.sin(angle)]) * length
    if name == "Householder":
        direction *= rng.choice([-1, 1], (2, COUNT))
    z = rng.normal(size=(2, COUNT))
    apply = activations.fold if name == "Householder" else pooling.wedge_distance
    found = np.asarray(jax.jit(apply)(jnp.asarray(z.reshape(1, -1)), jnp.asarray(direction)))[0].reshape(-1, COUNT)
    a, b, c, s = *z.astype(np.longdouble), *direction.astype(np.longdouble)
    squared, size = c * c + s * s, np.sqrt(a * a + b * b)
    if name == "Householder":
        p, q, keep = (c * c - s * s) / squared, 2 * c * s / squared, c * b - s * a >= 0
        exact = np.stack([np.where(keep, a, p * a + q * b), np.where(keep, b, q * a - p * b)])
    else:
        exact = np.where(c * a + s * abs(b) < 0, size, (c * abs(b) - s * a) / np.sqrt(squared))[None]
    error = np.sqrt(((found - exact) ** 2).sum(axis=0)) / size
    return float(error.max()) / gamma(getattr(operators, name)._roundings)


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="long doubles are no longer than doubles here")
def test_shares_of_the_bounds_of_pairs_are_not_above_those_stated():
    text = " ".join((DOCS / "soundness.md").read_text().split())
    (stated,) = re.findall(r"the largest errors were (.*?) of these bounds", text)
    for name in ("Householder", "ProjectionPool"):
        (number,) = re.findall(rf"([0-9.]+) \({name}\)", stated)
        share = largest_share(name, np.random.default_rng(0))
        assert 0.5 * float(number) < share <= float(number)


@pytest.mark.nightly
def test_bounds_of_the_example_of_orthogonal_networks():
    (line,) = re.findall(r"max\(row.proved .*", (DOCS / "orthogonal.md").read_text())
    sigma, bound = (float(number) for number in re.findall(r"1 \+ ([0-9.e-]+)", line))
    shape = (8, 8, 1)
    exact = {"padding": "CIRCULAR", "train_terms": None, "eval_terms": None}
    model = LipConvnet(shape, 10, depth=6, num_blocks=3, width=8, layer_options=exact)
    rows = lipjax.freeze(model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *shape)))).lipschitz_report()
    assert 0.5 * sigma < max(row.proved for row in rows) - 1 <= sigma
    assert 0.9 * bound < max(row.claimed for row in rows) - 1 <= bound


def test_the_recursion_of_liplt_takes_moduli_of_mean_slopes():
    """Of the absolute value's half, a = -1/2: without the modulus the formula would be below the true constant."""
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=(6, 6)) for _ in range(3)]
    alpha, beta = -1.0, 0.0
    _, report = bounds.liplt_bound([operators.Dense(w) for w in weights], (alpha, beta))
    a, b = (alpha + beta) / 2, (beta - alpha) / 2

    def norm(matrix):
        return np.linalg.norm(matrix, 2)

    def constants(a):  # as docs/liplt.md has them, for the two activations
        first = norm(weights[0])
        return first, a * norm(weights[1] @ weights[0]) + b * norm(weights[1]) * first

    assert "|a|^(k-1)" in (DOCS / "liplt.md").read_text()
    stated = [row.claimed for row in report.layers]
    product = norm(weights[1]) * norm(weights[0])
    np.testing.assert_allclose(stated[1], min(constants(abs(a))[1], product), rtol=1e-6)
    assert constants(a)[1] < 0.9 * stated[1]
