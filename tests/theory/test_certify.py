"""Radii and accuracies against loops over the definition; the boundaries: ties, NaN, zero constants, rounding."""

import json
import math
import sys
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest

from lipjax import certify, files
from lipjax.certify import certificate as certificates


def radius_by_definition(logits, lipschitz):
    j = int(np.argmax(logits))
    return min((logits[j] - logits[i]) / lipschitz[j, i] for i in range(len(logits)) if i != j)


def test_certified_radius_is_the_least_ratio_over_all_rivals():
    rng = np.random.default_rng(0)
    logits, lipschitz = rng.normal(size=(50, 12)), rng.uniform(0.1, 10, (12, 12))
    got = np.asarray(certify.certified_radius(jnp.asarray(logits), jnp.asarray(lipschitz)))
    expected = np.array([radius_by_definition(row, lipschitz) for row in logits])
    np.testing.assert_allclose(got, expected, rtol=1e-14)
    # Control: the runner-up is often not the rival that limits the radius, and the matrix is not symmetric here.
    order = np.argsort(logits, axis=1)
    rows = np.arange(50)
    runner_up = (logits[rows, order[:, -1]] - logits[rows, order[:, -2]]) / lipschitz[order[:, -1], order[:, -2]]
    assert (runner_up > expected * (1 + 1e-9)).sum() > 10
    transposed = np.asarray(certify.certified_radius(jnp.asarray(logits), jnp.asarray(lipschitz.T)))
    assert (np.abs(transposed - expected) > 1e-9).any()


def test_ties_nan_and_the_diagonal():
    lipschitz = jnp.array([[np.nan, 2.0, 1.0], [2.0, np.nan, 1.0], [1.0, 1.0, np.nan]])
    logits = jnp.array(
        [[1.0, 1.0, 0.0], [3.0, 1.0, 0.0], [np.nan, 1.0, 0.0], [0.0, np.nan, 1.0], [np.inf, 0, 0], [0.0, 0.0, 0.0]]
    )
    got = np.asarray(certify.certified_radius(logits, lipschitz))
    np.testing.assert_array_equal(got, [0, 1, 0, 0, np.inf, 0])
    broken = lipschitz.at[0, 2].set(np.nan)
    assert float(certify.certified_radius(logits[1:2], broken)[0]) == 0
    with pytest.raises(ValueError, match=r"\(3, 3\)"):
        certify.certified_radius(logits, lipschitz[:2])


def test_rivals_that_cannot_be_reached():
    got = certify.certified_radius(jnp.array([[1.0, 0.0], [1.0, 1.0]]), jnp.zeros((2, 2)))
    np.testing.assert_array_equal(np.asarray(got), [np.inf, 0])


def test_radius_of_is_below_the_exact_quotient():
    rng = np.random.default_rng(1)
    margins, lipschitz = rng.uniform(1e-9, 1, 2000), rng.uniform(0.1, 100, 2000)
    radii = certificates.radius_of(margins, lipschitz)
    exact = [Fraction(float(m)) / Fraction(float(c)) for m, c in zip(margins, lipschitz, strict=True)]
    assert all(Fraction(float(r)) < e for r, e in zip(radii, exact, strict=True))
    assert all(e - Fraction(float(r)) <= e * Fraction(2**-51) for r, e in zip(radii, exact, strict=True))
    assert any(Fraction(float(m / c)) > e for m, c, e in zip(margins, lipschitz, exact, strict=True))  # control


def test_radius_of_at_the_edges():
    margins = np.array([0.0, -1.0, -np.inf, 1.0, 1e-320, 1.0, 1.0])
    lipschitz = np.array([1.0, 1.0, 1.0, 0.0, 1.0, np.inf, np.nan])
    got = certificates.radius_of(margins, lipschitz)
    assert got[:3].tolist() == [0, 0, 0] and got[3] == sys.float_info.max
    assert 0 <= got[4] < 1e-320 and got[5] == 0 and got[6] == 0


def test_certify_margins_takes_every_rival_and_never_the_prediction():
    lipschitz = np.full((3, 3), 2.0)
    margins = np.array([[0.0, 1.0, 4.0], [-1.0, 0.0, 2.0], [0.0, np.nan, 1.0], [0.0, 1.0, -np.inf]])
    found = certificates.certify_margins(np.array([0, 1, 0, 0]), margins, lipschitz)
    assert found.rivals.tolist() == [1, 0, 1, 2]
    np.testing.assert_allclose(found.radii, [0.5, 0, 0, 0], rtol=1e-15)
    assert found.margins.tolist() == [1.0, -1.0, -np.inf, -np.inf]
    rows = certificates.image_rows(found, np.array([0, 1, 2, 0]))
    assert rows[0] == {"label": 0, "prediction": 0, "rival": 1, "margin": 1.0, "radius": found.radii[0]}
    assert rows[2]["margin"] is None
    json.dumps(rows, allow_nan=False)


def test_certified_accuracy_is_strict_and_needs_the_right_class():
    predictions, labels = np.array([0, 1, 1, 0]), np.array([0, 1, 0, 0])
    radii = np.array([0.5, 0.2, 9.0, 0.25])
    assert certify.certified_accuracy(predictions, labels, radii, 0.25) == 0.25
    assert certify.certified_accuracy(predictions, labels, radii, 0.2) == 0.5
    with pytest.raises(ValueError, match="equally long"):
        certify.certified_accuracy(predictions, labels[:2], radii, 0.1)


def test_write_json_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"x": 0.1})
    with pytest.raises(ValueError):
        files.write_json(path, {"x": math.nan})
    assert json.loads(path.read_text()) == {"x": 0.1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
