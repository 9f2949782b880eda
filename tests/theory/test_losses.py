"""Losses against the papers' own code (golden files), and against loops over the definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_helpers import GOLDEN, relative
from tiers import everyday

from lipjax import certify, losses
from lipjax.operators import LinearHead
from lipjax.parametrize import lln

pytestmark = pytest.mark.quick_compiles

PARITY = 1e-9  # relative, float64: the golden files' own tolerance


@pytest.mark.parametrize("setting", everyday(["0", "1"], "1"))
@pytest.mark.parametrize("head", everyday(["lln", "plain"], "plain"))
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
    value, grads = jax.jit(jax.value_and_grad(mean_loss, (0, 1, 2)))(*map(jnp.asarray, arguments))
    expected = f"output/{name}{setting}"
    assert relative(value, z[f"{expected}/loss"]) < PARITY
    for got, field in zip(grads, ("grad_logits", "grad_head_weight", "grad_lc"), strict=True):
        assert relative(got, z[f"{expected}/{field}"]) < PARITY
    # Control: another radius is another loss.
    other = jax.jit(lambda logits: loss(logits, labels, jnp.ones((10, 10)), 2 * epsilon).mean())(z["input/logits"])
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
    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradients(matrix, logits):
        lipschitz = LinearHead(matrix, jnp.zeros(3)).pairwise_lipschitz()
        return getattr(losses, kind)(logits, jnp.array([0, 1]), lipschitz, 0.5).sum()

    for matrix in (jnp.ones((3, 4)), jnp.zeros((3, 4))):
        grads = gradients(matrix, jnp.zeros((2, 3)))
        assert all(np.isfinite(np.asarray(g)).all() for g in grads)


def test_normalize_rows():
    w = jnp.array([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(np.asarray(lln.normalize_rows(w)), [[0.6, 0.8], [0, 0]], rtol=1e-15)
    assert np.isfinite(np.asarray(jax.jacobian(lln.normalize_rows)(w))).all()


def test_certificate_regularization_parity():
    z = np.load(GOLDEN / "certificates_lln_ortho.npz")
    labels, scale = jnp.asarray(z["input/labels"]), float(z["input/L"])

    def parts(features, weight, bias):
        head = LinearHead(lln.normalize_rows(weight), bias)
        return head(features), scale * head.pairwise_lipschitz()

    def mean_loss(*arguments):
        logits, lipschitz = parts(*arguments)
        return losses.certificate_regularization(logits, labels, lipschitz, float(z["input/cr_gamma"])).mean()

    arguments = [jnp.asarray(z[name]) for name in ("input/features", "param/weight", "param/bias")]
    value, grads = jax.jit(jax.value_and_grad(mean_loss, (0, 1, 2)))(*arguments)
    assert relative(value, z["output/cr_loss"]) < PARITY
    for got, name in zip(grads, ("cr_grad_features", "cr_grad/weight", "cr_grad/bias"), strict=True):
        assert relative(got, z[f"output/{name}"]) < PARITY
    logits, lipschitz = parts(*arguments)
    # Control: without the radii it is another loss.
    assert relative(losses.cross_entropy(logits, labels).mean(), z["output/cr_loss"]) > 1e-3

    # The certificates of the two heads, of the predicted class and of the label; a tie gives 0.
    orthogonal = jnp.full((10, 10), scale * np.sqrt(2.0))
    for name, y, constants in (
        ("lln", logits, lipschitz),
        ("ortho", jnp.asarray(z["input/ortho_logits"]), orthogonal),
    ):
        predicted = certify.certified_radius(y, constants)
        assert relative(predicted, z[f"output/{name}_cert_pred"]) < PARITY
        assert relative(losses.label_radius(y, labels, constants), z[f"output/{name}_cert_label"]) < PARITY
    assert float(predicted[0]) == 0
    assert relative(lln.normalize_rows(arguments[1]), z["output/lln_weight"]) < PARITY


def test_label_radius_by_definition_and_the_radius_of_wrong_labels():
    rng = np.random.default_rng(5)
    y, t, lipschitz = rng.normal(size=(30, 4)), rng.integers(0, 4, 30), rng.uniform(0.5, 2, (4, 4))
    expected = [
        min((row[k] - row[i]) / lipschitz[k, i] for i in range(4) if i != k) for row, k in zip(y, t, strict=True)
    ]
    arguments = jnp.asarray(y), jnp.asarray(t), jnp.asarray(lipschitz)
    np.testing.assert_allclose(losses.label_radius(*arguments), expected, rtol=1e-14)
    plain = losses.cross_entropy(*arguments[:2])
    regularised = losses.certificate_regularization(*arguments, 0.3)
    np.testing.assert_allclose(regularised, plain - 0.3 * np.maximum(expected, 0), rtol=1e-12)
    wrong = np.array(expected) < 0
    assert wrong.any() and not wrong.all()
    np.testing.assert_array_equal(regularised[wrong], plain[wrong])


def test_radii_without_limit_or_rows_that_coincide_leave_the_loss_finite():
    logits, labels = jnp.array([[2.0, 1.0], [1.0, 2.0], [1.0, 1.0]]), jnp.array([0, 0, 0])
    np.testing.assert_array_equal(losses.label_radius(logits, labels, jnp.zeros((2, 2))), [np.inf, -1, 0])

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def values(matrix, logits):
        lipschitz = LinearHead(matrix, jnp.zeros(2)).pairwise_lipschitz()
        return losses.certificate_regularization(logits, labels, lipschitz, 2.0).sum()

    for matrix in (jnp.ones((2, 4)), jnp.eye(2, 4)):
        value, grads = values(matrix, logits)
        assert np.isfinite(float(value)) and all(np.isfinite(np.asarray(g)).all() for g in grads)


def test_curvature_penalty():
    logits, labels = jnp.array([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0]]), jnp.array([0, 2])
    got = losses.curvature_penalty(logits, labels, jnp.array([[1.0, 2.0], [0.0, 5.0]]), 0.1)
    np.testing.assert_allclose(got, losses.cross_entropy(logits, labels) + jnp.array([0.15, 0.25]), rtol=1e-15)
    # tests/theory/test_curvature.py compares it with the papers' code.


def test_new_losses_in_both_precisions(precision):
    dtype = jnp.float64 if precision == "x64" else jnp.float32
    logits, labels = jnp.zeros((2, 3), dtype).at[:, 1].set(1), jnp.array([1, 1])
    regularised = jax.jit(losses.certificate_regularization)(logits, labels, jnp.ones((3, 3), dtype), 0.5)
    penalised = jax.jit(losses.curvature_penalty)(logits, labels, jnp.ones((2, 2), dtype), 0.5)
    assert regularised.dtype == penalised.dtype == dtype
    np.testing.assert_allclose(penalised - regularised, 1.0, rtol=1e-6)
