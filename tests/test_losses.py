"""Losses against the papers' own code (golden files), and against loops over the definitions."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lipjax import losses
from lipjax.operators import LinearHead
from lipjax.parametrize import lln

GOLDEN = pathlib.Path(__file__).parent / "golden"
PARITY = 1e-9  # relative, float64: the golden files' own tolerance


def relative(a, b):
    return np.abs(np.asarray(a) - b).max() / np.abs(b).max()


@pytest.mark.parametrize("setting", ["0", "1"])
@pytest.mark.parametrize("head", ["lln", "plain"])
@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("emma", losses.emma),
        ("margin", losses.margin),
        ("trades", losses.trades),
        ("trades_l07", functools.partial(losses.trades, weight=0.7)),
    ],
)
def test_parity_of_values_and_gradients(name, loss, head, setting):
    z = np.load(GOLDEN / f"losses_{head}.npz")
    labels, epsilon = jnp.asarray(z["input/labels"]), float(z[f"input/eps{setting}"])

    def mean_loss(logits, weight, product):
        matrix = lln.normalize_rows(weight) if head == "lln" else weight
        lipschitz = product * LinearHead(matrix, jnp.zeros(10)).pairwise_lipschitz()
        return loss(logits, labels, lipschitz, epsilon).mean()

    arguments = (z["input/logits"], z["param/head.weight"], z[f"input/lc{setting}"])
    value, grads = jax.value_and_grad(mean_loss, (0, 1, 2))(*map(jnp.asarray, arguments))
    expected = f"output/{name}{setting}"
    assert relative(value, z[f"{expected}/loss"]) < PARITY
    for got, field in zip(grads, ("grad_logits", "grad_head_weight", "grad_lc"), strict=True):
        assert relative(got, z[f"{expected}/{field}"]) < PARITY
    # Control: another radius is another loss.
    other = loss(jnp.asarray(z["input/logits"]), labels, jnp.ones((10, 10)), 2 * epsilon).mean()
    assert relative(other, z[f"{expected}/loss"]) > 1e-4


@pytest.mark.parametrize("head", ["lln", "plain"])
def test_parity_of_shifted_logits_and_head(head):
    z = np.load(GOLDEN / f"losses_{head}.npz")
    weight = jnp.asarray(z["param/head.weight"])
    matrix = lln.normalize_rows(weight) if head == "lln" else weight
    assert relative(matrix, z["output/head_weight"]) < PARITY
    op = LinearHead(matrix, jnp.asarray(z["param/head.bias"]))
    assert relative(op(jnp.asarray(z["input/features"])), z["output/head_logits"]) < PARITY
    lipschitz = float(z["input/lc0"]) * op.pairwise_lipschitz()
    arguments = (jnp.asarray(z["input/logits"]), jnp.asarray(z["input/labels"]), lipschitz, float(z["input/eps0"]))
    assert relative(losses.shifted_logits(*arguments, adaptive=True), z["output/emma0/y_"]) < PARITY


def by_definition(kind, y, t, lipschitz, epsilon):
    """One example in plain Python, from the definitions of specs: no formula is shared with the library."""
    k = len(y)
    j = int(np.argmax(y))
    if kind == "gloro":
        bottom = max(y[i] + epsilon * lipschitz[j, i] for i in range(k) if i != j)
        out = np.append(y, bottom)
        return -(out[t] - np.log(np.sum(np.exp(out))))
    if kind == "trades":
        bottom = max(y[i] + epsilon * lipschitz[j, i] for i in range(k) if i != j)
        p = np.exp(y) / np.exp(y).sum()
        extended = np.append(y, bottom)
        q = (np.exp(extended) / np.exp(extended).sum())[:k]
        return -np.log(p[t]) + float(np.sum(p * np.log(p / q)))
    out = np.array(y)
    for i in range(k):
        if i != t:
            reach = epsilon * lipschitz[t, i]
            factor = 1.0 if kind == "margin" else min(max((y[t] - y[i]) / reach, 0.01), 1.0)
            out[i] += factor * reach
    return -(out[t] - np.log(np.sum(np.exp(out))))


@pytest.mark.parametrize("kind", ["emma", "margin", "gloro", "trades"])
def test_definition(kind):
    rng = np.random.default_rng(3)
    y, t = rng.normal(size=(20, 5)) * 2, rng.integers(0, 5, 20)
    lipschitz = rng.uniform(0.5, 2, (5, 5))
    got = getattr(losses, kind)(jnp.asarray(y), jnp.asarray(t), jnp.asarray(lipschitz), 0.7)
    expected = [by_definition(kind, *row, lipschitz, 0.7) for row in zip(y, t, strict=True)]
    assert got.shape == (20,)
    np.testing.assert_allclose(np.asarray(got), expected, rtol=1e-12)
    other = by_definition(kind, y[0], (t[0] + 1) % 5, lipschitz, 0.7)
    assert abs(other - expected[0]) > 1e-3  # control: the label matters


def test_emma_makes_an_uncertified_rival_tie_exactly():
    logits, lipschitz = jnp.array([[1.0, 0.5]]), jnp.full((2, 2), 2.0)
    shifted = losses.shifted_logits(logits, jnp.array([0]), lipschitz, 1.0, adaptive=True)
    assert float(shifted[0, 1]) == 0.0
    assert float(losses.shifted_logits(logits, jnp.array([0]), lipschitz, 1.0, adaptive=False)[0, 1]) == 1.5


@pytest.mark.parametrize("kind", ["emma", "margin", "gloro", "trades"])
def test_gradients_stay_finite_where_rows_of_the_head_coincide(kind):
    def total(matrix, logits):
        lipschitz = LinearHead(matrix, jnp.zeros(3)).pairwise_lipschitz()
        return getattr(losses, kind)(logits, jnp.array([0, 1]), lipschitz, 0.5).sum()

    for matrix in (jnp.ones((3, 4)), jnp.zeros((3, 4))):
        grads = jax.grad(total, (0, 1))(matrix, jnp.zeros((2, 3)))
        assert all(np.isfinite(np.asarray(g)).all() for g in grads)


def test_normalize_rows():
    w = jnp.array([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(np.asarray(lln.normalize_rows(w)), [[0.6, 0.8], [0, 0]], rtol=1e-15)
    assert np.isfinite(np.asarray(jax.jacobian(lln.normalize_rows)(w))).all()
